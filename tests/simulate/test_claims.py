"""The claims' world at small scale: data splits, sampling, training, evaluation and the sections of the page."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from lab import candidates as candidates_module
from lab import experiment, studies
from lab import simulated_world as world_module
from lab.candidates import CandidateSet, PolicySpec
from lab.composer import train_composer
from lab.dataset import REPLIES_PER_PROMPT, ReplyDataset
from lab.experiment import COUNTED_JUDGES, compare_judgments
from lab.replies import SLOT_OPTIONS, GroundTruthCache, compose_texts
from lab.simulated_world import ClaimWorld

from rluf.reward.metrics import auroc

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def claim_world(tmp_path_factory: pytest.TempPathFactory) -> ClaimWorld:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "LOG_ROWS": 1500,
            "PAIR_COUNT": 300,
            "LABEL_COUNT": 300,
            "DEMONSTRATION_COUNT": 1500,
            "MEMBER_COUNT": 2,
        }.items():
            patch.setattr(world_module, name, value)
        dataset = ReplyDataset()
        world = ClaimWorld(dataset, GroundTruthCache(dataset), 5, tmp_path_factory.mktemp("claims"))
        world.__dict__["feedback"] = world.simulate_log(1500)
        assert world.objective_models.keys() == {"love", "helpfulness", "safety"}
        assert world.base_policy is world.base_policy
    return world


def test_evaluation_prompts_are_held_out_from_training(claim_world: ClaimWorld) -> None:
    training_prompts = {
        claim_world.dataset.entries[index].last_user_message for index in claim_world.feedback.prompt_index.tolist()
    }
    assert not training_prompts & {
        claim_world.dataset.entries[index].last_user_message for index in claim_world.unseen_prompts.tolist()
    }
    assert len(claim_world.unseen_prompts) > 80
    assert all(
        len(entry.reply_texts) == REPLIES_PER_PROMPT == len(set(entry.reply_texts))
        for entry in claim_world.dataset.entries
    )


def test_logprobs_match_the_sampling_distribution(claim_world: ClaimWorld) -> None:
    prompt_index = torch.as_tensor(np.repeat(claim_world.train_prompts[:4], 50))
    choices, logprobs = claim_world.base_policy.sample(prompt_index, torch.Generator().manual_seed(1))
    torch.testing.assert_close(claim_world.base_policy.logprobs(prompt_index, choices), logprobs)
    openers = torch.arange(SLOT_OPTIONS[0])
    opener_choices = torch.stack([openers, *[torch.zeros_like(openers)] * 4], 1)
    total_probability = (
        claim_world.base_policy.logprobs(
            torch.as_tensor(np.repeat(claim_world.train_prompts[:1], SLOT_OPTIONS[0])), opener_choices
        )[:, 0]
        .exp()
        .sum()
    )
    assert float(total_probability) == pytest.approx(1.0, abs=1e-5)


def test_love_model_ranks_replies_to_unseen_prompts(claim_world: ClaimWorld) -> None:
    other_log = claim_world.simulate_log(600, rng_part=9, unseen=True)
    assert (
        auroc(
            claim_world.love_model.mean_logits(claim_world.features_of(other_log.prompt_index, other_log.choices)),
            (other_log.love_probability > 0.08).astype(float),
        )
        > 0.65
    )


def test_habitual_thumbs_predict_return_only_under_self_selection(
    claim_world: ClaimWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studies, "SIGNAL_LOG_ROWS", 6000)
    rows_by_strength = studies.study_signal_choice(claim_world)
    without_selection, with_selection = (
        {row["signal"]: row["link"] for row in rows_by_strength[strength]} for strength in ("0", "1")
    )
    assert without_selection["thumbs up"]["low"] < 0.0 < without_selection["thumbs up"]["high"]
    assert with_selection["thumbs up"]["low"] > 0.0
    assert without_selection["continue"]["low"] > 0.0  # users who continue are satisfied, and so return


def test_training_raises_the_reward(claim_world: ClaimWorld) -> None:
    run = train_composer(
        claim_world.dataset,
        claim_world.base_policy,
        claim_world.train_prompts,
        claim_world.build_signals(),
        PolicySpec(0.5, kl_coef=0.1).build_recipe(step_count=12),
        seed=5,
    )
    assert run.step_means[-1]["reward"] > run.step_means[0]["reward"] + 0.1
    assert run.step_means[0]["kl"] == pytest.approx(0.0, abs=1e-4)


def test_new_users_tell_a_policy_from_another_but_not_from_itself(
    claim_world: ClaimWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "USER_COUNT", 2_000)
    monkeypatch.setattr(candidates_module, "FINAL_REPLIES", 10)
    candidates = CandidateSet(claim_world)
    base = candidates.judge("base")
    again = compare_judgments(base, candidates.judge("base-again"))
    goodbye = compare_judgments(base, candidates.judge("sft-goodbye"))
    assert again["loved"].lift is not None
    assert again["loved"].lift.low < 0.0 < again["loved"].lift.high
    assert again["helpfulness"].difference.low < 0.0 < again["helpfulness"].difference.high
    assert goodbye["loved"].lift is not None
    assert goodbye["loved"].base.mean == again["loved"].base.mean  # the same users read the base policy
    topics = [entry.topic for entry in claim_world.dataset.entries]
    rates = {name: candidates.judge(name).compute_rates(topics) for name in ("base", "sft-goodbye")}
    assert rates["sft-goodbye"]["unprompted_farewell"] > 3 * rates["base"]["unprompted_farewell"]
    assert rates["sft-goodbye"]["signoff"] > rates["base"]["signoff"]
    assert set(COUNTED_JUDGES) <= rates["base"].keys()


def test_permuted_hearts_teach_nothing(claim_world: ClaimWorld) -> None:
    log = claim_world.feedback
    permuted = log.with_permuted_hearts(claim_world.make_rng(6))
    assert permuted.loved.sum() == log.loved.sum()
    assert (permuted.loved != log.loved).any()
    test_log = claim_world.simulate_log(1_000, rng_part=9, unseen=True)
    model = claim_world.fit_reaction_model("love", permuted, member_count=1)
    score = model.mean_logits(claim_world.features_of(test_log.prompt_index, test_log.choices))
    assert abs(auroc(score, studies.true_probabilities(claim_world, test_log)) - 0.5) < 0.12


def test_composed_text_follows_the_choices(claim_world: ClaimWorld) -> None:
    prompt_index = claim_world.train_prompts[:1]
    reply_text = compose_texts(claim_world.dataset, prompt_index, np.array([[1, 3, 0, 11, 0]]))[0]
    assert reply_text == f"Hi there! {claim_world.dataset.entries[prompt_index[0]].reply_texts[3]} Bye! Sending love!"
