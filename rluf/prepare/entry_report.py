"""What the rows of each entry of `data.*` had: paths that led to values, reactions by name, losses; and its checks."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rluf.config.objectives import find_spec_by_data_key
from rluf.config.reward import MAX_AUTO_TOKENS, MIN_AUTO_TOKENS
from rluf.errors import DataError, SettingsError
from rluf.prepare.labels import LABEL_NAMES, LabelRules, check_reactions
from rluf.prepare.readers.columns import BAD_REACTIONS_NOTE, RATINGS_NOTE, check_columns
from rluf.prepare.readers.files import BROKEN_FILE_REASONS
from rluf.prepare.readers.sources import LogSource, find_reader
from rluf.prepare.schema import find_data_kind
from rluf.prepare.validate_pass import LENGTH_STEP_TOKENS
from rluf.prepare.workspace import RowCount

_RATING_PATH = re.compile(r"rating|stars?$|score|csat|nps|grade", re.IGNORECASE)
_UNNAMED_STEP = re.compile(r"\.(?:\*|-?\d+|value|avg|mean)$")
"""Last step of a path that does not say what the value is: rating.value is a rating."""

_UNEVEN_COVERAGE = 0.25
"""Difference between files in the share of rows in which a path leads to a value, above which a warning names it."""


def check_entries(sources: Sequence[LogSource]) -> None:
    """Raise SettingsError for an entry whose columns or label rules are wrong, before any work starts."""
    for source in {(source.kind_name, source.entry_index): source for source in sources}.values():
        entry, data_key = source.entry, f"data.{source.kind_name}"
        check_columns(source.kind_name, entry.columns, f"{data_key}: columns")
        LabelRules(entry.labels)
        if entry.reader is not None and find_reader(entry.reader, source.kind_name).read_item is not None:
            unused = [name for name in ("columns", "roles") if getattr(entry, name)]
            if unused:
                raise SettingsError(
                    f"{data_key}: {' and '.join(unused)} would have no effect with reader {entry.reader}, which knows "
                    f"the fields of its export; remove {unused[0]}, or the reader"
                )


@dataclass
class EntryReport:
    """Counts over the files of one entry. `path_shares` are by file group, to see a field that was renamed midway."""

    source: LogSource
    rows: int = 0
    valid_rows: int = 0
    paths: Counter[str] = field(default_factory=Counter)
    path_shares: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    reactions: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def rules(self) -> LabelRules:
        """Label rules of the entry."""
        return LabelRules(self.source.entry.labels)

    def add(self, result: Mapping[str, Any]) -> None:
        """Add the counts of a task."""
        row_counts = list(map(_to_fields, result["row_counts"]))
        rows = sum(entry["rows"] for entry in row_counts if entry["outcome"] == "in")
        self.rows += rows
        self.valid_rows += rows - sum(entry["rows"] for entry in row_counts if entry["outcome"] != "in")
        self.paths.update(result["paths"])
        self.reactions.update(result["reactions"])
        self.notes.update(result["notes"])
        for name in self.source.entry.columns:
            if rows:
                self.path_shares[name].append(result["paths"].get(name, 0) / rows)

    def check_paths(self) -> None:
        """Raise DataError if a path of the entry's columns led to no value in any row."""
        for name, path in self.source.entry.columns.items():
            # Rows that could not be parsed have no paths; the quarantine budget stops on them, with the cause.
            if name in ("role", "content") or path.startswith("=") or path == "#" or not self.paths[""]:
                continue
            if not self.paths[name]:
                raise DataError(
                    f"data.{self.source.kind_name}: columns.{name}: the path {path!r} led to no value in any of "
                    f"{self.paths['']} rows of {self.source.entry.path}; correct the path, or remove it"
                )

    def check_reactions(self) -> None:
        """Raise DataError if reactions have no label."""
        entry = self.source.entry
        has_ratings = entry.reader is not None and find_reader(entry.reader, self.source.kind_name).has_ratings
        paths = [_UNNAMED_STEP.sub("", path) for path in entry.columns.get("reaction", "").split("|")]
        is_rating = any(_RATING_PATH.search(path.rpartition(".")[2]) for path in paths)
        data_key = f"data.{self.source.kind_name} ({entry.path})"
        if self.notes[BAD_REACTIONS_NOTE]:
            raise DataError(
                f"{data_key}: columns.reaction: {entry.columns['reaction']!r} seems to be true for bad responses; "
                "write ! before that path, as in liked|!disliked, or a rule such as labels: {true: not_loved}"
            )
        check_reactions(
            self.reactions, self.rules, data_key, is_rating=is_rating or bool(self.notes[RATINGS_NOTE]),
            has_ratings=has_ratings, is_event=self.source.kind_name == "reactions",
        )  # fmt: skip

    def _get_label(self, name: str) -> str:
        if self.rules.is_no_reaction(name, is_event=self.source.kind_name == "reactions"):
            return "none"
        return LABEL_NAMES[self.rules.find_code(name)]

    def to_card(self) -> dict[str, Any]:
        """The report as the data card has it."""
        entry = self.source.entry
        paths = {
            name: {"path": entry.columns[name], "share": self.paths[name] / max(self.rows, 1)}
            for name in entry.columns
            if name not in ("role", "content")
        }
        uneven = [name for name, shares in self.path_shares.items() if max(shares) - min(shares) > _UNEVEN_COVERAGE]
        return {
            "kind": self.source.kind_name, "path": entry.path, "rows": self.rows, "valid_rows": self.valid_rows,
            "paths": paths, "uneven_paths": uneven,
            "unmet_conditions": [path for path in entry.where if not self.paths[f"where {path}"]],
            "reactions": [
                {"name": name, "rows": rows, "label": self._get_label(name)}
                for name, rows in self.reactions.most_common()
            ],
            "notes": dict(self.notes.most_common()),
        }  # fmt: skip


