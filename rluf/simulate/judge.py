"""Score a held-out file with the reader behind the simulated users and measure its agreement with the labels.

    python -m rluf.simulate judge --data FILE.jsonl[.gz] [--score satisfaction] [--output SCORES.jsonl]

Rows are those of `rluf.evaluate score`: {"messages", "response", "label": 0|1} or {"messages", "chosen", "rejected"},
each with optional "id", "group", "topic" and "kind". `finish_reason` (for pairs `chosen_finish_reason` and
`rejected_finish_reason`) "length" marks a truncated response; without it a response that does not end a sentence counts
as truncated. The last line on stdout is JSON: AUROC or pair accuracy with a 95% interval clustered by group, and for
rows with a kind the result of each.
"""

from __future__ import annotations

import gzip
import json
import logging
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scipy.special import logit

from rluf.config.cli import CommandParser, run_command
from rluf.errors import DataError
from rluf.simulate.ground_truth import Reader, ReaderInput, load_reader
from rluf.simulate.reader_features import has_sentence_end
from rluf.types import Message

logger = logging.getLogger("rluf.simulate.judge")

SCORE_NAMES = ("satisfaction", "helpfulness", "safety", "warmth")
CHUNK_ROWS = 200
"""Rows per progress line."""


def judge_file(data_path: Path, output_path: Path | None, score_name: str, reader: Reader) -> dict[str, Any]:
    """Score the rows of a file; writes the scores if there is an output path and returns the metrics.

    Raises DataError for a file or row that cannot be read, ModelError if the reader's model is missing.
    """
    from rluf.reward.card import summarize_scores
    from rluf.reward.metrics import round_for_json

    start_time = time.monotonic()
    rows = read_heldout_rows(data_path)
    scored_rows: list[dict[str, Any]] = []
    for first in range(0, len(rows), CHUNK_ROWS):
        scored_rows += score_rows(rows[first : first + CHUNK_ROWS], score_name, reader)
        logger.info("%s: judged rows=%d of %d", data_path, len(scored_rows), len(rows))
    if output_path is not None:
        output_path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in scored_rows), "utf-8")
    rows_of_kind: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in scored_rows:
        if row["kind"] is not None:
            rows_of_kind[str(row["kind"])].append(row)
    main_metric = "pair_accuracy" if "margin" in scored_rows[0] else "auroc"
    by_kind = {
        kind: {"n": len(kind_rows), main_metric: summarize_scores(kind_rows)[main_metric]["mean"]}
        for kind, kind_rows in sorted(rows_of_kind.items())
    }
    return {
        "command": "judge", "score": score_name, "data": str(data_path), **summarize_scores(scored_rows),
        "by_kind": round_for_json(by_kind), "seconds": round(time.monotonic() - start_time, 1),
    }  # fmt: skip


def read_heldout_rows(data_path: Path) -> list[Mapping[str, Any]]:
    """Rows of a file of JSON lines, plain or .gz. DataError names file and line of the first invalid row."""
    from rluf.reward.card import parse_heldout_row

    try:
        content = gzip.decompress(data_path.read_bytes()) if data_path.suffix == ".gz" else data_path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{data_path} cannot be read: {error}; expected a file of JSON lines, plain or .gz") from error
    lines = enumerate(content.splitlines(), 1)
    rows = [parse_heldout_row(line, f"{data_path}:{number}") for number, line in lines if line.strip()]
    if not rows:
        raise DataError(f"{data_path} has no rows; expected a file of JSON lines, plain or .gz")
    return rows


def score_rows(rows: Sequence[Mapping[str, Any]], score_name: str, reader: Reader) -> list[dict[str, Any]]:
    """Scored rows in the form of rluf.reward.card.score_heldout_rows, with `kind` and all scores of the reader."""
    from rluf.reward.card import is_pair_row

    inputs: list[ReaderInput] = []
    for row in rows:
        columns = ("chosen", "rejected") if is_pair_row(row) else ("response",)
        for column in columns:
            finish_reason = row.get("finish_reason" if column == "response" else f"{column}_finish_reason")
            # An explicit reason wins over the look of the text, which may stop without a period.
            is_finished = has_sentence_end(row[column]) if finish_reason is None else finish_reason == "stop"
            messages = tuple(Message(role=m["role"], content=m["content"]) for m in row["messages"])
            inputs.append(ReaderInput(messages, row[column], is_finished))
    truths = iter(reader.score_responses(inputs))
    scored_rows = []
    for row in rows:
        scored_row: dict[str, Any] = {key: row.get(key) for key in ("id", "group", "kind")}
        if is_pair_row(row):
            chosen, rejected = next(truths), next(truths)
            logits = [_to_logit(getattr(truth, score_name)) for truth in (chosen, rejected)]
            scored_row |= {"margin": logits[0] - logits[1], "chosen": asdict(chosen), "rejected": asdict(rejected)}
            scored_row |= {"chosen_length": len(row["chosen"]), "rejected_length": len(row["rejected"])}
        else:
            truth = next(truths)
            scored_row |= {"label": int(row["label"]), "logit": _to_logit(getattr(truth, score_name))}
            scored_row |= {"scores": asdict(truth), "length": len(row["response"])}
        scored_rows.append(scored_row)
    return scored_rows


def _to_logit(probability: float) -> float:
    return float(logit(min(max(probability, 1e-9), 1 - 1e-9)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, and an error is one message on stderr."""
    from rluf.config.settings import Settings
    from rluf.tracking.console import setup_logging
    from rluf.utils.paths import resolve_cache_folder

    parser = CommandParser("rluf.simulate judge", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="JSON lines, plain or .gz")
    parser.add_argument("--score", choices=SCORE_NAMES, default=SCORE_NAMES[0], help="score that is compared")
    parser.add_argument("--output", type=Path, metavar="FILE", help="file for the scores of each row (default: none)")
    args = parser.parse_args(arguments)
    setup_logging()

    def run_and_print() -> None:
        reader = load_reader(resolve_cache_folder(Settings()))
        metrics = judge_file(args.data, args.output, args.score, reader)
        sys.stdout.write(json.dumps(metrics) + "\n")

    return run_command(run_and_print)
