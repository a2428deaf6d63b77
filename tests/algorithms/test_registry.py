"""Algorithm registry: loss weights, policy losses, plug-ins and the learner inputs of each algorithm."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rluf.algorithms.advantages import ADVANTAGE_ESTIMATORS, AdvantageInputs, Advantages, SampleKL
from rluf.algorithms.losses import POLICY_LOSSES
from rluf.algorithms.registry import (
    ALGORITHMS,
    AlgorithmSpec,
    LearnerInputs,
    build_learner_inputs,
    check_algorithm,
    compute_token_weights,
    find_algorithm,
    mask_truncated,
    requires_reference,
    requires_reference_kl,
    scale_mini_batch_weights,
    split_mini_batches,
)
from rluf.config.policy import ALGORITHM_NAMES, CGPO_ALGORITHMS, POLICY_LOSS_NAMES, AlgorithmSettings
from rluf.config.rules import REINFORCE_LOSS_ALGORITHMS
from rluf.errors import SettingsError

LENGTHS = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=5), min_size=1, max_size=6)


def make_settings(name: str, **overrides: object) -> AlgorithmSettings:
    return AlgorithmSettings.model_validate({"name": name, **overrides})


def test_settings_registry_and_rules_name_the_same_algorithms() -> None:
    assert set(ALGORITHM_NAMES) == set(ALGORITHMS)
    assert set(POLICY_LOSS_NAMES) == set(POLICY_LOSSES)
    assert {spec.advantage_estimator for spec in ALGORITHMS.values()} <= set(ADVANTAGE_ESTIMATORS)
    assert {name for name, spec in ALGORITHMS.items() if spec.policy_loss == "reinforce"} == set(
        REINFORCE_LOSS_ALGORITHMS
    )
    assert {name for name, spec in ALGORITHMS.items() if spec.needs_reference_kl} == set(CGPO_ALGORITHMS)


def test_token_weights_by_hand() -> None:
    lengths = [[2, 4], [6]]
    assert compute_token_weights("sequence_mean", lengths, 10) == [[1 / 6, 1 / 12], [1 / 18]]
    assert compute_token_weights("token_mean", lengths, 10) == [[1 / 12, 1 / 12], [1 / 12]]
    assert compute_token_weights("constant", lengths, 10) == [[1 / 30, 1 / 30], [1 / 30]]
    assert compute_token_weights("sequence_sum", lengths, 10) == [[1 / 3, 1 / 3], [1 / 3]]
    assert compute_token_weights("prompt_mean", lengths, 10) == [[1 / 2, 1 / 2], [1 / 2]]
    assert compute_token_weights("sequence_mean", [[0]], 10) == [[1.0]]


@given(LENGTHS)
def test_weights_of_means_add_up_to_one(lengths: list[list[int]]) -> None:
    for loss_aggregation in ("sequence_mean", "token_mean"):
        weights = compute_token_weights(loss_aggregation, lengths, 40)
        total = sum(w * n for row, sizes in zip(weights, lengths, strict=True) for w, n in zip(row, sizes, strict=True))
        assert total == pytest.approx(1.0)


def test_masked_truncated_responses_have_no_loss_and_the_others_keep_theirs() -> None:
    inputs = build_learner_inputs(
        make_settings("grpo", truncated="mask"),
        AdvantageInputs(rewards=[[1.0, 0.0], [2.0, 0.0]], response_lengths=[[2, 5], [4, 5]]),
        max_response_tokens=5,
        kl_coef=0.0,
    )
    masked = mask_truncated(inputs, [(True, False), (False, False)])
    assert masked.loss_weights == [[1 / 8, 0.0], [0.0, 0.0]]
    assert masked.advantages == inputs.advantages


def test_a_demonstration_is_added_with_advantage_one_by_every_algorithm() -> None:
    sample_kl = [[SampleKL(0.1), SampleKL(0.2)]]
    for name in (name for name, method in ALGORITHMS.items() if not method.offline):
        inputs = AdvantageInputs([[0.2, 0.8]], [[3, 5]], sample_kl)
        learner_inputs = build_learner_inputs(
            make_settings(name), inputs, max_response_tokens=10, kl_coef=0.02, demonstration_lengths=[4]
        )
        assert (
            learner_inputs.advantages[1] == [1.0]
            and len(learner_inputs.loss_weights[1]) == 1
            and learner_inputs.loss_weights[1][0] > 0
        )
        assert learner_inputs.loss_kl_coef == 0.02


def test_the_default_is_grpo_with_a_mean_over_tokens_then_samples() -> None:
    inputs = AdvantageInputs([[0.0, 1.0]], [[3, 5]])
    learner_inputs = build_learner_inputs(AlgorithmSettings(), inputs, max_response_tokens=10, kl_coef=0.02)
    assert learner_inputs.policy_loss == "ppo" and learner_inputs.kl_to_go_coef == 0.0
    assert learner_inputs.loss_weights == [[1 / 6, 1 / 10]]
    assert not requires_reference_kl(AlgorithmSettings())


def test_kl_in_the_reward_leaves_the_loss() -> None:
    algorithm = make_settings("reinforce_pp", kl_penalty="reward")
    inputs = AdvantageInputs([[0.0, 1.0]], [[3, 5]], [[SampleKL(0.1, 0.2, 0.1), SampleKL(0.2, 0.3, 0.2)]], kl_coef=0.5)
    learner_inputs = build_learner_inputs(algorithm, inputs, max_response_tokens=10, kl_coef=0.5)
    assert (
        requires_reference_kl(algorithm) and learner_inputs.loss_kl_coef == 0.0 and learner_inputs.kl_to_go_coef > 0.5
    )


def test_gspo_uses_sequence_mean_with_every_algorithm() -> None:
    inputs = AdvantageInputs([[0.0, 1.0]], [[3, 5]])
    learner_inputs = build_learner_inputs(
        make_settings("dapo", loss="gspo"), inputs, max_response_tokens=10, kl_coef=0.0
    )
    assert (learner_inputs.policy_loss, learner_inputs.loss_weights) == ("gspo", [[1 / 6, 1 / 10]])


@given(LENGTHS, st.integers(1, 8))
def test_mini_batches_cover_all_groups_and_each_has_the_weight_of_a_step(lengths: list[list[int]], count: int) -> None:
    for aggregation in ("sequence_mean", "token_mean", "constant", "sequence_sum", "prompt_mean"):
        mini_batches = split_mini_batches(len(lengths), count)
        assert sorted(group for groups in mini_batches for group in groups) == list(range(len(lengths)))
        assert all(mini_batches)
        weights = compute_token_weights(aggregation, lengths, 50)
        inputs = scale_mini_batch_weights(LearnerInputs([], weights), lengths, mini_batches)
        totals = [
            sum(w * n for group in groups for w, n in zip(matrix[group], lengths[group], strict=True))
            for matrix, parts in ((weights, [range(len(lengths))]), (inputs.loss_weights, mini_batches))
            for groups in parts
        ]
        assert totals == pytest.approx([totals[0]] * len(totals))


@pytest.mark.parametrize(
    ("settings", "is_required"),
    [
        ({"kl_coef": 0.0}, False),
        ({"kl_coef": 0.01}, True),
        ({"kl_coef": 0.0, "kl_budget": 0.5}, True),
        ({"kl_coef": 0.0, "name": "crpg"}, True),
        ({"kl_coef": 0.0, "name": "kto"}, True),
        ({"kl_coef": 0.02, "name": "dpo"}, True),
        ({"kl_coef": 0.02, "name": "sft"}, False),
        ({"kl_coef": 0.0, "name": "ppo"}, False),
    ],
)
def test_a_reference_policy_is_loaded_only_where_something_reads_it(
    settings: dict[str, Any], is_required: bool
) -> None:
    assert requires_reference(AlgorithmSettings.model_validate(settings)) is is_required


CUSTOM_ALGORITHM = AlgorithmSpec("rloo", "reinforce", "sequence_sum", needs_reference_kl=True)


def keep_rewards(inputs: AdvantageInputs) -> Advantages:
    return Advantages([list(rewards) for rewards in inputs.rewards])


UNKNOWN_ESTIMATOR = AlgorithmSpec("grop", "ppo", "token_mean")
UNKNOWN_LOSS = AlgorithmSpec("grpo", "pop", "token_mean")
UNKNOWN_AGGREGATION = AlgorithmSpec("grpo", "ppo", "mean")  # type: ignore[arg-type]
HERE = "tests.algorithms.test_registry"


@pytest.mark.parametrize(
    ("name", "loss", "message"),
    [
        ("grpo", "os:sep", r"policy loss 'os:sep': expected a function .*, got str"),
        ("grpo", "os:none", r"policy loss 'os:none' cannot be imported"),
        ("nowhere:x", None, r"algorithm 'nowhere:x' cannot be imported"),
        ("os:sep", None, r"algorithm 'os:sep': expected an AlgorithmSpec or a function"),
        (f"{HERE}:UNKNOWN_ESTIMATOR", None, r"there is no advantage estimator 'grop'"),
        (f"{HERE}:UNKNOWN_LOSS", None, r"there is no policy loss 'pop'"),
        (f"{HERE}:UNKNOWN_AGGREGATION", None, r"loss aggregation 'mean'; choose one of sequence_mean, token_mean"),
    ],
)
def test_parts_of_an_algorithm_are_loaded_before_training(name: str, loss: str | None, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        check_algorithm(make_settings(name, loss=loss))


@pytest.mark.parametrize("name", ALGORITHM_NAMES)
def test_built_in_algorithms_pass_the_check(name: str) -> None:
    check_algorithm(make_settings(name))


def test_an_algorithm_can_be_a_plugin() -> None:
    assert find_algorithm(f"{__name__}:CUSTOM_ALGORITHM") is CUSTOM_ALGORITHM
    settings = make_settings(f"{__name__}:keep_rewards")
    learner_inputs = build_learner_inputs(
        settings, AdvantageInputs([[0.5, 1.0]], [[2, 4]]), max_response_tokens=10, kl_coef=0.0
    )
    assert learner_inputs.advantages == [[0.5, 1.0]] and learner_inputs.policy_loss == "ppo"
    with pytest.raises(SettingsError, match="there is no algorithm 'grop'; choose one of"):
        find_algorithm("grop")


def test_the_docs_have_a_row_for_every_name() -> None:
    text = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `algorithm\.name: (\w+)`", text, re.MULTILINE)) == set(ALGORITHMS)
    assert set(re.findall(r"^\| `algorithm\.loss: (\w+)`", text, re.MULTILINE)) == set(POLICY_LOSSES)
