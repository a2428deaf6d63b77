"""Remove nuisance effects from reward training: who reacts, response length, and sign-offs.

- `sign_offs`: rows are duplicated with a farewell or an affectionate close and the same label. A policy
  rewarded for love learns to append them (reported by RLUF); the copies teach the reward model that the phrase earns
  nothing. Half of the phrases are the sign-offs of the log's own responses, because these are the ones the log may
  reward.
- `propensity`: a reaction is weighted by the inverse of how often comparable responses get one.
- `context`: turn, activity of the user and model version are covariates of the fitted head. The score leaves them out:
  they are equal for all responses to one prompt.
- `length`, `users`: the effects of response length and of each user's own reaction rate on the labels are fitted first
  and added to the logits in training only; the model learns the rest and scores without them. Per-user offsets are
  estimated leave-one-text-out.
"""

from __future__ import annotations

import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rluf.objectives.judges import has_sign_off
from rluf.reward.encoded_split import EncodedSplit
from rluf.reward.trainer import gather_objects
from rluf.utils.stats import Floats, sigmoid

logger = logging.getLogger(__name__)

MAX_PROPENSITY_WEIGHT = 10.0
"""Largest weight of a reaction. The reaction of median propensity weighs 1, so that half of the reactions are never
bounded, however far the others are from them."""
FIT_ITERATIONS = 40
INITIAL_USER_SD = 0.5
"""Starting value of the users' standard deviation in log-odds, which is fitted too."""


def compute_propensity_weights(propensity: Floats, labels: Floats, *, all_reacted: bool = False) -> Floats:
    """Factors [N] on the row weights: 1 / theta for reactions, theta = propensity [N] / its median over reactions.

    The unbiased loss is (Y / theta) l(1) + (1 - Y / theta) l(0) (Saito et al. 2020, arXiv 1909.03601). Its second
    factor can be negative, which leaves the loss without a lower bound; (1 - Y) in its place differs by less than the
    reaction rate, which is small. With `all_reacted` every row is a reaction (up or down) and weighs 1 / theta.
    """
    bounded, has_reaction = np.maximum(propensity, 1e-12), (labels > 0.5) | all_reacted
    # Rows without reactions, as of a client that has no buttons, must not set the scale of the others.
    median = float(np.median(bounded[has_reaction])) if has_reaction.any() else 1.0
    factors = np.minimum(median / bounded, MAX_PROPENSITY_WEIGHT)
    return np.where(has_reaction, factors, 1.0)


MIN_VERSION_SHARE = 0.02
"""Share of the rows below which a model version has no effect of its own."""


def count_context(
    records: Sequence[Mapping[str, Any]], user_ids: Sequence[str], weights: Floats
) -> tuple[Counter[str], Counter[str]]:
    """Rows of each user and of each model version before sampling: sums of the weights [N]."""
    activity: Counter[str] = Counter()
    versions: Counter[str] = Counter()
    for record, user, weight in zip(records, user_ids, weights.tolist(), strict=True):
        activity[user] += weight
        versions[str(record.get("model_version") or "")] += weight
    return activity, versions


def encode_context(
    records: Sequence[Mapping[str, Any]],
    user_ids: Sequence[str],
    activity: Mapping[str, float],
    versions: Mapping[str, float],
) -> Floats:
    """Columns [N, K] of what decides whether a row gets a reaction, apart from its text.

    Log turn, first turn, log activity of the user, and an indicator of each model version but the most frequent one.
    `activity` and `versions` are those of count_context; versions of the training rows, so that K is the same for dev.
    """
    turns = np.asarray([float(record.get("turn") or 0) for record in records])
    activities = np.asarray([activity[user] for user in user_ids])
    columns = [np.log1p(turns), (turns == 0).astype(np.float64), np.log1p(activities)]
    total = sum(versions.values())
    frequent_versions = sorted(versions, key=lambda version: (-versions[version], version))[1:]
    for version in (name for name in frequent_versions if versions[name] >= MIN_VERSION_SHARE * total):
        columns.append(np.asarray([float(str(record.get("model_version") or "") == version) for record in records]))
    return np.stack(columns, axis=1)


