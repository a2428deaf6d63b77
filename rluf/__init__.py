"""rluf: Reinforcement Learning from User Feedback (RLUF, arXiv 2505.14946) on Ray, vLLM and DeepSpeed.

The public names below are imported on first use, so that `import rluf` loads neither torch nor ray.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rluf.api import (
        Report,
        evaluate_policy,
        load_settings,
        prepare_data,
        train_policy,
        train_reward_models,
    )
    from rluf.config.settings import Settings
    from rluf.prepare.schema import FeedbackRecord
    from rluf.reward.model import RewardModel
    from rluf.serve.client import RewardClient

__all__ = [
    "FeedbackRecord",
    "Report",
    "RewardClient",
    "RewardModel",
    "Settings",
    "evaluate_policy",
    "load_settings",
    "prepare_data",
    "train_policy",
    "train_reward_models",
]
__version__ = "0.1.0"

_MODULES = {
    "FeedbackRecord": "rluf.prepare.schema",
    "Report": "rluf.api",
    "RewardClient": "rluf.serve.client",
    "RewardModel": "rluf.reward.model",
    "Settings": "rluf.config.settings",
    "evaluate_policy": "rluf.api",
    "load_settings": "rluf.api",
    "prepare_data": "rluf.api",
    "train_policy": "rluf.api",
    "train_reward_models": "rluf.api",
}
"""Public name -> module that defines it."""

# Ray reads RAY_AUTH_MODE once, when it is first imported. After that a default would only reach the processes that
# ray.init() starts: they would require a token that this process does not send.
if "ray" not in sys.modules:
    os.environ.setdefault("RAY_AUTH_MODE", "token")
# Also read once, at the import of huggingface_hub: bars of transformers and downloads would fill the logs of actors.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'rluf' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """Names for completion in a notebook, before their first use too."""
    return sorted({*globals(), *__all__})
