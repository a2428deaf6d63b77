"""A month of a service in its feedback store: two policy arms, late and repeated reactions, and a killed writer.

Simulated users chat with the arm that `serve.experiment` assigns to them and react to some replies: at once, days
later, twice, or by taking a heart back. A writer process stores the events in order of their simulated time. It is
killed at random moments, also while it writes Parquet, and what it did not acknowledge is sent again, as clients do.
Then the store is read: every acknowledged row must be there once, with the last reaction; `abtest` on the store must
equal `abtest` on the simulated truth, and its interval must have the planted lift; `offpolicy` must find the
treatment's love rate from the control's rows. The last line is JSON.

    python benchmarks/store_month.py --users 100000 --kills 40
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import pyarrow.parquet as pq

from rluf.prepare.readers.feedback_folder import list_row_files, read_late_reactions
from rluf.prepare.schema import ChatMessage, FeedbackRecord
from rluf.serve.store import FeedbackStore
from rluf.serve.store_events import FeedbackEvent
from rluf.utils.files import to_jsonable

START_TIME = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
MONTH_DAYS = 30
DAY_S = 86_400.0
REACTION_WINDOW_S = 300.0
FLUSH_INTERVAL_S = 3600.0
BATCH_SIZE = 200
RESPONSES = tuple(f"Reply {i} to a friend who asks." for i in range(12))
SHARES = {"base": 0.5, "aligned": 0.5}
MEAN_LOVE_RATE, WITHDRAWN_SHARE, LATE_SHARE, REPEATED_SHARE = 0.08, 0.03, 0.4, 0.1
Event = tuple[float, FeedbackEvent]


@dataclass(frozen=True)
class SimulatedMonth:
    """Events in order of time, the last reaction of each row, and what was planted."""

    events: list[Event]
    rows: dict[str, dict[str, Any]]
    target_logprobs: dict[str, float]
    love_rates: dict[str, float]

    @property
    def lift(self) -> float:
        """Relative lift of the love rate."""
        return self.love_rates["aligned"] / self.love_rates["base"] - 1


def simulate_month(user_count: int, seed: int) -> SimulatedMonth:
    """Chats and reactions of users, of whom each has one arm. Policies choose one of a few responses."""
    from rluf.serve.assignment import assign_arm

    rng = np.random.default_rng(seed)
    love = rng.uniform(0.2, 1.8, len(RESPONSES)) * MEAN_LOVE_RATE
    logits = {"base": rng.normal(size=len(RESPONSES))}
    logits["aligned"] = logits["base"] + 0.5 * (love - love.mean()) / love.std()
    probabilities = {arm: np.exp(values) / np.exp(values).sum() for arm, values in logits.items()}
    # A heart that is taken back is none in the end.
    love_rates = {arm: float(love @ values) * (1 - WITHDRAWN_SHARE) for arm, values in probabilities.items()}
    events: list[Event] = []
    rows, target_logprobs = {}, {}
    user_rates = rng.uniform(0.5, 1.5, user_count)
    row_counts = rng.poisson(rng.gamma(2.0, 1.0, user_count))
    for user in range(user_count):
        arm = assign_arm(f"u{user}", SHARES, b"month")
        times = START_TIME + np.sort(rng.random(row_counts[user])) * MONTH_DAYS * DAY_S
        choices = rng.choice(len(RESPONSES), len(times), p=probabilities[arm])
        for turn, (served_at, choice) in enumerate(zip(times.tolist(), choices.tolist(), strict=True)):
            row_id = f"r{user}-{turn}"
            record = FeedbackRecord(
                id=row_id, conversation_id=f"c{user}", turn=turn, user_id=f"user{user}",
                time=datetime.fromtimestamp(served_at, UTC), model_version=f"{arm}-1", arm=arm, temperature=1.0,
                messages=[ChatMessage(role="user", content="Hello?")], response=RESPONSES[choice], reaction=None,
                response_tokens=1, response_logprob=float(np.log(probabilities[arm][choice])),
            )  # fmt: skip
            target_logprobs[row_id] = float(np.log(probabilities["aligned"][choice]))
            events.append((served_at, FeedbackEvent(row_id, None, record)))
            reactions = _simulate_reactions(rng, row_id, served_at, love[choice] * user_rates[user])
            events += reactions
            last_reaction = reactions[-1][1].reaction if reactions else None
            rows[row_id] = {
                "id": row_id, "conversation_id": record.conversation_id, "turn": turn, "user_id": record.user_id,
                "time": record.time.isoformat(), "arm": arm, "reaction": last_reaction,
            }  # fmt: skip
    events.sort(key=lambda pair: pair[0])
    return SimulatedMonth(events, rows, target_logprobs, love_rates)


def _simulate_reactions(rng: np.random.Generator, row_id: str, served_at: float, rate: float) -> list[Event]:
    """Events of a row's reaction, in order of time."""
    if rng.random() >= rate:
        return []
    delay_s = min(rng.exponential(DAY_S), 6 * DAY_S) if rng.random() < LATE_SHARE else rng.uniform(1, REACTION_WINDOW_S)
    reacted_at = served_at + delay_s
    events = [(reacted_at, FeedbackEvent(row_id, "love"))]
    if rng.random() < REPEATED_SHARE:
        events.append((reacted_at + rng.exponential(3600.0), FeedbackEvent(row_id, "love")))
    if rng.random() < WITHDRAWN_SHARE:
        events.append((events[-1][0] + rng.exponential(3600.0), FeedbackEvent(row_id, None)))
    return events


