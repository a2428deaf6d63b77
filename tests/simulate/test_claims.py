"""The claims' world at small scale: data splits, sampling, training, evaluation and the sections of the page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from lab import simulated_world as world_module
from lab import studies
from lab.candidates import GATE_JUDGES, CandidateSet, build_recipe, measure_candidate
from lab.composer import train_composer
from lab.dataset import REPLIES_PER_PROMPT, ReplyDataset
from lab.drawing import Figure, Series
from lab.policy_claims import CLAIM_FUNCTIONS, is_hacked
from lab.replies import SLOT_OPTIONS, GroundTruthCache, compose_texts
from lab.simulated_world import ClaimWorld
from lab.store import ResultStore
from lab.tables import ClaimResult, insert_section, write_claim_section

from rluf.reward.metrics import auroc
from rluf.simulate.world import fingerprint_world

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
    rows_by_strength = studies.study_signal_choice(claim_world, CandidateSet(claim_world))["strengths"]
    without_selection, with_selection = (
        {row["signal"]: row["link"] for row in rows_by_strength[strength]} for strength in ("0", "2")
    )
    assert without_selection["thumbs up"]["low"] < 0.0 < without_selection["thumbs up"]["high"]
    assert with_selection["thumbs up"]["low"] > 0.0
    assert without_selection["continue"]["low"] > 0.0  # users who continue are satisfied, and so return


def test_training_raises_the_reward_and_new_users_judge_the_candidate(claim_world: ClaimWorld) -> None:
    run = train_composer(
        claim_world.dataset,
        claim_world.base_policy,
        claim_world.train_prompts,
        claim_world.build_signals(),
        build_recipe(0.5, kl_coef=0.1, step_count=12),
        seed=5,
    )
    assert run.step_means[-1]["reward"] > run.step_means[0]["reward"] + 0.1
    assert run.step_means[0]["kl"] == pytest.approx(0.0, abs=1e-4)
    result = measure_candidate(
        claim_world, CandidateSet(claim_world).from_policy("w0.5", run.policy, trained_on_love=True, weight=0.5)
    )
    assert result["kl"] > 0.0
    assert set(GATE_JUDGES) <= result["monitors"]["new"].keys()  # claim 13 counts replies that fail the judges
    assert result["offline"]["love"]["mean"] > 0.0
    assert result["ab"]["srm"] > 1e-4
    assert 9_000 < sum(result["ab"]["users"]) <= 10_000
    assert not is_hacked(
        {**result, "monitors": {"base": {"unprompted_farewell": 0.02}, "new": {"unprompted_farewell": 0.03}}}
    )
    assert is_hacked(
        {**result, "monitors": {"base": {"unprompted_farewell": 0.02}, "new": {"unprompted_farewell": 0.08}}}
    )


def test_composed_text_follows_the_choices(claim_world: ClaimWorld) -> None:
    prompt_index = claim_world.train_prompts[:1]
    reply_text = compose_texts(claim_world.dataset, prompt_index, np.array([[1, 3, 0, 11, 0]]))[0]
    assert reply_text == f"Hi there! {claim_world.dataset.entries[prompt_index[0]].reply_texts[3]} Bye! Sending love!"


def test_sections_are_in_order_and_replaced(tmp_path: Path) -> None:
    page = insert_section(insert_section(insert_section("# Page\n", 6, "six"), 1, "one"), 4, "four")
    assert page.index("one") < page.index("four") < page.index("six")
    assert insert_section(page, 4, "again").count("claim 4") == 2
    assert "four" not in insert_section(page, 4, "again")
    (tmp_path / "images").mkdir()
    (tmp_path / "claims.md").write_text("# Page\n", "utf-8")
    figure = Figure(
        "A title", "x", "y", "y", [Series("a", [(0.0, 0.1), (1.0, 0.4)], [(0.0, 0.2), (0.3, 0.5)], has_line=True)]
    )
    claim_functions: dict[int, Any] = {
        2: lambda _: ClaimResult("it holds", True, ["a"], [["1"]], ["Said."], figure, {"n": 1})
    }
    numbers = write_claim_section(ResultStore(tmp_path / "runs"), 2, tmp_path, claim_functions)
    assert numbers == {"claim": 2, "world": fingerprint_world(), "passed": True, "n": 1}
    assert f"world `{fingerprint_world()}`: passes" in (tmp_path / "claims.md").read_text("utf-8")
    assert (tmp_path / "images" / "claim-02.svg").read_text("utf-8").startswith("<svg")
    assert {1, 4, 6, 7, 8, 10} <= set(CLAIM_FUNCTIONS)


def test_claims_page_has_the_current_fingerprint() -> None:
    page = (Path(__file__).parents[2] / "docs" / "claims.md").read_text("utf-8")
    assert fingerprint_world() in page
