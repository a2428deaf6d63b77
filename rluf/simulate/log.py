"""Simulated log: users react to responses, raters compare and label them, and the files are written atomically."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from rluf.config.data import SimulateSettings
from rluf.errors import DataError, ResourceError
from rluf.simulate.conversations import build_second_turn
from rluf.simulate.ground_truth import GroundTruth, Reader, ReaderInput
from rluf.simulate.prompts import SimulatedPrompt
from rluf.simulate.reader_features import has_sentence_end
from rluf.simulate.users import (
    ResponseFeatures,
    SimulatedReactions,
    UserPopulation,
    find_logit_shift,
    love_logits,
    simulate_reactions,
)
from rluf.simulate.world import WORLD
from rluf.types import Message
from rluf.utils.stats import Ints

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
SECOND_TURN_SHARE = 0.05
"""Share of events that answer the user's next message; only users who continue have one."""
SECOND_TURN_DELAY_S = (20, 240)
"""Range of the seconds between the first and the second turn of a conversation."""
FILE_KINDS = ("feedback", "preferences", "safety", "prompts", "readings")
LOG_FILE_NAMES = frozenset(f"{kind}.jsonl.gz" for kind in FILE_KINDS)
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ServedResponse:
    """Response of a model version to a prompt; `is_finished` is false if the token limit truncated it."""

    prompt: SimulatedPrompt
    model_version: str
    text: str
    is_finished: bool

    @property
    def reader_input(self) -> ReaderInput:
        """Input of the reader behind the ground truth."""
        return ReaderInput(self.prompt.messages, self.text, self.is_finished)


SecondTurnSource = Callable[[Sequence[ServedResponse]], Sequence[ServedResponse]]
"""Answers second turns: each item has the prompt of a second turn, the version to answer it, and no text yet."""


def build_log(
    served_responses: Sequence[ServedResponse],
    settings: SimulateSettings,
    seed: int,
    reader: Reader,
    answer_second_turns: SecondTurnSource,
) -> dict[str, list[Row]]:
    """Build the rows of the feedback, preferences, safety and readings files. Equal inputs give equal rows.

    Empty responses are never served. Each response is served once before any is served again. DataError if there are
    too few responses to compare or label.
    """
    responses = [response for response in served_responses if response.text.strip()]
    if len(responses) < 2:
        raise DataError(
            f"expected 2 or more responses with text from the model, got {len(responses)}; set model.path to an "
            "instruct model"
        )
    truths = reader.score_responses([response.reader_input for response in responses])
    # One stream per file: more rows in one do not change the others.
    seeds = np.random.SeedSequence(seed).spawn(3)
    feedback_rng, preference_rng, safety_rng = (np.random.default_rng(stream) for stream in seeds)
    writer = _FeedbackWriter(settings, seed, reader, feedback_rng)
    feedback_rows, second_responses = writer.build_rows(responses, truths, answer_second_turns)
    inputs = [response.reader_input for response in (*responses, *second_responses)]
    return {
        "feedback": feedback_rows,
        "preferences": _preference_rows(responses, truths, round(PAIRS_PER_ROW * settings.log_rows), preference_rng),
        "safety": _safety_rows(responses, truths, round(SAFETY_LABELS_PER_ROW * settings.log_rows), safety_rng),
        "readings": reader.export_readings(inputs),
    }


def read_first_turns(log_folder: Path, prompts: Sequence[SimulatedPrompt]) -> list[ServedResponse]:
    """Distinct first-turn responses of an earlier log to `prompts`, in order of time, to give them new reactions.

    The system message may be another one: a log shows only the standard message, whatever instruction the version had.
    The log does not record truncation, so a response that does not end a sentence counts as truncated. DataError if the
    feedback file is missing or answers none of the prompts.
    """
    path = log_folder / "feedback.jsonl.gz"
    prompt_of_messages = {json.dumps(_message_dicts(prompt.messages)[1:]): prompt for prompt in prompts}
    responses: dict[tuple[str, str], ServedResponse] = {}
    try:
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            for row in map(json.loads, stream):
                prompt = prompt_of_messages.get(json.dumps(row["messages"][1:]))
                if prompt is not None:
                    text, version = row["response"], row["model_version"].removeprefix("base-")
                    key = (prompt.id, text)
                    responses.setdefault(key, ServedResponse(prompt, version, text, has_sentence_end(text)))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be read as a simulated log: {error!r}; give the folder of one") from error
    if not responses:
        raise DataError(f"{path} answers no prompt of this version; give the folder of a simulated log")
    return list(responses.values())


def select_evenly(responses: Sequence[ServedResponse], count: int) -> list[ServedResponse]:
    """The first responses of each prompt, about the same share of all, `count` in sum. Their order is unchanged."""
    totals = Counter(response.prompt.id for response in responses)
    ranks: Counter[str] = Counter()
    shares = []
    for response in responses:
        ranks[response.prompt.id] += 1
        shares.append(ranks[response.prompt.id] / totals[response.prompt.id])
    selected = sorted(range(len(responses)), key=lambda index: (shares[index], index))[:count]
    return [responses[index] for index in sorted(selected)]


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


@dataclass(frozen=True, slots=True)
class _Turns:
    """N events of one turn: responses and their index, users, times in seconds and reactions, all [N] but the first."""

    responses: Sequence[ServedResponse]
    item: Ints
    user: Ints
    seconds: Ints
    reactions: SimulatedReactions


