"""Error rates and coverage of the statistics: A/B tests, CUPED and repeated checks.

Everything is simulated with a known truth and evaluated with the library's own functions. Users differ in how easily
they love and in how much they read, and users who love more read more. Prints one JSON line last, with its seed.

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
from scipy import integrate, stats

from rluf.evaluate.ab_analysis import analyze_experiment
from rluf.evaluate.ab_design import ExperimentDesign
from rluf.evaluate.correlation import PolicyResult, measure_association
from rluf.evaluate.effects import (
    UserTotals,
    adjust_by_holm,
    adjust_totals_by_cuped,
    build_pre_period_covariate,
    estimate_mean_effect,
    estimate_proportion_effect,
    estimate_ratio_effect,
    sample_ratio_test,
)
from rluf.evaluate.events import SECONDS_PER_DAY, EventLog
from rluf.evaluate.power import PowerQuery, plan_experiment
from rluf.evaluate.sequential import choose_mixture_variance, compute_always_valid_margin, compute_always_valid_p_values

Floats = NDArray[np.float64]
ALPHA, USERS_PER_ARM, CHUNK_EXPERIMENTS = 0.05, 1000, 500
LOVE_RATE_BETA = (1.2, 18.8)
"""Beta distribution of the users' own love rates: mean 6%."""
MEAN_EXTRA_READS = 6.0
LIFT = 1.2
FIRST_LOOK_USERS = 100
"""Users of each arm at the first look of the checks after every user."""
MEAN_RESPONSES = 8.0
RATE_CONCENTRATION = 0.3
"""First parameter of the beta distribution of rare love: most users hardly ever love, a few often do."""
CANARY_USERS, CANARY_DAYS, CANARY_LOOKS = 2000, 14, 7
PLANNED_RATE, PLANNED_LIFT, PLANNED_ICC, PLANNED_POWER = 0.05, 0.15, 0.05, 0.8


def simulate_arm(rng: np.random.Generator, experiments: int, lift: float = 1.0) -> tuple[UserTotals, UserTotals]:
    """Totals of an arm's users in the experiment, with rates times `lift`, and in a pre-period of the same length."""
    user_rates = rng.beta(*LOVE_RATE_BETA, (experiments, USERS_PER_ARM))
    mean_reads = MEAN_EXTRA_READS * (1.0 + user_rates)
    responses, pre_responses = 1 + rng.poisson(mean_reads), rng.poisson(mean_reads)
    love_rates = np.minimum(user_rates * lift, 1.0)
    return (
        UserTotals.from_arrays(rng.binomial(responses, love_rates), responses),
        UserTotals.from_arrays(rng.binomial(pre_responses, user_rates), pre_responses),
    )


def true_rates(lift: float) -> tuple[float, float]:
    """Exact love per response, and exact share of users who love at least once, with that lift."""
    a, b = LOVE_RATE_BETA
    mean, mean_square = a / (a + b), a * (a + 1) / ((a + b) * (a + b + 1))
    ratio = (
        lift * ((1 + MEAN_EXTRA_READS) * mean + MEAN_EXTRA_READS * mean_square) / (1 + MEAN_EXTRA_READS * (1 + mean))
    )

    def density_without_love(rate: float) -> float:
        love_rate = min(lift * rate, 1.0)
        return float((1 - love_rate) * np.exp(-MEAN_EXTRA_READS * (1 + rate) * love_rate) * stats.beta.pdf(rate, a, b))

    return ratio, 1.0 - integrate.quad(density_without_love, 0.0, 1.0, limit=200)[0]


def chunk_sizes(experiments: int) -> Iterator[int]:
    """Sizes of the chunks of `experiments`, so that they fit in memory."""
    for start in range(0, experiments, CHUNK_EXPERIMENTS):
        yield min(CHUNK_EXPERIMENTS, experiments - start)


