"""Prepare: rows per second and memory at 10^4, 10^5 and 10^6 rows, beside the same work in polars on one core.

Ours runs on Ray Data with 2 CPUs and an object store of 200 MB; time is that of the whole build with Ray already up.
Polars reads, checks, joins, sorts and writes; MinHash, redaction of texts with a hint, abuse rules and propensity are
the same functions for both. Each size runs in a process of its own, so that the driver's peak memory is its own.
Prints one JSON line last.

python benchmarks/prepare.py [--rows 10000 100000 1000000] [--no-polars] [--profile 100000] [--nodes 1 2]

With --nodes ours runs alone, on simulated clusters of that many nodes of one CPU each, for the speed-up with workers.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import logging
import os
import pstats
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

STORE = 200 * 10**6
DAY0 = 1_735_689_600
WORDS = [f"{a}{b}{c}" for a in ("ka", "lo", "mi", "tu", "re") for b in ("n", "sa", "vi", "po") for c in "aeiourtsn"]


def write_log(path: Path, rows: int, seed: int = 1) -> None:
    """A synthetic log: conversations of 1 to 4 turns, 10 rows a user, 1 in 50 loved, 1 in 100 with an address in it."""
    rng = random.Random(seed)
    pool = [" ".join(rng.choices(WORDS, k=12)) for _ in range(20_000)]
    topics, locales, models = ("casual", "facts", "code", "advice"), ("en", "de", "fr"), ("base-1", "base-2")
    made = talk = 0
    with path.open("w") as file:
        while made < rows:
            user, at = rng.randrange(rows // 10 + 1), DAY0 + rng.randrange(28 * 86400)
            context: list[dict[str, str]] = []
            for turn in range(rng.randint(1, 4)):
                text = f"{rng.choice(pool)} {rng.choice(pool)} {made}"
                response = f"{rng.choice(pool)} {rng.choice(pool)} {rng.choice(pool)}"
                if rng.random() < 0.01:
                    response += f" write to person{made}@mail.example.com"
                context = [*context, {"role": "user", "content": text}]
                stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at + 60 * turn))
                row = {
                    "id": f"row-{made}", "conversation_id": f"c{talk}", "turn": turn, "user_id": f"user-{user}",
                    "time": stamp, "model_version": rng.choice(models), "messages": context, "response": response,
                    "reaction": "love" if rng.random() < 0.02 else None, "continued": None, "returned": None,
                    "topic": rng.choice(topics), "locale": rng.choice(locales),
                }  # fmt: skip
                file.write(json.dumps(row) + "\n")
                context = [*context, {"role": "assistant", "content": response}]
                made += 1
                if made == rows:
                    break
            talk += 1


def settings_for(log: Path, rows: int) -> Any:
    """Settings with the strict split and no row sampled out, so that the most work is done."""
    from rluf.config.settings import Settings

    data = {"feedback": [str(log)], "preferences": [], "safety": [], "prompts": []}
    return Settings.model_validate(
        {"data": data, "prepare": {"max_rows": rows, "split": "strict", "positive_share": 0.01}}
    )


def ours(log: Path, rows: int, out: Path, nodes: int = 0) -> dict[str, Any]:
    """Seconds of a build on a local Ray, or on a simulated cluster of `nodes`, and the driver's peak memory in MiB."""
    import ray
    from ray.cluster_utils import Cluster

    from rluf.prepare.pipeline import build

    logging.basicConfig(level=logging.ERROR)
    if nodes:
        cluster = Cluster()
        for _ in range(nodes):
            cluster.add_node(num_cpus=1, object_store_memory=STORE, include_dashboard=False)
        ray.init(address=cluster.address, log_to_driver=False)
    else:
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=STORE)
    build(settings_for(_warm(out), 500), out / "warm")  # Ray's workers are up and have imported
    before, busy = peak_mib(), _cpu_seconds()
    started = time.perf_counter()
    card = build(settings_for(log, rows), out / "data")
    found = {"seconds": time.perf_counter() - started, "cpu_seconds": _cpu_seconds() - busy}
    ray.shutdown()
    kept = card["counts"]["feedback"]["kept"]
    return found | {"driver_mib": peak_mib(), "driver_mib_before": before, "kept": kept}


