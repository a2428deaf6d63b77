"""The claims' own world, small: what a policy says, learns and is judged by is real; the page is written in order."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from lab import simulated_world as villages
from lab import studies
from lab.candidates import GATES, Candidates, measured, recipe
from lab.composer import train
from lab.dataset import BODIES, Town
from lab.drawing import Figure, Series
from lab.policy_claims import CLAIMS, hacked
from lab.replies import SLOTS, Truth, texts
from lab.simulated_world import Village
from lab.store import Store
from lab.tables import Told, put, tell

from rluf.reward.metrics import auroc
from rluf.simulate.world import fingerprint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def village(tmp_path_factory: pytest.TempPathFactory) -> Village:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"EVENTS": 1500, "PAIRS": 300, "LABELS": 300, "DEMONSTRATIONS": 1500, "MEMBERS": 2}.items():
            patch.setattr(villages, name, value)
        town = Town()
        made = Village(town, Truth(town), 5, tmp_path_factory.mktemp("claims"))
        made.__dict__["feedback"] = made.log(1500)
        assert made.judgements.keys() == {"love", "helpfulness", "safety"}
        assert made.base is made.base
    return made


def test_prompts_that_policies_are_judged_on_are_apart_from_all_that_learns(village: Village) -> None:
    known = {village.town.places[n].asked for n in village.feedback.place.tolist()}
    assert not known & {village.town.places[n].asked for n in village.unseen.tolist()}
    assert len(village.unseen) > 80
    assert all(len(place.bodies) == BODIES == len(set(place.bodies)) for place in village.town.places)


def test_probabilities_of_replies_are_those_they_are_drawn_with(village: Village) -> None:
    places = torch.as_tensor(np.repeat(village.places[:4], 50))
    picks, logprobs = village.base.sample(places, torch.Generator().manual_seed(1))
    torch.testing.assert_close(village.base.logprobs(places, picks), logprobs)
    every = torch.arange(SLOTS[0])
    first = torch.stack([every, *[torch.zeros_like(every)] * 4], 1)
    total = village.base.logprobs(torch.as_tensor(np.repeat(village.places[:1], SLOTS[0])), first)[:, 0].exp().sum()
    assert float(total) == pytest.approx(1.0, abs=1e-5)


def test_hearts_teach_a_score_that_ranks_other_prompts(village: Village) -> None:
    other = village.log(600, part=9, unseen=True)
    assert (
        auroc(village.love.logits(village.seen(other.place, other.picks)), (other.chance > 0.08).astype(float)) > 0.65
    )


def test_thumbs_from_habit_seem_to_bring_users_back_only_where_those_who_react_return_anyway(
    village: Village, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studies, "READS", 6000)
    found = studies.choice(village, Candidates(village))["strengths"]
    alone, selected = ({row["signal"]: row["link"] for row in found[one]} for one in ("0", "2"))
    assert alone["thumbs up"]["low"] < 0.0 < alone["thumbs up"]["high"]
    assert selected["thumbs up"]["low"] > 0.0
    assert alone["continue"]["low"] > 0.0  # who writes on is satisfied, and so comes back


def test_training_raises_its_own_reward_and_a_candidate_is_judged_by_new_users(village: Village) -> None:
    run = train(village.town, village.base, village.places, village.signals(), recipe(0.5, kl=0.1, steps=12), seed=5)
    assert run.steps[-1]["reward"] > run.steps[0]["reward"] + 0.1
    assert run.steps[0]["kl"] == pytest.approx(0.0, abs=1e-4)
    one = measured(village, Candidates(village).of("w0.5", run.policy, love=True, weight=0.5))
    assert one["kl"] > 0.0
    assert set(GATES) <= one["monitors"]["new"].keys()  # claim 13 counts what the judges object to
    assert one["offline"]["love"]["mean"] > 0.0
    assert one["ab"]["srm"] > 1e-4
    assert 9_000 < sum(one["ab"]["users"]) <= 10_000
    assert not hacked(
        {**one, "monitors": {"base": {"unprompted_farewell": 0.02}, "new": {"unprompted_farewell": 0.03}}}
    )
    assert hacked({**one, "monitors": {"base": {"unprompted_farewell": 0.02}, "new": {"unprompted_farewell": 0.08}}})


def test_a_reply_is_read_as_it_is_composed(village: Village) -> None:
    place = village.places[:1]
    said = texts(village.town, place, np.array([[1, 3, 0, 11, 0]]))[0]
    assert said == f"Hi there! {village.town.places[place[0]].bodies[3]} Bye! Sending love!"


def test_sections_stand_in_order_and_are_replaced(tmp_path: Path) -> None:
    page = put(put(put("# Page\n", 6, "six"), 1, "one"), 4, "four")
    assert page.index("one") < page.index("four") < page.index("six")
    assert put(page, 4, "again").count("claim 4") == 2
    assert "four" not in put(page, 4, "again")
    (tmp_path / "images").mkdir()
    (tmp_path / "claims.md").write_text("# Page\n", "utf-8")
    figure = Figure(
        "A title", "x", "y", "y", [Series("a", [(0.0, 0.1), (1.0, 0.4)], [(0.0, 0.2), (0.3, 0.5)], line=True)]
    )
    told: dict[int, Any] = {2: lambda _: Told("it holds", True, ["a"], [["1"]], ["Said."], figure, {"n": 1})}
    found = tell(Store(tmp_path / "runs"), 2, tmp_path, told)
    assert found == {"claim": 2, "world": fingerprint(), "passed": True, "n": 1}
    assert f"world `{fingerprint()}`: passes" in (tmp_path / "claims.md").read_text("utf-8")
    assert (tmp_path / "images" / "claim-02.svg").read_text("utf-8").startswith("<svg")
    assert {1, 4, 6, 7, 8, 10} <= set(CLAIMS)


def test_the_page_tells_of_this_world() -> None:
    page = (Path(__file__).parents[2] / "docs" / "claims.md").read_text("utf-8")
    assert fingerprint() in page