class _FeedbackWriter:
    """Samples users, their reactions and second turns, and writes one row per event."""

    def __init__(self, settings: SimulateSettings, seed: int, reader: Reader, rng: np.random.Generator) -> None:
        self.settings, self.seed, self.reader, self.rng = settings, seed, reader, rng
        self.user_count = max(1, settings.log_rows // ROWS_PER_USER)
        self.population = UserPopulation.sample(self.user_count, rng)
        self.logit_shift = 0.0

    def build_rows(
        self,
        responses: Sequence[ServedResponse],
        truths: Sequence[GroundTruth],
        answer_second_turns: SecondTurnSource,
    ) -> tuple[list[Row], list[ServedResponse]]:
        """Rows of both turns in time order, and the responses of the second turns."""
        second_count = round(SECOND_TURN_SHARE * self.settings.log_rows)
        first_turns = self._sample_first_turns(responses, truths, self.settings.log_rows - second_count)
        continuing = np.flatnonzero(first_turns.reactions.continued)
        chosen = self.rng.permutation(continuing)[:second_count]
        variants = self.rng.integers(0, 1 << 16, len(chosen))
        requests = [
            self._second_turn_request(first_turns, int(index), int(variant))
            for index, variant in zip(chosen, variants, strict=True)
        ]
        second_responses = list(answer_second_turns(requests)) if requests else []
        conversations = [_hashed_id("conversation", self.seed, n) for n in range(len(first_turns.item))]
        events = self._event_rows(first_turns, conversations)
        if second_responses:
            second_turns = self._sample_second_turns(first_turns, chosen, second_responses)
            events += self._event_rows(second_turns, [conversations[index] for index in chosen])
        events.sort(key=lambda event: (event[0], event[1]["turn"]))
        return [{"id": f"event-{n:06d}", **row} for n, (_, row) in enumerate(events)], second_responses

    def _sample_first_turns(
        self, responses: Sequence[ServedResponse], truths: Sequence[GroundTruth], count: int
    ) -> _Turns:
        rng, user_count = self.rng, self.user_count
        features = ResponseFeatures.from_truths(truths, [response.prompt.topic for response in responses])
        # Full permutations one after another: every response is served once before any is served again.
        rounds = -(-count // len(responses))
        item = np.concatenate([rng.permutation(len(responses)) for _ in range(rounds)])[:count]
        activity = rng.gamma(ACTIVITY_SHAPE, size=user_count)
        user = rng.choice(user_count, count, p=activity / activity.sum())
        # Calibrated on the impressions of this log, not on all users and responses: the rate then holds for its rows.
        logits = love_logits(features, self.population, user, item)
        self.logit_shift = find_logit_shift(logits, BASE_LOVE_RATE)
        reactions = simulate_reactions(features, self.population, user, item, rng, shift=self.logit_shift)
        seconds = np.sort(rng.integers(0, LOG_DAYS * 86400, count))
        return _Turns(responses, item, user, seconds, reactions)

    def _second_turn_request(self, first_turns: _Turns, index: int, variant: int) -> ServedResponse:
        """Prompt of a second turn, for the version that gave the first response; without a text yet."""
        response = first_turns.responses[first_turns.item[index]]
        follow_up = int(first_turns.reactions.follow_up[index])
        messages = build_second_turn(response.prompt.messages, response.text, follow_up, variant)
        prompt = replace(response.prompt, id=f"{response.prompt.id}-{index:06d}", messages=messages)
        return ServedResponse(prompt, response.model_version, "", is_finished=False)

    def _sample_second_turns(self, first_turns: _Turns, chosen: Ints, responses: Sequence[ServedResponse]) -> _Turns:
        truths = self.reader.score_responses([response.reader_input for response in responses])
        features = ResponseFeatures.from_truths(truths, [response.prompt.topic for response in responses])
        user, item = first_turns.user[chosen], np.arange(len(chosen), dtype=np.int64)
        reactions = simulate_reactions(features, self.population, user, item, self.rng, shift=self.logit_shift)
        seconds = first_turns.seconds[chosen] + self.rng.integers(*SECOND_TURN_DELAY_S, len(chosen))
        return _Turns(responses, item, user, seconds, reactions)

    def _event_rows(self, turns: _Turns, conversation_ids: Sequence[str]) -> list[tuple[int, Row]]:
        """Time in seconds and row of each event with a text."""
        is_continued_missing = self.rng.random(len(turns.item)) < MISSING_CONTINUED_SHARE
        events: list[tuple[int, Row]] = []
        for n, conversation_id in enumerate(conversation_ids):
            response, seconds = turns.responses[turns.item[n]], int(turns.seconds[n])
            if not response.text.strip():
                continue
            row: Row = {
                "conversation_id": conversation_id,
                "turn": sum(message["role"] == "user" for message in response.prompt.messages),
                "user_id": _hashed_id("user", self.seed, turns.user[n]),
                "time": (FIRST_DAY + timedelta(seconds=seconds)).isoformat(),
                "model_version": f"base-{response.model_version}",
                "messages": _message_dicts(response.prompt.messages),
                "response": response.text,
                "reaction": "love" if turns.reactions.loved[n] else None,
                "continued": None if is_continued_missing[n] else bool(turns.reactions.continued[n]),
                # The next day of the last day is outside the log, so `returned` is unknown there.
                "returned": None if seconds >= (LOG_DAYS - 1) * 86400 else bool(turns.reactions.returned[n]),
                "topic": response.prompt.topic,
                "locale": "en",
            }
            events.append((seconds, row))
        return events


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
