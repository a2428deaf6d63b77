"""The report: one self-contained file with readable results, tolerant of missing run files."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from rluf.errors import DataError
from rluf.report import figures, formats, headline, presentation
from rluf.report.__main__ import main
from rluf.report.html import write_report
from rluf.tracking.metric_registry import STEP_METRICS, build_objective_metrics
from rluf.tracking.run_files import write_answers
from rluf.types import ANSWERS_FILE, PolicyAnswer
from rluf.utils.files import JsonlWriter, write_json

ROOT = Path(__file__).parents[2]
BINS = [{"mass": 0.5, "mean": 0.03, "rate": 0.02}, {"mass": 0.5, "mean": 0.1, "rate": 0.08}]
UNREAD = "no person has read the responses"
LOVE = "new simulated users love the aligned policy 28% more often"
SAFE = "simulated safety did not fall by 5%"
VOID_TAGS = {"meta", "link", "br", "img", "input", "hr"}


def make_estimate(mean: float, half_width: float) -> dict[str, float]:
    """A symmetric interval."""
    return {"mean": mean, "low": mean - half_width, "high": mean + half_width}


def make_summary(love: float = 0.28, helpfulness: float = 0.0, *, has_users: bool = True) -> dict[str, Any]:
    """A run summary with these relative lifts."""
    lifts = {
        "love": make_estimate(love, 0.1),
        "helpfulness": make_estimate(helpfulness, 0.01),
        "safety": make_estimate(0.0, 0.01),
    }
    arms = {"base": make_estimate(0.06, 0.004), "aligned": make_estimate(0.077, 0.004)}
    offline = {
        "p_love" if name == "love" else name: {**arms, "difference": make_estimate(0.017, 0.005), "lift": lift}
        for name, lift in lifts.items()
    }
    checks = [
        {
            "name": name,
            "status": "pass" if lift["low"] > limit else "fail" if lift["high"] < limit else "undecided",
            "limit": limit,
            "judged_by": "simulated users" if has_users else "reward models",
            "lift": lift,
        }
        for (name, lift), limit in zip(lifts.items(), (0.0, -0.05, -0.05), strict=True)
    ]
    statuses = {check["status"] for check in checks}
    verdict = next((status for status in ("fail", "undecided") if status in statuses), "pass")
    reasons = [f"{check['name']} {check['status']}" for check in checks if check["status"] != "pass"] or [UNREAD]
    monitor = {"label": "Farewell", "kind": "share", "unit": "share", "base": 0.0072, "aligned": 0.028,
               "ratio": 3.9, "z": 6.1, "alarm": True}  # fmt: skip
    summary: dict[str, Any] = {
        "name": "quickstart", "seed": 1, "offline": offline,
        "gates": {"verdict": verdict.replace("pass", "undecided"), "measured_verdict": verdict, "judged_by": "users",
                  "rule": "a rule", "margin": 0.05, "checks": checks,
                  "alarms": [], "reasons": reasons},
        "monitors": {"rule": "alarm when worse", "items": {"farewell": monitor}},
        "arms": {arm: {"prompts": 64, "responses": 256, "users": 2000 if has_users else 0, "tokens": 31.5,
                       "truncated_share": 0.04, "entropy": 2.1} for arm in ("base", "aligned")},
        "phases": {"prepare": 20.0, "train": 230.0, "total": 260.0}, "kl": 0.018, "samples": 672, "tokens": 24864,
        "versions": {"weights": 14}, "reused": {"data": {"reused": True, "key": "abc123"}},
    }  # fmt: skip
    if has_users:
        summary |= {
            key: {**arms, "lift": lifts[name]}
            for name, key in (("love", "love_rate"), ("helpfulness", "helpfulness"), ("safety", "safety"))
        }
    return summary


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Folder of a finished run."""
    write_json(tmp_path / "summary.json", make_summary())
    write_json(tmp_path / "config.json", {"name": "quickstart", "seed": 1})
    with JsonlWriter(tmp_path / "metrics.jsonl") as metrics:
        for step in range(1, 4):
            metrics.append_row(
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
    prompt = ({"role": "user", "content": "Say <script>alert(1)</script> to me"},)
    write_answers(tmp_path, [
        PolicyAnswer(arm, f"p{index}", "role_play", prompt, text, "stop", 8, {"love": score})
        for arm, text, score in (("base", "I can say it.", 0.05), ("aligned", "I can gladly say it </script>", 0.08))
        for index in range(5)
    ])  # fmt: skip
    write_json(
        tmp_path / "cards" / "love.json",
        {"n": 900, "auroc": {**make_estimate(0.83, 0.04)}, "ece": 0.009, "reliability": BINS},
    )
    counts = {"in": 100, "kept": 90, "dropped": {"duplicate": 6}, "quarantined": {"empty": 4}}
    love_statistics = {"base_rate": make_estimate(0.06, 0.01)}
    write_json(tmp_path / "cards" / "data.json", {"counts": {"feedback": counts}, "love": love_statistics})
    return tmp_path


class PageStructure(HTMLParser):
    """Checks that tags close in order and collects ids, links and external references."""

    def __init__(self) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.ids: list[str] = []
        self.external_references: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        if tag not in VOID_TAGS:
            self.open_tags.append(tag)
        if values.get("id"):
            self.ids.append(str(values["id"]))
        for key in ("src", "href"):
            target = values.get(key) or ""
            (self.links if target.startswith("#") else self.external_references).append(target)

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag


def parse_page(page: str) -> PageStructure:
    """Parse the structure of a page."""
    structure = PageStructure()
    structure.feed(page)
    assert structure.open_tags == []
    return structure


def extract_text(page: str) -> str:
    """The visible text of a page, approximately."""
    body = re.sub(r"<(script|style).*?</\1>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", body))


