"""What stands beside the data: the card and its page, drift, signals, deletions, and jobs that are killed midway."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rluf.config.settings import Settings
from rluf.errors import DataError, SettingsError
from rluf.prepare.erasure import forget
from rluf.prepare.pipeline import build, run_task
from rluf.prepare.schema import KINDS
from rluf.prepare.signals import link, rank_signals, signal_lines, write_signals

Maker = Callable[..., dict[str, Any]]
SIDES = ("train", "dev", "test")


def in_this_process(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [found for row in rows for found in run_task(row)]


def settings_for(log: Mapping[str, Path], **prepare: Any) -> Settings:
    data = {kind: [str(log[kind])] if kind in log else [] for kind in KINDS}
    return Settings.model_validate({"data": data, "prepare": {"positive_share": 0.05} | prepare})


def love(folder: Path) -> list[dict[str, Any]]:
    return [row for side in SIDES for row in pq.read_table(folder / "love" / f"{side}.parquet").to_pylist()]


def test_card_page_and_drift(log: dict[str, Path], tmp_path: Path, rows: dict[str, Maker], jsonl: Any) -> None:
    out = tmp_path / "data"
    first = build(settings_for(log), out, in_this_process)
    assert first["drift"] == {}
    facts = first["love"]
    assert facts["base_rate_by_topic"]["casual"]["rows"] == 550
    assert sum(part["hits"] for part in facts["base_rate_by_day"].values()) == facts["base_rate"]["hits"] == 100
    assert len(facts["base_rate_by_day"]) == 28
    page = (out / "data_card.html").read_text(encoding="utf-8")
    assert "1,640 of 1,640 rows became training data" in page
    assert all(f'data-figure="by_{name}"' in page for name in ("topic", "day", "locale", "model"))
    assert "://" not in page.partition('<script type="application/json"')[0]
    hot = [rows["feedback"](n, reaction="love" if n % 3 == 0 else None, topic="new") for n in range(1100)]
    log["feedback"] = jsonl(tmp_path / "hot.jsonl", hot)
    second = build(settings_for(log), out, in_this_process)
    assert second["drift"]["base_rate_differs"] and second["drift"]["topic_psi"] > 0.2
    assert second["drift"]["locale_psi"] == pytest.approx(0)
    third = build(settings_for(log, previous=str(out)), tmp_path / "other", in_this_process)
    assert not third["drift"]["base_rate_differs"]
    with pytest.raises(DataError, match=r"prepare\.previous=.*nowhere"):
        build(settings_for(log, previous=str(tmp_path / "nowhere")), tmp_path / "other", in_this_process)


def test_weights_are_the_product_of_their_parts(tmp_path: Path, rows: dict[str, Maker], jsonl: Any) -> None:
    every = [rows["feedback"](n, author="u3" if n // 2 % 97 == 3 else None) for n in range(1100)]
    file = jsonl(tmp_path / "log.jsonl", every)
    build(settings_for({"feedback": file}, positive_share=0.3), tmp_path / "data", in_this_process)
    found = love(tmp_path / "data")
    assert all(row["weight"] == pytest.approx(row["sampling"] * row["trust"]) for row in found)
    assert {row["trust"] for row in found if row["user_id"] == "u3"} == {0.01}
    assert {row["trust"] for row in found if row["user_id"] != "u3"} == {1.0}
    assert all(0 < row["propensity"] < 1 for row in found)


def test_strict_splits_on_a_whole_log(tmp_path: Path, rows: dict[str, Maker], jsonl: Any) -> None:
    every = [rows["feedback"](n, conversation_id=f"c{n}", messages=[{"role": "user", "content": f"say {n % 300}"}])
             for n in range(3000)]  # fmt: skip
    file = jsonl(tmp_path / "log.jsonl", every)
    card = build(settings_for({"feedback": file}, split="strict"), tmp_path / "data", in_this_process)
    assert card["love"]["test_later_than_train"]
    sides = {side: pq.read_table(tmp_path / "data" / "love" / f"{side}.parquet").to_pylist() for side in SIDES}
    for key in (lambda row: row["user_id"], lambda row: row["messages"][-1]["content"]):
        values = [{key(row) for row in part} for part in sides.values()]
        assert sum(map(len, values)) == len(set.union(*values))
    dropped = card["counts"]["feedback"]["dropped"]
    assert {"after the time split", "test row before the time split"} < set(dropped)


def test_users_are_hashed_with_the_salt_and_columns_mapped(
    tmp_path: Path, rows: dict[str, Maker], jsonl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = [rows["feedback"](n) for n in range(600)]
    foreign = [{"who": row.pop("user_id"), "text": row.pop("response"), **row} for row in every]
    file = jsonl(tmp_path / "log.jsonl", foreign)
    monkeypatch.setenv("RLUF_USER_SALT", "pepper")
    columns = {"user_id": "who", "response": "text"}
    card = build(settings_for({"feedback": file}, columns=columns), tmp_path / "data", in_this_process)
    found = love(tmp_path / "data")
    assert len(found) == 600 == card["counts"]["feedback"]["in"]
    assert all(len(row["user_id"]) == 24 for row in found) and len({row["user_id"] for row in found}) == 97
    assert "pepper" not in json.dumps(card) and card["user_ids"] == "hashed with RLUF_USER_SALT"
    proof = forget(tmp_path / "data", ["u5"])
    assert sum(proof["rows_removed"].values()) == 8 and len(love(tmp_path / "data")) == 592
    with pytest.raises(SettingsError, match=r"prepare\.columns\.shoe"):
        build(settings_for({"feedback": file}, columns={"shoe": "size"}), tmp_path / "new", in_this_process)


def test_a_forgotten_user_is_gone_and_stays_gone(
    log: dict[str, Path], tmp_path: Path, rows: dict[str, Maker], jsonl: Any
) -> None:
    every = [rows["feedback"](n) for n in range(1100)]
    bad = [
        rows["feedback"](5000 + n, user_id=("secret-0", "secret-1", "secret-12")[n % 3], response="") for n in range(30)
    ]
    mine = [rows["feedback"](6000 + n, user_id="secret-1") for n in range(20)]
    log["feedback"] = jsonl(tmp_path / "log.jsonl", [*every, *bad, *mine])
    out = tmp_path / "data"
    build(settings_for(log), out, in_this_process)
    before, helpful = love(out), pq.read_table(out / "helpfulness" / "train.parquet")
    proof = forget(out, ["secret-1"])
    assert proof["rows_of_these_users_left"] == 0
    assert sum(proof["rows_removed"].values()) == 30
    assert love(out) == [row for row in before if row["user_id"] != "secret-1"]
    assert pq.read_table(out / "helpfulness" / "train.parquet").equals(helpful)
    left = [row["raw"] for row in pq.read_table(out / "quarantine.parquet").to_pylist()]
    assert len(left) == 20 and not any(b'"secret-1"' in raw for raw in left)
    assert sum(b'"secret-12"' in raw for raw in left) == 10
    assert "secret-1" not in (out / "data_card.json").read_text()
    card = json.loads((out / "data_card.json").read_text())
    count = card["counts"]["feedback"]
    assert count["in"] == count["kept"] + sum(count["dropped"].values()) + sum(count["quarantined"].values())
    again = build(settings_for(log), out, in_this_process)
    assert again["counts"]["feedback"]["dropped"]["user asked to be forgotten"] == 20
    assert "secret-1" not in {row["user_id"] for row in love(out)}
    with pytest.raises(DataError, match="none of 1 users has a row"):
        forget(out, ["nobody"])
    with pytest.raises(DataError, match=r"holds no data_card\.json"):
        forget(tmp_path, ["secret-1"])


def test_the_link_undoes_a_confounder() -> None:
    rng = np.random.default_rng(3)
    user = np.repeat(np.arange(800), 5)
    busy = rng.normal(size=800)[user]
    has = rng.random(4000) < 1 / (1 + np.exp(1 - 1.5 * busy))
    back = rng.random(4000) < 1 / (1 + np.exp(-1.5 * busy))
    bare, fair = (link(has, back, controls, user) for controls in (np.empty((4000, 0)), busy[:, None]))
    assert bare.low > 0.5 and fair.low < 0 < fair.high
    real = link(has, rng.random(4000) < 1 / (1 + np.exp(-1.5 * busy - 1.0 * has)), busy[:, None], user)
    assert real.low < 1.0 < real.high and real.low > 0.5


def test_signals_are_ranked(tmp_path: Path, rows: dict[str, Maker], jsonl: Any) -> None:
    rng = np.random.default_rng(1)
    every = []
    for n in range(4000):
        good = bool(rng.random() < 0.4)
        every.append(
            rows["feedback"](
                n,
                user_id=f"u{n // 2 % 400}",
                turn=n % 2,
                conversation_id=f"c{n // 2}",
                messages=[{"role": "user", "content": "that was wonderful, thank you!" if n % 4 == 1 else "and then?"}],
                reaction="love" if good and rng.random() < 0.5 else None,
                continued=bool(rng.random() < 0.5),
                returned=bool(rng.random() < (0.8 if good else 0.3)),
            )
        )
    file = jsonl(tmp_path / "log.jsonl", every)
    build(settings_for({"feedback": file}), tmp_path / "data", in_this_process)
    ranked = write_signals(tmp_path / "data")
    found = {row["signal"]: row for row in ranked}
    assert ranked[0]["signal"] == "love" and found["love"]["link"]["low"] > 0
    assert found["continue"]["link"]["low"] < 0.2 and found["thumbs up"]["link"] is None
    assert 200 < found["pleased follow-up"]["per_1000"] < 300
    assert found["return"]["ambiguity"] == pytest.approx(0.5, abs=0.1)
    assert len(signal_lines(ranked)) == 7
    assert "love comes first of 6 signals" in (tmp_path / "data" / "signals.html").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "data" / "signals.json").read_text())["signals"] == ranked
    table = pq.read_table(tmp_path / "data" / "love" / "test.parquet")
    assert rank_signals(pa.concat_tables([table, table]))[0]["link"]["rows"] == 2 * table.num_rows


KILLED = """
import json, os, signal, sys
from pathlib import Path
from rluf.config.settings import Settings
from rluf.prepare.pipeline import build, run_task
stop, done = int(sys.argv[3]), 0
def execute(rows):
    global done
    found = []
    for row in rows:
        if done == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        found += run_task(row)
        done += 1
    print(done, flush=True)
    return found
