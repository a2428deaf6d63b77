"""Prompts and demonstrations of a prepared data set, as token ids of the policy's tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from rluf.config.objectives import find_objective_spec
from rluf.errors import DataError
from rluf.models.hub import render_prompt
from rluf.types import Group, Message, Prompt, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)


def load_prompts(
    data_folder: Path, split: str, tokenizer: PreTrainedTokenizerFast, *, max_tokens: int, limit: int | None = None
) -> list[Prompt]:
    """Prompts of a split (train or test), in file order, at most `limit`.

    Prompts longer than `max_tokens` rendered tokens are skipped, not truncated, and counted in the log. Raises
    DataError when none is left.
    """
    rows = pq.read_table(data_folder / "prompts" / f"{split}.parquet").to_pylist()
    prompts = []
    for row in rows:
        messages = messages_from_row(row)
        token_ids = render_prompt(tokenizer, messages)
        if len(token_ids) <= max_tokens:
            prompts.append(Prompt(row["id"], messages, token_ids, row["topic"] or "", split))
    report_skipped_prompts(split, len(prompts), len(rows), max_tokens)
    return prompts[:limit]


def report_skipped_prompts(split: str, prompt_count: int, row_count: int, max_tokens: int) -> None:
    """Log how many prompts of a split were too long. Raises DataError when `prompt_count`, those left, is 0."""
    if prompt_count < row_count:
        logger.warning(
            "prompts: skipped %d of %d in split %s, longer than rollout.max_prompt_tokens=%d",
            row_count - prompt_count,
            row_count,
            split,
            max_tokens,
        )
    if not prompt_count:
        raise DataError(
            f"no {split} prompt is left of {row_count} in data.prompts; add prompts of that split or raise "
            f"rollout.max_prompt_tokens (now {max_tokens})"
        )


def load_demonstrations(
    data_folder: Path,
    topic_objectives: Mapping[str, str],
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_prompt_tokens: int,
    max_response_tokens: int,
) -> list[Group]:
    """Responses of the training split with a positive label for the objective of their topic.

    `topic_objectives` maps topics to objectives (aggregation.topic_objectives). Each response becomes a group of one
    sample without rollout log-probabilities and ends with the end-of-sequence token. Rows over the limits are skipped:
    a truncated response would teach the policy to stop in the middle of a word. Raises DataError for an objective
    without prepared data.
    """
    demonstrations = []
    for topic, objective in topic_objectives.items():
        spec, file = find_objective_spec(objective), data_folder / objective / "train.parquet"
        if not file.is_file():
            raise DataError(
                f"algorithm.demonstrations needs data of {objective} for the topic {topic!r} "
                f"(aggregation.topic_objectives), but data.{spec.data_key} is empty; name a log there, or set "
                "algorithm.demonstrations=0"
            )
        for row in pq.read_table(file).to_pylist():
            if row["topic"] == topic and (spec.label_column is None or row[spec.label_column] == 1):
                group = group_from_row(row, spec.response_column, tokenizer)
                if fits_limits(group, max_prompt_tokens, max_response_tokens):
                    demonstrations.append(group)
    return demonstrations


def messages_from_row(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The messages of a row that Arrow returned as plain dictionaries."""
    return tuple(Message(role=message["role"], content=message["content"]) for message in row["messages"])


def group_from_row(row: Mapping[str, Any], response_column: str, tokenizer: PreTrainedTokenizerFast) -> Group:
    """A data set row as a group of one sample; its response ends with the end-of-sequence token."""
    messages, response_text = messages_from_row(row), row[response_column]
    prompt = Prompt(row["id"], messages, render_prompt(tokenizer, messages), row["topic"] or "", "train")
    # The log has text only. Without the end token a demonstration would teach the policy never to stop.
    response_ids = (*tokenizer.encode(response_text, add_special_tokens=False), tokenizer.eos_token_id)
    sample = Sample(prompt.id, prompt.token_ids, response_ids, (), (), "stop", response_text)
    return Group(prompt, (sample,), 0)


def fits_limits(group: Group, max_prompt_tokens: int, max_response_tokens: int) -> bool:
    """Whether prompt and response of a group of one sample are within the limits, in tokens."""
    response_ids = group.samples[0].response_ids
    return len(group.prompt.token_ids) <= max_prompt_tokens and len(response_ids) <= max_response_tokens
