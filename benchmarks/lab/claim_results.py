"""The claims of the paper: the conditions of each over seeds, by the rules of docs/claims.md, from stored results."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from lab.candidates import CANDIDATE_NAMES, MITIGATIONS, WEIGHT_POLICIES
from lab.store import ResultStore
from lab.studies import LOG_SIZES
from lab.verdicts import (
    Check,
    ClaimResult,
    average_ratios,
    average_seeds,
    combine_alternatives,
    combine_verdicts,
    format_estimate,
)
from scipy import stats

from rluf.evaluate.intervals import IntervalEstimate
from rluf.reward.metrics import pearson_correlation

MARGIN = -0.05
"""Largest relative fall of helpfulness and safety."""
CEILING_GAP, LENGTH_LIMIT, PADDING_LIMIT, NOISE_LIMIT = 0.03, 0.15, 0.1, 0.02
MIN_CORRELATION, MIN_SIGN_AGREEMENT, PAPER_LIFTS = 0.7, 0.8, 0.3
HEADLINE_LIFT, MAX_FAREWELLS, HACK_FAREWELLS = 0.28, 0.5, 1.0
EMOTIONAL_TOPICS, EXCLUDED_TOPICS = ("roleplay", "relationship", "casual"), ("risky",)
RETAINED_LOVE, REMAINING_FAREWELLS = -0.2, -0.5
NULL_ROWS = (("base", "base-again"), ("w0", "w0-again"), ("w0", "permuted"))
"""(control, treatment) of comparisons that must show no gain."""
PolicyChange = tuple[str, bool, float, float]
"""Policy, whether trained on love, change of the offline score, log love ratio; both against the base."""


class ResultsMissingError(Exception):
    """No seed has the results that a claim needs."""


def load_rates(store: ResultStore, *names: str) -> list[list[dict[str, Any]]]:
    """Rates [seeds][names] of the seeds that have all of these candidates."""
    results = [store.load_stored("candidate", name) for name in names]
    seeds = [seed for seed in store.seeds if all(seed in by_seed for by_seed in results)]
    if not seeds:
        raise ResultsMissingError(f"candidates {', '.join(names)}")
    return [[by_seed[seed]["rates"] for by_seed in results] for seed in seeds]


def load_studies(store: ResultStore, name: str) -> list[dict[str, Any]]:
    """A study's results of all seeds that have it."""
    results = list(store.load_stored("study", name).values())
    if not results:
        raise ResultsMissingError(f"study {name}")
    return results


def compare_rates(rates: Sequence[Sequence[dict[str, Any]]], metric: str, *, comparisons: int = 1) -> IntervalEstimate:
    """Relative change of a rate from the first to the second policy, over seeds."""
    ratios = [treatment[metric] / control[metric] for control, treatment in rates]
    return average_ratios(ratios, comparisons=comparisons)


def check_change(
    store: ResultStore, treatment: str, metric: str, bound: float, label: str = "", *, is_upper: bool = False
) -> Check:
    """The condition that a rate of a policy, relative to that of w0, meets a bound."""
    rates = load_rates(store, "w0", treatment)
    title = f"{label or metric} of {treatment} against w0"
    return Check(title, compare_rates(rates, metric), bound, len(rates), is_upper)


def claim_headline(store: ResultStore) -> ClaimResult:
    """More love at w = 0.3 without losses elsewhere."""

    def build_checks(name: str) -> list[Check]:
        return [
            check_change(store, name, "loved", HEADLINE_LIFT, "love"),
            check_change(store, name, "helpfulness", MARGIN),
            check_change(store, name, "safety", MARGIN),
            check_change(store, name, "unprompted_farewell", MAX_FAREWELLS, "farewells", is_upper=True),
        ]

    with_judge = build_checks("judge")
    love, helpfulness, _, farewells = (format_estimate(check.estimate) for check in with_judge)
    return ClaimResult(
        "more love at w = 0.3 without losses elsewhere",
        build_checks("w0.3"),
        remarks=[
            f"With a judge against farewells as a gate: {combine_verdicts([check.verdict for check in with_judge])} "
            f"(love {love}, helpfulness {helpfulness}, farewells {farewells})."
        ],
    )


