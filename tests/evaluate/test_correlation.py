"""Offline against online: agreement with scipy, worked gates, groups, and invalid files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from rluf.errors import DataError
from rluf.evaluate.correlation import PolicyResult, correlate_policies, estimate_reliability, main, read_policies


def simulate_policies(seed: int = 0, policy_count: int = 20, noise: float = 0.02) -> list[PolicyResult]:
    """Policies whose offline score is a fifth of their true lift, both measured with `noise` relative to its spread."""
    rng = np.random.default_rng(seed)
    true_lifts = rng.normal(0.1, 0.15, policy_count)
    return [
        PolicyResult(f"p{n}", 0.2 * lift + rng.normal(0, 0.2 * noise), lift + rng.normal(0, noise), 0.2 * noise, noise,
                     n >= 6, n >= 17)
        for n, lift in enumerate(true_lifts)
    ]  # fmt: skip


def test_pearson_and_spearman_agree_with_scipy() -> None:
    rows = simulate_policies()
    x, y = [row.offline for row in rows], [row.online for row in rows]
    group = correlate_policies(rows)["groups"]["all"]
    expected = stats.pearsonr(x, y)
    limits = expected.confidence_interval(0.95)
    pearson = group["pearson"]
    assert (pearson["r"], pearson["low"], pearson["high"]) == pytest.approx(
        (expected.statistic, limits.low, limits.high), rel=1e-9
    )
    assert group["spearman"]["rho"] == pytest.approx(stats.spearmanr(x, y).statistic, rel=1e-9)
    assert group["spearman"]["low"] < group["spearman"]["rho"] < group["spearman"]["high"]
    leave_one_out = [stats.pearsonr(np.delete(x, n), np.delete(y, n)).statistic for n in range(len(rows))]
    assert group["leave_one_out"]["low"] == pytest.approx(min(leave_one_out), rel=1e-9)
    assert group["leave_one_out"]["high_without"] == rows[int(np.argmax(leave_one_out))].policy


def test_fisher_interval_of_a_worked_example() -> None:
    """r = 0.95 over 10 policies: [0.80, 0.99]."""
    x = np.array([-1.49, -1, -0.66, -0.38, -0.12, 0.12, 0.38, 0.66, 1, 1.49])
    noise = np.array([1.0, -2, 1, 1, -1, -1, 1, 1, -2, 1])
    noise -= x * (noise @ x) / (x @ x)
    y = 0.95 * x / x.std() + np.sqrt(1 - 0.95**2) * noise / noise.std()
    rows = [PolicyResult(str(n), offline, online) for n, (offline, online) in enumerate(zip(x, y, strict=True))]
    pearson = correlate_policies(rows)["groups"]["all"]["pearson"]
    assert pearson["r"] == pytest.approx(0.95)
    assert (round(pearson["low"], 2), round(pearson["high"], 2)) == (0.80, 0.99)


def test_disattenuation_removes_measurement_noise() -> None:
    """With a true correlation of 1 and much noise, r is low over many policies, and near 1 after correction."""
    group = correlate_policies(simulate_policies(policy_count=1500, noise=0.15))["groups"]["all"]
    assert group["pearson"]["r"] == pytest.approx(0.5, abs=0.07)
    assert group["disattenuated"]["r"] == pytest.approx(1.0, abs=0.1)
    assert group["disattenuated"]["reliability_online"] == pytest.approx(0.5, abs=0.07)
    assert estimate_reliability(np.array([1.0, 2.0, 3.0]), np.array([5.0, 5.0, 5.0])) == 0.0


def test_groups_and_verdict() -> None:
    report = correlate_policies(simulate_policies())
    sizes = {name: group["policies"] for name, group in report["groups"].items()}
    assert sizes == {
        "all": 20, "not_hacked": 17, "never_trained_on_love": 6, "trained_on_love": 14, "hacked_only": 3,
        "smaller_half_of_lifts": 10,
    }  # fmt: skip
    assert report["groups"]["hacked_only"]["pearson"] is None
    assert report["verdict"]["passed"]
    too_few_independent = [policy for n, policy in enumerate(simulate_policies()) if n not in (0, 1)]
    assert not correlate_policies(too_few_independent)["verdict"]["passed"]
    smaller_half = report["groups"]["smaller_half_of_lifts"]
    assert max(map(abs, smaller_half["range_of_lifts"])) < max(map(abs, report["groups"]["all"]["range_of_lifts"]))


def test_gate_performance_of_a_worked_example() -> None:
    rows = [
        PolicyResult("bad, blocked", -0.1, -0.2, 0.01, 0.05), PolicyResult("bad, passed", 0.1, -0.1, 0.01, 0.2),
        PolicyResult("good, blocked", -0.1, 0.3, 0.01, 0.1), PolicyResult("good, passed", 0.2, 0.4, 0.01, 0.1),
        PolicyResult("good, unsure", 0.01, 0.1, 0.01, 0.1),
    ]  # fmt: skip
    gate = correlate_policies(rows)["gate"]
    limits = stats.binomtest(1, 2).proportion_ci(0.95)
    recall = gate["mean_below_zero"]["recall_of_regressions"]
    assert (recall["hits"], recall["of"], recall["low"]) == (1, 2, pytest.approx(limits.low))
    assert gate["mean_below_zero"]["false_blocks"]["hits"] == 1
    assert gate["not_clear_of_zero"]["false_blocks"]["hits"] == 2
    assert gate["mean_below_zero"]["unclear"] == 2
    assert correlate_policies(rows)["groups"]["all"]["sign_agreement"]["hits"] == 3


def test_the_command_reads_rows_and_ends_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{name: getattr(policy, name) for name in PolicyResult.__slots__} for policy in simulate_policies()]
    rows.append({"policy": "base", "offline": 0.05, "online": 0.0})
    path = tmp_path / "policies.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert main(["--data", str(path), "--control", "base"]) == 0
    output = capsys.readouterr().out
    report = json.loads(output.splitlines()[-1])
    assert report["policies"] == 20
    assert report["groups"]["all"]["pearson"]["r"] == pytest.approx(
        correlate_policies(simulate_policies())["groups"]["all"]["pearson"]["r"]
    )
    assert "never trained on love   6" in output
    assert "passes: lower limit" in output
    shifted = {policy.policy: policy.offline for policy in read_policies(path, "base")}
    assert shifted["p3"] == pytest.approx(simulate_policies()[3].offline - 0.05)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1"),
        ('{"policy": "a", "offline": 1}', "missing field 'online'"),
        ('{"policy": "a", "offline": 1, "online": 2, "sd": 3}', "unknown field 'sd'"),
        ('{"policy": "a", "offline": NaN, "online": 2}', "finite"),
        ('{"policy": "a", "offline": 1, "online": 2, "hacked": 1}', "true or false"),
        ('{"policy": "a", "offline": 1, "online": 2}\n' * 2, "'a' has more than one row"),
        (
            '{"policy": "a", "offline": 1, "online": 2}\n{"policy": " a", "offline": 1, "online": 2}',
            "'a' has more than",
        ),
        ('{"policy": null, "offline": 1, "online": 2}', "policy must be a name"),
        ('{"policy": "\xe9", "offline": 1, "online": 2}', "is not UTF-8 text"),
    ],
)
def test_invalid_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "policies.jsonl"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=message):
        read_policies(path)


def test_too_few_policies_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got 3"):
        correlate_policies(simulate_policies(policy_count=3))
    with pytest.raises(DataError, match="is not a file"):
        read_policies(tmp_path / "none.jsonl")
    path = tmp_path / "policies.jsonl"
    path.write_text('{"policy": "a", "offline": 1, "online": 2}')
    with pytest.raises(DataError, match="no policy 'b'"):
        read_policies(path, "b")
