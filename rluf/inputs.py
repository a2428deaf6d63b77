"""What the loop starts from: checked inputs, prepared data and reward models, each built once and then reused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from rluf.config.settings import Settings
from rluf.errors import ModelError
from rluf.paths import cache_dir
from rluf.stages import Stage, code_digest, file_digest, run_stage


def check_inputs(settings: Settings) -> None:
    """Look at every log and reward model folder that the job will need, before anything starts.

    Raises DataError for a missing log, ModelError for a missing reward model folder.
    """
    from rluf.feedback.sources import resolve

    for kind, entries in settings.data:
        resolve(entries, kind)
    for name, objective in settings.objectives.named.items():
        if objective.path is not None and not (Path(objective.path).expanduser() / "config.json").is_file():
            raise ModelError(
                f"objectives.{name}.path={objective.path} holds no config.json; name a reward model folder, or leave "
                "the key out to train one from the log"
            )


def prepared(settings: Settings) -> Stage:
    """The prepared data set of `data`: built with Ray Data, or reused when log, settings and code are the same."""
    from rluf.feedback.sources import fingerprint, resolve
    from rluf.prepare import prepare

    sources = [source for kind, entries in settings.data for source in resolve(entries, kind)]
    parts = {
        "files": fingerprint(sources),
        "data": settings.data.model_dump(mode="json"),
        "prepare": settings.prepare.model_dump(mode="json", exclude={"output", "blocks"}),
        "seed": settings.seed,
        "code": code_digest("feedback", "prepare"),
    }

    def build(out: Path) -> None:
        prepare(settings, out)

    return run_stage(cache_dir(settings), "data", parts, build, reuse=settings.run.reuse)


def rewarded(settings: Settings, data: Stage) -> Mapping[str, Stage | None]:
    """A reward model for each objective: trained with Ray Train, reused, or taken from `path`; None for a judge."""
    from rluf.reward import train_reward

    stages: dict[str, Stage | None] = {}
    for name, objective in settings.objectives.named.items():
        if objective.source == "judge":
            stages[name] = None
            continue
        if objective.path is not None:
            folder = Path(objective.path).expanduser().resolve()
            stages[name] = Stage(name, folder, file_digest([folder])[:12], reused=True)
            continue
        parts = {
            "data": data.key,
            "model": getattr(settings.reward, name).model_dump(mode="json"),
            "workers": settings.reward.workers,
            "zero_stage": settings.reward.zero_stage,
            "seed": settings.seed,
            "code": code_digest("objectives", "reward", "engine.deepspeed"),
        }
        stages[name] = run_stage(
            cache_dir(settings), f"reward-{name}", parts, _trainer(settings, name, data, train_reward),
            reuse=settings.run.reuse,
        )
    return stages


def _trainer(settings: Settings, name: str, data: Stage, train: Callable[..., object]) -> Callable[[Path], None]:
    def build(out: Path) -> None:
        train(settings, name, data.folder, out)

    return build


def model_folders(rewards: Mapping[str, Stage | None]) -> dict[str, Path | None]:
    """The reward model folder of each objective, None for a judge."""
    return {name: None if stage is None else stage.folder for name, stage in rewards.items()}
