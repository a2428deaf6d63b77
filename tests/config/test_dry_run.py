"""--dry-run refuses what the run would refuse, with the exit code of the run, and needs neither network nor Ray."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rluf.train.__main__ as train_command

SHIPPED_CONFIGS = sorted(Path(__file__).parents[2].glob("configs/*.yaml"))


@pytest.mark.parametrize(
    ("override", "exit_code", "message"),
    [
        ("model.path=./missing", 4, "'./missing' is neither"),
        ("model.path=/missing/qwen-7b", 4, "neither"),
        ("objectives.helpfulness.path=./missing", 4, "objectives.helpfulness.path=./missing"),
        ("objectives.helpfulness.path=mine:score", 4, "for a function set objectives.helpfulness.source=function"),
        ("data.prompts=missing.jsonl", 3, "missing.jsonl"),
        ("data.feedback={reader: nosuch, path: x.jsonl}", 3, "nosuch"),
        ("evaluate.monitors=[nowhere:shout]", 2, "nowhere"),
        ("tracking.trackers=[nowhere:create]", 2, "nowhere"),
        ("aggregation.gate_judges=[nosuch]", 2, "nosuch"),
        ("algorithm.name=nowhere:BEST", 2, "nowhere"),
        ("run.root=/dev/null/runs", 5, "/dev/null/runs"),
        ("run.resume=./nowhere", 4, "no complete checkpoint"),
        ("reward.love.backbone=./missing", 4, "reward.love: backbone './missing'"),
        ("data.feedback=[]", 3, "data.feedback, which is empty"),
        ("data.safety=[]", 3, "data.safety, which is empty"),
        ("data.prompts=[]", 3, "data.prompts is empty"),
    ],
)
def test_dry_run_refuses_what_the_run_would_refuse(
    override: str, exit_code: int, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    root = [] if override.startswith("run.root") else [f"run.root={tmp_path}"]
    with pytest.raises(SystemExit) as caught:
        train_command.main(["--dry-run", override, *root])
    output = capsys.readouterr()
    assert caught.value.code == exit_code
    assert message in output.err
    assert len(output.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.safety=[]", "algorithm.demonstrations=2"],
            "algorithm.demonstrations=2 trains on responses of data.safety",
        ),
        (["data.safety=[]", "algorithm.demonstrations=0"], ""),
        (["data.safety=[]", "algorithm.demonstrations=2", "aggregation.topic_objectives={}"], ""),
        (["data.safety=[]", "algorithm.demonstrations=2", "algorithm.name=sft"], ""),
        (
            ["data.safety=[]", "data.feedback=[]", "algorithm.name=kto"],
            "algorithm.name=kto trains on responses of data.f",
        ),
        (["data.preferences=[]", "algorithm.name=dpo"], "algorithm.name=dpo trains on responses of data.preferences"),
        (["data.preferences=[]"], ""),
    ],
)
def test_a_run_is_refused_before_it_starts_if_the_policy_has_no_responses_to_train_on(
    overrides: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    judges = [f"objectives.{name}={{source: judge, path: repetition}}" for name in ("love", "helpfulness", "safety")]
    with pytest.raises(SystemExit) as caught:
        train_command.main(["--dry-run", *judges, "objectives.love.weight=1", *overrides, f"run.root={tmp_path}"])
    error = capsys.readouterr().err
    assert (caught.value.code, message in error) == (3 if message else 0, True), error


@pytest.mark.parametrize("config", SHIPPED_CONFIGS, ids=lambda path: path.name)
def test_the_shipped_configs_pass_the_dry_run(
    config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("RLUF_DATA", str(tmp_path))
    for file in re.findall(r"RLUF_DATA:-[^}]*}/([^\s\"]+)", config.read_text()):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    with pytest.raises(SystemExit) as caught:
        train_command.main(["--dry-run", "--config", str(config), f"run.root={tmp_path}", f"run.cache={tmp_path}"])
    assert caught.value.code == 0, capsys.readouterr().err


def test_a_hub_id_is_not_downloaded_by_the_dry_run(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "rluf.train",
        "--dry-run",
        "objectives.love.path=owner/model",
        f"run.root={tmp_path}",
    ]
    completed = subprocess.run(
        command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=60
    )
    assert completed.returncode == 0, completed.stderr


@pytest.mark.parametrize(
    ("command", "override", "exit_code"),
    [
        ("evaluate", "evaluate.candidate=./missing", 4),
        ("evaluate", "data.prompts=missing.jsonl", 3),
        ("reward", "data.feedback=missing.jsonl", 3),
        ("reward", "objectives.safety.path=./missing", 4),
        ("reward", "reward.helpfulness.backbone=./missing", 4),
        ("evaluate", "evaluate.candidate=null", 4),
        ("evaluate", "evaluate.monitors=[nowhere:shout]", 2),
        ("evaluate", "data.prompts=[]", 3),
        ("simulate", "model.path=./missing", 4),
        ("serve", "serve.policies={base: ./missing}", 4),
        ("serve", "objectives.love.path=./missing", 4),
        ("prepare", "data.feedback=missing.jsonl", 3),
        ("prepare", "data.labels={warmth: missing.jsonl}", 2),
        ("prepare", "data.prompts=hub:owner/prompts", 0),
    ],
)
def test_the_dry_runs_of_other_commands_refuse_too(
    command: str, override: str, exit_code: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    main = importlib.import_module(f"rluf.{command}.__main__").main
    with pytest.raises(SystemExit) as caught:
        main(["--dry-run", override, f"run.root={tmp_path}"])
    assert caught.value.code == exit_code
    assert len(capsys.readouterr().err.strip().splitlines()) == min(exit_code, 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "has no readable config.json"),
        ("{}", "has architecture none"),
        ('{"architectures": ["BertForMaskedLM"]}', "the policy must be a causal language model"),
        ('{"architectures": ["LlamaForSequenceClassification"]}', "has architecture LlamaForSequenceClassification"),
        (
            '{"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "gptq"}}',
            "are quantized (gptq)",
        ),
        ('{"architectures": ["LlamaForCausalLM"]}', ""),
    ],
)
def test_the_dry_run_refuses_a_folder_without_a_policy(
    config: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, text in (("config.json", config), ("tokenizer_config.json", "{}"), ("model.safetensors", "")):
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as caught:
        train_command.main(["--dry-run", f"model.path={tmp_path}"])
    assert caught.value.code == (4 if message else 0) and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "message"),
    [("policy/config.json", "the policy of this run is in"), ("adapter_config.json", "LoRA adapter")],
)
def test_a_folder_that_contains_or_belongs_to_a_model_gets_a_hint(
    file: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("{}")
    with pytest.raises(SystemExit):
        train_command.main(["--dry-run", f"model.path={tmp_path}"])
    assert message in capsys.readouterr().err
