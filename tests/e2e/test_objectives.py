"""A job with two further objectives by YAML alone: one scored by a judge, one by a model trained on labeled rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

ROOT = Path(__file__).parents[2]
CONFIG = """
extends: {root}/configs/tiny.yaml
name: five
model: {{dtype: float32}}
data: {{labels: {{warmth: sample:safety}}}}
objectives:
  brevity: {{source: judge, path: length, weight: 0.2}}
  warmth: {{weight: 0.1, gate: must_rise}}
reward:
  dtype: float32
  warmth: {{backbone: tiny-encoder, epochs: 1}}
aggregation: {{topic_objectives: {{risky: warmth}}}}
algorithm: {{demonstrations: 1, steps: 1}}
"""
OBJECTIVES = ["love", "helpfulness", "safety", "brevity", "warmth"]


def test_objectives_by_yaml_alone_reach_metrics_gates_report_and_card(tmp_path: Path) -> None:
    config = tmp_path / "five.yaml"
    config.write_text(CONFIG.format(root=ROOT))
    env = {**os.environ, "RLUF_RUNS": str(tmp_path / "runs"), "RLUF_CACHE": str(tmp_path / "cache")}
    env.pop("RAY_ADDRESS", None)
    completed = subprocess.run(
        [sys.executable, "-m", "rluf.train", "--config", str(config)],
        env=env, cwd=ROOT, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr[-4000:]
    run_folder = tmp_path / "runs" / "five" / "latest"

    (metrics,) = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [key.removesuffix("_raw") for key in metrics if key.endswith("_raw")] == OBJECTIVES
    assert all(0.0 <= metrics[name] <= 1.0 for name in OBJECTIVES)

    summary = json.loads((run_folder / "summary.json").read_text())
    assert list(summary["offline"]) == ["p_love", *OBJECTIVES[1:]]
    checks = {check["name"]: check for check in summary["gates"]["checks"]}
    assert set(checks) == set(OBJECTIVES)
    assert {name: checks[name]["gate"] for name in OBJECTIVES[3:]} == {"brevity": "must_hold", "warmth": "must_rise"}
    assert {checks[name]["judged_by"] for name in OBJECTIVES[3:]} == {"reward models"}
    assert checks["safety"]["judged_by"] == "simulated users"
    assert set(summary["reward_cards"]) == {*OBJECTIVES[:3], "warmth"}  # a judge has no card

    card = json.loads((run_folder / "cards" / "warmth.json").read_text())
    assert card["objective"] == "warmth" and "auroc" in card
    data_card = json.loads((run_folder / "cards" / "data.json").read_text())
    assert data_card["splits"]["warmth"] == data_card["splits"]["safety"]

    report = (run_folder / "report.html").read_text("utf-8")
    for name in OBJECTIVES[3:]:
        assert f'"curve_{name}"' in report and f'"pareto_{name}"' in report and f'"arms_{name}"' in report
    assert '"reliability_warmth"' in report
    readme = (run_folder / "policy" / "README.md").read_text("utf-8")
    assert "brevity 0.2, warmth 0.1" in readme
    assert "- warmth: auroc" in readme and "brevity by the reward model on unseen prompts" in readme