def test_the_page_is_self_contained_and_shows_the_results(run_folder: Path) -> None:
    page = write_report(run_folder).read_text("utf-8")
    structure = parse_page(page)
    assert [reference for reference in structure.external_references if reference not in ("", "data:,")] == []
    assert "default-src 'none'" in page
    assert page.count("plotly.js v") == 1
    assert {link[1:] for link in structure.links if link} <= set(structure.ids)
    assert len(structure.ids) == len(set(structure.ids))
    assert structure.tags.count("h1") == structure.tags.count("main") == 1
    assert all(
        expected_text in page
        for expected_text in ('<html lang="en">', "<title>quickstart: RLUF run report</title>", "viewport")
    )
    page_text = extract_text(page)
    for expected_text in (
        f"Undecided: {UNREAD}; {LOVE}; simulated helpfulness and safety did not fall by 5%.",
        "+28%", "relative lift, 95%: +18% to +38%", "6.0%", "5.6% to 6.4%", f"? Undecided: {UNREAD}", "4.0%",
        "2,000 new simulated users per arm", "clustered by user and prompt",
        "0.72%", "2.8%", "× 3.90", "1 of 1 monitors raised an alarm: Farewell.", "reused (abc123)", "4 min 20 s",
        "rate the pairs of blind/page.html in the run folder",
        "0.830 (0.790 to 0.870)", "duplicate 6, empty 4", "The natural love rate of the log is 6.0%", "role play",
    ):  # fmt: skip
        assert expected_text in page_text, expected_text
    assert [path.name for path in run_folder.iterdir() if "part" in path.name] == []


def test_user_text_cannot_become_markup(run_folder: Path) -> None:
    page = write_report(run_folder).read_text("utf-8")
    assert "<script>alert(1)" not in page
    assert "Say &lt;script&gt;alert(1)&lt;/script&gt; to me" in page
    assert "I can <mark>gladly</mark> say it" in page


