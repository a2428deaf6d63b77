"""Prompts and demonstrations of a prepared data set, as token ids of the policy's tokenizer.

Training prompts need not fit into the driver: a large split is rendered by Ray Data, stored in blocks, and fetched when
needed. The driver holds an id, a topic and an offset per prompt (about 200 bytes), a few blocks at a time, and the
position in the shuffled order (rluf/train/work_buffer.py), which checkpoints store: prompt n of a run is the same
whatever was read before. Small sets are read directly, since starting Ray Data's workers takes longer than rendering.
"""

from __future__ import annotations

import bisect
import json
import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import pyarrow as pa
import pyarrow.parquet as pq

from rluf.algorithms.packing import count_common_prefix
from rluf.config.objectives import find_objective_spec
from rluf.errors import DataError
from rluf.models.chat import RejectedConversationError, encode_texts, render_prompt
from rluf.models.hub import load_tokenizer
from rluf.models.turn_end import find_response_end_id
from rluf.reward.text import is_truncated
from rluf.types import Group, Message, Prompt, Sample

if TYPE_CHECKING:
    from ray import ObjectRef
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

STREAM_FROM_PROMPTS = 20_000
"""Number of prompts from which on a split is streamed."""
CACHED_BLOCK_COUNT = 4
"""Blocks cached in the driver. The order is shuffled over all prompts, so a larger cache would rarely be hit."""
RENDER_BATCH_ROWS = 1000
"""Prompts rendered per batch."""
PROMPT_COLUMNS = ("id", "messages", "topic", "extra_fields")


def load_prompts(
    data_folder: Path, split: str, tokenizer: PreTrainedTokenizerFast, *, max_tokens: int, limit: int | None = None
) -> list[Prompt]:
    """Prompts of a split (train or test), in file order, at most `limit`.

    Prompts longer than `max_tokens` rendered tokens are skipped, not truncated, as are those that the chat template
    rejects; the log has their numbers. Raises DataError when none is left.
    """
    rows = pq.read_table(data_folder / "prompts" / f"{split}.parquet").to_pylist()
    skipped = SkippedRows(f"{split} prompt", max_tokens)
    prompts = []
    for row in rows:
        token_ids = skipped.render_row(row, tokenizer)
        if token_ids is not None:
            topic, extra_fields = row["topic"] or "", parse_extra_fields(row)
            prompts.append(Prompt(row["id"], parse_row_messages(row), token_ids, topic, split, extra_fields))
    skipped.report(len(prompts))
    return prompts[:limit]