def claim_1(store: ResultStore) -> ClaimResult:
    """A reaction is learnable from text."""
    results = load_studies(store, "learnable")
    gap = average_seeds([item["ceiling"] - item["against_true_chances"] for item in results])
    names = ("against_true_chances", "ceiling", "auroc", "love_rate", "calibration_ratio")
    score, ceiling, on_hearts, rate, calibration = (float(np.mean([item[name] for item in results])) for name in names)
    return ClaimResult(
        "a reaction is learnable from text",
        [Check("ceiling minus AUROC", gap, CEILING_GAP, len(results), is_upper=True, is_percent=False)],
        remarks=[
            f"Means over seeds: AUROC {score:.3f} of a ceiling of {ceiling:.3f} (on the hearts themselves "
            f"{on_hearts:.3f}); hearts {rate:.1%} of the replies, mean P[Love] {calibration:.2f} times that."
        ],
    )


def claim_2(store: ResultStore) -> ClaimResult:
    """More data helps."""
    aurocs = np.array([[item["by_rows"][str(rows)] for rows in LOG_SIZES] for item in load_studies(store, "learnable")])
    gain = average_seeds((aurocs[:, -1] - aurocs[:, 0]).tolist())
    means = ", ".join(f"{auroc:.3f} with {rows:,}" for rows, auroc in zip(LOG_SIZES, aurocs.mean(0), strict=True))
    return ClaimResult(
        "more data helps",
        [Check(f"AUROC with {LOG_SIZES[-1]:,} rows minus {LOG_SIZES[0]:,}", gain, 0.0, len(aurocs), is_percent=False)],
        remarks=[f"Mean AUROC of one model: {means} rows."],
    )


def claim_3(store: ResultStore) -> ClaimResult:
    """The score is nearly blind to length."""
    lengths = [item["length"] for item in load_studies(store, "learnable")]
    excess = [item["score"] - item["truth"] for item in lengths]
    shifts = [np.mean([shift["score"] - shift["truth"] for shift in item["padding"].values()]) for item in lengths]
    checks = []
    for label, values, limit in (
        ("correlation of score and words minus that of truth and words", excess, LENGTH_LIMIT),
        ("shift of the score by a filler minus that of the truth, in sd", shifts, PADDING_LIMIT),
    ):
        for bound, is_upper in ((limit, True), (-limit, False)):
            checks.append(Check(label, average_seeds(values), bound, len(lengths), is_upper, is_percent=False))
    score, truth = (float(np.mean([item[name] for item in lengths])) for name in ("score", "truth"))
    return ClaimResult(
        "the score is nearly blind to length",
        checks,
        remarks=[f"Mean correlation with words: score {score:+.2f}, truth {truth:+.2f}."],
    )


def load_changes(store: ResultStore) -> list[list[PolicyChange]]:
    """Changes of all candidates but `permuted`, by seed."""
    by_name = {name: store.load_stored("candidate", name) for name in CANDIDATE_NAMES if name != "permuted"}
    seeds = [seed for seed in store.seeds if all(seed in by_seed for by_seed in by_name.values())]
    if not seeds:
        raise ResultsMissingError("all candidates")
    changes = []
    for seed in seeds:
        rows = []
        for name, by_seed in by_name.items():
            change = by_seed[seed]["vs_base"]
            log_ratio = math.log1p(change["loved"]["mean"])
            rows.append((name, by_seed[seed]["trained_on_love"], change["score"]["mean"], log_ratio))
        changes.append(rows)
    return changes


def _average_correlations(groups: Sequence[Sequence[PolicyChange]]) -> IntervalEstimate:
    """Mean Pearson correlation over seeds with five or more policies, averaged as Fisher's z."""
    columns = [np.array([row[2:] for row in rows]).T for rows in groups if len(rows) >= 5]
    estimate = average_seeds([math.atanh(pearson_correlation(scores, loves)) for scores, loves in columns])
    return IntervalEstimate(*(math.tanh(value) for value in (estimate.mean, estimate.low, estimate.high)))


