"""Data of the claims: prompts and real replies of the sample log, split by prompt, with a vector for each text.

The replies are SmolLM2-135M-Instruct's own, under the log's seven instructions. Two fifths of the prompts are held out
from all training: policies are scored and judged only on those.
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

from rluf.simulate.reader_features import has_sentence_end
from rluf.types import Message
from rluf.utils.paths import find_sample_log

Floats = NDArray[np.float32]
REPLIES_PER_PROMPT = 8
"""Replies used for each prompt."""
UNSEEN_SHARE = 0.4
"""Share of the prompts that no training sees."""
VECTOR_SIZE = 128
"""Length of the prompt and reply vectors."""


@dataclass(frozen=True, slots=True)
class PromptEntry:
    """One prompt and the replies that a policy can give to it; `reply_styles` names the version that wrote each."""

    messages: tuple[Message, ...]
    topic: str
    reply_texts: tuple[str, ...]
    reply_styles: tuple[str, ...]
    is_unseen: bool

    @property
    def last_user_message(self) -> str:
        """The user's last message."""
        return self.messages[-1]["content"]

    def is_finished(self, reply_index: int) -> bool:
        """Whether the reply was not truncated by the token limit."""
        return has_sentence_end(self.reply_texts[reply_index])


class ReplyDataset:
    """All prompts in a fixed order, with unit vectors of prompts and replies."""

    def __init__(self) -> None:
        """Read the sample log."""
        self.entries = load_prompt_entries()

    @cached_property
    def _text_vectors(self) -> tuple[Floats, Floats]:
        """Latent semantic analysis of all texts, fitted on the training prompts."""
        texts_by_prompt = [[entry.last_user_message, *entry.reply_texts] for entry in self.entries]
        vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2)
        training_matrix = vectorizer.fit_transform(
            [text for index in self.prompt_indices(unseen=False) for text in texts_by_prompt[index]]
        )
        svd = TruncatedSVD(VECTOR_SIZE, n_iter=3, random_state=0).fit(training_matrix)
        vectors = svd.transform(vectorizer.transform([text for entry in texts_by_prompt for text in entry]))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-9
        vectors = vectors.reshape(len(texts_by_prompt), REPLIES_PER_PROMPT + 1, VECTOR_SIZE).astype(np.float32)
        return vectors[:, 0], vectors[:, 1:]

    @property
    def prompt_vectors(self) -> Floats:
        """Vectors of the prompts [P, VECTOR_SIZE]."""
        return self._text_vectors[0]

    @property
    def reply_vectors(self) -> Floats:
        """Vectors of the replies [P, REPLIES_PER_PROMPT, VECTOR_SIZE]."""
        return self._text_vectors[1]

    def prompt_indices(self, *, unseen: bool) -> NDArray[np.int64]:
        """Indices of the held-out prompts, or of the training prompts."""
        return np.flatnonzero([entry.is_unseen == unseen for entry in self.entries]).astype(np.int64)


def load_prompt_entries() -> list[PromptEntry]:
    """Prompts of the sample log with enough distinct replies, in order of text."""
    prompt_rows: dict[str, dict[str, Any]] = {}
    with gzip.open(find_sample_log("feedback"), "rt", encoding="utf-8") as stream:
        for row in map(json.loads, stream):
            prompt_key = "\n".join(message["content"] for message in row["messages"])
            prompt_row = prompt_rows.setdefault(
                prompt_key, {"messages": row["messages"], "topic": row["topic"], "said": {}}
            )
            prompt_row["said"].setdefault(row["response"], row["model_version"].removeprefix("base-"))
    selected = []
    for prompt_key in sorted(prompt_rows):
        replies = sorted(
            prompt_rows[prompt_key]["said"].items(),
            key=lambda pair: hashlib.sha256(f"{prompt_key}\n{pair[0]}".encode()).digest(),
        )
        if len(replies) >= REPLIES_PER_PROMPT:
            reply_texts, reply_styles = zip(*replies[:REPLIES_PER_PROMPT], strict=True)
            selected.append(
                (
                    prompt_key,
                    prompt_rows[prompt_key]["messages"],
                    prompt_rows[prompt_key]["topic"],
                    reply_texts,
                    reply_styles,
                )
            )
    return [
        PromptEntry(tuple(messages), topic, reply_texts, reply_styles, _hash_share(prompt_key) < UNSEEN_SHARE)
        for prompt_key, messages, topic, reply_texts, reply_styles in selected
    ]


def _hash_share(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48
