"""Score a held-out file with a trained reward model, and say how good the scores are.

python -m rluf.evaluate score --model FOLDER --data FILE.jsonl[.gz] [--output SCORES.jsonl] [--actors N]

Rows are {"id", "messages", "response", "label": 0|1, "group"} or {"id", "messages", "chosen", "rejected", "group"}.
The last line on stdout is JSON: AUROC or pair accuracy with a 95% interval clustered by group, ECE, Brier, n, and what
length alone would reach. Scores are written in parts, so that a run that was cut short goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rluf.config.cli import guard
from rluf.errors import ActorError, DataError, ModelError

if TYPE_CHECKING:
    from rluf.reward.model import RewardModel

logger = logging.getLogger("rluf.evaluate.score")

PART_ROWS = 1000
"""Rows of a part: what is scored, written and, after a stop, done again as a whole."""
BATCH_TOKENS = 4096
POOL_PARTS = 20
"""A file of more parts is scored by a pool of actors unless --actors says otherwise; starting one takes some 20 s."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows `first` (counted from 1) to `first + rows - 1` of the file, from byte `start` of its (unpacked) text."""

    number: int
    start: int
    first: int
    rows: int


def score(
    model: Path, data: Path, output: Path, *, actors: int | None = None, part_rows: int = PART_ROWS
) -> dict[str, Any]:
    """Score `data` with the checkpoint folder `model` into `output`; returns the figures.

    `actors` None lets the size of the file decide, 0 scores in this process, otherwise a Ray Data pool of so many
    actors does (on a cluster, model and data must be on a path that all nodes see). Raises DataError or ModelError.
    """
    from rluf.reward.calibration import Calibration
    from rluf.reward.heldout import summarise

    started = time.monotonic()
    if not (model / "config.json").is_file():
        raise ModelError(f"{model} holds no config.json; name a reward model folder that rluf.reward wrote")
    Calibration.load(model)
    parts = cut(data, part_rows)
    work = work_folder(model, data, output, part_rows)
    left = [part for part in parts if not _file(work, part).is_file()]
    if len(left) < len(parts):
        logger.info("%d of %d parts were scored before and are kept", len(parts) - len(left), len(parts))
    pool = (len(left) > POOL_PARTS) if actors is None else actors > 0
    for number, text in _pooled(model, data, left, actors) if pool and left else _here(model, data, left):
        whole = work / f"{number:06d}.jsonl"
        whole.with_suffix(".part").write_text(text, encoding="utf-8")
        os.replace(whole.with_suffix(".part"), whole)
        logger.info("part %d of %d scored after %.0f s", number + 1, len(parts), time.monotonic() - started)
    joined = output.with_name(f".{output.name}.whole")
    with joined.open("wb") as stream:
        for part in parts:
            stream.write(_file(work, part).read_bytes())
    with joined.open(encoding="utf-8") as stream:
        figures = summarise(json.loads(line) for line in stream)
    os.replace(joined, output)
    shutil.rmtree(work)
    told = {"command": "score", "model": str(model), "data": str(data), "output": str(output)}
    return {**told, **figures, "scored_now": sum(p.rows for p in left), "seconds": round(time.monotonic() - started, 1)}


def opened(data: Path) -> IO[bytes]:
    """The file's bytes, unpacked when its name ends in .gz."""
    return gzip.open(data, "rb") if data.suffix == ".gz" else data.open("rb")  # type: ignore[return-value]


def cut(data: Path, rows: int) -> list[Part]:
    """The file in parts of `rows` rows; empty lines count for nothing. Raises DataError when it cannot be read."""
    parts: list[Part] = []
    start = first = line = count = offset = 0
    try:
        with opened(data) as stream:
            for line, text in enumerate(stream, 1):
                if text.strip():
                    if count == 0:
                        start, first = offset, line
                    count += 1
                offset += len(text)
                if count == rows:
                    parts.append(Part(len(parts), start, first, count))
                    count = 0
    except (OSError, EOFError) as error:
        raise DataError(f"{data} cannot be read: {error}; give a file of JSON lines, plain or .gz") from error
    if count:
        parts.append(Part(len(parts), start, first, count))
    if not parts:
        raise DataError(f"{data} has no rows; give a file of JSON lines, plain or .gz")
    return parts


def read_part(data: Path, part: Part) -> list[Mapping[str, Any]]:
    """The rows of a part. Raises DataError naming file and line of the first bad one."""
    from rluf.reward.heldout import parse_row

    found: list[Mapping[str, Any]] = []
    with opened(data) as stream:
        stream.seek(part.start)
        for line, text in enumerate(stream, part.first):
            if text.strip():
                found.append(parse_row(text, f"{data}:{line}"))
            if len(found) == part.rows:
                break
    return found


