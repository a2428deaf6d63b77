"""Blind reading: pairs without a hint, the page and its downloads, exact results, and their place in the report."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from rluf.errors import DataError
from rluf.evaluate.__main__ import main
from rluf.evaluate.blind import KEY_FILE, build_pairs, score_ratings
from rluf.report.headline import report_headline
from rluf.tracking.run_files import write_answers
from rluf.types import PolicyAnswer
from rluf.utils.files import read_json, read_jsonl, write_json, write_jsonl


def make_answers(prompt_count: int = 30) -> list[PolicyAnswer]:
    return [
        PolicyAnswer(
            arm, f"p{n:02d}", ("facts", "advice")[n % 2], ({"role": "user", "content": f"Question </script> {n}?"},),
            f"reply {n} {code} {sample}", "stop", 5, {},
        )
        for arm, code in (("base", "x"), ("base_repeat", "y"), ("control", "z"), ("aligned", "w"))
        for n in range(prompt_count)
        for sample in range(2)
    ]  # fmt: skip


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run folder with its responses and a summary whose gates pass."""
    write_answers(tmp_path, make_answers())
    check = {"name": "love", "gate": "must_rise", "status": "pass", "limit": 0.0, "judged_by": "reward models",
             "lift": {"mean": 0.2, "low": 0.1, "high": 0.3}}  # fmt: skip
    gates = {"verdict": "pass", "checks": [check], "alarms": [], "alarm_labels": [], "truncated_share": 0.0,
             "reasons": [], "rule": "", "judged_by": "reward models"}  # fmt: skip
    write_json(tmp_path / "summary.json", {"name": "quickstart", "gates": gates})
    return tmp_path


def rate_as(key: list[dict[str, Any]], preferred: list[str], rater: str = "") -> list[dict[str, Any]]:
    """Ratings that prefer the given arm of each pair, or "tie"."""
    return [
        ({"page": row["page"]} if "page" in row else {})
        | {"pair": row["pair"], "choice": "tie" if arm == "tie" else "a" if row["a"] == arm else "b", "rater": rater}
        for row, arm in zip(key, preferred, strict=False)
    ]


def test_pairs_are_shuffled_and_give_no_hint() -> None:
    pairs, key = build_pairs(make_answers(), 20, seed=1)
    assert len(pairs) == len(key) == 20
    assert [set(pair) for pair in pairs] == [{"pair", "prompt", "a", "b"}] * 20
    assert [pair["pair"] for pair in pairs] == [row["pair"] for row in key] == list(range(1, 21))
    assert len({row["prompt_id"] for row in key}) == 20
    assert [row["prompt_id"] for row in key] != sorted(row["prompt_id"] for row in key)
    sides = [row["a"] for row in key]
    assert 4 <= sides.count("aligned") <= 16
    for pair, row in zip(pairs, key, strict=True):
        codes = {"base": " x ", "aligned": " w "}
        assert codes[row["a"]] in pair["a"] and codes[row["b"]] in pair["b"]
    assert build_pairs(make_answers(), 20, seed=1) == (pairs, key)
    assert build_pairs(make_answers(), 20, seed=2) != (pairs, key)
    with pytest.raises(DataError, match="no prompt with two different responses"):
        build_pairs([answer for answer in make_answers() if answer.arm == "base"], 20, seed=1)


def test_the_page_is_self_contained_and_does_not_know_the_arms(run_folder: Path) -> None:
    assert main(["blind", str(run_folder), "--pairs", "12"]) == 0
    page = (run_folder / "blind" / "page.html").read_text("utf-8")
    page = html.unescape(page)
    assert not re.search(r'(src|href)="(?!data:,)', page)
    assert "default-src 'none'" in page and "script-src 'unsafe-inline'" in page
    assert "</script> 3" not in page
    for hint in ("aligned", "base_repeat", '"arm"', "prompt_id", "topic"):
        assert hint not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    assert len(read_jsonl(run_folder / "blind" / "pairs.jsonl")) == 12
    assert {path.name for path in (run_folder / "blind").iterdir()} == {"page.html", "pairs.jsonl"}


