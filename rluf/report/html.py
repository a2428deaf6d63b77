"""Writes report.html: one self-contained page about a run, made from the files of its folder alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rluf
from rluf.errors import DataError
from rluf.report import figures
from rluf.report import presentation as view
from rluf.tracking import metric_registry as catalogue
from rluf.tracking.run_files import read_json, read_jsonl

SUMMARY, METRICS, SAMPLES, CONFIG, CARDS = "summary.json", "metrics.jsonl", "samples.jsonl", "config.json", "cards"
DATA_CARD = "data"
"""Stem of the data card in cards/; every other card there is a reward card named after its objective."""
ORDER = {"love": 0, "helpfulness": 1, "safety": 2}
"""Order of the reward cards; others come after these."""
SHOWN_SAMPLES = 24
FIRST = ("kl", "response_length")
"""Curves shown at once, beside those of the objectives and the reward."""
CHARTED = (
    *FIRST, "entropy", "grad_norm", "clip_share", "ratio_mean", "ratio_max", "effective_sample_size", "probe",
    "demonstration_nll",
)  # fmt: skip
"""Metrics that get a curve beside the objectives; the others stand in the table of numbers."""
MORE_CURVES = "Is the learner healthy?"


def write_report(folder: Path) -> Path:
    """Write <folder>/report.html and return its path; an earlier report is replaced in one go.

    Reads summary.json, metrics.jsonl, samples.jsonl, config.json and cards/*.json. Missing files leave out their part
    of the page, so that an unfinished run has a report too. DataError when the folder has none of them.
    """
    page = render(read_run(folder))
    path = folder / "report.html"
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    part.write_text(page, "utf-8")
    part.replace(path)
    return path


def read_run(folder: Path) -> view.RunFiles:
    """The files of a run folder. DataError when there is nothing to report on."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; name a run folder such as runs/quickstart/latest")
    paths = sorted((folder / CARDS).glob("*.json"), key=lambda path: (ORDER.get(path.stem, len(ORDER)), path.stem))
    cards = {path.stem: read_json(path) for path in paths}
    summary, config = read_json(folder / SUMMARY), read_json(folder / CONFIG)
    files = view.RunFiles(
        name=str(summary.get("name") or config.get("name") or folder.resolve().parent.name),
        summary=summary,
        metrics=view.by_step(read_jsonl(folder / METRICS)),
        samples=read_jsonl(folder / SAMPLES)[:SHOWN_SAMPLES],
        cards=cards,
        config=config,
    )
    if not (files.summary or files.metrics or files.config):
        raise DataError(f"{folder} holds no {SUMMARY}, {METRICS} or {CONFIG}; name a run folder written by rluf.train")
    return files


def render(files: view.RunFiles) -> str:
    """The page as text, plotly.js included once (4 to 5 MB)."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("rluf.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=False
    )
    template = environment.get_template("report.html.j2")
    drawn = _figures(files)
    told = {**_story(files, drawn), **_learning(files), **_cards(files), "parts": _parts(files, drawn)}
    return template.render(**told, figures=drawn, plotly_js=get_plotlyjs(), rluf_version=rluf.__version__)


def _story(files: view.RunFiles, drawn: Mapping[str, figures.Figure]) -> dict[str, Any]:
    summary = files.summary
    _, seconds = view.phase_seconds(summary)
    versions = summary.get("versions") or {}
    return {
        "name": files.name,
        "headline": view.headline(summary),
        "evaluated": view.evaluated(summary),
        "facts": view.facts(summary, figures.duration(seconds) if seconds else None),
        "measures": view.measures(summary),
        "gates": (gates := summary.get("gates")),
        "verdict": view.verdict_text(gates) if gates else "",
        "lift_text": "; ".join(
            f"{name} by {judge} {view.percent(lift['mean'], sign=True)} ({view.interval(lift, sign=True)})"
            for name, judge, lift in view.lift_rows(summary)
        ),
        "offline": view.offline_rows(summary) if "love_rate" in summary else [],
        "monitors": (monitors := view.monitor_rows(summary)),
        "alarms": view.alarm_text(monitors),
        "monitor_rule": summary.get("monitors", {}).get("rule", ""),
        "samples": view.sample_views(files.samples),
        "tradeoffs": [
            (name, catalogue.title(name.removeprefix("pareto_"))) for name in drawn if name.startswith("pareto_")
        ],
        "versions": [(key, view.number(value)) for key, value in versions.items()] if isinstance(versions, Mapping)
        else [("weight version", view.number(versions))],
        "config": json.dumps(files.config, indent=2, ensure_ascii=False) if files.config else "",
    }  # fmt: skip


def _specs(files: view.RunFiles) -> tuple[catalogue.Metric, ...]:
    """The metrics that this run's steps can have."""
    return catalogue.catalogue(dict.fromkeys(name for row in files.metrics for name in catalogue.names_in(row)))


def _charted(spec: catalogue.Metric) -> bool:
    return spec.group == "objectives" or spec.key in CHARTED


def _learning(files: view.RunFiles) -> dict[str, Any]:
    specs = _specs(files)
    columns, rows = view.step_table(files.metrics, [spec.key for spec in specs])
    phases, seconds = view.phase_seconds(files.summary)
    drawn = [spec for spec in specs if _charted(spec) and figures.curve(spec, files.metrics) is not None]
    first = [spec for spec in drawn if spec.group == "objectives" or spec.key in FIRST]
    return {
        "curves": [
            (heading, [(f"curve_{spec.key}", spec.title, spec.about) for spec in part])
            for heading, part in (("", first), (MORE_CURVES, [spec for spec in drawn if spec not in first]))
            if part
        ],
        "step_columns": columns,
        "step_rows": rows,
        "total_time": figures.duration(seconds) if seconds else "",
        "stage_text": "; ".join(
            f"{figures.stage_name(name)} {figures.duration(value)}" for name, value in phases.items()
        ),
        "reused": view.reused_rows(files.summary),
    }


def _cards(files: view.RunFiles) -> dict[str, Any]:
    rewards = {name: card for name, card in files.cards.items() if name != DATA_CARD}
    data = files.cards.get(DATA_CARD, {})
    rate = data.get("love", {}).get("base_rate")
    titles, rows = view.card_table(rewards)
    return {
        "card_titles": titles,
        "card_rows": rows,
        "reliable": [
            (f"reliability_{name}", catalogue.title(name), len(card["reliability"]))
            for name, card in rewards.items()
            if card.get("reliability")
        ],
        "reliability_rows": view.reliability_rows(rewards),
        "card_details": [(name, json.dumps(card, indent=2, ensure_ascii=False)) for name, card in rewards.items()],
        "funnel": view.funnel_rows(data.get("counts", {})),
        "base_rate": f"{view.percent(rate['mean'])} ({view.interval(rate)})" if rate else "",
    }


def _figures(files: view.RunFiles) -> dict[str, figures.Figure]:
    """Every figure of the page by its id; figures without data are left out."""
    found: dict[str, figures.Figure | None] = {
        f"arms_{card['key']}": figures.arms(card["measure"]) for card in view.measures(files.summary)
    }
    lifts = view.lift_rows(files.summary)
    found["lifts"] = figures.lifts(lifts) if lifts else None
    for spec in _specs(files):
        if _charted(spec):
            found[f"curve_{spec.key}"] = figures.curve(spec, files.metrics)
    names = list(dict.fromkeys(name for row in files.metrics for name in catalogue.names_in(row)))
    for name in names or [key for key in files.summary.get("offline", {}) if key != "p_love"]:
        if name != "love":
            found[f"pareto_{name}"] = figures.pareto(files.metrics, files.summary.get("offline", {}), name, names)
    for name, card in files.cards.items():
        bins = view.reliability_bins(card)
        found[f"reliability_{name}"] = figures.reliability(bins) if bins else None
    phases, _ = view.phase_seconds(files.summary)
    found["stages"] = figures.stages(phases) if phases else None
    found["timeline"] = figures.timeline(files.metrics)
    counts = files.cards.get(DATA_CARD, {}).get("counts")
    found["funnel"] = figures.funnel(counts) if counts else None
    return {name: figure for name, figure in found.items() if figure is not None}


def _parts(files: view.RunFiles, have: Mapping[str, figures.Figure]) -> list[tuple[str, str]]:
    """Links at the top: (anchor, title) of the parts that this page has."""
    rewards = [name for name in files.cards if name != DATA_CARD]
    parts = [
        ("story", "Story", True),
        ("monitors", "Monitors", bool(files.summary.get("monitors"))),
        ("samples", "Samples", bool(files.samples)),
        ("tradeoff", "Trade-offs", any(name.startswith("pareto_") for name in have)),
        ("learning", "Learning", any(name.startswith("curve_") for name in have)),
        ("time", "Time", "stages" in have or "timeline" in have),
        ("rewards", "Reward models", bool(rewards)),
        ("data", "Data", "funnel" in have),
        ("config", "Configuration", bool(files.config or files.summary.get("versions"))),
    ]
    return [(anchor, title) for anchor, title, there in parts if there]
