"""What the claims are tried on: prompts and real replies of the sample log, split by prompt, with sentence embeddings.

The replies are SmolLM2-135M-Instruct's own, under the log's seven instructions. Two fifths of the prompts are kept from
everything that learns: policies are scored and judged on those only. Embeddings are those of all-MiniLM-L6-v2, which
was never trained on anything of this world.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rluf.paths import sample_file
from rluf.simulation.experiment import ENDINGS
from rluf.types import Message

Floats = NDArray[np.float32]
BODIES = 16
"""Replies kept for each prompt."""
UNSEEN = 0.4
"""Share of the prompts that nothing learns from."""
LONGEST = 64
"""Tokens of a text that the encoder reads."""


@dataclass(frozen=True, slots=True)
class Place:
    """One prompt and the replies that a policy can give to it; `styles` names the version that wrote each."""

    messages: tuple[Message, ...]
    topic: str
    bodies: tuple[str, ...]
    styles: tuple[str, ...]
    unseen: bool

    @property
    def asked(self) -> str:
        """The user's last message."""
        return self.messages[-1]["content"]

    def finished(self, body: int) -> bool:
        """Whether the reply was not cut by the token limit."""
        return self.bodies[body].endswith(ENDINGS)


class Town:
    """All places in a fixed order, with embeddings `asked` [P, D] and `said` [P, BODIES, D] of unit length."""

    def __init__(self, cache: Path) -> None:
        """Read the sample log; embeddings are made once and kept in `cache`."""
        self.places = places()
        self._cache = cache

    @cached_property
    def _vectors(self) -> tuple[Floats, Floats]:
        texts = [one.asked for one in self.places] + [body for one in self.places for body in one.bodies]
        name = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]
        file = self._cache / f"embeddings-{name}.npy"
        if not file.is_file():
            self._cache.mkdir(parents=True, exist_ok=True)
            scratch = file.with_name(f"{os.getpid()}.npy")
            np.save(scratch, embed(texts))
            scratch.rename(file)
        found = np.load(file)
        count = len(self.places)
        return found[:count], found[count:].reshape(count, BODIES, -1)

    @property
    def asked(self) -> Floats:
        """Embeddings of the prompts [P, D]."""
        return self._vectors[0]

    @property
    def said(self) -> Floats:
        """Embeddings of the replies [P, BODIES, D]."""
        return self._vectors[1]

    def rows(self, *, unseen: bool) -> NDArray[np.int64]:
        """Indices of the places that nothing learns from, or of the others."""
        return np.flatnonzero([one.unseen == unseen for one in self.places]).astype(np.int64)


def places() -> list[Place]:
    """Prompts of the sample log with BODIES or more distinct replies, in order of text."""
    found: dict[str, dict[str, Any]] = {}
    with gzip.open(sample_file("feedback"), "rt", encoding="utf-8") as stream:
        for row in map(json.loads, stream):
            key = "\n".join(message["content"] for message in row["messages"])
            place = found.setdefault(key, {"messages": row["messages"], "topic": row["topic"], "said": {}})
            place["said"].setdefault(row["response"], row["model_version"].removeprefix("base-"))
    kept = []
    for key in sorted(found):
        said = sorted(
            found[key]["said"].items(), key=lambda pair: hashlib.sha256(f"{key}\n{pair[0]}".encode()).digest()
        )
        if len(said) >= BODIES:
            bodies, styles = zip(*said[:BODIES], strict=True)
            kept.append((key, found[key]["messages"], found[key]["topic"], bodies, styles))
    return [
        Place(tuple(messages), topic, bodies, styles, _share(key) < UNSEEN)
        for key, messages, topic, bodies, styles in kept
    ]


def _share(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def embed(texts: Sequence[str], batch: int = 64) -> Floats:
    """Mean-pooled sentence embeddings of unit length [N, D]."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    from rluf.models import resolve_model

    folder = resolve_model("minilm", Path.home() / ".cache/rluf")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
    found = np.zeros((len(texts), model.config.hidden_size), np.float32)
    with torch.no_grad():
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            given = tokenizer([texts[n] for n in rows], padding=True, truncation=True, max_length=LONGEST,
                              return_tensors="pt")  # fmt: skip
            hidden = model(**given).last_hidden_state
            mask = given["attention_mask"][..., None].float()
            mean = (hidden * mask).sum(1) / mask.sum(1)
            found[rows] = torch.nn.functional.normalize(mean, dim=-1).numpy()
    return found