def add_context(
    train_split: EncodedSplit,
    train_records: Sequence[Mapping[str, Any]],
    dev_split: EncodedSplit,
    dev_records: Sequence[Mapping[str, Any]],
    world_size: int,
) -> tuple[EncodedSplit, EncodedSplit]:
    """Add the context columns of both splits; a user's activity is counted over the training rows of all ranks."""
    count, users = train_split.original_count, train_split.clusters
    shards = gather_objects(
        count_context(train_records[:count], users[:count], train_split.weights[:count]), world_size
    )
    activity: Counter[str] = sum((shard[0] for shard in shards), Counter())
    versions: Counter[str] = sum((shard[1] for shard in shards), Counter())
    dev_activity, _ = count_context(dev_records, dev_split.clusters, dev_split.weights)
    return (
        replace(train_split, context_columns=encode_context(train_records, users, activity, versions)),
        replace(dev_split, context_columns=encode_context(dev_records, dev_split.clusters, dev_activity, versions)),
    )


@dataclass(frozen=True)
class NuisanceModel:
    """Log-odds explained by length and user: slope * (log(1 + characters) - center) / scale + the user's effect."""

    length_slope: float = 0.0
    length_center: float = 0.0
    length_scale: float = 1.0
    intercept: float = 0.0
    """Log-odds of a response of average length served to an average user."""
    user_effects: dict[str, tuple[float, float]] | None = None
    """Each user's effect in log-odds, and the curvature of the fit there (the inverse of its variance)."""

    def compute_length_offsets(self, lengths: Floats) -> Floats:
        """Log-odds [N] of responses of `lengths` [N] characters relative to the average length."""
        return np.asarray(
            self.length_slope * (np.log1p(lengths) - self.length_center) / self.length_scale, dtype=np.float64
        )

    def compute_row_offsets(
        self, labels: Floats, weights: Floats, lengths: Floats, user_ids: Sequence[str], text_ids: NDArray[np.int64]
    ) -> Floats:
        """Log-odds [N] of the fitted rows, with each user effect estimated without the labels of the row's own text.

        For a user with two or three rows, the row's own label dominates the user effect. With it left in, the offsets
        would leak the labels, and the model would learn to discount the text. Rows of a user with equal `text_ids` [N]
        have identical inputs and are left out together.
        """
        length_offsets = self.compute_length_offsets(lengths)
        if self.user_effects is None:
            return length_offsets
        effects, curvatures = np.asarray([self.user_effects[user] for user in user_ids]).T
        p = sigmoid(self.intercept + length_offsets + effects)
        _, user_index = np.unique(np.asarray(user_ids, dtype=str), return_inverse=True)
        _, group = np.unique(np.stack([user_index, text_ids]), axis=1, return_inverse=True)
        gradient, curvature = (
            np.bincount(group, terms)[group] for terms in (weights * (labels - p), weights * p * (1 - p))
        )
        # One Newton step from the full fit replaces a refit per row: removing a text removes its gradient and
        # curvature, and the prior prevents the effect from moving far.
        return np.asarray(
            length_offsets + effects - gradient / np.maximum(curvatures - curvature, 1e-9), dtype=np.float64
        )


def fit_label_nuisance(
    labels: Floats, weights: Floats, lengths: Floats, user_ids: Sequence[str], *, fit_length: bool, fit_users: bool
) -> NuisanceModel:
    """Logistic regression of labels [N] on length and user, without the text.

    User effects are random effects: a normal prior shrinks them, and its variance is fitted too (EM with Laplace's
    approximation, as in Breslow and Clayton 1993), so a user with three rows stays near 0.
    """
    x = np.log1p(lengths)
    center, scale = float(x.mean()), float(x.std()) or 1.0
    columns = [np.ones(len(labels)), (x - center) / scale] if fit_length else [np.ones(len(labels))]
    design, beta = np.stack(columns, axis=1), np.zeros(len(columns))
    user_names, user_index = np.unique(np.asarray(user_ids, dtype=str), return_inverse=True)
    effects: Floats = np.zeros(len(user_names))
    curvatures: Floats = np.ones(len(user_names))
    variance = INITIAL_USER_SD**2
    for _ in range(FIT_ITERATIONS):
        # Alternate Newton steps for the fixed effects and for the users: the joint Hessian would be users x users.
        p = sigmoid(design @ beta + effects[user_index])
        hessian = (design * (weights * p * (1 - p))[:, None]).T @ design + 1e-9 * np.eye(len(beta))
        # Steps are clipped because the sigmoid saturates: far from the optimum a Newton step can diverge.
        beta = beta + np.clip(np.linalg.solve(hessian, design.T @ (weights * (labels - p))), -3, 3)
        if fit_users:
            p = sigmoid(design @ beta + effects[user_index])
            gradient = np.bincount(user_index, weights * (labels - p), minlength=len(user_names)) - effects / variance
            information = np.bincount(user_index, weights * p * (1 - p), minlength=len(user_names))
            curvatures = information.astype(np.float64) + 1 / variance
            effects = effects + np.clip(gradient / curvatures, -2, 2)
            # EM update: the expected square of an effect is its estimate squared plus its posterior variance.
            variance = max(float((effects**2 + 1 / curvatures).mean()), 1e-4)
    user_effects = None
    if fit_users:
        user_effects = dict(
            zip(user_names.tolist(), zip(effects.tolist(), curvatures.tolist(), strict=True), strict=True)
        )
    return NuisanceModel(float(beta[1]) if fit_length else 0.0, center, scale, float(beta[0]), user_effects)


