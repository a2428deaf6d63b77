"""The whole of prepare: three passes on Ray Data, checks between them, and a data set that appears only when whole."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rluf.config.settings import Settings
from rluf.errors import DataError, ResourceError, RlufError
from rluf.feedback.card import data_card, funnel_lines
from rluf.feedback.sampling import Quota
from rluf.feedback.schema import KINDS
from rluf.feedback.sources import Source, resolve
from rluf.feedback.tasks import CheckTask, SplitTask, Tally, WriteTask, Written, group_counts, run_task

logger = logging.getLogger(__name__)

CARD = "data_card.json"
"""Name of the card; a folder that holds it is a data set of ours."""


def build(settings: Settings, out: Path) -> dict[str, Any]:
    """Turn the logs of `settings.data` into the data set folder `out`; returns its card. Ray must be initialised.

    `out` is written beside and renamed, and an older data set there is replaced. Raises DataError for missing, empty
    or too bad logs and for splits that come out empty, ResourceError when the disk is full.
    """
    sources = [source for kind in KINDS for source in resolve(getattr(settings.data, kind), kind)]
    if not sources:
        raise DataError("data.feedback, data.preferences, data.safety and data.prompts are all empty; name a log")
    with _fresh_folder(out) as folder:
        card = _build(settings, sources, folder)
    for line in funnel_lines(card):
        logger.info("%s", line)
    return card


def _build(settings: Settings, sources: Sequence[Source], folder: Path) -> dict[str, Any]:
    work, now = folder / "_work", datetime.now(UTC)
    work.mkdir()
    tallies = _checked(settings, sources, work, now)
    _budget(tallies, settings.prepare.quarantine_budget)
    kinds = [kind for kind in KINDS if any(source.kind == kind for source in sources)]
    parts = range(settings.prepare.blocks)
    found = _run("split", [SplitTask(str(work), kind, part) for kind in kinds for part in parts])
    tallies += [Tally(**row) for row in found]
    _budget(tallies, settings.prepare.quarantine_budget)
    _filled(tallies, kinds)
    written = _written(settings, kinds, work, folder)
    shutil.rmtree(work)
    rows = {source.location: 0 for source in sources}
    for tally in tallies:
        if tally.event == "in":
            rows[tally.source] += tally.rows
    card = data_card(
        tallies,
        written,
        sources=[{"kind": s.kind, "file": s.location, "reader": s.reader, "rows": rows[s.location]} for s in sources],
        settings=settings.prepare.model_dump(mode="json", exclude={"output"}),
        seed=settings.seed,
        created=now.isoformat(timespec="seconds"),
    )
    (folder / CARD).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return card


def _checked(settings: Settings, sources: Sequence[Source], work: Path, now: datetime) -> list[Tally]:
    """First pass over all files; a file is read in several stripes when there are fewer files than blocks."""
    prepare = settings.prepare
    tasks = []
    for order, source in enumerate(sources):
        alike = sum(other.kind == source.kind for other in sources)
        stripes = max(1, -(-prepare.blocks // alike))
        for stripe in range(stripes):
            tasks.append(
                CheckTask(
                    work=str(work),
                    kind=source.kind,
                    path=source.location,
                    reader=source.reader,
                    order=order,
                    stripe=stripe,
                    stripes=stripes,
                    buckets=prepare.blocks,
                    now=now.isoformat(),
                    dev_share=prepare.dev_share,
                    test_share=prepare.test_share,
                )
            )
    tallies = [Tally(**row) for row in _run("check", tasks)]
    for kind in dict.fromkeys(source.kind for source in sources):
        if not any(tally.kind == kind for tally in tallies):
            files = ", ".join(source.location for source in sources if source.kind == kind)
            raise DataError(f"data.{kind}: no rows in {files}; the log is empty: check data.{kind} in the config")
    return tallies


def _written(settings: Settings, kinds: Sequence[str], work: Path, folder: Path) -> list[Written]:
    """Third pass: every split's file, and the quarantine."""
    prepare = settings.prepare
    tasks = []
    for kind in kinds:
        for side in KINDS[kind].splits:
            train = side == "train" and kind != "prompts"
            tasks.append(
                WriteTask(
                    work=str(work),
                    kind=kind,
                    side=side,
                    path=str(folder / KINDS[kind].output / f"{side}.parquet"),
                    positive_share=prepare.positive_share if train and kind == "feedback" else None,
                    max_rows=prepare.max_rows if train else 0,
                    seed=settings.seed,
                )
            )
    tasks.append(WriteTask(str(work), "quarantine", "", str(folder / "quarantine.parquet"), None, 0, settings.seed))
    return [Written(**{**row, "quota": Quota(**row["quota"])}) for row in _run("write", tasks)]


