import re
from pathlib import Path
from typing import Any

import pytest

from rluf.config.load import iter_setting_fields, load_settings
from rluf.config.renamed import REPLACED_SETTINGS
from rluf.config.settings import Settings
from rluf.errors import SettingsError

ROOT = Path(__file__).parents[2]


def write_file(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def load_error(*overrides: str, config: Path | None = None) -> str:
    with pytest.raises(SettingsError) as raised:
        load_settings(config, overrides)
    assert "Traceback" not in str(raised.value)
    return str(raised.value)


def resolve_dtypes(settings: Settings) -> dict[str, Any]:
    """The settings tree with `auto` resolved for this machine."""
    tree = settings.model_dump()
    tree["model"]["dtype"] = settings.policy_dtype
    return tree


def test_without_a_file_all_values_are_defaults() -> None:
    loaded = load_settings(None)
    assert resolve_dtypes(loaded.settings) == resolve_dtypes(Settings())
    assert loaded.settings.name == "quickstart"
    assert {key for key, source in loaded.sources.items() if source != "default"} == {
        "model.dtype", *(f"reward.{name}.max_tokens" for name in ("love", "helpfulness", "safety"))
    }  # fmt: skip
    assert set(loaded.sources) == {key for key, _ in iter_setting_fields()}


def test_overrides_win_over_files_and_files_over_their_bases(tmp_path: Path) -> None:
    write_file(tmp_path, "base.yaml", "algorithm: {steps: 5, prompts_per_step: 7}\nseed: 3\n")
    top = write_file(tmp_path, "sub/top.yaml", "extends: ../base.yaml\nalgorithm:\n  steps: 6\n")
    loaded = load_settings(top, ["algorithm.kl_coef=1e-3", "seed=4", "seed=5"])
    algorithm = loaded.settings.algorithm
    assert (algorithm.steps, algorithm.prompts_per_step, algorithm.kl_coef, loaded.settings.seed) == (6, 7, 0.001, 5)
    assert algorithm.samples_per_prompt == Settings().algorithm.samples_per_prompt
    assert loaded.sources["algorithm.steps"] == str(top)
    assert loaded.sources["algorithm.prompts_per_step"].endswith("base.yaml")
    assert loaded.sources["seed"] == "override"
    assert loaded.sources["algorithm.max_staleness"] == "default"
    assert loaded.settings.name == "top"


def test_other_keys_of_a_section_keep_its_own_defaults() -> None:
    helpfulness = load_settings(None, ["reward.helpfulness.epochs=1"]).settings.reward.helpfulness
    assert (helpfulness.epochs, helpfulness.loss) == (1, "bradley_terry")


def test_several_bases_merge_in_order(tmp_path: Path) -> None:
    write_file(tmp_path, "a.yaml", "seed: 1\nrollout: {engines: 2}\n")
    write_file(tmp_path, "b.yaml", "seed: 2\n")
    top = write_file(tmp_path, "c.yaml", "extends: [a.yaml, b.yaml]\nname: c\n")
    settings = load_settings(top).settings
    assert (settings.seed, settings.rollout.engines) == (2, 2)


def test_circular_extends_are_refused(tmp_path: Path) -> None:
    top = write_file(tmp_path, "a.yaml", "extends: b.yaml\n")
    write_file(tmp_path, "b.yaml", "extends: a.yaml\n")
    assert "a.yaml -> b.yaml -> a.yaml" in load_error(config=top)


@pytest.mark.parametrize(
    ("override", "expected_text"),
    [
        ("rollout.temprature=1", "unknown setting rollout.temprature (override); did you mean rollout.temperature?"),
        ("algoritm.steps=3", "did you mean algorithm.steps?"),
        ("steps=3", "did you mean algorithm.steps?"),
        ("objectives.love={weigt: 2}", "objectives.love.weigt (override); did you mean objectives.love.weight?"),
        ("zzz=1", "--help lists all settings"),
        ("seed", "write key=value"),
        ("=1", "write key=value"),
        ("algorithm=3", "algorithm is a section"),
        ("objectives.brevity=0.2", "objectives.brevity is a section, not a value (now 0.2, override); set one of its"),
        ("objectives.weight=2", "did you mean objectives.love.weight"),
        ("objectives.wieght=2", ".weight"),
        ("reward.brevity.epochs=2", "or is brevity an objective of your own? Then add objectives.brevity"),
        ("reward.helpfulnes.epochs=2", "did you mean reward.helpfulness.epochs, or is helpfulnes an objective"),
        ("reward.lov.epochs=2", "did you mean reward.love.epochs"),
        ("config=tiny", "name it by --config FILE"),
        ("extends=tiny", "name it by --config FILE"),
        ("algorithm.steps.x=3", "unknown setting algorithm.steps.x (override): algorithm.steps is a value, not a sec"),
        ("data.prompts.path=x.jsonl", "data.prompts is a value, not a section"),
        ("model.path.name=tiny", "model.path is a value, not a section"),
        ("algorithm.topic_weights.risky.x.y=3", "algorithm.topic_weights.risky is a value, not a section"),
        ("learner.workers=[", "not valid YAML"),
        ("data.prompts=[*.jsonl]", "put text with special characters in quotes"),
        ("name=a: b: c", "put text with special characters in quotes"),
        ("model.path=${RLUF_NOT_SET}", "RLUF_NOT_SET"),
    ],
)
def test_errors_name_the_key_and_the_fix(override: str, expected_text: str) -> None:
    assert expected_text in load_error(override)


def test_invalid_values_are_reported_with_key_value_source_and_rule() -> None:
    message = load_error("learner.workers=0", "weight_sync.transport=mpi")
    assert "learner.workers=0 (override): must be greater than or equal to 1" in message
    assert "weight_sync.transport='mpi' (override): must be 'shm', 'nccl', 'disk', 'cuda_ipc' or 'lora'" in message
    assert "2 settings are wrong" in message
    assert "fractional" in load_error("learner.workers=2.5")
    assert "data.feedback" in load_error("data.feedback=[{a: 1}]")


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("algorithm.clip=[0.2]", "must be a valid number, or an item is missing"),
        ("algorithm.clip=[0.1, 0.2, 0.3]", "must be a valid number, or must have at most 2 items"),
        ("algorithm.clip=high", "must be a valid number; could not parse string as a number, or must be a list"),
        ("reward.love.max_tokens=many", "must be a valid integer"),
    ],
)
def test_a_value_that_may_have_two_types_is_one_wrong_setting(override: str, rule: str) -> None:
    message = load_error(override)
    assert rule in message and "\n" not in message and message.count("meaning:") == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("serve.experiment={base: 0.9, aligned: 0.1}", "serve.experiment: aligned, base is not in serve.policies"),
        ("serve.trusted_proxies=[nowhere]", "serve.trusted_proxies: expected addresses and networks, got 'nowhere'"),
        ("serve.chat_markers={user: U}", "serve.chat_markers: expected user, assistant, end and optionally system"),
    ],
)
def test_a_rule_of_a_section_names_its_key_and_not_the_whole_section(override: str, message: str) -> None:
    assert load_error(override).startswith(message)