def test_every_plot_has_its_figure(run_folder: Path) -> None:
    page = write_report(run_folder).read_text("utf-8")
    match = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    figures_by_id = json.loads(match.group(1))
    assert set(re.findall(r'data-figure="([^"]+)"', page)) == set(figures_by_id)
    assert {"arms_love_rate", "lifts", "curve_love", "job_phases", "step_phases", "funnel"} <= set(figures_by_id)
    assert "curve_kl" not in figures_by_id
    assert figures_by_id["job_phases"]["data"][0]["y"] == ["prepare data", "train policy"]
    assert figures_by_id["job_phases"]["data"][0]["base"] == [0.0, 20.0]
    assert figures_by_id["reliability_love"]["data"][1]["y"] == [0.02, 0.08]


@pytest.mark.parametrize(
    "kept_names", [{"summary.json"}, {"metrics.jsonl"}, {"config.json"}, {"summary.json", "cards", ANSWERS_FILE}]
)
def test_a_run_with_missing_files_has_a_report(run_folder: Path, kept_names: set[str]) -> None:
    for path in sorted(run_folder.rglob("*"), reverse=True):
        if path.relative_to(run_folder).parts[0] not in kept_names:
            path.unlink() if path.is_file() else path.rmdir()
    structure = parse_page(write_report(run_folder).read_text("utf-8"))
    assert {link[1:] for link in structure.links if link} <= set(structure.ids)


def test_without_users_the_results_are_those_of_the_reward_models(run_folder: Path) -> None:
    write_json(run_folder / "summary.json", make_summary(has_users=False))
    page_text = extract_text(write_report(run_folder).read_text("utf-8"))
    headline_text = (
        f"Undecided: {UNREAD}; P[Love] rates the aligned policy 28% higher; the helpfulness and safety scores did "
        "not fall by 5%."
    )
    assert headline_text in page_text
    assert "clustered by prompt" in page_text


@pytest.mark.parametrize(
    ("love", "helpfulness", "text"),
    [
        (0.28, -0.2, f"Fail: {LOVE}; simulated helpfulness fell by more than 5%; {SAFE}."),
        (0.28, -0.05, f"Undecided: {LOVE}; simulated helpfulness is undecided; {SAFE}."),
        (0.28, -0.03, f"Undecided: {UNREAD}; {LOVE}; simulated helpfulness fell, by less than 5%; {SAFE}."),
        (0.05, 0.02, f"Undecided: no clear change in simulated love; simulated helpfulness rose; {SAFE}."),
        (-0.2, 0.02, "Fail: new simulated users love the aligned policy 20% less often; simulated helpfulness rose; "
                     f"{SAFE}."),
    ],
)  # fmt: skip
def test_the_headline_follows_the_gate_and_claims_nothing_undecided(love: float, helpfulness: float, text: str) -> None:
    assert headline.report_headline(make_summary(love, helpfulness)) == text
    assert headline.report_headline({}) == "This run has not been evaluated yet."


@pytest.mark.parametrize(
    ("low", "high", "status", "text"),
    [
        (-0.08, -0.01, "undecided", "Undecided: simulated love is undecided."),
        (-0.08, 0.03, "undecided", "Undecided: simulated love is undecided."),
        (-0.04, 0.03, "pass", f"Undecided: {UNREAD}; simulated love did not fall by 5%."),
        (-0.04, -0.01, "pass", f"Undecided: {UNREAD}; simulated love fell, by less than 5%."),
        (-0.3, -0.1, "fail", "Fail: simulated love fell by more than 5%."),
        (0.1, 0.3, "pass", f"Undecided: {UNREAD}; simulated love rose."),
    ],
)
def test_the_headline_follows_the_gate_of_love_that_has_to_hold(
    low: float, high: float, status: str, text: str
) -> None:
    summary = make_summary()
    lift = {"mean": (low + high) / 2, "low": low, "high": high}
    check = {**summary["gates"]["checks"][0], "gate": "must_hold", "status": status, "limit": -0.05, "lift": lift}
    summary["gates"] |= {"verdict": status.replace("pass", "undecided"), "measured_verdict": status, "checks": [check]}
    assert headline.report_headline(summary) == text


