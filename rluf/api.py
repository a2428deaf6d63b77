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
import math
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

from rluf.config import load
from rluf.config.objectives import BUILTIN_OBJECTIVES, OBJECTIVE_NAME_PATTERN
from rluf.config.settings import Settings
from rluf.errors import DataError, SettingsError
from rluf.objectives.reward_function import build_reward_function
from rluf.report.headline import read_gates
from rluf.tracking.plugin_tracker import TRACKER_SIGNATURE
from rluf.utils.files import atomic_write, read_json, read_jsonl
from rluf.utils.paths import resolve_cache_folder, suggest_run_folder
from rluf.utils.plugins import check_signature

Rows = Iterable[Any]
"""Rows in memory: dicts or records, a `datasets.Dataset`, a table of pandas, polars or Arrow."""
RewardFunctions = Mapping[str, Callable[..., Any] | str] | Sequence[Callable[..., Any]] | Callable[..., Any]
"""Functions, or module:function, by objective; functions alone are objectives of their own names."""
PENDING_FUNCTION, PENDING_ROWS = "pending:function", "pending"
"""Paths of what is not stored yet, because the settings that are loaded first say where the cache is."""
DATA_FILE_PATTERN = re.compile(r"\S+\.(jsonl|json|parquet|csv|tsv|arrow)(\.(gz|zst))?")
"""A text that is the name of a file of data, and no prompt."""


@dataclass(frozen=True, slots=True)
class Report:
    """Results of a run, read from the files of its folder."""

    folder: Path
    """Run folder, with report.html, summary.json, metrics.jsonl, answers.jsonl and policy/."""

    def __post_init__(self) -> None:
        """Accept the folder as text too."""
        object.__setattr__(self, "folder", Path(self.folder).expanduser())

    @property
    def summary(self) -> dict[str, Any]:
        """Content of summary.json: the comparison of policies, the monitors and the gates."""
        summary = read_json(self.folder / "summary.json")
        if "gates" not in summary:
            raise DataError(
                f"{self.folder} has no summary.json with gates; name the folder of a finished run"
                f"{suggest_run_folder(self.folder)}"
            )
        return summary

    @property
    def verdict(self) -> str:
        """Verdict of the release gates: pass (only after a blind reading), undecided or fail."""
        return str(read_gates(self.summary)["verdict"])

    @property
    def measured_verdict(self) -> str:
        """Verdict of checks and monitors alone, without the blind reading that `verdict` needs to pass."""
        return str(read_gates(self.summary)["measured_verdict"])

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Metrics of each step, in order; none after evaluate_policy."""
        return read_jsonl(self.folder / "metrics.jsonl")

    def push_to_hub(self, repo_id: str, *, private: bool = True) -> str:
        """Upload the policy with its model card to `repo_id` (owner/name) of the Hugging Face hub; returns the URL."""
        from rluf.report.hub_upload import upload_policy

        return upload_policy(self.folder, repo_id, private=private)

    def _repr_html_(self) -> str | None:
        """The HTML report in a frame, for notebooks; None where there is none yet."""
        path = self.folder / "report.html"
        if not path.is_file():
            return None
        return f'<iframe srcdoc="{html.escape(path.read_text("utf-8"))}" width="100%" height="800"></iframe>'


def load_settings(
    config: str | Path | None = None,
    overrides: Mapping[str, Any] | Sequence[str] | None = None,
    *,
    rows: Mapping[str, Rows] | None = None,
    reward_functions: RewardFunctions | None = None,
    trackers: Sequence[Callable[..., Any] | str] = (),
) -> Settings:
    """Settings of a run: a file or the name of a shipped configuration, then the overrides.

    `overrides` are key=value texts, or a mapping such as {"algorithm.steps": 20}. `rows` replaces `data.<kind>`
    (feedback, preferences, safety, prompts, reactions, labels.<objective>) by rows in memory, which are written to the
    cache; NaN and other missing values become null; a prompt may be a text. `reward_functions` adds an objective for
    each name, scored by the function (`source: function`); its weight is 1 unless the file or the overrides give it.
    Without names, as TRL takes them, each function is an objective of its own name. `trackers` are added to
    those of the configuration: names, or classes or functions (settings, run folder) -> tracker. A function of a
    notebook is stored in the cache with cloudpickle; the cache must be a shared folder when actors run on other
    machines.

    Raises SettingsError for an unknown key, an invalid value or something else than a function, DataError for rows that
    are not JSON.
    """
    if config is not None and not isinstance(config, str | os.PathLike):
        raise SettingsError(
            f"expected a file or the name of a configuration, got {_describe(config)}; settings are the second argument"
        )
    texts, config_path = _list_overrides(overrides), load.QUICKSTART if config is None else Path(config)
    functions = _name_functions(reward_functions)
    for name, function in functions.items():
        if not isinstance(function, str):
            build_reward_function(function, f"reward_functions[{name!r}]")
    tracker_list: list[Any] = list(trackers) if isinstance(trackers, list | tuple) else [trackers]
    for tracker in tracker_list:
        if not isinstance(tracker, str):
            check_signature(tracker, "trackers", TRACKER_SIGNATURE, 2)
    rows_by_kind = _check_mapping(rows, "rows", '{"prompts": rows}')
    pending_texts = [f"data.{kind}=[{PENDING_ROWS}]" for kind in rows_by_kind]
    for name in functions:
        pending_texts += [f"objectives.{name}.source=function", f"objectives.{name}.path={PENDING_FUNCTION}"]
    loaded = load.load_settings(config_path, [*texts, *pending_texts])
    cache_folder = resolve_cache_folder(loaded.settings)
    for kind, kind_rows in rows_by_kind.items():
        texts.append(f"data.{kind}={_to_yaml([_write_rows(kind, kind_rows, cache_folder)], kind)}")
    for name, function in functions.items():
        if name not in BUILTIN_OBJECTIVES and loaded.sources[f"objectives.{name}.weight"] == load.DEFAULT_SOURCE:
            texts.append(f"objectives.{name}.weight=1")
        texts.append(f"objectives.{name}.source=function")
        texts.append(f"objectives.{name}.path={_to_yaml(_write_function(function, cache_folder), name)}")
    if tracker_list:
        references = [
            *loaded.settings.tracking.trackers,
            *(_write_function(item, cache_folder) for item in tracker_list),
        ]
        texts.append(f"tracking.trackers={_to_yaml(references, 'tracking.trackers')}")
    return load.load_settings(config_path, texts).settings


def prepare_data(settings: Settings) -> Path:
    """Build the data set of the settings' logs; returns its folder (prepare.output), with data_card.json."""
    from rluf.prepare.__main__ import resolve_output_folder, run_build

    output_folder = resolve_output_folder(_check_settings(settings))
    run_build(settings, output_folder)
    return output_folder


