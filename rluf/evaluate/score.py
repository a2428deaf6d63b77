"""Score a held-out file with a trained reward model and measure the quality of the scores.

    python -m rluf.evaluate score --model FOLDER --data FILE.jsonl[.gz] [--output SCORES.jsonl] [--actors N]

Rows are {"id", "messages", "response", "label": 0|1, "group"} or {"id", "messages", "chosen", "rejected", "group"}.
The last line on stdout is JSON: AUROC or pair accuracy with a 95% interval clustered by group, ECE, Brier score, n, and
the result of response length alone. Scores are written in parts, so an interrupted run resumes with the missing parts.
"""

from __future__ import annotations

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

from rluf.config.cli import CommandParser, run_command
from rluf.errors import ActorError, DataError, ModelError
from rluf.utils.devices import build_device_environment

if TYPE_CHECKING:
    from rluf.reward.model import RewardModel

logger = logging.getLogger("rluf.evaluate.score")

PART_ROWS = 1000
"""Rows per part, the unit that is scored, written and repeated after an interruption."""
CPU_BATCH_TOKENS = 4096
MIN_POOL_PARTS = 20
"""A file of more parts is scored by a pool of actors unless --actors is given; starting the pool takes about 20 s."""


@dataclass(frozen=True, slots=True)
class FilePart:
    """`row_count` rows of the file from line `first_line` (from 1), at `byte_offset` of the uncompressed text."""

    index: int
    byte_offset: int
    first_line: int
    row_count: int


def score_file(
    model_folder: Path,
    data_path: Path,
    output_path: Path,
    *,
    actor_count: int | None = None,
    part_rows: int = PART_ROWS,
) -> dict[str, Any]:
    """Score a file with the reward model in `model_folder`; writes the scores and returns the metrics.

    `actor_count` None decides by the size of the file, 0 scores in this process on the CPU, otherwise a Ray Data pool
    of that many actors does, on GPUs where Ray has them (on a cluster, model and data must be on storage that all
    nodes can read). Raises DataError or ModelError.
    """
    from rluf.reward.calibration import Calibration
    from rluf.reward.card import summarize_scores

    start_time = time.monotonic()
    if not (model_folder / "config.json").is_file():
        raise ModelError(f"{model_folder} has no config.json; give a reward model folder written by rluf.reward")
    Calibration.load(model_folder)  # a missing calibration is an error now, not after an hour of scoring
    parts = split_into_parts(data_path, part_rows)
    work_folder = prepare_work_folder(model_folder, data_path, output_path, part_rows)
    remaining_parts = [file_part for file_part in parts if not _name_part_file(work_folder, file_part).is_file()]
    if len(remaining_parts) < len(parts):
        logger.info("%s: resuming reused=%d of %d parts", data_path, len(parts) - len(remaining_parts), len(parts))
    use_pool = (len(remaining_parts) > MIN_POOL_PARTS) if actor_count is None else actor_count > 0
    if use_pool and remaining_parts:
        scored_parts = _score_with_actors(model_folder, data_path, remaining_parts, actor_count)
    else:
        scored_parts = _score_in_process(model_folder, data_path, remaining_parts)
    for part_index, text in scored_parts:
        part_path = work_folder / f"{part_index:06d}.jsonl"
        # Rename into place: an interrupted write must not count as a finished part.
        part_path.with_suffix(".part").write_text(text, encoding="utf-8")
        os.replace(part_path.with_suffix(".part"), part_path)
        elapsed = time.monotonic() - start_time
        logger.info("%s: scored part=%d of %d seconds=%.0f", data_path, part_index + 1, len(parts), elapsed)
    joined_path = output_path.with_name(f".{output_path.name}.whole")
    with joined_path.open("wb") as stream:
        for file_part in parts:
            stream.write(_name_part_file(work_folder, file_part).read_bytes())
    with joined_path.open(encoding="utf-8") as stream:
        metrics = summarize_scores(json.loads(line) for line in stream)
    os.replace(joined_path, output_path)
    shutil.rmtree(work_folder)
    return {
        "command": "score", "model": str(model_folder), "data": str(data_path), "output": str(output_path), **metrics,
        "scored_now": sum(file_part.row_count for file_part in remaining_parts),
        "seconds": round(time.monotonic() - start_time, 1),
    }  # fmt: skip


