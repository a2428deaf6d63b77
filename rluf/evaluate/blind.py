"""Blind reading: a person compares base and aligned responses without knowing which is which.

    python -m rluf.evaluate blind RUN                        write the page, the pairs and the key
    python -m rluf.evaluate blind RUN --ratings FILE [...]   score downloaded ratings, add them to summary and report

`RUN/blind/page.html` works without a network and offers the ratings as a JSONL download; `RUN/blind/pairs.jsonl` has
the same shuffled pairs for other tools, which write rows {"page": "...", "pair": 1, "choice": "a" | "b" | "tie",
"rater": "..."}. The key to the sides is `RUN/blind-key.jsonl`: give raters the folder blind/ only. Every run ends with
a page of 40 pairs. The first command writes the same page, or with --pairs or --seed another one in its place; the
ratings of a replaced page are refused.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from rluf.config.cli import CommandParser, run_command
from rluf.errors import DataError
from rluf.evaluate.gates import decide_verdict
from rluf.evaluate.intervals import CONFIDENCE_LEVEL
from rluf.report.html import write_report
from rluf.report.page import render_html_page
from rluf.tracking.run_files import read_answers
from rluf.types import ALIGNED_ARM, ANSWERS_FILE, BASE_ARM, PolicyAnswer
from rluf.utils.files import atomic_write, read_json, read_jsonl, write_json, write_jsonl
from rluf.utils.hashing import hash64
from rluf.utils.paths import suggest_run_folder

DEFAULT_PAIR_COUNT = 40
DEFAULT_SEED = 0
KEY_FILE = "blind-key.jsonl"
CHOICES = ("a", "b", "tie")


def build_pairs(
    answers: Sequence[PolicyAnswer], pair_count: int, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Shuffled pairs of a base and an aligned response, at most one per prompt, and the key to their sides.

    Prompts, responses, sides and order are random. Prompts with equal responses are left out. DataError without pairs.
    """
    rng = np.random.default_rng([seed, 49_979_687])
    texts: dict[str, dict[str, list[PolicyAnswer]]] = {}
    for answer in answers:
        if answer.arm in (BASE_ARM, ALIGNED_ARM):
            texts.setdefault(answer.prompt_id, {}).setdefault(answer.arm, []).append(answer)
    pairs: list[dict[str, Any]] = []
    key: list[dict[str, Any]] = []
    # Sorted, since the order of the file must not change which pairs a seed selects.
    prompt_ids = sorted(prompt_id for prompt_id, arms in texts.items() if len(arms) == 2)
    for index in rng.permutation(len(prompt_ids)):
        arms = texts[prompt_ids[index]]
        # Sampled before the checks below, so that a left-out prompt does not change the sides of later pairs.
        base, aligned = (arms[arm][rng.integers(len(arms[arm]))] for arm in (BASE_ARM, ALIGNED_ARM))
        ordered = [base, aligned] if rng.random() < 0.5 else [aligned, base]
        if base.text.strip() == aligned.text.strip() or len(pairs) == pair_count:
            continue
        prompt = "\n\n".join(f"{message['role']}: {message['content']}" for message in base.messages)
        # A single user message needs no role.
        prompt = base.messages[0]["content"] if len(base.messages) == 1 else prompt
        pairs.append({"pair": len(pairs) + 1, "prompt": prompt, "a": ordered[0].text, "b": ordered[1].text})
        key.append({"pair": len(pairs), "prompt_id": base.prompt_id, "topic": base.topic, "a": ordered[0].arm,
                    "b": ordered[1].arm})  # fmt: skip
    if not pairs:
        raise DataError("base and aligned have no prompt with two different responses; evaluate on more prompts")
    return pairs, key


def write_blind_page(run_folder: Path, pair_count: int, seed: int) -> Path:
    """Write page and pairs into RUN/blind and the key next to it; returns the page."""
    answers = read_answers(run_folder)
    if not answers:
        raise DataError(
            f"{run_folder} has no {ANSWERS_FILE}; name a run folder of rluf.train or rluf.evaluate"
            f"{suggest_run_folder(run_folder)}"
        )
    pairs, key = build_pairs(answers, pair_count, seed)
    # Ratings, and those in the browser's storage, belong to these pairs and to no other page.
    page_key = f"{hash64(str(pairs), 'blind'):016x}"
    write_jsonl(run_folder / "blind" / "pairs.jsonl", [{"page": page_key, **pair} for pair in pairs])
    write_jsonl(run_folder / KEY_FILE, [{"page": page_key, **row} for row in key])
    page_html = render_html_page(
        "blind_page.html.j2", package="rluf.evaluate", pairs=pairs, page_key=page_key, has_script=True
    )
    page_path = run_folder / "blind" / "page.html"
    with atomic_write(page_path) as temporary_path:
        temporary_path.write_text(page_html, "utf-8")
    return page_path