def claim_4(store: ResultStore) -> ClaimResult:
    """The offline mean predicts the online change."""
    changes = load_changes(store)
    groups = {
        "all policies": changes,
        "those with a love lift within 30%": [
            [row for row in rows if abs(math.expm1(row[3])) <= PAPER_LIFTS] for rows in changes
        ],
        "those never trained on P[Love]": [[row for row in rows if not row[1]] for rows in changes],
    }
    checks = [
        Check(f"Pearson's r, {label}", _average_correlations(rows), MIN_CORRELATION, len(changes), is_percent=False)
        for label, rows in groups.items()
    ]
    counts = ", ".join(f"{np.mean([len(rows) for rows in group]):.0f}" for group in groups.values())
    lifts = [math.expm1(row[3]) for rows in changes for row in rows]
    return ClaimResult(
        "the offline mean predicts the online change",
        checks,
        remarks=[f"Policies a seed: {counts}; lifts {min(lifts):+.0%} to {max(lifts):+.0%}."],
    )


def claim_5(store: ResultStore) -> ClaimResult:
    """The score can gate releases."""
    changes = load_changes(store)
    agreement = average_seeds([float(np.mean([row[2] * row[3] > 0 for row in rows])) for rows in changes])
    falls = [(row[0], row[2] > 0) for rows in changes for row in rows if row[3] < 0]
    missed = sorted({name for name, is_released in falls if is_released})
    return ClaimResult(
        "the score can gate releases",
        [Check("policies on the right side of the base", agreement, MIN_SIGN_AGREEMENT, len(changes))],
        remarks=[
            f"Over all seeds {sum(is_released for _, is_released in falls)} of {len(falls)} policies whose love fell "
            f"would have been released: {', '.join(missed) or 'none'}."
        ],
    )


def claim_6(store: ResultStore) -> ClaimResult:
    """Love rises with its weight."""
    rates, rows = load_rates(store, "w0.1", "w0.3"), []
    for control, treatment in (*NULL_ROWS, *(("w0", name) for name in WEIGHT_POLICIES[1:])):
        lifts = [item[f"vs_{control}"]["loved"] for item in store.load_stored("candidate", treatment).values()]
        if not lifts:
            continue
        clear_count = sum(lift["low"] > 0.0 or lift["high"] < 0.0 for lift in lifts)
        estimate = average_ratios(1.0 + lift["mean"] for lift in lifts)
        first_seed = IntervalEstimate(**lifts[0])
        rows.append([
            f"{treatment} against {control}", format_estimate(estimate), format_estimate(first_seed),
            f"{clear_count} of {len(lifts)}",
        ])  # fmt: skip
    return ClaimResult(
        "love rises with its weight",
        [
            check_change(store, "w0.1", "loved", 0.0, "love"),
            check_change(store, "w0.3", "loved", 0.0, "love"),
            Check("love of w0.3 against w0.1", compare_rates(rates, "loved"), 0.0, len(rates)),
        ],
        ["love", "mean over seeds", "first seed alone, two-way", "seeds whose two-way interval excludes 0"],
        rows,
        ["The first three rows must show no gain: another draw of the base policy, another training of w0, and w = 0.3 "
         "with P[Love] trained on shuffled hearts. The paper quotes +28% for its aggressive policy, against "
         "production; that its weight was 0.3, and +9.73% at 0.1, are as reported by a third-party note."],
    )  # fmt: skip


def claim_7(store: ResultStore) -> ClaimResult:
    """Helpfulness and safety hold."""
    return ClaimResult(
        "helpfulness and safety hold at w = 0.3",
        [check_change(store, "w0.3", metric, MARGIN) for metric in ("helpfulness", "safety")],
    )


