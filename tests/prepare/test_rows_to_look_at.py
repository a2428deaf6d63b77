"""What the card says about the rows themselves: near duplicates, scripts, samples by entry, drift."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rluf.config.data import PrepareSettings
from rluf.config.settings import Settings
from rluf.prepare import pipeline, splits
from rluf.prepare.erasure import erase_users
from rluf.prepare.row_samples import sample_training_rows, shorten_row
from rluf.prepare.schema import DATA_KINDS
from rluf.prepare.validate_pass import count_scripts

Row = dict[str, Any]
WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "tu", "re", "sa") for b in ("ne", "vi", "po", "da", "gu", "fi")]
CHINESE = (
    "的一是不了人我在有他这为之大来以个中上们到说国和地也子时道出而要于就下得可你年生"
    "自会那后能对着事其里所去行过家十用发天如然作方"
)
THAI = "กขคงจฉชซญดตถทนบปผพฟมยรลวสหอ"


def make_text(seed: int, words: int = 60, *, alphabet: Sequence[str] = WORDS, separator: str = " ") -> str:
    return separator.join(np.random.default_rng(seed).choice(alphabet, words))


def feedback(index: int, **changes: Any) -> Row:
    return {
        "id": f"f{index}", "conversation_id": f"c{index}", "turn": 0, "user_id": f"u{index % 60}",
        "time": "2026-03-01T10:00:00Z", "model_version": "v1",
        "messages": [{"role": "user", "content": make_text(10_000 + index, 8)}], "response": make_text(index),
        "reaction": "love" if index % 4 == 0 else None,
    } | changes  # fmt: skip


def safety(index: int, **changes: Any) -> Row:
    return {
        "id": f"s{index}", "messages": [{"role": "user", "content": make_text(20_000 + index, 8)}],
        "response": make_text(30_000 + index), "label": index % 2, "group": f"g{index}",
    } | changes  # fmt: skip


def write(path: Path, rows: Sequence[Row]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def build(folder: Path, data: Mapping[str, Any], **prepare: Any) -> Row:
    settings = Settings.model_validate(
        {"data": {kind: data.get(kind, []) for kind in DATA_KINDS}, "prepare": {"positive_share": 0.01} | prepare}
    )
    execute = lambda tasks: [result for task in tasks for result in pipeline.run_task(task)]  # noqa: E731
    return pipeline.build_data_set(settings, folder / "data", execute)


def change_word(text: str, position: int = 30, word: str = "other", separator: str | None = " ") -> str:
    if separator is None:
        return text[:position] + word + text[position + len(word) :]
    words = text.split(separator)
    return separator.join([*words[:position], word, *words[position + 1 :]])


@pytest.mark.parametrize(
    ("alphabet", "separator", "word"), [(WORDS, " ", "other"), (list(CHINESE), "", "猫"), (list(THAI), "", "ฮ")]
)  # fmt: skip
def test_rows_that_differ_in_a_word_share_a_band_and_others_do_not(alphabet: Any, separator: str, word: str) -> None:
    texts = [make_text(seed, 120, alphabet=alphabet, separator=separator) for seed in range(100)]
    changed = [change_word(text, 50, word, separator or None) for text in texts]
    rows = [[f"question {n}", text] for n, text in enumerate(texts)] + [
        [f"question {n}", t] for n, t in enumerate(changed)
    ]
    bands = splits.compute_row_band_hashes(rows)
    assert bands.shape == (200, splits.ROW_BAND_COUNT)
    group = splits.group_by_bands(200, bands.T)
    assert (group[:100] == group[100:]).mean() > 0.9
    assert len(set(group[:100].tolist())) == 100


def test_the_order_of_the_texts_of_a_row_counts() -> None:
    chosen, rejected = make_text(1), make_text(2)
    bands = splits.compute_row_band_hashes([["q", chosen, rejected], ["q", rejected, chosen]])
    assert not (bands[0] == bands[1]).any()
    assert splits.compute_row_band_hashes([]).shape == (0, splits.ROW_BAND_COUNT)
    assert splits.compute_row_band_hashes([["", ""], ["", ""]]).shape == (2, splits.ROW_BAND_COUNT)


def test_repeats_are_found_in_the_order_of_the_log() -> None:
    group, order = np.array([0, 1, 0, 1, 2, 0]), np.array([5, 3, 2, 1, 0])
    assert splits.find_repeats(group, order).tolist() == [True, True, True, False, False, False]
    assert splits.find_repeats(group, order[:0]).tolist() == [False] * 6


def test_samples_are_the_lowest_keys_of_each_cell() -> None:
    rng = np.random.default_rng(0)
    row_key, cell = rng.integers(0, 2**63, 500, dtype=np.uint64), rng.integers(0, 3, 500)
    rows = np.flatnonzero(rng.random(500) < 0.8)
    chosen = splits.choose_sample_rows(row_key, cell, rows, 20)
    for code in range(3):
        in_cell = [row for row in rows.tolist() if cell[row] == code]
        expected = sorted(in_cell, key=lambda row: int(row_key[row]))[:20]
        assert sorted(row for row in chosen.tolist() if cell[row] == code) == sorted(expected)
    assert len(splits.choose_sample_rows(row_key, cell, rows[:0], 20)) == 0


def test_near_duplicates_are_reported_and_removed(tmp_path: Path) -> None:
    rows = [feedback(i) for i in range(400)]
    # The same user again, another user, and a follow-up with the same context.
    rows += [feedback(i, id=f"near{i}", response=change_word(make_text(i))) for i in range(40)]
    rows += [
        feedback(
            i,
            id=f"user{i}",
            user_id=f"u{(i + 1) % 60}",
            conversation_id=f"other{i}",
            response=change_word(make_text(i)),
        )
        for i in range(40)
    ]
    rows += [
        feedback(i, id=f"next{i}", turn=1, response=make_text(40_000 + i), conversation_id=f"c{i}",
                 messages=[*feedback(i)["messages"], {"role": "assistant", "content": make_text(i)},
                           {"role": "user", "content": make_text(50_000 + i, 8)}])
        for i in range(40)
    ]  # fmt: skip
    data = {"feedback": write(tmp_path / "log.jsonl", rows)}
    card = build(tmp_path, data)
    counts = card["duplicates"]["feedback"]
    assert counts["exact"] == 0 and 36 <= counts["near"] <= 42 and counts["rows"] == 520
    assert any(
        "differ from another row in a few words only; prepare.drop_duplicates=near" in w for w in card["warnings"]
    )
    card = build(tmp_path, data, drop_duplicates="near")
    assert card["counts"]["feedback"]["dropped"] == {"nearly repeats another row": counts["near"]}
    assert build(tmp_path, data, drop_duplicates="exact")["counts"]["feedback"]["dropped"] == {}


@pytest.mark.parametrize("setting", ["exact", "near"])
def test_a_reaction_that_only_the_repeated_row_has_stays(tmp_path: Path, setting: str) -> None:
    rows = [feedback(i, reaction="love" if i >= 40 and i % 4 == 0 else None) for i in range(300)]
    rows += [feedback(i, id=f"again{i}", reaction="love" if i % 2 else "thumbs_down") for i in range(40)]
    card = build(tmp_path, {"feedback": write(tmp_path / "log.jsonl", rows)}, drop_duplicates=setting)
    assert card["counts"]["feedback"]["dropped"] == {"repeats another row": 40}
    assert card["love"]["base_rate"]["hits"] == 65 + 20


def test_labels_that_differ_are_no_repeats(tmp_path: Path) -> None:
    rows = [safety(i) for i in range(200)]
    rows += [safety(i, id=f"near{i}", response=change_word(rows[i]["response"])) for i in range(30)]
    rows += [
        safety(i, id=f"flip{i}", label=1 - i % 2, response=change_word(rows[i]["response"], 20)) for i in range(30)
    ]
    card = build(tmp_path, {"safety": write(tmp_path / "log.jsonl", rows)})
    assert 25 <= card["duplicates"]["safety"]["near"] <= 32


@pytest.mark.parametrize(
    ("value", "expected"), [(True, "exact"), (False, "none"), ("near", "near"), ("exact", "exact")]
)
def test_the_setting_takes_the_values_of_earlier_releases(value: Any, expected: str) -> None:
    assert PrepareSettings(drop_duplicates=value).drop_duplicates == expected


@pytest.mark.parametrize(
    ("text", "script"),
    [("Hello there", "Latin"), ("Grüße aus Köln", "Latin"), ("привет, как дела?", "Cyrillic"), ("你好，世界", "Han"),
     ("これは日本語の文章です。漢字漢字漢字", "Kana"), ("안녕하세요 hi", "Hangul"), ("สวัสดีครับ", "Thai"),
     ("مرحبا بك", "Arabic"), ("नमस्ते", "Devanagari"), ("שלום", "Hebrew"), ("123 !?", "none"), ("", "none"),
     ("👍🎉", "none"), ("γειά σου", "Greek"), ("Привет world и мир", "Cyrillic")],
)  # fmt: skip
def test_the_script_of_a_text(text: str, script: str) -> None:
    assert count_scripts(pa.array([text])) == {script: 1}


def test_scripts_add_up() -> None:
    texts = ["Hello", "你好", "1", "привет", "Hello"] * 3
    assert count_scripts(pa.array(texts)) == {"Latin": 6, "Han": 3, "none": 3, "Cyrillic": 3}
    assert count_scripts(pa.array([], pa.string())) == {}


def test_samples_are_listed_by_entry_and_label_and_leave_with_their_user(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / f"{name}.jsonl", [feedback(i + offset) for i in range(count)])
        for name, offset, count in (("web", 0, 300), ("app", 1000, 240))
    ]
    card = build(
        tmp_path, {"feedback": paths, "safety": write(tmp_path / "safe.jsonl", [safety(i) for i in range(200)])}
    )
    samples = sample_training_rows(tmp_path / "data", card)
    counts = Counter((sample.output_name, sample.source, sample.label) for sample in samples)
    assert counts == {
        **{("love", path, label): 20 for path in paths for label in ("loved", "not loved")},
        **{("safety", str(tmp_path / "safe.jsonl"), label): 20 for label in ("label 0", "label 1")},
    }
    train = pq.read_table(tmp_path / "data" / "love" / "train.parquet").to_pylist()
    row_by_response = {row["response"]: row for row in train}
    for sample in samples:
        if sample.output_name == "love":
            row = row_by_response[sample.response]
            assert sample.label == ("loved" if row["label"] else "not loved")
            assert (int(row["id"][1:]) >= 1000) == ("app" in sample.source)
    page = (tmp_path / "data" / "data_card.html").read_text()
    assert samples[0].response in page and "tells Chinese from Thai" in page
    user = row_by_response[samples[0].response]["user_id"]
    erase_users(tmp_path / "data", [user])
    card = json.loads((tmp_path / "data" / "data_card.json").read_text())
    left = sample_training_rows(tmp_path / "data", card)
    assert 0 < len(left) < len(samples) and all(
        row_by_response.get(s.response, {}).get("user_id") != user for s in left
    )


def test_long_rows_are_shown_as_far_as_they_are_read() -> None:
    assert shorten_row("question", "answer", 100) == ("question", "answer")
    context, response = shorten_row("first " + "c" * 300 + " last", "begin " + "r" * 400 + " end", 100)
    assert context.endswith(" last") and "first" not in context and response.startswith("begin ")
    assert response.endswith(" end") and context.count("c") <= 25 and response.count("r") <= 75
    context, response = shorten_row("c" * 300, "short", 100)
    assert response == "short" and context.endswith("c" * 95) and "[... 205 bytes ...]" in context
    assert shorten_row("问" * 50, "答" * 50, 100)[1].startswith("答")


def test_drift_of_labels_scripts_and_of_an_entry_with_a_new_path(tmp_path: Path) -> None:
    columns = {"id": "id", "messages": "messages", "response": "text", "label": "label", "group": "group"}
    rows = [safety(i) | {"text": safety(i)["response"]} for i in range(300)]
    build(tmp_path, {"safety": [{"path": write(tmp_path / "may.jsonl", rows), "columns": columns}]})
    changed = [
        row | {"label": int(i % 5 == 0), "text": "你好世界" * 5 + str(i) if i % 2 else row["text"]}
        for i, row in enumerate(rows)
    ]
    for row in changed[:60]:
        del row["group"]
    june = {"path": write(tmp_path / "june.jsonl", changed), "columns": columns | {"topic": "=x"}}
    card = build(tmp_path, {"safety": [june]}, quarantine_budget=0.5)
    assert card["scripts"] == {"safety": {"Latin": 120, "Han": 120}}
    texts = "\n".join(card["warnings"])
    for sentence in (
        "safety: rows with label 0 50% before, 80% now", "safety: rows in script Han 0% before, 50% now",
        "june.jsonl): rows with columns.group 100% before, 80% now",
    ):  # fmt: skip
        assert sentence in texts
