"""Build report.html, one self-contained page about a run, from the files of its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rluf.config.objectives import BUILTIN_OBJECTIVES, PRIMARY_OBJECTIVE, find_spec_by_offline_key
from rluf.errors import DataError
from rluf.report import figures, formats, headline, presentation
from rluf.report.page import render_html_page
from rluf.tracking import metric_registry
from rluf.tracking.run_files import read_answers
from rluf.utils.files import atomic_write, read_json, read_jsonl
from rluf.utils.paths import suggest_run_folder

SUMMARY_FILE, CONFIG_FILE = "summary.json", "config.json"
METRICS_FILE = "metrics.jsonl"
CARDS_FOLDER = "cards"
DATA_CARD_NAME = "data"
"""Stem of the data card in cards/; every other card there is a reward card named after its objective."""
CARD_ORDER = {name: index for index, name in enumerate(BUILTIN_OBJECTIVES)}
"""Order of the reward cards; cards of other objectives follow."""
MAX_SHOWN_SAMPLES = 24
FIRST_CURVES = ("kl", "response_length")
"""Curves that are visible without a click, in addition to those of the objectives and the reward."""
CHARTED_METRICS = (
    *FIRST_CURVES, "entropy", "grad_norm", "clip_share", "ratio_mean", "ratio_max", "effective_sample_size",
    "sync_logprob_gap", "demonstration_nll", "truncated_share",
)  # fmt: skip
"""Metrics with a curve in addition to the objectives; all others are in the table of numbers only."""
VERSION_TITLES = {"weights": "weight version"}
MORE_CURVES_HEADING = "Learner health:"


def write_report(run_folder: Path) -> Path:
    """Write <run folder>/report.html and return its path; an earlier report is replaced atomically.

    Reads summary.json, metrics.jsonl, answers.jsonl, config.json and cards/*.json. The section of a missing file is
    omitted, so that an unfinished run has a report too. Raises DataError if the folder has none of them.
    """
    page_html = render_page(read_run_files(run_folder))
    report_path = run_folder / "report.html"
    with atomic_write(report_path) as temporary_path:
        temporary_path.write_text(page_html, "utf-8")
    return report_path


def read_run_files(run_folder: Path) -> presentation.RunFiles:
    """Read the files of a run folder. Raises DataError if there is nothing to report on."""
    if not run_folder.is_dir():
        raise DataError(f"{run_folder} is not a folder; name a run folder such as runs/quickstart/latest")
    # Objectives are named in the settings, so the cards are whatever files are there.
    card_paths = sorted(
        (run_folder / CARDS_FOLDER).glob("*.json"),
        key=lambda path: (CARD_ORDER.get(path.stem, len(CARD_ORDER)), path.stem),
    )
    cards = {path.stem: read_json(path) for path in card_paths}
    summary, config = read_json(run_folder / SUMMARY_FILE), read_json(run_folder / CONFIG_FILE)
    run_files = presentation.RunFiles(
        name=str(summary.get("name") or config.get("name") or run_folder.resolve().parent.name),
        summary=summary,
        metrics=presentation.sort_by_step(read_jsonl(run_folder / METRICS_FILE)),
        samples=presentation.pair_responses(read_answers(run_folder), MAX_SHOWN_SAMPLES, _list_safety_topics(config)),
        cards=cards,
        config=config,
    )
    # Cards and samples alone do not make a run: they may have been copied there.
    if not (run_files.summary or run_files.metrics or run_files.config):
        raise DataError(
            f"{run_folder} has no {SUMMARY_FILE}, {METRICS_FILE} or {CONFIG_FILE}; name a run folder written by "
            f"rluf.train{suggest_run_folder(run_folder)}"
        )
    return run_files


def _list_safety_topics(config: Mapping[str, Any]) -> list[str]:
    """Topics on which only safety counts: a refusal is wanted there."""
    topic_objectives = config.get("aggregation", {}).get("topic_objectives", {})
    return [topic for topic, objective in topic_objectives.items() if objective == "safety"]


def render_page(run_files: presentation.RunFiles) -> str:
    """Render the page, including plotly.js (4 to 5 MB), so that it works without a network."""
    figures_by_id = _build_figures(run_files)
    context = {
        **_build_story_context(run_files, figures_by_id),
        **_build_learning_context(run_files),
        **_build_card_context(run_files),
        "section_links": _list_section_links(run_files, figures_by_id),
    }
    return render_html_page("report.html.j2", package="rluf.report", figures=figures_by_id, **context)


def _build_story_context(
    run_files: presentation.RunFiles, figures_by_id: Mapping[str, figures.Figure]
) -> dict[str, Any]:
    summary = run_files.summary
    _, total_seconds = presentation.sum_phase_seconds(summary)
    versions = summary.get("versions") or {}
    comparison_columns, comparison_table = presentation.build_comparison_rows(summary)
    return {
        "name": run_files.name,
        "headline": headline.report_headline(summary),
        "evaluation": presentation.format_evaluation_sentence(summary),
        "facts": presentation.list_summary_facts(
            summary, figures.format_duration(total_seconds) if total_seconds else None
        ),
        "measures": presentation.measure_cards(summary),
        "gates": summary.get("gates"),
        "verdict": headline.format_verdict(gates := headline.read_gates(summary)),
        "verdict_class": gates["verdict"],
        "is_unread": headline.is_unread(summary),
        "comparison_columns": comparison_columns,
        "comparisons": comparison_table,
        "repeat_sentence": presentation.format_repeat_sentence(summary),
        "arm_rows": presentation.build_arm_rows(summary),
        "reference_rows": presentation.build_reference_rows(summary),
        "blind_sentence": headline.format_blind_sentence(blind) if (blind := summary.get("blind")) else "",
        "blind_rows": presentation.build_blind_rows(summary),
        "lift_text": "; ".join(
            f"{measure_name} by {judge} {formats.format_percent(lift['mean'], with_sign=True)} "
            f"({formats.format_interval(lift, with_sign=True)})"
            for measure_name, judge, lift in presentation.build_lift_rows(summary)
        ),
        "offline": presentation.build_offline_rows(summary) if headline.has_user_verdicts(summary) else [],
        "monitors": (monitors := presentation.monitor_rows(summary)),
        "alarms": presentation.format_alarm_sentence(monitors),
        "monitor_rule": summary.get("monitors", {}).get("rule", ""),
        "samples": presentation.sample_views(run_files.samples),
        "tradeoffs": [
            (figure_id, metric_registry.format_objective_title(figure_id.removeprefix("pareto_")))
            for figure_id in figures_by_id if figure_id.startswith("pareto_")
        ],
        "versions": [(VERSION_TITLES.get(key, key), formats.format_number(value)) for key, value in versions.items()]
        if isinstance(versions, Mapping) else [("weight version", formats.format_number(versions))],
        "config": json.dumps(run_files.config, indent=2, ensure_ascii=False) if run_files.config else "",
    }  # fmt: skip


def _run_metric_specs(run_files: presentation.RunFiles) -> tuple[metric_registry.MetricSpec, ...]:
    """All metrics that the steps of this run can have."""
    return metric_registry.list_metric_specs(
        dict.fromkeys(name for row in run_files.metrics for name in metric_registry.find_row_objectives(row))
    )


def _has_curve(metric_spec: metric_registry.MetricSpec) -> bool:
    return metric_spec.group == "objectives" or metric_spec.key in CHARTED_METRICS


def _build_learning_context(run_files: presentation.RunFiles) -> dict[str, Any]:
    metric_specs = _run_metric_specs(run_files)
    step_columns, step_rows = presentation.step_table(
        run_files.metrics, [metric_spec.key for metric_spec in metric_specs]
    )
    phases, total_seconds = presentation.sum_phase_seconds(run_files.summary)
    # A metric without a value in any step gets no figure rather than an empty one.
    curve_specs = [
        metric_spec
        for metric_spec in metric_specs
        if _has_curve(metric_spec) and figures.build_curve_figure(metric_spec, run_files.metrics) is not None
    ]
    first_specs = [
        metric_spec
        for metric_spec in curve_specs
        if metric_spec.group == "objectives" or metric_spec.key in FIRST_CURVES
    ]
    more_specs = [metric_spec for metric_spec in curve_specs if metric_spec not in first_specs]
    return {
        "curves": [
            (
                heading,
                [
                    (f"curve_{metric_spec.key}", metric_spec.title, metric_spec.description)
                    for metric_spec in section_specs
                ],
            )
            for heading, section_specs in (("", first_specs), (MORE_CURVES_HEADING, more_specs))
            if section_specs
        ],
        "step_columns": step_columns,
        "step_rows": step_rows,
        "total_time": figures.format_duration(total_seconds) if total_seconds else "",
        "job_phase_text": "; ".join(
            f"{figures.format_job_phase(phase)} {figures.format_duration(value)}" for phase, value in phases.items()
        ),
        "reused": presentation.build_reused_rows(run_files.summary),
    }


def _build_card_context(run_files: presentation.RunFiles) -> dict[str, Any]:
    reward_cards = {name: card for name, card in run_files.cards.items() if name != DATA_CARD_NAME}
    # Every key may be missing: the card may be that of an earlier release.
    data_card = run_files.cards.get(DATA_CARD_NAME, {})
    base_rate = data_card.get("love", {}).get("base_rate")
    card_titles, card_rows = presentation.build_card_table(reward_cards)
    return {
        "card_titles": card_titles,
        "trust_sentences": presentation.format_trust_sentences(reward_cards),
        "card_rows": card_rows,
        "reliability_plots": [
            (f"reliability_{name}", metric_registry.format_objective_title(name), len(card["reliability"]))
            for name, card in reward_cards.items()
            if card.get("reliability")
        ],
        "reliability_rows": presentation.build_reliability_rows(reward_cards),
        "card_details": [(name, json.dumps(card, indent=2, ensure_ascii=False)) for name, card in reward_cards.items()],
        "funnel": presentation.build_funnel_table(data_card.get("counts", {})),
        "base_rate": f"{formats.format_percent(base_rate['mean'])} ({formats.format_interval(base_rate)})"
        if base_rate
        else "",
    }


def _build_figures(run_files: presentation.RunFiles) -> dict[str, figures.Figure]:
    """Build every figure of the page by its id; figures without data are omitted."""
    optional_figures: dict[str, figures.Figure | None] = {
        f"arms_{card['key']}": figures.build_arms_figure(card["measure"])
        for card in presentation.measure_cards(run_files.summary)
    }
    lift_rows = presentation.build_lift_rows(run_files.summary)
    optional_figures["lifts"] = figures.build_lifts_figure(lift_rows) if lift_rows else None
    for metric_spec in _run_metric_specs(run_files):
        if _has_curve(metric_spec):
            optional_figures[f"curve_{metric_spec.key}"] = figures.build_curve_figure(metric_spec, run_files.metrics)
    offline_scores = run_files.summary.get("offline", {})
    objective_names = list(
        dict.fromkeys(objective for row in run_files.metrics for objective in metric_registry.find_row_objectives(row))
    )
    for objective in objective_names or [find_spec_by_offline_key(key).name for key in offline_scores]:
        if objective != PRIMARY_OBJECTIVE:
            optional_figures[f"pareto_{objective}"] = figures.build_pareto_figure(
                run_files.metrics, offline_scores, objective, objective_names
            )
    for card_name, card in run_files.cards.items():
        bins = presentation.read_reliability_bins(card)
        optional_figures[f"reliability_{card_name}"] = figures.build_reliability_figure(bins) if bins else None
    phases, _ = presentation.sum_phase_seconds(run_files.summary)
    optional_figures["job_phases"] = figures.build_job_phases_figure(phases) if phases else None
    optional_figures["step_phases"] = figures.build_step_phases_figure(run_files.metrics)
    counts_by_kind = run_files.cards.get(DATA_CARD_NAME, {}).get("counts")
    optional_figures["funnel"] = figures.build_funnel_figure(counts_by_kind) if counts_by_kind else None
    return {figure_id: figure for figure_id, figure in optional_figures.items() if figure is not None}


def _list_section_links(
    run_files: presentation.RunFiles, figures_by_id: Mapping[str, figures.Figure]
) -> list[tuple[str, str]]:
    """Build the links at the top: (anchor, title) of the sections that this page has."""
    reward_names = [card_name for card_name in run_files.cards if card_name != DATA_CARD_NAME]
    sections = [
        ("story", "Story", True),
        ("monitors", "Monitors", bool(run_files.summary.get("monitors"))),
        ("samples", "Samples", bool(run_files.samples)),
        ("tradeoff", "Trade-offs", any(figure_id.startswith("pareto_") for figure_id in figures_by_id)),
        ("learning", "Learning", any(figure_id.startswith("curve_") for figure_id in figures_by_id)),
        ("time", "Time", "job_phases" in figures_by_id or "step_phases" in figures_by_id),
        ("rewards", "Reward models", bool(reward_names)),
        ("data", "Data", "funnel" in figures_by_id),
        ("config", "Configuration", bool(run_files.config or run_files.summary.get("versions"))),
    ]
    return [(anchor, title) for anchor, title, is_present in sections if is_present]
