"""Studies of single claims beyond the candidates: less and noisier data, longer replies, refresh rounds, signals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from lab.candidates import AGGRESSIVE_WEIGHT, CandidateSet, build_recipe, measure_candidate
from lab.composer import train_composer
from lab.difficulty import bayes_auroc
from lab.features import Matrix, ObjectiveModel
from lab.replies import MIDDLES, compose_texts, sample_logged_choices
from lab.simulated_world import (
    MEMBER_COUNT,
    TEST_ROWS,
    USER_COUNT,
    ClaimWorld,
    FeedbackLog,
    simulate_feedback,
    with_hostile_users,
)
from numpy.typing import NDArray
from scipy.special import expit

from rluf.prepare.signals import rank_signals
from rluf.reward.metrics import auroc, compute_auroc_interval, compute_hanley_mcneil_std_error, pearson_correlation
from rluf.simulate.users import (
    ResponseFeatures,
    UserPopulation,
    expected_love_probability,
    find_logit_shift,
    love_logits_by_user,
    simulate_reactions,
)
from rluf.simulate.world import WORLD, SimulatedWorld

Floats = NDArray[np.float64]
StudyFunction = Callable[[ClaimWorld, CandidateSet], dict[str, Any]]
LOG_SIZES = (1_000, 2_000, 4_000, 8_000)
NOISY_LOG_ROWS = 8_000
"""Rows of each log with noisy users."""
ROUNDS, ROUND_ROWS, ROUND_WEIGHT = 1, 4_000, 0.5
FILTERED_USER_SHARE = 0.08
"""Share of the users that the filter drops."""
SIGNAL_LOG_ROWS = 24_000
"""Rows of the log for the choice of a signal."""
SELECTION_STRENGTHS = (0.0, 0.5, 1.0, 2.0)
"""Increase in the log-odds of returning per unit of a user's readiness to react."""
HABIT_LOG_ODDS = (-3.5, 1.5)
"""Log-odds of a habitual thumb, independent of the reply: of an average user, and per unit of readiness."""


def log_features(world: ClaimWorld, log: FeedbackLog) -> Matrix:
    """Features of a log's replies."""
    return world.features_of(log.prompt_index, log.choices)


def true_probabilities(
    world: ClaimWorld, log: FeedbackLog, *, shift: float = 0.0, simulated_world: SimulatedWorld = WORLD
) -> Floats:
    """True probabilities [N] of a heart over all users."""
    topics = [world.dataset.entries[prompt].topic for prompt in log.prompt_index.tolist()]
    return expected_love_probability(
        world.truth_cache.truths_of(log.prompt_index, log.choices), topics, shift=shift, world=simulated_world
    )


def study_learnability(world: ClaimWorld, _: CandidateSet) -> dict[str, Any]:
    """AUROC of P[Love] on later replies against the ceiling, and its score's dependence on length (claims 1, 3)."""
    result: dict[str, Any] = {}
    for name, rng_part, unseen in (("unseen_prompts", 9, True), ("known_prompts", 10, False)):
        log = world.simulate_log(TEST_ROWS, rng_part=rng_part, unseen=unseen)
        score, probabilities = world.love_model.mean_logits(log_features(world, log)), true_probabilities(world, log)
        ones, positives = np.ones(len(score)), int(log.loved.sum())
        result[name] = {
            "auroc": compute_auroc_interval(score, log.loved, ones, [str(item) for item in log.user_index]),
            "auroc_of_the_truth": auroc(probabilities, log.loved), "ceiling": bayes_auroc(probabilities),
            "against_true_chances": auroc(score, probabilities), "rate": float(log.loved.mean()),
            "error": compute_hanley_mcneil_std_error(auroc(score, log.loved), positives, len(score) - positives),
            "calibration_ratio": float((1 / (1 + np.exp(-score))).mean() / log.loved.mean()),
        }  # fmt: skip
        if not unseen:
            continue
        lengths = np.array(
            [len(text.split()) for text in compose_texts(world.dataset, log.prompt_index, log.choices)], float
        )
        topics = np.array([world.dataset.entries[item].topic for item in log.prompt_index.tolist()])
        result["length"] = {
            "score": pearson_correlation(score, lengths), "truth": pearson_correlation(np.log(probabilities), lengths),
            "by_topic": {str(topic): pearson_correlation(score[topics == topic], lengths[topics == topic])
                         for topic in np.unique(topics)},
            "padding": {MIDDLES[middle]: _padding_shift(world, log, middle) for middle in (1, 2)},
        }  # fmt: skip
    return result


def _padding_shift(world: ClaimWorld, log: FeedbackLog, middle: int) -> dict[str, float]:
    """Shift of the mean score and of the log true probability, in sds, when a filler is added to the same replies."""
    scores_and_truths = []
    for middle_value in (0, middle):
        choices = log.choices.copy()
        choices[:, 2] = middle_value
        padded_log = replace(log, choices=choices)
        scores_and_truths.append(
            (
                world.love_model.mean_logits(log_features(world, padded_log)),
                np.log(true_probabilities(world, padded_log)),
            )
        )
    return {
        name: float(
            (scores_and_truths[1][index] - scores_and_truths[0][index]).mean() / scores_and_truths[0][index].std()
        )
        for index, name in ((0, "score"), (1, "truth"))
    }