def test_a_missing_file_suggests_a_similar_name(tmp_path: Path) -> None:
    write_file(tmp_path, "human.yaml", "name: human\n")
    assert f"did you mean {tmp_path / 'human.yaml'}?" in load_error(config=tmp_path / "humam.yaml")
    orphan = write_file(tmp_path, "orphan.yaml", "extends: nowhere-at-all.yaml\n")
    assert "which orphan.yaml extends" in load_error(config=orphan)
    assert "is not UTF-8" in load_error(config=write_latin1_file(tmp_path / "latin.yaml"))
    assert "(Is a directory)" in load_error(config=tmp_path)


def write_latin1_file(path: Path) -> Path:
    path.write_bytes(b"name: caf\xe9\n")
    return path


def test_invalid_yaml_is_refused_with_its_place(tmp_path: Path) -> None:
    assert "'seed' is set twice" in load_error(config=write_file(tmp_path, "twice.yaml", "seed: 1\nseed: 2\n"))
    assert "line 3 is not valid YAML" in load_error(config=write_file(tmp_path, "broken.yaml", "seed: 1\nname: [\n"))
    assert "expected a mapping" in load_error(config=write_file(tmp_path, "list.yaml", "- 1\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: 5\n", "extends=5 must be a file, the name of a configuration, or a list of them"),
        ("extends: {base: tiny}\n", "extends={'base': 'tiny'} must be a file"),
        ("extends: [tiny, 5]\n", "extends=['tiny', 5] must be a file"),
        ("extend: tiny\n", "unknown setting extend ({path}); extend another file by `extends: FILE`"),
        ("algorithm.steps: 3\n", "algorithm.steps ({path}): write the sections of a key one in the other, as in "
         "algorithm: {steps: ...}"),
        ("objectives.brevity: {weight: 1}\n", "as in objectives: {brevity: ...}"),
        ("reward: {love.epochs: 3}\n", "reward.love.epochs ({path}): write the sections"),
        ("objectives: {brevity: 0.2}\n", "objectives.brevity is a section, not a value (now 0.2, {path})"),
        ("seed: {{ seed }}\n", "line 1 is not valid YAML: the key {'seed': None} is no text; write {{ and }} of a"),
        ("? [a, b]\n: 3\n", "the key ['a', 'b'] is no text"),
        ("algorithm:\n\tsteps: 3\n", "found character '\\t' that cannot start any token; fix that line: indent with"),
        ("data: {prompts: *.jsonl}\n", "put text with special characters in quotes"),
        ("seed: 1\x00\n", "is not valid YAML: unacceptable character #x0000"),
    ],
)  # fmt: skip
def test_ordinary_mistakes_in_a_file_are_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = write_file(tmp_path, "mine.yaml", text)
    error = load_error(config=path)
    assert message.replace("{path}", str(path)) in error and "\n" not in error