def test_only_a_blind_reading_makes_a_pass() -> None:
    summary = make_summary(0.28)
    blind = {"pairs": 30, "aligned": 20, "base": 5, "ties": 5, "share": {"mean": 0.8, "low": 0.59, "high": 0.93}}
    summary |= {"blind": blind, "gates": {**summary["gates"], "verdict": "pass", "reasons": []}}
    assert headline.report_headline(summary).startswith(
        f"Pass: blind readers preferred aligned in 20 of 25 decided pairs (80%, 59% to 93%), 5 ties; {LOVE}"
    )
    assert headline.format_verdict(summary["gates"]) == "✓ All gates pass"
    # A release before this rule passed without a reading.
    del summary["blind"], summary["gates"]["measured_verdict"]
    assert headline.report_headline(summary).startswith(f"Undecided: {UNREAD}; {LOVE}")


def test_the_headline_names_alarms_and_truncation() -> None:
    summary = make_summary()
    summary["gates"] |= {
        "verdict": "fail",
        "measured_verdict": "fail",
        "alarms": ["farewell"],
        "alarm_labels": ["Farewell"],
        "truncated_share": 0.46,
        "reasons": ["monitor alarm: farewell", "46% of the aligned responses are cut at the token limit"],
    }
    assert headline.report_headline(summary).startswith(
        "Fail: monitor alarm: Farewell; 46% of the aligned responses are cut at the token limit; new simulated users "
    )
    assert headline.format_verdict(summary["gates"]) == (
        "✕ Fail: monitor alarm: farewell; 46% of the aligned responses are cut at the token limit"
    )


@pytest.mark.parametrize(
    ("labels", "clause"),
    [
        ([], ""),
        (["Farewell"], "monitor alarm: Farewell; "),
        (["Farewell", "Refusal"], "monitor alarms: Farewell, Refusal; "),
        (["Farewell", "Refusal", "Length"], "3 monitors raised an alarm; "),
        ([f"Monitor {index}" for index in range(12)], "12 monitors raised an alarm; "),
    ],
)
def test_a_headline_names_few_alarms_and_counts_many(labels: list[str], clause: str) -> None:
    summary = make_summary()
    summary["gates"] |= dict.fromkeys(("verdict", "measured_verdict"), "fail") | dict.fromkeys(
        ("alarms", "alarm_labels"), labels
    )
    assert headline.report_headline(summary).startswith(f"Fail: {clause}{LOVE}")


@pytest.mark.parametrize(
    ("worse", "z", "p", "text"),
    [
        ("down", 14.2, 1.0, "not worse"),  # a one-sided p of 1 next to a large z would read as a contradiction
        ("up", -2.9, 1.0, "not worse"),
        ("up", 6.9, 0.002, "0.002"),
        ("down", -10.4, 0.002, "0.002"),
        ("up", 0.0, 1.0, "1.000"),
        (None, 14.2, 1.0, "1.000"),
    ],
)
def test_a_monitor_that_changed_in_the_good_direction_says_so(worse: str | None, z: float, p: float, text: str) -> None:
    monitor = {"label": "Ends with a question", "kind": "share", "base": 0.05, "aligned": 0.5, "z": z, "p": p}
    summary = {"monitors": {"items": {"question_ending": monitor | {"alarm": False, "worse": worse}}}}
    assert presentation.monitor_rows(summary)[0]["p"] == text


@pytest.mark.parametrize(
    ("card", "sentence"),
    [
        (
            {"auroc": {"low": 0.59}, "length_only_auroc": 0.56, "normalized_entropy": 1.03},
            "P[Love] ranks responses better than length alone; its probabilities predict no better than the base rate, "
            "so read its order, not its values.",
        ),
        (
            {"auroc": {"low": 0.59}, "length_only_auroc": {"mean": 0.4}, "normalized_entropy": 0.9},
            "P[Love] ranks responses better than chance, and its probabilities predict better than the base rate.",
        ),
        ({"pair_accuracy": {"low": 0.48}}, "P[Love] ranks responses not clearly better than chance."),
        (
            {"pair_accuracy": {"low": 0.55}, "length_only_accuracy": 0.6},
            "P[Love] ranks responses not clearly better than length alone.",
        ),
        ({"auroc": {"mean": 0.6, "low": None}}, None),
        ({}, None),
    ],
)
def test_the_report_says_whether_a_reward_model_can_be_trusted(card: dict[str, Any], sentence: str | None) -> None:
    assert presentation.format_trust_sentences({"love": card}) == ([sentence] if sentence else [])


