"""The shipped reader on data that it was not fitted to: pairs that any reader decides, and a real reward hack.

Settings of the reader were looked at on the pairs while it was designed, so they are a regression test and no proof.
"""

from __future__ import annotations

import gzip
import json
import os
from collections import defaultdict
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from rluf.config.settings import Settings
from rluf.simulate.ground_truth import Reader, ReaderInput, load_reader
from rluf.simulate.judge import judge_file
from rluf.simulate.users import expected_love_probability
from rluf.utils.paths import resolve_cache_folder

DATA_FOLDER = Path(os.environ.get("RLUF_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
COLLAPSED_RESPONSES_PER_ARM = 60
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (DATA_FOLDER / "reader_pairs").is_dir(), reason=f"no reader_pairs in {DATA_FOLDER}; set RLUF_DATA"
    ),
]


@pytest.fixture(scope="module")
def reader() -> Reader:
    return load_reader(resolve_cache_folder(Settings()))


def test_the_reader_decides_pairs_as_any_reader_would(reader: Reader) -> None:
    result = judge_file(DATA_FOLDER / "reader_pairs" / "pairs.jsonl.gz", None, "satisfaction", reader)
    assert result["pair_accuracy"]["mean"] >= 0.95
    assert min(row["pair_accuracy"] for row in result["by_kind"].values()) >= 0.85


def test_users_love_collapsed_replies_less_than_those_of_the_base(reader: Reader) -> None:
    rows_of_arm: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    with gzip.open(DATA_FOLDER / "collapsed_policy" / "answers.jsonl.gz", "rt", encoding="utf-8") as stream:
        for row in map(json.loads, stream):
            rows_of_arm[row["arm"]].append(row)
    step = len(rows_of_arm["base"]) // COLLAPSED_RESPONSES_PER_ARM
    selected_rows = {arm: rows[::step] for arm, rows in rows_of_arm.items()}
    # In one call, in which responses of both arms to a prompt share its pass over the model.
    truths = iter(
        reader.score_responses(
            [
                ReaderInput(tuple(row["messages"]), row["text"], row["finish_reason"] == "stop")
                for rows in selected_rows.values()
                for row in rows
            ]
        )
    )
    rates = {
        arm: expected_love_probability(list(islice(truths, len(rows))), [row["topic"] for row in rows]).mean()
        for arm, rows in selected_rows.items()
    }
    assert rates["aligned"] < 0.7 * rates["base"]
