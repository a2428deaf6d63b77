"""Simulated log: users react to responses, raters compare and label them, and the files are written atomically."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from rluf.config.data import SimulateSettings
from rluf.errors import DataError, ResourceError
from rluf.simulate.ground_truth import GroundTruth, true_scores
from rluf.simulate.prompts import SimulatedPrompt
from rluf.simulate.users import ResponseFeatures, UserPopulation, find_logit_shift, love_logits, simulate_reactions
from rluf.simulate.world import WORLD
from rluf.types import Message

FIRST_DAY = datetime(2025, 5, 1, tzinfo=UTC)
LOG_DAYS = 28
BASE_LOVE_RATE = 0.06
"""Share of served responses with a heart, as in the paper; the intercept is calibrated to it."""
ROWS_PER_USER = 4
PAIRS_PER_ROW, SAFETY_LABELS_PER_ROW = 0.2, 0.15
"""Pairs rated for helpfulness and responses labeled for safety, per row of the log."""
ACTIVITY_SHAPE = 0.8
"""Shape of the gamma distribution of user activity; below 1, so a few users read most responses."""
RISKY_LABEL_SHARE = 0.65
"""Share of safety labels on risky prompts; few responses to other prompts are unsafe."""
MIN_HELPFULNESS_GAP = 0.05
"""Pairs with a smaller difference in helpfulness are ties and are not rated."""
MISSING_CONTINUED_SHARE = 0.03
"""Share of events without a `continued` value, as in real logs."""
FILE_KINDS = ("feedback", "preferences", "safety", "prompts")
LOG_FILE_NAMES = frozenset(f"{kind}.jsonl.gz" for kind in FILE_KINDS)
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ServedResponse:
    """Response of a model version to a prompt; `is_finished` is false if the token limit truncated it."""

    prompt: SimulatedPrompt
    model_version: str
    text: str
    is_finished: bool


def build_log(
    served_responses: Sequence[ServedResponse], settings: SimulateSettings, seed: int
) -> dict[str, list[Row]]:
    """Build the rows of the feedback, preferences and safety files. Equal inputs give equal rows.

    Empty responses are never served. Each response is served once before any is served again. DataError if there are
    too few responses to compare or label.
    """
    responses = [response for response in served_responses if response.text.strip()]
    if len(responses) < 2:
        raise DataError(
            f"expected 2 or more responses with text from the model, got {len(responses)}; set model.path to an "
            "instruct model"
        )
    truths = [
        true_scores(response.prompt.messages, response.prompt.topic, response.text, response.is_finished)
        for response in responses
    ]
    # One stream per file: more rows in one do not change the others.
    seeds = np.random.SeedSequence(seed).spawn(3)
    feedback_rng, preference_rng, safety_rng = (np.random.default_rng(stream) for stream in seeds)
    return {
        "feedback": _feedback_rows(responses, truths, settings, seed, feedback_rng),
        "preferences": _preference_rows(responses, truths, round(PAIRS_PER_ROW * settings.log_rows), preference_rng),
        "safety": _safety_rows(responses, truths, round(SAFETY_LABELS_PER_ROW * settings.log_rows), safety_rng),
    }


def build_prompt_rows(prompts: Iterable[SimulatedPrompt]) -> list[Row]:
    """Rows of the prompts file: train and test prompts; test prompts are nowhere else in the log."""
    return [
        {"id": prompt.id, "messages": _message_dicts(prompt.messages), "topic": prompt.topic, "split": prompt.split}
        for prompt in prompts
    ]


def check_output_folder(folder: Path) -> None:
    """Raise DataError unless `folder` is new or contains only the log of an earlier run, which would be replaced."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file; move it, or change run.root or name")
    file_names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    other_files = sorted(name for name in file_names if name not in LOG_FILE_NAMES)
    if other_files:
        raise DataError(
            f"{folder} contains other files ({other_files[0]}); change run.root or name, because the log replaces "
            "the folder"
        )


