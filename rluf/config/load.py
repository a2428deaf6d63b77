"""Load YAML files and key=value overrides into Settings, with the source of every value.

A file may extend others (`extends: base.yaml`, relative to itself). Sections merge key by key; a value, a mapping such
as algorithm.topic_weights included, replaces the one before. Keys set nowhere keep their defaults.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from rluf.config.cpu_dtype import explain_auto_dtype
from rluf.config.objectives import BUILTIN_OBJECTIVES
from rluf.config.renamed import describe_old_keys
from rluf.config.reward import (
    MAX_AUTO_TOKENS,
    MIN_AUTO_TOKENS,
    ObjectiveSettings,
    RewardModelSettings,
    describe_unusable_name,
)
from rluf.config.settings import Settings
from rluf.errors import SettingsError

DEFAULT_SOURCE = "default"
YAML_SUFFIXES = (".yaml", ".yml")
OVERRIDE_SOURCE = "override"

VARIABLE_PATTERN = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
SECRET_NAME_PATTERN = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|(API|ACCESS|PRIVATE)_?KEY", re.IGNORECASE)
URL_PASSWORD_PATTERN = re.compile(r"://[^/@\s:]*:[^/@\s]+@")


@dataclass(frozen=True, slots=True)
class LoadedSettings:
    """Settings and the source of each value: dotted key -> default, a file's path, or override.

    `options` are the command line's own options, when the settings come from one.
    """

    settings: Settings
    sources: Mapping[str, str]
    options: argparse.Namespace = field(default_factory=argparse.Namespace)


@dataclass(slots=True)
class _SettingsDraft:
    """Unvalidated values while files and overrides are merged: the tree, and the source of each dotted key."""

    tree: dict[str, Any]
    known_keys: frozenset[str]
    sources: dict[str, str] = field(default_factory=dict)

    def merge(self, values: Mapping[str, Any], source: str) -> None:
        """Merge sections key by key and replace everything else."""
        self._merge_section(self.tree, values, source, "")

    def set_mapping_item(self, dotted_key: str, value: Any) -> None:
        """Set one item of a setting that is a mapping, such as algorithm.topic_weights.risky, and keep the others."""
        setting_key = next(key for key in self.known_keys if dotted_key.startswith(f"{key}."))
        target = self.tree
        for name in setting_key.split("."):
            target = target[name]
        owner = setting_key
        *parents, item = dotted_key.removeprefix(f"{setting_key}.").split(".")
        for name in parents:
            if isinstance(target, dict):
                owner, target = f"{owner}.{name}", target.setdefault(name, {})
        if not isinstance(target, dict):
            raise SettingsError(f"unknown setting {dotted_key} ({OVERRIDE_SOURCE}): {owner} is a value, not a section")
        target[item] = value
        self.sources[setting_key] = OVERRIDE_SOURCE

    def _merge_section(self, target: dict[str, Any], values: Mapping[str, Any], source: str, prefix: str) -> None:
        for key, value in values.items():
            dotted_key = f"{prefix}{key}"
            if dotted_key in self.known_keys:
                target[key] = value
                self.sources[dotted_key] = source
            elif isinstance(value, Mapping):
                self._merge_section(target[key], value, source, f"{dotted_key}.")
            elif value is not None:  # an empty section in YAML reads as null and changes nothing
                raise SettingsError(
                    f"{dotted_key} is a section, not a value (now {value!r}, {source}); set one of its keys, "
                    f"such as {dotted_key}.{next(iter(target[key]))}"
                )


def load_settings(config_path: Path | None, overrides: Sequence[str] = ()) -> LoadedSettings:
    """Settings from the defaults, then `config_path` and the files it extends, then the overrides.

    `config_path` may be the name of a shipped configuration, such as `tiny`, where no such file exists. None is the
    defaults alone; commands without --config and the Python API take the shipped QUICKSTART instead.
    A file without `name` gets its own file name without the suffix. Raises SettingsError, with the dotted key, the
    value, its source and the fix, for an unknown key, an invalid value, or keys that conflict.
    """
    if config_path is not None:
        config_path = _find_config(config_path)
    chain = [] if config_path is None else list(_load_extends_chain(config_path, ()))
    # Otherwise the run folder would get the name of the extended file.
    if config_path is not None and "name" not in chain[-1][1]:
        chain[-1][1]["name"] = config_path.stem
    parsed_overrides = [_parse_override(override) for override in overrides]
    # Known keys depend on the objectives, which files and overrides may add to.
    objective_names = _find_further_objectives(
        [(values, str(path)) for path, values in chain]
        + [(_nest_value(*parsed_override), OVERRIDE_SOURCE) for parsed_override in parsed_overrides]
    )
    known_keys = frozenset(key for key, _ in iter_setting_fields(objective_names))
    # Merging into the dumped defaults keeps the defaults of each section: reward.helpfulness has another loss than the
    # class RewardModelSettings, and a file that sets one key of it must not reset the loss.
    draft = _SettingsDraft(_dump_defaults(objective_names), known_keys)
    for path, values in chain:
        _check_keys(values, str(path), known_keys)
        draft.merge(values, str(path))
    for dotted_key, value in parsed_overrides:
        values = _nest_value(dotted_key, value)
        _check_keys(values, OVERRIDE_SOURCE, known_keys)
        if any(dotted_key.startswith(f"{key}.") for key in known_keys):
            draft.set_mapping_item(dotted_key, value)
        else:
            draft.merge(values, OVERRIDE_SOURCE)
    sources = {key: draft.sources.get(key, DEFAULT_SOURCE) for key in known_keys}
    try:
        settings = Settings.model_validate(draft.tree)
    except ValidationError as error:
        fields = dict(iter_setting_fields(objective_names))
        raise SettingsError(_format_validation_error(error, sources, fields)) from None
    return _resolve_auto_values(settings, sources)


def _resolve_auto_values(settings: Settings, sources: dict[str, str]) -> LoadedSettings:
    """Replace dtype=auto by this machine's dtype, once on the driver: the processes of a run may have other CPUs.

    max_tokens=auto stays, and its source says what it may become.
    """
    dtype = settings.policy_dtype
    for name, section in settings.reward.by_objective.items():
        if section.max_tokens == "auto":
            # The rows decide, which are unknown before they are prepared; the log and the reward card have the number.
            sources[f"reward.{name}.max_tokens"] += f"; {MIN_AUTO_TOKENS} to {MAX_AUTO_TOKENS}, from the rows"
    if settings.model.dtype == "auto":
        sources["model.dtype"] = explain_auto_dtype(dtype, gpu_count=settings.policy_gpus)
    model_settings = settings.model.model_copy(update={"dtype": dtype})
    return LoadedSettings(settings.model_copy(update={"model": model_settings}), sources)


def iter_setting_fields(objective_names: Iterable[str] = ()) -> Iterator[tuple[str, FieldInfo]]:
    """Dotted key and field of every setting in tree order, without the sections themselves.

    `objective_names` are the objectives other than the built-in ones; each has a section in `objectives` and `reward`.
    """
    return _iter_section_fields(Settings, "", tuple(objective_names))


def _iter_section_fields(
    section: type[BaseModel], prefix: str, objective_names: tuple[str, ...]
) -> Iterator[tuple[str, FieldInfo]]:
    for name, info in section.model_fields.items():
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _iter_section_fields(annotation, f"{prefix}{name}.", objective_names)
        else:
            yield f"{prefix}{name}", info
    further_section: type[BaseModel] | None = getattr(section, "further_section", None)
    if further_section is not None:
        for name in objective_names:
            yield from _iter_section_fields(further_section, f"{prefix}{name}.", objective_names)


def list_further_objectives(settings: Settings) -> tuple[str, ...]:
    """Names of the objectives that are not built in."""
    return tuple(name for name in settings.objectives.by_objective if name not in BUILTIN_OBJECTIVES)


def _find_further_objectives(trees: Iterable[tuple[Mapping[Any, Any], str]]) -> tuple[str, ...]:
    """Names under `objectives` in any of the trees that are neither built in nor keys of earlier releases.

    Each tree comes with its source. Raises SettingsError for a name that an objective cannot have.
    """
    names: dict[str, None] = {}
    for values, source in trees:
        section = values.get("objectives")
        for name, value in section.items() if isinstance(section, Mapping) else ():
            is_old_key = bool(describe_old_keys({"objectives": {name: value}}))
            # objectives.weight=1 lacks the name of an objective, which the error of unknown keys suggests.
            is_field = not isinstance(value, Mapping) and difflib.get_close_matches(
                str(name), ObjectiveSettings.model_fields, 1
            )
            if name in BUILTIN_OBJECTIVES or is_old_key or is_field:
                continue
            problem = describe_unusable_name(str(name))
            if problem is not None:
                raise SettingsError(f"objectives.{name} ({source}) cannot name an objective: {problem}")
            names[str(name)] = None
    return tuple(names)


def _dump_defaults(objective_names: Iterable[str]) -> dict[str, Any]:
    """The tree of default settings, with a section in `objectives` and `reward` for each of these objectives."""
    tree = Settings().model_dump(mode="json")
    for name in objective_names:
        tree["objectives"][name] = ObjectiveSettings().model_dump(mode="json")
        tree["reward"][name] = RewardModelSettings().model_dump(mode="json")
    return tree


class _StrictYamlLoader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys, reads 1e-5 as a number, and keeps off, yes and dates as plain text."""


