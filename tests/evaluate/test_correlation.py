"""Offline against online: scipy's numbers, worked gates, groups, and files that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from rluf.errors import DataError
from rluf.evaluate.correlate import main
from rluf.evaluate.correlation import Policy, correlate, read_policies, reliability


def policies(seed: int = 0, count: int = 20, noise: float = 0.02) -> list[Policy]:
    """Policies whose offline score is a fifth of their true lift, both measured with `noise` relative to its spread."""
    rng = np.random.default_rng(seed)
    lift = rng.normal(0.1, 0.15, count)
    return [
        Policy(f"p{n}", 0.2 * one + rng.normal(0, 0.2 * noise), one + rng.normal(0, noise), 0.2 * noise, noise, n >= 6,
               n >= 17)
        for n, one in enumerate(lift)
    ]  # fmt: skip


def test_pearson_and_spearman_are_scipys() -> None:
    rows = policies()
    x, y = [one.offline for one in rows], [one.online for one in rows]
    found = correlate(rows)["groups"]["all"]
    theirs = stats.pearsonr(x, y)
    limits = theirs.confidence_interval(0.95)
    told = found["pearson"]
    assert (told["r"], told["low"], told["high"]) == pytest.approx(
        (theirs.statistic, limits.low, limits.high), rel=1e-9
    )
    assert found["spearman"]["rho"] == pytest.approx(stats.spearmanr(x, y).statistic, rel=1e-9)
    assert found["spearman"]["low"] < found["spearman"]["rho"] < found["spearman"]["high"]
    rest = [stats.pearsonr(np.delete(x, n), np.delete(y, n)).statistic for n in range(len(rows))]
    assert found["leave_one_out"]["low"] == pytest.approx(min(rest), rel=1e-9)
    assert found["leave_one_out"]["high_without"] == rows[int(np.argmax(rest))].policy


def test_fishers_interval_of_the_papers_figure() -> None:
    """r = 0.95 over 10 policies: [0.80, 0.99]."""
    x = np.array([-1.49, -1, -0.66, -0.38, -0.12, 0.12, 0.38, 0.66, 1, 1.49])
    noise = np.array([1.0, -2, 1, 1, -1, -1, 1, 1, -2, 1])
    noise -= x * (noise @ x) / (x @ x)
    y = 0.95 * x / x.std() + np.sqrt(1 - 0.95**2) * noise / noise.std()
    told = correlate([Policy(str(n), a, b) for n, (a, b) in enumerate(zip(x, y, strict=True))])["groups"]["all"][
        "pearson"
    ]
    assert told["r"] == pytest.approx(0.95)
    assert (round(told["low"], 2), round(told["high"], 2)) == (0.80, 0.99)


def test_noise_is_taken_out() -> None:
    """With a true correlation of 1 and much noise, r is low over many policies, and near 1 without it."""
    found = correlate(policies(count=1500, noise=0.15))["groups"]["all"]
    assert found["pearson"]["r"] == pytest.approx(0.5, abs=0.07)
    assert found["disattenuated"]["r"] == pytest.approx(1.0, abs=0.1)
    assert found["disattenuated"]["reliability_online"] == pytest.approx(0.5, abs=0.07)
    assert reliability(np.array([1.0, 2.0, 3.0]), np.array([5.0, 5.0, 5.0])) == 0.0


def test_groups_and_verdict() -> None:
    found = correlate(policies())
    sizes = {name: one["policies"] for name, one in found["groups"].items()}
    assert sizes == {
        "all": 20, "not_hacked": 17, "never_trained_on_love": 6, "trained_on_love": 14, "hacked_only": 3,
        "smaller_half_of_lifts": 10,
    }  # fmt: skip
    assert found["groups"]["hacked_only"]["pearson"] is None
    assert found["verdict"]["passed"]
    few = [one for n, one in enumerate(policies()) if n not in (0, 1)]
    assert not correlate(few)["verdict"]["passed"]
    half = found["groups"]["smaller_half_of_lifts"]
    assert max(map(abs, half["range_of_lifts"])) < max(map(abs, found["groups"]["all"]["range_of_lifts"]))


def test_gate_worked_by_hand() -> None:
    rows = [
        Policy("bad, blocked", -0.1, -0.2, 0.01, 0.05), Policy("bad, passed", 0.1, -0.1, 0.01, 0.2),
        Policy("good, blocked", -0.1, 0.3, 0.01, 0.1), Policy("good, passed", 0.2, 0.4, 0.01, 0.1),
        Policy("good, unsure", 0.01, 0.1, 0.01, 0.1),
    ]  # fmt: skip
    gate = correlate(rows)["gate"]
    limits = stats.binomtest(1, 2).proportion_ci(0.95)
    recall = gate["mean_below_zero"]["recall_of_regressions"]
    assert (recall["hits"], recall["of"], recall["low"]) == (1, 2, pytest.approx(limits.low))
    assert gate["mean_below_zero"]["false_blocks"]["hits"] == 1
    assert gate["not_clear_of_zero"]["false_blocks"]["hits"] == 2
    assert gate["mean_below_zero"]["unclear"] == 2
    assert correlate(rows)["groups"]["all"]["sign_agreement"]["hits"] == 3


def test_the_command_reads_rows_and_ends_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{name: getattr(one, name) for name in Policy.__slots__} for one in policies()]
    rows.append({"policy": "base", "offline": 0.05, "online": 0.0})
    path = tmp_path / "policies.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert main(["--data", str(path), "--control", "base"]) == 0
    told = capsys.readouterr().out
    found = json.loads(told.splitlines()[-1])
    assert found["policies"] == 20
    assert found["groups"]["all"]["pearson"]["r"] == pytest.approx(
        correlate(policies())["groups"]["all"]["pearson"]["r"]
    )
    assert "never trained on love   6" in told
    assert "holds: lower limit" in told
    shifted = {one.policy: one.offline for one in read_policies(path, "base")}
    assert shifted["p3"] == pytest.approx(policies()[3].offline - 0.05)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "line 1"),
        ('{"policy": "a", "offline": 1}', "missing field 'online'"),
        ('{"policy": "a", "offline": 1, "online": 2, "sd": 3}', "unknown field 'sd'"),
        ('{"policy": "a", "offline": NaN, "online": 2}', "finite"),
        ('{"policy": "a", "offline": 1, "online": 2, "hacked": 1}', "true or false"),
        ('{"policy": "a", "offline": 1, "online": 2}\n' * 2, "'a' comes more than once"),
    ],
)
def test_bad_files_are_told(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "policies.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=told):
        read_policies(path)


def test_too_few_and_absent(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="3 policies"):
        correlate(policies(count=3))
    with pytest.raises(DataError, match="is no file"):
        read_policies(tmp_path / "none.jsonl")
    path = tmp_path / "policies.jsonl"
    path.write_text('{"policy": "a", "offline": 1, "online": 2}')
    with pytest.raises(DataError, match="no policy 'b'"):
        read_policies(path, "b")