def test_gates_of_earlier_releases_prove_nothing() -> None:
    summary = make_summary()
    for check in summary["gates"]["checks"]:
        del check["status"]
        check["passed"] = True
    summary["gates"]["verdict"] = "warn"
    del summary["gates"]["measured_verdict"]
    assert "simulated helpfulness and safety are undecided" in headline.report_headline(summary)
    assert headline.read_gates(summary)["verdict"] == "fail"


def test_number_formats() -> None:
    shares = (0, 0.0072, 0.061, 0.974, 0.9996, 1.0, None)
    assert [formats.format_percent(value) for value in shares] == [
        "0%",
        "0.72%",
        "6.1%",
        "97.4%",
        "100%",
        "100%",
        "–",
    ]
    assert [formats.format_percent(value, with_sign=True) for value in (0.281, -0.004, 0)] == [
        "+28%",
        "−0.40%",
        "0%",
    ]
    assert [formats.format_number(value) for value in (24864, 0.01844, None, "x", 3.0)] == [
        "24,864",
        "0.01844",
        "–",
        "x",
        "3",
    ]
    assert [figures.format_duration(value) for value in (4.12, 38, 125, 3790)] == [
        "4.1 s",
        "38 s",
        "2 min 5 s",
        "1 h 3 min",
    ]


def test_highlighted_differences() -> None:
    runs_before, runs_after, is_similar = presentation.diff_runs("You should rest now.", "You could really rest  now!")
    assert is_similar
    assert runs_before == [("You ", False), ("should", True), (" rest now.", False)]
    assert runs_after == [("You ", False), ("could really", True), (" rest  now!", False)]
    assert presentation.diff_runs("No.", "Something else entirely")[2] is False
    assert presentation.diff_runs("", "")[2] is False
    before, after = "A b c, d  e f.", "a c d x e\ng f?"
    runs_before, runs_after, _ = presentation.diff_runs(before, after)
    assert ["".join(text for text, _ in runs) for runs in (runs_before, runs_after)] == [before, after]


def test_repeated_steps_count_once_and_long_curves_are_smoothed() -> None:
    rows = presentation.sort_by_step(
        [{"step": 1, "love": 0.1}, {"step": 2, "love": 0.2}, {"step": 2, "love": 0.3}, {"love": 9}]
    )
    assert [row["love"] for row in rows] == [0.1, 0.3]
    spec = build_objective_metrics(["love"])[0]
    long_curve = figures.build_curve_figure(
        spec, [{"step": step, "love": 0.1} for step in range(figures.SMOOTH_FROM_STEPS)]
    )
    assert long_curve is not None
    assert len(long_curve["data"]) == 2
    assert figures.compute_running_mean([1.0, 2.0], 0.5) == [1.0, 1.5]
    assert figures.build_step_phases_figure([{"step": 1}]) is None


def test_the_command_writes_a_report_or_names_the_problem(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run_folder)]) == 0
    assert (run_folder / "report.html").stat().st_size > 1_000_000
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as exit_info:
        main([str(tmp_path / "empty")])
    assert exit_info.value.code == DataError.exit_code
    assert "name a run folder" in capsys.readouterr().err
    with pytest.raises(DataError, match="is not a folder"):
        write_report(tmp_path / "nowhere")