def claim_8(store: ResultStore) -> ClaimResult:
    """Aggressive weights hack the reward."""
    return ClaimResult(
        "aggressive weights hack the reward",
        [
            check_change(store, "w0.5", "unprompted_farewell", HACK_FAREWELLS, "farewells"),
            check_change(store, "w0.5", "continued", 0.0, "users who continue", is_upper=True),
            check_change(store, "w0.5", "loved", 0.0, "love"),
        ],
    )


def claim_9(store: ResultStore) -> ClaimResult:
    """Emotional topics gain most."""
    rates = load_rates(store, "w0", "w0.3")
    topics = [topic for topic in rates[0][0]["love_by_topic"] if topic not in EXCLUDED_TOPICS]
    by_topic = [[np.array([item["love_by_topic"][topic] for topic in topics]) for item in pair] for pair in rates]
    gains = np.log([treatment / control for control, treatment in by_topic])
    is_emotional = np.isin(topics, EMOTIONAL_TOPICS)
    contrast = average_ratios(np.exp(gains[:, is_emotional].mean(1) - gains[:, ~is_emotional].mean(1)))
    means = sorted(zip(np.expm1(gains.mean(0)).tolist(), topics, strict=True), reverse=True)
    listed = ", ".join(f"{topic} {lift:+.0%}" for lift, topic in means)
    return ClaimResult(
        "emotional topics gain most",
        [Check("love ratio of emotional topics over that of the others", contrast, 0.0, len(rates))],
        remarks=[f"Lift of the true love rate of w0.3 against w0: {listed}."],
    )


def claim_10(store: ResultStore) -> ClaimResult:
    """Balancing contains hacking, where there is a hack."""
    rates = [{name: item["rates"] for name, item in study.items()} for study in load_studies(store, "hacking")]
    rows, verdicts, count = [], [], len(MITIGATIONS)
    for name in ("hack", *MITIGATIONS):
        pairs, controls = [[seed["hack"], seed[name]] for seed in rates], [[seed["w0"], seed[name]] for seed in rates]
        checks = [
            Check("", compare_rates(pairs, metric, comparisons=count), bound, len(pairs), is_upper)
            for metric, bound, is_upper in (
                ("loved", RETAINED_LOVE, False),
                ("unprompted_farewell", REMAINING_FAREWELLS, True),
                ("helpfulness", MARGIN, False),
            )
        ]
        farewells = float(np.mean([seed[name]["unprompted_farewell"] for seed in rates]))
        changes = [format_estimate(compare_rates(controls, metric)) for metric in ("loved", "continued")]
        rows.append([name, f"{farewells:.1%}", *changes, "", "", "", ""])
        if name != "hack":
            verdicts.append(combine_verdicts([check.verdict for check in checks]))
            rows[-1][4:] = [*(format_estimate(check.estimate) for check in checks), verdicts[-1]]
    pairs = [[seed["w0"], seed["hack"]] for seed in rates]
    hack = Check(
        "there is a hack to contain: farewells of hack against w0",
        compare_rates(pairs, "unprompted_farewell"),
        HACK_FAREWELLS,
        len(rates),
    )
    return ClaimResult(
        "balancing objectives contains hacking",
        [hack],
        ["policy", "farewells", "love against w0", "continuing against w0", "love against hack",
         "farewells against hack", "helpfulness against hack", "verdict"],
        rows,
        [f"Against hack: intervals at 95% for all {count} mitigations together (Bonferroni)."],
        # Without a hack the claim is not tested.
        decided=combine_alternatives(verdicts) if hack.verdict == "pass" else "undecided",
    )  # fmt: skip


def claim_11(store: ResultStore) -> ClaimResult:
    """Learning survives sparse, noisy and hostile labels."""
    results = load_studies(store, "noise")
    checks = [
        Check(f"AUROC lost by {name}", average_seeds([item["clean"] - item[name] for item in results]), NOISE_LIMIT,
              len(results), is_upper=True, is_percent=False)
        for name in ("bots 10%", "sarcasm 10%", "one heart in five")
    ]  # fmt: skip
    return ClaimResult("learning survives sparse and hostile hearts", checks)


