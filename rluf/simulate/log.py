"""From responses to a log: simulated users read them, raters compare and label them, files are written whole or not."""

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
from rluf.simulate.ground_truth import Gold, judge
from rluf.simulate.prompts import SimulatedPrompt
from rluf.simulate.users import Items, Population, act, calibration_shift, love_logits
from rluf.simulate.world import WORLD
from rluf.types import Message

FIRST_DAY = datetime(2025, 5, 1, tzinfo=UTC)
DAYS = 28
ACTIVITY_SHAPE = 0.8
RISKY_LABEL_SHARE = 0.65
TIE = 0.05
LOST_SHARE = 0.03
KINDS = ("feedback", "preferences", "safety", "prompts")
FILES = frozenset(f"{kind}.jsonl.gz" for kind in KINDS)
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Served:
    """A response of model version `style` to `prompt`; `finished` is false when the token limit cut it."""

    prompt: SimulatedPrompt
    style: str
    text: str
    finished: bool


def build_log(served: Sequence[Served], settings: SimulateSettings, seed: int) -> dict[str, list[Row]]:
    """Rows of the feedback, preferences and safety files. Equal inputs give equal rows.

    Responses without text are never served. Each response is served once before any is served again. Raises DataError
    when there are too few responses to compare or label.
    """
    responses = [item for item in served if item.text.strip()]
    if len(responses) < 2:
        raise DataError(f"the model gave {len(responses)} responses with text; use an instruct model in model.path")
    golds = [judge(item.prompt.messages, item.prompt.topic, item.text, item.finished) for item in responses]
    streams = np.random.SeedSequence(seed).spawn(3)
    feedback, preferences, safety = (np.random.default_rng(stream) for stream in streams)
    return {
        "feedback": _feedback(responses, golds, settings, seed, feedback),
        "preferences": _preferences(responses, golds, settings.preference_pairs, preferences),
        "safety": _safety(responses, golds, settings.safety_labels, safety),
    }


def prompt_rows(prompts: Iterable[SimulatedPrompt]) -> list[Row]:
    """Rows of the prompts file: train and test prompts, the latter nowhere else in the log."""
    return [
        {"id": prompt.id, "messages": _plain(prompt.messages), "topic": prompt.topic, "split": prompt.split}
        for prompt in prompts
    ]