def _budget(tallies: Sequence[Tally], budget: float) -> None:
    """Raise DataError when the share of bad rows of a kind is above the budget, with reasons and a place to look."""
    rows, bad = group_counts(tallies, "in"), group_counts(tallies, "quarantined")
    for kind, reasons in bad.items():
        share = reasons.total() / rows[kind].total()
        if share <= budget:
            continue
        examples = {t.reason: t.example for t in tallies if t.kind == kind and t.example}
        listed = "; ".join(
            f"{reason}: {count} (first at {examples.get(reason, '?')})" for reason, count in reasons.most_common(8)
        )
        more = f"; and {len(reasons) - 8} other reasons" if len(reasons) > 8 else ""
        raise DataError(
            f"data.{kind}: {reasons.total()} of {rows[kind].total()} rows ({share:.1%}) are bad, above "
            f"prepare.quarantine_budget={budget:g}: {listed}{more}. "
            "Mend the log, or raise the budget to have them set aside"
        )


def _filled(tallies: Sequence[Tally], kinds: Sequence[str]) -> None:
    """Raise DataError when a split is empty, or the training split has rows of one label only."""
    for kind in kinds:
        rows = [tally for tally in tallies if tally.kind == kind and tally.event == "kept"]
        for side in KINDS[kind].splits:
            if any(tally.side == side for tally in rows):
                continue
            count, unit = (
                sum(tally.rows for tally in rows),
                {"user_id": "user", "group": "group"}.get(KINDS[kind].split_by),
            )
            cure = (
                f"sides are told by the hash of the {unit}: add {unit}s, or change prepare.dev_share and test_share"
                if unit
                else f"mark some rows with split={side}"
            )
            raise DataError(f"data.{kind}: no good row of {count} falls in the {side} split; {cure}")
        labels = {tally.label for tally in rows if tally.side == "train"}
        if kind in ("feedback", "safety") and len(labels) == 1:
            names = {"feedback": ("unloved", "loved"), "safety": ("unsafe", "safe")}[kind]
            raise DataError(
                f"data.{kind}: all training rows are {names[labels.pop()]}, so there is nothing to tell apart; "
                "give a log that has both"
            )


def _run(name: str, tasks: Sequence[CheckTask] | Sequence[SplitTask] | Sequence[WriteTask]) -> list[dict[str, Any]]:
    """Run a pass on Ray Data, one task a block; returns the small counts of all tasks."""
    import ray
    from ray.exceptions import RayError

    context, console = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before = context.enable_progress_bars, context.print_on_execution_start, console.level
    context.enable_progress_bars = context.enable_progress_bars and sys.stderr.isatty()
    context.print_on_execution_start = False
    console.setLevel(logging.ERROR)
    rows = [{"name": name, "task": json.dumps(asdict(task))} for task in tasks]
    started = time.monotonic()
    try:
        blocks = ray.data.from_items(rows, override_num_blocks=len(rows))
        found = [json.loads(row["result"]) for row in blocks.flat_map(run_task).take_all()]
    except RayError as error:
        raise _cause(error) from error
    finally:
        context.enable_progress_bars, context.print_on_execution_start = before[:2]
        console.setLevel(before[2])
    logger.debug("%s: %d parts in %.1f s", name, len(rows), time.monotonic() - started)
    return found


def _cause(error: BaseException) -> BaseException:
    """The error of ours (or of the disk) that a Ray error wraps; the Ray error itself when there is none."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, RlufError):
            return inner
        if isinstance(inner, OSError) and inner.errno in (errno.ENOSPC, errno.EDQUOT):
            return ResourceError(
                f"no room left on the disk while writing the data set: {inner}; free some and run again"
            )
        if isinstance(inner, OSError) and inner.filename:
            return DataError(
                f"cannot read or write {inner.filename}: {inner.strerror}; check its rights and that it is there"
            )
        inner = inner.__cause__ or getattr(inner, "cause", None)
    return error


@contextmanager
def _fresh_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place when the block ends well and vanishes when it does not."""
    out = out.resolve()
    if out.exists() and not (out / CARD).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is no data set of rluf; name another folder, or remove it")
    part = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")
    try:
        part.mkdir(parents=True)
        yield part
        old = out.with_name(f"{part.name}.old")
        if out.exists():
            os.replace(out, old)
        os.replace(part, out)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise ResourceError(f"cannot write the data set {out}: {error.strerror or error}; check its disk") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
