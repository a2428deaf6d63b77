"""prepare: three passes on Ray Data with checks between them, and a data set that appears only when it is complete."""

from __future__ import annotations

import errno
import json
import logging
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import rluf
from rluf.config.objectives import find_spec_by_data_key
from rluf.config.settings import Settings
from rluf.errors import DataError, ResourceError, RlufError
from rluf.prepare.assign_pass import AssignTask, assign_rows
from rluf.prepare.card import build_data_card, format_card_lines, list_warnings, measure_drift, measure_entry_drift
from rluf.prepare.card_page import write_card_page
from rluf.prepare.entry_report import (
    check_entries,
    estimate_lost_rows,
    report_entries,
    summarize_lengths,
    summarize_scripts,
)
from rluf.prepare.readers.columns import check_columns
from rluf.prepare.readers.groups import group_messages
from rluf.prepare.readers.sources import LogSource, fingerprint_sources, has_single_messages, resolve_all_sources
from rluf.prepare.readers.tables import TableFolders, export_tables
from rluf.prepare.schema import SCHEMA_VERSION, find_data_kind, order_kinds
from rluf.prepare.splits import SamplingQuota
from rluf.prepare.validate_pass import ValidateTask, validate_rows
from rluf.prepare.workspace import (
    CARD_FILE_NAME,
    PrepareWorkspace,
    RowCount,
    group_row_counts,
    hash_inputs,
    open_workspace,
    use_system_memory,
)
from rluf.prepare.write_pass import WriteTask, list_output_splits, write_split_file
from rluf.utils.files import write_json
from rluf.utils.hashing import USER_SALT_VARIABLE, fingerprint_salt, read_user_salt

logger = logging.getLogger(__name__)

TaskExecutor = Callable[[Sequence[Mapping[str, Any]]], list[dict[str, Any]]]
"""Runs `run_task` on each row of a pass and returns the results, in any order."""

MIN_READ_TASKS, MAX_READ_TASKS = 2, 32
"""Limits of the tasks that read one kind of log: each of several tasks on one file decompresses all of it."""

MAX_FILE_TASKS = 64
"""Tasks that read the files of one entry; with more files, a task reads several of them."""

PROGRESS_INTERVAL_S = 10.0
"""Seconds between two lines of progress."""

_WORKSPACE_LAYOUT = 3
"""Version of the files in the working folder: a job does not resume from the folder of another layout."""

_BUCKET_BYTES = 192 * 2**20
"""Bytes of raw log per bucket; the third pass holds the rows of one bucket in memory."""

_COMPRESSION_RATIO = 6
"""Approximate ratio of the size of a log to that of its compressed file."""

_ASSIGN_SETTINGS = {
    "dev_share", "test_share", "positive_share", "max_rows", "reaction_window_hours", "return_window_days",
    "abuse_rules", "contradictions", "drop_duplicates",
}  # fmt: skip
"""Settings of prepare that are fields of AssignTask by the same name."""


def build_data_set(
    settings: Settings,
    output_folder: Path,
    task_executor: TaskExecutor | None = None,
    table_folders: TableFolders | None = None,
) -> dict[str, Any]:
    """Build a data set from the logs of `settings.data` and return its card. Ray must be initialized.

    The data set is written in a working folder and renamed to `output_folder`; an older data set there is replaced.
    `task_executor` runs the tasks of a pass elsewhere than on Ray Data (in this process, for profiling). Tables are
    exported next to `output_folder` for the time of the job, unless `table_folders` has their rows. Raises
    DataError for logs that are missing, empty or above the quarantine budget and for empty splits, ResourceError if
    the disk is full.
    """
    if table_folders is None and settings.data.has_tables:
        output_folder.parent.mkdir(parents=True, exist_ok=True)
        with export_tables(settings.data.sources_by_kind, output_folder.parent) as table_folders:
            return build_data_set(settings, output_folder, task_executor, table_folders)
    sources = resolve_all_sources(settings.data.sources_by_kind, table_folders)
    if not sources:
        raise DataError("data.feedback, data.preferences, data.safety and data.prompts are all empty; name a log")
    source_kinds = {source.kind_name for source in sources}
    if "reactions" in source_kinds and "feedback" not in source_kinds:
        raise DataError("data.reactions has nothing to join: data.feedback is empty; name the log of the responses")
    sources = [_complete_entry(source, settings) for source in sources]
    check_columns("feedback", settings.prepare.columns, "prepare.columns")
    check_entries(sources)
    previous_card = _load_previous_card(output_folder)
    inputs = {
        "files": fingerprint_sources(sources), "data": settings.data.model_dump(mode="json"),
        "prepare": settings.prepare.model_dump(mode="json", exclude={"output"}), "seed": settings.seed,
        "code": [rluf.__version__, SCHEMA_VERSION, _WORKSPACE_LAYOUT], "salt": fingerprint_salt(read_user_salt()),
        "forgotten": previous_card.get("forgotten", []),
    }  # fmt: skip
    with open_workspace(output_folder, hash_inputs(inputs)) as workspace:
        if any(map(has_single_messages, sources)):
            sources = group_messages(sources, workspace.root / "grouped")
        card = _run_passes(settings, sources, workspace, previous_card, task_executor or execute_on_ray)
    for line in format_card_lines(card):
        logger.info("data set %s: %s", output_folder, line)
    return card


