"""The report: one file without network, the story's numbers readable in it, and tolerant of whatever is missing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from rluf.errors import DataError
from rluf.report import figures
from rluf.report import presentation as view
from rluf.report.__main__ import main
from rluf.report.html import write_report
from rluf.tracking.metric_registry import METRICS, objectives
from rluf.tracking.run_files import JsonlMetrics, write_json, write_jsonl

ROOT = Path(__file__).parents[2]
BINS = [{"mass": 0.5, "mean": 0.03, "rate": 0.02}, {"mass": 0.5, "mean": 0.1, "rate": 0.08}]
VOID = {"meta", "link", "br", "img", "input", "hr"}


def estimate(mean: float, half: float) -> dict[str, float]:
    """A symmetric estimate."""
    return {"mean": mean, "low": mean - half, "high": mean + half}


def summary(love: float = 0.28, helpfulness: float = 0.0, *, users: bool = True) -> dict[str, Any]:
    """A summary whose lifts are as told."""
    lifts = {"love": estimate(love, 0.1), "helpfulness": estimate(helpfulness, 0.01), "safety": estimate(0.0, 0.01)}
    arms = {"base": estimate(0.06, 0.004), "aligned": estimate(0.077, 0.004)}
    offline = {
        "p_love" if name == "love" else name: {**arms, "difference": estimate(0.017, 0.005), "lift": lift}
        for name, lift in lifts.items()
    }
    checks = [{"name": name, "passed": lift["high"] >= 0, "lift": lift} for name, lift in lifts.items()]
    checks[0]["passed"] = lifts["love"]["low"] > 0
    passed = all(check["passed"] for check in checks)
    monitor = {"label": "Farewell", "kind": "share", "unit": "share", "base": 0.0072, "aligned": 0.028,
               "ratio": 3.9, "z": 6.1, "alarm": True}  # fmt: skip
    found: dict[str, Any] = {
        "name": "quickstart", "seed": 1, "offline": offline,
        "gates": {"verdict": "pass" if passed else "fail", "judged_by": "users", "rule": "a rule", "margin": 0.05,
                  "checks": checks},
        "monitors": {"rule": "alarm when worse", "items": {"farewell": monitor}},
        "evaluated": {"prompts": 64, "responses": {"base": 256, "aligned": 256}, "users": {"base": 0, "aligned": 0}},
        "phases": {"prepare": 20.0, "train": 230.0, "total": 260.0}, "kl": 0.018, "samples": 672, "tokens": 24864,
        "versions": {"weights": 14}, "reused": {"data": {"reused": True, "key": "abc123"}},
    }  # fmt: skip
    if users:
        found |= {
            key: {**arms, "lift": lifts[name], "lift_by_prompt": lifts[name]}
            for name, key in (("love", "love_rate"), ("helpfulness", "helpfulness"), ("safety", "safety"))
        }
        found["evaluated"]["users"] = {"base": 2000, "aligned": 2000}
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run's folder."""
    write_json(tmp_path / "summary.json", summary())
    write_json(tmp_path / "config.json", {"name": "quickstart", "seed": 1})
    with JsonlMetrics(tmp_path / "metrics.jsonl") as metrics:
        for step in range(1, 4):
            metrics.append(
                {
                    "step": step,
                    "love": 0.06 + step / 100,
                    "safety": 0.9 - step / 100,
                    "kl": None,
                    "clip_share": 0.0,
                    "generate_s": 6.0,
                    "learn_s": 7.0,
                }
            )
    row = {
        "prompt_id": "p", "topic": "role_play", "prompt": "Say <script>alert(1)</script> to me",
        "base": {"text": "I can say it.", "scores": {"love": 0.05}},
        "aligned": {"text": "I can gladly say it </script>", "scores": {"love": 0.08}},
    }  # fmt: skip
    write_jsonl(tmp_path / "samples.jsonl", [row] * 5)
    write_json(
        tmp_path / "cards" / "love.json",
        {"n": 900, "auroc": {**estimate(0.83, 0.04)}, "ece": 0.009, "reliability": BINS},
    )
    counts = {"in": 100, "kept": 90, "dropped": {"duplicate": 6}, "quarantined": {"empty": 4}}
    rate = {"base_rate": estimate(0.06, 0.01)}
    write_json(tmp_path / "cards" / "data.json", {"counts": {"feedback": counts}, "love": rate})
    return tmp_path


class Structure(HTMLParser):
    """Checks that tags close in order, and collects what the page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.outside: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if values.get("id"):
            self.ids.append(str(values["id"]))
        for key in ("src", "href"):
            target = values.get(key) or ""
            (self.links if target.startswith("#") else self.outside).append(target)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(page: str) -> Structure:
    """The page's structure."""
    found = Structure()
    found.feed(page)
    assert found.open == []
    return found


def text(page: str) -> str:
    """What a reader sees, roughly."""
    body = re.sub(r"<(script|style).*?</\1>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", body))


