"""Prompts and demonstrations of a prepared data set, as token ids of the policy's tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from rluf.errors import DataError
from rluf.models.hub import render_prompt
from rluf.types import Group, Message, Prompt, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)


def load_prompts(
    data: Path, split: str, tokenizer: PreTrainedTokenizerFast, *, max_tokens: int, limit: int | None = None
) -> list[Prompt]:
    """Prompts of a split (train or test), in file order, at most `limit`.

    Prompts longer than `max_tokens` rendered tokens are left out whole and counted in the log. Raises DataError when
    none is left.
    """
    rows = pq.read_table(data / "prompts" / f"{split}.parquet").to_pylist()
    prompts, long = [], 0
    for row in rows:
        messages = tuple(Message(role=m["role"], content=m["content"]) for m in row["messages"])
        ids = render_prompt(tokenizer, messages)
        if len(ids) > max_tokens:
            long += 1
            continue
        prompts.append(Prompt(row["id"], messages, ids, row["topic"] or "", split))
    if long:
        logger.warning(
            "%d of %d %s prompts are longer than rollout.max_prompt_tokens=%d: left out",
            long,
            len(rows),
            split,
            max_tokens,
        )
    if not prompts:
        raise DataError(
            f"no {split} prompt is left of {len(rows)} in data.prompts; add prompts of that split or raise "
            f"rollout.max_prompt_tokens (now {max_tokens})"
        )
    return prompts[:limit]


JUDGED_GOOD = {"love": ("response", "label"), "safety": ("response", "label"), "helpfulness": ("chosen", None)}
"""Where a data set of an objective holds a response, and the column that says 1 where people judged it good."""


def load_demonstrations(
    data: Path, owners: Mapping[str, str], tokenizer: PreTrainedTokenizerFast, *, max_prompt: int, max_response: int
) -> list[Group]:
    """Responses of the training split that people judged good for the objective that owns their topic.

    `owners` maps topics to objectives (objectives.alone). Each becomes a group of one sample without rollout
    log-probabilities; its response ends with the end-of-sequence token. Prompts longer than `max_prompt` tokens and
    responses longer than `max_response` are left out whole: one cut off at the limit would teach to stop in mid-word.
    """
    found = []
    for topic, objective in owners.items():
        text, good = JUDGED_GOOD[objective]
        for row in pq.read_table(data / objective / "train.parquet").to_pylist():
            if row["topic"] == topic and (good is None or row[good] == 1):
                group = _logged(row, text, tokenizer)
                if _fits(group, max_prompt, max_response):
                    found.append(group)
    return found


@dataclass(frozen=True, slots=True)
class Reactions:
    """Logged responses as groups of one sample without rollout log-probabilities: loved ones and others."""

    liked: Sequence[Group]
    others: Sequence[Group]


def load_reactions(data: Path, tokenizer: PreTrainedTokenizerFast, *, max_prompt: int, max_response: int) -> Reactions:
    """Responses of the training split by whether they were loved; longer prompts and responses are left out whole."""
    kinds: tuple[list[Group], list[Group]] = ([], [])
    for row in pq.read_table(data / "love" / "train.parquet").to_pylist():
        group = _logged(row, "response", tokenizer)
        if _fits(group, max_prompt, max_response):
            kinds[row["label"] != 1].append(group)
    return Reactions(*kinds)


def _logged(row: Mapping[str, Any], text: str, tokenizer: PreTrainedTokenizerFast) -> Group:
    """A row of a data set as a group of one sample; its response ends with the end-of-sequence token."""
    messages = tuple(Message(role=m["role"], content=m["content"]) for m in row["messages"])
    prompt = Prompt(row["id"], messages, render_prompt(tokenizer, messages), row["topic"] or "", "train")
    ids = (*tokenizer.encode(row[text], add_special_tokens=False), tokenizer.eos_token_id)
    return Group(prompt, (Sample(prompt.id, prompt.token_ids, ids, (), (), "stop", row[text]),), 0)


def _fits(group: Group, max_prompt: int, max_response: int) -> bool:
    return len(group.prompt.token_ids) <= max_prompt and len(group.samples[0].response_ids) <= max_response