def train_reward_models(settings: Settings) -> dict[str, Path]:
    """Train the reward models of the settings; returns the folder of each, which RewardModel.load reads."""
    from rluf.reward.__main__ import select_objectives, train_models

    run_folder = train_models(_check_settings(settings))
    return {name: run_folder / name for name in select_objectives(settings)}


def train_policy(settings: Settings) -> Report:
    """Run the whole job: data, reward models, training, comparison with the base policy, report."""
    from rluf.train.__main__ import train

    return Report(train(_check_settings(settings)))


def evaluate_policy(settings: Settings) -> Report:
    """Compare `evaluate.candidate` with the base policy `model.path`."""
    from rluf.evaluate.__main__ import run_evaluation

    return Report(run_evaluation(_check_settings(settings)))


def _check_settings(settings: Any) -> Settings:
    if not isinstance(settings, Settings):
        raise SettingsError(f"expected the result of rluf.load_settings, got {_describe(settings)}")
    return settings


def _check_mapping(value: Any, name: str, example: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping | None):
        raise SettingsError(f"{name}: expected a mapping such as {example}, got {_describe(value)}")
    return value or {}


def _name_functions(functions: Any) -> Mapping[str, Any]:
    """Reward functions by objective; a function, or a list of them, takes the functions' own names."""
    if isinstance(functions, list | tuple):
        unnamed = list(functions)
    elif callable(functions):
        unnamed = [functions]
    else:
        return _check_mapping(functions, "reward_functions", "{name: function}")
    names = [getattr(function, "__name__", "") for function in unnamed]
    for name, function in zip(names, unnamed, strict=True):
        if not callable(function) or not OBJECTIVE_NAME_PATTERN.fullmatch(name) or names.count(name) > 1:
            raise SettingsError(
                f"reward_functions: {_describe(function)} has no name of its own that can name an objective; pass a "
                "mapping such as {name: function}"
            )
    return dict(zip(names, unnamed, strict=True))


def _list_overrides(overrides: Any) -> list[str]:
    """Overrides as key=value texts."""
    if isinstance(overrides, Mapping):
        return [f"{key}={_to_yaml(value, key)}" for key, value in overrides.items()]
    is_one = isinstance(overrides, str) or not isinstance(overrides, Iterable | None)
    texts = [overrides] if is_one else list(overrides or ())
    for text in texts:
        if not isinstance(text, str):
            raise SettingsError(f'expected key=value texts or a mapping {{"seed": 3}}, got {_describe(text)}')
    return texts


