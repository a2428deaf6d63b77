"""Every claim's section is written from stored results only, here with known numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from lab.candidates import METHOD_VARIANTS, MITIGATIONS, CandidateSet
from lab.policy_claims import CLAIM_FUNCTIONS
from lab.store import ResultStore
from lab.studies import LOG_SIZES
from lab.tables import write_claim_section

from rluf.simulate.prompts import TOPICS
from rluf.simulate.world import WORLD


def band(mean: float, half_width: float = 0.02) -> dict[str, float]:
    return {"mean": mean, "low": mean - half_width, "high": mean + half_width}


def candidate(name: str, index: int, *, farewells: float | None = None) -> dict[str, Any]:
    love_lift = -0.2 if name == "sft-terse" else 0.05 * index + 0.02
    weight = float(name[1:].split("-")[0]) if name.startswith("w") else 0.0
    farewell_ratio = 1.0 + 4.0 * weight if farewells is None else farewells
    effects = {"love": love_lift, "continued": -0.04, "returned": 0.0, "helpful": 0.01, "safe": 0.0}
    refusals = 0.01 if name in METHOD_VARIANTS and name != "grpo" else 0.02
    return {
        "policy": name,
        "trained_on_love": weight > 0 or name in (*MITIGATIONS, *METHOD_VARIANTS),
        "weight": weight,
        "method": "rloo",
        "kl": 0.1 * (index + 1),
        "replies": 600,
        "offline": {"love": band(0.1 * love_lift, 0.001)},
        "gold": {
            key: {"base": 0.6, "new": 0.6 + 0.001 * index, **band(0.001 * index)}
            for key in ("helpfulness", "safety", "satisfaction")
        },
        "ab": {
            key: {
                "lift": lift,
                "low": lift - 0.03,
                "high": lift + 0.03,
                "control": 0.05,
                "treatment": 0.05 * (1 + lift),
            }
            for key, lift in effects.items()
        },
        "monitors": {
            "base": {"unprompted_farewell": 0.02, "false_refusal": 0.02, "early_ending": 0.03},
            "new": {"unprompted_farewell": 0.02 * farewell_ratio, "false_refusal": refusals, "early_ending": 0.04},
        },
        "topics": {
            "base": dict.fromkeys(TOPICS, 0.05),
            "new": {topic: 0.05 + 0.05 * WORLD.topic_warmth[topic] for topic in TOPICS},
        },
    }


def study(name: str) -> dict[str, Any]:
    auroc_result = {"auroc": band(0.84), "auroc_of_the_truth": 0.86, "ceiling": 0.86, "against_true_chances": 0.84,
             "rate": 0.08, "error": 0.01, "calibration_ratio": 1.0}  # fmt: skip
    shift = {"score": 0.01, "truth": 0.0}
    if name == "learnable":
        length = {
            "score": 0.1,
            "truth": 0.1,
            "by_topic": {"code": 0.0, "casual": 0.2},
            "padding": {"a": shift, "b": shift},
        }
        return {"unseen_prompts": auroc_result, "known_prompts": auroc_result, "length": length}
    if name == "size":
        return {
            "ceiling": 0.86,
            "rows": {
                str(row_count): auroc_result | {"against_true_chances": 0.7 + row_count / 1e5}
                for row_count in LOG_SIZES
            },
        }
    if name == "noise":
        noisy_condition = {"hearts": 300, "plain": 0.7, "filtered": 0.78}
        return {"conditions": {"rate 5%": {"hearts": 400, "plain": 0.8}, "bots 10%": noisy_condition,
                               "rate 2%": {"hearts": 160, "plain": 0.75, "all_negatives": 0.74}}}  # fmt: skip
    if name == "choice":
        association_by_signal = {"love": 0.4, "continue": 0.1, "thumbs up": 0.0}
        ranked = [{"signal": key, "per_1000": 80.0, "link": band(association), "unadjusted": band(association)}
                  for key, association in association_by_signal.items()]  # fmt: skip
        ranked += [{"signal": "pleased follow-up", "per_1000": 0.0, "link": None}]
        return {"rows": 1000, "strengths": {"0": ranked, "1": [ranked[2], *ranked[:2]]}}
    own_replies = {"auroc": 0.7, "ceiling": 0.8, "predicted": 0.1, "loved": 0.08}
    return {
        "rounds": [candidate("w0.5", 9, farewells=farewells) | {"own_replies": own_replies} for farewells in (3.0, 1.5)]
    }


def change(store: ResultStore, name: str, **changes: Any) -> None:
    """Change the results of a candidate on every seed."""
    for seed in store.seeds:
        result_path = store.result_folder / f"seed{seed}" / "candidate" / f"{name}.json"
        result = json.loads(result_path.read_text("utf-8"))
        for key, values in changes.items():
            for inner_key, new_values in values.items():
                result[key][inner_key] |= new_values
        result_path.write_text(json.dumps(result), "utf-8")


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    result_store = ResultStore(tmp_path / "runs", (1, 2, 3))
    for seed in result_store.seeds:
        results = {("candidate", name): candidate(name, index)
                 for index, name in enumerate([*CandidateSet.all_names(), *MITIGATIONS, *METHOD_VARIANTS])}  # fmt: skip
        results |= {("study", name): study(name) for name in ("learnable", "size", "noise", "refresh", "choice")}
        for (kind, name), result in results.items():
            result_path = result_store.result_folder / f"seed{seed}" / kind / f"{name}.json"
            result_path.parent.mkdir(parents=True, exist_ok=True)
            result_path.write_text(json.dumps(result), "utf-8")
    return result_store


def test_every_claim_is_written_with_its_verdict_and_no_result_is_recomputed(
    store: ResultStore, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    page = tmp_path / "claims.md"
    page.write_text("# Page\n", "utf-8")
    assert list(store.missing_results()) == []
    numbers_by_claim = {
        claim: write_claim_section(store, claim, tmp_path, CLAIM_FUNCTIONS)
        for claim in sorted(CLAIM_FUNCTIONS, reverse=True)
    }
    page_text = page.read_text("utf-8")
    positions = [page_text.index(f"<!-- claim {claim} -->") for claim in sorted(CLAIM_FUNCTIONS)]
    assert positions == sorted(positions)
    assert numbers_by_claim[1]["passed"] is True  # 0.84 of 0.86
    assert numbers_by_claim[3]["passed"] is True
    assert numbers_by_claim[4]["passed"] is True  # score and lift rise together
    assert numbers_by_claim[4]["lowest_limit_of_r"] > 0.9
    assert numbers_by_claim[5]["passed"] is None
    assert numbers_by_claim[7]["passed"] is True
    assert numbers_by_claim[8]["passed"] is True  # 2.2 times the farewells, fewer users write on
    assert numbers_by_claim[9]["passed"] is True
    assert numbers_by_claim[11]["passed"] is True  # 0.08 of 0.10 recovered
    assert numbers_by_claim[12]["passed"] is True  # first without self-selection
    assert numbers_by_claim[13]["passed"] is True  # half of GRPO's false refusals, as many farewells
    assert numbers_by_claim[14]["passed"] is True
    assert numbers_by_claim[0]["works"]["judge"] is True
    assert numbers_by_claim[0]["works"]["w0.3"] is False
    for claim in (2, 4, 6, 7, 8, 10):
        assert (tmp_path / "images" / f"claim-{claim:02d}.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    "changes",
    [
        {"ab": {"continued": {"lift": -0.01, "low": -0.04, "high": 0.02}}},  # fewer turns are not significant
        {"ab": {"love": {"lift": 0.01, "low": -0.02, "high": 0.04}}},  # more love is not significant
        {"monitors": {"new": {"unprompted_farewell": 0.03}}},  # only 1.5 times the base
    ],
)
def test_claim_8_needs_significant_farewells_fewer_turns_and_more_love(
    store: ResultStore, changes: dict[str, Any]
) -> None:
    assert CLAIM_FUNCTIONS[8](store).passed is True
    change(store, "w0.3", **changes)
    assert CLAIM_FUNCTIONS[8](store).passed is False


def test_claim_8_needs_farewells_that_rise_with_the_weight(store: ResultStore) -> None:
    change(store, "w0", monitors={"new": {"unprompted_farewell": 0.07}})
    assert CLAIM_FUNCTIONS[8](store).passed is False  # those of w0.5 are 6%


def test_claim_13_compares_with_grpo_over_both_judges(store: ResultStore) -> None:
    for name in METHOD_VARIANTS:
        if name != "grpo":  # fewer farewells than GRPO's 2%, but more refusals
            change(store, name, monitors={"new": {"unprompted_farewell": 0.01, "false_refusal": 0.04}})
    assert CLAIM_FUNCTIONS[13](store).passed is False
    change(store, "crpg-judges", monitors={"new": {"unprompted_farewell": 0.01, "false_refusal": 0.02}})
    assert CLAIM_FUNCTIONS[13](store).passed is True
