"""Does the offline score predict the online lift: correlation over policies, and the release gate it would make.

python -m rluf.evaluate correlate --data policies.jsonl [--control base]

One row per policy: {"policy": "w0.3", "offline": 0.12, "offline_se": 0.004, "online": 0.28, "online_se": 0.02,
"trained_on_love": true, "hacked": false}; offline is the mean score (a change, unless --control is given), online the
relative change of the love rate.

Both numbers carry noise, which pulls the correlation towards zero; the disattenuated correlation
estimates the association without noise (Spearman 1904). The interval of r is Fisher's: atanh(r) +- 1.96 / sqrt(n - 3);
that of Spearman's rho uses the variance (1 + rho^2 / 2) / (n - 3) (Bonett and Wright 2000).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from rluf.config.cli import CommandParser, run_command
from rluf.errors import DataError
from rluf.evaluate.intervals import CONFIDENCE_LEVEL
from rluf.utils.stats import Floats

MIN_POLICIES = 4
"""Fisher's interval needs n - 3 > 0."""
MIN_CORRELATION_LOWER_LIMIT = 0.7
"""The check passes when the lower limit of r is above this ..."""
MIN_INDEPENDENT_POLICIES = 5
"""... with at least this many policies never trained on P[Love]: otherwise r may only show a feedback loop."""
BOOTSTRAP_RESAMPLES = 2000
Z_95 = 1.96
ROW_FIELDS = (
    "policy, offline, online, and optionally offline_se, online_se (0 or more), trained_on_love, hacked (true or false)"
)


@dataclass(frozen=True, slots=True)
class PolicyResult:
    """One policy: mean offline score and online lift, each with its standard error (0 if unknown).

    `trained_on_love`: P[Love] was part of its reward. `hacked`: it was found to exploit the reward.
    """

    policy: str
    offline: float
    online: float
    offline_se: float = 0.0
    online_se: float = 0.0
    trained_on_love: bool = True
    hacked: bool = False