DOM = """
const listeners = {}, elements = {};
const element = (id) => elements[id] ??= { id, value: "ann ", textContent: "", dataset: {}, addEventListener() {} };
globalThis.document = {
  getElementById: element, querySelectorAll: () => [], addEventListener: (name, f) => { listeners[name] = f; },
};
globalThis.localStorage = { getItem: () => null, setItem() {} };
element("pairs").textContent = PAIRS;
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="no node on this machine: the script was not run")
def test_the_keyboard_rates_pairs_and_the_download_has_the_choices(run_folder: Path) -> None:
    main(["blind", str(run_folder), "--pairs", "3"])
    page = (run_folder / "blind" / "page.html").read_text("utf-8")
    pairs = re.findall(r'<script type="application/json" id="pairs">(.*?)</script>', page, re.DOTALL)[0]
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)[-1]
    keys = "".join(
        f'listeners.keydown({{ key: "{key}", target: {{ tagName: "BODY" }}, preventDefault() {{}} }});'
        for key in ("a", "t", "Backspace", "b", "x", "ArrowRight")
    )
    source = f"{DOM.replace('PAIRS', json.dumps(pairs))}{script}\n{keys}\nprocess.stdout.write(ratingLines());"
    result = subprocess.run(["node", "-e", source], capture_output=True, text=True, timeout=30, check=True)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {row["page"] for row in rows} == {read_jsonl(run_folder / KEY_FILE)[0]["page"]}
    # Pair 2 was a tie, then back and changed to b; x does nothing.
    assert [(row["pair"], row["choice"], row["rater"]) for row in rows] == [
        (1, "a", "ann"), (2, "b", "ann"), (3, "b", "ann"),
    ]  # fmt: skip


def test_the_result_is_the_exact_sign_test() -> None:
    _, key = build_pairs(make_answers(), 30, seed=3)
    result = score_ratings(key, rate_as(key, ["aligned"] * 19 + ["base"] * 6 + ["tie"] * 5))
    test = stats.binomtest(19, 25)
    interval = test.proportion_ci(method="exact")
    assert (result["aligned"], result["base"], result["ties"], result["pairs"]) == (19, 6, 5, 30)
    assert result["share"] == pytest.approx({"mean": 19 / 25, "low": interval.low, "high": interval.high})
    assert (result["p"], result["preferred"]) == (pytest.approx(test.pvalue), "aligned")
    assert sum(sum(counts.values()) for counts in result["by_topic"].values()) == 30
    assert set(result["by_topic"]) == {"facts", "advice"}
    assert score_ratings(key, rate_as(key, ["tie"] * 4))["share"] is None
    assert score_ratings(key, rate_as(key, ["aligned"] * 14 + ["base"] * 11))["preferred"] is None


def test_of_several_raters_of_a_pair_the_most_votes_count() -> None:
    _, key = build_pairs(make_answers(), 4, seed=3)
    ratings = [
        *rate_as(key, ["aligned", "aligned", "tie", "base"], "ann"),
        *rate_as(key, ["aligned", "base", "tie", "base"], "bob"),
        *rate_as(key, ["base", "tie", "aligned", "tie"], "cy"),
    ]
    result = score_ratings(key, ratings)
    assert (result["aligned"], result["base"], result["ties"], result["raters"]) == (1, 1, 2, 3)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"pair": 99, "choice": "a"}], "a pair of 1 to 2"),
        ([{"pair": True, "choice": "a"}], "a pair of 1 to 2"),
        ([[1, 2]], "a pair of 1 to 2"),
        ([{"pair": 1}], "a choice of a, b or tie"),
        ([{"pair": 1, "choice": "a", "rater": ["x"]}], "the rater's name as text"),
        ([{"pair": 1, "choice": "left"}], "a choice of a, b or tie"),
        ([{"pair": 1, "choice": "a"}] * 2, "pair 1 was rated twice"),
        ([], "have no ratings"),
    ],
)
def test_invalid_ratings_are_refused(rows: list[dict[str, Any]], message: str) -> None:
    _, key = build_pairs(make_answers(), 2, seed=3)
    with pytest.raises(DataError, match=message):
        score_ratings(key, rows)


def test_readers_who_prefer_the_base_fail_the_gates(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["blind", str(run_folder)])
    key, ratings = read_jsonl(run_folder / KEY_FILE), run_folder / "ratings.jsonl"
    write_jsonl(ratings, rate_as(key, ["base"] * 24 + ["aligned"] * 4 + ["tie"] * 2))
    capsys.readouterr()
    assert main(["blind", str(run_folder), "--ratings", str(ratings)]) == 0
    assert capsys.readouterr().out == (
        "blind readers preferred aligned in 4 of 28 decided pairs (14%, 4% to 33%), 2 ties\n"
    )
    summary = read_json(run_folder / "summary.json")
    assert (summary["gates"]["verdict"], summary["gates"]["reasons"]) == ("fail", ["blind readers prefer the base"])
    assert "blind readers preferred aligned in 4 of 28" in report_headline(summary)
    page = (run_folder / "report.html").read_text("utf-8")
    assert "Blind reading" in page and "14%, 4% to 33%" in page
    # Better readers of the same run: the verdict is decided again, not kept.
    write_jsonl(ratings, rate_as(key, ["aligned"] * 24 + ["base"] * 6))
    main(["blind", str(run_folder), "--ratings", str(ratings)])
    assert read_json(run_folder / "summary.json")["gates"]["verdict"] == "pass"


def test_readers_who_see_no_difference_do_not_let_the_gates_pass(run_folder: Path) -> None:
    main(["blind", str(run_folder)])
    key, ratings = read_jsonl(run_folder / KEY_FILE), run_folder / "ratings.jsonl"
    write_jsonl(ratings, rate_as(key, ["base"] * 8 + ["aligned"] * 9 + ["tie"] * 13))
    main(["blind", str(run_folder), "--ratings", str(ratings)])
    summary = read_json(run_folder / "summary.json")
    assert (summary["gates"]["measured_verdict"], summary["gates"]["verdict"]) == ("pass", "undecided")
    assert report_headline(summary).startswith("Undecided: blind readers preferred aligned in 9 of 17 decided pairs")


def test_ratings_of_a_replaced_page_are_refused(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["blind", str(run_folder), "--seed", "1"])
    pairs, ratings = read_jsonl(run_folder / "blind" / "pairs.jsonl"), run_folder / "ratings.jsonl"
    write_jsonl(ratings, [{"page": pair["page"], "pair": pair["pair"], "choice": "a"} for pair in pairs])
    assert main(["blind", str(run_folder), "--ratings", str(ratings)]) == 0
    before = (run_folder / "summary.json").read_bytes()
    main(["blind", str(run_folder), "--seed", "2"])
    without_page = run_folder / "without_page.jsonl"
    write_jsonl(without_page, [{"pair": pair["pair"], "choice": "a"} for pair in pairs])
    for path in (ratings, without_page):
        with pytest.raises(SystemExit) as exit_info:
            main(["blind", str(run_folder), "--ratings", str(path)])
        assert exit_info.value.code == DataError.exit_code
        assert "so its pair may be another one" in capsys.readouterr().err
    assert (run_folder / "summary.json").read_bytes() == before
    # The same draw is the same page.
    main(["blind", str(run_folder), "--seed", "1"])
    assert main(["blind", str(run_folder), "--ratings", str(ratings)]) == 0


def test_a_partial_reading_does_not_pass(run_folder: Path) -> None:
    main(["blind", str(run_folder), "--pairs", "20"])
    key, ratings = read_jsonl(run_folder / KEY_FILE), run_folder / "ratings.jsonl"
    write_jsonl(ratings, rate_as(key, ["aligned"] * 8))
    main(["blind", str(run_folder), "--ratings", str(ratings)])
    gates = read_json(run_folder / "summary.json")["gates"]
    assert (gates["verdict"], gates["reasons"]) == ("undecided", ["only 8 of 20 pairs to read blind are rated"])


def test_the_model_card_gets_the_verdict_of_the_readers(run_folder: Path) -> None:
    (run_folder / "policy").mkdir()
    write_json(run_folder / "config.json", {"name": "quickstart", "model": {"path": "org/model"}})
    main(["blind", str(run_folder)])
    key, ratings = read_jsonl(run_folder / KEY_FILE), run_folder / "ratings.jsonl"
    write_jsonl(ratings, rate_as(key, ["base"] * len(key)))
    main(["blind", str(run_folder), "--ratings", str(ratings)])
    assert "Fail: blind readers preferred aligned in 0 of 30" in (run_folder / "policy" / "README.md").read_text(
        "utf-8"
    )


def test_missing_files_are_named(tmp_path: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([str(tmp_path / "none")], "has no answers.jsonl"),
        ([str(run_folder), "--ratings", "none.jsonl"], f"has no {KEY_FILE}"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            main(["blind", *arguments])
        assert exit_info.value.code == DataError.exit_code
        assert message in capsys.readouterr().err
