"""Training prompts that need not fit into the driver: rendered by Ray Data, stored in blocks, fetched when needed.

The driver holds an id, a topic and an offset per prompt (about 200 bytes), a few blocks at a time, and the position in
the shuffled order (rluf/train/work_buffer.py), which checkpoints store: prompt n of a run is the same whatever was read
before. Small sets are read directly, since starting Ray Data's workers takes longer than rendering them here.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import pyarrow as pa
import pyarrow.parquet as pq

from rluf.models.hub import load_tokenizer, render_prompt
from rluf.train.prompts import load_prompts, messages_from_row, report_skipped_prompts
from rluf.types import Prompt

if TYPE_CHECKING:
    from ray import ObjectRef

STREAM_FROM_PROMPTS = 20_000
"""Number of prompts from which on a split is streamed."""
CACHED_BLOCK_COUNT = 4
"""Blocks cached in the driver. The order is shuffled over all prompts, so a larger cache would rarely be hit."""
RENDER_BATCH_ROWS = 1000
"""Prompts rendered per batch."""
PROMPT_COLUMNS = ("id", "messages", "topic")


class PromptStore(Sequence[Prompt]):
    """Prompts in blocks of Ray's object store, read like a list; `ids` and `topics` are those of all, in order."""

    def __init__(self, blocks: Sequence[ObjectRef[pa.Table]], split: str) -> None:
        """Read ids and topics of `blocks` (columns id, messages, topic, token_ids), one block at a time."""
        import ray

        self._blocks, self._split = list(blocks), split
        self._block_cache: OrderedDict[int, pa.Table] = OrderedDict()
        self.ids: list[str] = []
        self.topics: list[str] = []
        self._block_ends: list[int] = []
        for block in self._blocks:
            table: pa.Table = ray.get(block)
            self.ids += table.column("id").to_pylist()
            self.topics += [topic or "" for topic in table.column("topic").to_pylist()]
            self._block_ends.append(len(self.ids))

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
        return Prompt(row["id"], messages_from_row(row), tuple(row["token_ids"]), row["topic"] or "", self._split)

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


def prompt_topics(prompts: Sequence[Prompt]) -> list[str]:
    """The topic of each prompt, without fetching the prompts of a store."""
    return prompts.topics if isinstance(prompts, PromptStore) else [prompt.topic for prompt in prompts]


def prompt_ids(prompts: Sequence[Prompt]) -> list[str]:
    """The id of each prompt, without fetching the prompts of a store."""
    return prompts.ids if isinstance(prompts, PromptStore) else [prompt.id for prompt in prompts]


def load_training_prompts(
    data_folder: Path, model_path: Path, max_tokens: int, *, stream_from: int = STREAM_FROM_PROMPTS
) -> Sequence[Prompt]:
    """Prompts of the training split in file order, as ids of the tokenizer at `model_path`.

    A split of at least `stream_from` prompts is streamed. Prompts longer than `max_tokens` are skipped and counted in
    the log. Raises DataError when none is left.
    """
    parquet_path = data_folder / "prompts" / "train.parquet"
    row_count = pq.read_metadata(parquet_path).num_rows
    if row_count < stream_from:
        return load_prompts(data_folder, "train", load_tokenizer(model_path), max_tokens=max_tokens)
    store = PromptStore(_render_blocks(parquet_path, model_path, max_tokens), "train")
    report_skipped_prompts("train", len(store), row_count, max_tokens)
    return store


class _PromptRenderer:
    """Adds token_ids to rows and drops rows that are too long; one instance per Ray Data worker."""

    def __init__(self, model_path: str, max_tokens: int) -> None:
        self._tokenizer, self._max_tokens = load_tokenizer(Path(model_path)), max_tokens

    def __call__(self, table: pa.Table) -> pa.Table:
        """Rows with token_ids."""
        rendered_rows = []
        for row in table.to_pylist():
            token_ids = render_prompt(self._tokenizer, messages_from_row(row))
            if len(token_ids) <= self._max_tokens:
                rendered_rows.append({**{key: row[key] for key in PROMPT_COLUMNS}, "token_ids": list(token_ids)})
        # An explicit schema: a block whose rows were all dropped must have the same columns as the others.
        fields = [table.schema.field(key) for key in PROMPT_COLUMNS]
        schema = pa.schema([*fields, pa.field("token_ids", pa.list_(pa.int64()))])
        return pa.Table.from_pylist(rendered_rows, schema=schema)


def _render_blocks(parquet_path: Path, model_path: Path, max_tokens: int) -> list[Any]:
    """References to blocks of rendered prompts, in file order."""
    import ray.data

    # By default Ray Data returns blocks as they finish; a resumed run needs the same prompt at the same index.
    context = ray.data.DataContext.get_current()
    preserve_order = context.execution_options.preserve_order
    context.execution_options.preserve_order = True
    try:
        dataset = ray.data.read_parquet(str(parquet_path), columns=list(PROMPT_COLUMNS))
        rendered = dataset.map_batches(
            _PromptRenderer,
            fn_constructor_args=(str(model_path), max_tokens),
            batch_format="pyarrow",
            batch_size=RENDER_BATCH_ROWS,
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=0.5,
        )
        return list(rendered.to_arrow_refs())
    finally:
        context.execution_options.preserve_order = preserve_order
