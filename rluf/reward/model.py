"""Scoring with a trained reward model: length-sorted batches under a token budget, calibrated values.

float32 on the CPU: bfloat16 was 1.7 times as fast there, but the same response then scored up to 0.004 apart
alone and in a batch (float32: under 1e-6). On GPUs likewise; reward models are small beside the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from rluf.errors import ModelError
from rluf.reward.backbone import encoder_for, load_classifier
from rluf.reward.calibration import Calibration, Floats
from rluf.reward.ensemble_forward import pass_logits, passes
from rluf.reward.shared_backbone import join_heads
from rluf.reward.text import Encoded, Item, TextEncoder, token_batches
from rluf.types import Score

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def member_folder(folder: Path, number: int) -> Path:
    """Where member `number` of an ensemble lies: the first in the folder itself, so that it loads by plain means."""
    return folder if number == 0 else folder / f"member-{number}"


def _load_calibration(folder: Path) -> Calibration:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no config.json; name a reward model folder that rluf.reward wrote")
    return Calibration.load(folder)


class RewardModel:
    """One objective's reward model: the weights of its members, text encoder and calibration."""

    def __init__(
        self, members: Sequence[PreTrainedModel], encoder: TextEncoder, calibration: Calibration, batch_tokens: int
    ) -> None:
        """`batch_tokens` bounds the padded tokens of one forward pass."""
        self.members = [member.eval() for member in members]
        self.encoder = encoder
        self._passes = passes(self.members, [other.response_alone for other in self._encoders()])
        self.calibration = calibration
        self.batch_tokens = batch_tokens

    @classmethod
    def load(cls, path: Path, *, batch_tokens: int, device: str = "cpu", heads: Sequence[Path] = ()) -> RewardModel:
        """Read a folder that rluf.reward wrote. Raises ModelError naming what is wrong with it.

        `heads` are the folders of several heads of its backbone, `path` among them: it then has a logit for each.
        """
        calibration = _load_calibration(path)
        folders = [member_folder(path, number) for number in range(calibration.members)]
        members = [load_classifier(folder, trained=True, device=device) for folder in folders]
        if len(heads) > 1:
            for number, member in enumerate(members):
                join_heads(member, [member_folder(head, number) for head in heads])
        encoders = [
            encoder_for(
                member,
                folder,
                calibration.max_tokens,
                next_turn=calibration.next_turn,
                alone=len(folders) < 2,
                response_alone=number in calibration.response_alone,
            )
            for number, (member, folder) in enumerate(zip(members, folders, strict=True))
        ]
        if not all(encoder.same_as(encoders[0]) for encoder in encoders):
            encoders[0].others = tuple(encoders[1:])
        return cls(members, encoders[0], calibration, batch_tokens)

    def score(self, items: Sequence[Item], objective: str) -> list[Score]:
        """Scores of (messages, response) items in order: value the calibrated probability, raw the model's logit.

        The spread is the standard deviation of the members' own probabilities, 0 for a single model and for members
        under one fused head.
        """
        return _scores(objective, self.calibration, self.each(self.encoder.encode(items)))

    def raw(self, rows: Sequence[Encoded]) -> list[float]:
        """Uncalibrated logits of encoded rows, in order: the members' mean, by their shares."""
        logits: list[float] = self.calibration.pooled(self.each(rows)).tolist()
        return logits

    def each(self, rows: Sequence[Encoded]) -> Floats:
        """Uncalibrated logits [members, N] of encoded rows."""
        return self.logits(rows)[:, :, 0]

    def logits(self, rows: Sequence[Encoded]) -> Floats:
        """Uncalibrated logits [members, N, heads] of encoded rows."""
        found = np.zeros((len(self.members), len(rows), self.members[0].config.num_labels))
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


class SharedModel:
    """Reward models that are heads of one backbone (or one model alone): one forward pass scores by all of them."""

    def __init__(self, model: RewardModel, calibrations: Mapping[str, Calibration]) -> None:
        """`model` has a logit for each of `calibrations`, in order."""
        self.model, self.calibrations = model, calibrations

    @classmethod
    def load(cls, folders: Mapping[str, Path], *, batch_tokens: int, device: str = "cpu") -> SharedModel:
        """Read the folders of heads that were trained together. Raises ModelError naming what is wrong with one."""
        heads = list(folders.values())
        model = RewardModel.load(heads[0], batch_tokens=batch_tokens, device=device, heads=heads)
        return cls(model, {name: Calibration.load(folder) for name, folder in folders.items()})

    def score(self, items: Sequence[Item]) -> dict[str, list[Score]]:
        """Scores of (messages, response) items in order, by objective."""
        if not items:
            return {name: [] for name in self.calibrations}
        each = self.model.logits(self.model.encoder.encode(items))
        return {
            name: _scores(name, calibration, each[:, :, place])
            for place, (name, calibration) in enumerate(self.calibrations.items())
        }


def load_scorers(
    folders: Mapping[str, Path], *, batch_tokens: int, device: str = "cpu"
) -> Callable[[Sequence[Item]], dict[str, list[Score]]]:
    """What scores items by each of these objectives' reward models; heads of one backbone are scored together."""
    groups: dict[str, dict[str, Path]] = {}
    for name, folder in folders.items():
        groups.setdefault(_load_calibration(folder).backbone or f"alone {name}", {})[name] = folder
    models = [SharedModel.load(group, batch_tokens=batch_tokens, device=device) for group in groups.values()]

    def score(items: Sequence[Item]) -> dict[str, list[Score]]:
        found = {name: scores for model in models for name, scores in model.score(items).items()}
        return {name: found[name] for name in folders}

    return score


def _scores(objective: str, calibration: Calibration, each: Floats) -> list[Score]:
    """Scores from the members' logits [members, N]."""
    raw = calibration.pooled(each)
    values = calibration.values(raw)
    spread = np.zeros_like(values) if calibration.fused else calibration.values(each).std(0)
    return [Score(objective, float(v), float(r), float(s)) for v, r, s in zip(values, raw, spread, strict=True)]


@torch.inference_mode()
def logits_of(model: torch.nn.Module, encoder: TextEncoder, rows: Sequence[Encoded], batch_tokens: int) -> Floats:
    """Logits [N, heads] of `rows` in order, batched by length. `model` returns an object with logits [B, heads]."""
    found: list[list[float]] = [[]] * len(rows)
    device = next(model.parameters()).device
    for batch in token_batches([len(row) for row in rows], batch_tokens):
        inputs = {name: tensor.to(device) for name, tensor in encoder.collate([rows[i] for i in batch]).items()}
        for index, logits in zip(batch, model(**inputs).logits.float().tolist(), strict=True):
            found[index] = logits
    return np.asarray(found, dtype=np.float64) if rows else np.empty((0, 1))
