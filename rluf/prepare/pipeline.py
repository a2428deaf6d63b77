"""The whole of prepare: three passes on Ray Data, checks between them, and a data set that appears only when whole."""

from __future__ import annotations

import errno
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import rluf
from rluf.config.settings import Settings
from rluf.errors import DataError, ResourceError, RlufError
from rluf.prepare.assign_pass import WeighTask, weigh
from rluf.prepare.card import data_card, drift, funnel_lines
from rluf.prepare.card_page import write_page
from rluf.prepare.readers.products import column_map
from rluf.prepare.readers.sources import Source, fingerprint, resolve
from rluf.prepare.redact import SALT, salt_mark, user_salt
from rluf.prepare.sampling import Quota
from rluf.prepare.schema import KINDS, SCHEMA_VERSION
from rluf.prepare.tables import Tally, group_counts
from rluf.prepare.validate_pass import CheckTask, check
from rluf.prepare.workspace import CARD, Workspace, digest_of, finish, workspace
from rluf.prepare.write_pass import WriteTask, files_of, write

logger = logging.getLogger(__name__)

Execute = Callable[[Sequence[Mapping[str, Any]]], list[dict[str, Any]]]
"""Runs `run_task` on each row of a pass and returns what they gave, in any order."""

_BUCKET_BYTES = 192 * 2**20
"""Bytes of raw log that a bucket holds; the third pass has one bucket of rows in memory at a time."""

_PACKED = 6
"""How many times as large a packed log is when unpacked, roughly."""


def build(settings: Settings, out: Path, execute: Execute | None = None) -> dict[str, Any]:
    """Turn the logs of `settings.data` into the data set folder `out`; returns its card. Ray must be initialised.

    `out` is written beside and renamed, and an older data set there is replaced. `execute` runs the tasks of a pass
    elsewhere than on Ray Data (in this process, to profile). Raises DataError for missing, empty or too bad logs and
    for splits that come out empty, ResourceError when the disk is full.
    """
    sources = [source for kind in KINDS for source in resolve(getattr(settings.data, kind), kind)]
    if not sources:
        raise DataError("data.feedback, data.preferences, data.safety and data.prompts are all empty; name a log")
    if any(s.kind == "reactions" for s in sources) and not any(s.kind == "feedback" for s in sources):
        raise DataError("data.reactions has nothing to join: data.feedback is empty; name the log of the responses")
    column_map(settings.prepare.columns)
    before = _earlier_card(settings, out)
    parts = {
        "files": fingerprint(sources),
        "data": settings.data.model_dump(mode="json"),
        "prepare": settings.prepare.model_dump(mode="json", exclude={"output"}),
        "seed": settings.seed,
        "code": [rluf.__version__, SCHEMA_VERSION],
        "salt": salt_mark(user_salt()),
        "forgotten": before.get("forgotten", []),
    }
    with workspace(out, digest_of(parts)) as work:
        card = _build(settings, sources, work, before, execute or on_ray)
    for line in funnel_lines(card):
        logger.info("%s", line)
    return card


def _earlier_card(settings: Settings, out: Path) -> dict[str, Any]:
    """Card of the data set to compare with: prepare.previous, else the one that is replaced; empty without one."""
    given = settings.prepare.previous
    path = (Path(given).expanduser() if given else out) / CARD
    if not path.is_file():
        if given:
            raise DataError(f"prepare.previous={given} holds no {CARD}; name the folder of a data set")
        return {}
    try:
        card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is no data card: {error}; name another data set, or remove it") from error
    return card