def _cpu_seconds() -> float:
    """CPU time of this process and all that it started (Ray and its workers)."""
    import psutil

    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return float(sum(spent.user + spent.system for spent in times))


def _warm(out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    path = out / "warm.jsonl"
    write_log(path, 2000)
    return path


def peak_mib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _read(log: Path) -> Any:
    """The good rows of a log as a polars frame: parsed, and checked by expressions as the schema checks them."""
    import polars as pl

    message = pl.Struct({"role": pl.String, "content": pl.String})
    names = ("id", "conversation_id", "user_id", "time", "model_version", "response", "reaction", "topic", "locale")
    schema: dict[str, Any] = dict.fromkeys(names, pl.String)
    schema |= {"turn": pl.Int64, "messages": pl.List(message), "continued": pl.Boolean, "returned": pl.Boolean}
    frame = pl.read_ndjson(log, schema=schema)
    frame = frame.with_columns(pl.col("time").str.to_datetime("%Y-%m-%dT%H:%M:%SZ", time_unit="us", strict=False))
    last, each = pl.col("messages").list.last(), pl.element().struct.field
    known = each("role").is_in(["system", "user", "assistant"])
    return frame.filter(
        pl.all_horizontal(pl.col(name).str.len_chars().is_between(1, 200) for name in names[:3])
        & pl.col("turn").is_between(0, 1_000_000)
        & (pl.col("response").str.strip_chars() != "")
        & (pl.col("response").str.len_chars() <= 100_000)
        & (last.struct.field("role") == "user")
        & (last.struct.field("content").str.strip_chars() != "")
        & (pl.col("messages").list.eval(each("content").str.len_chars()).list.max() <= 100_000)
        & pl.col("messages").list.eval(known).list.all()
        & pl.col("time").is_between(pl.datetime(2000, 1, 1), pl.datetime(2100, 1, 1))
    )


def _clean(texts: Any) -> Any:
    """A polars column of texts redacted where there is a hint."""
    import numpy as np
    import polars as pl

    from rluf.prepare.redact import _QUICK, redact

    kinds = ("email", "phone", "card", "iban", "ip", "key")
    hints = texts.str.contains(_QUICK)
    changed = texts.filter(hints).map_elements(lambda text: redact(text, kinds)[0], return_dtype=pl.String)
    return texts.scatter(np.flatnonzero(hints.to_numpy()), changed) if len(changed) else texts


def _indexed(frame: Any) -> tuple[Any, Any]:
    """The frame redacted, without duplicates, with keys and joined turns; and the MinHash bands of its rows."""
    import polars as pl

    from rluf.prepare import near_duplicates as near

    flat = frame.select("id", "messages").explode("messages").unnest("messages")
    flat = flat.with_columns(_clean(flat["content"]))
    plain = pl.col("content").str.to_lowercase().str.replace_all(r"\s+", " ")
    norm = flat.group_by("id", maintain_order=True).agg(
        text=(pl.col("role") + " " + plain).str.join("\x1f"), messages=pl.struct("role", "content")
    )
    frame = frame.with_columns(_clean(frame["response"]), messages=norm["messages"], text=norm["text"])
    frame = frame.with_columns(key=pl.col("id").hash(1), rank=pl.col("id").hash(2), prompt=pl.col("text").hash(3))
    frame = frame.unique("key", keep="first", maintain_order=True)
    unique = frame.unique("prompt", keep="first", maintain_order=True).select("prompt", "text")
    bands = near.bands(unique["text"].to_list())
    numbered = unique.select("prompt").with_row_index("place")
    place = frame.select("prompt").join(numbered, on="prompt", maintain_order="left")["place"].to_numpy()
    ahead = pl.col("turn").shift(-1).over("conversation_id", order_by="turn")
    seen = pl.col("time").shift(-1).over("user_id", order_by="time")
    frame = frame.with_columns(
        continued=ahead.is_not_null(), returned=(seen - pl.col("time")).dt.total_hours().is_between(6, 168),
        user=pl.col("user_id").rank("dense").cast(pl.Int64) - 1, label=(pl.col("reaction") == "love").fill_null(False),
    )  # fmt: skip
    return frame, bands[place]


def _weighed(frame: Any, bands: Any) -> tuple[Any, Any]:
    """The rows that strict splits leave, with trust and propensity, and their sides."""
    import numpy as np
    import polars as pl

    from rluf.prepare import abuse
    from rluf.prepare import near_duplicates as near
    from rluf.prepare import split_assignment as sides
    from rluf.prepare.propensity import octaves, propensity

    point = (pl.col("user_id").hash(4) % 1000) / 1000
    side = frame.select(side=pl.when(point < 0.15).then(2).when(point < 0.25).then(1).otherwise(0))["side"]
    side = side.to_numpy().astype(np.int64)
    talk, prompt = frame["conversation_id"].hash(5).to_numpy(), frame["prompt"].to_numpy()
    when = frame["time"].to_physical().to_numpy()
    late, early, _ = sides.time_apart(talk, side, when, 0.15)
    keep = ~(sides.talk_apart(talk, side, when) | late | early)
    away = sides.prompts_apart(
        near.groups(prompt, bands)[keep], prompt[keep], side[keep], np.empty(0, np.int64), 0.1, 0.15
    )
    left = np.flatnonzero(keep)[~away]
    frame, prompt, side, when = frame[left], prompt[left], side[left], when[left]
    user, loved = np.unique(frame["user"].to_numpy(), return_inverse=True)[1], frame["label"].to_numpy()
    answer = np.unique(frame["response"].hash(6).to_numpy(), return_inverse=True)[1]
    none = np.full(len(user), -1)
    log = abuse.Log(user, near.groups(prompt, bands[left]), answer, none, when, loved, none > 0, 200)
    weight, _ = abuse.trust(log, list(abuse.RULES))
    levels = {name: frame[name].rank("dense").cast(pl.Int64).to_numpy() - 1 for name in ("locale", "turn")}
    levels["activity"] = octaves(np.bincount(user)[user])
    chance, _ = propensity(levels, frame["reaction"].is_not_null().to_numpy())
    return frame.with_columns(trust=weight, propensity=chance), side


def polars_build(log: Path, rows: int, out: Path) -> dict[str, Any]:
    """The same in polars on one core: read, check, redact, deduplicate, join, split, weigh, sample, sort, write."""
    import numpy as np
    import polars as pl

    from rluf.prepare.sampling import choose, quota

    out.mkdir(parents=True, exist_ok=True)
    started, busy = time.perf_counter(), time.process_time()
    frame, side = _weighed(*_indexed(_read(log)))
    loved, kept = frame["label"].to_numpy(), 0
    for code, name in enumerate(("train", "dev", "test")):
        mine = np.flatnonzero(side == code)
        plan = quota(int(loved[mine].sum()), int((~loved[mine]).sum()), positive_share=0.01, max_rows=rows)
        rank = frame["rank"].to_numpy()[mine] / 2**64
        factor = choose(rank, loved[mine], plan) if code == 0 else np.ones(len(mine))
        part = frame[mine].with_columns(sampling=factor).with_columns(weight=pl.col("sampling") * pl.col("trust"))
        part = part.filter(pl.col("sampling") > 0).sort("key").drop("text", "key", "rank", "prompt", "user")
        part.write_parquet(out / f"{name}.parquet", compression="zstd")
        kept += len(part)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "cpu_seconds": time.process_time() - busy, "peak_mib": peak_mib(), "kept": kept}


