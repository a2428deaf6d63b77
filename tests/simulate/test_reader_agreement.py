"""The shipped reader on data that it was not fitted to: pairs that any reader decides, and a real reward hack.

Settings of the reader were looked at on the pairs while it was designed, so they are a regression test and no proof.
"""

from __future__ import annotations

import gzip
import json
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from rluf.config.settings import Settings
from rluf.simulate.ground_truth import Reader, ReaderInput, load_reader
from rluf.simulate.judge import judge_file
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


@pytest.mark.xfail(
    strict=True,
    reason="known shortfall (benchmarks/RESULTS.md, The reader): 59% of these base replies are cut, 46% of the "
    "collapsed ones, and being cut costs most",
)
def test_collapsed_replies_do_not_satisfy_more_than_those_of_the_base(reader: Reader) -> None:
    inputs: defaultdict[str, list[ReaderInput]] = defaultdict(list)
    with gzip.open(DATA_FOLDER / "collapsed_policy" / "answers.jsonl.gz", "rt", encoding="utf-8") as stream:
        for row in map(json.loads, stream):
            item = ReaderInput(tuple(row["messages"]), row["text"], row["finish_reason"] == "stop")
            inputs[row["arm"]].append(item)
    step = len(inputs["base"]) // COLLAPSED_RESPONSES_PER_ARM
    means = {
        arm: np.mean([truth.satisfaction for truth in reader.score_responses(items[::step])])
        for arm, items in inputs.items()
    }
    assert means["aligned"] <= means["base"]
