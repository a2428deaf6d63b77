"""Prepare: rows per second and memory at 10^4, 10^5 and 10^6 rows, compared with the same work in polars on one core.

Ours runs on Ray Data with 2 CPUs and an object store of 200 MB; the time is that of the complete build with Ray already
running. Polars reads, validates, joins, sorts and writes; MinHash, redaction, abuse rules and propensity are the same
functions for both. Each size runs in a separate process, so that the peak memory of the driver is that of the size;
`total_mib` is that of all processes, shared pages counted in proportion.
Prints one JSON line last.

python benchmarks/prepare.py [--rows 10000 100000 1000000] [--no-polars] [--profile 100000] [--nodes 1 2]
                             [--files 5000]

With --nodes only ours runs, on simulated clusters of that many nodes with one CPU each, to measure the speed-up.
With --files only ours runs, on a folder of that many files of 10 rows, with at most 1024 open files per process.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import logging
import pstats
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache, partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from lab.process_tree import run_command

OBJECT_STORE_BYTES = 200 * 10**6
ROWS_PER_SMALL_FILE = 10
MAX_OPEN_FILES = 1024
"""Open files that a process may have in the measurement of small files: the default limit of many systems."""
FIRST_DAY = 1_735_689_600
VOCABULARY = [
    f"{a}{b}{c}" for a in ("ka", "lo", "mi", "tu", "re") for b in ("n", "sa", "vi", "po") for c in "aeiourtsn"
]


def write_log(path: Path, row_count: int, seed: int = 1, *, user_count: int = 0) -> None:
    """Write a synthetic log: conversations of 1 to 4 turns, 2% loved, 1% with an address; 10 rows per user, or
    `user_count` users."""
    rng = random.Random(seed)
    phrases = [" ".join(rng.choices(VOCABULARY, k=12)) for _ in range(20_000)]
    topics, locales, models = ("casual", "facts", "code", "advice"), ("en", "de", "fr"), ("base-1", "base-2")
    rows_written = conversation = 0
    with path.open("w") as stream:
        while rows_written < row_count:
            user, start_time = rng.randrange(user_count or row_count // 10 + 1), FIRST_DAY + rng.randrange(28 * 86400)
            context: list[dict[str, str]] = []
            for turn in range(rng.randint(1, 4)):
                # Seven digits at every size: redaction looks at longer numbers longer.
                text = f"{rng.choice(phrases)} {rng.choice(phrases)} {rows_written:07d}"
                response = f"{rng.choice(phrases)} {rng.choice(phrases)} {rng.choice(phrases)}"
                if rng.random() < 0.01:
                    response += f" write to person{rows_written}@mail.example.com"
                context = [*context, {"role": "user", "content": text}]
                timestamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(start_time + 60 * turn))
                row = {
                    "id": f"row-{rows_written}",
                    "conversation_id": f"c{conversation}",
                    "turn": turn,
                    "user_id": f"user-{user}",
                    "time": timestamp,
                    "model_version": rng.choice(models),
                    "messages": context,
                    "response": response,
                    "reaction": "love" if rng.random() < 0.02 else None,
                    "continued": None,
                    "returned": None,
                    "topic": rng.choice(topics),
                    "locale": rng.choice(locales),
                }
                stream.write(json.dumps(row) + "\n")
                context = [*context, {"role": "assistant", "content": response}]
                rows_written += 1
                if rows_written == row_count:
                    break
            conversation += 1


def write_small_files(folder: Path, file_count: int) -> None:
    """Write a synthetic log as a folder of files of ROWS_PER_SMALL_FILE rows."""
    folder.mkdir()
    whole_log = folder.with_suffix(".jsonl")
    write_log(whole_log, file_count * ROWS_PER_SMALL_FILE)
    with whole_log.open("rb") as rows:
        for file_index in range(file_count):
            (folder / f"{file_index:05d}.jsonl").write_bytes(b"".join(islice(rows, ROWS_PER_SMALL_FILE)))
    whole_log.unlink()


def build_settings(log_path: Path, max_rows: int) -> Any:
    """Settings with the strict split and no subsampling, which is the most work."""
    from rluf.config.settings import Settings

    data = {"feedback": [str(log_path)], "preferences": [], "safety": [], "prompts": []}
    return Settings.model_validate(
        {"data": data, "prepare": {"max_rows": max_rows, "split": "strict", "positive_share": 0.01}}
    )


def build_with_ray(log_path: Path, row_count: int, output_folder: Path, node_count: int = 0) -> dict[str, Any]:
    """Seconds of a build on a local Ray, or on a simulated cluster, and the driver's peak memory in MiB."""
    import ray
    from ray.cluster_utils import Cluster

    from rluf.prepare.pipeline import build_data_set

    logging.basicConfig(level=logging.ERROR)
    if node_count:
        cluster = Cluster()
        for _ in range(node_count):
            cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False)
        ray.init(address=cluster.address, log_to_driver=False)
    else:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=OBJECT_STORE_BYTES,
        )
    build_data_set(
        build_settings(_write_warmup_log(output_folder), 500), output_folder / "warm"
    )  # starts Ray's workers and their imports
    mib_before, cpu_before = peak_mib(), _cpu_seconds()
    started = time.perf_counter()
    card = build_data_set(build_settings(log_path, row_count), output_folder / "data")
    result = {"seconds": time.perf_counter() - started, "cpu_seconds": _cpu_seconds() - cpu_before}
    ray.shutdown()
    rows_written = card["counts"]["feedback"]["kept"]
    return result | {"driver_mib": peak_mib(), "driver_mib_before": mib_before, "rows_written": rows_written}


