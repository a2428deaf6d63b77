"""Objectives of any name: from YAML and from the command line, their defaults, and the names that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from rluf.config.cli import format_dry_run
from rluf.config.derived import plan_actor_pools
from rluf.config.load import load_settings
from rluf.config.objectives import BUILTIN_OBJECTIVES, find_objective_spec, find_spec_by_data_key
from rluf.config.settings import Settings
from rluf.errors import SettingsError
from rluf.reward.__main__ import select_objectives
from rluf.tracking.metric_registry import RENAMED_METRICS, STEP_METRICS

BREVITY = ("objectives.brevity={source: judge, path: length, weight: 0.2}",)
WARMTH = ("objectives.warmth.weight=0.1", "data.labels.warmth=sample:safety", "reward.warmth.epochs=3")


def load_error(*overrides: str) -> str:
    with pytest.raises(SettingsError) as raised:
        load_settings(None, overrides)
    return str(raised.value)


def test_a_file_adds_objectives_and_another_one_changes_them(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "data: {labels: {warmth: sample:safety}}\n"
        "objectives:\n  brevity: {source: judge, path: length, weight: 0.2}\n  warmth: {gate: must_rise}\n"
        "reward: {warmth: {backbone: tiny-encoder}}\n"
    )
    (tmp_path / "top.yaml").write_text(
        "extends: base.yaml\nobjectives: {brevity: {weight: 0.5}, love: {weight: 0.3}}\n"
    )
    loaded = load_settings(tmp_path / "top.yaml", ["reward.warmth.epochs=1"])
    settings = loaded.settings
    assert list(settings.objectives.by_objective) == ["love", "helpfulness", "safety", "brevity", "warmth"]
    brevity, warmth = (settings.objectives.by_objective[name] for name in ("brevity", "warmth"))
    assert (brevity.weight, brevity.path) == (0.5, "length")
    assert (warmth.weight, warmth.source, warmth.replicas) == (0.0, "model", 1)
    assert settings.objectives.helpfulness == Settings().objectives.helpfulness
    model = settings.reward.get_head_settings("warmth")
    assert (model.backbone, model.epochs, model.loss) == ("tiny-encoder", 1, "bce")
    assert {name: spec.gate for name, spec in settings.objectives.specs.items()} == {
        "love": "must_rise",
        "helpfulness": "must_hold",
        "safety": "must_hold",
        "brevity": "must_hold",
        "warmth": "must_rise",
    }
    assert loaded.sources["objectives.brevity.weight"] == str(tmp_path / "top.yaml")
    assert loaded.sources["objectives.warmth.gate"] == str(tmp_path / "base.yaml")
    assert loaded.sources["reward.warmth.epochs"] == "override"
    assert Settings.model_validate_json(settings.model_dump_json()) == settings


def test_overrides_add_objectives_and_the_dry_run_prints_settings_that_load_again(tmp_path: Path) -> None:
    loaded = load_settings(None, [*BREVITY, *WARMTH])
    text = format_dry_run(loaded)
    assert "  brevity:\n    weight: 0.2 " in text
    assert "  labels: {warmth: [sample:safety]} " in text
    assert "# warmth reward: 1 x " in text
    (tmp_path / "quickstart.yaml").write_text(text)
    assert load_settings(tmp_path / "quickstart.yaml").settings == loaded.settings
    pools = {pool.name: pool for pool in plan_actor_pools(loaded.settings)}
    assert pools["brevity reward"].bytes_per_actor == 0
    assert pools["warmth reward"].bytes_per_actor == pools["love reward"].bytes_per_actor


def test_labeled_rows_are_a_kind_of_data_of_their_own() -> None:
    data = load_settings(None, [*WARMTH, "data.labels.warmth=[a.jsonl, {reader: diasafety, path: b}]"]).settings.data
    assert list(data.sources_by_kind) == ["feedback", "reactions", "preferences", "safety", "labels.warmth", "prompts"]
    assert data.sources_by_kind["labels.warmth"] == data.labels["warmth"]
    assert [str(getattr(entry, "reader", entry)) for entry in data.labels["warmth"]] == ["a.jsonl", "diasafety"]
    spec = find_spec_by_data_key("labels.warmth")
    assert spec == find_objective_spec("warmth")
    assert [find_spec_by_data_key(spec.data_key) for spec in BUILTIN_OBJECTIVES.values()] == [
        *BUILTIN_OBJECTIVES.values()
    ]


def test_rluf_reward_trains_the_objectives_that_have_data() -> None:
    overrides = [*BREVITY, *WARMTH, "objectives.wit.path=models/wit"]
    assert select_objectives(load_settings(None, overrides).settings) == ("love", "helpfulness", "safety", "warmth")


@pytest.mark.parametrize(
    ("overrides", "expected_words"),
    [
        (["objectives.lvoe.weight=0.3"], ["objectives.lvoe", "data.labels.lvoe", "did you mean objectives.love?"]),
        (["objectives.warmth.path=http://host:1"], ["objectives.warmth.source=model", "http://host:1"]),
        ([*BREVITY, "objectives.brevity.weigth=1"], ["unknown setting", "did you mean objectives.brevity.weight?"]),
        ([*BREVITY, "objectives.brevity.weight=-1"], ["objectives.brevity.weight=-1 (override)"]),
        (["objectives.brevity=3"], ["objectives.brevity is a section", "objectives.brevity.weight"]),
        (["reward.warmth.epochs=1"], ["unknown setting reward.warmth.epochs (override)", "did you mean"]),
        ([*WARMTH, "reward.warmht.epochs=1"], ["unknown setting reward.warmht", "did you mean reward.warmth.epochs"]),
        (["data.labels.warmth=sample:safety"], ["data.labels", "'warmth'"]),
        (["data.labels.safety=sample:safety"], ["data.labels", "'safety'", "data.safety"]),
        ([*WARMTH, "data.labels.warmth=openai:logs/"], ["{reader: openai, path: logs/}"]),
        (["reward.objectives=[kindness]"], ["reward.objectives", "'kindness'", "love, helpfulness, safety"]),
        ([*BREVITY, "reward.objectives=[brevity]"], ["brevity", "no data", "data.labels.brevity"]),
        (["reward.shared_backbone_heads=[love, kind]"], ["'kind'", "continued, thumbs"]),
        (["serve.objectives=[love, kindness]"], ["serve.objectives", "'kindness'"]),
        ([*WARMTH, "reward.warmth.loss=bradley_terry"], ["reward.warmth.loss=bradley_terry", "reward.warmth.loss=bce"]),
        ([*WARMTH, "reward.warmth.debias=[users]"], ["reward.warmth.debias=['users']"]),
        (["objectives.combine={a: 1}"], ["objectives.combine is now aggregation.method"]),
    ],
)
def test_wrong_objectives_are_refused_with_a_fix(overrides: list[str], expected_words: list[str]) -> None:
    message = load_error(*overrides)
    assert [word for word in expected_words if word not in message] == []


@pytest.mark.parametrize(
    "name",
    [
        *(spec.key for spec in STEP_METRICS),
        *RENAMED_METRICS,
        *("workers", "copy", "Warmth", "2fast", "a-b", "p_love", "data", "warmth_raw"),
    ],
)
def test_names_that_would_collide_are_refused(name: str) -> None:
    assert f"objectives.{name} (override) cannot name an objective" in load_error(f"objectives={{{name}: {{}}}}")
    with pytest.raises(ValueError, match="cannot name an objective"):
        Settings.model_validate({"objectives": {name: {}}})


def test_a_judge_or_a_function_needs_a_name() -> None:
    settings = load_settings(None, ["objectives.lists={source: function, path: 'mine:score', weight: 0.1}"]).settings
    assert settings.objectives.by_objective["lists"].rule_arguments == {"reward": "mine:score"}
    for source in ("judge", "function"):
        message = f"objectives.lists.source={source} needs objectives.lists.path (now none)"
        assert message in load_error(f"objectives.lists.source={source}")
