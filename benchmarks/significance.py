"""Are the statistics right: false positives, coverage, CUPED, looking without end, and alarms on planted hacks.

Everything is simulated with a known truth and judged by the library's own functions. Users differ in how easily they
love and in how much they read, and who loves more reads more. Prints one JSON line last, with its seed.

python benchmarks/significance.py [--runs 10000] [--seed 1]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from planted import alarms  # the neighbour in this folder
from scipy import integrate, stats

from rluf.evaluate.correlation import Policy, association
from rluf.evaluate.effects import (
    Totals,
    before_values,
    cuped_effect,
    holm,
    mean_effect,
    proportion_effect,
    ratio_effect,
    sample_ratio,
)
from rluf.evaluate.sequential import FIRST_LOOK, always_valid_margin, always_valid_p, mixture_variance

Floats = NDArray[np.float64]
ALPHA, USERS, CHUNK = 0.05, 1000, 500
LOVE = (1.2, 18.8)
"""Beta of users' own love rates: mean 6%."""
READS = 6.0
LIFT = 1.2


def people(rng: np.random.Generator, runs: int, lift: float = 1.0) -> tuple[Totals, Totals]:
    """What users did in the experiment and in a pre-period of the same length; rates in the experiment times `lift`."""
    own = rng.beta(*LOVE, (runs, USERS))
    mean = READS * (1.0 + own)
    now, before = 1 + rng.poisson(mean), rng.poisson(mean)
    rates = np.minimum(own * lift, 1.0)
    return (
        Totals.of(rng.binomial(now, rates), now),
        Totals.of(rng.binomial(before, own), before),
    )


def truth(lift: float) -> tuple[float, float]:
    """Love per response and the share of users who love at least once, exactly, in a world with that lift."""
    a, b = LOVE
    mean, square = a / (a + b), a * (a + 1) / ((a + b) * (a + b + 1))
    ratio = lift * ((1 + READS) * mean + READS * square) / (1 + READS * (1 + mean))

    def none(p: float) -> float:
        q = min(lift * p, 1.0)
        return float((1 - q) * np.exp(-READS * (1 + p) * q) * stats.beta.pdf(p, a, b))

    return ratio, 1.0 - integrate.quad(none, 0.0, 1.0, limit=200)[0]


def chunks(runs: int) -> Iterator[int]:
    """Sizes of the parts that `runs` experiments are done in, so that they fit in memory."""
    for start in range(0, runs, CHUNK):
        yield min(CHUNK, runs - start)


def fixed_horizon(runs: int, rng: np.random.Generator) -> dict[str, Any]:
    """Shares of false positives of A/A tests, and of intervals that hold the truth of A/B tests with a lift of 20%."""
    wrong: dict[str, list[Floats]] = {}
    held: dict[str, list[Floats]] = {}
    (ratio0, any0), (ratio1, any1) = truth(1.0), truth(LIFT)
    for size in chunks(runs):
        for lift, into in ((1.0, wrong), (LIFT, held)):
            (control, before0), (treated, before1) = people(rng, size), people(rng, size, lift)
            loved = [(one.sums > 0).sum(-1) for one in (control, treated)]
            share = proportion_effect((loved[0], loved[1]), (USERS, USERS))
            ratio = ratio_effect(control, treated)
            reads = mean_effect(control.counts, treated.counts)
            cuped = cuped_effect((control.linear(), treated.linear()), before_values((before0, before1))).effect
            if lift == 1.0:
                tests = {"two_proportions": share.p, "delta_method": ratio.p, "welch": reads.p, "cuped": cuped.p}
                family = holm(np.stack(list(tests.values()), -1)).min(-1)
                naive = proportion_effect(
                    (control.sums.sum(-1), treated.sums.sum(-1)), (control.counts.sum(-1), treated.counts.sum(-1))
                )
                halves = rng.binomial(2 * USERS, 0.5, size)
                srm = sample_ratio(np.stack([halves, 2 * USERS - halves], -1), (0.5, 0.5))[1]
                found = tests | {"srm": srm, "holm_any_of_four": family, "naive_per_response": naive.p}
                into |= {name: [*into.get(name, []), p < ALPHA] for name, p in found.items()}
                continue
            found = {
                "two_proportions": inside(share.low, share.high, any1 - any0),
                "two_proportions_lift": inside(share.lift_low, share.lift_high, any1 / any0 - 1),
                "delta_method": inside(ratio.low, ratio.high, ratio1 - ratio0),
                "delta_method_lift": inside(ratio.lift_low, ratio.lift_high, ratio1 / ratio0 - 1),
                "welch": inside(reads.low, reads.high, 0.0),
                "cuped": inside(cuped.low, cuped.high, ratio1 - ratio0),
                "cuped_lift": inside(cuped.lift_low, cuped.lift_high, ratio1 / ratio0 - 1),
            }
            into |= {name: [*into.get(name, []), one] for name, one in found.items()}
    return {"false_positives": shares(wrong), "coverage": shares(held)}