def check_fixed_horizon(experiments: int, rng: np.random.Generator) -> dict[str, Any]:
    """Shares of false positives in A/A tests, and of intervals that cover the truth in A/B tests with a lift of 20%."""
    false_positives: dict[str, list[Floats]] = {}
    covered: dict[str, list[Floats]] = {}
    (base_ratio, base_any), (treated_ratio, treated_any) = true_rates(1.0), true_rates(LIFT)
    for chunk_size in chunk_sizes(experiments):
        for lift, flags_by_test in ((1.0, false_positives), (LIFT, covered)):
            (control, control_pre), (treatment, treated_pre) = (
                simulate_arm(rng, chunk_size),
                simulate_arm(rng, chunk_size, lift),
            )
            lovers = [(totals.sums > 0).sum(-1) for totals in (control, treatment)]
            proportion = estimate_proportion_effect((lovers[0], lovers[1]), (USERS_PER_ARM, USERS_PER_ARM))
            ratio = estimate_ratio_effect(control, treatment)
            responses = estimate_mean_effect(control.counts, treatment.counts)
            covariates = build_pre_period_covariate((control_pre, treated_pre))
            cuped = estimate_ratio_effect(*adjust_totals_by_cuped((control, treatment), covariates).totals)
            if lift == 1.0:
                tests = {
                    "two_proportions": proportion.p,
                    "delta_method": ratio.p,
                    "welch": responses.p,
                    "cuped": cuped.p,
                }
                holm_p = adjust_by_holm(np.stack(list(tests.values()), -1)).min(-1)
                per_response = estimate_proportion_effect(
                    (control.sums.sum(-1), treatment.sums.sum(-1)), (control.counts.sum(-1), treatment.counts.sum(-1))
                )
                control_sizes = rng.binomial(2 * USERS_PER_ARM, 0.5, chunk_size)
                sample_ratio_p = sample_ratio_test(
                    np.stack([control_sizes, 2 * USERS_PER_ARM - control_sizes], -1), (0.5, 0.5)
                )[1]
                results = tests | {
                    "srm": sample_ratio_p,
                    "holm_any_of_four": holm_p,
                    "naive_per_response": per_response.p,
                }
                flags_by_test |= {
                    name: [*flags_by_test.get(name, []), values < ALPHA] for name, values in results.items()
                }
                continue
            results = {
                "two_proportions": interval_covers(proportion.low, proportion.high, treated_any - base_any),
                "two_proportions_lift": interval_covers(
                    proportion.lift_low, proportion.lift_high, treated_any / base_any - 1
                ),
                "delta_method": interval_covers(ratio.low, ratio.high, treated_ratio - base_ratio),
                "delta_method_lift": interval_covers(ratio.lift_low, ratio.lift_high, treated_ratio / base_ratio - 1),
                "welch": interval_covers(responses.low, responses.high, 0.0),
                "cuped": interval_covers(cuped.low, cuped.high, treated_ratio - base_ratio),
                "cuped_lift": interval_covers(cuped.lift_low, cuped.lift_high, treated_ratio / base_ratio - 1),
            }
            flags_by_test |= {name: [*flags_by_test.get(name, []), flags] for name, flags in results.items()}
    return {"false_positives": mean_shares(false_positives), "coverage": mean_shares(covered)}


def interval_covers(low: Floats, high: Floats, value: float) -> NDArray[np.bool_]:
    """Which intervals [...] cover the value."""
    return (low <= value) & (value <= high)


def mean_shares(flags_by_name: dict[str, list[Floats]]) -> dict[str, float]:
    """Mean of each list of chunks, to four digits."""
    return {name: round(float(np.concatenate(chunks).mean()), 4) for name, chunks in flags_by_name.items()}


def running_ratio(totals: UserTotals) -> tuple[Floats, Floats]:
    """Ratio and its delta-method variance [..., U] after each user, vectorized over users."""
    user_number = np.arange(1, totals.user_count + 1)
    love_sum, response_sum, love_square, cross_product, response_square = (
        np.cumsum(values, -1)
        for values in (totals.sums, totals.counts, totals.sums**2, totals.sums * totals.counts, totals.counts**2)
    )  # fmt: skip
    ratio = love_sum / response_sum
    residual = love_square - 2 * ratio * cross_product + ratio**2 * response_square
    return ratio, residual * user_number / np.maximum(user_number - 1, 1) / response_sum**2