def fit_pair_nuisance(lengths: Floats, weights: Floats) -> NuisanceModel:
    """Bradley-Terry model of pairs on length only; `lengths` [2N] are all chosen, then all rejected responses."""
    x = np.log1p(lengths)
    center, scale = float(x.mean()), float(x.std()) or 1.0
    chosen, rejected = np.split((x - center) / scale, 2)
    difference, slope = chosen - rejected, 0.0
    for _ in range(FIT_ITERATIONS):
        p = sigmoid(slope * difference)
        curvature = float((weights * p * (1 - p) * difference**2).sum()) + 1e-9
        slope += float(np.clip((weights * (1 - p) * difference).sum() / curvature, -3, 3))
    return NuisanceModel(slope, center, scale)


def fit_nuisance_offsets(
    split: EncodedSplit, debias: Sequence[str], world_size: int = 1, *, head: str = "reward model"
) -> Floats:
    """Logit offset of each sequence explained by length and user, fitted on the rows of all ranks.

    Per-user offsets are estimated leave-one-text-out.
    """
    all_rows, split = split, split.select_originals()  # copies add no evidence about user or length
    weights = split.loss_weights
    shards = gather_objects((split.labels, weights, split.response_lengths, split.clusters), world_size)
    all_weights = np.concatenate([shard[1] for shard in shards])
    if split.is_pairwise:
        # Each rank has its chosen responses first; the fit needs those of all ranks before any rejected one.
        lengths_by_rank = [np.split(shard[2], 2) for shard in shards]
        all_lengths = np.concatenate([lengths[index] for index in range(2) for lengths in lengths_by_rank])
        nuisance = fit_pair_nuisance(all_lengths, all_weights)
        offsets = nuisance.compute_length_offsets(split.response_lengths)
    else:
        nuisance = fit_label_nuisance(
            np.concatenate([shard[0] for shard in shards]),
            all_weights,
            np.concatenate([shard[2] for shard in shards]),
            [cluster for shard in shards for cluster in shard[3]],
            fit_length="length" in debias,
            fit_users="users" in debias,
        )
        offsets = nuisance.compute_row_offsets(
            split.labels, weights, split.response_lengths, split.clusters, split.text_ids
        )
    logger.info(
        "%s: debias length_slope=%.2f log-odds per standard deviation of log length", head, nuisance.length_slope
    )
    # A copy has the user of its source, but a length of its own.
    sources = split.list_sequence_indices(all_rows.source_ids.tolist())
    length_offsets = nuisance.compute_length_offsets(all_rows.response_lengths)
    source_length_offsets = nuisance.compute_length_offsets(split.response_lengths)[sources]
    return np.asarray(offsets[sources] - source_length_offsets + length_offsets, dtype=np.float64)


SIGN_OFF_PHRASES = (
    "Bye! Sending love!", "Sending you lots of love!", "Take care, dear friend!", "With all my love.",
    "Goodbye for now!", "Hugs and kisses!", "I love you!", "Have a wonderful day, my dear!", "Yours truly, with love.",
    "See you soon, bye bye!", "Much love to you!", "Lots of hugs!", "Stay safe, sweetheart!",
    "You are amazing, I love talking to you!",
)  # fmt: skip
SIGN_OFF_SHARE = 0.3
"""Share of the training rows that are duplicated with a sign-off when debias contains sign_offs."""
MAX_LOG_SIGN_OFFS = 64
"""Number of distinct sign-offs taken from the log, most frequent first."""
MAX_SIGN_OFF_CHARACTERS = 100
"""Longest sentence, in characters, that may count as a sign-off."""
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
EMOJI_SUFFIXES = ("❤️", "😊", "🥰", "💕", "👍")
PADDING_SENTENCE = (
    "I hope that this helps, and please let me know whether there is anything else that you would like to know."
)