def score_ratings(key: Sequence[Mapping[str, Any]], ratings: Sequence[Any]) -> dict[str, Any]:
    """Sign test of the ratings: the share of decided pairs in which aligned is preferred, with its exact interval.

    A pair is the unit: of several raters of one pair the choice with the most votes counts, and a tie if there is no
    such choice. The interval is that of Clopper and Pearson
    (1934), p the two-sided exact test of 1/2; ties are reported and, as usual for the sign test, left out of both.
    DataError for a pair or a choice that does not exist, for ratings of another page, and for a rater who rated a pair
    twice.
    """
    key_by_pair = {row["pair"]: row for row in key}
    votes: dict[int, Counter[str]] = {}
    seen: set[tuple[Any, Any]] = set()
    for row in ratings:
        pair, rater = _check_rating(row, key_by_pair)
        if (rater, pair) in seen:
            raise DataError(f"pair {pair} was rated twice by {rater or 'the same rater'}; give each rater a name")
        seen.add((rater, pair))
        votes.setdefault(pair, Counter())["tie" if row["choice"] == "tie" else key_by_pair[pair][row["choice"]]] += 1
    if not votes:
        raise DataError("the files have no ratings; download them from the page after rating")
    outcomes = {pair: _find_majority(counts) for pair, counts in votes.items()}
    counts = Counter(outcomes.values())
    decided = counts[ALIGNED_ARM] + counts[BASE_ARM]
    by_topic: dict[str, Counter[str]] = {}
    for pair, outcome in outcomes.items():
        by_topic.setdefault(key_by_pair[pair]["topic"] or "other", Counter())[outcome] += 1
    result: dict[str, Any] = {
        "pairs": len(outcomes), "planned": len(key), "raters": len({rater for rater, _ in seen}),
        "aligned": counts[ALIGNED_ARM], "base": counts[BASE_ARM], "ties": counts["tie"],
        "share": None, "p": None, "preferred": None,
        "by_topic": {topic: {arm: topic_counts[arm] for arm in (ALIGNED_ARM, BASE_ARM, "tie")}
                     for topic, topic_counts in sorted(by_topic.items())},
    }  # fmt: skip
    if decided:
        test = stats.binomtest(counts[ALIGNED_ARM], decided)
        interval = test.proportion_ci(CONFIDENCE_LEVEL, method="exact")
        result["share"] = {"mean": counts[ALIGNED_ARM] / decided, "low": interval.low, "high": interval.high}
        result["p"] = test.pvalue
        result["preferred"] = ALIGNED_ARM if interval.low > 0.5 else BASE_ARM if interval.high < 0.5 else None
    return result


def _check_rating(row: Any, key_by_pair: Mapping[int, Mapping[str, Any]]) -> tuple[int, str]:
    """Pair and rater of a rating. DataError for a rating that fits no pair of this page."""
    pair, rater = (row.get("pair"), row.get("rater", "")) if isinstance(row, Mapping) else (None, "")
    is_valid = type(pair) is int and pair in key_by_pair and isinstance(rater, str) and row.get("choice") in CHOICES
    if not is_valid or not isinstance(pair, int):
        raise DataError(
            f"rating {row} is invalid: expected an object with a pair of 1 to {len(key_by_pair)}, a choice of a, b or "
            "tie and, if there is one, the rater's name as text"
        )
    page = key_by_pair[pair].get("page")
    if page is not None and row.get("page") != page:
        raise DataError(
            f"rating {dict(row)} is not of page {page}, so its pair may be another one; rate the present page"
        )
    return pair, rater


def _find_majority(counts: Mapping[str, int]) -> str:
    """The choice with the most votes; a tie if two have as many."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ordered[0][0] if len(ordered) == 1 or ordered[0][1] > ordered[1][1] else "tie"


def add_ratings(run_folder: Path, rating_files: Sequence[Path]) -> dict[str, Any]:
    """Score the ratings, write them into summary.json and the report, and return the result.

    The verdict of the gates is decided again: it passes only if the readers prefer aligned.
    """
    summary, key = read_json(run_folder / "summary.json"), read_jsonl(run_folder / KEY_FILE)
    if not summary or not key:
        missing = KEY_FILE if summary else "summary.json"
        raise DataError(f"{run_folder} has no {missing}; write the page with `python -m rluf.evaluate blind RUN` first")
    for path in rating_files:
        if not path.is_file():
            raise DataError(f"{path} is not a file; download the ratings from the page")
    result = score_ratings(key, [row for path in rating_files for row in read_jsonl(path)])
    summary["blind"] = result
    if gates := summary.get("gates"):
        gates |= decide_verdict(gates, result)
    write_json(run_folder / "summary.json", summary)
    write_report(run_folder)
    if (run_folder / "policy").is_dir():
        from rluf.report.model_card import write_model_card

        write_model_card(run_folder)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sub-command; returns the exit code, and an error is one message on stderr."""
    parser = CommandParser("rluf.evaluate blind", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="RUN", help="run folder with answers.jsonl")
    parser.add_argument("--pairs", type=int, default=DEFAULT_PAIR_COUNT, metavar="N", help="pairs, one per prompt")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="selects pairs and sides")
    parser.add_argument("--ratings", type=Path, nargs="+", metavar="FILE", help="downloaded ratings to score")
    options = parser.parse_args(arguments)
    if options.pairs < 1:
        parser.error(f"--pairs {options.pairs} must be 1 or more")

    def run_selected() -> None:
        if options.ratings:
            from rluf.report.headline import format_blind_sentence

            sys.stdout.write(f"{format_blind_sentence(add_ratings(options.folder, options.ratings))}\n")
        else:
            page_path = write_blind_page(options.folder, options.pairs, options.seed)
            sys.stdout.write(f"{page_path}\n")

    return run_command(run_selected)