def check_after_every_user(experiments: int, rng: np.random.Generator) -> dict[str, float]:
    """Checks after each pair of users, from the first allowed one to the end: A/A errors, coverage under a lift."""
    flags_by_name: dict[str, list[Floats]] = {}
    true_difference = true_rates(LIFT)[0] - true_rates(1.0)[0]
    for chunk_size in chunk_sizes(experiments):
        control = simulate_arm(rng, chunk_size)[0]
        for lift, true_effect in ((1.0, 0.0), (LIFT, true_difference)):
            treatment = simulate_arm(rng, chunk_size, lift)[0]
            running_arms = running_ratio(control), running_ratio(treatment)
            difference = (running_arms[1][0] - running_arms[0][0])[:, FIRST_LOOK_USERS - 1 :]
            variance = (running_arms[1][1] + running_arms[0][1])[:, FIRST_LOOK_USERS - 1 :]
            final_effect = estimate_ratio_effect(control, treatment)
            # The vectorized variance must agree with the library's at the end, which pools the arms where that is more.
            np.testing.assert_allclose(variance[:, -1], final_effect.error**2, rtol=0.05)
            tau = choose_mixture_variance(variance[:, :1] * FIRST_LOOK_USERS / USERS_PER_ARM, ALPHA)
            excludes_truth = (np.abs(difference - true_effect) > compute_always_valid_margin(variance, tau, ALPHA)).any(
                -1
            )
            if lift == 1.0:
                z = np.abs(difference) / np.sqrt(variance)
                p = compute_always_valid_p_values(difference, variance, tau)[:, -1]
                chunk_flags = {"always_valid": excludes_truth, "always_valid_p": p < ALPHA,
                        "plain_test": (z > stats.norm.ppf(1 - ALPHA / 2)).any(-1)}  # fmt: skip
            else:
                chunk_flags = {"coverage_of_all_looks": ~excludes_truth}
            flags_by_name |= {name: [*flags_by_name.get(name, []), flags] for name, flags in chunk_flags.items()}
    return mean_shares(flags_by_name)


def check_returning_users(
    experiments: int, rng: np.random.Generator, users: int = 500, days: int = 30
) -> dict[str, float]:
    """Users arrive over ten days and return daily; one check per day of everything so far."""
    flags_by_name: dict[str, list[Floats]] = {}
    for chunk_size in chunk_sizes(experiments):
        shape = (2, chunk_size, users)
        user_rates, arrival = rng.beta(*LOVE_RATE_BETA, shape), rng.integers(0, 10, shape)
        sums, counts = np.zeros(shape), np.zeros(shape)
        differences, variances = [], []
        for day in range(days):
            reads = rng.poisson(0.7 * (1.0 + user_rates)) * (arrival <= day)
            reads += arrival == day
            counts += reads
            sums += rng.binomial(reads, user_rates)
            effect = estimate_ratio_effect(UserTotals(sums[0], counts[0]), UserTotals(sums[1], counts[1]))
            differences.append(effect.difference)
            variances.append(effect.error**2)
        difference, variance = np.stack(differences, -1)[:, 2:], np.stack(variances, -1)[:, 2:]
        tau = choose_mixture_variance(variance[:, :1] * 0.3, ALPHA)
        z = np.abs(difference) / np.sqrt(variance)
        chunk_flags = {
            "always_valid": compute_always_valid_p_values(difference, variance, tau)[:, -1] < ALPHA,
            "plain_test": (z > stats.norm.ppf(1 - ALPHA / 2)).any(-1),
        }
        flags_by_name |= {name: [*flags_by_name.get(name, []), flags] for name, flags in chunk_flags.items()}
    return mean_shares(flags_by_name)


def simulate_counts(rng: np.random.Generator, activity: str, users: int) -> NDArray[np.int64]:
    """Responses of each user [U], mean about 8: equal, or Poisson with a gamma, lognormal or Pareto mean."""
    if activity == "equal":
        return np.full(users, round(MEAN_RESPONSES))
    means = {
        "gamma": lambda: rng.gamma(0.8, MEAN_RESPONSES / 0.8, users),
        "lognormal": lambda: rng.lognormal(np.log(MEAN_RESPONSES) - 0.5, 1.0, users),
        "lognormal 1.5": lambda: rng.lognormal(np.log(MEAN_RESPONSES) - 0.5 * 1.5**2, 1.5, users),
        "Pareto 1.5": lambda: (rng.pareto(1.5, users) + 1.0) * MEAN_RESPONSES / 3.0,
    }[activity]()
    return rng.poisson(means)


