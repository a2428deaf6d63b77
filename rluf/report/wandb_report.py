"""W&B Report of one run: the results as text, then panels for objectives, learning, mismatch, throughput and samples.

`build_report` reads the files of a run folder and uses no network; `check_report` verifies that W&B's own package can
read the specification back. Only `save` contacts a server. Requires the package wandb-workspaces.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rluf.errors import DataError, SettingsError
from rluf.report import headline, presentation
from rluf.report.html import read_run_files
from rluf.tracking import metric_registry
from rluf.tracking.wandb import COMPARISON_TABLE, ROLLOUT_TABLE
from rluf.utils.files import read_json

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import Report

PANEL_WIDTH, PANEL_HEIGHT, GRID_COLUMNS = 8, 6, 3
"""Panel size on W&B's grid of 24 columns, and panels per row."""
SAMPLE_TABLES = (COMPARISON_TABLE, ROLLOUT_TABLE)
REPORT_SECTIONS: tuple[tuple[str, str, tuple[metric_registry.MetricGroup, ...]], ...] = (
    ("Objectives", "Mean calibrated scores of the samples of each step.", ("objectives",)),
    ("Learning and constraints", "Distance from the base policy, and the constraints on it.", ("learning",)),
    ("Learner-engine mismatch", "Sampling and learning run different code; these metrics show how well they agree.",
     ("mismatch", "weight_sync")),
    ("Throughput", "Seconds of a step by phase, and tokens.", ("throughput",)),
)  # fmt: skip


def build_report(run_folder: Path, *, entity: str = "") -> Report:
    """Build the report of a run without saving it. `entity` is the W&B user or team.

    Raises DataError if the folder is not a run with W&B files, SettingsError if wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
    except ImportError as error:
        raise SettingsError(
            "a W&B Report needs the package wandb-workspaces, which is not installed; pip install wandb-workspaces"
        ) from error
    run_files = read_run_files(run_folder)
    project = run_files.config.get("tracking", {}).get("project", "rluf")
    id_file = run_folder / "wandb" / "id"
    if not id_file.is_file():
        raise DataError(
            f"{run_folder} has no W&B run (wandb/id); runs with tracking.wandb=off cannot have a W&B Report"
        )
    runset = wr.Runset(name="run", query=id_file.read_text("utf-8").strip())

    def build_grid(plot_panels: Sequence[Any]) -> Any:
        for index, panel in enumerate(plot_panels):
            row, column = divmod(index, GRID_COLUMNS)
            panel.layout = wr.Layout(PANEL_WIDTH * column, PANEL_HEIGHT * row, PANEL_WIDTH, PANEL_HEIGHT)
        return wr.PanelGrid(runsets=[runset], panels=list(plot_panels))

    metric_specs = metric_registry.list_metric_specs(
        dict.fromkeys(name for row in run_files.metrics for name in metric_registry.find_row_objectives(row))
    )
    report_blocks: list[Any] = [wr.TableOfContents(), wr.MarkdownBlock(format_story_markdown(run_files))]
    for heading, description, metric_groups in REPORT_SECTIONS:
        plot_panels = [_build_line_plot(wr, spec) for spec in metric_specs if spec.group in metric_groups]
        report_blocks += [wr.H2(heading), wr.P(description), build_grid(plot_panels)]
    monitors = _monitor_items(run_files.summary)
    report_blocks.append(wr.H2("Reward hacking"))
    report_blocks.append(wr.P("Ways in which a policy pleases the reward model rather than the user."))
    report_blocks.append(build_grid([_monitor_bar_plot(wr, name, monitor) for name, monitor in monitors.items()]))
    sample_panels = [wr.WeavePanelSummaryTable(table_name=name) for name in SAMPLE_TABLES]
    report_blocks += [wr.H2("Samples"), build_grid(sample_panels)]
    return wr.Report(
        entity=entity,
        project=project,
        # The title field of wandb-workspaces accepts at most 128 characters.
        title=f"{run_files.name}: {headline.report_headline(run_files.summary)}"[:128],
        description=presentation.format_evaluation_sentence(run_files.summary) or "",
        blocks=report_blocks,
        width="fluid",
    )


def format_story_markdown(run_files: presentation.RunFiles) -> str:
    """Render the verdict and a table of base against aligned as Markdown."""
    gates = headline.read_gates(run_files.summary)
    markdown_lines = [f"**{headline.report_headline(run_files.summary)}**", ""]
    if "gates" in run_files.summary:
        markdown_lines += [f"Gates: **{gates['verdict']}**, judged by {gates['judged_by']}.", ""]
        markdown_lines += [f"- {reason}" for reason in gates["reasons"]] + [""]
    markdown_lines += ["| | base | aligned | lift | 95% interval |", "|---|---|---|---|---|"]
    for card in presentation.measure_cards(run_files.summary):
        (_, base, _), (_, aligned, _) = card["arms"]
        cells = (card["title"], base, aligned, card["lift"], card["lift_interval"] or "–")
        markdown_lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(markdown_lines)


def check_report(report: Report) -> dict[str, Any]:
    """Return the report's specification as W&B stores it. Raises DataError if W&B's own types cannot read it back."""
    from pydantic import ValidationError
    from wandb_workspaces.reports.v2 import Report, internal

    report_model = report._to_model()
    spec: dict[str, Any] = json.loads(report_model.spec.model_dump_json(by_alias=True, exclude_none=True))
    try:
        parsed_spec = internal.Spec.model_validate(spec)
        parsed_report = Report._from_model(report_model.model_copy(update={"spec": parsed_spec}))
    except ValidationError as error:
        raise DataError(f"wandb-workspaces cannot read its own report back: {error}") from error
    # Unknown blocks are dropped without an error.
    if len(parsed_report.blocks) != len(report.blocks):
        raise DataError(
            f"the W&B Report has {len(report.blocks)} blocks, but {len(parsed_report.blocks)} were read back"
        )
    return spec


def _build_line_plot(wr: Any, metric_spec: metric_registry.MetricSpec) -> Any:
    # wandb-workspaces calls the metric "step" of the run "Step".
    x_axis = "Step" if metric_spec.axis == "step" else metric_spec.axis
    return wr.LinePlot(
        title=metric_spec.title,
        x=x_axis,
        y=[metric_spec.wandb_name],
        title_x=metric_registry.AXIS_TITLES[metric_spec.axis],
        title_y=metric_spec.description,
        smoothing_factor=0.0,
    )


def _monitor_items(summary: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    monitors: Mapping[str, Mapping[str, Any]] = (summary.get("monitors") or {}).get("items", {})
    return monitors


def _monitor_bar_plot(wr: Any, name: str, monitor: Mapping[str, Any]) -> Any:
    metrics = [wr.SummaryMetric(f"monitors.items.{name}.{arm}") for arm in ("base", "aligned")]
    return wr.BarPlot(title=monitor["label"], metrics=metrics, orientation="h")


def read_default_entity(run_folder: Path) -> str:
    """Return the default W&B entity of the API key, to which a saved report belongs; config.json has none."""
    import wandb

    project = read_json(run_folder / "config.json").get("tracking", {}).get("project", "rluf")
    try:
        return str(wandb.Api().default_entity)
    except (wandb.errors.Error, ValueError) as error:
        raise SettingsError(
            f"W&B did not return an account for a report in project {project} ({error}); set WANDB_API_KEY, or use "
            "--dry-run to get the report's specification"
        ) from error