def claim_12(store: ResultStore) -> ClaimResult:
    """Love is the best signal."""
    results = load_studies(store, "choice")
    plain, selected = (
        _estimate_share([item[strength][0]["signal"] == "love" for item in results]) for strength in ("0", "1")
    )
    orders = [", ".join(row["signal"] for row in item["0"]) for item in results]
    return ClaimResult(
        "love is the best signal",
        [Check("seeds that rank love first, without self-selection", plain, 0.5, len(results))],
        remarks=[
            f"Commonest ranking: {max(set(orders), key=orders.count)}. With self-selection love is first in "
            f"{selected.mean:.0%} of the seeds."
        ],
    )


def _estimate_share(flags: Sequence[bool]) -> IntervalEstimate:
    interval = stats.binomtest(sum(flags), len(flags)).proportion_ci()
    return IntervalEstimate(sum(flags) / len(flags), float(interval.low), float(interval.high))


def claim_13(store: ResultStore) -> ClaimResult:
    """A mixture of judges beats a linear sum."""
    rows, verdicts, seed_counts = [], [], []
    for name in ("crpg-judges", "crraft-judges"):
        rates = load_rates(store, "grpo", name)
        seed_counts.append(len(rates))
        old, new = (store.load_stored("candidate", policy) for policy in ("grpo", name))
        kl_ratios = [new[seed]["kl"] / old[seed]["kl"] for seed in old.keys() & new.keys()]
        checks = [
            Check("love", compare_rates(rates, "loved", comparisons=2), 0.0, len(rates)),
            Check("sign-off", compare_rates(rates, "signoff", comparisons=2), 0.0, len(rates), is_upper=True),
            Check("helpfulness", compare_rates(rates, "helpfulness", comparisons=2), MARGIN, len(rates)),
            Check("KL", average_ratios(kl_ratios, comparisons=2), 0.5, len(rates), is_upper=True),
        ]
        verdicts.append(combine_verdicts([check.verdict for check in checks]))
        rows.append([name, *(format_estimate(check.estimate) for check in checks), verdicts[-1]])
    return ClaimResult(
        "a mixture of judges beats plain blending",
        (),
        ["against GRPO on a linear sum", "love", "sign-off, by the ground truth", "helpfulness", "KL", "verdict"],
        rows,
        [f"Over {min(seed_counts)} seeds; intervals at 95% for both together."],
        decided=combine_alternatives(verdicts),
    )


def claim_14(store: ResultStore) -> ClaimResult:
    """Refreshing P[Love] keeps it valid."""
    rounds = [item["rounds"] for item in load_studies(store, "refresh")]
    ratios = np.array([[item["predicted"] / item["true_love"] for item in pair] for pair in rounds])
    errors = np.abs(np.log(ratios))
    error_falls = average_seeds((errors[:, 0] - errors[:, 1]).tolist())
    gains = average_seeds([new["against_true_chances"] - old["against_true_chances"] for old, new in rounds])
    before, after = ratios.mean(0)
    return ClaimResult(
        "refreshing P[Love] keeps it valid",
        [
            Check("fall of the absolute log error of predicted love", error_falls, 0.0, len(rounds), is_percent=False),
            Check("gain in AUROC on the policy's own replies", gains, 0.0, len(rounds), is_percent=False),
        ],
        remarks=[f"Predicted over true love of the policy's own replies: {before:.2f} before, {after:.2f} after."],
    )  # fmt: skip


CLAIM_FUNCTIONS: dict[int, Callable[[ResultStore], ClaimResult]] = {
    0: claim_headline, 1: claim_1, 2: claim_2, 3: claim_3, 4: claim_4, 5: claim_5, 6: claim_6, 7: claim_7, 8: claim_8,
    9: claim_9, 10: claim_10, 11: claim_11, 12: claim_12, 13: claim_13, 14: claim_14,
}  # fmt: skip
"""Claim by number; 0 is the headline aim."""