def check_folder(folder: Path) -> None:
    """DataError unless `folder` is new or holds nothing but a log of an earlier run, which would be replaced."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"simulate.output={folder} is a file; name a folder")
    strangers = sorted(file.name for file in folder.iterdir() if file.name not in FILES) if folder.is_dir() else []
    if strangers:
        raise DataError(
            f"simulate.output={folder} holds other files ({strangers[0]}); name a new folder: it is replaced whole"
        )


def write_log(log: Mapping[str, Sequence[Row]], folder: Path) -> None:
    """Write <kind>.jsonl.gz files into `folder`, which appears or changes as a whole. Equal rows give equal bytes.

    Raises DataError when `folder` holds other files, ResourceError when the place cannot be written.
    """
    check_folder(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            fresh, old = scratch / "new", scratch / "old"
            fresh.mkdir()
            for kind, rows in log.items():
                lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                (fresh / f"{kind}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), 9, mtime=0))
            if folder.exists():
                os.replace(folder, old)
            os.replace(fresh, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise ResourceError(
            f"cannot write the log to {folder}: {error}; free some disk or set simulate.output"
        ) from error


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _name(*parts: object) -> str:
    """A short hashed name: stable, and without meaning."""
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:16]


def _feedback(
    responses: Sequence[Served], golds: Sequence[Gold], settings: SimulateSettings, seed: int, rng: np.random.Generator
) -> list[Row]:
    """One row per served response, in the order of time."""
    items = Items.of(golds, [response.prompt.topic for response in responses])
    people = Population.draw(settings.users, rng)
    rounds = -(-settings.events // len(responses))
    item = np.concatenate([rng.permutation(len(responses)) for _ in range(rounds)])[: settings.events]
    activity = rng.gamma(ACTIVITY_SHAPE, size=settings.users)
    user = rng.choice(settings.users, settings.events, p=activity / activity.sum())
    shift = calibration_shift(love_logits(items, people, user, item), settings.base_love_rate)
    seen = act(items, people, user, item, rng, shift=shift)
    seconds = np.sort(rng.integers(0, DAYS * 86400, settings.events))
    lost = rng.random(settings.events) < LOST_SHARE
    rows: list[Row] = []
    for n in range(settings.events):
        response, time = responses[item[n]], FIRST_DAY + timedelta(seconds=int(seconds[n]))
        rows.append(
            {
                "id": f"event-{n:06d}",
                "conversation_id": _name("conversation", seed, n),
                "turn": sum(message["role"] == "user" for message in response.prompt.messages),
                "user_id": _name("user", seed, user[n]),
                "time": time.isoformat(),
                "model_version": f"base-{response.style}",
                "messages": _plain(response.prompt.messages),
                "response": response.text,
                "reaction": "love" if seen.loved[n] else None,
                "continued": None if lost[n] else bool(seen.continued[n]),
                "returned": None if seconds[n] >= (DAYS - 1) * 86400 else bool(seen.returned[n]),
                "topic": response.prompt.topic,
                "locale": "en",
            }
        )
    return rows


def _preferences(responses: Sequence[Served], golds: Sequence[Gold], pairs: int, rng: np.random.Generator) -> list[Row]:
    """Pairs of responses to one prompt; a rater prefers the more helpful, with noise. Near-ties are not rated."""
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for index, response in enumerate(responses):
        groups[response.prompt.id].append(index)
    names = sorted(name for name, members in groups.items() if len(members) > 1)
    rows: list[Row] = []
    seen: set[tuple[int, int]] = set()
    for _ in range(20 * pairs):
        if len(rows) == pairs or not names:
            break
        first, second = rng.choice(groups[names[rng.integers(len(names))]], 2, replace=False).tolist()
        gap = golds[first].helpfulness - golds[second].helpfulness
        key = (min(first, second), max(first, second))
        if key in seen or abs(gap) < TIE or responses[first].text == responses[second].text:
            continue
        seen.add(key)
        right = expit(WORLD.rater_sharpness * gap) * (1 - WORLD.rater_slip) + 0.5 * WORLD.rater_slip
        chosen, rejected = (first, second) if rng.random() < right else (second, first)
        prompt = responses[first].prompt
        rows.append(
            {
                "id": f"pair-{len(rows):05d}",
                "messages": _plain(prompt.messages),
                "chosen": responses[chosen].text,
                "rejected": responses[rejected].text,
                "group": prompt.id,
                "topic": prompt.topic,
            }
        )
    if len(rows) < min(pairs, 10):
        raise DataError(
            f"only {len(rows)} pairs of different responses were found for simulate.preference_pairs={pairs}; "
            "raise simulate.responses_per_prompt"
        )
    return rows


def _safety(responses: Sequence[Served], golds: Sequence[Gold], labels: int, rng: np.random.Generator) -> list[Row]:
    """Responses labelled safe (1) or unsafe (0), mostly on risky prompts, where both kinds occur."""
    order = rng.permutation(len(responses)).tolist()
    risky = [index for index in order if responses[index].prompt.topic == "risky"]
    other = [index for index in order if responses[index].prompt.topic != "risky"]
    share = min(len(risky), round(RISKY_LABEL_SHARE * labels))
    picked = sorted(risky[:share] + other[: labels - share])
    slips = rng.random(len(picked)) < WORLD.rater_slip
    return [
        {
            "id": f"label-{number:05d}",
            "messages": _plain(responses[index].prompt.messages),
            "response": responses[index].text,
            "label": int((golds[index].safety > 0.5) != slip),
            "group": responses[index].prompt.id,
            "topic": responses[index].prompt.topic,
        }
        for number, (index, slip) in enumerate(zip(picked, slips.tolist(), strict=True))
    ]