def open_data_file(data_path: Path) -> IO[bytes]:
    """Open the file as bytes, decompressed if its name ends in .gz."""
    return gzip.open(data_path, "rb") if data_path.suffix == ".gz" else data_path.open("rb")  # type: ignore[return-value]


def split_into_parts(data_path: Path, rows_per_part: int) -> list[FilePart]:
    """Split the file into parts of `rows_per_part` rows, not counting empty lines. DataError when it is unreadable."""
    parts: list[FilePart] = []
    part_offset = first_line = row_count = offset = 0
    try:
        with open_data_file(data_path) as stream:
            for line_number, line in enumerate(stream, 1):
                if line.strip():
                    if row_count == 0:
                        part_offset, first_line = offset, line_number
                    row_count += 1
                offset += len(line)
                if row_count == rows_per_part:
                    parts.append(FilePart(len(parts), part_offset, first_line, row_count))
                    row_count = 0
    except (OSError, EOFError) as error:
        raise DataError(f"{data_path} cannot be read: {error}; expected a file of JSON lines, plain or .gz") from error
    if row_count:
        parts.append(FilePart(len(parts), part_offset, first_line, row_count))
    if not parts:
        raise DataError(f"{data_path} has no rows; expected a file of JSON lines, plain or .gz")
    return parts


def read_part(data_path: Path, file_part: FilePart) -> list[Mapping[str, Any]]:
    """Read the rows of a part. DataError names file and line of the first invalid row."""
    from rluf.reward.card import parse_heldout_row

    rows: list[Mapping[str, Any]] = []
    with open_data_file(data_path) as stream:
        stream.seek(file_part.byte_offset)
        for line_number, line in enumerate(stream, file_part.first_line):
            if line.strip():
                rows.append(parse_heldout_row(line, f"{data_path}:{line_number}"))
            if len(rows) == file_part.row_count:
                break
    return rows


def _score_part(model: RewardModel, data_path: Path, file_part: FilePart) -> str:
    """Scores of one part as JSON lines."""
    from rluf.reward.card import score_heldout_rows

    scores = score_heldout_rows(model, read_part(data_path, file_part))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in scores)


def _load_reward_model(model_folder: Path, device: str) -> RewardModel:
    from rluf.reward.backbone import enable_fast_cpu_matmul
    from rluf.reward.model import RewardModel

    if device == "cuda":
        return RewardModel.load(model_folder, batch_tokens=4 * CPU_BATCH_TOKENS, device=device)
    enable_fast_cpu_matmul()
    return RewardModel.load(model_folder, batch_tokens=CPU_BATCH_TOKENS)


def _score_in_process(model_folder: Path, data_path: Path, parts: Sequence[FilePart]) -> Iterator[tuple[int, str]]:
    """Score part by part in this process; yields part index and text."""
    if not parts:
        return
    model = _load_reward_model(model_folder, "cpu")
    for file_part in parts:
        yield file_part.index, _score_part(model, data_path, file_part)


class PartScorer:
    """Actor of the scoring pool: loads the model once and scores the parts that Ray Data sends."""

    def __init__(self, model_folder: str, data_path: str, device: str) -> None:
        self.model, self.data_path = _load_reward_model(Path(model_folder), device), Path(data_path)

    def __call__(self, batch: Mapping[str, Sequence[int]]) -> dict[str, list[Any]]:
        """Scores of the parts in the batch as text, or the error of a part."""
        parts = [
            FilePart(*map(int, values)) for values in zip(*(batch[key] for key in FilePart.__slots__), strict=True)
        ]
        texts, errors = [], []
        for file_part in parts:
            try:
                texts.append(_score_part(self.model, self.data_path, file_part))
                errors.append("")
            except DataError as error:  # as text: Ray Data wraps exceptions of actors and loses their type
                texts.append("")
                errors.append(str(error))
        return {"number": [file_part.index for file_part in parts], "text": texts, "error": errors}


