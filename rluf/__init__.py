"""rluf: Reinforcement Learning from User Feedback (RLUF, arXiv 2505.14946) on Ray, vLLM and DeepSpeed."""

import os

# Ray reads RAY_AUTH_MODE once, when it is first imported, so the default must be in place before any import of ray.
os.environ.setdefault("RAY_AUTH_MODE", "token")

__version__ = "0.1.0"