def simulate_log(
    rng: np.random.Generator, counts: NDArray[np.int64], rates: tuple[float, float], treated_share: float, lift: float
) -> EventLog:
    """Events over 14 days of users with `counts` responses [U] and love rates of a beta distribution `rates`."""
    users = len(counts)
    love_rates, is_treated = rng.beta(*rates, users), rng.random(users) < treated_share
    love_rates = np.minimum(love_rates * np.where(is_treated, lift, 1.0), 1.0)
    user_index = rng.permutation(np.repeat(np.arange(users), counts))
    return EventLog(
        user_index=user_index, conversation_index=np.arange(len(user_index)),
        arm_index=is_treated[user_index].astype(np.int64), arm_names=("control", "treatment"),
        user_ids=tuple(map(str, range(users))), duplicate_count=0,
        timestamps=np.sort(rng.random(len(user_index))) * CANARY_DAYS * SECONDS_PER_DAY,
        metric_values={"love": (rng.random(len(user_index)) < love_rates[user_index]).astype(np.float64)},
    )  # fmt: skip


def check_unequal_arms(experiments: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """False alarms of the whole analysis of a love metric in canaries: arm share x love rate x activity."""
    cells = []
    for activity in ("gamma", "lognormal 1.5", "Pareto 1.5"):
        for love_rate in (0.005, 0.02):
            for share in (0.5, 0.1, 0.05):
                flags = []
                rates = RATE_CONCENTRATION, RATE_CONCENTRATION / love_rate - RATE_CONCENTRATION
                design = ExperimentDesign(
                    "control", "treatment", (1 - share, share), metric_names=("love",), look_count=CANARY_LOOKS
                )
                for _ in range(experiments):
                    counts = simulate_counts(rng, activity, CANARY_USERS)
                    report = analyze_experiment(simulate_log(rng, counts, rates, share, 1.0), design)
                    effect, looks = report["metrics"]["love"]["effect"], report["looks"].get("love", [])
                    flags.append((
                        report["metrics"]["love"]["p"] < ALPHA, effect["low"] > 0 or effect["high"] < 0,
                        any(look["low"] > 0 or look["high"] < 0 for look in looks), not looks,
                    ))  # fmt: skip
                shares = [round(float(share_of_flags), 4) for share_of_flags in np.mean(flags, axis=0)]
                names = ("fixed_p", "fixed_interval", "always_valid", "too_few_events")
                cells.append({
                    "activity": activity, "love_rate": love_rate, "treated_share": share,
                    **dict(zip(names, shares, strict=True)),
                })  # fmt: skip
                sys.stdout.write(f"{json.dumps(cells[-1])}\n")
                sys.stdout.flush()
    return cells


def check_planned_power(experiments: int, rng: np.random.Generator) -> dict[str, dict[str, float]]:
    """Power that the analysis delivers at the users that the planner asks for, and that without activity_cv."""
    delivered = {}
    rates = PLANNED_RATE * (1 / PLANNED_ICC - 1), (1 - PLANNED_RATE) * (1 / PLANNED_ICC - 1)
    for activity in ("equal", "gamma", "lognormal"):
        population = simulate_counts(rng, activity, 1_000_000)
        population = population[population > 0]  # a user without a response is not in the log
        query = PowerQuery(
            PLANNED_RATE, PLANNED_LIFT, responses=float(population.mean()), icc=PLANNED_ICC, power=PLANNED_POWER,
            activity_cv=float(population.std() / population.mean()),
        )  # fmt: skip
        users = sum(plan_experiment(query)["designs"]["one_look"][f"{arm}_users"] for arm in ("control", "treatment"))
        flags = []
        for _ in range(experiments):
            log = simulate_log(rng, rng.choice(population, users), rates, 0.5, 1 + PLANNED_LIFT)
            report = analyze_experiment(log, ExperimentDesign("control", "treatment", look_count=1))
            flags.append(report["metrics"]["love"]["primary"]["verdict"] == "pass")
        delivered[activity] = {
            "users": users, "activity_cv": round(query.activity_cv, 2), "power": round(float(np.mean(flags)), 4)
        }  # fmt: skip
    return delivered


def check_cuped_variance(experiments: int, rng: np.random.Generator, users: int = 400) -> dict[str, dict[str, float]]:
    """Variance of the effect between experiments with CUPED relative to without, against 1 - correlation^2."""
    variance_by_correlation = {}
    for rho in (0.3, 0.6, 0.9):
        plain_effects, cuped_effects, reported = [], [], []
        for chunk_size in chunk_sizes(experiments):
            x = rng.normal(size=(2, chunk_size, users))
            y = rho * x + np.sqrt(1 - rho**2) * rng.normal(size=x.shape)
            cuped = adjust_totals_by_cuped((UserTotals.from_arrays(y[0]), UserTotals.from_arrays(y[1])), (x[0], x[1]))
            adjusted = estimate_mean_effect(*(totals.sums for totals in cuped.totals))
            unadjusted = estimate_mean_effect(y[0], y[1])
            plain_effects.append(unadjusted.difference)
            cuped_effects.append(adjusted.difference)
            reported.append((adjusted.error / unadjusted.error) ** 2)
        observed = np.concatenate(cuped_effects).var() / np.concatenate(plain_effects).var()
        variance_by_correlation[f"{rho:g}"] = {
            "theory": round(1 - rho**2, 4), "reported": round(float(np.concatenate(reported).mean()), 4),
            "between_experiments": round(float(observed), 4),
        }  # fmt: skip
    return variance_by_correlation


def check_correlation_coverage(
    experiments: int, rng: np.random.Generator, policy_count: int = 20, true_r: float = 0.9
) -> dict[str, float]:
    """Coverage of the intervals of r over `policy_count` policies: as measured, and disattenuated for the true r."""
    noise = 0.3
    noisy_r = true_r / (1 + noise**2)
    coverage_flags: dict[str, list[bool]] = {"pearson": [], "spearman": [], "without_noise": []}
    for _ in range(experiments):
        x = rng.normal(size=policy_count)
        y = true_r * x + np.sqrt(1 - true_r**2) * rng.normal(size=policy_count)
        x, y = x + noise * rng.normal(size=policy_count), y + noise * rng.normal(size=policy_count)
        policies = [
            PolicyResult(str(number), a, b, noise, noise) for number, (a, b) in enumerate(zip(x, y, strict=True))
        ]
        association = measure_association(policies, seed=0, resamples=1)
        spearman_rho = 6 / np.pi * np.arcsin(noisy_r / 2)
        for name, key, true_value in (("pearson", "pearson", noisy_r), ("spearman", "spearman", spearman_rho),
                                  ("without_noise", "disattenuated", true_r)):  # fmt: skip
            coverage_flags[name].append(bool(association[key]["low"] <= true_value <= association[key]["high"]))
    return {name: round(float(np.mean(flags)), 4) for name, flags in coverage_flags.items()}


def main() -> None:
    """Run all checks and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000, help="experiments behind each fixed-horizon figure")
    parser.add_argument("--sequential-runs", type=int, default=2000, help="experiments behind each sequential figure")
    parser.add_argument("--canary-runs", type=int, default=1000, help="experiments behind each canary and plan")
    parser.add_argument("--only", nargs="+", help="checks to run (default: all)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rngs = [np.random.default_rng(sequence) for sequence in np.random.SeedSequence(args.seed).spawn(8)]
    started = time.process_time()
    report: dict[str, Any] = {
        "benchmark": "significance",
        "seed": args.seed,
        "alpha": ALPHA,
        "users_per_arm": USERS_PER_ARM,
        "runs": args.runs,
        "sequential_runs": args.sequential_runs,
    }
    checks = (
        ("fixed_horizon", lambda: check_fixed_horizon(args.runs, rngs[0])),
        ("look_after_every_user", lambda: check_after_every_user(args.sequential_runs, rngs[1])),
        ("daily_looks_at_returning_users", lambda: check_returning_users(args.sequential_runs, rngs[2])),
        ("cuped_variance_left", lambda: check_cuped_variance(args.runs, rngs[3])),
        ("coverage_of_correlations", lambda: check_correlation_coverage(args.sequential_runs, rngs[5])),
        ("unequal_arms", lambda: check_unequal_arms(args.canary_runs, rngs[6])),
        ("planned_power", lambda: check_planned_power(args.canary_runs, rngs[7])),
    )
    for name, run_check in ((name, run_check) for name, run_check in checks if name in (args.only or name)):
        report[name] = run_check()
        sys.stdout.write(f"{name} ({time.process_time() - started:.0f} s of CPU): {json.dumps(report[name])}\n")
    report["cpu_seconds"] = round(time.process_time() - started, 1)
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
