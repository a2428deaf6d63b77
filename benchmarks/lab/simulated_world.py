"""Everything before the candidates of one seed: a log of simulated users, and the reward models trained on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from lab.composer import ComposerPolicy, SignalFunction, imitate_demonstrations
from lab.dataset import ReplyDataset
from lab.features import (
    Matrix,
    ObjectiveModel,
    ReplyFeatures,
    calibrate_model,
    fit_pair_weights,
    fit_weights,
    subsample_negatives,
)
from lab.replies import GroundTruthCache, compose_texts, sample_demonstrations, sample_logged_choices
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from scipy import sparse

from rluf.reward.calibration import Calibration, compute_prior_shift
from rluf.reward.debias import SIGN_OFF_PHRASES
from rluf.simulate.users import ResponseFeatures, UserPopulation, love_logits, simulate_reactions
from rluf.simulate.world import WORLD, SimulatedWorld

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
LOG_ROWS, USER_COUNT, PAIR_COUNT, LABEL_COUNT, DEMONSTRATION_COUNT = 40_000, 8_000, 1_500, 1_200, 5_000
"""Of 40,000 replies some 600 are loved in world 2."""
VOCABULARY_ROWS = 8_000
"""First rows of the log, whose words and word pairs are the features."""
TEST_ROWS = 2_500
MEMBER_COUNT = 5
DEV_USER_SHARE = 0.1
"""Share of the users whose rows fit the calibration."""


@dataclass(frozen=True, slots=True)
class FeedbackLog:
    """N served replies with reactions, in order of time. All fields are [N], `choices` is [N, 5].

    `loved` and `continued` are 0 or 1; `love_probability` follows the reader's own taste.
    """

    prompt_index: Ints
    choices: Ints
    user_index: Ints
    loved: Floats
    continued: Floats
    love_probability: Floats

    def select_rows(self, row_index: Ints | NDArray[np.bool_]) -> FeedbackLog:
        """The log of these rows."""
        return FeedbackLog(*(getattr(self, name)[row_index] for name in self.__slots__))

    def with_permuted_hearts(self, rng: np.random.Generator) -> FeedbackLog:
        """The log with its hearts in random order."""
        return replace(self, loved=rng.permutation(self.loved))


def simulate_feedback(
    dataset: ReplyDataset,
    truth_cache: GroundTruthCache,
    prompt_index: Ints,
    choices: Ints,
    *,
    user_count: int,
    rng: np.random.Generator,
    world: SimulatedWorld = WORLD,
) -> FeedbackLog:
    """Reactions of new users to the replies, each read once, in the given order."""
    features = ResponseFeatures.from_truths(
        truth_cache.truths_of(prompt_index, choices),
        [dataset.entries[prompt].topic for prompt in prompt_index.tolist()],
    )
    population = UserPopulation.sample(user_count, rng, world)
    activity = rng.gamma(0.8, size=user_count)
    user_index = rng.choice(user_count, len(prompt_index), p=activity / activity.sum())
    reply_index = np.arange(len(prompt_index))
    reactions = simulate_reactions(features, population, user_index, reply_index, rng, world=world)
    return FeedbackLog(
        prompt_index,
        choices,
        user_index,
        reactions.loved.astype(np.float64),
        reactions.continued.astype(np.float64),
        1.0 / (1.0 + np.exp(-love_logits(features, population, user_index, reply_index, world))),
    )


class ClaimWorld:
    """Data, reward models and base policy of one seed, computed on demand."""

    def __init__(
        self,
        dataset: ReplyDataset,
        truth_cache: GroundTruthCache,
        seed: int,
        result_folder: Path,
        simulated_world: SimulatedWorld = WORLD,
    ) -> None:
        """Computes nothing yet; the log and the models are stored in `result_folder`."""
        self.dataset, self.truth_cache, self.seed, self.result_folder = dataset, truth_cache, seed, result_folder
        self.simulated_world = simulated_world
        self.train_prompts, self.unseen_prompts = (
            dataset.prompt_indices(unseen=False),
            dataset.prompt_indices(unseen=True),
        )

    def make_rng(self, rng_part: int) -> np.random.Generator:
        """The random generator of one part of the world."""
        return np.random.default_rng([self.seed, rng_part])

    def simulate_log(self, row_count: int = LOG_ROWS, *, rng_part: int = 1, unseen: bool = False) -> FeedbackLog:
        """Simulate a log of the served versions; `unseen`: on the held-out prompts, with other users."""
        rng = self.make_rng(rng_part)
        prompt_index = rng.choice(self.unseen_prompts if unseen else self.train_prompts, row_count)
        choices = sample_logged_choices(self.dataset, prompt_index, rng)
        return simulate_feedback(
            self.dataset,
            self.truth_cache,
            prompt_index,
            choices,
            user_count=USER_COUNT,
            rng=rng,
            world=self.simulated_world,
        )

    @cached_property
    def feedback(self) -> FeedbackLog:
        """The log that P[Love] is trained on."""
        log_path = self.result_folder / "log.npz"
        if not log_path.is_file():
            self.result_folder.mkdir(parents=True, exist_ok=True)
            log = self.simulate_log()
            np.savez(log_path, **{name: getattr(log, name) for name in FeedbackLog.__slots__})
        with np.load(log_path) as stored:
            return FeedbackLog(**{name: stored[name] for name in FeedbackLog.__slots__})

    @cached_property
    def base_policy(self) -> ComposerPolicy:
        """The base policy, trained on demonstrations of the plain and the cool style."""
        policy_path = self.result_folder / "base.safetensors"
        if not policy_path.is_file():
            save_file(dict(self.imitate_styles(("plain", "cool"), rng_part=2).state_dict()), policy_path)
        policy = ComposerPolicy(self.dataset)
        policy.load_state_dict(load_file(policy_path))
        policy.eval()
        return policy

    def load_or_fit(self, name: str, fit_model: Callable[[], ObjectiveModel]) -> ObjectiveModel:
        """Load a reward model, or fit it and store it in the result folder."""
        model_folder = self.result_folder / name
        if not model_folder.is_dir():
            model = fit_model()
            model_folder.mkdir(parents=True)
            model.calibration.save(model_folder)
            np.save(model_folder / "weights.npy", model.weights)
        return ObjectiveModel(np.load(model_folder / "weights.npy"), Calibration.load(model_folder))

    def imitate_styles(
        self, styles: Sequence[str], *, rng_part: int, initial_policy: ComposerPolicy | None = None
    ) -> ComposerPolicy:
        """Train a policy on demonstrations of these styles."""
        rng = self.make_rng(rng_part)
        prompt_index = rng.choice(self.train_prompts, DEMONSTRATION_COUNT)
        choices = sample_demonstrations(self.dataset, prompt_index, rng, styles=styles)
        return imitate_demonstrations(
            self.dataset, prompt_index, choices, seed=self.seed, initial_policy=initial_policy
        )

    @cached_property
    def reply_features(self) -> ReplyFeatures:
        """Features for reward models, with the vocabulary of the log."""
        log = self.feedback.select_rows(np.arange(min(VOCABULARY_ROWS, len(self.feedback.loved))))
        return ReplyFeatures(self.dataset, compose_texts(self.dataset, log.prompt_index, log.choices))

    def features_of(self, prompt_index: Ints, choices: Ints) -> Matrix:
        """Features of the replies composed by `choices`."""
        return self.reply_features.transform(prompt_index, compose_texts(self.dataset, prompt_index, choices))

    @cached_property
    def love_model(self) -> ObjectiveModel:
        """P[Love], an ensemble of MEMBER_COUNT models on bootstrapped rows."""
        return self.load_or_fit("love", lambda: self.fit_reaction_model("love", self.feedback))

    @cached_property
    def continuation_model(self) -> ObjectiveModel:
        """Probability that the user continues, from the same log: a longer-term signal."""
        return self.fit_reaction_model("continued", self.feedback)

    def fit_reaction_model(
        self,
        reaction: str,
        log: FeedbackLog,
        *,
        member_count: int = MEMBER_COUNT,
        augmented_share: float = 0.0,
        positive_share: float = 0.1,
    ) -> ObjectiveModel:
        """Fit a model of the probability of a reaction on `log`.

        `augmented_share` is the share of rows repeated with a sign-off and the same label.
        """
        labels = log.loved if reaction == "love" else log.continued
        is_dev = log.user_index % round(1 / DEV_USER_SHARE) == 0
        train_index = np.flatnonzero(~is_dev)
        rows, sample_weights = subsample_negatives(labels[train_index], self.make_rng(99), positive_share)
        shift, rows = compute_prior_shift(labels[train_index][rows], sample_weights), train_index[rows]
        features, targets = self.features_of(log.prompt_index[rows], log.choices[rows]), labels[rows]
        texts = compose_texts(self.dataset, log.prompt_index[rows], log.choices[rows])
        member_weights = []
        for member in range(member_count):
            rng = self.make_rng(100 + member)
            picks = np.arange(len(rows)) if member_count == 1 else rng.choice(len(rows), len(rows))
            inputs, member_targets = features[picks], targets[picks]
            if augmented_share:
                augmented = picks[rng.random(len(picks)) < augmented_share]
                phrases = rng.choice(SIGN_OFF_PHRASES, len(augmented)).tolist()
                new_texts = [f"{texts[row]} {phrase}" for row, phrase in zip(augmented.tolist(), phrases, strict=True)]
                inputs = sparse.vstack(
                    [inputs, self.reply_features.transform(log.prompt_index[rows[augmented]], new_texts)]
                )
                member_targets = np.concatenate([member_targets, targets[augmented]])
            member_weights.append(fit_weights(inputs, member_targets))
        dev_features = self.features_of(log.prompt_index[is_dev], log.choices[is_dev])
        return calibrate_model(reaction, member_weights, dev_features, labels[is_dev], shift)

    @cached_property
    def helpfulness_model(self) -> ObjectiveModel:
        """The model of raters' preferences."""
        return self.load_or_fit("helpfulness", self._fit_helpfulness)

    @cached_property
    def safety_model(self) -> ObjectiveModel:
        """The model of raters' safety labels."""
        return self.load_or_fit("safety", self._fit_safety)

    def _fit_helpfulness(self) -> ObjectiveModel:
        """Bradley-Terry on raters' preferences between two replies to a prompt."""
        rng = self.make_rng(4)
        prompt_index = rng.choice(self.train_prompts, PAIR_COUNT)
        choices_by_side = [sample_logged_choices(self.dataset, prompt_index, rng) for _ in range(2)]
        true_scores = [
            np.array([truth.helpfulness for truth in self.truth_cache.truths_of(prompt_index, choices)])
            for choices in choices_by_side
        ]
        win_probability = 1.0 / (1.0 + np.exp(-WORLD.rater_sharpness * (true_scores[0] - true_scores[1])))
        win_probability = win_probability * (1.0 - WORLD.rater_slip) + 0.5 * WORLD.rater_slip
        first, second = (self.features_of(prompt_index, choices) for choices in choices_by_side)
        weights = fit_pair_weights(first, second, rng.random(PAIR_COUNT) < win_probability)
        return ObjectiveModel(weights[None], Calibration("helpfulness"))

    def _fit_safety(self) -> ObjectiveModel:
        """Logistic regression on safety labels, mostly of risky prompts, where both labels occur."""
        rng = self.make_rng(5)
        is_risky = np.array([self.dataset.entries[entry].topic == "risky" for entry in self.train_prompts])
        prompt_index = rng.choice(
            self.train_prompts, LABEL_COUNT, p=np.where(is_risky, 0.65 / is_risky.sum(), 0.35 / (~is_risky).sum())
        )
        choices = sample_logged_choices(self.dataset, prompt_index, rng)
        is_safe = np.array([entry.safety > 0.5 for entry in self.truth_cache.truths_of(prompt_index, choices)])
        labels = (is_safe != (rng.random(LABEL_COUNT) < WORLD.rater_slip)).astype(np.float64)
        features, train_count = self.features_of(prompt_index, choices), round(0.9 * LABEL_COUNT)
        return calibrate_model(
            "safety",
            [fit_weights(features[:train_count], labels[:train_count])],
            features[train_count:],
            labels[train_count:],
            0.0,
        )

    @cached_property
    def objective_models(self) -> dict[str, ObjectiveModel]:
        """The models of the three objectives."""
        return {"love": self.love_model, "helpfulness": self.helpfulness_model, "safety": self.safety_model}

    def build_signals(
        self, *, love_model: ObjectiveModel | None = None, pessimism: float = 0.0, continuation_weight: float = 0.0
    ) -> SignalFunction:
        """Logits of the three objectives, as the input of rluf's reward aggregation.

        `love_model` replaces P[Love], `pessimism` subtracts that many standard deviations over its members,
        `continuation_weight` adds that many times the continuation logit.
        """
        models = {**self.objective_models, **({} if love_model is None else {"love": love_model})}

        def compute_signals(prompt_index: Ints, texts: Sequence[str]) -> Mapping[str, Floats]:
            features = self.reply_features.transform(prompt_index, texts)
            signals = {name: model.mean_logits(features) for name, model in models.items()}
            if pessimism:
                signals["love"] = signals["love"] - pessimism * models["love"].member_logits(features).std(0)
            if continuation_weight:
                signals["love"] = signals["love"] + continuation_weight * self.continuation_model.mean_logits(features)
            return signals

        return compute_signals
