"""Scoring with a trained reward model: length-sorted batches under a token budget, calibrated values.

float32 on the CPU: bfloat16 was 1.7 times as fast there, but the same response then scored up to 0.004 apart
alone and in a batch (float32: under 1e-6). On GPUs likewise; reward models are small beside the policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from rluf.errors import ModelError
from rluf.objectives.backbone import encoder_for, load_classifier
from rluf.objectives.calibration import Calibration, Floats
from rluf.objectives.passes import pass_logits, passes
from rluf.objectives.text import Encoded, Item, TextEncoder, token_batches
from rluf.types import Score

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def member_folder(folder: Path, number: int) -> Path:
    """Where member `number` of an ensemble lies: the first in the folder itself, so that it loads by plain means."""
    return folder if number == 0 else folder / f"member-{number}"


class RewardModel:
    """One objective's reward model: the weights of its members, text encoder and calibration."""

    def __init__(
        self, members: Sequence[PreTrainedModel], encoder: TextEncoder, calibration: Calibration, batch_tokens: int
    ) -> None:
        """`batch_tokens` bounds the padded tokens of one forward pass."""
        self.members = [member.eval() for member in members]
        self._passes = passes(self.members)
        self.encoder = encoder
        self.calibration = calibration
        self.batch_tokens = batch_tokens

    @classmethod
    def load(cls, path: Path, *, batch_tokens: int, device: str = "cpu") -> RewardModel:
        """Read a folder that rluf.reward wrote. Raises ModelError naming what is wrong with it."""
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} holds no config.json; name a reward model folder that rluf.reward wrote")
        calibration = Calibration.load(path)
        folders = [member_folder(path, number) for number in range(calibration.members)]
        members = [load_classifier(folder, trained=True, device=device) for folder in folders]
        encoders = [
            encoder_for(member, folder, calibration.max_tokens, next_turn=calibration.next_turn, own=number == 0)
            for number, (member, folder) in enumerate(zip(members, folders, strict=True))
        ]
        if not all(encoder.same_as(encoders[0]) for encoder in encoders):
            encoders[0].others = tuple(encoders[1:])
        return cls(members, encoders[0], calibration, batch_tokens)

    def score(self, items: Sequence[Item], objective: str) -> list[Score]:
        """Scores of (messages, response) items in order: value the calibrated probability, raw the model's logit.

        The spread is the standard deviation of the members' own probabilities, 0 for a single model.
        """
        each = self.each(self.encoder.encode(items))
        raw = each.mean(0)
        values = self.calibration.values(raw)
        spread = self.calibration.values(each).std(0)
        return [Score(objective, float(v), float(r), float(s)) for v, r, s in zip(values, raw, spread, strict=True)]

    def raw(self, rows: Sequence[Encoded]) -> list[float]:
        """Uncalibrated logits of encoded rows, in order: the members' mean."""
        logits: list[float] = self.each(rows).mean(0).tolist()
        return logits

    def each(self, rows: Sequence[Encoded]) -> Floats:
        """Uncalibrated logits [members, N] of encoded rows."""
        found = np.zeros((len(self.members), len(rows)))
        for run in self._passes:
            number = run.members[-1]
            read = [row.others[number - 1] if number and row.others else row for row in rows]
            encoder = self._encoders()[number]
            if run.heads:
                found[list(run.members)] = pass_logits(run, encoder, read, self.batch_tokens)
            else:
                found[number] = logits_of(run.model, encoder, read, self.batch_tokens)
        return found

    def _encoders(self) -> Sequence[TextEncoder]:
        """Each member's encoder."""
        return (self.encoder, *self.encoder.others) if self.encoder.others else [self.encoder] * len(self.members)


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
