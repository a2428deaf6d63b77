"""Prompts of a prepared data set, rendered to token ids of the policy's tokenizer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from rluf.errors import DataError
from rluf.models import render_prompt
from rluf.types import Message, Prompt

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