_YAML_MARKS = tuple("*&!|>%@`")
_MERGE_TAG = "tag:yaml.org,2002:merge"


def _construct_unique_mapping(loader: _StrictYamlLoader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    names: set[object] = set()
    for key, _ in node.value:
        if key.tag == _MERGE_TAG:  # its keys may be set again, which is what it is for
            continue
        name = loader.construct_object(key, deep=True)
        if not isinstance(name, Hashable):
            problem = f"the key {name!r} is no text; write {{{{ and }}}} of a template in quotes, or fill it in before"
            raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        if name in names:
            raise yaml.constructor.ConstructorError(None, None, f"{name!r} is set twice", key.start_mark)
        names.add(name)
    return loader.construct_mapping(node)


_StrictYamlLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_unique_mapping)
# YAML 1.1 reads `off` as false and 2024-01-01 as a date, but tracking.wandb=off and names of runs are text.
_PLAIN_TEXT_TAGS = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")
_StrictYamlLoader.yaml_implicit_resolvers = {
    first_character: [(tag, pattern) for tag, pattern in resolvers if tag not in _PLAIN_TEXT_TAGS]
    for first_character, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictYamlLoader.add_implicit_resolver(_PLAIN_TEXT_TAGS[0], re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
# YAML 1.1 floats need a dot, so 1e-5 would be text.
_StrictYamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML and expand ${VAR} and ${VAR:-default} in its strings. `source` is named in error messages."""
    try:
        return _expand_variables(yaml.load(text, _StrictYamlLoader), source)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        location = f" line {mark.line + 1}" if mark is not None else ""
        problem = " ".join((getattr(error, "problem", None) or str(error)).split())
        hint = "indent with spaces, and put text with special characters in quotes"
        fix = f"fix that line: {hint}" if isinstance(error, yaml.scanner.ScannerError) else "fix that line"
        raise SettingsError(f"{source}{location} is not valid YAML: {problem}; {fix}") from None


def _expand_variables(value: Any, source: str) -> Any:
    if isinstance(value, dict):
        return {key: _expand_variables(item, source) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand_variables(item, source) for item in value]
    if not isinstance(value, str):
        return value
    if URL_PASSWORD_PATTERN.search(value):
        raise SettingsError(
            f"a value of {URL_PASSWORD_PATTERN.sub('://...@', source)} has a password in a URL, and settings are "
            "written to the run folder; remove it and set the storage's own environment variables, such as "
            "AWS_SECRET_ACCESS_KEY"
        )

    def replace_variable(match: re.Match[str]) -> str:
        name, fallback = match.group(1), match.group(2)
        if SECRET_NAME_PATTERN.search(name):
            raise SettingsError(
                f"{source} uses {name}, which looks like a secret, and settings are written to the run folder and the "
                "log; remove it: the code that needs the secret reads it from the environment"
            )
        expanded = os.environ.get(name) or fallback  # as in a shell, :- also replaces an empty variable
        if expanded is None:
            raise SettingsError(
                f"{value!r} ({source}) uses {name}, which is not set; export it, or write ${{{name}:-...}}"
            )
        return expanded

    return VARIABLE_PATTERN.sub(replace_variable, value)


def _find_config(path: Path, folder: Path = Path()) -> Path:
    """`path` in `folder`, else the shipped file: tiny, tiny.yaml and configs/tiny.yaml are the same one."""
    path = path.expanduser()
    local_path = folder / path
    if local_path.is_file():
        return local_path
    name = path.relative_to("configs") if path.parts[:1] == ("configs",) else path
    file_name = name if name.suffix in YAML_SUFFIXES else Path(f"{name}.yaml")
    candidates = (config_folder / file_name for config_folder in _list_config_folders())
    return next(filter(Path.is_file, candidates), local_path)


def _list_config_folders() -> tuple[Path, Path]:
    """Where the shipped configurations may be: a wheel has configs/ in the package, the repository next to it."""
    package_folder = Path(__file__).parents[1]
    return package_folder / "configs", package_folder.parent / "configs"


QUICKSTART = next(
    filter(Path.is_file, (folder / "quickstart.yaml" for folder in _list_config_folders())), Path("quickstart.yaml")
)
"""What a command without --config runs: the shipped file, whatever the working directory has."""


def _suggest_config(path: Path) -> str:
    """Hint for a settings file that does not exist: similar files next to it, or similar shipped configurations."""
    similar_names = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
    if similar_names:
        return f"did you mean {path.parent / similar_names[0]}?"
    shipped_names = sorted(file.stem for folder in _list_config_folders() for file in folder.glob("*.yaml"))
    similar_names = difflib.get_close_matches(path.stem.lower(), shipped_names, 1)
    shipped = f"shipped configurations: {', '.join(shipped_names)}"
    return f"did you mean {similar_names[0]}? ({shipped})" if similar_names else f"check the path; {shipped}"


def _load_extends_chain(path: Path, extending_paths: tuple[Path, ...]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """`path` and the files that it extends, most basic first, each with its values (without `extends`)."""
    if path.resolve() in extending_paths:
        names = " -> ".join(p.name for p in (*extending_paths, path))
        raise SettingsError(f"these files extend one another in a circle: {names}; remove one `extends`")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        extended_by = f", which {extending_paths[-1].name} extends" if extending_paths else ""
        raise SettingsError(
            f"cannot read settings file {path}{extended_by} ({error.strerror}); {_suggest_config(path)}"
        ) from None
    except UnicodeDecodeError:
        raise SettingsError(f"settings file {path} is not UTF-8 text; pass a YAML file") from None
    values = parse_yaml(text, str(path)) or {}
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: expected a mapping, got {type(values).__name__}; write `key: value` lines")
    extends = values.pop("extends", None) or []
    bases = [extends] if isinstance(extends, str) else extends
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise SettingsError(
            f"{path}: extends={extends!r} must be a file, the name of a configuration, or a list of them"
        )
    for base in bases:
        yield from _load_extends_chain(_find_config(Path(base), path.parent), (*extending_paths, path.resolve()))
    yield path, values


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        shipped_path = _find_config(Path(text.strip() or "."))
        hint = f"; for this configuration write --config {text}" if shipped_path.is_file() else ""
        raise SettingsError(f"{text!r} is not an override; write key=value, such as algorithm.steps=20{hint}")
    # What these begin in YAML (aliases, tags, blocks) has no use in one value, and a path such as *.jsonl has.
    value = json.dumps(value.strip()) if value.strip().startswith(_YAML_MARKS) else value
    return key.strip(), parse_yaml(value, f"override {text}")


def _nest_value(dotted_key: str, value: Any) -> dict[str, Any]:
    """`value` as a tree: a.b=1 becomes {a: {b: 1}}."""
    first, _, rest = dotted_key.partition(".")
    return {first: _nest_value(rest, value) if rest else value}


def _check_keys(values: Mapping[Any, Any], source: str, known_keys: frozenset[str]) -> None:
    """Refuse the keys of earlier releases, all in one message, and then the first unknown key."""
    changes = [f"{key} is now {text}" for key, text in describe_old_keys(values).items() if key not in known_keys]
    if changes:
        raise SettingsError(
            f"settings were renamed or removed: {'; '.join(changes)} ({source}); write the new names, and remove keys "
            "that are constants now"
        )
    _check_known(values, source, known_keys, "")


def _check_known(values: Mapping[Any, Any], source: str, known_keys: frozenset[str], prefix: str) -> None:
    for key, value in values.items():
        dotted_key = f"{prefix}{key}"
        if "." in str(key):
            nested = str(_nest_value(str(key), "...")).replace("'", "")[1:-1]
            raise SettingsError(
                f"{dotted_key} ({source}): write the sections of a key one in the other, as in {nested}"
            )
        if dotted_key in known_keys:
            continue
        if not any(known_key.startswith(f"{dotted_key}.") for known_key in known_keys):
            while isinstance(value, Mapping) and value:
                key, value = next(iter(value.items()))
                dotted_key += f".{key}"
            raise SettingsError(f"unknown setting {dotted_key} ({source}); {_suggest_fix(dotted_key, known_keys)}")
        if isinstance(value, Mapping):
            _check_known(value, source, known_keys, f"{dotted_key}.")


def _suggest_fix(unknown_key: str, known_keys: frozenset[str]) -> str:
    section, _, rest = unknown_key.partition(".")
    objective, _, name = rest.partition(".")
    hint = suggest_key(unknown_key, known_keys)
    if unknown_key in ("config", "extend", "extends"):
        return "extend another file by `extends: FILE` in a file, or name it by --config FILE"
    if section == "reward" and name in RewardModelSettings.model_fields and not hint.endswith(f".{objective}?"):
        return f"{hint.rstrip('?')}, or is {objective} an objective of your own? Then add objectives.{objective}"
    return hint


def suggest_key(unknown_key: str, known_keys: frozenset[str] | None = None) -> str:
    """Hint for an unknown key: a key with a similar spelling, or the same name in another section."""
    if known_keys is None:
        known_keys = frozenset(key for key, _ in iter_setting_fields())
    if unknown_key in known_keys:
        return f"write {unknown_key}=VALUE"
    # 0.75 finds single typos in long dotted keys; a bare name has fewer characters, so its cutoff is lower.
    name = unknown_key.rpartition(".")[2]
    same_name = sorted(key for key in known_keys if key.rpartition(".")[2] == name)
    candidates = {*known_keys, *(key.rpartition(".")[0] for key in known_keys if "." in key)}
    similar_keys = difflib.get_close_matches(unknown_key, sorted(candidates), 1, cutoff=0.75)
    if similar_keys or same_name:
        return f"did you mean {' or '.join(similar_keys or same_name[:3])}?"
    known_names = sorted({key.rpartition(".")[2] for key in known_keys})
    similar_names = difflib.get_close_matches(name, known_names, 1, cutoff=0.6)
    if similar_names:
        keys = sorted(key for key in known_keys if key.rpartition(".")[2] == similar_names[0])
        return f"did you mean {' or '.join(keys[:3])}?"
    return "--help lists all settings"


def _format_validation_error(
    error: ValidationError, sources: Mapping[str, str], fields: Mapping[str, FieldInfo]
) -> str:
    """One message for all invalid values: dotted key, value, source, and the rule."""
    rules_by_value: dict[tuple[str, str], list[str]] = {}
    for problem in error.errors(include_url=False):
        dotted_key, rule = _find_rule(problem, sources)
        # A value that may be of two types is a problem of each of them.
        is_setting = dotted_key in sources
        rules_by_value.setdefault((dotted_key, repr(problem["input"]) if is_setting else rule), []).append(rule)
    lines = []
    for (dotted_key, value), rules in rules_by_value.items():
        description = fields[dotted_key].description if dotted_key in fields else None
        meaning = f" (meaning: {' '.join(description.split()).rstrip('.')})" if description else ""
        source = sources.get(dotted_key, DEFAULT_SOURCE)
        if dotted_key in sources:
            lines.append(f"{dotted_key}={value} ({source}): {', or '.join(rules)}; change it{meaning}")
        else:  # a rule between the keys of a section begins with the name of one of them
            lines.append(f"{dotted_key}.{rules[0]}" if dotted_key else rules[0])
    return lines[0] if len(lines) == 1 else f"{len(lines)} settings are wrong:\n  " + "\n  ".join(lines)


def _find_rule(problem: ErrorDetails, sources: Mapping[str, str]) -> tuple[str, str]:
    """Dotted key of a problem, empty for one of several keys, and the rule that its value breaks."""
    location = [str(item) for item in problem["loc"]]
    # pydantic appends the index in a list, the key in a mapping, or the branch of a union; settings keys end before it.
    while len(location) > 1 and ".".join(location) not in sources:
        location.pop()
    rule = (
        problem["msg"]
        .removeprefix("Value error, ")
        .replace("Input should be", "must be")
        .replace("String should", "must")
        .replace("Tuple should", "must")
        .replace("Field required", "an item is missing")
        .replace(", unable to", "; could not")
        .replace("a valid tuple", "a list, such as [a, b]")
        .replace("a valid dictionary", "a mapping, such as {a: 1}")
    )
    return ".".join(location), rule