def study_log_size(world: ClaimWorld, _: CandidateSet) -> dict[str, Any]:
    """P[Love] trained on the first rows of the log only (claim 2)."""
    test_log = world.simulate_log(TEST_ROWS, rng_part=9, unseen=True)
    probabilities, test_features = true_probabilities(world, test_log), log_features(world, test_log)
    result: dict[str, Any] = {"ceiling": bayes_auroc(probabilities), "rows": {}}
    for row_count in LOG_SIZES:
        score = world.fit_reaction_model(
            "love", world.feedback.select_rows(np.arange(row_count)), member_count=1
        ).mean_logits(test_features)
        result["rows"][str(row_count)] = {
            "against_true_chances": auroc(score, probabilities),
            "auroc": auroc(score, test_log.loved),
            "error": compute_hanley_mcneil_std_error(
                auroc(score, test_log.loved), int(test_log.loved.sum()), int((1 - test_log.loved).sum())
            ),
        }
    return result


def study_label_noise(world: ClaimWorld, _: CandidateSet) -> dict[str, Any]:
    """P[Love] trained on logs with rarer hearts, bots or sarcasm, evaluated on honest users (claim 11)."""
    rng = world.make_rng(60)
    prompt_index = rng.choice(world.train_prompts, NOISY_LOG_ROWS)
    choices = sample_logged_choices(world.dataset, prompt_index, rng)
    ground_truths, topics = (
        world.truth_cache.truths_of(prompt_index, choices),
        [world.dataset.entries[item].topic for item in prompt_index.tolist()],
    )
    test_log = world.simulate_log(TEST_ROWS, rng_part=9, unseen=True)
    honest_world = with_hostile_users(WORLD, hostile=0.0, sarcastic=0.0)
    probabilities, test_features = (
        true_probabilities(world, test_log, simulated_world=honest_world),
        log_features(world, test_log),
    )

    def simulate_condition(simulated_world: SimulatedWorld, rate: float) -> FeedbackLog:
        logits = love_logits_by_user(ground_truths, topics, user_count=60, world=simulated_world)
        return simulate_feedback(
            world.dataset,
            world.truth_cache,
            prompt_index,
            choices,
            user_count=USER_COUNT // 4,
            rng=world.make_rng(61),
            shift=find_logit_shift(logits, rate),
            world=simulated_world,
        )

    def measure_auroc(item: ObjectiveModel) -> float:
        return auroc(item.mean_logits(test_features), probabilities)

    result: dict[str, Any] = {"ceiling": bayes_auroc(probabilities), "rows": NOISY_LOG_ROWS, "conditions": {}}
    conditions = {
        "rate 5%": (0.0, 0.0, 0.05), "rate 2%": (0.0, 0.0, 0.02), "rate 0.5%": (0.0, 0.0, 0.005),
        "bots 5%": (0.05, 0.0, 0.05), "bots 10%": (0.1, 0.0, 0.05), "bots 20%": (0.2, 0.0, 0.05),
        "sarcasm 10%": (0.0, 0.1, 0.05),
    }  # fmt: skip
    for name, (hostile, sarcastic, rate) in conditions.items():
        log = simulate_condition(with_hostile_users(WORLD, hostile=hostile, sarcastic=sarcastic), rate)
        condition = {
            "hearts": int(log.loved.sum()),
            "plain": measure_auroc(world.fit_reaction_model("love", log, member_count=1)),
        }
        if hostile or sarcastic:
            condition["filtered"] = measure_auroc(
                world.fit_reaction_model("love", log, member_count=1, trusted_rows=_trusted_rows(world, log))
            )
        if name == "rate 2%":
            condition["all_negatives"] = measure_auroc(
                world.fit_reaction_model("love", log, member_count=1, positive_share=0.02)
            )
        result["conditions"][name] = condition
    return result


def _trusted_rows(world: ClaimWorld, log: FeedbackLog) -> NDArray[np.bool_]:
    """Rows [N] of trusted users; drops the FILTERED_USER_SHARE least likely under a model trained without them."""
    user_fold, surprise = log.user_index % 2, np.zeros(len(log.loved))
    for fold in (0, 1):
        model = world.fit_reaction_model("love", log, member_count=1, trusted_rows=user_fold == fold)
        row_index = np.flatnonzero(user_fold != fold)
        probability = 1.0 / (1.0 + np.exp(-model.mean_logits(log_features(world, log.select_rows(row_index)))))
        surprise[row_index] = (log.loved[row_index] - probability) * (
            np.log(probability / (1 - probability)).mean() - np.log(probability / (1 - probability))
        )
    surprise_by_user = np.bincount(log.user_index, surprise, minlength=USER_COUNT) / np.sqrt(
        np.bincount(log.user_index, minlength=USER_COUNT).clip(1)
    )
    is_active = np.bincount(log.user_index, minlength=USER_COUNT) > 0
    return np.asarray(
        surprise_by_user[log.user_index] <= np.quantile(surprise_by_user[is_active], 1.0 - FILTERED_USER_SHARE)
    )


