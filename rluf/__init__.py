"""rluf: Reinforcement Learning from User Feedback (RLUF, arXiv 2505.14946) on Ray, vLLM and DeepSpeed.

The public names below are imported on first use, so that `import rluf` loads neither torch nor ray.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rluf.config.load import load_settings
    from rluf.config.settings import Settings
    from rluf.prepare.schema import FeedbackRecord
    from rluf.reward.model import RewardModel
    from rluf.serve.client import RewardClient
    from rluf.train.__main__ import train as train_policy

__all__ = ["FeedbackRecord", "RewardClient", "RewardModel", "Settings", "load_settings", "train_policy"]
__version__ = "0.1.0"

_PUBLIC_NAMES = {
    "FeedbackRecord": ("rluf.prepare.schema", "FeedbackRecord"),
    "RewardClient": ("rluf.serve.client", "RewardClient"),
    "RewardModel": ("rluf.reward.model", "RewardModel"),
    "Settings": ("rluf.config.settings", "Settings"),
    "load_settings": ("rluf.config.load", "load_settings"),
    "train_policy": ("rluf.train.__main__", "train"),
}

# Ray reads RAY_AUTH_MODE once, when it is first imported, so the default must be in place before any import of ray.
os.environ.setdefault("RAY_AUTH_MODE", "token")


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _PUBLIC_NAMES:
        raise AttributeError(f"module 'rluf' has no attribute {name!r}")
    module_name, object_name = _PUBLIC_NAMES[name]
    return getattr(importlib.import_module(module_name), object_name)
