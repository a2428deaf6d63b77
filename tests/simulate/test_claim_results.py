"""Every claim's section is made from its parts alone: kept results of the right shape, here with known numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from lab.candidates import FIXES, METHODS, Candidates
from lab.policy_claims import CLAIMS
from lab.store import Store
from lab.studies import SIZES
from lab.tables import tell

from rluf.simulate.prompts import TOPICS
from rluf.simulate.world import WORLD


def band(middle: float, reach: float = 0.02) -> dict[str, float]:
    return {"mean": middle, "low": middle - reach, "high": middle + reach}


def candidate(name: str, number: int, *, farewells: float | None = None) -> dict[str, Any]:
    love = -0.2 if name == "sft-terse" else 0.05 * number + 0.02
    weight = float(name[1:].split("-")[0]) if name.startswith("w") else 0.0
    times = 1.0 + 4.0 * weight if farewells is None else farewells
    effects = {"love": love, "continued": -0.04, "returned": 0.0, "helpful": 0.01, "safe": 0.0}
    refusals = 0.01 if name in METHODS and name != "grpo" else 0.02
    return {
        "policy": name, "trained_on_love": weight > 0 or name in (*FIXES, *METHODS), "weight": weight, "method": "rloo",
        "kl": 0.1 * (number + 1), "replies": 600, "offline": {"love": band(0.1 * love, 0.001)},
        "gold": {key: {"base": 0.6, "new": 0.6 + 0.001 * number, **band(0.001 * number)}
                 for key in ("helpfulness", "safety", "satisfaction")},
        "ab": {key: {"lift": value, "low": value - 0.03, "high": value + 0.03, "control": 0.05,
                     "treatment": 0.05 * (1 + value)} for key, value in effects.items()},
        "monitors": {"base": {"unprompted_farewell": 0.02, "false_refusal": 0.02, "early_ending": 0.03},
                     "new": {"unprompted_farewell": 0.02 * times, "false_refusal": refusals, "early_ending": 0.04}},
        "topics": {"base": dict.fromkeys(TOPICS, 0.05),
                   "new": {topic: 0.05 + 0.05 * WORLD.topic_warmth[topic] for topic in TOPICS}},
    }  # fmt: skip


def study(name: str) -> dict[str, Any]:
    heard = {"auroc": band(0.84), "auroc_of_the_truth": 0.86, "ceiling": 0.86, "against_true_chances": 0.84,
             "rate": 0.08, "error": 0.01, "calibration_ratio": 1.0}  # fmt: skip
    moved = {"score": 0.01, "truth": 0.0}
    if name == "learnable":
        length = {
            "score": 0.1,
            "truth": 0.1,
            "by_topic": {"code": 0.0, "casual": 0.2},
            "padding": {"a": moved, "b": moved},
        }
        return {"unseen_prompts": heard, "known_prompts": heard, "length": length}
    if name == "size":
        return {"ceiling": 0.86, "rows": {str(n): heard | {"against_true_chances": 0.7 + n / 1e5} for n in SIZES}}
    if name == "noise":
        dirty = {"hearts": 300, "plain": 0.7, "filtered": 0.78}
        return {"conditions": {"rate 5%": {"hearts": 400, "plain": 0.8}, "bots 10%": dirty,
                               "rate 2%": {"hearts": 160, "plain": 0.75, "all_negatives": 0.74}}}  # fmt: skip
    if name == "choice":
        link = {"love": 0.4, "continue": 0.1, "thumbs up": 0.0}
        ranked = [{"signal": key, "per_1000": 80.0, "link": band(value), "unadjusted": band(value)}
                  for key, value in link.items()]  # fmt: skip
        ranked += [{"signal": "pleased follow-up", "per_1000": 0.0, "link": None}]
        return {"rows": 1000, "strengths": {"0": ranked, "1": [ranked[2], *ranked[:2]]}}
    own = {"auroc": 0.7, "ceiling": 0.8, "told": 0.1, "loved": 0.08}
    return {"rounds": [candidate("w0.5", 9, farewells=times) | {"own_replies": own} for times in (3.0, 1.5)]}


def change(store: Store, name: str, **parts: Any) -> None:
    """Other results for a candidate, on every seed."""
    for seed in store.seeds:
        file = store.root / f"seed{seed}" / "candidate" / f"{name}.json"
        one = json.loads(file.read_text("utf-8"))
        for key, values in parts.items():
            for inner, fresh in values.items():
                one[key][inner] |= fresh
        file.write_text(json.dumps(one), "utf-8")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    found = Store(tmp_path / "runs", (1, 2, 3))
    for seed in found.seeds:
        parts = {("candidate", name): candidate(name, n)
                 for n, name in enumerate([*Candidates.names(), *FIXES, *METHODS])}  # fmt: skip
        parts |= {("study", name): study(name) for name in ("learnable", "size", "noise", "refresh", "choice")}
        for (kind, name), part in parts.items():
            file = found.root / f"seed{seed}" / kind / f"{name}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(part), "utf-8")
    return found


def test_every_claim_is_told_with_its_verdict_and_none_is_made_again(store: Store, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    page = tmp_path / "claims.md"
    page.write_text("# Page\n", "utf-8")
    assert list(store.missing()) == []
    found = {claim: tell(store, claim, tmp_path, CLAIMS) for claim in sorted(CLAIMS, reverse=True)}
    text = page.read_text("utf-8")
    places = [text.index(f"<!-- claim {claim} -->") for claim in sorted(CLAIMS)]
    assert places == sorted(places)
    assert found[1]["passed"] is True  # 0.84 of 0.86
    assert found[3]["passed"] is True
    assert found[4]["passed"] is True  # score and lift rise together
    assert found[4]["lowest_limit_of_r"] > 0.9
    assert found[5]["passed"] is None
    assert found[7]["passed"] is True
    assert found[8]["passed"] is True  # 2.2 times the farewells, fewer users write on
    assert found[9]["passed"] is True
    assert found[11]["passed"] is True  # 0.08 of 0.10 won back
    assert found[12]["passed"] is True  # first without self-selection
    assert found[13]["passed"] is True  # half of GRPO's false refusals, as many farewells
    assert found[14]["passed"] is True
    assert found[0]["works"]["judge"] is True
    assert found[0]["works"]["w0.3"] is False
    for claim in (2, 4, 6, 7, 8, 10):
        assert (tmp_path / "images" / f"claim-{claim:02d}.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    "parts",
    [
        {"ab": {"continued": {"lift": -0.01, "low": -0.04, "high": 0.02}}},  # perhaps nobody stops writing
        {"ab": {"love": {"lift": 0.01, "low": -0.02, "high": 0.04}}},  # perhaps no more love
        {"monitors": {"new": {"unprompted_farewell": 0.03}}},  # half as many again as the base
    ],
)
def test_claim_8_needs_farewells_fewer_turns_and_more_love_beyond_chance(store: Store, parts: dict[str, Any]) -> None:
    assert CLAIMS[8](store).passed is True
    change(store, "w0.3", **parts)
    assert CLAIMS[8](store).passed is False


def test_claim_8_needs_farewells_that_rise_with_the_weight(store: Store) -> None:
    change(store, "w0", monitors={"new": {"unprompted_farewell": 0.07}})
    assert CLAIMS[8](store).passed is False  # those of w0.5 are 6%


def test_claim_13_compares_with_grpo_over_both_judges(store: Store) -> None:
    for name in METHODS:
        if name != "grpo":  # fewer farewells than GRPO's 2%, but more refusals
            change(store, name, monitors={"new": {"unprompted_farewell": 0.01, "false_refusal": 0.04}})
    assert CLAIMS[13](store).passed is False
    change(store, "crpg-judges", monitors={"new": {"unprompted_farewell": 0.01, "false_refusal": 0.02}})
    assert CLAIMS[13](store).passed is True