def study_refresh(world: ClaimWorld, candidates: CandidateSet) -> dict[str, Any]:
    """Rounds of collecting hearts on the policy's own replies, retraining P[Love] and the policy (claim 14)."""
    log, love_model, rounds = world.feedback, world.love_model, []
    for round_number in range(ROUNDS + 1):
        run = train_composer(
            world.dataset,
            world.base_policy,
            world.train_prompts,
            world.build_signals(love_model=love_model),
            build_recipe(ROUND_WEIGHT),
            seed=world.seed,
        )
        result = measure_candidate(
            world,
            candidates.from_policy(f"round-{round_number}", run.policy, trained_on_love=True),
            {**world.objective_models, "love": love_model},
        )
        rng = world.make_rng(70 + round_number)
        prompt_index = rng.choice(world.train_prompts, ROUND_ROWS)
        choices = run.policy.sample(torch.as_tensor(prompt_index), torch.Generator().manual_seed(world.seed))[0].numpy()
        new_log = simulate_feedback(
            world.dataset, world.truth_cache, prompt_index, choices, user_count=USER_COUNT, rng=rng
        )
        result["own_replies"] = {
            "auroc": auroc(love_model.mean_logits(log_features(world, new_log)), new_log.loved),
            "ceiling": bayes_auroc(true_probabilities(world, new_log)),
            "predicted": float((1 / (1 + np.exp(-love_model.mean_logits(log_features(world, new_log))))).mean()),
            "loved": float(new_log.loved.mean()),
        }
        rounds.append(result)
        if round_number < ROUNDS:
            merged = {
                name: np.concatenate([getattr(log, name), getattr(new_log, name)]) for name in FeedbackLog.__slots__
            }
            merged["user_index"] = np.concatenate(
                [log.user_index, new_log.user_index + 10 * USER_COUNT * (round_number + 1)]
            )
            log = FeedbackLog(**merged)
            love_model = world.fit_reaction_model("love", log, member_count=MEMBER_COUNT)
    return {"weight": ROUND_WEIGHT, "aggressive": AGGRESSIVE_WEIGHT, "rounds": rounds}


def study_signal_choice(world: ClaimWorld, _: CandidateSet) -> dict[str, Any]:
    """Rank hearts, continuing and habitual thumbs by `prepare --signals`, under growing self-selection (claim 12).

    Self-selection means that users who react readily also return more. The frozen world has no such users, so returns
    are sampled here with its constants.
    """
    rng = world.make_rng(80)
    prompt_index = rng.choice(world.train_prompts, SIGNAL_LOG_ROWS)
    choices = sample_logged_choices(world.dataset, prompt_index, rng)
    topics = [world.dataset.entries[item].topic for item in prompt_index.tolist()]
    features, population = (
        ResponseFeatures.from_truths(world.truth_cache.truths_of(prompt_index, choices), topics),
        UserPopulation.sample(USER_COUNT, rng),
    )
    activity = rng.gamma(0.8, size=USER_COUNT)
    user_index = rng.choice(USER_COUNT, SIGNAL_LOG_ROWS, p=activity / activity.sum())
    reactions = simulate_reactions(features, population, user_index, np.arange(SIGNAL_LOG_ROWS), rng)
    readiness, uniforms = population.propensity[user_index], rng.random((2, SIGNAL_LOG_ROWS))
    has_habitual_thumb = uniforms[0] < expit(HABIT_LOG_ODDS[0] + HABIT_LOG_ODDS[1] * readiness)
    return_logits = (
        WORLD.return_intercept
        + WORLD.return_satisfaction * features.satisfaction
        + WORLD.return_signoff * features.signoff
    )
    reaction = np.where(has_habitual_thumb, "thumbs_up", np.where(reactions.loved, "love", ""))
    columns = {
        "user_id": [str(item) for item in user_index],
        "conversation_id": [str(index) for index in range(SIGNAL_LOG_ROWS)],
        "turn": [0] * SIGNAL_LOG_ROWS,
        "messages": pa.array([[]] * SIGNAL_LOG_ROWS, pa.list_(pa.string())),
        "response": compose_texts(world.dataset, prompt_index, choices),
        "topic": topics,
        "locale": ["en"] * SIGNAL_LOG_ROWS,
        "reaction": reaction.tolist(),
        "continued": reactions.continued.tolist(),
    }
    signals_by_strength = {}
    for strength in SELECTION_STRENGTHS:
        returned = (uniforms[1] < expit(return_logits + strength * readiness)).tolist()
        signals_by_strength[f"{strength:g}"] = rank_signals(pa.table({**columns, "returned": returned}))
    return {"rows": SIGNAL_LOG_ROWS, "strengths": signals_by_strength}


STUDY_BY_NAME: dict[str, StudyFunction] = {
    "learnable": study_learnability,
    "size": study_log_size,
    "refresh": study_refresh,
    "noise": study_label_noise,
    "choice": study_signal_choice,
}
"""Study by name."""