def read_policies(path: Path, control: str | None = None) -> list[PolicyResult]:
    """Read a JSON lines file with one policy per row. DataError that names an invalid line.

    With `control` the offline score becomes the change from that policy, and the policy itself, whose lift is 0 by
    definition, is dropped. The control's own error shifts all rows together, so it is not added to theirs.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file; expected JSON lines with policy, offline, online")
    policies = []
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); expected plain JSON lines") from error
    for line_number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                policies.append(_parse_policy(json.loads(line)))
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(f"{path} line {line_number}: {error}; expected a row with {ROW_FIELDS}") from error
    names = [policy.policy for policy in policies]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise DataError(f"{path}: policy {duplicates[0]!r} has more than one row; give each policy one row")
    if control is None:
        return policies
    if control not in names:
        raise DataError(f"{path}: no policy {control!r} for --control; available: {', '.join(names)}")
    control_score = policies[names.index(control)].offline
    return [replace(policy, offline=policy.offline - control_score) for policy in policies if policy.policy != control]


def _parse_policy(row: Mapping[str, Any]) -> PolicyResult:
    unknown = sorted(set(row) - set(PolicyResult.__slots__))
    missing = [name for name in ("policy", "offline", "online") if name not in row]
    if unknown or missing:
        raise ValueError(f"unknown field {unknown[0]!r}" if unknown else f"missing field {missing[0]!r}")
    numbers = {name: float(row.get(name, 0.0)) for name in ("offline", "online", "offline_se", "online_se")}
    if not all(np.isfinite(list(numbers.values()))) or min(numbers["offline_se"], numbers["online_se"]) < 0.0:
        raise ValueError("offline and online must be finite, their standard errors 0 or more")
    if isinstance(row["policy"], list | dict | None) or not str(row["policy"]).strip():
        raise ValueError("policy must be a name")
    flags = {name: row.get(name, default) for name, default in (("trained_on_love", True), ("hacked", False))}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise ValueError("trained_on_love and hacked must be true or false")
    return PolicyResult(
        str(row["policy"]).strip(), numbers["offline"], numbers["online"], numbers["offline_se"], numbers["online_se"],
        flags["trained_on_love"], flags["hacked"],
    )  # fmt: skip


def correlate_policies(policies: Sequence[PolicyResult], *, seed: int = 1) -> dict[str, Any]:
    """Correlations by group of policies, performance of a release gate, and the verdict by the pass rule.

    The groups: all, not hacked, never trained on P[Love], trained on it, hacked, and the half with the smallest lifts.
    DataError for fewer than four policies.
    """
    if len(policies) < MIN_POLICIES:
        raise DataError(f"a correlation needs {MIN_POLICIES} or more policies (better 20), got {len(policies)}")
    # Large lifts alone can make r high; the half with the smallest lifts shows whether small ones are ranked too.
    order = np.argsort([abs(policy.online) for policy in policies], kind="stable")
    smaller_half = [policies[n] for n in order[: -(-len(policies) // 2)]]
    groups = {
        "all": list(policies),
        "not_hacked": [policy for policy in policies if not policy.hacked],
        "never_trained_on_love": [policy for policy in policies if not policy.trained_on_love],
        "trained_on_love": [policy for policy in policies if policy.trained_on_love],
        "hacked_only": [policy for policy in policies if policy.hacked],
        "smaller_half_of_lifts": smaller_half,
    }
    associations = {name: measure_association(members, seed=seed) for name, members in groups.items()}
    pearson = associations["all"]["pearson"]
    independent_count = associations["never_trained_on_love"]["policies"]
    blocked_by_mean = [policy.offline < 0.0 for policy in policies]
    blocked_by_interval = [policy.offline - Z_95 * policy.offline_se <= 0.0 for policy in policies]
    return {
        "policies": len(policies),
        "groups": associations,
        "gate": {
            "mean_below_zero": _measure_gate_performance(policies, blocked_by_mean),
            "not_clear_of_zero": _measure_gate_performance(policies, blocked_by_interval),
        },
        "verdict": {
            "rule": f"lower limit of Pearson's r above {MIN_CORRELATION_LOWER_LIMIT}, with {MIN_INDEPENDENT_POLICIES} "
            "or more policies never trained on P[Love]",
            "passed": pearson is not None
            and pearson["low"] > MIN_CORRELATION_LOWER_LIMIT
            and independent_count >= MIN_INDEPENDENT_POLICIES,
        },
    }


def measure_association(
    policies: Sequence[PolicyResult], *, seed: int, resamples: int = BOOTSTRAP_RESAMPLES
) -> dict[str, Any]:
    """All measures of one group; those that its size or variance does not allow are None."""
    x, y = (np.array([getattr(policy, name) for policy in policies]) for name in ("offline", "online"))
    result: dict[str, Any] = {
        "policies": len(policies),
        "range_of_lifts": [float(y.min()), float(y.max())] if len(y) else None,
        "sign_agreement": _compute_proportion_interval(int((np.sign(x) == np.sign(y)).sum()), len(y)),
    }
    measures = ("pearson", "spearman", "disattenuated", "bootstrap", "leave_one_out")
    if len(policies) < MIN_POLICIES or x.std() == 0.0 or y.std() == 0.0:
        return result | dict.fromkeys(measures)
    pearson = stats.pearsonr(x, y)
    limits = pearson.confidence_interval(CONFIDENCE_LEVEL)
    r = float(pearson.statistic)
    rho = float(stats.spearmanr(x, y).statistic)
    result["pearson"] = {"r": r, "low": float(limits.low), "high": float(limits.high), "p": float(pearson.pvalue)}
    result["spearman"] = {"rho": rho} | _compute_fisher_interval(rho, np.sqrt((1.0 + rho**2 / 2.0) / (len(x) - 3)))
    result["disattenuated"] = _disattenuate(policies, r, float(limits.low), float(limits.high))
    result["bootstrap"] = _bootstrap_interval(x, y, resamples, seed)
    result["leave_one_out"] = _leave_one_out_range(policies, x, y)
    return result


def _compute_fisher_interval(correlation: float, standard_error: float) -> dict[str, float]:
    # atanh(+-1) is infinite: a perfect correlation has no interval on this scale.
    if abs(correlation) >= 1.0:
        return {"low": correlation, "high": correlation}
    center, margin = np.arctanh(correlation), stats.norm.ppf(0.5 + CONFIDENCE_LEVEL / 2.0) * standard_error
    return {"low": float(np.tanh(center - margin)), "high": float(np.tanh(center + margin))}


def estimate_reliability(values: Floats, standard_errors: Floats) -> float:
    """Share of the variance of `values` [n] that is not measurement noise: 1 - mean(se^2) / var, in [0, 1]."""
    return max(0.0, 1.0 - float(np.square(standard_errors).mean()) / float(values.var(ddof=1)))


def _disattenuate(policies: Sequence[PolicyResult], r: float, low: float, high: float) -> dict[str, float] | None:
    """r and its limits over sqrt(reliability offline x reliability online), clipped to +-1; None if all is noise."""
    offline_reliability, online_reliability = (
        estimate_reliability(
            np.array([getattr(policy, name) for policy in policies]),
            np.array([getattr(policy, f"{name}_se") for policy in policies]),
        )
        for name in ("offline", "online")
    )
    scale = float(np.sqrt(offline_reliability * online_reliability))
    if scale == 0.0:
        return None
    corrected = {
        name: float(np.clip(value / scale, -1.0, 1.0)) for name, value in (("r", r), ("low", low), ("high", high))
    }
    return corrected | {"reliability_offline": offline_reliability, "reliability_online": online_reliability}


def _bootstrap_interval(x: Floats, y: Floats, resamples: int, seed: int) -> dict[str, float]:
    """Percentile limits of r over resampled policies; resamples without variance are dropped."""
    index = np.random.default_rng(seed).integers(0, len(x), (resamples, len(x)))
    centered_x, centered_y = (values[index] - values[index].mean(1, keepdims=True) for values in (x, y))
    scale = np.sqrt((centered_x**2).sum(1) * (centered_y**2).sum(1))
    r = (centered_x * centered_y).sum(1)[scale > 0.0] / scale[scale > 0.0]
    low, high = np.quantile(r, [(1.0 - CONFIDENCE_LEVEL) / 2.0, (1.0 + CONFIDENCE_LEVEL) / 2.0])
    return {"low": float(low), "high": float(high)}


def _leave_one_out_range(policies: Sequence[PolicyResult], x: Floats, y: Floats) -> dict[str, Any] | None:
    """Lowest and highest r with one policy excluded, and which policy that is."""
    correlations = []
    for n, policy in enumerate(policies):
        is_included = np.arange(len(x)) != n
        if x[is_included].std() > 0.0 and y[is_included].std() > 0.0:
            correlations.append((float(np.corrcoef(x[is_included], y[is_included])[0, 1]), policy.policy))
    if not correlations:
        return None
    lowest, highest = min(correlations), max(correlations)
    return {"low": lowest[0], "low_without": lowest[1], "high": highest[0], "high_without": highest[1]}


def _compute_proportion_interval(hits: int, total: int) -> dict[str, Any] | None:
    """Share with exact limits (Clopper and Pearson 1934); None for an empty group."""
    if total == 0:
        return None
    limits = stats.binomtest(hits, total).proportion_ci(CONFIDENCE_LEVEL)
    return {"share": hits / total, "hits": hits, "of": total, "low": float(limits.low), "high": float(limits.high)}


def _measure_gate_performance(policies: Sequence[PolicyResult], is_blocked: Sequence[bool]) -> dict[str, Any]:
    """Performance of a gate: share of blocked policies among those that fell online and among the others.

    Whether a policy fell is decided by its measured lift; `unclear` counts those whose lift interval contains zero.
    """
    pairs = list(zip(policies, is_blocked, strict=True))
    blocked_regressions = [blocked for policy, blocked in pairs if policy.online < 0.0]
    blocked_others = [blocked for policy, blocked in pairs if policy.online >= 0.0]
    return {
        "recall_of_regressions": _compute_proportion_interval(sum(blocked_regressions), len(blocked_regressions)),
        "false_blocks": _compute_proportion_interval(sum(blocked_others), len(blocked_others)),
        "unclear": sum(abs(policy.online) <= Z_95 * policy.online_se for policy in policies),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sub-command; the last line of stdout is JSON, and an error is one message on stderr."""
    parser = CommandParser("rluf.evaluate correlate", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="JSON lines, one policy per row")
    parser.add_argument("--control", metavar="POLICY", help="policy whose offline mean the others are compared with")
    parser.add_argument("--seed", type=int, default=1, help="seed of the bootstrap over policies (default 1)")
    args = parser.parse_args(arguments)

    def run_and_print() -> None:
        from rluf.evaluate.correlation import correlate_policies, read_policies
        from rluf.evaluate.tables import format_correlation_report
        from rluf.utils.files import to_jsonable

        report = correlate_policies(read_policies(args.data, args.control), seed=args.seed)
        sys.stdout.write(format_correlation_report(report))
        sys.stdout.write(json.dumps(to_jsonable(report), allow_nan=False) + "\n")

    return run_command(run_and_print)