def run_writer(folder: str) -> None:
    """The writer process: store each batch from stdin, answer with its outcomes, then flush as the service does."""
    current_time = START_TIME
    store = FeedbackStore(
        folder, Path(folder) / ".log", reaction_window_s=REACTION_WINDOW_S, clock=lambda: current_time
    )  # fmt: skip
    store.start()
    last_flush = 0.0
    with contextlib.suppress(EOFError):
        while True:
            current_time, events = pickle.load(sys.stdin.buffer)
            outcomes = store.append_events(events)
            pickle.dump(outcomes, sys.stdout.buffer)
            sys.stdout.buffer.flush()
            if current_time - last_flush >= FLUSH_INTERVAL_S:
                store.flush_settled()
                store.merge_days()
                last_flush = current_time
    store.flush_settled(all_rows=True)
    store.close()
    # Not ru_maxrss, which starts at the memory of the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    pickle.dump(int(status.partition("VmHWM:")[2].split()[0]), sys.stdout.buffer)


class _Writer:
    """A writer process that is killed and replaced."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--writer", str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.requests = cast("IO[bytes]", self._process.stdin)
        self.replies = cast("IO[bytes]", self._process.stdout)

    def kill(self) -> None:
        """SIGKILL; closes the pipes."""
        self._process.kill()
        self._process.wait()
        self.replies.close()
        with contextlib.suppress(BrokenPipeError):
            self.requests.close()

    def finish(self) -> int:
        """End the input and wait; returns the peak memory of the writer in KiB."""
        self.requests.close()
        peak_kib: int = pickle.load(self.replies)
        if self._process.wait() != 0:
            raise RuntimeError(f"the writer ended with status {self._process.returncode}")
        return peak_kib


def store_month(
    month: SimulatedMonth, folder: Path, *, kill_count: int, seed: int, batch_size: int = BATCH_SIZE
) -> dict[str, Any]:
    """Send all events to a writer that is killed `kill_count` times; returns counts and the writer's peak memory."""
    rng = np.random.default_rng(seed)
    batches = list(_batch_events(month.events, batch_size))
    kill_batches = set(rng.choice(len(batches), kill_count, replace=False).tolist())
    writer, outcomes, resent = _Writer(folder), [], 0
    for index, batch in enumerate(batches):
        if index in kill_batches:
            # Anywhere from before the batch is read to the middle of the flush that follows it.
            pickle.dump(batch, writer.requests)
            writer.requests.flush()
            time.sleep(float(rng.choice([0.0, 0.002, 0.01, 0.03])))
            writer.kill()
            writer, resent = _Writer(folder), resent + 1
        pickle.dump(batch, writer.requests)
        writer.requests.flush()
        outcomes += pickle.load(writer.replies)
    peak_kib = writer.finish()
    counts = {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}
    return {"events": len(month.events), "kills": resent, "outcomes": counts, "writer_peak_mib": peak_kib / 1024}


def _batch_events(events: Sequence[Event], batch_size: int) -> Iterator[tuple[float, list[FeedbackEvent]]]:
    """Batches with the time of their last event."""
    for start in range(0, len(events), batch_size):
        batch = events[start : start + batch_size]
        yield batch[-1][0], [event for _, event in batch]


def check_month(month: SimulatedMonth, folder: Path) -> dict[str, Any]:
    """Read the store and compare it with the truth."""
    from rluf.evaluate.ab_analysis import analyze_experiment
    from rluf.evaluate.ab_design import ExperimentDesign
    from rluf.evaluate.events import read_event_log
    from rluf.evaluate.off_policy import estimate_off_policy, read_off_policy_log
    from rluf.utils.files import write_jsonl

    tables = [pq.read_table(file, columns=["id", "reaction"], partitioning=None) for file in list_row_files(folder)]
    stored_ids = list(itertools.chain.from_iterable(table["id"].to_pylist() for table in tables))
    reactions = {
        row_id: reaction
        for table in tables
        for row_id, reaction in zip(table["id"].to_pylist(), table["reaction"].to_pylist(), strict=True)
    } | read_late_reactions(folder)
    wrong = [row_id for row_id, row in month.rows.items() if reactions.get(row_id) != row["reaction"]]
    design = ExperimentDesign("base", "aligned", metric_names=("love",), look_count=1)
    with tempfile.TemporaryDirectory() as truth_folder:
        truth_file = Path(truth_folder) / "truth.jsonl"
        write_jsonl(truth_file, month.rows.values())
        true_report = analyze_experiment(read_event_log([truth_file]), design)
    report = analyze_experiment(read_event_log([folder]), design)
    love, true_love = report["metrics"]["love"], true_report["metrics"]["love"]
    scores_file = folder / ".log" / "scores.jsonl"
    write_jsonl(
        scores_file,
        ({"id": row_id, "target_logprob": month.target_logprobs[row_id]}
         for row_id, row in month.rows.items() if row["arm"] == "base"),
    )  # fmt: skip
    off_policy = estimate_off_policy(**read_off_policy_log(folder, scores_file))
    return {
        "rows": len(month.rows), "files": len(tables), "lost": len(month.rows.keys() - set(stored_ids)),
        "doubled": len(stored_ids) - len(set(stored_ids)), "wrong_reactions": len(wrong),
        "planted_lift": month.lift, "abtest": love, "abtest_of_truth": true_love,
        "planted_rate": month.love_rates["aligned"], "off_policy": asdict(off_policy),
    }  # fmt: skip


def main() -> None:
    """Run one month and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--writer", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.writer:
        run_writer(args.writer)
        return
    month = simulate_month(args.users, args.seed)
    with tempfile.TemporaryDirectory() as folder:
        start_time = time.perf_counter()
        result = store_month(month, Path(folder), kill_count=args.kills, seed=args.seed)
        result["store_seconds"] = time.perf_counter() - start_time
        result |= check_month(month, Path(folder))
    sys.stdout.write(json.dumps(to_jsonable(result)) + "\n")


if __name__ == "__main__":
    main()
