"""The whole of prepare on a real local Ray: counts add up, splits hold, bad logs stop with one clear message."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from rluf.config.settings import Settings
from rluf.errors import DataError
from rluf.prepare import card as cards
from rluf.prepare.pipeline import build
from rluf.prepare.schema import KINDS
from rluf.prepare.tables import Tally

Maker = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    import ray

    mine = not ray.is_initialized()
    if mine:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100 << 20,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    yield
    if mine:
        ray.shutdown()


def settings_for(log: dict[str, Path], **prepare: Any) -> Settings:
    data = {kind: [str(log[kind])] if kind in log else [] for kind in KINDS}
    return Settings.model_validate({"data": data, "prepare": prepare})


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / f"{name}.parquet").to_pylist()
    return rows


def test_clean_log(log: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "made" / "data"
    card = build(settings_for(log, positive_share=0.5), out)
    assert card == json.loads((out / "data_card.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == [
        "data_card.html", "data_card.json", "helpfulness", "love", "prompts", "quarantine.parquet", "safety",
    ]  # fmt: skip
    assert [path.name for path in out.parent.iterdir()] == ["data"]
    love = {side: read(out / "love", side) for side in ("train", "dev", "test")}
    users = {side: {row["user_id"] for row in rows} for side, rows in love.items()}
    assert (
        users["train"]
        and not users["train"] & users["dev"] | users["train"] & users["test"] | users["dev"] & users["test"]
    )
    for side in ("dev", "test"):
        assert {row["weight"] for row in love[side]} == {1.0}
    labels = np.array([row["label"] for row in love["train"]])
    weights = np.array([row["weight"] for row in love["train"]])
    assert labels.mean() == pytest.approx(0.5)
    assert (labels * weights).sum() / weights.sum() == pytest.approx(
        card["love"]["base_rate_by_split"]["train"]["mean"]
    )
    assert card["love"]["base_rate"]["mean"] == pytest.approx(100 / 1100)
    assert card["counts"]["feedback"]["dropped"] == {"sampled out of train": 1100 - sum(map(len, love.values()))}
    for name in ("helpfulness", "safety"):
        groups = [{row["group"] for row in read(out / name, side)} for side in ("train", "dev", "test")]
        assert sum(map(len, groups)) == len(set.union(*groups)) == 40
    assert len(read(out / "prompts", "test")) == 10 and len(read(out / "prompts", "train")) == 30


def test_bad_rows_are_set_aside_and_counts_add_up(
    log: dict[str, Path], tmp_path: Path, rows: dict[str, Maker], jsonl: Callable[..., Path]
) -> None:
    make = rows["feedback"]
    asked = rows["prompts"](0)["messages"]  # a test prompt; user u1 is of train, as the check below shows
    bad: list[dict[str, Any] | bytes] = [
        b'{"id": "cut', b"\xff\xfe", b"[]", make(9001, response=""), make(9002, time="2999-01-01T00:00:00Z"), make(3),
        make(3, response="twice and different"), make(9003, response="\ud800"), make(9004, turn="1"),
    ]  # fmt: skip
    first = [make(index) for index in range(1000)]
    log["feedback"] = jsonl(tmp_path / "mixed.jsonl", [*first, *bad, make(9100, user_id="u1", messages=asked)])
    out = tmp_path / "data"
    card = build(settings_for(log, blocks=3), out)
    count = card["counts"]["feedback"]
    assert count["in"] == 1010 == count["kept"] + sum(count["dropped"].values()) + sum(count["quarantined"].values())
    assert count["dropped"]["context is a test prompt"] == 1
    assert count["quarantined"] == {
        "duplicate id": 2, "broken JSON": 1, "not UTF-8": 1, "not an object": 1, "empty response": 1, "future time": 1,
        "lone surrogate": 1, "wrong type: turn": 1,
    }  # fmt: skip
    aside = sorted(read(out, "quarantine"), key=lambda row: row["line"])
    assert [row["line"] for row in aside] == list(range(1001, 1010))
    assert aside[0]["raw"] == b'{"id": "cut' and aside[1]["raw"] == b"\xff\xfe"
    assert Counter(row["reason"] for row in aside) == count["quarantined"]
    assert {row["source"] for row in aside} == {str(log["feedback"])}
    kept = [row for side in ("train", "dev", "test") for row in read(out / "love", side)]
    assert "twice and different" not in {row["response"] for row in kept}
    assert len({row["id"] for row in kept}) == len(kept)


def test_blocks_and_reruns_change_nothing(log: dict[str, Path], tmp_path: Path) -> None:
    found = []
    for blocks in (1, 3):
        build(settings_for(log, blocks=blocks), tmp_path / "data")
        found.append([read(tmp_path / "data" / name, "train") for name in ("love", "helpfulness", "prompts")])
    assert found[0] == found[1]
    assert [row["id"] for row in found[0][2]] != sorted(row["id"] for row in found[0][2])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_too_many_bad_rows_stop_with_a_summary(
    log: dict[str, Path], tmp_path: Path, rows: dict[str, Maker], jsonl: Callable[..., Path]
) -> None:
    log["safety"] = jsonl(tmp_path / "s.jsonl", [rows["safety"](i, label=5 if i % 4 == 0 else 1) for i in range(80)])
    with pytest.raises(DataError) as error:
        build(settings_for(log), tmp_path / "data")
    for words in (
        "data.safety",
        "20 of 80 rows (25.0%)",
        "quarantine_budget=0.05",
        "bad value: label: 20",
        "s.jsonl:1)",
    ):
        assert words in str(error.value)
    assert not (tmp_path / "data").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_logs_that_cannot_work_are_refused(
    log: dict[str, Path], tmp_path: Path, rows: dict[str, Maker], jsonl: Callable[..., Path]
) -> None:
    out = tmp_path / "data"
    empty = jsonl(tmp_path / "empty.jsonl.gz", [])
    with pytest.raises(DataError, match=r"data\.feedback: no rows in .*empty\.jsonl\.gz"):
        build(settings_for(log | {"feedback": empty}), out)
    with pytest.raises(DataError, match=r"no such file: .*gone\.jsonl"):
        build(settings_for(log | {"feedback": tmp_path / "gone.jsonl"}), out)
    with pytest.raises(DataError, match="all empty"):
        build(settings_for({}), out)
    cold = jsonl(tmp_path / "cold.jsonl", [rows["feedback"](i, reaction=None) for i in range(200)])
    with pytest.raises(DataError, match="all training rows are unloved"):
        build(settings_for({"feedback": cold}), out)
    lone = jsonl(tmp_path / "lone.jsonl", [rows["preferences"](i, group="one") for i in range(50)])
    with pytest.raises(DataError, match=r"data\.preferences: no good row of 50 falls in the"):
        build(settings_for({"preferences": lone}), out)
    assert not out.exists()


def test_a_folder_of_someone_else_is_left_alone(log: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.txt").write_text("precious")
    with pytest.raises(DataError, match=r"thesis exists and is no data set of rluf"):
        build(settings_for(log), out)
    assert (out / "chapter.txt").read_text() == "precious"


def test_counts_that_do_not_add_up_are_a_fault() -> None:
    with pytest.raises(DataError, match="do not add up"):
        cards.funnel([Tally("feedback", "in", 3), Tally("feedback", "quarantined", 2)], {})
