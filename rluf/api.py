"""Python API: each command as a function, for notebooks and programs.

    import rluf

    settings = rluf.load_settings("tiny", {"algorithm.steps": 2}, reward_functions={"brevity": score_brevity})
    report = rluf.train_policy(settings)
    report.verdict

The names of this module are attributes of the package, imported on first use. The functions raise RlufError with a
message for the user, and they also work where an event loop is running, as in a notebook.
"""

from __future__ import annotations

import hashlib
import html
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rluf.config import load
from rluf.errors import DataError
from rluf.utils.files import atomic_write, read_json
from rluf.utils.paths import resolve_cache_folder

if TYPE_CHECKING:
    from rluf.config.settings import Settings

Rows = Iterable[Mapping[str, Any]]
"""Rows in memory: dicts, a `datasets.Dataset`, or `DataFrame.to_dict("records")`."""


@dataclass(frozen=True, slots=True)
class Report:
    """Results of a run, read from the files of its folder."""

    folder: Path
    """Run folder, with report.html, summary.json, metrics.jsonl, answers.jsonl and policy/."""

    @property
    def summary(self) -> dict[str, Any]:
        """Content of summary.json: the comparison of policies, the monitors and the gates."""
        return dict(read_json(self.folder / "summary.json"))

    @property
    def verdict(self) -> str:
        """Verdict of the release gates: pass, undecided or fail."""
        return str(self.summary["gates"]["verdict"])

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Metrics of each step, in order."""
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def push_to_hub(self, repo_id: str, *, private: bool = True) -> str:
        """Upload the policy with its model card to `repo_id` (owner/name) of the Hugging Face hub; returns the URL."""
        from rluf.report.hub_upload import upload_policy

        return upload_policy(self.folder, repo_id, private=private)

    def _repr_html_(self) -> str:
        """The HTML report in a frame, for notebooks."""
        page = (self.folder / "report.html").read_text(encoding="utf-8")
        return f'<iframe srcdoc="{html.escape(page)}" width="100%" height="800"></iframe>'


def load_settings(
    config: str | Path | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    rows: Mapping[str, Rows] | None = None,
    reward_functions: Mapping[str, Callable[..., Any]] | None = None,
    trackers: Sequence[Callable[..., Any]] = (),
) -> Settings:
    """Settings of a run: a file or the name of a shipped configuration, then the overrides.

    `overrides` are key=value texts, or a mapping such as {"algorithm.steps": 20}. `rows` replaces `data.<kind>`
    (feedback, preferences, safety, prompts, reactions) by rows in memory, which are written to the cache.
    `reward_functions` adds an objective for each name, scored by the function (`source: function`), with weight 1
    unless the overrides give `objectives.<name>.weight`. `trackers` are added to those of the configuration: classes or
    functions (settings, run folder) -> tracker. A function of a notebook is stored in the cache with cloudpickle; the
    cache must be a shared folder when actors run on other machines.

    Raises SettingsError for an unknown key or an invalid value, DataError for rows that are not JSON.
    """
    config_path = None if config is None else Path(config)
    if isinstance(overrides, Mapping):
        overrides = [f"{key}={_to_yaml(value)}" for key, value in overrides.items()]
    override_texts = list(overrides)
    if rows or reward_functions or trackers:
        # Only where the cache is: the other overrides may name an objective that gets its function below.
        cache_overrides = [text for text in override_texts if text.startswith("run.")]
        configured = load.load_settings(config_path, cache_overrides).settings
        cache_folder = resolve_cache_folder(configured)
        for kind, kind_rows in (rows or {}).items():
            override_texts.append(f"data.{kind}={_to_yaml([_write_rows(kind, kind_rows, cache_folder)])}")
        for name, function in (reward_functions or {}).items():
            override_texts.append(f"objectives.{name}.source=function")
            override_texts.append(f"objectives.{name}.path={_to_yaml(_write_function(function, cache_folder))}")
            if not any(text.startswith(f"objectives.{name}.weight=") for text in override_texts):
                override_texts.append(f"objectives.{name}.weight=1")
        if trackers:
            references = [_write_function(create_tracker, cache_folder) for create_tracker in trackers]
            override_texts.append(f"tracking.trackers={_to_yaml([*configured.tracking.trackers, *references])}")
    return load.load_settings(config_path, override_texts).settings


def prepare_data(settings: Settings) -> Path:
    """Build the data set of the settings' logs; returns its folder (prepare.output), with data_card.json."""
    from rluf.prepare.__main__ import resolve_output_folder, run_build

    output_folder = resolve_output_folder(settings)
    run_build(settings, output_folder)
    return output_folder


def train_reward_models(settings: Settings) -> dict[str, Path]:
    """Train the reward models of the settings; returns the folder of each, which RewardModel.load reads."""
    from rluf.reward.__main__ import select_objectives, train_models

    run_folder = train_models(settings)
    return {name: run_folder / name for name in select_objectives(settings)}


def train_policy(settings: Settings) -> Report:
    """Run the whole job: data, reward models, training, comparison with the base policy, report."""
    from rluf.train.__main__ import train

    return Report(train(settings))


def evaluate_policy(settings: Settings) -> Report:
    """Compare `evaluate.candidate` with the base policy `model.path`."""
    from rluf.evaluate.__main__ import run_evaluation

    return Report(run_evaluation(settings))


def _write_rows(kind: str, rows: Rows, cache_folder: Path) -> Path:
    """File with the rows as JSONL; equal rows give the same file, so that finished artifacts are reused."""
    lines = []
    for index, row in enumerate(rows):
        try:
            lines.append(json.dumps(dict(row), ensure_ascii=False, default=_to_json))
        except (TypeError, ValueError) as error:
            raise DataError(f"rows[{kind!r}], row {index + 1}: {error}; pass dicts of plain JSON values") from None
    content = "".join(f"{line}\n" for line in lines).encode()
    return _write_once(cache_folder / "inputs", f"{kind}-{{digest}}.jsonl", content)


def _write_function(function: Callable[..., Any], cache_folder: Path) -> str:
    """Reference to a function as settings have it: module:function, or pickle:FILE for one that no module holds."""
    module_name, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    if module_name not in ("", "__main__") and getattr(sys.modules.get(module_name), name, None) is function:
        return f"{module_name}:{name}"
    from ray import cloudpickle

    return f"pickle:{_write_once(cache_folder / 'functions', '{digest}.pkl', cloudpickle.dumps(function))}"


def _write_once(folder: Path, name_pattern: str, content: bytes) -> Path:
    path = folder / name_pattern.format(digest=hashlib.blake2b(content, digest_size=8).hexdigest())
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial_path:
            partial_path.write_bytes(content)
            partial_path.chmod(0o600)  # the loader refuses a function that others can write
    return path


def _to_yaml(value: Any) -> str:
    return json.dumps(value, default=str)


def _to_json(value: Any) -> Any:
    """Values of data frames: timestamps as ISO text, numpy scalars as numbers."""
    for method in ("isoformat", "item"):
        if hasattr(value, method):
            return getattr(value, method)()
    raise TypeError(f"{type(value).__name__} {value!r}")
