"""Does the offline score foretell the online lift: correlation over policies, and the release gate it would make.

One policy a row. Both numbers carry noise, which pulls the correlation towards zero; the disattenuated one says how
strong the link would be without it (Spearman 1904). The interval of r is Fisher's: atanh(r) +- 1.96 / sqrt(n - 3);
that of Spearman's rho has the variance (1 + rho^2 / 2) / (n - 3) (Bonett and Wright 2000).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rluf.errors import DataError
from rluf.evaluate.effects import CONFIDENCE

Floats = NDArray[np.float64]
FEWEST = 4
"""Fisher's interval needs n - 3 > 0."""
PASS_LOW = 0.7
"""The claim holds when the lower limit of r lies above this ..."""
PASS_APART = 5
"""... with no fewer policies than this that never trained on P[Love]: else r may show one loop feeding itself."""
RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Policy:
    """One policy: mean offline score and online lift, each with its standard error (0 where unknown).

    `trained_on_love` says that P[Love] was part of its reward, `hacked` that it was found to cheat it.
    """

    policy: str
    offline: float
    online: float
    offline_se: float = 0.0
    online_se: float = 0.0
    trained_on_love: bool = True
    hacked: bool = False


def read_policies(path: Path, control: str | None = None) -> list[Policy]:
    """Policies of a JSON lines file, one a row. DataError that names the line for anything amiss.

    With `control` offline becomes the change from that policy's, and the policy itself, whose lift is 0 by definition,
    is left out. Its own error then stands in every row alike and moves them together, so it is not added.
    """
    if not path.is_file():
        raise DataError(f"{path} is no file; give JSON lines with policy, offline, online")
    found = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        if line.strip():
            try:
                found.append(_policy(json.loads(line)))
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(f"{path} line {number}: {error}; a row is {Policy.__doc__}") from error
    names = [one.policy for one in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path}: policy {twice[0]!r} comes more than once; give each policy one row")
    if control is None:
        return found
    if control not in names:
        raise DataError(f"{path}: no policy {control!r} for --control; there are {', '.join(names)}")
    base = found[names.index(control)].offline
    return [replace(one, offline=one.offline - base) for one in found if one.policy != control]


def _policy(row: Mapping[str, Any]) -> Policy:
    unknown = sorted(set(row) - set(Policy.__slots__))
    missing = [name for name in ("policy", "offline", "online") if name not in row]
    if unknown or missing:
        raise ValueError(f"unknown field {unknown[0]!r}" if unknown else f"missing field {missing[0]!r}")
    numbers = {name: float(row.get(name, 0.0)) for name in ("offline", "online", "offline_se", "online_se")}
    if not all(np.isfinite(list(numbers.values()))) or min(numbers["offline_se"], numbers["online_se"]) < 0.0:
        raise ValueError("offline and online must be finite, their standard errors 0 or above")
    flags = {name: row.get(name, default) for name, default in (("trained_on_love", True), ("hacked", False))}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise ValueError("trained_on_love and hacked must be true or false")
    return Policy(
        str(row["policy"]), numbers["offline"], numbers["online"], numbers["offline_se"], numbers["online_se"],
        flags["trained_on_love"], flags["hacked"],
    )  # fmt: skip