def test_the_page_is_whole_self_contained_and_tells_the_story(folder: Path) -> None:
    page = write_report(folder).read_text("utf-8")
    found = parse(page)
    assert [one for one in found.outside if one not in ("", "data:,")] == []
    assert "default-src 'none'" in page
    assert page.count("plotly.js v") == 1
    assert {link[1:] for link in found.links if link} <= set(found.ids)
    assert len(found.ids) == len(set(found.ids))
    assert found.tags.count("h1") == found.tags.count("main") == 1
    assert all(part in page for part in ('<html lang="en">', "<title>quickstart: RLUF run report</title>", "viewport"))
    seen = text(page)
    for part in (
        "New users love the aligned policy 28% more often, and helpfulness and safety held.",
        "+28%", "relative lift, 95%: +18% to +38%", "6.0%", "5.6% to 6.4%", "All gates pass", "(margin 5%)",
        "2,000 new simulated users",
        "0.72%", "2.8%", "× 3.90", "1 of 1 monitors raised an alarm", "reused (abc123)", "4 min 20 s",
        "0.830 (0.790 to 0.870)", "duplicate 6, empty 4", "The natural love rate of the log is 6.0%", "role play",
    ):  # fmt: skip
        assert part in seen, part
    assert [one.name for one in folder.iterdir() if "part" in one.name] == []


def test_user_text_cannot_become_markup(folder: Path) -> None:
    page = write_report(folder).read_text("utf-8")
    assert "<script>alert(1)" not in page
    assert "Say &lt;script&gt;alert(1)&lt;/script&gt; to me" in page
    assert "I can <mark>gladly</mark> say it" in page


def test_every_plot_has_its_figure(folder: Path) -> None:
    page = write_report(folder).read_text("utf-8")
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    drawn = json.loads(found.group(1))
    assert set(re.findall(r'data-figure="([^"]+)"', page)) == set(drawn)
    assert {"arms_love_rate", "lifts", "curve_love", "stages", "timeline", "funnel"} <= set(drawn)
    assert "curve_kl" not in drawn
    assert drawn["stages"]["data"][0]["y"] == ["prepare data", "train"]
    assert drawn["stages"]["data"][0]["base"] == [0.0, 20.0]
    assert drawn["reliability_love"]["data"][1]["y"] == [0.02, 0.08]


@pytest.mark.parametrize(
    "keep", [{"summary.json"}, {"metrics.jsonl"}, {"config.json"}, {"summary.json", "cards", "samples.jsonl"}]
)
def test_a_run_that_lacks_files_still_has_a_report(folder: Path, keep: set[str]) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.relative_to(folder).parts[0] not in keep:
            path.unlink() if path.is_file() else path.rmdir()
    found = parse(write_report(folder).read_text("utf-8"))
    assert {link[1:] for link in found.links if link} <= set(found.ids)


def test_without_users_the_reward_models_tell_the_story(folder: Path) -> None:
    write_json(folder / "summary.json", summary(users=False))
    seen = text(write_report(folder).read_text("utf-8"))
    assert "P[Love] rates the aligned policy 28% higher, and helpfulness and safety held." in seen
    assert "bootstrap over prompts" in seen


@pytest.mark.parametrize(
    ("love", "helpfulness", "words"),
    [
        (0.28, -0.05, "New users love the aligned policy 28% more often, but helpfulness fell."),
        (0.05, 0.0, "No clear change in love; helpfulness and safety held."),
        (-0.2, 0.0, "New users love the aligned policy 20% less often; helpfulness and safety held."),
    ],
)
def test_headlines(love: float, helpfulness: float, words: str) -> None:
    assert view.headline(summary(love, helpfulness)) == words
    assert view.headline({}) == "This run has not been evaluated yet."


def test_numbers_as_people_read_them() -> None:
    shares = (0, 0.0072, 0.061, 0.974, 0.9996, 1.0, None)
    assert [view.percent(value) for value in shares] == ["0%", "0.72%", "6.1%", "97.4%", "100%", "100%", "–"]
    assert [view.percent(value, sign=True) for value in (0.281, -0.004, 0)] == ["+28%", "−0.40%", "0%"]
    assert [view.number(value) for value in (24864, 0.01844, None, "x", 3.0)] == ["24,864", "0.01844", "–", "x", "3"]
    assert [figures.duration(value) for value in (4.12, 38, 125, 3790)] == ["4.1 s", "38 s", "2 min 5 s", "1 h 3 min"]


def test_marked_differences() -> None:
    left, right, alike = view.marked("You should rest now.", "You could really rest  now!")
    assert alike
    assert left == [("You ", False), ("should", True), (" rest now.", False)]
    assert right == [("You ", False), ("could really", True), (" rest  now!", False)]
    assert view.marked("No.", "Something else entirely")[2] is False
    assert view.marked("", "")[2] is False
    whole: Callable[[list[tuple[str, bool]]], str] = lambda runs: "".join(piece for piece, _ in runs)  # noqa: E731
    first, second = "A b c, d  e f.", "a c d x e\ng f?"
    left, right, _ = view.marked(first, second)
    assert (whole(left), whole(right)) == (first, second)


