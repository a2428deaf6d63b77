from pathlib import Path
from typing import Any

import pytest

from rluf.config.load import fields, load_settings
from rluf.config.settings import Settings
from rluf.errors import SettingsError


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refused(*overrides: str, config: Path | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings(config, overrides)
    assert "Traceback" not in str(caught.value)
    return str(caught.value)


def _plain(settings: Settings) -> dict[str, Any]:
    """The tree with what `auto` means here."""
    tree = settings.model_dump()
    tree["model"]["dtype"], tree["reward"]["dtype"] = settings.policy_dtype, settings.reward_dtype
    return tree


def test_without_anything_it_is_the_quickstart() -> None:
    loaded = load_settings(None)
    assert _plain(loaded.settings) == _plain(Settings())
    assert loaded.settings.name == "quickstart"
    assert {key for key, source in loaded.sources.items() if source != "default"} == {"model.dtype", "reward.dtype"}
    assert set(loaded.sources) == {key for key, _ in fields()}


def test_override_wins_over_file_wins_over_base(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "algorithm: {steps: 5, prompts_per_step: 7}\nseed: 3\n")
    top = write(tmp_path, "sub/top.yaml", "extends: ../base.yaml\nalgorithm:\n  steps: 6\n")
    loaded = load_settings(top, ["algorithm.kl_coef=1e-3", "seed=4", "seed=5"])
    algorithm = loaded.settings.algorithm
    assert (algorithm.steps, algorithm.prompts_per_step, algorithm.kl_coef, loaded.settings.seed) == (6, 7, 0.001, 5)
    assert algorithm.samples_per_prompt == Settings().algorithm.samples_per_prompt
    assert loaded.sources["algorithm.steps"] == str(top)
    assert loaded.sources["algorithm.prompts_per_step"].endswith("base.yaml")
    assert loaded.sources["seed"] == "override"
    assert loaded.sources["algorithm.staleness"] == "default"
    assert loaded.settings.name == "top"


def test_a_part_of_a_section_keeps_that_sections_own_defaults() -> None:
    helpfulness = load_settings(None, ["reward.helpfulness.epochs=1"]).settings.reward.helpfulness
    assert (helpfulness.epochs, helpfulness.loss) == (1, "bradley_terry")


def test_several_bases_merge_in_order(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "seed: 1\nrollout: {engines: 2}\n")
    write(tmp_path, "b.yaml", "seed: 2\n")
    top = write(tmp_path, "c.yaml", "extends: [a.yaml, b.yaml]\nname: c\n")
    settings = load_settings(top).settings
    assert (settings.seed, settings.rollout.engines) == (2, 2)


def test_files_in_a_circle_are_refused(tmp_path: Path) -> None:
    top = write(tmp_path, "a.yaml", "extends: b.yaml\n")
    write(tmp_path, "b.yaml", "extends: a.yaml\n")
    assert "a.yaml -> b.yaml -> a.yaml" in refused(config=top)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("rollout.temprature=1", "unknown setting rollout.temprature (override); did you mean rollout.temperature?"),
        ("algoritm.steps=3", "did you mean algorithm.steps?"),
        ("steps=3", "did you mean algorithm.steps?"),
        ("objectives.love={weigt: 2}", "objectives.love.weigt (override); did you mean objectives.love.weight?"),
        ("zzz=1", "--help lists all settings"),
        ("seed", "write key=value"),
        ("=1", "write key=value"),
        ("algorithm=3", "algorithm is a section"),
        ("learner.ranks=[", "not valid YAML"),
        ("model.path=${RLUF_NOT_SET}", "RLUF_NOT_SET"),
    ],
)
def test_refusals_name_the_key_and_the_way_out(override: str, told: str) -> None:
    assert told in refused(override)


def test_wrong_values_name_key_value_source_and_rule() -> None:
    message = refused("learner.ranks=0", "publish.engine=mpi")
    assert "learner.ranks=0 (override): must be greater than or equal to 1" in message
    assert "publish.engine='mpi' (override): must be 'shm', 'nccl', 'tcp', 'disk', 'ipc' or 'adapter'" in message
    assert "2 settings are wrong" in message
    assert "fractional" in refused("learner.ranks=2.5")
    assert "data.feedback" in refused("data.feedback=[{a: 1}]")


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "human.yaml", "name: human\n")
    assert f"did you mean {tmp_path / 'human.yaml'}?" in refused(config=tmp_path / "humam.yaml")
    lonely = write(tmp_path, "lonely.yaml", "extends: nowhere-at-all.yaml\n")
    assert "which lonely.yaml extends" in refused(config=lonely)
    assert "is not UTF-8" in refused(config=_bytes(tmp_path / "latin.yaml"))
    assert "(Is a directory)" in refused(config=tmp_path)


def _bytes(path: Path) -> Path:
    path.write_bytes(b"name: caf\xe9\n")
    return path


def test_yaml_with_a_key_said_twice_or_not_a_mapping_is_refused(tmp_path: Path) -> None:
    assert "'seed' is set twice" in refused(config=write(tmp_path, "twice.yaml", "seed: 1\nseed: 2\n"))
    assert "line 3 is not valid YAML" in refused(config=write(tmp_path, "broken.yaml", "seed: 1\nname: [\n"))
    assert "not a mapping" in refused(config=write(tmp_path, "list.yaml", "- 1\n"))


def test_empty_files_and_empty_sections_change_nothing(tmp_path: Path) -> None:
    empty = write(tmp_path, "quickstart.yaml", "# nothing\n")
    hollow = write(tmp_path, "hollow.yaml", "name: quickstart\nalgorithm:\n")
    assert load_settings(empty).settings == load_settings(hollow).settings
    assert _plain(load_settings(empty).settings) == _plain(Settings())


def test_variables_expand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLUF_TEST_DATA", "/logs")
    monkeypatch.delenv("RLUF_TEST_NONE", raising=False)
    data = load_settings(
        None, ["data.feedback=['${RLUF_TEST_DATA}/a.jsonl', '${RLUF_TEST_NONE:-here}/b.jsonl']"]
    ).settings
    assert data.data.feedback == ("/logs/a.jsonl", "here/b.jsonl")


def test_values_are_typed_as_yaml_without_its_traps() -> None:
    settings = load_settings(
        None,
        [
            "tracking.wandb=off",
            "learner.learning_rate=3e-6",
            "name=20250101",
            "data.feedback=a.jsonl",
            "run.reuse=false",
        ],
    ).settings
    assert settings.tracking.wandb == "off"
    assert settings.learner.learning_rate == 3e-6
    assert settings.name == "20250101"
    assert settings.data.feedback == ("a.jsonl",)
    assert settings.run.reuse is False


def test_settings_are_frozen_and_survive_json() -> None:
    settings = load_settings(None, ["objectives.love.weight=0.7"]).settings
    assert Settings.model_validate_json(settings.model_dump_json()) == settings
    with pytest.raises(ValueError, match="frozen"):
        settings.__setattr__("seed", 3)


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "DB_PASSWORD"])
def test_a_secret_is_never_taken_into_the_settings(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "canary")
    with pytest.raises(SettingsError, match=f"{name}, which looks like a secret") as caught:
        load_settings(None, [f"model.path=${{{name}}}"])
    assert "canary" not in str(caught.value)


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(SettingsError, match="password before the @") as caught:
        load_settings(None, ["data.feedback=s3://key:canary@bucket/log.jsonl"])
    assert "canary" not in str(caught.value)
    load_settings(None, ["data.feedback=s3://bucket/user@host:1/log.jsonl"])
