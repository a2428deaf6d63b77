"""What the claims are tried on: prompts and real replies of the sample log, split by prompt, a vector for each text.

The replies are SmolLM2-135M-Instruct's own, under the log's seven instructions. Two fifths of the prompts are kept from
everything that learns: policies are scored and judged on those only.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from rluf.simulate.experiment import ENDINGS
from rluf.types import Message
from rluf.utils.paths import sample_file

Floats = NDArray[np.float32]
BODIES = 16
"""Replies kept for each prompt."""
UNSEEN = 0.4
"""Share of the prompts that nothing learns from."""
WIDE = 128
"""Length of the vectors that stand for prompts and replies."""


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
    """All places in a fixed order, with vectors `asked` [P, WIDE] and `said` [P, BODIES, WIDE] of unit length."""

    def __init__(self) -> None:
        """Read the sample log."""
        self.places = places()

    @cached_property
    def _vectors(self) -> tuple[Floats, Floats]:
        """Latent semantic analysis of all texts, learnt on the places that may be learnt from."""
        texts = [[one.asked, *one.bodies] for one in self.places]
        words = TfidfVectorizer(sublinear_tf=True, min_df=2)
        known = words.fit_transform([text for n in self.rows(unseen=False) for text in texts[n]])
        latent = TruncatedSVD(WIDE, n_iter=3, random_state=0).fit(known)
        found = latent.transform(words.transform([text for one in texts for text in one]))
        found /= np.linalg.norm(found, axis=1, keepdims=True) + 1e-9
        found = found.reshape(len(texts), BODIES + 1, WIDE).astype(np.float32)
        return found[:, 0], found[:, 1:]

    @property
    def asked(self) -> Floats:
        """Vectors of the prompts [P, WIDE]."""
        return self._vectors[0]

    @property
    def said(self) -> Floats:
        """Vectors of the replies [P, BODIES, WIDE]."""
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