def test_pareto_optimal_points() -> None:
    assert figures.find_pareto_optimal([[0.1, 0.9], [0.2, 0.8], [0.1, 0.8], [0.2, 0.8]]) == [True, True, False, True]
    assert figures.find_pareto_optimal([]) == []
    rows = [{"step": 1, "love": 0.1, "safety": 0.9}, {"step": 2, "love": 0.09, "safety": 0.8}]
    figure = figures.build_pareto_figure(rows, make_summary()["offline"], "safety", ["love", "safety"])
    assert figure is not None
    steps, base, aligned = figure["data"]
    assert (steps["x"], steps["y"]) == ([0.9, 0.8], [0.1, 0.09])
    assert steps["text"] == ["step 1, Pareto optimal", "step 2"]
    assert (base["name"], base["y"], aligned["y"]) == ("base", [0.06], [0.077])
    assert figures.build_pareto_figure([], {}, "safety", ["love", "safety"]) is None


def test_few_prompts_cause_a_warning() -> None:
    summary = make_summary(has_users=False)
    assert "unreliable" not in presentation.format_evaluation_sentence(summary)
    summary["arms"]["base"]["prompts"] = 5
    assert presentation.format_evaluation_sentence(summary).endswith(
        "clustered by prompt. With so few prompts the intervals themselves are unreliable."
    )


def test_reliability_bins_have_wilson_intervals() -> None:
    first, second = presentation.read_reliability_bins({"n": 900, "reliability": BINS})
    assert (first["predicted"], first["observed"], first["n"]) == (0.03, 0.02, 450)
    for reliability_bin in (first, second):
        expected = binomtest(round(reliability_bin["observed"] * 450), 450).proportion_ci(0.95, "wilson")
        assert (reliability_bin["low"], reliability_bin["high"]) == pytest.approx(
            (expected.low, expected.high), abs=1e-5
        )
    assert presentation.read_reliability_bins({}) == []


def test_a_constant_curve_has_a_range_from_zero() -> None:
    spec = next(metric for metric in STEP_METRICS if metric.key == "clip_share")
    figure = figures.build_curve_figure(spec, [{"step": 1, "clip_share": 0.0}, {"step": 2, "clip_share": 0.0}])
    assert figure is not None
    assert figure["layout"]["yaxis"]["range"] == [0.0, 0.01]


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: the page was not opened")
def test_a_browser_opens_the_page_without_errors_and_axe_reports_nothing(run_folder: Path, tmp_path: Path) -> None:
    """At phone and desktop width, light and dark, by the script that makes the screenshots of the docs."""
    for package in ("playwright", "axe_playwright_python"):
        pytest.importorskip(package, reason=f"{package} is not installed: the page was not opened")
    write_report(run_folder)
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "screenshots.py"),
        str(run_folder),
        "--out",
        str(tmp_path / "out"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    output = json.loads(result.stdout.splitlines()[-1])
    assert output["problems"] == [] and result.returncode == 0, result.stderr
    assert [Path(picture).name for picture in output["pictures"]] == [
        "report-phone.png", "report-phone-tradeoff.png", "report.png",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: the page was not opened")
def test_the_browser_check_reports_errors(tmp_path: Path) -> None:
    """Of a page without the plots of a report, which take the browser seconds in each view."""
    pytest.importorskip("axe_playwright_python", reason="axe is not installed: the page was not opened")
    (tmp_path / "report.html").write_text(
        '<!doctype html><html lang="en"><head><title>Report</title></head><body><main><h1>Report</h1>'
        '<img src="http://127.0.0.1:9/x.png"><div style="width:3000px">wide</div><div data-figure="love"></div>'
        '<script>console.error("oh")</script></main></body></html>'
    )
    command = [sys.executable, str(ROOT / "benchmarks" / "screenshots.py"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    problems = " ".join(json.loads(result.stdout.splitlines()[-1])["problems"])
    assert result.returncode == 1
    for expected_text in (
        "phone, dark: axe image-alt", "desktop, light: the page is 3", "console error: oh", "1 plots are not drawn",
        "requests http://127.0.0.1:9/x.png",
    ):  # fmt: skip
        assert expected_text in problems, problems