def _inline(tasks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    from rluf.prepare.pipeline import run_task

    return [row for task in tasks for row in run_task(task)]


def profile(rows: int) -> list[list[Any]]:
    """The dearest functions of all three passes, run in this process: (function, CPU seconds with callees)."""
    from rluf.prepare import pipeline

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        write_log(log, rows)
        profiler = cProfile.Profile(time.process_time)
        pipeline.build(settings_for(_warm(Path(folder) / "w"), 500), Path(folder) / "warm", _inline)
        profiler.enable()
        pipeline.build(settings_for(log, rows), Path(folder) / "data", _inline)
        profiler.disable()
    stats = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    found = [
        [f"{Path(file).stem}.{name}", round(total, 2)]
        for (file, _, name), (_, _, _, total, _) in stats.items()
        if "rluf/feedback" in file and not name.startswith("<")
    ]
    return sorted(found, key=lambda row: -row[1])[:24]


def child(mode: str, log: Path, rows: int, out: Path) -> dict[str, Any]:
    """Run one size in a process of its own."""
    environment = dict(os.environ)
    command = [sys.executable, __file__, "--child", mode, str(log), str(rows), str(out)]
    if mode == "polars":
        environment["POLARS_MAX_THREADS"] = "1"
        command = ["taskset", "-c", "0", *command]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if told.returncode:
        sys.stderr.write(told.stderr[-3000:])
        raise SystemExit(told.returncode)
    made: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    return made


def speed_up(rows: int, nodes: Sequence[int]) -> dict[str, Any]:
    """Seconds of one size on simulated clusters of `nodes` nodes each, and the speed-up over the first."""
    with tempfile.TemporaryDirectory(prefix="rluf-bench-") as folder:
        log = Path(folder) / "log.jsonl"
        write_log(log, rows)
        seconds = [child(f"nodes{count}", log, rows, Path(folder) / f"o{count}")["seconds"] for count in nodes]
    speed = {str(count): round(seconds[0] / one, 2) for count, one in zip(nodes, seconds, strict=True)}
    return {"benchmark": "prepare_nodes", "rows": rows, "seconds": [round(s, 1) for s in seconds], "speed_up": speed}


def main() -> None:
    """Run all sizes and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--no-polars", action="store_true")
    parser.add_argument("--profile", type=int, default=0)
    parser.add_argument("--nodes", type=int, nargs="+")
    parser.add_argument("--child", nargs=4)
    options = parser.parse_args()
    if options.child:
        mode, log, rows, out = options.child
        count = int(mode.removeprefix("nodes")) if mode.startswith("nodes") else 0
        build = polars_build if mode == "polars" else partial(ours, nodes=count)
        made = build(Path(log), int(rows), Path(out))
        sys.stdout.write(json.dumps(made) + "\n")
        return
    if options.profile:
        for name, seconds in profile(options.profile):
            sys.stdout.write(f"{seconds:8.2f} s  {name}\n")
        return
    if options.nodes:
        sys.stdout.write(json.dumps(speed_up(max(options.rows), options.nodes)) + "\n")
        return
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="rluf-bench-") as folder:
        for rows in options.rows:
            log = Path(folder) / f"{rows}.jsonl"
            write_log(log, rows)
            line: dict[str, Any] = {"ours": child("ours", log, rows, Path(folder) / f"o{rows}")}
            if not options.no_polars:
                line["polars"] = child("polars", log, rows, Path(folder) / f"p{rows}")
                for name in ("seconds", "cpu_seconds"):
                    line[f"ratio_{name}"] = round(line["ours"][name] / line["polars"][name], 2)
            line["rows_per_second"] = {
                name: round(rows / line[name]["seconds"]) for name in ("ours", "polars") if name in line
            }
            found[str(rows)] = line
            sys.stdout.write(f"{rows}: {json.dumps(line)}\n")
            log.unlink()
    sizes = sorted(options.rows)
    growth = [
        (found[str(b)]["ours"]["seconds"] / found[str(a)]["ours"]["seconds"]) / (b / a) for a, b in pairwise(sizes)
    ]
    memory = [found[str(rows)]["ours"]["driver_mib"] for rows in sizes]
    summary = {
        "benchmark": "prepare", "object_store_mb": STORE // 10**6, "sizes": found,
        "growth_over_linear": [round(value, 2) for value in growth],
        "driver_memory_ratio": round(max(memory) / min(memory), 2),
    }  # fmt: skip
    sys.stdout.write(json.dumps(summary) + "\n")


if __name__ == "__main__":
    main()
