"""Training prompts that need not fit into the driver: rendered by Ray Data, kept in blocks, fetched in their turn.

The driver holds an id, a topic and a place for each prompt (some 200 bytes), a few blocks at a time, and the cursor of
the shuffled order (train/controller.py), which checkpoints keep: prompt n of a run is the same whatever was read before
it. Small sets are read at once, as starting Ray Data's workers takes longer than rendering them here.
"""

from __future__ import annotations

import bisect
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import pyarrow as pa
import pyarrow.parquet as pq

from rluf.errors import DataError
from rluf.models.hub import load_tokenizer, render_prompt
from rluf.train.prompts import load_prompts
from rluf.types import Message, Prompt

if TYPE_CHECKING:
    from ray import ObjectRef

logger = logging.getLogger(__name__)

STREAM_FROM = 20_000
"""Prompts from which on a split is streamed."""
HELD_BLOCKS = 4
"""Blocks that the driver keeps for the next prompts."""
ROWS = 1000
"""Prompts rendered at a time."""


class PromptStore(Sequence[Prompt]):
    """Prompts in blocks of Ray's object store, read like a list; `topics` are those of all prompts, in order."""

    def __init__(self, blocks: Sequence[ObjectRef[pa.Table]], split: str) -> None:
        """Read ids and topics of `blocks` (columns id, messages, topic, token_ids), one block at a time."""
        import ray

        self._blocks, self._split = list(blocks), split
        self._held: OrderedDict[int, pa.Table] = OrderedDict()
        self.ids: list[str] = []
        self.topics: list[str] = []
        self._ends: list[int] = []
        for block in self._blocks:
            table: pa.Table = ray.get(block)
            self.ids += table.column("id").to_pylist()
            self.topics += [topic or "" for topic in table.column("topic").to_pylist()]
            self._ends.append(len(self.ids))

    def __len__(self) -> int:
        """Prompts in all."""
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...

    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        """One prompt, or several; its block is fetched unless it is held."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        number = bisect.bisect_right(self._ends, place)
        start = self._ends[number - 1] if number else 0
        (row,) = self._table(number).slice(place - start, 1).to_pylist()
        messages = tuple(Message(role=m["role"], content=m["content"]) for m in row["messages"])
        return Prompt(row["id"], messages, tuple(row["token_ids"]), row["topic"] or "", self._split)

    def __iter__(self) -> Iterator[Prompt]:
        """All prompts in order, block by block."""
        return (self[place] for place in range(len(self)))

    def _table(self, number: int) -> pa.Table:
        if number not in self._held:
            import ray

            self._held[number] = ray.get(self._blocks[number])
            while len(self._held) > HELD_BLOCKS:
                self._held.popitem(last=False)
        self._held.move_to_end(number)
        return self._held[number]


def topics_of(prompts: Sequence[Prompt]) -> list[str]:
    """The topic of each prompt, without fetching the prompts of a store."""
    return prompts.topics if isinstance(prompts, PromptStore) else [prompt.topic for prompt in prompts]


def ids_of(prompts: Sequence[Prompt]) -> list[str]:
    """The id of each prompt, likewise."""
    return prompts.ids if isinstance(prompts, PromptStore) else [prompt.id for prompt in prompts]


def training_prompts(data: Path, model: Path, max_tokens: int, *, stream_from: int = STREAM_FROM) -> Sequence[Prompt]:
    """Prompts of the training split in file order, as ids of the tokenizer at `model`; streamed from `stream_from` on.

    Prompts longer than `max_tokens` are left out whole and counted in the log. Raises DataError when none is left.
    """
    file = data / "prompts" / "train.parquet"
    rows = pq.read_metadata(file).num_rows
    if rows < stream_from:
        return load_prompts(data, "train", load_tokenizer(model), max_tokens=max_tokens)
    store = PromptStore(_rendered(file, model, max_tokens), "train")
    if len(store) < rows:
        told = "%d of %d train prompts are longer than rollout.max_prompt_tokens=%d: left out"
        logger.warning(told, rows - len(store), rows, max_tokens)
    if not len(store):
        raise DataError(
            f"no train prompt is left of {rows} in data.prompts; add prompts of that split or raise "
            f"rollout.max_prompt_tokens (now {max_tokens})"
        )
    return store


class _Renderer:
    """Adds token_ids to rows and drops those that are too long; one in each worker of Ray Data."""

    def __init__(self, model: str, max_tokens: int) -> None:
        self._tokenizer, self._max = load_tokenizer(Path(model)), max_tokens

    def __call__(self, table: pa.Table) -> pa.Table:
        """Rows with token_ids."""
        kept = []
        for row in table.to_pylist():
            ids = render_prompt(
                self._tokenizer, [Message(role=m["role"], content=m["content"]) for m in row["messages"]]
            )
            if len(ids) <= self._max:
                kept.append({**{key: row[key] for key in ("id", "messages", "topic")}, "token_ids": list(ids)})
        wanted = [table.schema.field(key) for key in ("id", "messages", "topic")]
        return pa.Table.from_pylist(kept, schema=pa.schema([*wanted, pa.field("token_ids", pa.list_(pa.int64()))]))


def _rendered(file: Path, model: Path, max_tokens: int) -> list[Any]:
    """References to blocks of rendered prompts, in file order."""
    import ray.data

    context = ray.data.DataContext.get_current()
    before = context.execution_options.preserve_order
    context.execution_options.preserve_order = True
    try:
        read = ray.data.read_parquet(str(file), columns=["id", "messages", "topic"])
        made = read.map_batches(
            _Renderer,
            fn_constructor_args=(str(model), max_tokens),
            batch_format="pyarrow",
            batch_size=ROWS,
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=0.5,
        )
        return list(made.to_arrow_refs())
    finally:
        context.execution_options.preserve_order = before