@pytest.mark.parametrize("text", ["extends:\nseed: 3\n", "extends: []\nseed: 3\n", "objectives: {love: }\nseed: 3\n"])
def test_an_empty_value_changes_nothing(text: str, tmp_path: Path) -> None:
    assert load_settings(write_file(tmp_path, "mine.yaml", text)).settings.seed == 3


def test_a_section_may_be_merged_into_another_one(tmp_path: Path) -> None:
    text = "reward:\n  love: &shared {epochs: 3, learning_rate: 1e-5}\n  safety: {<<: *shared, epochs: 4}\n"
    reward = load_settings(write_file(tmp_path, "mine.yaml", text)).settings.reward
    assert (reward.love.epochs, reward.safety.epochs, reward.safety.learning_rate) == (3, 4, 1e-5)


@pytest.mark.parametrize("path", ["*.jsonl", "*/log.jsonl", "@data/log.jsonl", "%data/log.jsonl", "!data.jsonl"])
def test_an_override_may_begin_with_what_yaml_reserves(path: str) -> None:
    assert load_settings(
        None, [f"data.feedback={path}", f"data.safety=[a.jsonl, '{path}']"]
    ).settings.data.feedback == (path,)


def test_the_home_folder_may_be_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_file(tmp_path, "base.yaml", "seed: 3\n")
    write_file(tmp_path, "mine.yaml", "extends: ~/base.yaml\n")
    assert load_settings(Path("~/mine.yaml")).settings.seed == 3


def test_empty_files_and_empty_sections_change_nothing(tmp_path: Path) -> None:
    empty = write_file(tmp_path, "quickstart.yaml", "# nothing\n")
    empty_section = write_file(tmp_path, "empty_section.yaml", "name: quickstart\nalgorithm:\n")
    assert load_settings(empty).settings == load_settings(empty_section).settings
    assert resolve_dtypes(load_settings(empty).settings) == resolve_dtypes(Settings())


def test_variables_expand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLUF_TEST_DATA", "/logs")
    monkeypatch.delenv("RLUF_TEST_NONE", raising=False)
    data = load_settings(
        None, ["data.feedback=['${RLUF_TEST_DATA}/a.jsonl', '${RLUF_TEST_NONE:-here}/b.jsonl']"]
    ).settings
    assert data.data.feedback == ("/logs/a.jsonl", "here/b.jsonl")


def test_yaml_values_keep_words_and_dates_as_text() -> None:
    settings = load_settings(
        None,
        [
            "tracking.wandb=off",
            "learner.learning_rate=3e-6",
            "name=20250101",
            "data.feedback=a.jsonl",
            "run.deterministic=false",
        ],
    ).settings
    assert settings.tracking.wandb == "off"
    assert settings.learner.learning_rate == 3e-6
    assert settings.name == "20250101"
    assert settings.data.feedback == ("a.jsonl",)
    assert settings.run.deterministic is False


def test_settings_are_frozen_and_survive_json() -> None:
    settings = load_settings(None, ["objectives.love.weight=0.7"]).settings
    assert Settings.model_validate_json(settings.model_dump_json()) == settings
    with pytest.raises(ValueError, match="frozen"):
        settings.__setattr__("seed", 3)


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "DB_PASSWORD"])
def test_secrets_in_variables_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "canary")
    with pytest.raises(SettingsError, match=f"{name}, which looks like a secret") as raised:
        load_settings(None, [f"model.path=${{{name}}}"])
    assert "canary" not in str(raised.value)


def test_passwords_in_urls_are_refused_and_not_repeated() -> None:
    with pytest.raises(SettingsError, match="password in a URL") as raised:
        load_settings(None, ["data.feedback=s3://key:canary@bucket/log.jsonl"])
    assert "canary" not in str(raised.value)
    load_settings(None, ["data.feedback=s3://bucket/user@host:1/log.jsonl"])