def _scored(model: RewardModel, data: Path, part: Part) -> str:
    """The part's scores as JSON lines."""
    from rluf.reward.heldout import score_rows

    scores = score_rows(model, read_part(data, part))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in scores)


def _load(model: Path) -> RewardModel:
    import torch

    from rluf.reward.backbone import quick_cpu_matmul
    from rluf.reward.model import RewardModel

    if torch.cuda.is_available():
        return RewardModel.load(model, batch_tokens=4 * BATCH_TOKENS, device="cuda")
    quick_cpu_matmul()
    return RewardModel.load(model, batch_tokens=BATCH_TOKENS)


def _here(model: Path, data: Path, parts: Sequence[Part]) -> Iterator[tuple[int, str]]:
    """Scores part by part in this process: nothing to start."""
    loaded = _load(model) if parts else None
    for part in parts:
        if loaded is not None:
            yield part.number, _scored(loaded, data, part)


class PartScorer:
    """One actor of the pool: holds the model, scores the parts that Ray Data hands it."""

    def __init__(self, model: str, data: str) -> None:
        self.model, self.data = _load(Path(model)), Path(data)

    def __call__(self, batch: Mapping[str, Sequence[int]]) -> dict[str, list[Any]]:
        """Scores of the batch's parts as text, or what is wrong with a part's rows."""
        parts = [Part(*map(int, values)) for values in zip(*(batch[key] for key in Part.__slots__), strict=True)]
        texts, errors = [], []
        for part in parts:
            try:
                texts.append(_scored(self.model, self.data, part))
                errors.append("")
            except DataError as error:  # as text: Ray Data does not carry a user's exception back whole
                texts.append("")
                errors.append(str(error))
        return {"number": [part.number for part in parts], "text": texts, "error": errors}


def _pooled(model: Path, data: Path, parts: Sequence[Part], actors: int | None) -> Iterator[tuple[int, str]]:
    """Scores as a Ray Data pool of actors finishes them, in any order; an actor that dies is started again."""
    import ray.data
    from ray.exceptions import RayError

    from cluster.connect import connected
    from rluf.config.settings import Settings

    with connected(Settings()) as resources:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        gpus = int(resources.get("GPU", 0))
        size = min(actors or gpus or max(1, int(resources.get("CPU", 1)) - 1), len(parts))
        logger.info("scoring %d parts with %d actors", len(parts), size)
        rows = [{key: getattr(part, key) for key in Part.__slots__} for part in parts]
        scored = ray.data.from_items(rows, override_num_blocks=len(parts)).map_batches(
            PartScorer,
            fn_constructor_args=(str(model.resolve()), str(data.resolve())),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=size),
            num_cpus=1 if not gpus else 0,
            num_gpus=1 if gpus else 0,
        )
        try:
            with contextlib.closing(iter(scored.iter_rows())) as found:
                for row in found:
                    if row["error"]:
                        raise DataError(str(row["error"]))
                    yield int(row["number"]), str(row["text"])
        except RayError as error:
            tail = str(error).strip().splitlines()[-1]
            raise ActorError(f"the scoring actors failed: {tail}; try --actors 0 to see it in this process") from error


def work_folder(model: Path, data: Path, output: Path, part_rows: int) -> Path:
    """Folder of finished parts beside the output, named after model and data: other ones never get mixed in."""
    from rluf.utils.cache import file_digest, stage_key

    key = stage_key({"model": file_digest([model]), "data": file_digest([data]), "rows": part_rows})
    work = output.with_name(f".{output.name}-{key}")
    work.mkdir(parents=True, exist_ok=True)
    return work


def _file(work: Path, part: Part) -> Path:
    return work / f"{part.number:06d}.jsonl"


def main(arguments: Sequence[str] | None = None) -> int:
    """The sub-command. Returns the exit code; errors of the user's are one clear message."""
    from rluf.tracking.console import setup_logging

    parser = argparse.ArgumentParser(
        prog="python -m rluf.evaluate score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="checkpoint that rluf.reward wrote")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="JSON lines, plain or .gz")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="where scores go; none: beside the data's name, here"
    )
    parser.add_argument(
        "--actors", type=int, metavar="N", help="pool of N Ray actors; 0: in this process; none: by size"
    )
    given = parser.parse_args(arguments)
    if given.actors is not None and given.actors < 0:
        parser.error(f"--actors {given.actors} must be 0 or more")
    setup_logging()
    output = given.output or Path.cwd() / f"{given.data.name.removesuffix('.gz').removesuffix('.jsonl')}.scores.jsonl"

    def run() -> None:
        figures = score(given.model, given.data, output, actors=given.actors)
        sys.stdout.write(json.dumps(figures) + "\n")

    return guard(run)