def _load_previous_card(output_folder: Path) -> dict[str, Any]:
    """Card to compare with: that of the data set to replace; empty without one."""
    path = output_folder / CARD_FILE_NAME
    if not path.is_file():
        return {}
    try:
        card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not a data card: {error}; name another data set, or remove it") from error
    return card


def _run_passes(
    settings: Settings,
    sources: Sequence[LogSource],
    workspace: PrepareWorkspace,
    previous_card: Mapping[str, Any],
    task_executor: TaskExecutor,
) -> dict[str, Any]:
    """Run validate, assign and write; write card and page to the workspace and return the card."""
    prepare = settings.prepare
    # A resumed job uses the clock of the first one, so that both reject the same future times.
    current_time = workspace.load_or_store("now", datetime.now(UTC).isoformat())
    erasure_marks = previous_card.get("forgotten", [])
    read_task_count = workspace.load_or_store("read_tasks", _count_read_tasks())
    validate_tasks = _build_validate_tasks(settings, sources, workspace, current_time, erasure_marks, read_task_count)
    validate_results = _run_pass(workspace, task_executor, "validate", validate_tasks)
    row_counts = _collect_row_counts(validate_results)
    _check_not_empty(row_counts, sources)
    lost_rows = estimate_lost_rows(row_counts, prepare.broken_files)
    entry_reports = report_entries(sources, validate_tasks, validate_results)
    for report in entry_reports:
        report.check_paths()
    _check_quarantine_budget(row_counts, prepare.quarantine_budget, lost_rows)
    for report in entry_reports:
        report.check_reactions()
    kinds = order_kinds(source.kind_name for source in sources)
    assign_tasks = _build_assign_tasks(settings, sources, workspace, kinds)
    assign_results = _run_pass(workspace, task_executor, "assign", assign_tasks)
    row_counts += _collect_row_counts(assign_results)
    _check_quarantine_budget(row_counts, prepare.quarantine_budget, lost_rows)
    split_summaries = [
        summary | {"quota": SamplingQuota(**summary["quota"])}
        for result in assign_results
        for summary in result["splits"]
    ]
    _check_splits(split_summaries, row_counts)
    write_tasks = _build_write_tasks(workspace, kinds, _count_buckets(sources))
    write_results = _run_pass(workspace, task_executor, "write", write_tasks)
    source_rows: Counter[str] = Counter()
    for row_count in row_counts:
        if row_count.outcome == "in":
            source_rows[row_count.source_path] += row_count.rows
    redacted: Counter[str] = Counter()
    for result in validate_results:
        redacted.update(result["redacted"])
    source_facts = [
        {"kind": s.kind_name, "file": s.location, "reader": s.entry.reader, "rows": source_rows[s.location]}
        for s in sources
    ]
    card = build_data_card(
        row_counts,
        {(result["kind"], result["split"]): result["rows"] for result in write_results if "split" in result},
        split_summaries,
        {kind: statistics for result in assign_results for kind, statistics in result["statistics"].items()},
        created=datetime.fromisoformat(current_time).isoformat(timespec="seconds"), seed=settings.seed,
        settings=prepare.model_dump(mode="json", exclude={"output"}), sources=source_facts, redacted=dict(redacted),
        user_ids=f"hashed with {USER_SALT_VARIABLE}" if read_user_salt() else "as in the log",
        forgotten=list(erasure_marks), entries=[report.to_card() for report in entry_reports],
        lost_rows_of_broken_files=lost_rows,
    )  # fmt: skip
    card["scripts"] = summarize_scripts(validate_tasks, validate_results)
    card["lengths"] = summarize_lengths(validate_tasks, validate_results, settings.reward.by_objective)
    card["warnings"] = [*list_warnings(card, prepare.max_rows), *measure_entry_drift(card, previous_card)]
    card["drift"] = measure_drift(card, previous_card)
    card_text = json.dumps(card, indent=2, ensure_ascii=False) + "\n"
    (workspace.data_folder / CARD_FILE_NAME).write_text(card_text, encoding="utf-8")
    write_card_page(card, workspace.data_folder)
    return card