def _cpu_seconds() -> float:
    """CPU time of this process and its descendants (Ray and its workers)."""
    import psutil

    this_process = psutil.Process()
    process_times = [process.cpu_times() for process in (this_process, *this_process.children(recursive=True))]
    return float(sum(cpu_times.user + cpu_times.system for cpu_times in process_times))


def _write_warmup_log(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "warm.jsonl"
    write_log(path, 2000)
    return path


def peak_mib() -> float:
    """Peak resident memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _read_valid_rows(log_path: Path) -> Any:
    """Valid rows of a log as a polars frame, validated by expressions equivalent to the schema."""
    import polars as pl

    message = pl.Struct({"role": pl.String, "content": pl.String})
    names = ("id", "conversation_id", "user_id", "time", "model_version", "response", "reaction", "topic", "locale")
    schema: dict[str, Any] = dict.fromkeys(names, pl.String)
    schema |= {"turn": pl.Int64, "messages": pl.List(message), "continued": pl.Boolean, "returned": pl.Boolean}
    frame = pl.read_ndjson(log_path, schema=schema)
    frame = frame.with_columns(pl.col("time").str.to_datetime("%Y-%m-%dT%H:%M:%SZ", time_unit="us", strict=False))
    last_message, element_field = pl.col("messages").list.last(), pl.element().struct.field
    has_known_role = element_field("role").is_in(["system", "user", "assistant"])
    return frame.filter(
        pl.all_horizontal(pl.col(name).str.len_chars().is_between(1, 200) for name in names[:3])
        & pl.col("turn").is_between(0, 1_000_000)
        & (pl.col("response").str.strip_chars() != "")
        & (pl.col("response").str.len_chars() <= 100_000)
        & (last_message.struct.field("role") == "user")
        & (last_message.struct.field("content").str.strip_chars() != "")
        & (pl.col("messages").list.eval(element_field("content").str.len_chars()).list.max() <= 100_000)
        & pl.col("messages").list.eval(has_known_role).list.all()
        & pl.col("time").is_between(pl.datetime(2000, 1, 1), pl.datetime(2100, 1, 1))
    )


def _redact_column(texts: Any) -> Any:
    """Redact the texts of a polars column that match the prefilter."""
    import numpy as np
    import polars as pl

    from rluf.prepare.redact import _PREFILTER_PATTERN, redact_text

    kinds = ("email", "phone", "card", "iban", "ip", "key")
    hints = texts.str.contains(_PREFILTER_PATTERN)
    redact = cache(lambda text: redact_text(text, kinds)[0])  # ours scans a text of one batch once, too
    changed = texts.filter(hints).map_elements(redact, return_dtype=pl.String)
    return texts.scatter(np.flatnonzero(hints.to_numpy()), changed) if len(changed) else texts


def _index_rows(frame: Any) -> tuple[Any, Any]:
    """Redact, deduplicate, add keys and joined turns; returns the frame and the MinHash bands of its rows."""
    import polars as pl

    from rluf.prepare import splits

    messages = frame.select("id", "messages").explode("messages").unnest("messages")
    messages = messages.with_columns(_redact_column(messages["content"]))
    normalized = pl.col("content").str.to_lowercase().str.replace_all(r"\s+", " ")
    contexts = messages.group_by("id", maintain_order=True).agg(
        text=(pl.col("role") + " " + normalized).str.join("\x1f"), messages=pl.struct("role", "content")
    )
    frame = frame.with_columns(_redact_column(frame["response"]), messages=contexts["messages"], text=contexts["text"])
    frame = frame.with_columns(key=pl.col("id").hash(1), rank=pl.col("id").hash(2), prompt=pl.col("text").hash(3))
    frame = frame.unique("key", keep="first", maintain_order=True)
    unique_prompts = frame.unique("prompt", keep="first", maintain_order=True).select("prompt", "text")
    bands = splits.compute_band_hashes(unique_prompts["text"].to_list())
    indexed = unique_prompts.select("prompt").with_row_index("place")
    unique_index = frame.select("prompt").join(indexed, on="prompt", maintain_order="left")["place"].to_numpy()
    next_turn = pl.col("turn").shift(-1).over("conversation_id", order_by="turn")
    next_visit = pl.col("time").shift(-1).over("user_id", order_by="time")
    frame = frame.with_columns(
        continued=next_turn.is_not_null(), returned=(next_visit - pl.col("time")).dt.total_hours().is_between(6, 168),
        user=pl.col("user_id").rank("dense").cast(pl.Int64) - 1, label=(pl.col("reaction") == "love").fill_null(False),
    )  # fmt: skip
    return frame, bands[unique_index]


def _assign_rows(frame: Any, bands: Any) -> tuple[Any, Any]:
    """Apply the strict split; returns the remaining rows with trust and propensity, and their splits."""
    import numpy as np
    import polars as pl

    from rluf.prepare import abuse, splits
    from rluf.prepare.joins import bin_by_octave, estimate_propensity

    hash_point = (pl.col("user_id").hash(4) % 1000) / 1000
    split = frame.select(side=pl.when(hash_point < 0.15).then(2).when(hash_point < 0.25).then(1).otherwise(0))["side"]
    split = split.to_numpy().astype(np.int64)
    conversations, prompts = frame["conversation_id"].hash(5).to_numpy(), frame["prompt"].to_numpy()
    times = frame["time"].to_physical().to_numpy()
    is_late, is_early, _ = splits.find_time_leaks(conversations, split, times, 0.15)
    is_kept = ~(splits.find_conversation_leaks(conversations, split, times) | is_late | is_early)
    is_near_duplicate = splits.find_near_duplicate_leaks(
        splits.group_near_duplicates(prompts, bands.T)[is_kept],
        prompts[is_kept],
        split[is_kept],
        np.empty(0, np.int64),
        0.1,
        0.15,
    )
    remaining = np.flatnonzero(is_kept)[~is_near_duplicate]
    frame, prompts, split, times = frame[remaining], prompts[remaining], split[remaining], times[remaining]
    users, loved = np.unique(frame["user"].to_numpy(), return_inverse=True)[1], frame["label"].to_numpy()
    answers = np.unique(frame["response"].hash(6).to_numpy(), return_inverse=True)[1]
    no_device = np.full(len(users), -1)
    abuse_log = abuse.AbuseLog(
        users,
        splits.group_near_duplicates(prompts, bands[remaining].T),
        answers,
        no_device,
        times,
        loved,
        no_device > 0,
    )
    weight, _ = abuse.compute_trust_weights(abuse_log, list(abuse.ABUSE_RULES))
    levels = {name: frame[name].rank("dense").cast(pl.Int64).to_numpy() - 1 for name in ("locale", "turn")}
    levels["activity"] = bin_by_octave(np.bincount(users)[users])
    propensity, _ = estimate_propensity(levels, frame["reaction"].is_not_null().to_numpy())
    return frame.with_columns(trust=weight, propensity=propensity), split


def build_with_polars(log_path: Path, max_rows: int, output_folder: Path) -> dict[str, Any]:
    """The same build in polars on one core: read, validate, redact, deduplicate, join, split, weight, sample, write."""
    import numpy as np
    import polars as pl

    from rluf.prepare.splits import compute_quota, compute_sampling_weights

    output_folder.mkdir(parents=True, exist_ok=True)
    started, cpu_before = time.perf_counter(), time.process_time()
    frame, split = _assign_rows(*_index_rows(_read_valid_rows(log_path)))
    loved, rows_written = frame["label"].to_numpy(), 0
    for split_code, name in enumerate(("train", "dev", "test")):
        split_rows = np.flatnonzero(split == split_code)
        quota = compute_quota(
            int(loved[split_rows].sum()), int((~loved[split_rows]).sum()), positive_share=0.01, max_rows=max_rows
        )
        rank = frame["rank"].to_numpy()[split_rows] / 2**64
        sampling_weight = (
            compute_sampling_weights(rank, loved[split_rows], quota) if split_code == 0 else np.ones(len(split_rows))
        )
        split_frame = (
            frame[split_rows]
            .with_columns(sampling=sampling_weight)
            .with_columns(weight=pl.col("sampling") * pl.col("trust"))
        )
        split_frame = (
            split_frame.filter(pl.col("sampling") > 0).sort("key").drop("text", "key", "rank", "prompt", "user")
        )
        split_frame.write_parquet(output_folder / f"{name}.parquet", compression="zstd")
        rows_written += len(split_frame)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "cpu_seconds": time.process_time() - cpu_before,
        "peak_mib": peak_mib(),
        "rows_written": rows_written,
    }


def _run_tasks_inline(tasks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    from rluf.prepare.pipeline import run_task

    return [row for task in tasks for row in run_task(task)]


def profile_passes(rows: int) -> list[list[Any]]:
    """The most expensive functions of all three passes, run in this process: (function, cumulative CPU seconds)."""
    from rluf.prepare import pipeline

    with tempfile.TemporaryDirectory() as folder:
        log_path = Path(folder) / "log.jsonl"
        write_log(log_path, rows)
        profiler = cProfile.Profile(time.process_time)
        pipeline.build_data_set(
            build_settings(_write_warmup_log(Path(folder) / "w"), 500), Path(folder) / "warm", _run_tasks_inline
        )
        profiler.enable()
        pipeline.build_data_set(build_settings(log_path, rows), Path(folder) / "data", _run_tasks_inline)
        profiler.disable()
    stats = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    functions = [
        [f"{Path(source_file).stem}.{name}", round(cumulative_s, 2)]
        for (source_file, _, name), (_, _, _, cumulative_s, _) in stats.items()
        if "rluf/prepare" in source_file and not name.startswith("<")
    ]
    return sorted(functions, key=lambda row: -row[1])[:24]


def run_in_subprocess(mode: str, log_path: Path, rows: int, output_folder: Path) -> dict[str, Any]:
    """Run one size in a separate process; `total_mib` is the peak memory of it and its descendants."""
    command = [sys.executable, __file__, "--child", mode, str(log_path), str(rows), str(output_folder)]
    if mode == "polars":
        # One core: polars would otherwise use all of them, which Ray's two workers cannot match.
        command = ["env", "POLARS_MAX_THREADS=1", "taskset", "-c", "0", *command]
    try:
        cost = run_command(command)
    except subprocess.CalledProcessError as error:
        sys.stderr.write(error.output[-3000:])
        raise SystemExit(error.returncode) from None
    result_line = [line for line in cost.output.splitlines() if line.startswith('{"seconds"')][-1]
    result: dict[str, Any] = json.loads(result_line)
    return result | {"total_mib": cost.peak_bytes / 2**20}


def measure_speedup(rows: int, node_counts: Sequence[int]) -> dict[str, Any]:
    """Seconds of one size on simulated clusters of `node_counts` nodes, and the speed-up over the first."""
    with tempfile.TemporaryDirectory(prefix="rluf-bench-") as folder:
        log_path = Path(folder) / "log.jsonl"
        write_log(log_path, rows)
        seconds = [
            run_in_subprocess(f"nodes{node_count}", log_path, rows, Path(folder) / f"o{node_count}")["seconds"]
            for node_count in node_counts
        ]
    speedups = {
        str(node_count): round(seconds[0] / value, 2) for node_count, value in zip(node_counts, seconds, strict=True)
    }
    return {
        "benchmark": "prepare_nodes",
        "rows": rows,
        "seconds": [round(value, 1) for value in seconds],
        "speed_up": speedups,
    }


def measure_small_files(file_count: int) -> dict[str, Any]:
    """Cost of a build on a folder of many small files under the limit of open files."""
    with tempfile.TemporaryDirectory(prefix="rluf-bench-") as folder:
        log_folder, row_count = Path(folder) / "log", file_count * ROWS_PER_SMALL_FILE
        write_small_files(log_folder, file_count)
        result = run_in_subprocess("files", log_folder, row_count, Path(folder) / "o")
    facts = {"benchmark": "prepare_files", "files": file_count, "rows": row_count, "max_open_files": MAX_OPEN_FILES}
    return facts | result


def main() -> None:
    """Run all sizes and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--no-polars", action="store_true")
    parser.add_argument("--profile", type=int, default=0)
    parser.add_argument("--nodes", type=int, nargs="+")
    parser.add_argument("--files", type=int)
    parser.add_argument("--child", nargs=4)
    args = parser.parse_args()
    if args.child:
        mode, log_path, rows, output_folder = args.child
        if mode == "files":  # hard, too: Ray raises the soft limit to it
            resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_OPEN_FILES, MAX_OPEN_FILES))
        node_count = int(mode.removeprefix("nodes")) if mode.startswith("nodes") else 0
        build = build_with_polars if mode == "polars" else partial(build_with_ray, node_count=node_count)
        result = build(Path(log_path), int(rows), Path(output_folder))
        sys.stdout.write(json.dumps(result) + "\n")
        return
    if args.profile:
        for name, seconds in profile_passes(args.profile):
            sys.stdout.write(f"{seconds:8.2f} s  {name}\n")
        return
    if args.files:
        sys.stdout.write(json.dumps(measure_small_files(args.files)) + "\n")
        return
    if args.nodes:
        sys.stdout.write(json.dumps(measure_speedup(max(args.rows), args.nodes)) + "\n")
        return
    result_by_size: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="rluf-bench-") as folder:
        for rows in args.rows:
            log_path = Path(folder) / f"{rows}.jsonl"
            write_log(log_path, rows)
            size_result: dict[str, Any] = {"ours": run_in_subprocess("ours", log_path, rows, Path(folder) / f"o{rows}")}
            if not args.no_polars:
                size_result["polars"] = run_in_subprocess("polars", log_path, rows, Path(folder) / f"p{rows}")
                for name in ("seconds", "cpu_seconds"):
                    size_result[f"ratio_{name}"] = round(size_result["ours"][name] / size_result["polars"][name], 2)
            size_result["rows_per_second"] = {
                name: round(rows / size_result[name]["seconds"]) for name in ("ours", "polars") if name in size_result
            }
            result_by_size[str(rows)] = size_result
            sys.stdout.write(f"{rows}: {json.dumps(size_result)}\n")
            log_path.unlink()
    row_counts = sorted(args.rows)
    growth_ratios = [
        (result_by_size[str(larger)]["ours"]["seconds"] / result_by_size[str(smaller)]["ours"]["seconds"])
        / (larger / smaller)
        for smaller, larger in pairwise(row_counts)
    ]
    driver_memory = [result_by_size[str(rows)]["ours"]["driver_mib"] for rows in row_counts]
    summary = {
        "benchmark": "prepare", "object_store_mb": OBJECT_STORE_BYTES // 10**6, "sizes": result_by_size,
        "growth_over_linear": [round(value, 2) for value in growth_ratios],
        "driver_memory_ratio": round(max(driver_memory) / min(driver_memory), 2),
    }  # fmt: skip
    sys.stdout.write(json.dumps(summary) + "\n")


if __name__ == "__main__":
    main()