def _to_fields(row_count: RowCount | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(row_count, RowCount):
        return {"rows": row_count.rows, "outcome": row_count.outcome}
    return row_count


def report_entries(
    sources: Sequence[LogSource], tasks: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]
) -> list[EntryReport]:
    """Reports of all entries, from the tasks of the first pass and their results."""
    reports = {(source.kind_name, source.entry_index): EntryReport(source) for source in sources}
    for task, result in zip(tasks, results, strict=True):
        source = sources[task["sources"][0][0]]
        reports[source.kind_name, source.entry_index].add(result)
    return list(reports.values())


def summarize_lengths(
    tasks: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]], reward_settings: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Estimated tokens of a row by kind of data: the 95th percentile, and the share that its reward model would cut."""
    counts_by_kind: dict[str, Counter[int]] = defaultdict(Counter)
    for task, result in zip(tasks, results, strict=True):
        counts_by_kind[task["kind_name"]].update({int(step): rows for step, rows in result["lengths"].items()})
    lengths = {}
    for kind_name, counts in counts_by_kind.items():
        spec = find_spec_by_data_key(kind_name)
        model = reward_settings.get(spec.name) if spec is not None else None
        if not counts or model is None:
            continue
        steps = sorted(counts)
        cumulative = np.cumsum([counts[step] for step in steps])
        high_step = steps[int(np.searchsorted(cumulative, 0.95 * cumulative[-1]))]
        max_tokens = model.max_tokens
        if max_tokens == "auto":  # resolved with the model's tokenizer when it is trained; here with the estimate
            max_tokens = min(max((high_step + 1) * LENGTH_STEP_TOKENS, MIN_AUTO_TOKENS), MAX_AUTO_TOKENS)
        cut_rows = sum(rows for step, rows in counts.items() if step * LENGTH_STEP_TOKENS >= max_tokens)
        lengths[kind_name] = {
            "tokens_p95": (high_step + 1) * LENGTH_STEP_TOKENS, "max_tokens": max_tokens,
            "cut_share": cut_rows / counts.total(),
        }  # fmt: skip
    return lengths


def summarize_scripts(
    tasks: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, int]]:
    """Valid rows of each kind of data by the script of their response (prompts: last message), most frequent first."""
    counts_by_name: dict[str, Counter[str]] = defaultdict(Counter)
    for task, result in zip(tasks, results, strict=True):
        if result["scripts"]:
            counts_by_name[find_data_kind(task["kind_name"]).output_name].update(result["scripts"])
    return {name: dict(counts.most_common()) for name, counts in counts_by_name.items()}


def estimate_lost_rows(row_counts: Sequence[RowCount], broken_files: str) -> dict[str, int]:
    """Estimated rows after the end of broken files, by kind: the mean of the kind's other files, less their own.

    Raises DataError with the files if `prepare.broken_files` is stop.
    """
    broken = [row_count for row_count in row_counts if row_count.reason in BROKEN_FILE_REASONS]
    if broken and broken_files == "stop":
        files = "; ".join(f"{row_count.reason} at {row_count.example_location}" for row_count in broken[:5])
        raise DataError(
            f"data.{broken[0].kind_name}: {len(broken)} files end early or cannot be read ({files}); how many of their "
            "rows are missing is unknown. Copy them again, or set prepare.broken_files=count to use the rows before "
            "the break"
        )
    rows_by_file: dict[str, Counter[str]] = defaultdict(Counter)
    for row_count in row_counts:
        if row_count.outcome == "in":
            rows_by_file[row_count.kind_name][row_count.source_path] += row_count.rows
    lost_rows: Counter[str] = Counter()
    for kind_name, rows_of in rows_by_file.items():
        broken_paths = {row_count.source_path for row_count in broken if row_count.kind_name == kind_name}
        intact = [rows for path, rows in rows_of.items() if path not in broken_paths]
        mean_rows = sum(intact) / len(intact) if intact else 0.0
        for path in broken_paths:
            # Without other files nothing is known, except that rows are missing.
            lost_rows[kind_name] += max(1, round(mean_rows - rows_of[path]))
    return dict(lost_rows)