build(Settings.model_validate(json.loads(sys.argv[1])), Path(sys.argv[2]), execute)
"""


def test_a_killed_job_shows_nothing_and_does_not_start_over(log: dict[str, Path], tmp_path: Path) -> None:
    stop = 9  # after the eight tasks of the first pass and one of the second
    settings = settings_for(log)
    out = tmp_path / "made" / "data"
    told = subprocess.run(
        [sys.executable, "-c", KILLED, settings.model_dump_json(), str(out), str(stop)],
        capture_output=True, env=os.environ, cwd=Path(__file__).parents[2], check=False,
    )  # fmt: skip
    assert told.returncode == -signal.SIGKILL, told.stderr.decode()[-500:]
    assert not out.exists() and [path.name[:9] for path in out.parent.iterdir()] == [".prepare-"]
    ran: list[Any] = []

    def execute(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        ran.extend(rows)
        return in_this_process(rows)

    card = build(settings, out, execute)
    every: list[Any] = []

    def whole(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        every.extend(rows)
        return in_this_process(rows)

    other = build(settings, tmp_path / "whole", whole)
    assert len(ran) == len(every) - stop
    assert [path.name for path in out.parent.iterdir()] == ["data"]
    same = ("counts", "splits", "love")
    assert {name: card[name] for name in same} == {name: other[name] for name in same}
    assert love(out) == love(tmp_path / "whole")