def correlate(policies: Sequence[Policy], *, seed: int = 1) -> dict[str, Any]:
    """Correlations of all policies, of those not hacked, never trained on P[Love], trained on it, hacked, and of the
    half with the smallest lifts; the gate; the verdict by the pass rule. DataError for fewer than four policies."""
    if len(policies) < FEWEST:
        raise DataError(f"{len(policies)} policies tell no correlation; give {FEWEST} or more, better 20")
    order = np.argsort([abs(one.online) for one in policies], kind="stable")
    half = [policies[n] for n in order[: -(-len(policies) // 2)]]
    groups = {
        "all": list(policies),
        "not_hacked": [one for one in policies if not one.hacked],
        "never_trained_on_love": [one for one in policies if not one.trained_on_love],
        "trained_on_love": [one for one in policies if one.trained_on_love],
        "hacked_only": [one for one in policies if one.hacked],
        "smaller_half_of_lifts": half,
    }
    found = {name: association(members, seed=seed) for name, members in groups.items()}
    every = found["all"]
    low = every["pearson"]["low"] if every["pearson"] else None
    return {
        "policies": len(policies),
        "groups": found,
        "gate": {name: _gate(policies, blocked) for name, blocked in (
            ("mean_below_zero", [one.offline < 0.0 for one in policies]),
            ("not_clear_of_zero", [one.offline - 1.96 * one.offline_se <= 0.0 for one in policies]),
        )},
        "verdict": {
            "rule": f"lower limit of Pearson's r above {PASS_LOW}, with {PASS_APART} policies or more that never "
                    "trained on P[Love]",
            "passed": low is not None and low > PASS_LOW and found["never_trained_on_love"]["policies"] >= PASS_APART,
        },
    }  # fmt: skip


def association(policies: Sequence[Policy], *, seed: int, resamples: int = RESAMPLES) -> dict[str, Any]:
    """All measures of one group; those that its size or its spread does not allow are None."""
    x, y = (np.array([getattr(one, name) for one in policies]) for name in ("offline", "online"))
    found: dict[str, Any] = {
        "policies": len(policies),
        "range_of_lifts": [float(y.min()), float(y.max())] if len(y) else None,
        "sign_agreement": _share(int((np.sign(x) == np.sign(y)).sum()), len(y)),
    }
    names = ("pearson", "spearman", "disattenuated", "bootstrap", "leave_one_out")
    if len(policies) < FEWEST or x.std() == 0.0 or y.std() == 0.0:
        return found | dict.fromkeys(names)
    pearson = stats.pearsonr(x, y)
    limits = pearson.confidence_interval(CONFIDENCE)
    r = float(pearson.statistic)
    rho = float(stats.spearmanr(x, y).statistic)
    found["pearson"] = {"r": r, "low": float(limits.low), "high": float(limits.high), "p": float(pearson.pvalue)}
    found["spearman"] = {"rho": rho} | _fisher(rho, np.sqrt((1.0 + rho**2 / 2.0) / (len(x) - 3)))
    found["disattenuated"] = _disattenuated(policies, r, float(limits.low), float(limits.high))
    found["bootstrap"] = _bootstrap(x, y, resamples, seed)
    found["leave_one_out"] = _leave_one_out(policies, x, y)
    return found


def _fisher(r: float, error: float) -> dict[str, float]:
    if abs(r) >= 1.0:
        return {"low": r, "high": r}
    middle, reach = np.arctanh(r), stats.norm.ppf(0.5 + CONFIDENCE / 2.0) * error
    return {"low": float(np.tanh(middle - reach)), "high": float(np.tanh(middle + reach))}


def reliability(values: Floats, errors: Floats) -> float:
    """Share of the variance of `values` [n] that is no measurement noise: 1 - mean(se^2) / var, in [0, 1]."""
    return max(0.0, 1.0 - float(np.square(errors).mean()) / float(values.var(ddof=1)))


def _disattenuated(policies: Sequence[Policy], r: float, low: float, high: float) -> dict[str, float] | None:
    """r, and its limits, over sqrt(reliability offline x reliability online), cut at +-1; None where all is noise."""
    parts = [
        reliability(np.array([getattr(one, name) for one in policies]),
                    np.array([getattr(one, f"{name}_se") for one in policies]))
        for name in ("offline", "online")
    ]  # fmt: skip
    scale = float(np.sqrt(parts[0] * parts[1]))
    if scale == 0.0:
        return None
    values = {name: float(np.clip(one / scale, -1.0, 1.0)) for name, one in (("r", r), ("low", low), ("high", high))}
    return values | {"reliability_offline": parts[0], "reliability_online": parts[1]}


def _bootstrap(x: Floats, y: Floats, resamples: int, seed: int) -> dict[str, float]:
    """Percentile limits of r over policies drawn with replacement; draws without spread are left out."""
    draw = np.random.default_rng(seed).integers(0, len(x), (resamples, len(x)))
    a, b = (one[draw] - one[draw].mean(1, keepdims=True) for one in (x, y))
    scale = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    r = (a * b).sum(1)[scale > 0.0] / scale[scale > 0.0]
    low, high = np.quantile(r, [(1.0 - CONFIDENCE) / 2.0, (1.0 + CONFIDENCE) / 2.0])
    return {"low": float(low), "high": float(high)}


def _leave_one_out(policies: Sequence[Policy], x: Floats, y: Floats) -> dict[str, Any] | None:
    """The lowest and highest r when one policy is left out, and whose absence gives it."""
    found = []
    for n, one in enumerate(policies):
        rest = np.arange(len(x)) != n
        if x[rest].std() > 0.0 and y[rest].std() > 0.0:
            found.append((float(np.corrcoef(x[rest], y[rest])[0, 1]), one.policy))
    if not found:
        return None
    return {"low": min(found)[0], "low_without": min(found)[1], "high": max(found)[0], "high_without": max(found)[1]}


def _share(hits: int, of: int) -> dict[str, Any] | None:
    """A share with exact limits (Clopper and Pearson 1934); None of nothing."""
    if of == 0:
        return None
    limits = stats.binomtest(hits, of).proportion_ci(CONFIDENCE)
    return {"share": hits / of, "hits": hits, "of": of, "low": float(limits.low), "high": float(limits.high)}


def _gate(policies: Sequence[Policy], blocked: Sequence[bool]) -> dict[str, Any]:
    """How a gate would have done: share of the policies that fell online and were blocked, and of the others that were.

    Whether a policy fell is told by its measured lift; `unclear` counts those whose lift's interval holds zero.
    """
    pairs = list(zip(policies, blocked, strict=True))
    fell = [stop for one, stop in pairs if one.online < 0.0]
    rose = [stop for one, stop in pairs if one.online >= 0.0]
    return {
        "recall_of_regressions": _share(sum(fell), len(fell)),
        "false_blocks": _share(sum(rose), len(rose)),
        "unclear": sum(abs(one.online) <= 1.96 * one.online_se for one in policies),
    }