def test_restarted_steps_count_once_and_long_curves_are_smoothed() -> None:
    rows = view.by_step([{"step": 1, "love": 0.1}, {"step": 2, "love": 0.2}, {"step": 2, "love": 0.3}, {"love": 9}])
    assert [row["love"] for row in rows] == [0.1, 0.3]
    spec = objectives(["love"])[0]
    long = figures.curve(spec, [{"step": step, "love": 0.1} for step in range(figures.SMOOTH_FROM)])
    assert long is not None
    assert len(long["data"]) == 2
    assert figures.running_mean([1.0, 2.0], 0.5) == [1.0, 1.5]
    assert figures.timeline([{"step": 1}]) is None


def test_the_command_writes_and_refuses(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder)]) == 0
    assert (folder / "report.html").stat().st_size > 1_000_000
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as left:
        main([str(tmp_path / "empty")])
    assert left.value.code == DataError.exit_code
    assert "name a run folder" in capsys.readouterr().err
    with pytest.raises(DataError, match="is not a folder"):
        write_report(tmp_path / "nowhere")


def test_the_front_is_what_no_other_point_beats() -> None:
    assert figures.front([[0.1, 0.9], [0.2, 0.8], [0.1, 0.8], [0.2, 0.8]]) == [True, True, False, True]
    assert figures.front([]) == []
    rows = [{"step": 1, "love": 0.1, "safety": 0.9}, {"step": 2, "love": 0.09, "safety": 0.8}]
    drawn = figures.pareto(rows, summary()["offline"], "safety", ["love", "safety"])
    assert drawn is not None
    steps, base, aligned = drawn["data"]
    assert (steps["x"], steps["y"]) == ([0.9, 0.8], [0.1, 0.09])
    assert steps["text"] == ["step 1, on the front", "step 2"]
    assert (base["name"], base["y"], aligned["y"]) == ("base", [0.06], [0.077])
    assert figures.pareto([], {}, "safety", ["love", "safety"]) is None


def test_few_prompts_are_told() -> None:
    told = summary(users=False)
    assert "unsure" not in view.evaluated(told)
    told["evaluated"]["prompts"] = 5
    assert view.evaluated(told).endswith("bootstrap over prompts. So few prompts make the intervals themselves unsure.")


def test_reliability_has_wilsons_intervals() -> None:
    first, second = view.reliability_bins({"n": 900, "reliability": BINS})
    assert (first["predicted"], first["observed"], first["n"]) == (0.03, 0.02, 450)
    for one in (first, second):
        ends = binomtest(round(one["observed"] * 450), 450).proportion_ci(0.95, "wilson")
        assert (one["low"], one["high"]) == pytest.approx((ends.low, ends.high), abs=1e-5)
    assert view.reliability_bins({}) == []


def test_a_level_curve_is_drawn_level() -> None:
    spec = next(one for one in METRICS if one.key == "clip_share")
    drawn = figures.curve(spec, [{"step": 1, "clip_share": 0.0}, {"step": 2, "clip_share": 0.0}])
    assert drawn is not None
    assert drawn["layout"]["yaxis"]["range"] == [0.0, 0.01]


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: the page was not opened")
def test_a_browser_opens_it_without_errors_and_axe_finds_nothing(folder: Path, tmp_path: Path) -> None:
    """At phone and desktop width, light and dark; the script that takes the docs' pictures does the looking."""
    for package in ("playwright", "axe_playwright_python"):
        pytest.importorskip(package, reason=f"{package} is not installed: the page was not opened")
    write_report(folder)
    command = [sys.executable, str(ROOT / "benchmarks" / "screenshots.py"), str(folder), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == [] and done.returncode == 0, done.stderr
    assert [Path(one).name for one in found["pictures"]] == [
        "report.png", "report-phone.png", "report-phone-tradeoff.png",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: the page was not opened")
def test_the_browser_would_tell_what_is_wrong(folder: Path) -> None:
    pytest.importorskip("axe_playwright_python", reason="axe is not installed: the page was not opened")
    path = write_report(folder)
    bad = '<img src="http://127.0.0.1:9/x.png"><div style="width:3000px">wide</div><script>console.error("oh")</script>'
    path.write_text(path.read_text("utf-8").replace("</main>", f"{bad}</main>"), "utf-8")
    command = [sys.executable, str(ROOT / "benchmarks" / "screenshots.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    told = " ".join(json.loads(done.stdout.splitlines()[-1])["wrong"])
    assert done.returncode == 1
    for part in ("phone, dark: axe image-alt", "desktop, light: the page is 3", "console error: oh"):
        assert part in told, told