def _build(
    settings: Settings, sources: Sequence[Source], work: Workspace, before: Mapping[str, Any], execute: Execute
) -> dict[str, Any]:
    prepare, now = settings.prepare, work.remember("now", datetime.now(UTC).isoformat())
    names = {str(order): source.location for order, source in enumerate(sources)}
    checked = _run(work, execute, "check", _check_tasks(settings, sources, work, now, before.get("forgotten", [])))
    tallies = _tallies(checked)
    _not_empty(tallies, sources)
    _budget(tallies, prepare.quarantine_budget)
    kinds = [kind for kind in KINDS if any(source.kind == kind for source in sources)]
    told = prepare.model_dump(include=_WEIGH_SETTINGS)
    weighed = _run(
        work,
        execute,
        "weigh",
        [
            {"task": asdict(_weigh_task(settings, kind, work, "reactions" in kinds, told)), "sources": names}
            for kind in kinds
            if KINDS[kind].splits
        ],
    )
    tallies += _tallies(weighed)
    _budget(tallies, prepare.quarantine_budget)
    parts = [part | {"quota": Quota(**part["quota"])} for found in weighed for part in found["sides"]]
    _filled(parts)
    data = work.data
    tasks = [WriteTask(str(work.root), k, s, str(data / KINDS[k].output / f"{s}.parquet")) for k, s in files_of(kinds)]
    tasks.append(WriteTask(str(work.root), "quarantine", "", str(data / "quarantine.parquet")))
    written = _run(work, execute, "write", [asdict(task) for task in tasks])
    rows: Counter[str] = Counter()
    for tally in tallies:
        rows[tally.source] += tally.rows * (tally.event == "in")
    redacted: Counter[str] = Counter()
    for found in checked:
        redacted.update(found["redacted"])
    card = data_card(
        tallies,
        {(found["kind"], found["side"]): found["rows"] for found in written if "side" in found},
        parts,
        {kind: facts for found in weighed for kind, facts in found["facts"].items()},
        created=datetime.fromisoformat(now).isoformat(timespec="seconds"),
        seed=settings.seed,
        settings=prepare.model_dump(mode="json", exclude={"output"}),
        sources=[{"kind": s.kind, "file": s.location, "reader": s.reader, "rows": rows[s.location]} for s in sources],
        redacted=dict(redacted),
        user_ids=f"hashed with {SALT}" if user_salt() else "as in the log",
        forgotten=list(before.get("forgotten", [])),
    )
    card["drift"] = drift(card, before)
    (data / CARD).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_page(card, data)
    return card


_WEIGH_SETTINGS = {
    "dev_share", "test_share", "positive_share", "max_rows", "attribution_hours", "return_days", "abuse", "user_cap",
}  # fmt: skip


def _weigh_task(settings: Settings, kind: str, work: Workspace, joined: bool, told: Mapping[str, Any]) -> WeighTask:
    strict = settings.prepare.split == "strict"
    return WeighTask(work=str(work.root), kind=kind, joined=joined, strict=strict, seed=settings.seed, **told)