def _write_rows(kind: str, rows: Any, cache_folder: Path) -> str:
    """File with the rows as JSONL; equal rows give the same file, so that finished artifacts are reused.

    A path or the name of a data set is returned as it is.
    """
    if isinstance(rows, str | os.PathLike):
        return os.fspath(rows)
    for method, arguments in (("to_pylist", ()), ("to_dicts", ()), ("itertuples", None)):  # Arrow, polars, pandas
        if hasattr(rows, method):
            rows = rows.to_dict("records") if arguments is None else getattr(rows, method)()
            break
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        hint = f"; pass one of its splits: {', '.join(map(str, rows))}" if _is_data_set_dict(rows) else ""
        raise DataError(
            f"rows[{kind!r}]: expected rows (a list of dicts, a data set, a table), got {type(rows).__name__}"
            + (hint or f" {str(rows)[:100]!r}")
        )
    lines = []
    for index, row in enumerate(rows):
        try:
            if isinstance(row, str) and DATA_FILE_PATTERN.fullmatch(row):
                raise TypeError(f"{row!r} is a file; name one in place of the rows, several in data.{kind}")
            content = _to_json({"prompt": row} if kind == "prompts" and isinstance(row, str) else row)
            if not isinstance(content, dict):
                raise TypeError(f"expected a dict, got {_describe(row)}")
            lines.append(f"{json.dumps(content, ensure_ascii=False)}\n".encode())
        except (TypeError, ValueError) as error:
            raise DataError(f"rows[{kind!r}], row {index + 1}: {error}; pass dicts of plain JSON values") from None
    if not lines:
        raise DataError(f"rows[{kind!r}] has no rows; a generator can be read only once")
    return str(_write_once(cache_folder / "inputs", f"{kind}-{{digest}}.jsonl", b"".join(lines)))


def _is_data_set_dict(rows: Any) -> bool:
    """Whether these are the splits of a data set (`datasets.DatasetDict`, or a dict of data sets)."""
    return isinstance(rows, Mapping) and bool(rows) and all(hasattr(split, "column_names") for split in rows.values())


def _write_function(function: Callable[..., Any] | str, cache_folder: Path) -> str:
    """Reference to a function as settings have it: module:function, or pickle:FILE for one that no module holds."""
    if isinstance(function, str):
        return function
    module_name, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    if module_name not in ("", "__main__") and getattr(sys.modules.get(module_name), name, None) is function:
        return f"{module_name}:{name}"
    from ray import cloudpickle

    try:
        content = cloudpickle.dumps(function)
    except (TypeError, ValueError, AttributeError, RuntimeError, pickle.PicklingError) as error:
        raise SettingsError(
            f"{_describe(function)} cannot be stored for the actors ({error}); create locks, files, clients and models "
            "inside the function at its first call, or put it in a module and pass module:function"
        ) from None
    return f"pickle:{_write_once(cache_folder / 'functions', '{digest}.pkl', content)}"


def _write_once(folder: Path, name_pattern: str, content: bytes) -> Path:
    path = folder / name_pattern.format(digest=hashlib.blake2b(content, digest_size=8).hexdigest())
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial_path:
            partial_path.write_bytes(content)
            partial_path.chmod(0o600)  # the loader refuses a function that others can write
    return path


def _to_yaml(value: Any, key: object) -> str:
    try:
        return json.dumps(value if isinstance(value, float) else _to_json(value))  # NaN is refused as what it is
    except TypeError as error:
        raise SettingsError(f"{key}: {error}; pass a plain value") from None


def _to_json(value: Any) -> Any:
    """Plain JSON values of records, data frames and numpy: times as ISO text, missing values as null."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    if type(value).__name__ in ("NaTType", "NAType") or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float):
        return value
    if isinstance(value, os.PathLike | UUID):
        return str(value)
    if isinstance(value, Decimal):
        return float(value)
    if hasattr(value, "model_dump"):  # pydantic, such as rluf.FeedbackRecord
        return value.model_dump(mode="json", exclude_unset=True)
    for method in ("isoformat", "tolist"):  # dates; numpy arrays and scalars
        if hasattr(value, method):
            return _to_json(getattr(value, method)())
    raise TypeError(f"{_describe(value)} is not a JSON value")


def _describe(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:100]!r}"