def _count_read_tasks() -> int:
    """CPUs of the Ray cluster: how many tasks may read a log at once."""
    import ray

    cpu_count = int(ray.cluster_resources().get("CPU", 0)) if ray.is_initialized() else 0
    return min(max(cpu_count, MIN_READ_TASKS), MAX_READ_TASKS)


def _build_validate_tasks(
    settings: Settings,
    sources: Sequence[LogSource],
    workspace: PrepareWorkspace,
    current_time: str,
    erasure_marks: Sequence[str],
    read_task_count: int,
) -> list[dict[str, Any]]:
    """Tasks of the first pass: few files of an entry are read in several stripes, many small ones by one task."""
    prepare, bucket_count = settings.prepare, _count_buckets(sources)
    files_of_kind = Counter(source.kind_name for source in sources)
    sources_of_entry: dict[tuple[str, int], list[tuple[int, LogSource]]] = defaultdict(list)
    for source_index, source in enumerate(sources):
        sources_of_entry[source.kind_name, source.entry_index].append((source_index, source))
    tasks = []
    for (kind_name, _), entry_sources in sources_of_entry.items():
        stripe_count = max(1, -(-read_task_count // files_of_kind[kind_name]))
        files_per_task = -(-len(entry_sources) // max(MAX_FILE_TASKS, 4 * read_task_count))
        entry = entry_sources[0][1].entry
        for first in range(0, len(entry_sources), files_per_task):
            files = [(index, source.location) for index, source in entry_sources[first : first + files_per_task]]
            for stripe_index in range(stripe_count):
                task = ValidateTask(
                    work_folder=str(workspace.root), kind_name=kind_name, sources=files,
                    entry=entry.model_dump(mode="json"), stripe_index=stripe_index, stripe_count=stripe_count,
                    bucket_count=bucket_count, current_time=current_time, dev_share=prepare.dev_share,
                    test_share=prepare.test_share, seed=settings.seed, redact_kinds=prepare.redact,
                    labels=entry.labels, contradictions=prepare.contradictions, erasure_marks=erasure_marks,
                    salt_hex=(read_user_salt() or b"").hex(),
                )  # fmt: skip
                tasks.append(asdict(task))
    return tasks


def _complete_entry(source: LogSource, settings: Settings) -> LogSource:
    """The source with what the settings say about all entries: labels, and columns of feedback without its own."""
    entry, prepare = source.entry, settings.prepare
    is_plain_feedback = source.kind_name == "feedback" and not entry.columns and entry.reader is None
    columns = prepare.columns if is_plain_feedback else entry.columns
    return replace(source, entry=entry.model_copy(
        update={"columns": columns, "labels": {**prepare.labels, **entry.labels}}
    ))  # fmt: skip


def _build_assign_tasks(
    settings: Settings, sources: Sequence[LogSource], workspace: PrepareWorkspace, kinds: Sequence[str]
) -> list[dict[str, Any]]:
    """Tasks of the second pass: one for each kind that has splits."""
    source_paths = {
        str(index): (source.location, source.entry.format, source.entry.path) for index, source in enumerate(sources)
    }
    assign_settings = settings.prepare.model_dump(include=_ASSIGN_SETTINGS)
    tasks = []
    for kind in kinds:
        if find_data_kind(kind).split_names:
            task = AssignTask(
                work_folder=str(workspace.root), kind_name=kind, has_reactions="reactions" in kinds,
                strict_splits=settings.prepare.split == "strict", seed=settings.seed, **assign_settings,
            )  # fmt: skip
            tasks.append({"task": asdict(task), "sources": source_paths})
    return tasks


def _build_write_tasks(workspace: PrepareWorkspace, kinds: Sequence[str], bucket_count: int) -> list[dict[str, Any]]:
    """Tasks of the third pass: one per prepared file, and one for the quarantine."""
    root, data_folder = str(workspace.root), workspace.data_folder
    tasks = [
        WriteTask(
            root, kind, split, str(data_folder / find_data_kind(kind).output_name / f"{split}.parquet"), bucket_count
        )
        for kind, split in list_output_splits(kinds)
    ]
    tasks.append(WriteTask(root, "quarantine", "", str(data_folder / "quarantine.parquet"), bucket_count))
    return [asdict(task) for task in tasks]


def _count_buckets(sources: Sequence[LogSource]) -> int:
    """Number of buckets, from the size of the local logs. The order of the rows does not depend on it."""
    total_bytes = 0
    for source in sources:
        if "://" not in source.location:
            is_compressed = source.location.endswith((".gz", ".zst", ".parquet"))
            total_bytes += source.local_path.stat().st_size * (_COMPRESSION_RATIO if is_compressed else 1)
    return max(1, -(-total_bytes // _BUCKET_BYTES))


def _collect_row_counts(results: Sequence[Mapping[str, Any]]) -> list[RowCount]:
    return [RowCount(**fields) for result in results for fields in result["row_counts"]]


def _check_not_empty(row_counts: Sequence[RowCount], sources: Sequence[LogSource]) -> None:
    for kind in dict.fromkeys(source.kind_name for source in sources):
        if not any(row_count.kind_name == kind for row_count in row_counts):
            files = ", ".join(source.location for source in sources if source.kind_name == kind)
            raise DataError(f"data.{kind}: no rows in {files}; the log is empty: check data.{kind} in the config")


def _check_quarantine_budget(row_counts: Sequence[RowCount], budget: float, lost_rows: Mapping[str, int]) -> None:
    """Raise DataError if the share of quarantined rows of a kind exceeds the budget, with reasons and examples.

    `lost_rows` are estimated rows of broken files by kind; they count as quarantined. Rows that are all invalid are an
    error for any budget.
    """
    rows_in, quarantined = group_row_counts(row_counts, "in"), group_row_counts(row_counts, "quarantined")
    for kind, reasons in quarantined.items():
        lost = lost_rows.get(kind, 0)
        share = (reasons.total() + lost) / (rows_in[kind].total() + lost)
        if share <= budget and reasons.total() < rows_in[kind].total():
            continue
        # In reverse, so that the first example of a reason is the one that stays.
        examples = {
            row_count.reason: row_count.example_location
            for row_count in reversed(row_counts)
            if row_count.kind_name == kind and row_count.example_location
        }
        reason_list = "; ".join(
            f"{reason}: {count} (first at {examples.get(reason, '?')})" for reason, count in reasons.most_common(8)
        )
        lost_text = f" and about {lost} rows of broken files are lost" if lost else ""
        omitted = f"; and {len(reasons) - 8} other reasons" if len(reasons) > 8 else ""
        raise DataError(
            f"data.{kind}: {reasons.total()} of {rows_in[kind].total()} rows ({share:.1%}) are invalid{lost_text}, "
            f"above prepare.quarantine_budget={budget:g}: {reason_list}{omitted}. "
            "Fix the log, or raise the budget to have these rows quarantined"
        )


def _check_splits(split_summaries: Sequence[Mapping[str, Any]], row_counts: Sequence[RowCount]) -> None:
    """Raise DataError if a split is empty, or all rows of the training split have the same label."""
    kind_rows: Counter[str] = Counter()
    for summary in split_summaries:
        kind_rows[summary["kind"]] += summary["rows_before_sampling"]
    dropped_rows = group_row_counts(row_counts, "dropped")
    for kind, rows_in in group_row_counts(row_counts, "in").items():
        # A kind whose rows were all dropped by its reader or its conditions has no splits.
        if kind in dropped_rows and dropped_rows[kind].total() == rows_in.total() and kind != "reactions":
            reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped_rows[kind].most_common(8))
            raise DataError(
                f"data.{kind}: none of {rows_in.total()} rows is left ({reasons}); correct the reader, labels or where "
                "of its entry"
            )
    for summary in split_summaries:
        kind, split = summary["kind"], summary["split"]
        if not summary["rows_before_sampling"]:
            unit = {"user_id": "user", "group": "group"}.get(find_data_kind(kind).split_key)
            fix = (
                f"splits are assigned by the {unit}'s hash: add {unit}s, or change prepare.dev_share and test_share"
                if unit
                else f"mark some rows with split={split}"
            )
            dropped = group_row_counts(row_counts, "dropped").get(kind, Counter())
            reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.most_common())
            raise DataError(
                f"data.{kind}: none of {kind_rows[kind]} valid rows is in the {split} split; {fix}"
                + (f" (dropped before: {reasons})" if reasons else "")
            )
        spec = find_spec_by_data_key(kind)
        if split == "train" and spec is not None and spec.label_column and len(summary["labels"]) == 1:
            label_name = spec.label_names[summary["labels"][0]]
            raise DataError(
                f"data.{kind}: all training rows are {label_name}, so a model cannot learn to tell the classes apart; "
                "provide a log with both"
            )


def _to_json_value(value: object) -> dict[str, Any]:
    if isinstance(value, RowCount | SamplingQuota):
        return asdict(value)
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


def run_task(task_row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Run one task in a Ray Data worker. The row has the name of the pass and the task as JSON; so does the result.

    The result is also written to the working folder, so that a job that resumes does not run the task again.
    """
    fields = json.loads(task_row["task"])
    if task_row["name"] == "validate":
        result = validate_rows(ValidateTask(**fields))
    elif task_row["name"] == "assign":
        source_paths = {int(source_index): names for source_index, names in fields["sources"].items()}
        with use_system_memory():
            result = assign_rows(AssignTask(**fields["task"]), source_paths)
    else:
        result = write_split_file(WriteTask(**fields))
    result_json = json.dumps(result, default=_to_json_value)
    write_json(Path(task_row["done"]), json.loads(result_json))
    return [{"part": task_row["part"], "result": result_json}]


def _run_pass(
    workspace: PrepareWorkspace, task_executor: TaskExecutor, pass_name: str, tasks: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Run the tasks of a pass that are not finished yet; returns the results of all its tasks, in order."""
    results: dict[int, dict[str, Any]] = {}
    task_rows = []
    for index, task in enumerate(tasks):
        result_path = workspace.get_result_path(f"{pass_name}-{index:05d}")
        if result_path.is_file():
            results[index] = json.loads(result_path.read_text(encoding="utf-8"))
        else:
            task_rows.append({"name": pass_name, "part": index, "task": json.dumps(task), "done": str(result_path)})
    if results:
        logger.info("%s pass: resuming finished=%d tasks=%d", pass_name, len(results), len(tasks))
    if task_rows:
        with _log_progress(workspace, pass_name, len(tasks)):
            results |= {row["part"]: json.loads(row["result"]) for row in task_executor(task_rows)}
    return [results[index] for index in range(len(tasks))]


@contextmanager
def _log_progress(workspace: PrepareWorkspace, pass_name: str, task_count: int) -> Iterator[None]:
    """Log a line every PROGRESS_INTERVAL_S seconds while the block runs, and how long it took."""
    start_time, is_over = time.monotonic(), threading.Event()

    def log_lines() -> None:
        while not is_over.wait(PROGRESS_INTERVAL_S):
            finished = len(list(workspace.get_result_path("*").parent.glob(f"{pass_name}-*.json")))
            row_count = workspace.count_rows_read() if pass_name == "validate" else 0
            rows_text = f", {row_count:,} rows read" if row_count else ""
            logger.info(
                "prepare: %s pass: %d of %d tasks finished%s in %.0f s", pass_name, finished, task_count, rows_text,
                time.monotonic() - start_time,
            )  # fmt: skip

    thread = threading.Thread(target=log_lines, name="prepare-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
    logger.debug("%s pass: tasks=%d seconds=%.1f", pass_name, task_count, time.monotonic() - start_time)


def execute_on_ray(task_rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Run tasks on Ray Data, one per block."""
    import ray
    from ray.exceptions import RayError

    # Ray Data reports each dataset on the console; a pass is one line of ours, so its output is off while we run.
    context, ray_logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    progress_bars, print_on_start = context.enable_progress_bars, context.print_on_execution_start
    no_progress_timeout_s = context.execution_no_progress_timeout_s
    log_level = ray_logger.level
    context.enable_progress_bars = progress_bars and sys.stderr.isatty()
    context.print_on_execution_start = False
    # Ray Data sees no progress before a task ends, and gives up after half an hour. A task on 5 million rows takes
    # longer on a busy machine.
    context.execution_no_progress_timeout_s = -1
    ray_logger.setLevel(logging.ERROR)
    try:
        dataset = ray.data.from_items(list(task_rows), override_num_blocks=len(task_rows))
        results: list[dict[str, Any]] = dataset.flat_map(run_task).take_all()
    except RayError as error:
        raise _unwrap_error(error) from error
    finally:
        context.enable_progress_bars, context.print_on_execution_start = progress_bars, print_on_start
        context.execution_no_progress_timeout_s = no_progress_timeout_s
        ray_logger.setLevel(log_level)
    return results


def _unwrap_error(error: BaseException) -> BaseException:
    """The rluf or disk error that a Ray error wraps, with a fix; the Ray error itself if there is none."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, RlufError):
            return cause
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return ResourceError(f"disk full while writing the data set: {cause}; free some space and run again")
        if isinstance(cause, OSError) and cause.filename:
            return DataError(f"cannot read or write {cause.filename}: {cause.strerror}; check path and permissions")
        # Ray's task errors have the original in `cause`, not in `__cause__`.
        cause = cause.__cause__ or getattr(cause, "cause", None)
    return error
