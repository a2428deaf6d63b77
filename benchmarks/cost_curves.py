"""Cost curves: time and peak memory of each command against the size of its work.

Every point runs the real command in a separate process on this machine. For a policy step it is the time of the
second step, for a service the time per answer of each client; for all others the time of the complete
command, with its imports and Ray. Memory is the peak sum over all its processes, shared pages counted in proportion.

The slope is that of log(cost) against log(size) between the two largest sizes: 1 is proportional, below 1 a part of the
cost is fixed, above 1 it grows faster than the work. The models are SmolLM2-135M-Instruct for the policy and MiniLM for
rewards.

python benchmarks/cost_curves.py [--only train.prompts prepare.rows] [--page docs/cost.md]

--page replaces the table of the page. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import math
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.process_tree import CommandCost, run_command
from prepare import write_log

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_FOLDER = ROOT / "rluf" / "simulate" / "sample"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
BASE_STEP = {"prompts": 4, "samples": 4, "tokens": 32}
"""Prompts and samples per step, and response tokens, of a policy step; one of them grows at a time."""

_STEP_COSTS: dict[tuple[int, int, int], CommandCost] = {}
"""Measured policy steps by prompts, samples and tokens: the curves of a step have their first point in common."""

logger = logging.getLogger("benchmarks.cost_curves")


@dataclass(frozen=True)
class Curve:
    """One command and the variable that grows; `measure` runs one size in a folder of its own."""

    command: str
    variable: str
    sizes: tuple[int, ...]
    measure: Callable[[int, Path], CommandCost]

    @property
    def name(self) -> str:
        """Name on the command line."""
        return f"{self.command}.{self.variable}"


def run_rluf(command: str, *arguments: object, folder: Path) -> CommandCost:
    """Run `python -m rluf.<command>` in the folder."""
    return run_command([sys.executable, "-m", f"rluf.{command}", *map(str, arguments)], cwd=folder)


def prepare_rows(row_count: int, folder: Path) -> CommandCost:
    """Prepare a log of ten rows per user."""
    return _prepare(row_count, row_count // 10, folder)


def prepare_users(user_count: int, folder: Path) -> CommandCost:
    """Prepare a log of 30,000 rows."""
    return _prepare(30_000, user_count, folder)


def _prepare(row_count: int, user_count: int, folder: Path) -> CommandCost:
    write_log(folder / "log.jsonl", row_count, user_count=user_count)
    data = [f"data.{name}=[]" for name in ("preferences", "safety", "prompts")]
    return run_rluf(
        "prepare", f"data.feedback=[{folder / 'log.jsonl'}]", *data, f"run.cache={folder / 'cache'}", folder=folder
    )


def train_reward_model(row_count: int, folder: Path) -> CommandCost:
    """Prepare at most that many rows of the sample log and train P[Love] on them."""
    return run_rluf(
        "reward",
        "--config",
        "configs/reward/love.yaml",
        f"prepare.max_rows={row_count}",
        f"run.cache={folder / 'cache'}",
        folder=folder,
    )


def train_policy(variable: str) -> Callable[[int, Path], CommandCost]:
    """Measure a policy step; one variable of BASE_STEP grows."""

    def measure(size: int, folder: Path) -> CommandCost:
        workload = BASE_STEP | {variable: size}
        return _train_policy(workload["prompts"], workload["samples"], workload["tokens"], folder)

    return measure


def _train_policy(prompt_count: int, sample_count: int, token_count: int, folder: Path) -> CommandCost:
    """Train two steps; rewards are rules, so that no reward model is trained."""
    workload = (prompt_count, sample_count, token_count)
    if workload not in _STEP_COSTS:
        judges = [
            f"objectives.{name}.{key}" for name in ("love", "helpfulness", "safety")
            for key in ("source=judge", "path=repetition")
        ]  # fmt: skip
        cost = run_rluf(
            "train", *judges, "algorithm.steps=2", f"algorithm.prompts_per_step={prompt_count}",
            f"algorithm.samples_per_prompt={sample_count}", f"rollout.max_response_tokens={token_count}",
            "evaluate.prompts=2", "evaluate.samples_per_prompt=1", "evaluate.simulated_users=0",
            f"run.root={folder}", "tracking.wandb=off", folder=folder,
        )  # fmt: skip
        metrics_path = next(folder.glob("*/*/metrics.jsonl"))
        last_step = json.loads(metrics_path.read_text("utf-8").splitlines()[-1])
        _STEP_COSTS[workload] = CommandCost(last_step["step_s"], cost.peak_bytes, cost.output)
    return _STEP_COSTS[workload]


def score_file(row_count: int, folder: Path) -> CommandCost:
    """Score labeled rows of the sample log with a reward model that is trained outside the measurement."""
    model_folder = folder.parent / "models"
    if not model_folder.is_dir():
        run_rluf(
            "reward",
            "--config",
            "configs/reward/love.yaml",
            "prepare.max_rows=500",
            f"run.root={model_folder}",
            folder=folder,
        )
    with gzip.open(SAMPLE_FOLDER / "feedback.jsonl.gz", "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as stream:
        for index in range(row_count):
            row = rows[index % len(rows)]
            stream.write(json.dumps({
                "id": str(index), "messages": row["messages"], "response": row["response"],
                "label": int(row.get("reaction") == "love"), "group": row["user_id"],
            }) + "\n")  # fmt: skip
    love_model = next(model_folder.glob("*/latest/love"))
    return run_rluf("evaluate", "score", "--model", love_model, "--data", "rows.jsonl", folder=folder)


def analyze_experiment(user_count: int, folder: Path) -> CommandCost:
    """Analyze the log of a simulated experiment, which is written outside the measurement."""
    simulation = run_rluf("evaluate", "abtest", "--simulate", "events.jsonl", "--users", user_count, folder=folder)
    start = json.loads(simulation.output.strip().splitlines()[-1])["start"]
    return run_rluf("evaluate", "abtest", "--data", "events.jsonl", "--start", start, folder=folder)


def serve_clients(client_count: int, folder: Path) -> CommandCost:
    """Seconds per answer of one client while `client_count` clients send requests; memory of service and clients."""
    script = ROOT / "benchmarks" / "serve.py"
    arguments = ("--models", "minilm", "--clients", str(client_count), "--seconds", "4")
    cost = run_command([sys.executable, str(script), *arguments], cwd=folder)
    runs = json.loads(cost.output.strip().splitlines()[-1])["minilm"]
    return CommandCost(client_count / runs[f"clients_{client_count}"]["per_s"], cost.peak_bytes, cost.output)


CURVES = (
    Curve("prepare", "rows", (3_000, 30_000, 300_000), prepare_rows),
    Curve("prepare", "users", (100, 1_000, 10_000), prepare_users),
    Curve("reward", "rows", (750, 1_500, 3_000), train_reward_model),
    Curve("train", "prompts", (4, 8, 16), train_policy("prompts")),
    Curve("train", "samples", (4, 8, 16), train_policy("samples")),
    Curve("train", "tokens", (32, 64, 128), train_policy("tokens")),
    Curve("score", "rows", (1_000, 4_000), score_file),
    Curve("abtest", "users", (300, 1_000, 3_000), analyze_experiment),
    Curve("serve", "clients", (1, 8), serve_clients),
)


def compute_slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of log(cost) against log(size) between the two largest sizes."""
    return math.log(costs[-1] / costs[-2]) / math.log(sizes[-1] / sizes[-2])


