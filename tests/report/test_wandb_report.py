"""The W&B Report: its specification is read back by W&B's own types and names only what a run records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rluf.errors import DataError
from rluf.report.__main__ import main
from rluf.report.wandb_report import build, check
from rluf.tracking.metric_registry import AXES, catalogue
from rluf.tracking.run_files import write_json, write_jsonl

pytest.importorskip("wandb_workspaces", reason="wandb-workspaces is not installed: no W&B Report was made")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run's folder."""
    estimate = {"mean": 0.1, "low": 0.05, "high": 0.2}
    gate = {"name": "love", "passed": True, "lift": estimate}
    love = {"base": estimate, "aligned": estimate, "lift": estimate, "difference": estimate}
    summary = {
        "name": "tiny", "offline": {"p_love": love},
        "gates": {"verdict": "pass", "judged_by": "reward models", "checks": [gate]},
        "monitors": {"items": {"emoji": {"label": "Has an emoji", "base": 0.1, "aligned": 0.2}}},
    }  # fmt: skip
    write_json(tmp_path / "summary.json", summary)
    write_json(tmp_path / "config.json", {"name": "tiny", "tracking": {"project": "mine"}})
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": 1, "love": 0.1, "love_raw": 0.0, "helpfulness": 0.4, "kl": 0.1}])
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "id").write_text("abc123")
    return tmp_path


def panels(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """All panels of a specification."""
    grids = [block["metadata"] for block in spec["blocks"] if block["type"] == "panel-grid"]
    return [panel for grid in grids for panel in grid["panelBankSectionConfig"]["panels"]]


def test_dry_run_writes_a_specification_that_wandb_reads_back(folder: Path) -> None:
    assert main([str(folder), "--wandb", "--dry-run"]) == 0
    spec = json.loads((folder / "wandb-report.json").read_text())
    headings = [block["children"][0]["text"] for block in spec["blocks"] if block["type"] == "heading"]
    assert headings == [
        "Objectives", "Learning and constraints", "Learner against engine", "Throughput", "Reward hacking", "Samples",
    ]  # fmt: skip
    (words,) = [block["content"] for block in spec["blocks"] if block["type"] == "markdown-block"]
    assert "Gates: **pass**, judged by reward models." in words
    assert "| P[Love] | 10.0% | 10.0% | +10% | +5.0% to +20% |" in words
    found = panels(spec)
    lines = {
        panel["config"]["metrics"][0]: panel["config"]
        for panel in found
        if panel["viewType"] == "Run History Line Plot"
    }
    known = {metric.name: metric for metric in catalogue(["love", "helpfulness"])}
    assert set(lines) == set(known)
    assert all(lines[name].get("xAxis", "_step") in (metric.axis, "_step") for name, metric in known.items())
    assert {line.get("xAxis") for line in lines.values()} >= set(AXES) - {"step"}
    (bars,) = [panel["config"] for panel in found if panel["viewType"] == "Bar Chart"]
    assert [key.removeprefix("summary_metrics.") for key in bars["metrics"]] == [
        "monitors.items.emoji.base", "monitors.items.emoji.aligned",
    ]  # fmt: skip
    assert any("side_by_side" in json.dumps(panel) for panel in found)


def test_what_cannot_be_drawn_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = build(folder, entity="me")
    assert (report.project, report.title) == ("mine", "tiny: P[Love] rates the aligned policy 10% higher.")
    assert len(check(report)["blocks"]) == len(report.blocks) + 2
    (folder / "wandb" / "id").unlink()
    with pytest.raises(DataError, match="has no W&B run"):
        build(folder)
    with pytest.raises(SystemExit):
        main([str(folder), "--dry-run"])
    assert "--dry-run goes with --wandb" in capsys.readouterr().err
