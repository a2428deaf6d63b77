"""Scoring with a trained reward model: length-sorted batches under a token budget, calibrated values.

float32 on the CPU: bfloat16 was 1.7 times as fast there, but the same response then scored up to 0.004 apart
alone and in a batch (float32: under 1e-6). On GPUs likewise; reward models are small beside the policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rluf.errors import ModelError
from rluf.objectives.backbone import encoder_for, load_classifier
from rluf.objectives.calibration import Calibration
from rluf.objectives.text import Encoded, Item, TextEncoder, token_batches
from rluf.types import Score

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RewardModel:
    """One objective's reward model: weights, text encoder and calibration."""

    def __init__(
        self, model: PreTrainedModel, encoder: TextEncoder, calibration: Calibration, batch_tokens: int
    ) -> None:
        """`batch_tokens` bounds the padded tokens of one forward pass."""
        self.model = model.eval()
        self.encoder = encoder
        self.calibration = calibration
        self.batch_tokens = batch_tokens

    @classmethod
    def load(cls, path: Path, *, batch_tokens: int, device: str = "cpu") -> RewardModel:
        """Read a folder that rluf.reward wrote. Raises ModelError naming what is wrong with it."""
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} holds no config.json; name a reward model folder that rluf.reward wrote")
        calibration = Calibration.load(path)
        model = load_classifier(path, trained=True, device=device)
        return cls(model, encoder_for(model, path, calibration.max_tokens), calibration, batch_tokens)

    def score(self, items: Sequence[Item], objective: str) -> list[Score]:
        """Scores of (messages, response) items in order: value the calibrated probability, raw the model's logit."""
        raw = self.raw(self.encoder.encode(items))
        values = self.calibration.values(raw)
        return [Score(objective, float(value), logit) for value, logit in zip(values, raw, strict=True)]

    def raw(self, rows: Sequence[Encoded]) -> list[float]:
        """Uncalibrated logits of encoded rows, in order."""
        return logits_of(self.model, self.encoder, rows, self.batch_tokens)


@torch.inference_mode()
def logits_of(model: torch.nn.Module, encoder: TextEncoder, rows: Sequence[Encoded], batch_tokens: int) -> list[float]:
    """Logits of `rows` in order, batched by length. `model` returns an object with logits [B, 1]."""
    result = [0.0] * len(rows)
    device = next(model.parameters()).device
    for batch in token_batches([len(row) for row in rows], batch_tokens):
        inputs = {name: tensor.to(device) for name, tensor in encoder.collate([rows[i] for i in batch]).items()}
        for index, logit in zip(batch, model(**inputs).logits[:, 0].float().tolist(), strict=True):
            result[index] = logit
    return result