@dataclass
class SkippedRows:
    """Counts rows that cannot be used: too long, rejected by the chat template, or with too long a response."""

    row_name: str
    max_tokens: int
    max_response_tokens: int = 0
    too_long_count: int = 0
    rejected_count: int = 0
    long_response_count: int = 0
    first_rejection: str = ""

    def render_row(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...] | None:
        """Token ids of the row's messages; None if the row is skipped, which is counted."""
        try:
            token_ids = render_prompt(tokenizer, parse_row_messages(row))
        except RejectedConversationError as error:
            self.rejected_count += 1
            self.first_rejection = self.first_rejection or f"{row['id']} ({error})"
            return None
        if len(token_ids) > self.max_tokens:
            self.too_long_count += 1
            return None
        return token_ids

    def list_reasons(self) -> list[tuple[int, str]]:
        """Number of skipped rows by reason; only reasons that occurred."""
        counts = (
            (self.too_long_count, f"longer than rollout.max_prompt_tokens={self.max_tokens}"),
            (self.rejected_count, f"rejected by the chat template; first: {self.first_rejection}"),
            (
                self.long_response_count,
                f"longer in the response than rollout.max_response_tokens={self.max_response_tokens}",
            ),
        )
        return [(count, reason) for count, reason in counts if count]

    def describe(self) -> str:
        """The reasons, and what to raise, as the end of a message where nothing is usable; empty without any."""
        reasons = [f", or use the {count} skipped: {reason}" for count, reason in self.list_reasons()]
        limits = [
            name for name, count in (("prompt", self.too_long_count), ("response", self.long_response_count)) if count
        ]
        advice = f"; raise {' and '.join(f'rollout.max_{name}_tokens' for name in limits)}" if limits else ""
        return "".join(reasons) + advice

    def warn(self, usable_count: int) -> None:
        """Log what was skipped."""
        reasons = self.list_reasons()
        row_count = usable_count + sum(count for count, _ in reasons)
        for count, reason in reasons:
            logger.warning("prompts: skipped %d of %d %ss, %s", count, row_count, self.row_name, reason)

    def report(self, usable_count: int) -> None:
        """Log what was skipped. Raises DataError when nothing is usable."""
        self.warn(usable_count)
        row_count = usable_count + self.too_long_count + self.rejected_count
        if not usable_count:
            rejection = f"; rejected by the chat template: {self.first_rejection}" if self.rejected_count else ""
            raise DataError(
                f"no {self.row_name} is left of {row_count} in data.prompts; add prompts of that split or raise "
                f"rollout.max_prompt_tokens (now {self.max_tokens}){rejection}"
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
    sample, see build_group_from_row. Rows over the limits are skipped, and the log has their numbers. Raises DataError
    for an objective without prepared data.
    """
    demonstrations = []
    skipped = SkippedRows("demonstration", max_prompt_tokens, max_response_tokens)
    end_id = find_response_end_id(tokenizer)
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
                group = build_group_from_row(row, (spec.response_column,), tokenizer, end_id, skipped)
                if group is not None:
                    demonstrations.append(group)
    skipped.warn(len(demonstrations))
    return demonstrations


def parse_row_messages(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The messages of a row that Arrow returned as plain dictionaries."""
    return tuple(Message(role=message["role"], content=message["content"]) for message in row["messages"])


def parse_extra_fields(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Further fields of a prompt's row in the log, for reward functions; None without any."""
    text = row.get("extra_fields")
    return None if text is None else dict(json.loads(text))


def build_group_from_row(
    row: Mapping[str, Any],
    response_columns: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    end_id: int,
    skipped: SkippedRows,
) -> Group | None:
    """A data set row as a group of one sample per response column, without log-probabilities; None if skipped.

    A response ends with the token `end_id`, unless the log says that it was cut: that would teach the policy to stop in
    the middle of a word.
    """
    prompt_ids = skipped.render_row(row, tokenizer)
    if prompt_ids is None:
        return None
    prompt = Prompt(row["id"], parse_row_messages(row), prompt_ids, row["topic"] or "", "train")
    samples = []
    texts = [row[column] for column in response_columns]
    for column, text, token_ids in zip(response_columns, texts, encode_texts(tokenizer, texts), strict=True):
        is_cut = is_truncated(row, column)
        # The log has text only. Without the end token a demonstration would teach the policy never to stop.
        response_ids = tuple(token_ids) if is_cut else (*token_ids, end_id)
        finish_reason = "length" if is_cut else "stop"
        samples.append(Sample(prompt.id, prompt.token_ids, response_ids, (), (), finish_reason, text))
    if any(len(sample.response_ids) > skipped.max_response_tokens for sample in samples):
        skipped.long_response_count += 1
        return None
    return Group(prompt, tuple(samples), 0)


class PromptStore(Sequence[Prompt]):
    """Prompts in blocks of Ray's object store, read like a list; `ids` and `topics` are those of all, in order."""

    def __init__(self, blocks: Sequence[ObjectRef[pa.Table]], split: str) -> None:
        """Read ids and topics of `blocks` (columns id, messages, topic, token_ids), one block at a time."""
        import ray

        self._blocks, self._split = list(blocks), split
        self._block_cache: OrderedDict[int, pa.Table] = OrderedDict()
        self.ids: list[str] = []
        self.topics: list[str] = []
        self.prefix_prompts: list[Prompt] = []
        """Two prompts per block that have as many tokens in common as all prompts of the block."""
        self._block_ends: list[int] = []
        for block in self._blocks:
            table: pa.Table = ray.get(block)
            self.ids += table.column("id").to_pylist()
            self.topics += [topic or "" for topic in table.column("topic").to_pylist()]
            self._block_ends.append(len(self.ids))
            prompts = [Prompt("", (), tuple(ids), "", split) for ids in table.column("token_ids").to_pylist()]
            self.prefix_prompts += prompts[:1]
            if len(prompts) > 1:
                prefix = prompts[0].token_ids[: count_common_prefix(prompts)]
                self.prefix_prompts.append(replace(prompts[0], token_ids=prefix))

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...

    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        """One prompt or several; a block that is not cached is fetched."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        prompt_index = range(len(self))[index]  # resolves negative indices and raises IndexError
        block_index = bisect.bisect_right(self._block_ends, prompt_index)
        block_start = self._block_ends[block_index - 1] if block_index else 0
        (row,) = self._load_block(block_index).slice(prompt_index - block_start, 1).to_pylist()
        topic, extra_fields = row["topic"] or "", parse_extra_fields(row)
        return Prompt(row["id"], parse_row_messages(row), tuple(row["token_ids"]), topic, self._split, extra_fields)

    def __iter__(self) -> Iterator[Prompt]:
        """All prompts in order, block by block."""
        return (self[i] for i in range(len(self)))

    def _load_block(self, block_index: int) -> pa.Table:
        if block_index not in self._block_cache:
            import ray

            self._block_cache[block_index] = ray.get(self._blocks[block_index])
            while len(self._block_cache) > CACHED_BLOCK_COUNT:
                self._block_cache.popitem(last=False)
        self._block_cache.move_to_end(block_index)
        return self._block_cache[block_index]


def list_prompt_topics(prompts: Sequence[Prompt]) -> list[str]:
    """The topic of each prompt, without fetching the prompts of a store."""
    return prompts.topics if isinstance(prompts, PromptStore) else [prompt.topic for prompt in prompts]


def list_prompt_ids(prompts: Sequence[Prompt]) -> list[str]:
    """The id of each prompt, without fetching the prompts of a store."""
    return prompts.ids if isinstance(prompts, PromptStore) else [prompt.id for prompt in prompts]


def count_common_prompt_tokens(prompts: Sequence[Prompt], groups: Sequence[Group] = ()) -> int:
    """Leading tokens that all prompts and those of groups have in common, without fetching the prompts of a store."""
    prefix_prompts = prompts.prefix_prompts if isinstance(prompts, PromptStore) else prompts
    return count_common_prefix([*prefix_prompts, *(group.prompt for group in groups)])


def load_training_prompts(
    data_folder: Path,
    model_path: Path,
    max_tokens: int,
    *,
    stream_from: int = STREAM_FROM_PROMPTS,
    trust_remote_code: bool = False,
) -> Sequence[Prompt]:
    """Prompts of the training split in file order, as ids of the tokenizer at `model_path`.

    A split of at least `stream_from` prompts is streamed. Prompts that are too long, or that the chat template rejects,
    are skipped and counted in the log. Raises DataError when none is left.
    """
    parquet_path = data_folder / "prompts" / "train.parquet"
    row_count = pq.read_metadata(parquet_path).num_rows
    tokenizer = load_tokenizer(model_path, trust_remote_code=trust_remote_code)
    if row_count < stream_from:
        return load_prompts(data_folder, "train", tokenizer, max_tokens=max_tokens)
    store = PromptStore(_render_blocks(parquet_path, model_path, max_tokens, trust_remote_code), "train")
    skipped = SkippedRows("train prompt", max_tokens)
    if len(store) < row_count:
        # The workers return usable rows only; the reasons of the others are found by rendering those again.
        used_ids = set(store.ids)
        for batch in pq.ParquetFile(parquet_path).iter_batches(columns=list(PROMPT_COLUMNS)):
            for row in batch.to_pylist():
                if row["id"] not in used_ids:
                    skipped.render_row(row, tokenizer)
    skipped.report(len(store))
    return store


class _PromptRenderer:
    """Adds token_ids to rows and drops rows that cannot be used; one instance per Ray Data worker."""

    def __init__(self, model_path: str, max_tokens: int, trust_remote_code: bool) -> None:
        self._tokenizer = load_tokenizer(Path(model_path), trust_remote_code=trust_remote_code)
        self._skipped = SkippedRows("", max_tokens)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Rows with token_ids."""
        rendered_rows = []
        for row in table.to_pylist():
            token_ids = self._skipped.render_row(row, self._tokenizer)
            if token_ids is not None:
                rendered_rows.append({**row, "token_ids": list(token_ids)})
        # An explicit schema: a block whose rows were all dropped must have the same columns as the others.
        fields = [table.schema.field(key) for key in table.column_names]
        schema = pa.schema([*fields, pa.field("token_ids", pa.list_(pa.int64()))])
        return pa.Table.from_pylist(rendered_rows, schema=schema)


def _render_blocks(parquet_path: Path, model_path: Path, max_tokens: int, trust_remote_code: bool) -> list[Any]:
    """References to blocks of rendered prompts, in file order."""
    import ray.data

    # By default Ray Data returns blocks as they finish; a resumed run needs the same prompt at the same index.
    context = ray.data.DataContext.get_current()
    preserve_order = context.execution_options.preserve_order
    context.execution_options.preserve_order = True
    try:
        column_names = [name for name in PROMPT_COLUMNS if name in pq.read_schema(parquet_path).names]
        dataset = ray.data.read_parquet(str(parquet_path), columns=column_names)
        rendered = dataset.map_batches(
            _PromptRenderer,
            fn_constructor_args=(str(model_path), max_tokens, trust_remote_code),
            batch_format="pyarrow",
            batch_size=RENDER_BATCH_ROWS,
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=0.5,
        )
        return list(rendered.to_arrow_refs())
    finally:
        context.execution_options.preserve_order = preserve_order