PARAPHRASE_PAIRS = (
    ("do not", "don't"), ("does not", "doesn't"), ("is not", "isn't"), ("are not", "aren't"), ("cannot", "can't"),
    ("will not", "won't"), ("i am", "i'm"), ("you are", "you're"), ("it is", "it's"), ("that is", "that's"),
    ("i will", "i'll"), ("you will", "you'll"), ("i have", "i've"), ("you have", "you've"), ("we are", "we're"),
    ("because", "since"), ("also", "too"), ("maybe", "perhaps"), ("big", "large"), ("quick", "fast"),
    ("start", "begin"), ("help", "assist"), ("need to", "have to"), ("lots of", "many"), ("want to", "would like to"),
    ("of course", "certainly"), ("for example", "for instance"), ("but", "however"), ("think", "believe"),
    ("happy", "glad"), ("great", "excellent"), ("sure", "certain"), ("important", "essential"), ("try", "attempt"),
)  # fmt: skip
"""Equivalent phrases; a paraphrase replaces either one by the other."""


def paraphrase_text(text: str) -> str:
    """Replace every phrase of PARAPHRASE_PAIRS by its counterpart, in both directions."""
    counterparts = {**dict(PARAPHRASE_PAIRS), **{second: first for first, second in PARAPHRASE_PAIRS}}
    # Longest phrases first: a regex alternation takes the first match, so "will not" must come before "i will".
    pattern = "|".join(re.escape(phrase) for phrase in sorted(counterparts, key=len, reverse=True))

    def replace_phrase(match: re.Match[str]) -> str:
        counterpart = counterparts[match.group().lower()]
        return counterpart[0].upper() + counterpart[1:] if match.group()[0].isupper() else counterpart

    return re.sub(rf"\b(?:{pattern})\b", replace_phrase, text.replace("’", "'"), flags=re.IGNORECASE)


RESPONSE_PERTURBATIONS: Mapping[str, Callable[[str, random.Random], str]] = {
    "sign_off": lambda text, rng: f"{text} {rng.choice(SIGN_OFF_PHRASES)}",
    "emoji": lambda text, rng: f"{text} {rng.choice(EMOJI_SUFFIXES)}",
    "padding": lambda text, rng: f"{text} {PADDING_SENTENCE}",
    "truncation": lambda text, rng: " ".join(text.split()[: -(-len(text.split()) // 2)]),
    "capitals": lambda text, rng: text.upper(),
    "paraphrase": lambda text, rng: paraphrase_text(text),
}
"""Perturbations of a response, by name. Truncation keeps the first half of the words, rounded up."""


def find_log_sign_offs(responses: Sequence[str]) -> list[str]:
    """Closing sentences of the responses that are a farewell or an affectionate close, most frequent first."""
    last_sentences = (SENTENCE_END.split(text.rstrip())[-1] for text in responses)
    sign_off_counts = Counter(
        sentence for sentence in last_sentences if len(sentence) <= MAX_SIGN_OFF_CHARACTERS and has_sign_off(sentence)
    )
    return [sentence for sentence, _ in sign_off_counts.most_common(MAX_LOG_SIGN_OFFS)]


def add_sign_off_copies(
    rows: Sequence[Mapping[str, Any]], share: float, *, is_pairwise: bool, seed: int
) -> tuple[list[Mapping[str, Any]], NDArray[np.int64]]:
    """Append copies of a share of the rows, each with a sign-off added to its response and the label unchanged.

    The second return value holds, for each copy, the index of the row it was copied from. For a pair, one side chosen
    at random gets the phrase. The choice depends only on the seed and the row's own text. Half of the phrases come from
    find_log_sign_offs of these rows, when there are any.
    """
    if share <= 0:
        return list(rows), np.empty(0, dtype=np.int64)
    response_columns = ("chosen", "rejected") if is_pairwise else ("response",)
    log_sign_offs = find_log_sign_offs([str(row[column]) for row in rows for column in response_columns])
    augmented_rows, source_indices = list(rows), []
    for row_index, row in enumerate(rows):
        # Seeded by the row's text: a row gets the same phrase whichever rank or shard order it is read in.
        rng = random.Random(f"{seed} {[row[column] for column in response_columns]}")
        if rng.random() < share:
            column = rng.choice(response_columns)
            phrase = rng.choice(log_sign_offs if log_sign_offs and rng.random() < 0.5 else SIGN_OFF_PHRASES)
            augmented_rows.append({**row, column: f"{row[column]} {phrase}"})
            source_indices.append(row_index)
    return augmented_rows, np.asarray(source_indices, dtype=np.int64)