def _check_tasks(
    settings: Settings, sources: Sequence[Source], work: Workspace, now: str, forgotten: Sequence[str]
) -> list[dict[str, Any]]:
    """Tasks of the first pass; a file is read in several stripes when there are fewer files than blocks."""
    prepare, buckets, tasks = settings.prepare, _buckets(sources), []
    for order, source in enumerate(sources):
        alike = sum(other.kind == source.kind for other in sources)
        stripes = max(1, -(-prepare.blocks // alike))
        for stripe in range(stripes):
            task = CheckTask(
                work=str(work.root), kind=source.kind, path=source.location, reader=source.reader, order=order,
                stripe=stripe, stripes=stripes, buckets=buckets, now=now, dev_share=prepare.dev_share,
                test_share=prepare.test_share, seed=settings.seed, redact=prepare.redact, columns=prepare.columns,
                forgotten=forgotten, salt=(user_salt() or b"").hex(),
            )  # fmt: skip
            tasks.append(asdict(task))
    return tasks


def _buckets(sources: Sequence[Source]) -> int:
    """Buckets for the rows, by the size of the local logs; the rows' order does not hang on it."""
    size = 0
    for source in sources:
        if "://" not in source.location:
            packed = source.location.endswith((".gz", ".zst", ".parquet"))
            size += source.path.stat().st_size * (_PACKED if packed else 1)
    return max(1, -(-size // _BUCKET_BYTES))


def _tallies(found: Sequence[Mapping[str, Any]]) -> list[Tally]:
    return [Tally(**row) for part in found for row in part["tallies"]]


def _not_empty(tallies: Sequence[Tally], sources: Sequence[Source]) -> None:
    for kind in dict.fromkeys(source.kind for source in sources):
        if not any(tally.kind == kind for tally in tallies):
            files = ", ".join(source.location for source in sources if source.kind == kind)
            raise DataError(f"data.{kind}: no rows in {files}; the log is empty: check data.{kind} in the config")


def _budget(tallies: Sequence[Tally], budget: float) -> None:
    """Raise DataError when the share of bad rows of a kind is above the budget, with reasons and a place to look."""
    rows, bad = group_counts(tallies, "in"), group_counts(tallies, "quarantined")
    for kind, reasons in bad.items():
        share = reasons.total() / rows[kind].total()
        if share <= budget:
            continue
        examples = {t.reason: t.example for t in reversed(tallies) if t.kind == kind and t.example}
        listed = "; ".join(
            f"{reason}: {count} (first at {examples.get(reason, '?')})" for reason, count in reasons.most_common(8)
        )
        more = f"; and {len(reasons) - 8} other reasons" if len(reasons) > 8 else ""
        raise DataError(
            f"data.{kind}: {reasons.total()} of {rows[kind].total()} rows ({share:.1%}) are bad, above "
            f"prepare.quarantine_budget={budget:g}: {listed}{more}. "
            "Mend the log, or raise the budget to have them set aside"
        )


def _filled(parts: Sequence[Mapping[str, Any]]) -> None:
    """Raise DataError when a split is empty, or the training split has rows of one label only."""
    rows: Counter[str] = Counter()
    for part in parts:
        rows[part["kind"]] += part["before"]
    for part in parts:
        kind, side = part["kind"], part["side"]
        if not part["before"]:
            unit = {"user_id": "user", "group": "group"}.get(KINDS[kind].split_by)
            cure = (
                f"sides are told by the hash of the {unit}: add {unit}s, or change prepare.dev_share and test_share"
                if unit
                else f"mark some rows with split={side}"
            )
            raise DataError(f"data.{kind}: no good row of {rows[kind]} falls in the {side} split; {cure}")
        if side == "train" and kind in ("feedback", "safety") and len(part["labels"]) == 1:
            names = {"feedback": ("unloved", "loved"), "safety": ("unsafe", "safe")}[kind]
            raise DataError(
                f"data.{kind}: all training rows are {names[part['labels'][0]]}, so there is nothing to tell apart; "
                "give a log that has both"
            )


def _plain(value: object) -> dict[str, Any]:
    if isinstance(value, Tally | Quota):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def run_task(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Run one task in a Ray Data worker: the row names the pass and holds the task as JSON; so does the row returned.

    The counts are also left in the working folder, so that the task is not run again after a kill.
    """
    fields = json.loads(row["task"])
    if row["name"] == "check":
        found = check(CheckTask(**fields))
    elif row["name"] == "weigh":
        found = weigh(WeighTask(**fields["task"]), {int(order): path for order, path in fields["sources"].items()})
    else:
        found = write(WriteTask(**fields))
    text = json.dumps(found, default=_plain)
    finish(Path(row["done"]), json.loads(text))
    return [{"part": row["part"], "result": text}]


def _run(work: Workspace, execute: Execute, name: str, tasks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Run a pass, without the tasks that are done; returns the small counts of all tasks, in order."""
    found: dict[int, dict[str, Any]] = {}
    rows = []
    for part, task in enumerate(tasks):
        done = work.done(f"{name}-{part:05d}")
        if done.is_file():
            found[part] = json.loads(done.read_text(encoding="utf-8"))
        else:
            rows.append({"name": name, "part": part, "task": json.dumps(task), "done": str(done)})
    if found:
        logger.info("%s: %d of %d parts were done before the job was stopped", name, len(found), len(tasks))
    started = time.monotonic()
    if rows:
        found |= {row["part"]: json.loads(row["result"]) for row in execute(rows)}
    logger.debug("%s: %d parts in %.1f s", name, len(rows), time.monotonic() - started)
    return [found[part] for part in range(len(tasks))]


def on_ray(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Run tasks on Ray Data, one a block."""
    import ray
    from ray.exceptions import RayError

    context, console = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before = context.enable_progress_bars, context.print_on_execution_start, console.level
    context.enable_progress_bars = context.enable_progress_bars and sys.stderr.isatty()
    context.print_on_execution_start = False
    console.setLevel(logging.ERROR)
    try:
        blocks = ray.data.from_items(list(rows), override_num_blocks=len(rows))
        made: list[dict[str, Any]] = blocks.flat_map(run_task).take_all()
    except RayError as error:
        raise _cause(error) from error
    finally:
        context.enable_progress_bars, context.print_on_execution_start = before[:2]
        console.setLevel(before[2])
    return made


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
