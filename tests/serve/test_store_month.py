"""A simulated month with a killed writer, small; benchmarks/store_month.py runs it with 100,000 users."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.store_month import check_month, simulate_month, store_month
from rluf.evaluate.abtest import main
from rluf.serve.store import FeedbackStore
from rluf.serve.store_events import FeedbackEvent


def test_a_month_with_a_killed_writer_has_the_planted_effect_and_loses_no_row(tmp_path: Path) -> None:
    month = simulate_month(1500, seed=1)
    stored = store_month(month, tmp_path, kill_count=2, seed=1, batch_size=20)
    assert stored["kills"] == 2
    assert stored["outcomes"]["late"] > 50
    result = check_month(month, tmp_path)
    assert (result["lost"], result["doubled"], result["wrong_reactions"]) == (0, 0, 0)
    assert result["abtest"] == result["abtest_of_truth"]
    effect = result["abtest"]["effect"]
    assert effect["lift_low"] < month.lift < effect["lift_high"]
    snips = result["off_policy"]["snips"]
    assert snips["low"] < month.love_rates["aligned"] < snips["high"]
    assert result["off_policy"]["dropped_rows"] == sum(row["arm"] == "aligned" for row in month.rows.values())


def test_the_command_reads_a_store_in_which_some_chats_named_their_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    month = simulate_month(400, seed=2)
    events = [event for _, event in month.events]
    served = [event for event in events if event.record is not None]
    named = [
        FeedbackEvent(f"named-{i}", None, event.record.model_copy(update={"id": f"named-{i}", "arm": None}))
        for i, event in enumerate(served[:50])
        if event.record is not None
    ]
    store = FeedbackStore(str(tmp_path), tmp_path / ".log", reaction_window_s=0)
    store.start()
    for batch in (served, named, [event for event in events if event.record is None]):
        store.append_events(batch)
        store.flush_settled(all_rows=True)
    store.close()
    arguments = ["--control", "base", "--treatment", "aligned", "--metrics", "love"]
    assert main(["--data", str(tmp_path), *arguments]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert any("50 rows without an arm" in note for note in report["notes"])
    treated = [row for row in month.rows.values() if row["arm"] == "aligned"]
    loved = sum(row["reaction"] == "love" for row in treated)
    assert report["metrics"]["love"]["effect"]["treatment"] == pytest.approx(loved / len(treated))
