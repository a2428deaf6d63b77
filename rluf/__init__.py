"""rluf: Reinforcement Learning from User Feedback (RLUF, arXiv 2505.14946) on Ray, vLLM and DeepSpeed."""

__version__ = "0.1.0"
