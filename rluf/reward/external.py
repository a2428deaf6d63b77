"""Reward models that rluf did not train: any Hugging Face model for sequence classification, checked before training.

Such a model has no calibration.json, so its logit is the score. A model with two labels scores the log-odds of the
second one.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from rluf.errors import ModelError
from rluf.reward.calibration import EXTERNAL_MAX_TOKENS, Calibration

logger = logging.getLogger(__name__)


def check_external_model(folder: Path, setting_key: str) -> None:
    """Check a reward model folder without loading its weights; one warning if rluf did not train the model.

    Raises ModelError, with `setting_key` as the place to correct, for a folder that is not a sequence classification
    model with one or two labels, has no trained head, or whose tokenizer cannot render a conversation.
    """
    if not Calibration.load(folder).is_external:
        return
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from rluf.reward.backbone import build_text_encoder, build_warmup_items

    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{setting_key}: {folder} is not a sequence classification model: {error}") from error
    check_label_count(config, folder)
    stored_names = _read_weight_names(folder)
    head_names = [name for name in model.state_dict() if not name.startswith(f"{model.base_model_prefix}.")]
    missing_names = [name for name in head_names if name not in stored_names]
    if missing_names:
        raise ModelError(
            f"{setting_key}: {folder} lacks the weights {', '.join(missing_names[:4])}; it is a backbone, not a "
            "trained reward model; name another one, or remove the key to train a model on the log"
        )
    # Renders a conversation and tokenizes it: a missing or strict chat template is an error now.
    build_text_encoder(model, folder, EXTERNAL_MAX_TOKENS).encode(build_warmup_items())
    label = f" of the label {config.id2label[1]!r} against {config.id2label[0]!r}" if config.num_labels == 2 else ""
    logger.warning(
        "%s: %s has no calibration.json, so the logit%s is its score as it is (identity calibration): compare its "
        "values with each other only",
        setting_key,
        folder,
        label,
    )


def check_label_count(config: Any, folder: Path) -> None:
    """Raise ModelError unless a transformers configuration has one or two labels."""
    if config.num_labels not in (1, 2):
        labels = ", ".join(str(label) for label in list(config.id2label.values())[:6])
        raise ModelError(
            f"{folder} has {config.num_labels} labels ({labels}); a reward needs a model with one label, or with "
            "two of which the second is the good one; for others write a reward function (source: function)"
        )


def _read_weight_names(folder: Path) -> set[str]:
    """Names of the weights in the folder's safetensors files, from their headers."""
    from safetensors import SafetensorError, safe_open

    names: set[str] = set()
    try:
        for path in folder.glob("*.safetensors"):
            with safe_open(str(path), framework="pt") as file:
                names.update(file.keys())
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise ModelError(f"{folder} has a damaged safetensors file: {error}; download or copy it again") from error
    return names
