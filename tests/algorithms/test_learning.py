"""Every algorithm trains a table policy over short responses, with a known best response, to 95% of the optimum."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from statistics import fmean

import pytest
import torch

from benchmarks.lab.table_policy import LENGTH, TablePolicy, make_aggregator, score_target_tokens, train
from rluf.algorithms.advantages import AdvantageInputs
from rluf.algorithms.registry import ALGORITHMS, build_learner_inputs
from rluf.config.policy import AlgorithmSettings

SEEDS = (1, 2, 3)
STEPS = 60


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors of a hundred numbers are slower on many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


CASES = [
    *(
        (name, None, "calibrated" if ALGORITHMS[name].needs_reference_kl else "linear", "k3")
        for name in ALGORITHMS
        if not ALGORITHMS[name].offline
    ),
    *((name, loss, "linear", "k3") for name in ("grpo", "dr_grpo") for loss in ("gspo", "cispo", "reinforce")),
    ("grpo", None, "gdpo", "k3"),
    ("rloo", None, "linear", "reward"),
    ("ppo", None, "linear", "reward"),
    ("reinforce_pp", None, "linear", "reward"),
]


@pytest.mark.parametrize(("name", "loss", "method", "kl_penalty"), CASES)
def test_each_algorithm_reaches_95_percent_of_the_optimum(
    name: str, loss: str | None, method: str, kl_penalty: str
) -> None:
    algorithm = AlgorithmSettings.model_validate(
        {"name": name, "loss": loss, "kl_penalty": kl_penalty, "kl_coef": 0.001}
    )
    love_by_seed = {}
    for seed in SEEDS:
        history = train(TablePolicy(seed), algorithm, make_aggregator(method, 1.0, 0.0), score_target_tokens, STEPS)
        love_by_seed[seed] = fmean(step["love"] for step in history[-10:])
    assert all(love >= 0.95 for love in love_by_seed.values()), love_by_seed


def score_unsafe_temptation(prompt: int, tokens: Sequence[int]) -> dict[str, float]:
    """Token 0 is loved most and unsafe; token 1 is loved a little less and safe; the others are neither."""
    del prompt
    return {
        "love": fmean({0: 3.0, 1: 2.0}.get(token, 0.0) for token in tokens),
        "helpfulness": 0.0,
        "safety": fmean({0: -2.0, 1: 0.3}.get(token, 0.0) for token in tokens),
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_floors_are_met_where_a_weighted_sum_violates_them(seed: int) -> None:
    """The floor is the reference policy's own mean; both runs have the same weights."""
    algorithm = AlgorithmSettings(kl_coef=0.001)
    final_means = {}
    for method, floors in (("linear", {}), ("constrained", {"safety": 0.0})):
        aggregator = make_aggregator(method, 0.9, 0.1, floors)
        history = train(TablePolicy(seed, learning_rate=0.1), algorithm, aggregator, score_unsafe_temptation, 200)
        assert aggregator.normalizer is not None
        for name in ("love", "safety"):
            normalized = aggregator.normalizer.normalize(name, [step[name] for step in history[-40:]])
            final_means[method, name] = fmean(normalized)
    assert final_means["linear", "safety"] < -1.0, final_means
    assert final_means["constrained", "safety"] >= -0.05, final_means
    assert final_means["constrained", "love"] > 1.0, final_means


@pytest.mark.parametrize("loss", ["ppo", "gspo", "cispo", "reinforce"])
def test_learning_rate_zero_leaves_the_policy_unchanged_and_the_ratio_at_one(loss: str) -> None:
    policy = TablePolicy(1, learning_rate=0.0)
    with torch.no_grad():
        policy.logits.copy_(torch.randn_like(policy.logits))
    logits_before, algorithm = policy.logits.detach().clone(), AlgorithmSettings()
    rng = random.Random(0)
    for _ in range(5):
        groups = policy.sample_groups()
        rewards = [[rng.random() for _ in range(policy.sample_count)] for _ in groups]
        learner_inputs = build_learner_inputs(
            AlgorithmSettings.model_validate({"loss": loss}),
            AdvantageInputs(rewards, [[LENGTH] * policy.sample_count] * len(groups)),
            max_response_tokens=LENGTH,
            kl_coef=0.02,
        )
        result = policy.update(algorithm, groups, learner_inputs)
        assert result.max_ratio.item() == pytest.approx(1.0, abs=1e-6)
    assert torch.equal(policy.logits, logits_before)


@pytest.mark.parametrize("loss", ["ppo", "gspo", "cispo"])
@pytest.mark.parametrize(("mini_batches", "epochs"), [(4, 2), (4, 1), (1, 4)])
def test_several_updates_at_least_double_what_a_cautious_learning_rate_reaches(
    loss: str, mini_batches: int, epochs: int
) -> None:
    """25 batches of 12 x 4; benchmarks/learning.py has all learning rates."""
    reached = {}
    for settings in ({}, {"mini_batches": mini_batches, "epochs": epochs}):
        algorithm = AlgorithmSettings.model_validate({"loss": loss, "kl_coef": 0.0, **settings})
        policy = TablePolicy(1, 0.03, prompt_count=12, groups_per_prompt=1, sample_count=4)
        history = train(policy, algorithm, make_aggregator("linear", 1.0, 0.0), score_target_tokens, 25)
        reached[bool(settings)] = (history[-1]["love"] - history[0]["love"]) / (1.0 - history[0]["love"])
    assert reached[True] > 2 * reached[False] > 0, reached
