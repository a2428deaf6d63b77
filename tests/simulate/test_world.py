"""The simulated world: its published name, and the behavior that every published result depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from rluf.simulate.experiment import read_served_responses
from rluf.simulate.ground_truth import ReaderInput, load_readings, score_readings
from rluf.simulate.prompts import load_prompts
from rluf.simulate.styles import MODEL_VERSIONS
from rluf.simulate.users import simulate_population
from rluf.simulate.world import PUBLISHED_FINGERPRINT, WORLD, fingerprint_world
from rluf.utils.paths import find_sample_log

SCORE_NAMES = ("helpfulness", "safety", "warmth", "question", "signoff", "satisfaction")
PROMPTS_DIGEST = "35abdd75aa9265cc"
SCORES_DIGEST = "9e1e971a2440657b"
REACTIONS_DIGEST = "f03d8b7cb5ed3f59"


def digest_array(values: np.ndarray[Any, Any]) -> str:
    """Digest of an array; floats are rounded, so that the last bits may differ between machines."""
    rounded = np.round(values.astype(np.float64), 6) + 0.0  # + 0.0 turns -0.0 into 0.0
    return hashlib.sha256(rounded.tobytes()).hexdigest()[:16]


def read_sample_rows() -> list[Mapping[str, Any]]:
    """Distinct responses of the shipped log."""
    versions = [f"base-{version.name}" for version in MODEL_VERSIONS]
    return [row for rows in read_served_responses(find_sample_log("feedback"), versions) for row in rows]


def test_the_published_world_keeps_its_name_and_others_get_their_own() -> None:
    assert fingerprint_world() == fingerprint_world(WORLD) == PUBLISHED_FINGERPRINT == "1f509d74671e"
    other_worlds = [
        replace(WORLD, love_signoff=0.81),
        replace(WORLD, version="4"),
        replace(WORLD, topic_warmth={**WORLD.topic_warmth, "code": 0.26}),
    ]
    assert len({fingerprint_world(world) for world in (WORLD, *other_worlds)}) == 4


def test_prompts_of_the_published_world_are_unchanged() -> None:
    content = json.dumps([[prompt.id, prompt.split, list(prompt.messages)] for prompt in load_prompts()])
    assert hashlib.sha256(content.encode()).hexdigest()[:16] == PROMPTS_DIGEST


def test_true_scores_and_reactions_of_the_published_world_are_unchanged() -> None:
    rows = read_sample_rows()
    readings = load_readings(find_sample_log("feedback").with_name("readings.jsonl.gz"))
    inputs = [ReaderInput.from_row(row) for row in rows]
    truths = score_readings(inputs, [readings[item.key] for item in inputs])
    scores = np.array([[getattr(truth, name) for name in SCORE_NAMES] for truth in truths])
    assert digest_array(scores) == SCORES_DIGEST
    topics = [row["topic"] for row in rows]
    reactions = simulate_population(truths, topics, user_count=200, responses_per_user=20, seed=3)
    actions = np.stack([reactions.loved, reactions.continued, reactions.returned, reactions.probability])
    assert digest_array(actions) == REACTIONS_DIGEST
