"""Reward models of the claims: they read a reply's words, word pairs, and sentence embeddings; they learn from the log.

Trained with rluf's own losses, brought back to the natural rate with its prior shift and calibrated with its Platt
scaling on other users. They never see gold scores, users' traits or which version wrote a reply.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from lab.replies import BODY, texts
from lab.town import Town
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rluf.objectives.calibration import Calibration, fit_platt, prior_shift

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
BUCKETS, WIDE = 1 << 14, 48
"""Hash buckets of words and word pairs, and the width of their vectors."""
TOKEN = re.compile(r"[a-z']+|[^\sa-z']")


@lru_cache(maxsize=200_000)
def _bucket(gram: str) -> int:
    return zlib.crc32(gram.encode()) % BUCKETS


def grams(text: str) -> list[int]:
    """Buckets of a text's tokens and of its pairs of neighbours, its end among them."""
    tokens = [*TOKEN.findall(text.lower()), "$"]
    return [_bucket(token) for token in tokens] + [_bucket(f"{a} {b}") for a, b in itertools.pairwise(tokens)]


@dataclass(frozen=True, slots=True)
class Pages:
    """N replies as the models read them: place and reply [N], and their grams as one list with offsets [N]."""

    place: Tensor
    body: Tensor
    grams: Tensor
    offsets: Tensor
    sizes: Tensor

    @staticmethod
    def of(town: Town, places: Ints, picks: Ints, said: Sequence[str] | None = None) -> Pages:
        """Pages of the replies that `picks` make, or of the texts `said` [N] in their stead."""
        lists = [grams(text) for text in (said or texts(town, places, picks))]
        sizes = torch.tensor([len(one) for one in lists])
        flat = torch.tensor([gram for one in lists for gram in one], dtype=torch.long)
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)[:-1]])
        return Pages(torch.as_tensor(places), torch.as_tensor(picks[:, BODY]), flat, offsets, sizes)

    def take(self, rows: Tensor) -> Pages:
        """The pages at `rows` [n]."""
        sizes = self.sizes[rows]
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)[:-1]])
        inside = torch.arange(int(sizes.sum())) - torch.repeat_interleave(offsets, sizes)
        flat = self.grams[torch.repeat_interleave(self.offsets[rows], sizes) + inside]
        return Pages(self.place[rows], self.body[rows], flat, offsets, sizes)


class Reader(nn.Module):
    """A score [N] of pages: what the embeddings of prompt and reply say together, and what the words add to it."""

    def __init__(self, town: Town, wide: int = 64) -> None:
        """Random weights; the embeddings stay as they are."""
        super().__init__()
        self.register_buffer("asked", torch.from_numpy(town.asked), persistent=False)
        self.register_buffer("said", torch.from_numpy(town.said), persistent=False)
        size = town.asked.shape[1]
        self.words = nn.EmbeddingBag(BUCKETS, WIDE, mode="sum")
        nn.init.normal_(self.words.weight, std=0.05)
        self.meaning = nn.Linear(3 * size, wide)
        self.key = nn.Linear(size, WIDE)
        self.out = nn.Sequential(nn.Linear(wide + 2 * WIDE, wide), nn.GELU(), nn.Linear(wide, 1))

    def forward(self, pages: Pages) -> Tensor:
        """Logits [N]."""
        asked, said = self.asked[pages.place], self.said[pages.place, pages.body]
        joint = torch.cat([asked, said, asked * said * asked.shape[1] ** 0.5], -1)
        words = self.words(pages.grams, pages.offsets) / pages.sizes.clamp_min(1).sqrt()[:, None]
        heard = words * torch.tanh(self.key(asked))
        logits: Tensor = self.out(torch.cat([nn.functional.gelu(self.meaning(joint)), words, heard], -1))[:, 0]
        return logits


@dataclass(frozen=True, slots=True)
class Judgement:
    """One trained objective: members of an ensemble and the calibration of their mean."""

    members: tuple[Reader, ...]
    calibration: Calibration

    def save(self, folder: Path) -> None:
        """Write the members and their calibration into a new folder, which appears whole."""
        scratch = folder.with_name(f".{folder.name}")
        scratch.mkdir(parents=True, exist_ok=True)
        for number, one in enumerate(self.members):
            save_file({name: value.contiguous() for name, value in one.state_dict().items()},
                      scratch / f"{number}.safetensors")  # fmt: skip
        self.calibration.save(scratch)
        scratch.rename(folder)

    @staticmethod
    def load(town: Town, folder: Path) -> Judgement:
        """Read what `save` wrote."""
        members = []
        for file in sorted(folder.glob("*.safetensors")):
            reader = Reader(town)
            reader.load_state_dict(load_file(file))
            members.append(reader.eval())
        return Judgement(tuple(members), Calibration.load(folder))

    def each(self, pages: Pages) -> Floats:
        """Calibrated logits [members, N]."""
        with torch.no_grad():
            return np.stack([self.calibration.logits(one(pages).double().numpy()) for one in self.members])

    def logits(self, pages: Pages) -> Floats:
        """Calibrated logits [N] of the members' mean."""
        found: Floats = self.each(pages).mean(0)
        return found


Loss = Callable[[Reader, Tensor], Tensor]


def fit(
    town: Town, loss: Loss, rows: int, dev: Callable[[Reader], float], *, seed: int, epochs: int = 4, batch: int = 256,
    rate: float = 2e-3,
) -> Reader:  # fmt: skip
    """A reader trained by `loss(reader, rows)` on `rows` examples, taken at the epoch with the least `dev` loss."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        reader = Reader(town)
        optimizer = torch.optim.AdamW(reader.parameters(), lr=rate, weight_decay=0.02)
        best, kept = float("inf"), {name: value.clone() for name, value in reader.state_dict().items()}
        for _ in range(epochs):
            for part in torch.randperm(rows).split(batch):
                optimizer.zero_grad()
                loss(reader, part).backward()
                optimizer.step()
            with torch.no_grad():
                found = dev(reader)
            if found < best:
                best, kept = found, {name: value.clone() for name, value in reader.state_dict().items()}
        reader.load_state_dict(kept)
    reader.eval()
    return reader


def sampled(labels: Floats, rng: np.random.Generator, share: float = 0.1) -> tuple[Ints, Floats]:
    """Rows with all positives and so many negatives that positives are `share`, as the paper has it, with weights
    1 / share kept; all rows where positives are more frequent than that."""
    positive, negative = np.flatnonzero(labels > 0.5), np.flatnonzero(labels <= 0.5)
    keep = min(len(negative), round(len(positive) * (1 - share) / share))
    chosen = rng.permutation(negative)[:keep]
    weights = np.concatenate([np.ones(len(positive)), np.full(keep, len(negative) / max(1, keep))])
    return np.concatenate([positive, chosen]).astype(np.int64), weights


def calibrated(name: str, members: Sequence[Reader], dev: Pages, labels: Floats, shift: float) -> Judgement:
    """The members with Platt's scaling of their mean on `dev`."""
    with torch.no_grad():
        raw = np.mean([one(dev).double().numpy() for one in members], axis=0) + shift
    scale, offset = fit_platt(raw, labels, np.ones_like(raw))
    return Judgement(tuple(members), Calibration(name, "platt", shift, scale, offset, members=len(members)))


__all__ = ["Judgement", "Pages", "Reader", "calibrated", "fit", "prior_shift", "sampled"]