def inside(low: Floats, high: Floats, value: float) -> NDArray[np.bool_]:
    """Which intervals [...] hold the value."""
    return (low <= value) & (value <= high)


def shares(found: dict[str, list[Floats]]) -> dict[str, float]:
    """Mean of each list of chunks, to four digits."""
    return {name: round(float(np.concatenate(parts).mean()), 4) for name, parts in found.items()}


def cumulated(one: Totals) -> tuple[Floats, Floats]:
    """Ratio and its delta-method variance [..., U] after each user: ratio_effect's numbers without its loop."""
    count = np.arange(1, one.users + 1)
    s, n, ss, sn, nn = (
        np.cumsum(part, -1)
        for part in (one.sums, one.counts, one.sums**2, one.sums * one.counts, one.counts**2)
    )  # fmt: skip
    ratio = s / n
    residual = ss - 2 * ratio * sn + ratio**2 * nn
    return ratio, residual * count / np.maximum(count - 1, 1) / n**2


def every_user(runs: int, rng: np.random.Generator) -> dict[str, float]:
    """A look after each pair of users from the first allowed look to the end: A/A errors, coverage under a lift."""
    found: dict[str, list[Floats]] = {}
    gap = truth(LIFT)[0] - truth(1.0)[0]
    for size in chunks(runs):
        control = people(rng, size)[0]
        for lift, true in ((1.0, 0.0), (LIFT, gap)):
            treated = people(rng, size, lift)[0]
            arms = cumulated(control), cumulated(treated)
            difference = (arms[1][0] - arms[0][0])[:, FIRST_LOOK - 1 :]
            variance = (arms[1][1] + arms[0][1])[:, FIRST_LOOK - 1 :]
            whole = ratio_effect(control, treated)
            np.testing.assert_allclose(variance[:, -1], whole.error**2, rtol=1e-9)
            tau = mixture_variance(variance[:, :1] * FIRST_LOOK / USERS, ALPHA)
            missed = (np.abs(difference - true) > always_valid_margin(variance, tau, ALPHA)).any(-1)
            if lift == 1.0:
                z = np.abs(difference) / np.sqrt(variance)
                p = always_valid_p(difference, variance, tau)[:, -1]
                part = {"always_valid": missed, "always_valid_p": p < ALPHA,
                        "plain_test": (z > stats.norm.ppf(1 - ALPHA / 2)).any(-1)}  # fmt: skip
            else:
                part = {"coverage_of_all_looks": ~missed}
            found |= {name: [*found.get(name, []), one] for name, one in part.items()}
    return shares(found)


def returning_users(runs: int, rng: np.random.Generator, users: int = 500, days: int = 30) -> dict[str, float]:
    """Users arrive over ten days and come back daily; a look each day at everything so far."""
    found: dict[str, list[Floats]] = {}
    for size in chunks(runs):
        shape = (2, size, users)
        own, arrival = rng.beta(*LOVE, shape), rng.integers(0, 10, shape)
        sums, counts = np.zeros(shape), np.zeros(shape)
        differences, variances = [], []
        for day in range(days):
            reads = rng.poisson(0.7 * (1.0 + own)) * (arrival <= day)
            reads += arrival == day
            counts += reads
            sums += rng.binomial(reads, own)
            effect = ratio_effect(Totals(sums[0], counts[0]), Totals(sums[1], counts[1]))
            differences.append(effect.difference)
            variances.append(effect.error**2)
        difference, variance = np.stack(differences, -1)[:, 2:], np.stack(variances, -1)[:, 2:]
        tau = mixture_variance(variance[:, :1] * 0.3, ALPHA)
        z = np.abs(difference) / np.sqrt(variance)
        part = {
            "always_valid": always_valid_p(difference, variance, tau)[:, -1] < ALPHA,
            "plain_test": (z > stats.norm.ppf(1 - ALPHA / 2)).any(-1),
        }
        found |= {name: [*found.get(name, []), one] for name, one in part.items()}
    return shares(found)


