"""What the loop starts from: checked inputs, prepared data and reward models, each built once and then reused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rluf.config.reward import ObjectiveSettings
from rluf.config.settings import Settings
from rluf.errors import ModelError
from rluf.models.hub import embedded_models
from rluf.utils.cache import Stage, code_digest, file_digest, run_stage, run_stages
from rluf.utils.paths import cache_dir, check_writable, runs_root


def check_inputs(settings: Settings) -> None:
    """Look at every log, reward model folder and output folder that the job will need, before anything starts.

    Raises DataError for a missing log, ModelError for a missing reward model folder, ResourceError for a folder that
    cannot be written.
    """
    from rluf.prepare.readers.sources import resolve

    for kind, entries in settings.data:
        resolve(entries, kind)
    for folder in (runs_root(settings), cache_dir(settings)):
        check_writable(folder)
    for name, objective in settings.objectives.named.items():
        if objective.source == "serve":
            continue  # whether the service answers is asked when the reward actors start
        if objective.path is not None and not (Path(objective.path).expanduser() / "config.json").is_file():
            raise ModelError(
                f"objectives.{name}.path={objective.path} holds no config.json; name a reward model folder, or leave "
                "the key out to train one from the log"
            )


def prepared(settings: Settings) -> Stage:
    """The prepared data set of `data`: built with Ray Data, or reused when log, settings and code are the same."""
    from rluf.prepare.pipeline import build as build_data
    from rluf.prepare.readers.sources import fingerprint, resolve
    from rluf.prepare.redact import salt_mark, user_salt

    sources = [source for kind, entries in settings.data for source in resolve(entries, kind)]
    parts = {
        "files": fingerprint(sources),
        "data": settings.data.model_dump(mode="json"),
        "prepare": settings.prepare.model_dump(mode="json", exclude={"output", "blocks"}),
        "seed": settings.seed,
        "salt": salt_mark(user_salt()),
        "code": code_digest("prepare"),
    }

    def build(out: Path) -> None:
        build_data(settings, out)

    return run_stage(cache_dir(settings), "data", parts, build, reuse=settings.run.reuse)


def rewarded(settings: Settings, data: Stage) -> dict[str, Stage | None]:
    """A reward model for each objective: trained with Ray Train, reused, or taken from `path`; None for a judge.

    Missing ones are trained by the same workers, one after another; heads of one backbone are one stage.
    """
    from rluf.reward.ray_trainer import grouped, train_rewards

    reward, named = settings.reward, settings.objectives.named
    missing = [n for n, objective in named.items() if objective.source == "model" and objective.path is None]
    groups = grouped(settings, [*missing, *(head for head in reward.heads if head not in named)])
    of_stage = {f"reward-{'-'.join(group)}": group for group in groups}
    wanted = {stage: reward_parts(settings, data, group) for stage, group in of_stage.items()}

    def build(folders: Mapping[str, Path]) -> None:
        jobs = {head: (data.folder, folders[stage] / head) for stage in folders for head in of_stage[stage]}
        train_rewards(settings, jobs)

    stages = run_stages(cache_dir(settings), wanted, build, reuse=settings.run.reuse)
    trained = {h: replace(stages[s], folder=stages[s].folder / h) for s, group in of_stage.items() for h in group}
    return {name: trained.get(name) or _given(name, objective) for name, objective in named.items()}


def reward_parts(settings: Settings, data: Stage, group: Sequence[str]) -> dict[str, object]:
    """Everything that the reward model of these heads is made from; a backbone's folder counts with what is in it."""
    reward = settings.reward
    backbones = sorted({member.backbone for member in reward.of_head(group[0]).members})
    return {
        "data": data.key,
        "model": {head: reward.of_head(head).model_dump(mode="json") for head in group},
        "folders": {name: digest for name in backbones if (digest := _folder_digest(name)) is not None},
        "dtype": settings.reward_dtype,
        "workers": reward.workers,
        "zero_stage": reward.zero_stage,
        "seed": settings.seed,
        "code": code_digest("reward", "backends.deepspeed"),
    }


def _folder_digest(backbone: str) -> str | None:
    """Hash of the model's files where `backbone` is a folder, whose content may change under its name; else None."""
    folder = Path(backbone).expanduser()
    if backbone in embedded_models() or not folder.is_dir():
        return None
    return file_digest(path for path in folder.iterdir() if path.is_file())[:12]


def _given(name: str, objective: ObjectiveSettings) -> Stage | None:
    """A reward model folder that the settings name, as a stage; None for a judge or a service."""
    if objective.path is None or objective.source == "serve":
        return None
    folder = Path(objective.path).expanduser().resolve()
    return Stage(f"reward-{name}", folder, file_digest([folder])[:12], reused=True)


def model_folders(rewards: Mapping[str, Stage | None]) -> dict[str, Path | None]:
    """The reward model folder of each objective, None for a judge."""
    return {name: None if stage is None else stage.folder for name, stage in rewards.items()}
