"""Claims about reward models: learnability, data size, length, label noise, choice of signal, refresh."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from lab.candidates import CandidateSet
from lab.drawing import Figure, Series
from lab.store import ResultStore
from lab.studies import LOG_SIZES
from lab.tables import ClaimResult, format_interval, format_lift
from scipy.stats import pearsonr

SIGNAL_NAMES = ("love", "continue", "thumbs up")
"""Signals of claim 12; the thumbs are habitual."""


def claim_1(store: ResultStore) -> ClaimResult:
    """Claim 1: AUROC against the Bayes ceiling."""
    rows, passed = [], []
    for seed in store.seeds:
        study = store.load_or_compute(seed, "study", "learnable")
        unseen, known = study["unseen_prompts"], study["known_prompts"]
        passed.append(unseen["auroc"]["mean"] >= unseen["ceiling"] - 0.03)
        rows.append([str(seed), format_interval(unseen["auroc"], "mean"), f"{unseen['ceiling']:.3f}",
                     f"{unseen['auroc_of_the_truth']:.3f}", f"{unseen['ceiling'] - unseen['against_true_chances']:.3f}",
                     format_interval(known["auroc"], "mean"), f"{known['ceiling'] - known['against_true_chances']:.3f}",
                     f"{unseen['rate']:.1%}",
                     f"{unseen['calibration_ratio']:.2f}"])  # fmt: skip
    return ClaimResult(
        "a reaction is learnable from text",
        all(passed),
        [
            "seed",
            "AUROC, unseen prompts and users",
            "Bayes ceiling",
            "AUROC of the true probabilities on the same hearts",
            "gap to the ceiling",
            "AUROC, known prompts, other users",
            "gap to the ceiling, known prompts",
            "rate of hearts",
            "mean P[Love] over rate",
        ],
        rows,
        ["The gap uses true probabilities, which are less noisy than the hearts of 2,500 replies."],
    )


def claim_2(store: ResultStore) -> ClaimResult:
    """Claim 2: AUROC against rows of the log."""
    studies = store.load_all("study", ["size"])
    rows, passed = [], []
    for seed, (study,) in zip(store.seeds, studies, strict=True):
        results = [study["rows"][str(size)] for size in LOG_SIZES]
        passed.append(all(larger["against_true_chances"] >= smaller["against_true_chances"] - larger["error"]
                          for smaller, larger in itertools.pairwise(results)))  # fmt: skip
        best_auroc = max(result["against_true_chances"] for result in results)
        enough_rows = next(
            size
            for size, result in zip(LOG_SIZES, results, strict=True)
            if result["against_true_chances"] >= best_auroc - 0.01
        )
        rows.append(
            [
                str(seed),
                *(f"{result['against_true_chances']:.3f}" for result in results),
                f"{study['ceiling']:.3f}",
                f"{enough_rows:,}",
            ]
        )
    figure = Figure(
        "AUROC of P[Love] against rows of the log",
        "rows, thousands",
        "AUROC against true probabilities",
        "",
        [
            Series(
                f"seed {seed}",
                [(size / 1000, study["rows"][str(size)]["against_true_chances"]) for size in LOG_SIZES],
                has_line=True,
            )
            for seed, (study,) in zip(store.seeds, studies, strict=True)
        ],
    )
    return ClaimResult(
        "more data helps",
        all(passed),
        ["seed", *(f"{size:,} rows" for size in LOG_SIZES), "ceiling", "rows to within 0.01 of the best"],
        rows,
        [
            "Each value is from one model of the ensemble, on unseen prompts and users. More than 8,000 rows were not "
            "tried."
        ],
        figure,
    )


def claim_3(store: ResultStore) -> ClaimResult:
    """Claim 3: correlation of score and length."""
    rows, passed = [], []
    for seed in store.seeds:
        length_study = store.load_or_compute(seed, "study", "learnable")["length"]
        padding_shifts = [abs(shift["score"]) for shift in length_study["padding"].values()]
        passed.append(abs(length_study["score"]) <= 0.15 and max(padding_shifts) < 0.05)
        topics = length_study["by_topic"]
        lowest_topic, highest_topic = (
            min(topics, key=lambda topic: topics[topic]),
            max(topics, key=lambda topic: topics[topic]),
        )
        rows.append(
            [
                str(seed),
                f"{length_study['score']:+.2f}",
                f"{length_study['truth']:+.2f}",
                f"{lowest_topic} {topics[lowest_topic]:+.2f} to {highest_topic} {topics[highest_topic]:+.2f}",
                *(f"{shift['score']:+.2f} (truth {shift['truth']:+.2f})" for shift in length_study["padding"].values()),
            ]
        )
    fillers = list(store.load_or_compute(store.seeds[0], "study", "learnable")["length"]["padding"])
    return ClaimResult("the score is nearly blind to length", all(passed),
                ["seed", "correlation of score and words", "correlation of ground truth and words",
                 "score and words, by topic",
                 *(f"shift in sd from “{text}”" for text in fillers)], rows)  # fmt: skip


def claim_11(store: ResultStore) -> ClaimResult:
    """Claim 11: noisy and hostile labels."""
    rows, recovered_flags, max_lost = [], [], 0.0
    for seed, (study,) in zip(store.seeds, store.load_all("study", ["noise"]), strict=True):
        clean = study["conditions"]["rate 5%"]["plain"]
        for name, condition in study["conditions"].items():
            auroc_lost = clean - condition["plain"]
            recovered_share = (
                (condition["filtered"] - condition["plain"]) / auroc_lost
                if "filtered" in condition and auroc_lost > 0.005
                else None
            )
            if "filtered" in condition:
                max_lost = max(max_lost, auroc_lost)
            if recovered_share is not None:
                recovered_flags.append(recovered_share >= 0.5)
            variants = [
                f"{key.replace('_', ' ')} {condition[key]:.3f}" for key in ("all_negatives",) if key in condition
            ]
            rows.append([str(seed), name, str(condition["hearts"]), f"{condition['plain']:.3f}", f"{auroc_lost:+.3f}",
                         f"{condition['filtered']:.3f}" if "filtered" in condition else "-",
                         "-" if recovered_share is None else f"{recovered_share:.0%}",
                         ", ".join(variants) or "-"])  # fmt: skip
    return ClaimResult(
        "learning survives sparse, noisy and hostile labels",
        all(recovered_flags) if recovered_flags else None,
        ["seed", "log", "hearts", "AUROC", "AUROC lost", "with the filter", "recovered", "variants"],
        rows,
        [
            "8,000 rows each; AUROC against the true probabilities of honest users on unseen prompts. Bots love the "
            "worst replies; sarcastic users love failed answers. The filter drops the 8% of users whose hearts are "
            "least likely under a model that never saw them. Recovery is reported where more than 0.005 was lost; "
            f"bots and sarcasm cost at most {max_lost:.3f}."
        ],
    )


def claim_12(store: ResultStore) -> ClaimResult:
    """Claim 12: choice of a signal."""
    rows, passed = [], []
    for seed, (study,) in zip(store.seeds, store.load_all("study", ["choice"]), strict=True):
        for strength, ranked in study["strengths"].items():
            names = [row["signal"] for row in ranked if row["per_1000"] > 0 and row["signal"] != "return"]
            if float(strength) == 0:
                passed.append(names[0] == "love")
            row_by_signal = {row["signal"]: row for row in ranked}
            rows.append(
                [
                    str(seed),
                    strength,
                    ", ".join(names),
                    *(_format_association(row_by_signal[name]["link"]) for name in SIGNAL_NAMES),
                    _format_association(row_by_signal["love"]["unadjusted"]),
                    ", ".join(f"{row_by_signal[name]['per_1000']:.0f}" for name in SIGNAL_NAMES),
                ]
            )
    across_policies = []
    for seed, results in zip(store.seeds, store.load_all("candidate", CandidateSet.all_names()), strict=True):
        return_lifts = [result["ab"]["returned"]["lift"] for result in results]
        correlations = (
            f"{name} {pearsonr([result['ab'][key]['lift'] for result in results], return_lifts).statistic:.2f}"
            for name, key in (("hearts", "love"), ("continuing", "continued"))
        )
        across_policies.append(f"{', '.join(correlations)} (seed {seed})")
    return ClaimResult(
        "love is a good signal",
        all(passed),
        [
            "seed",
            "self-selection",
            "ranking",
            *(f"{name} and return" for name in SIGNAL_NAMES),
            "love and return, unadjusted",
            "events per 1,000, same order",
        ],
        rows,
        [
            "The middle columns are associations (log-odds). Ranked by `prepare --signals`: the lower limit of the "
            "association with return, adjusted for activity, topic and length, times one minus the share of events "
            "that are followed by neither a return nor a continuation. The thumbs carry no information about the "
            "reply. Self-selection is the increase in the log-odds of returning per unit of readiness to react; "
            "the frozen world has none, and users with it were created for this table only.",
            "Across policies, where users do not select themselves: Pearson correlation of the signal's lift with that "
            f"of return over {len(CandidateSet.all_names())} A/B tests: {'; '.join(across_policies)}.",
        ],
        None,
        {"first": passed},
    )


def _format_association(estimate: dict[str, float] | None) -> str:
    return (
        "not estimated"
        if estimate is None
        else f"{estimate['mean']:+.2f} [{estimate['low']:+.2f}, {estimate['high']:+.2f}]"
    )


def claim_14(store: ResultStore) -> ClaimResult:
    """Claim 14: rounds of refreshing P[Love]."""
    rows, passed = [], []
    for seed, (study,) in zip(store.seeds, store.load_all("study", ["refresh"]), strict=True):
        first_round, last_round = study["rounds"][0], study["rounds"][-1]
        farewell_rates = [
            round_result["monitors"]["new"]["unprompted_farewell"] for round_result in (first_round, last_round)
        ]
        satisfaction = [round_result["gold"]["satisfaction"]["new"] for round_result in (first_round, last_round)]
        same_love = last_round["ab"]["love"]["high"] >= first_round["ab"]["love"]["low"]
        passed.append(same_love and (farewell_rates[1] < farewell_rates[0] or satisfaction[1] > satisfaction[0]))
        for round_number, round_result in enumerate(study["rounds"]):
            own_replies = round_result["own_replies"]
            rows.append(
                [
                    str(seed),
                    str(round_number),
                    format_lift(round_result["ab"]["love"]),
                    f"{round_result['offline']['love']['mean']:+.3f}",
                    f"{round_result['monitors']['new']['unprompted_farewell']:.2%}",
                    f"{round_result['gold']['satisfaction']['new']:.3f}",
                    format_lift(round_result["ab"]["continued"]),
                    f"{own_replies['auroc']:.3f} ({own_replies['ceiling']:.3f})",
                    f"{own_replies['predicted']:.3f}, {own_replies['loved']:.3f}",
                    f"{round_result['kl']:.2f}",
                ]
            )
    return ClaimResult(
        "refreshing P[Love] keeps it valid",
        all(passed),
        [
            "seed",
            "round",
            "love",
            "offline change",
            "unprompted farewells",
            "true satisfaction",
            "user continues",
            "AUROC on own replies (ceiling)",
            "predicted and true love rate of own replies",
            "KL in nats",
        ],
        rows,
        [
            "w = 0.5. After each round, 4,000 replies of the new policy with new hearts are added to the log, P[Love] "
            "is retrained, and the policy is trained from the base again."
        ],
    )


REWARD_CLAIMS: dict[int, Callable[[ResultStore], ClaimResult]] = {
    1: claim_1,
    2: claim_2,
    3: claim_3,
    11: claim_11,
    12: claim_12,
    14: claim_14,
}
"""Claim by number."""