def cuped_theory(runs: int, rng: np.random.Generator, users: int = 400) -> dict[str, dict[str, float]]:
    """Variance of the effect over experiments with CUPED over that without it, against 1 - correlation^2."""
    found = {}
    for rho in (0.3, 0.6, 0.9):
        plain, adjusted, told = [], [], []
        for size in chunks(runs):
            x = rng.normal(size=(2, size, users))
            y = rho * x + np.sqrt(1 - rho**2) * rng.normal(size=x.shape)
            one = cuped_effect((y[0], y[1]), (x[0], x[1]))
            raw = mean_effect(y[0], y[1])
            plain.append(raw.difference)
            adjusted.append(one.effect.difference)
            told.append((one.effect.error / raw.error) ** 2)
        seen = np.concatenate(adjusted).var() / np.concatenate(plain).var()
        found[f"{rho:g}"] = {
            "theory": round(1 - rho**2, 4), "reported": round(float(np.concatenate(told).mean()), 4),
            "between_experiments": round(float(seen), 4),
        }  # fmt: skip
    return found


def correlation(runs: int, rng: np.random.Generator, count: int = 20, true: float = 0.9) -> dict[str, float]:
    """Coverage of r's interval over `count` policies: for r as measured, and without noise for the truth."""
    noise = 0.3
    seen = true / (1 + noise**2)
    found: dict[str, list[bool]] = {"pearson": [], "spearman": [], "without_noise": []}
    for _ in range(runs):
        x = rng.normal(size=count)
        y = true * x + np.sqrt(1 - true**2) * rng.normal(size=count)
        x, y = x + noise * rng.normal(size=count), y + noise * rng.normal(size=count)
        rows = [Policy(str(n), a, b, noise, noise) for n, (a, b) in enumerate(zip(x, y, strict=True))]
        told = association(rows, seed=0, resamples=1)
        rank = 6 / np.pi * np.arcsin(seen / 2)
        for name, part, value in (("pearson", "pearson", seen), ("spearman", "spearman", rank),
                                  ("without_noise", "disattenuated", true)):  # fmt: skip
            found[name].append(bool(told[part]["low"] <= value <= told[part]["high"]))
    return {name: round(float(np.mean(flags)), 4) for name, flags in found.items()}


def main() -> None:
    """Run all of it and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000, help="experiments behind each fixed-horizon figure")
    parser.add_argument("--looked-at", type=int, default=2000, help="experiments behind each sequential figure")
    parser.add_argument("--unhacked", type=int, default=1000, help="runs behind the false-alarm rates")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    streams = [np.random.default_rng(one) for one in np.random.SeedSequence(given.seed).spawn(6)]
    started = time.process_time()
    line: dict[str, Any] = {
        "benchmark": "significance", "seed": given.seed, "alpha": ALPHA, "users_per_arm": USERS, "runs": given.runs,
        "looked_at": given.looked_at,
    }  # fmt: skip
    parts = (
        ("fixed_horizon", lambda: fixed_horizon(given.runs, streams[0])),
        ("look_after_every_user", lambda: every_user(given.looked_at, streams[1])),
        ("daily_looks_at_returning_users", lambda: returning_users(given.looked_at, streams[2])),
        ("cuped_variance_left", lambda: cuped_theory(given.runs, streams[3])),
        ("coverage_of_correlations", lambda: correlation(given.looked_at, streams[5])),
        ("alarms", lambda: alarms(given.unhacked, streams[4])),
    )
    for name, work in parts:
        line[name] = work()
        sys.stdout.write(f"{name} ({time.process_time() - started:.0f} s of CPU): {json.dumps(line[name])}\n")
    line["cpu_seconds"] = round(time.process_time() - started, 1)
    sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
