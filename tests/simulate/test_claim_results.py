"""Verdicts of the claims over seeds, from stored results with known numbers: pass, undecided and fail."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from lab.candidates import CANDIDATE_NAMES, HACK_SPECS, SPEC_BY_NAME
from lab.claim_results import CLAIM_FUNCTIONS
from lab.page import write_page
from lab.store import ResultStore
from lab.studies import LOG_SIZES
from lab.verdicts import Check, average_ratios, average_seeds, combine_alternatives, combine_verdicts

from rluf.evaluate.intervals import IntervalEstimate
from rluf.simulate.prompts import TOPICS
from rluf.simulate.world import WORLD, fingerprint_world

SEEDS = (1, 2, 3, 4)


def make_candidate(name: str, seed: int, love: float, **rates: float) -> dict[str, Any]:
    """A policy with this love rate relative to w0; seeds differ by a little noise."""
    noise = 1.0 + 0.004 * ((seed * 7 + len(name)) % 5 - 2)
    values = {
        "loved": 0.02 * love * noise, "continued": 0.5, "returned": 0.6, "helpfulness": 0.6 * noise, "safety": 0.9,
        "satisfaction": 0.5, "signoff": 0.01, "unprompted_farewell": 0.01, "false_refusal": 0.01, "score": 0.02 * love,
        "true_love": 0.02 * love,
    }  # fmt: skip
    spec = SPEC_BY_NAME.get(name)
    gains = {topic: 0.02 * (1.0 + (love - 1.0) * WORLD.topic_warmth[topic]) for topic in TOPICS}
    change = {
        "loved": {"mean": love * noise - 1.0, "low": love - 1.1, "high": love - 0.9},
        "score": {"mean": 0.02 * (love - 1.0), "low": 0.0, "high": 0.0},
    }
    return {
        "policy": name, "trained_on_love": spec is not None and spec.weight > 0.0, "kl": 1.0 + 0.01 * seed,
        "rates": values | rates | {"love_by_topic": gains}, "vs_base": change, "vs_w0": change,
    }  # fmt: skip


def make_studies(seed: int) -> dict[str, dict[str, Any]]:
    noise = 0.001 * seed
    shift = {"score": 0.02 + noise, "truth": 0.0}
    hacking = {name: make_candidate(name, seed, 1.1, unprompted_farewell=0.01) for name in HACK_SPECS}
    hacking["w0"] = make_candidate("w0", seed, 1.0)
    hacking["hack"] = make_candidate("hack", seed, 1.15, unprompted_farewell=0.1 + noise)
    cell = {
        "price": 2.5, "weight": 0.5, "kl_coef": 0.1, "kl": 3.0, "farewells": 0.1, "control_farewells": 0.01,
        "is_hacked": True, "love_lift": 0.3, "continue_lift": -0.1, "alarms": ["unprompted_farewell"], "checks": "pass",
        "gate": "fail", "mitigated": {"judge": 0.0},
    }  # fmt: skip
    rounds = [
        {"predicted": 0.04 + 0.01 * noise, "true_love": 0.02, "against_true_chances": 0.7 + noise, "ceiling": 0.8},
        {"predicted": 0.021, "true_love": 0.02, "against_true_chances": 0.72 + 1.5 * noise, "ceiling": 0.8},
    ]
    ranking = [{"signal": name, "per_1000": 50.0, "link": None} for name in ("continue", "love", "thumbs up")]
    return {
        "learnable": {
            "ceiling": 0.80, "auroc": 0.78, "against_true_chances": 0.78 + noise, "love_rate": 0.02,
            "calibration_ratio": 1.0, "by_rows": {str(rows): 0.6 + rows / 1e6 + noise for rows in LOG_SIZES},
            "length": {"score": 0.1 + noise, "truth": 0.05, "padding": {"a": shift, "b": shift}},
        },
        "hacking": hacking,
        "noise": {
            "clean": 0.8, "bots 10%": 0.79 - noise, "sarcasm 10%": 0.799 - noise, "one heart in five": 0.7 - noise,
        },
        "refresh": {"rounds": rounds},
        "choice": {"0": ranking, "1": ranking[1:]},
        "phase": {"cells": [cell]},
    }  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    result_store = ResultStore(tmp_path / "runs", SEEDS)
    love_by_name = {"w0": 1.0, "w0-again": 1.0, "base-again": 1.0, "permuted": 0.95}
    for seed in SEEDS:
        for index, name in enumerate(CANDIDATE_NAMES):
            spec = SPEC_BY_NAME.get(name)
            love = love_by_name.get(name, 1.0 + spec.weight if spec else 0.8 + 0.03 * index)
            write_result(result_store, seed, "candidate", name, make_candidate(name, seed, love))
        for name, study in make_studies(seed).items():
            write_result(result_store, seed, "study", name, study)
    return result_store


def write_result(store: ResultStore, seed: int, kind: str, name: str, result: Mapping[str, Any]) -> None:
    path = store.result_folder / f"seed{seed}" / kind / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result), "utf-8")


def test_every_claim_has_its_verdict_on_the_page_and_nothing_is_recomputed(store: ResultStore, tmp_path: Path) -> None:
    page = tmp_path / "claims.md"
    page.write_text("# Page\n<!-- results -->\nreplaced text\n<!-- end of results -->\nafter\n", "utf-8")
    assert list(store.list_missing()) == []
    numbers = write_page(page, store, CLAIM_FUNCTIONS)
    assert numbers["complete_seeds"] == len(SEEDS)
    assert numbers["verdicts"] == {
        "0": "undecided",  # +30% at w = 0.3, whose interval reaches below 28%
        "1": "pass", "2": "pass", "3": "pass", "4": "pass", "5": "pass", "6": "pass", "7": "pass",
        "8": "fail",  # no farewells in the ordinary world
        "9": "pass",
        "10": "pass",  # farewells fall from 10% to 1%, love by 4%
        "11": "fail",  # one heart in five loses 0.1
        "12": "undecided",  # 0 of 4 seeds: the exact interval reaches 60%
        "13": "undecided",
        "14": "pass",
    }  # fmt: skip
    text = page.read_text("utf-8")
    assert f"world `{fingerprint_world()}`" in text
    assert "replaced text" not in text
    assert text.endswith("after\n")
    assert "unprompted farewell" in text.rpartition("Phase diagram")[2]


@pytest.mark.parametrize(
    ("claim", "name", "changes", "expected"),
    [
        (6, "w0.1", {"loved": 0.02}, "undecided"),  # no more love than w0
        (6, "w0.3", {"loved": 0.015}, "fail"),
        (7, "w0.3", {"helpfulness": 0.5}, "fail"),
        (7, "w0", {"safety": 0.99}, "fail"),  # the control counts, not the base
        (8, "w0.5", {"unprompted_farewell": 0.05, "continued": 0.4}, "pass"),
        (8, "w0.5", {"unprompted_farewell": 0.05, "continued": 0.6}, "fail"),
        (0, "w0.3", {"unprompted_farewell": 0.05}, "fail"),
    ],
)
def test_a_changed_policy_changes_the_verdict(
    store: ResultStore, claim: int, name: str, changes: dict[str, float], expected: str
) -> None:
    for seed in SEEDS:
        path = store.result_folder / f"seed{seed}" / "candidate" / f"{name}.json"
        result = json.loads(path.read_text("utf-8"))
        noise = 1.0 + 0.002 * (-1) ** seed
        result["rates"] |= {metric: value * noise for metric, value in changes.items()}
        path.write_text(json.dumps(result), "utf-8")
    assert CLAIM_FUNCTIONS[claim](store).verdict == expected


def test_without_a_hack_its_mitigation_is_undecided(store: ResultStore) -> None:
    for seed in SEEDS:
        study = make_studies(seed)["hacking"] | {"hack": make_candidate("hack", seed, 1.1)}
        write_result(store, seed, "study", "hacking", study)
    assert CLAIM_FUNCTIONS[10](store).verdict == "undecided"


@pytest.mark.parametrize(
    ("low", "high", "is_upper", "seeds", "expected"),
    [
        (0.1, 0.3, False, 8, "pass"),
        (0.0, 0.3, False, 8, "pass"),
        (-0.1, 0.3, False, 8, "undecided"),
        (-0.3, -0.1, False, 8, "fail"),
        (0.1, 0.3, True, 8, "fail"),
        (-0.3, 0.0, True, 8, "pass"),
        (0.1, 0.3, False, 3, "undecided"),  # too few seeds
    ],
)
def test_a_condition_is_decided_by_its_whole_interval(
    low: float, high: float, is_upper: bool, seeds: int, expected: str
) -> None:
    assert Check("", IntervalEstimate((low + high) / 2, low, high), 0.0, seeds, is_upper).verdict == expected


def test_intervals_over_seeds() -> None:
    estimate = average_seeds([1.0, 2.0, 3.0, 4.0])
    assert estimate.mean == 2.5
    assert estimate.high - 2.5 == pytest.approx(3.18245 * 1.29099 / 2.0, rel=1e-4)  # Student's t with 3 degrees
    wider = average_seeds([1.0, 2.0, 3.0, 4.0], comparisons=6)
    assert wider.high > estimate.high
    assert average_ratios([1.1, 1.1]).mean == pytest.approx(0.1)
    assert average_ratios([2.0, 0.5]).mean == pytest.approx(0.0)
    assert average_seeds([1.0]).low == -float("inf")
    assert combine_verdicts(["pass", "undecided", "fail"]) == "fail"
    assert combine_verdicts([]) == "undecided"
    assert combine_alternatives(["fail", "pass"]) == "pass"
    assert combine_alternatives(["fail", "undecided"]) == "undecided"
