"""A W&B Report about one run: the story in words, then panels for what it learnt, what it cost and where time went.

`build` makes it from the files of a run folder without any network; `check` proves that its specification is one that
W&B's own package reads back whole. Only `save` talks to a server. Needs the package wandb-workspaces.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rluf.errors import DataError, SettingsError
from rluf.report import presentation as view
from rluf.report.html import read_run
from rluf.tracking import metric_registry as catalogue
from rluf.tracking.run_files import read_json

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import Report

WIDTH, HEIGHT, COLUMNS = 8, 6, 3
"""Size of a panel on W&B's grid of 24 columns."""
TABLES = ("side_by_side", "drawn")
"""Tables of rluf.tracking.wandb: both policies on test prompts, and what training drew."""
SECTIONS: tuple[tuple[str, str, tuple[catalogue.Group, ...]], ...] = (
    ("Objectives", "Mean calibrated scores of the samples of each step.", ("objectives",)),
    ("Learning and constraints", "How far the policy moved, and what held it back.", ("learning",)),
    ("Learner against engine", "Sampling and learning run on different code: how far they agree.",
     ("mismatch", "publishing")),
    ("Throughput", "Where the seconds of a step went.", ("throughput",)),
)  # fmt: skip


def build(folder: Path, *, entity: str = "") -> Report:
    """The report of the run in `folder`, not yet sent. `entity` is the W&B user or team.

    DataError when the folder is no run, SettingsError when wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
    except ImportError as error:
        raise SettingsError(
            "a W&B Report needs the package wandb-workspaces, which is not installed; pip install wandb-workspaces"
        ) from error
    files = read_run(folder)
    project = files.config.get("tracking", {}).get("project", "rluf")
    identity = folder / "wandb" / "id"
    if not identity.is_file():
        raise DataError(f"{folder} has no W&B run (wandb/id); it ran with tracking.wandb=off, so nothing can be drawn")
    runs = wr.Runset(name="run", query=identity.read_text("utf-8").strip())

    def grid(panels: Sequence[Any]) -> Any:
        for place, panel in enumerate(panels):
            panel.layout = wr.Layout(WIDTH * (place % COLUMNS), HEIGHT * (place // COLUMNS), WIDTH, HEIGHT)
        return wr.PanelGrid(runsets=[runs], panels=list(panels))

    specs = catalogue.catalogue(dict.fromkeys(name for row in files.metrics for name in catalogue.names_in(row)))
    blocks: list[Any] = [wr.TableOfContents(), wr.MarkdownBlock(story(files))]
    for heading, about, groups in SECTIONS:
        lines = [_line(wr, spec) for spec in specs if spec.group in groups]
        blocks += [wr.H2(heading), wr.P(about), grid(lines)]
    blocks += [wr.H2("Reward hacking"), wr.P("What a policy may do to please the reward model rather than the user.")]
    blocks.append(grid([_bars(wr, name, one) for name, one in _monitors(files.summary).items()]))
    blocks += [wr.H2("Samples"), grid([wr.WeavePanelSummaryTable(table_name=name) for name in TABLES])]
    return wr.Report(
        entity=entity,
        project=project,
        title=f"{files.name}: {view.headline(files.summary)}"[:128],
        description=view.evaluated(files.summary) or "",
        blocks=blocks,
        width="fluid",
    )


def story(files: view.RunFiles) -> str:
    """The verdict and a table of base against aligned, in Markdown."""
    gates = files.summary.get("gates") or {}
    lines = [f"**{view.headline(files.summary)}**", ""]
    if gates:
        lines += [f"Gates: **{gates['verdict']}**, judged by {gates['judged_by']}.", ""]
    lines += ["| | base | aligned | lift | 95% interval |", "|---|---|---|---|---|"]
    for one in view.measures(files.summary):
        (_, base, _), (_, aligned, _) = one["arms"]
        lines.append(f"| {one['title']} | {base} | {aligned} | {one['lift']} | {one['lift_interval'] or '–'} |")
    return "\n".join(lines)


def check(report: Report) -> dict[str, Any]:
    """The report's specification, as W&B stores it, read back by W&B's own types. DataError where that fails."""
    from pydantic import ValidationError
    from wandb_workspaces.reports.v2 import Report, internal

    model = report._to_model()
    spec: dict[str, Any] = json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True))
    try:
        read = internal.Spec.model_validate(spec)
        again = Report._from_model(model.model_copy(update={"spec": read}))
    except ValidationError as error:
        raise DataError(f"W&B's package does not read its own report back: {error}") from error
    if len(again.blocks) != len(report.blocks):
        raise DataError(f"of {len(report.blocks)} blocks of the W&B Report, {len(again.blocks)} were read back")
    return spec


def _line(wr: Any, spec: catalogue.Metric) -> Any:
    x = "Step" if spec.axis == "step" else spec.axis
    return wr.LinePlot(
        title=spec.title,
        x=x,
        y=[spec.name],
        title_x=catalogue.AXES[spec.axis],
        title_y=spec.about,
        smoothing_factor=0.0,
    )


def _monitors(summary: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    found: Mapping[str, Mapping[str, Any]] = (summary.get("monitors") or {}).get("items", {})
    return found


def _bars(wr: Any, name: str, monitor: Mapping[str, Any]) -> Any:
    keys = [wr.SummaryMetric(f"monitors.items.{name}.{arm}") for arm in ("base", "aligned")]
    return wr.BarPlot(title=monitor["label"], metrics=keys, orientation="h")


def entity_of(folder: Path) -> str:
    """The W&B entity that a saved report belongs to: config.json has none, so W&B is asked for the key's own."""
    import wandb

    project = read_json(folder / "config.json").get("tracking", {}).get("project", "rluf")
    try:
        return str(wandb.Api().default_entity)
    except (wandb.errors.Error, ValueError) as error:
        raise SettingsError(
            f"W&B does not know who asks for a report in project {project} ({error}); set WANDB_API_KEY, "
            "or use --dry-run to see the report's specification"
        ) from error