def write_log(log: Mapping[str, Sequence[Row]], folder: Path) -> None:
    """Write <kind>.jsonl.gz files into `folder` atomically. Equal rows give equal bytes.

    DataError if `folder` contains other files, ResourceError if it cannot be written.
    """
    check_output_folder(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary_folder = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            new_folder, old_folder = temporary_folder / "new", temporary_folder / "old"
            new_folder.mkdir()
            for kind, rows in log.items():
                lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                # mtime=0: equal logs must be equal bytes.
                (new_folder / f"{kind}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), 9, mtime=0))
            if folder.exists():
                os.replace(folder, old_folder)
            os.replace(new_folder, folder)
        finally:
            shutil.rmtree(temporary_folder, ignore_errors=True)
    except OSError as error:
        raise ResourceError(f"cannot write the log to {folder}: {error}; free disk space or change run.root") from error


def _message_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _hashed_id(*parts: object) -> str:
    """Short hashed name: stable, and without meaning."""
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:16]


def _feedback_rows(
    responses: Sequence[ServedResponse],
    truths: Sequence[GroundTruth],
    settings: SimulateSettings,
    seed: int,
    rng: np.random.Generator,
) -> list[Row]:
    """One row per event, in time order."""
    features = ResponseFeatures.from_truths(truths, [response.prompt.topic for response in responses])
    user_count = max(1, settings.log_rows // ROWS_PER_USER)
    population = UserPopulation.sample(user_count, rng)
    # Full permutations one after another: every response is served once before any is served again.
    rounds = -(-settings.log_rows // len(responses))
    item = np.concatenate([rng.permutation(len(responses)) for _ in range(rounds)])[: settings.log_rows]
    activity = rng.gamma(ACTIVITY_SHAPE, size=user_count)
    user = rng.choice(user_count, settings.log_rows, p=activity / activity.sum())
    # Calibrated on the impressions of this log, not on all users and responses: the rate then holds for its rows.
    shift = find_logit_shift(love_logits(features, population, user, item), BASE_LOVE_RATE)
    reactions = simulate_reactions(features, population, user, item, rng, shift=shift)
    seconds = np.sort(rng.integers(0, LOG_DAYS * 86400, settings.log_rows))
    is_continued_missing = rng.random(settings.log_rows) < MISSING_CONTINUED_SHARE
    rows: list[Row] = []
    for n in range(settings.log_rows):
        response, event_time = responses[item[n]], FIRST_DAY + timedelta(seconds=int(seconds[n]))
        rows.append(
            {
                "id": f"event-{n:06d}",
                "conversation_id": _hashed_id("conversation", seed, n),
                "turn": sum(message["role"] == "user" for message in response.prompt.messages),
                "user_id": _hashed_id("user", seed, user[n]),
                "time": event_time.isoformat(),
                "model_version": f"base-{response.model_version}",
                "messages": _message_dicts(response.prompt.messages),
                "response": response.text,
                "reaction": "love" if reactions.loved[n] else None,
                "continued": None if is_continued_missing[n] else bool(reactions.continued[n]),
                # The next day of the last day is outside the log, so `returned` is unknown there.
                "returned": None if seconds[n] >= (LOG_DAYS - 1) * 86400 else bool(reactions.returned[n]),
                "topic": response.prompt.topic,
                "locale": "en",
            }
        )
    return rows


def _preference_rows(
    responses: Sequence[ServedResponse], truths: Sequence[GroundTruth], pair_count: int, rng: np.random.Generator
) -> list[Row]:
    """Pairs of responses to one prompt; a rater prefers the more helpful one, with noise, and rates no near-ties."""
    responses_of_prompt: defaultdict[str, list[int]] = defaultdict(list)
    for index, response in enumerate(responses):
        responses_of_prompt[response.prompt.id].append(index)
    prompt_ids = sorted(prompt_id for prompt_id, members in responses_of_prompt.items() if len(members) > 1)
    rows: list[Row] = []
    rated_pairs: set[tuple[int, int]] = set()
    # At most 20 attempts per pair: small logs may not have as many different pairs as requested.
    for _ in range(20 * pair_count):
        if len(rows) == pair_count or not prompt_ids:
            break
        members = responses_of_prompt[prompt_ids[rng.integers(len(prompt_ids))]]
        first, second = rng.choice(members, 2, replace=False).tolist()
        gap = truths[first].helpfulness - truths[second].helpfulness
        key = (min(first, second), max(first, second))
        if key in rated_pairs or abs(gap) < MIN_HELPFULNESS_GAP or responses[first].text == responses[second].text:
            continue
        rated_pairs.add(key)
        first_probability = expit(WORLD.rater_sharpness * gap) * (1 - WORLD.rater_slip) + 0.5 * WORLD.rater_slip
        chosen, rejected = (first, second) if rng.random() < first_probability else (second, first)
        prompt = responses[first].prompt
        rows.append({
            "id": f"pair-{len(rows):05d}", "messages": _message_dicts(prompt.messages),
            "chosen": responses[chosen].text, "rejected": responses[rejected].text, "group": prompt.id,
            "topic": prompt.topic,
        })  # fmt: skip
    if len(rows) < min(pair_count, 10):
        raise DataError(
            f"only {len(rows)} pairs of different responses of the {pair_count} that the log needs; "
            "raise simulate.log_rows"
        )
    return rows


def _safety_rows(
    responses: Sequence[ServedResponse], truths: Sequence[GroundTruth], label_count: int, rng: np.random.Generator
) -> list[Row]:
    """Responses labeled safe (1) or unsafe (0), mostly on risky prompts, where both kinds occur."""
    # A random subset, sorted afterwards so that the order of the file carries no information.
    order = rng.permutation(len(responses)).tolist()
    risky = [index for index in order if responses[index].prompt.topic == "risky"]
    other = [index for index in order if responses[index].prompt.topic != "risky"]
    risky_count = min(len(risky), round(RISKY_LABEL_SHARE * label_count))
    selected = sorted(risky[:risky_count] + other[: label_count - risky_count])
    is_mislabeled = rng.random(len(selected)) < WORLD.rater_slip
    return [
        {
            "id": f"label-{number:05d}",
            "messages": _message_dicts(responses[index].prompt.messages),
            "response": responses[index].text,
            "label": int((truths[index].safety > 0.5) != mislabeled),
            "group": responses[index].prompt.id,
            "topic": responses[index].prompt.topic,
        }
        for number, (index, mislabeled) in enumerate(zip(selected, is_mislabeled.tolist(), strict=True))
    ]
