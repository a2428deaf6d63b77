"""A simulated month with a killed writer, small; benchmarks/store_month.py runs it with 100,000 users."""

from __future__ import annotations

from pathlib import Path

from benchmarks.store_month import check_month, simulate_month, store_month


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