def _score_with_actors(
    model_folder: Path, data_path: Path, parts: Sequence[FilePart], actor_count: int | None
) -> Iterator[tuple[int, str]]:
    """Score with a Ray Data pool of actors; yields in completion order, and a lost actor is restarted."""
    import ray.data
    from ray.exceptions import RayError

    from cluster.connect import ray_connection

    with ray_connection() as resources:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        gpu_count = int(resources.get("GPU", 0))
        pool_size = min(actor_count or gpu_count or max(1, int(resources.get("CPU", 1)) - 1), len(parts))
        logger.info("%s: scoring parts=%d actors=%d", data_path, len(parts), pool_size)
        rows = [{key: getattr(file_part, key) for key in FilePart.__slots__} for file_part in parts]
        scored = ray.data.from_items(rows, override_num_blocks=len(parts)).map_batches(
            PartScorer,
            fn_constructor_args=(str(model_folder.resolve()), str(data_path.resolve()), "cuda" if gpu_count else "cpu"),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=pool_size),
            # With GPUs a GPU is the limit; a CPU request on top could leave a GPU idle on a node with few CPUs.
            num_cpus=1 if not gpu_count else 0,
            num_gpus=1 if gpu_count else 0,
            **({"runtime_env": {"env_vars": build_device_environment(1)}} if gpu_count else {}),
        )
        try:
            # closing() stops the pool when the consumer stops early, after an error in a part for example.
            with contextlib.closing(iter(scored.iter_rows())) as scored_rows:
                for row in scored_rows:
                    if row["error"]:
                        raise DataError(str(row["error"]))
                    yield int(row["number"]), str(row["text"])
        except RayError as error:
            last_line = str(error).strip().splitlines()[-1]
            raise ActorError(
                f"the scoring actors failed: {last_line}; use --actors 0 to see the error in this process"
            ) from error


def prepare_work_folder(model_folder: Path, data_path: Path, output_path: Path, part_rows: int) -> Path:
    """Create the folder of finished parts next to the output, named by a hash of model, data and part size."""
    from rluf.utils.cache import compute_artifact_key, hash_files

    key = compute_artifact_key(
        {"model": hash_files([model_folder]), "data": hash_files([data_path]), "rows": part_rows}
    )
    work_folder = output_path.with_name(f".{output_path.name}-{key}")
    work_folder.mkdir(parents=True, exist_ok=True)
    return work_folder


def _name_part_file(work_folder: Path, file_part: FilePart) -> Path:
    return work_folder / f"{file_part.index:06d}.jsonl"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sub-command; returns the exit code, and an error is one message on stderr."""
    from rluf.tracking.console import setup_logging

    parser = CommandParser("rluf.evaluate score", description=__doc__)
    parser.add_argument(
        "--model", type=Path, required=True, metavar="FOLDER", help="reward model folder written by rluf.reward"
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="JSON lines, plain or .gz")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="file for the scores (default: DATA.scores.jsonl in the current folder)",
    )
    parser.add_argument(
        "--actors",
        type=int,
        metavar="N",
        help="pool of N Ray actors, on GPUs where Ray has them; 0: in this process, on the CPU (default: by file size)",
    )
    args = parser.parse_args(arguments)
    if args.actors is not None and args.actors < 0:
        parser.error(f"--actors {args.actors} must be 0 or more")
    setup_logging()
    output_path = (
        args.output or Path.cwd() / f"{args.data.name.removesuffix('.gz').removesuffix('.jsonl')}.scores.jsonl"
    )

    def run_and_print() -> None:
        metrics = score_file(args.model, args.data, output_path, actor_count=args.actors)
        sys.stdout.write(json.dumps(metrics) + "\n")

    return run_command(run_and_print)