def format_table(results: dict[str, dict[str, list[float]]]) -> list[str]:
    """Markdown rows: command, variable, sizes, seconds, slope, GiB, slope."""
    lines = ["| command | what grows | sizes | seconds | slope | peak GiB | slope |", "|---|---|---|---|---|---|---|"]
    for curve in CURVES:
        if curve.name in results:
            result = results[curve.name]
            cells = (
                f"`{curve.command}`", curve.variable, " / ".join(f"{size:,}" for size in curve.sizes),
                " / ".join(f"{value:.3g}" for value in result["seconds"]),
                f"{compute_slope(curve.sizes, result['seconds']):.2f}",
                " / ".join(f"{value:.2f}" for value in result["peak_gib"]),
                f"{compute_slope(curve.sizes, result['peak_gib']):.2f}",
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def write_page(page_path: Path, results: dict[str, dict[str, list[float]]]) -> None:
    """Replace the table of the page."""
    block = "\n".join([BEGIN, *format_table(results), END])
    page = page_path.read_text("utf-8")
    page_path.write_text(re.sub(f"{BEGIN}.*?{END}", lambda _: block, page, flags=re.DOTALL), "utf-8")


def main() -> None:
    """Measure the curves and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[curve.name for curve in CURVES], metavar="COMMAND.VARIABLE")
    parser.add_argument("--page", type=Path, help="page whose table is replaced")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    results: dict[str, dict[str, list[float]]] = {}
    work_folder = tempfile.TemporaryDirectory()
    for curve in CURVES:
        if args.only and curve.name not in args.only:
            continue
        costs = []
        for size in curve.sizes:
            folder = Path(work_folder.name) / f"{curve.name}-{size}"
            folder.mkdir()
            costs.append(curve.measure(size, folder))
            peak_gib = costs[-1].peak_bytes / 2**30
            logger.info("%s=%d: seconds=%.3g peak_gib=%.2f", curve.name, size, costs[-1].seconds, peak_gib)
        results[curve.name] = {
            "seconds": [cost.seconds for cost in costs],
            "peak_gib": [cost.peak_bytes / 2**30 for cost in costs],
        }
        if args.page:  # after each curve, so that a run that is stopped has its finished curves
            write_page(args.page, results)
    work_folder.cleanup()
    sys.stdout.write(json.dumps({"benchmark": "cost_curves", "curves": results}) + "\n")


if __name__ == "__main__":
    main()
