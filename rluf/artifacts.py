"""Inputs of training: input checks, the prepared data artifact and the reward model artifacts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rluf.algorithms.registry import check_algorithm, find_algorithm
from rluf.config.derived import list_configured_reward_folders
from rluf.config.objectives import find_objective_spec
from rluf.config.reward import ObjectiveSettings
from rluf.config.settings import Settings
from rluf.errors import DataError, ModelError
from rluf.models.hub import check_causal_lm, find_model_folder, list_embedded_models, resolve_model
from rluf.objectives.judges import build_rule_scorer, load_judge
from rluf.objectives.reward_function import list_required_fields
from rluf.reward.external import check_external_model
from rluf.tracking.plugin_tracker import load_tracker
from rluf.utils.cache import Artifact, build_or_reuse, build_or_reuse_all, hash_files, hash_source_code
from rluf.utils.paths import check_cache_writable, check_writable, resolve_cache_folder, resolve_runs_root
from rluf.utils.plugins import load_plugin


def check_inputs(
    settings: Settings, *, may_download: bool = True, trained_objectives: Sequence[str] | None = None
) -> None:
    """Check every log, model, judge, plug-in and output folder before anything starts.

    With `may_download` false models and data sets on the hub are not downloaded to check them. `trained_objectives`
    get a reward model; by default those with neither a path nor another source. Raises DataError for a missing log or
    an objective without one, ModelError for a model that cannot be used, SettingsError for a judge or another plug-in
    that cannot be imported, ResourceError for a folder that is not writable.
    """
    # Imported here, since pyarrow and fsspec are slow to import.
    from rluf.prepare.readers.sources import is_hub_data_set, resolve_sources

    for data_kind, log_entries in settings.data.sources_by_kind.items():
        local_entries = [entry for entry in log_entries if may_download or not is_hub_data_set(entry)]
        resolve_sources(local_entries, data_kind)
    check_writable(resolve_runs_root(settings))
    check_cache_writable(resolve_cache_folder(settings))
    for objective_name, objective_settings in settings.objectives.by_objective.items():
        if objective_settings.source == "serve":
            continue  # the reward actors check at their start whether the service answers
        if objective_settings.source in ("judge", "function"):
            build_rule_scorer(objective_name, **objective_settings.rule_arguments)
            continue
        if objective_settings.path is not None:
            key = f"objectives.{objective_name}.path"
            model_folder = _resolve_reward_model(settings, key, objective_settings.path, may_download=may_download)
            if model_folder is not None:
                check_external_model(model_folder, key)
    for objective_name in list_trained_objectives(settings) if trained_objectives is None else trained_objectives:
        _check_reward_training(settings, objective_name)
    policy_folder = find_model_folder(settings.model.path)
    if policy_folder is not None:
        check_causal_lm(policy_folder)
    check_algorithm(settings.algorithm)
    for judge in settings.aggregation.gate_judges:
        load_judge(judge)
    for tracker in settings.tracking.trackers:
        load_tracker(tracker)


def check_training_rows(settings: Settings) -> None:
    """Check that the logged responses which the policy itself is trained on have a log. Raises DataError."""
    algorithm, topic_objectives = settings.algorithm, settings.aggregation.topic_objectives
    if find_algorithm(algorithm.name).offline:
        key, objectives = f"algorithm.name={algorithm.name}", {"helpfulness" if algorithm.name == "dpo" else "love"}
        advice = "choose another algorithm"
    else:
        key, objectives = f"algorithm.demonstrations={algorithm.demonstrations}", set(topic_objectives.values())
        advice = f"set algorithm.demonstrations=0 (aggregation.topic_objectives={topic_objectives})"
        if not algorithm.demonstrations:
            return
    for objective in sorted(objectives):
        data_key = find_objective_spec(objective).data_key
        if not settings.data.sources_by_kind.get(data_key):
            raise DataError(
                f"{key} trains on responses of data.{data_key}, which is empty; name a log there, or {advice}"
            )


def list_trained_objectives(settings: Settings) -> list[str]:
    """Objectives whose reward model is trained on the log."""
    return [
        name
        for name, objective in settings.objectives.by_objective.items()
        if objective.source == "model" and objective.path is None
    ]


def _check_reward_training(settings: Settings, objective_name: str) -> None:
    """Check that a reward model has a log to train on, and backbones that exist."""
    if objective_name not in settings.objectives.by_objective:
        return  # a further head on the rows of an objective, such as dislike
    data_key = find_objective_spec(objective_name).data_key
    if not settings.data.sources_by_kind.get(data_key):
        raise DataError(
            f"objectives.{objective_name} is trained on data.{data_key}, which is empty; name a log "
            f"there, or set objectives.{objective_name}.path to a reward model"
        )
    for backbone in {member.backbone for member in settings.reward.get_head_settings(objective_name).member_specs}:
        try:
            find_model_folder(backbone)
        except ModelError as error:
            raise ModelError(f"reward.{objective_name}: backbone {backbone!r}: {error}") from error


def _resolve_reward_model(settings: Settings, key: str, model_path: str, *, may_download: bool = True) -> Path | None:
    """Folder of a reward model given as a folder or hub id; None for a hub id without `may_download`.

    Raises ModelError that names the key.
    """
    try:
        if not may_download:
            return find_model_folder(model_path)
        return resolve_model(model_path, resolve_cache_folder(settings))
    except ModelError as error:
        if re.fullmatch(r"[\w.]+:\w+", model_path):
            hint = f"for a function set {key.removesuffix('.path')}.source=function (judge for a rule)"
            raise ModelError(f"{key}={model_path}: expected a model, got module:function; {hint}") from None
        raise ModelError(f"{key}={model_path}: {error}; or remove the key to train a model on the log") from error


def check_service(settings: Settings) -> None:
    """Check the models of a service, and the inputs of reward models that it would have to train. Raises RlufError."""
    configured_folders = list_configured_reward_folders(settings)
    if set(configured_folders) != set(settings.serve.objectives):
        check_inputs(settings, may_download=False)
    for model_path in (*filter(None, configured_folders.values()), *settings.serve.policies.values()):
        find_model_folder(str(model_path))


def prepare_data_artifact(settings: Settings) -> Artifact:
    """The prepared data set: built with Ray Data, or reused if log, settings and code are the same."""
    from rluf.prepare.pipeline import build_data_set
    from rluf.prepare.readers.sources import fingerprint_sources, resolve_all_sources
    from rluf.prepare.readers.tables import export_tables
    from rluf.utils.hashing import fingerprint_salt, read_user_salt

    cache_folder = resolve_cache_folder(settings)
    with export_tables(settings.data.sources_by_kind, cache_folder) as table_folders:
        cache_inputs = {
            "files": fingerprint_sources(resolve_all_sources(settings.data.sources_by_kind, table_folders)),
            "data": settings.data.model_dump(mode="json"),
            # The output folder does not change the rows.
            "prepare": settings.prepare.model_dump(mode="json", exclude={"output"}),
            "seed": settings.seed,
            # Another salt gives other user ids; its fingerprint is stored, never the salt.
            "salt": fingerprint_salt(read_user_salt()),
            "code": hash_source_code("prepare", "utils.hashing"),
        }

        def build(folder: Path) -> None:
            build_data_set(settings, folder, table_folders=table_folders)

        return build_or_reuse(cache_folder, "data", cache_inputs, build)


def check_prompt_fields(settings: Settings, data_folder: Path) -> None:
    """Check that all prompts have the fields which reward functions in TRL's signature require. Raises DataError.

    Before reward models are trained: the function itself would notice it only afterwards.
    """
    import pyarrow.parquet as pq

    fields_by_function = {
        str(objective.path): list_required_fields(load_plugin(str(objective.path), kind="reward function"))
        for objective in settings.objectives.by_objective.values()
        if objective.source == "function"
    }
    if not any(fields_by_function.values()):
        return
    for path in sorted(data_folder.glob("prompts/*.parquet")):
        for row in pq.read_table(path, columns=["id", "extra_fields"]).to_pylist():
            row_fields = json.loads(row["extra_fields"] or "{}").keys()
            for reference, required_fields in fields_by_function.items():
                if missing := sorted(required_fields - row_fields):
                    raise DataError(
                        f"reward function {reference!r} takes {', '.join(missing)}, which prompt {row['id']!r} of "
                        "data.prompts does not have; add it to each row, or give the parameter a default"
                    )


def train_reward_artifacts(settings: Settings, data_artifact: Artifact) -> dict[str, Artifact | None]:
    """The reward model of each objective: trained with Ray Train, reused, or taken from `path`; None for a judge.

    The same workers train all missing ones in turn; heads on a shared backbone are one artifact. Raises DataError first
    if prompts lack a field that a reward function requires.
    """
    check_prompt_fields(settings, data_artifact.folder)
    from rluf.reward.ray_trainer import group_by_backbone, train_reward_models

    reward_settings, settings_by_objective = settings.reward, settings.objectives.by_objective
    extra_heads = [head for head in reward_settings.shared_backbone_heads if head not in settings_by_objective]
    heads_by_artifact = {
        f"reward-{'-'.join(head_names)}": head_names
        for head_names in group_by_backbone(settings, [*list_trained_objectives(settings), *extra_heads])
    }
    cache_inputs_by_name = {
        artifact_name: list_reward_cache_inputs(settings, data_artifact, head_names)
        for artifact_name, head_names in heads_by_artifact.items()
    }

    def build(folders: Mapping[str, Path]) -> None:
        training_jobs = {
            head_name: (data_artifact.folder, folder / head_name)
            for artifact_name, folder in folders.items()
            for head_name in heads_by_artifact[artifact_name]
        }
        train_reward_models(settings, training_jobs)

    artifacts = build_or_reuse_all(resolve_cache_folder(settings), cache_inputs_by_name, build)
    artifact_by_head = {
        head_name: replace(artifacts[artifact_name], folder=artifacts[artifact_name].folder / head_name)
        for artifact_name, head_names in heads_by_artifact.items()
        for head_name in head_names
    }
    return {
        objective_name: artifact_by_head.get(objective_name)
        or _wrap_model_folder(settings, objective_name, objective_settings)
        for objective_name, objective_settings in settings_by_objective.items()
    }


def list_reward_cache_inputs(
    settings: Settings, data_artifact: Artifact, head_names: Sequence[str]
) -> dict[str, object]:
    """Everything that the reward model of these heads depends on; a local backbone folder counts with its content.

    Of the data set only the rows that the heads are trained on count, so that other prompts do not retrain a model.
    """
    from rluf.reward.shared_backbone import get_data_objective

    reward_settings = settings.reward
    data_folders = [data_artifact.folder / name for name in sorted({*map(get_data_objective, head_names)})]
    backbone_names = sorted(
        {member.backbone for member in reward_settings.get_head_settings(head_names[0]).member_specs}
    )
    return {
        "data": {folder.name: hash_files([folder])[:12] for folder in data_folders if folder.is_dir()},
        "model": {head: reward_settings.get_head_settings(head).model_dump(mode="json") for head in head_names},
        "folders": {name: digest for name in backbone_names if (digest := _hash_backbone_folder(name)) is not None},
        "dtype": settings.reward_dtype,
        "workers": reward_settings.workers,  # the number of ranks changes the batches, and so the weights
        "zero_stage": reward_settings.zero_stage,
        "seed": settings.seed,
        "code": hash_source_code("reward", "models.chat", "models.lora", "backends.deepspeed"),
    }


def _hash_backbone_folder(backbone: str) -> str | None:
    """Hash of the model's files if `backbone` is a folder, whose content may change under the same name; else None."""
    folder = Path(backbone).expanduser()
    if backbone in list_embedded_models() or not folder.is_dir():
        return None
    return hash_files(path for path in folder.iterdir() if path.is_file())[:12]


def _wrap_model_folder(
    settings: Settings, objective_name: str, objective_settings: ObjectiveSettings
) -> Artifact | None:
    """The configured reward model folder as an artifact; None for a judge or a service."""
    if objective_settings.path is None or objective_settings.source != "model":
        return None
    folder = _resolve_reward_model(settings, f"objectives.{objective_name}.path", objective_settings.path)
    if folder is None:
        return None
    return Artifact(f"reward-{objective_name}", folder, hash_files([folder])[:12], reused=True)


def list_reward_model_folders(reward_artifacts: Mapping[str, Artifact | None]) -> dict[str, Path | None]:
    """The reward model folder of each objective, None for a judge."""
    return {
        objective_name: None if artifact is None else artifact.folder
        for objective_name, artifact in reward_artifacts.items()
    }