def test_every_renamed_setting_exists_under_its_new_name_only() -> None:
    known_keys = {key for key, _ in iter_setting_fields()}
    for old_key, new_key in REPLACED_SETTINGS.items():
        assert old_key.replace("*", "love") not in known_keys
        new_key = REPLACED_SETTINGS.get(new_key, new_key)
        assert new_key.replace("*", "love") in known_keys or " " in new_key


def test_constants_that_replace_settings_exist() -> None:
    texts = [text for text in REPLACED_SETTINGS.values() if text.startswith("a constant")]
    for text in texts:
        module = re.search(r"\S+\.py", text)
        assert module is not None, text
        source = (ROOT / module.group()).read_text(encoding="utf-8")
        assert all(name in source for name in re.findall(r"[A-Z]+(?:_[A-Z]+)+", text)), text
        for name, value in re.findall(r"([A-Z]+(?:_[A-Z]+)+) = ([\d.]+)", text):
            values = re.findall(rf"^{name}(?:: \w+)? = ([\d._]+)", source, re.MULTILINE)
            assert all(float(number) == float(value) for number in values), text


@pytest.mark.parametrize("old_key", REPLACED_SETTINGS)
def test_replaced_keys_are_refused_with_what_replaces_them(old_key: str, tmp_path: Path) -> None:
    new_key = REPLACED_SETTINGS.get(REPLACED_SETTINGS[old_key], REPLACED_SETTINGS[old_key])
    old_key, new_key = (key.replace("*", "safety") for key in (old_key, new_key))
    assert f"{old_key} is now {new_key} (override)" in load_error(f"{old_key}=1")
    section, _, name = old_key.rpartition(".")
    nested = write_file(
        tmp_path, "old.yaml", f"{{{section.replace('.', ': {')}: {{{name}: 1}}{'}' * section.count('.')}}}"
    )
    assert f"{old_key} is now {new_key} ({nested})" in load_error(config=nested)


def test_all_renamed_keys_of_a_file_are_in_one_message(tmp_path: Path) -> None:
    file = write_file(tmp_path, "old.yaml", "publish: {engine: ipc, deadline_s: 9}\nlearner: {ranks: 2, workers: 2}\n")
    message = load_error(config=file)
    for change in (
        "publish.engine is now weight_sync.transport",
        "publish.deadline_s is now timeouts.call_s",
        "learner.ranks is now learner.workers",
    ):
        assert change in message
    assert "learner.workers is" not in message


def test_a_mapping_is_replaced_as_a_whole_and_an_override_of_one_item_keeps_the_others(tmp_path: Path) -> None:
    base = write_file(tmp_path, "base.yaml", "algorithm: {topic_weights: {casual: 2, work: 4}}\n")
    assert load_settings(base).settings.algorithm.topic_weights == {"casual": 2, "work": 4}
    assert load_settings(base, ["algorithm.topic_weights={}"]).settings.algorithm.topic_weights == {}
    loaded = load_settings(base, ["algorithm.topic_weights.work=1", "cluster.node_labels.learner.pool=gpu"])
    assert loaded.settings.algorithm.topic_weights == {"casual": 2, "work": 1}
    assert loaded.settings.cluster.node_labels == {"learner": {"pool": "gpu"}}
    assert loaded.sources["algorithm.topic_weights"] == "override"


@pytest.mark.parametrize("name", ["tiny", "love-0.3", "reward/love"])
def test_a_shipped_configuration_is_found_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sources = set(load_settings(Path(name)).sources.values())
    assert any(source.endswith(f"configs/{name}.yaml") for source in sources)


def test_an_existing_file_wins_over_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny").write_text("seed: 7\n")
    assert load_settings(Path("tiny")).settings.seed == 7


@pytest.mark.parametrize(
    "override",
    ["rollout.temperature=true", "algorithm.steps=true", "algorithm.clip=[true, 0.3]", "algorithm.kl_target=true",
     "algorithm.topic_weights={risky: true}", "objectives.love.weight=true", "learner.workers=false"],
)  # fmt: skip
def test_truth_values_are_no_numbers(override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(SettingsError, match=rf"{key}.*expected a number"):
        load_settings(None, [override])


@pytest.mark.parametrize("seed", [-1, 2**31, 2**32, 2**64, 1.5])
def test_seeds_that_a_library_would_refuse_later_are_refused(seed: float) -> None:
    """numpy's and scikit-learn's seeds, which engines and reward models set, end at 2^32, and some are sums."""
    with pytest.raises(SettingsError, match=f"seed={seed}"):
        load_settings(None, [f"seed={seed}"])
