"""The W&B Report: W&B's own types read its specification back, and it names only metrics that a run logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rluf.errors import DataError
from rluf.report.__main__ import main
from rluf.report.wandb_report import build_report, check_report
from rluf.tracking.metric_registry import AXIS_TITLES, list_metric_specs
from rluf.utils.files import write_json, write_jsonl

pytest.importorskip("wandb_workspaces", reason="wandb-workspaces is not installed: no W&B Report was made")


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Folder of a finished run."""
    estimate = {"mean": 0.1, "low": 0.05, "high": 0.2}
    gate = {"name": "love", "status": "pass", "limit": 0.0, "judged_by": "reward models", "lift": estimate}
    love = {"base": estimate, "aligned": estimate, "lift": estimate, "difference": estimate}
    summary = {
        "name": "tiny", "offline": {"p_love": love},
        "gates": {"verdict": "undecided", "judged_by": "reward models", "checks": [gate]},
        "monitors": {"items": {"emoji": {"label": "Has an emoji", "base": 0.1, "aligned": 0.2}}},
    }  # fmt: skip
    write_json(tmp_path / "summary.json", summary)
    write_json(tmp_path / "config.json", {"name": "tiny", "tracking": {"project": "mine"}})
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": 1, "love": 0.1, "love_raw": 0.0, "helpfulness": 0.4, "kl": 0.1}])
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "id").write_text("abc123")
    return tmp_path


def list_panels(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """All panels of a specification."""
    grids = [block["metadata"] for block in spec["blocks"] if block["type"] == "panel-grid"]
    return [panel for grid in grids for panel in grid["panelBankSectionConfig"]["panels"]]


def test_dry_run_writes_a_specification_that_wandb_reads_back(run_folder: Path) -> None:
    assert main([str(run_folder), "--wandb", "--dry-run"]) == 0
    spec = json.loads((run_folder / "wandb-report.json").read_text())
    headings = [block["children"][0]["text"] for block in spec["blocks"] if block["type"] == "heading"]
    assert headings == [
        "Objectives", "Learning and constraints", "Learner-engine mismatch", "Throughput", "Reward hacking", "Samples",
    ]  # fmt: skip
    (markdown,) = [block["content"] for block in spec["blocks"] if block["type"] == "markdown-block"]
    assert "Gates: **undecided**, judged by reward models." in markdown
    assert "| P[Love] | 10.0% | 10.0% | +10% | +5.0% to +20% |" in markdown
    panels = list_panels(spec)
    lines = {
        panel["config"]["metrics"][0]: panel["config"]
        for panel in panels
        if panel["viewType"] == "Run History Line Plot"
    }
    specs_by_name = {spec.wandb_name: spec for spec in list_metric_specs(["love", "helpfulness"])}
    assert set(lines) == set(specs_by_name)
    assert all(lines[name].get("xAxis", "_step") in (spec.axis, "_step") for name, spec in specs_by_name.items())
    assert {line.get("xAxis") for line in lines.values()} >= set(AXIS_TITLES) - {"step"}
    (bars,) = [panel["config"] for panel in panels if panel["viewType"] == "Bar Chart"]
    assert [key.removeprefix("summary_metrics.") for key in bars["metrics"]] == [
        "monitors.items.emoji.base", "monitors.items.emoji.aligned",
    ]  # fmt: skip
    assert any("side_by_side" in json.dumps(panel) for panel in panels)


def test_a_run_without_wandb_files_is_rejected(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = build_report(run_folder, entity="me")
    assert (report.project, report.title) == ("mine", "tiny: Undecided: P[Love] rates the aligned policy 10% higher.")
    assert len(check_report(report)["blocks"]) == len(report.blocks) + 2
    (run_folder / "wandb" / "id").unlink()
    with pytest.raises(DataError, match="has no W&B run"):
        build_report(run_folder)
    with pytest.raises(SystemExit):
        main([str(run_folder), "--dry-run"])
    assert "--dry-run requires --wandb" in capsys.readouterr().err
