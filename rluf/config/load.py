"""From YAML files and key=value overrides to Settings, with the source of every value.

A file may extend others (`extends: base.yaml`, relative to itself). Mappings merge key by key, everything else is
replaced. What neither file nor override says keeps its default, inside every section.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from rluf.config.cpu_dtype import Dtype, why
from rluf.config.policy import ModelSettings
from rluf.config.reward import RewardSettings
from rluf.config.settings import Settings
from rluf.errors import SettingsError

DEFAULT = "default"
OVERRIDE = "override"

VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|(API|ACCESS|PRIVATE)_?KEY", re.IGNORECASE)
PASSWORD = re.compile(r"://[^/@\s:]*:[^/@\s]+@")


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings and where each value came from: dotted key -> default, a file's path, or override."""

    settings: Settings
    sources: Mapping[str, str]


@dataclass(slots=True)
class _Draft:
    """Values on their way to Settings: the tree, and the source of each dotted key."""

    tree: dict[str, Any]
    sources: dict[str, str] = field(default_factory=dict)

    def merge(self, values: Mapping[str, Any], source: str) -> None:
        self._merge(self.tree, values, source, "")

    def _merge(self, into: dict[str, Any], values: Mapping[str, Any], source: str, prefix: str) -> None:
        for key, value in values.items():
            dotted = f"{prefix}{key}"
            if isinstance(into.get(key), dict):
                if isinstance(value, Mapping):
                    self._merge(into[key], value, source, f"{dotted}.")
                elif value is not None:  # an empty section in YAML reads as null and changes nothing
                    raise SettingsError(
                        f"{dotted} is a section, not a value (now {value!r}, {source}); set one of its keys, "
                        f"such as {dotted}.{next(iter(into[key]))}"
                    )
            else:
                into[key] = value
                self.sources[dotted] = source


def load_settings(config: Path | None, overrides: Sequence[str] = ()) -> Loaded:
    """Settings from the defaults (the quickstart), then `config` and what it extends, then `key=value` overrides.

    A file that does not say its `name` gets the file's own, without the ending. Raises SettingsError, with the dotted
    key, the value, its source and what to do, for an unknown key, a wrong value, or keys that do not go together.
    """
    draft = _Draft(Settings().model_dump(mode="json"))
    known = frozenset(key for key, _ in fields())
    if config is not None:
        chain = list(_chain(config, ()))
        if "name" not in chain[-1][1]:
            chain[-1][1]["name"] = config.stem
        for path, values in chain:
            _check_keys(values, str(path), known)
            draft.merge(values, str(path))
    for override in overrides:
        values = _parse_override(override)
        _check_keys(values, OVERRIDE, known)
        draft.merge(values, OVERRIDE)
    sources = {key: draft.sources.get(key, DEFAULT) for key in known}
    try:
        settings = Settings.model_validate(draft.tree)
    except ValidationError as error:
        raise SettingsError(_explain(error, sources)) from None
    return _without_auto(settings, sources)


def _without_auto(settings: Settings, sources: dict[str, str]) -> Loaded:
    """Settings whose dtypes say what auto means here, so that every process of a run takes the same."""
    sections: dict[str, tuple[ModelSettings | RewardSettings, Dtype, float]] = {
        "model": (settings.model, settings.policy_dtype, settings.policy_gpus),
        "reward": (settings.reward, settings.reward_dtype, settings.cluster.gpus_per_reward),
    }
    found: dict[str, BaseModel] = {}
    for name, (section, dtype, gpus) in sections.items():
        if section.dtype == "auto":
            found[name] = section.model_copy(update={"dtype": dtype})
            sources[f"{name}.dtype"] = why(dtype, gpus=gpus)
    return Loaded(settings.model_copy(update=found), sources)


def fields(section: type[BaseModel] = Settings, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted key and declaration of every setting in the order of the tree, sections themselves left out."""
    for name, info in section.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from fields(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


class _Loader(yaml.SafeLoader):
    """Safe YAML that also refuses keys said twice, reads 1e-5 as a number, and off, yes and dates as plain text."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen: set[object] = set()
    for key, _ in node.value:
        name = loader.construct_object(key)
        if name in seen:
            raise yaml.constructor.ConstructorError(None, None, f"{name!r} is set twice", key.start_mark)
        seen.add(name)
    return loader.construct_mapping(node)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_TRAPS = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag not in _TRAPS]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_TRAPS[0], re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, source: str) -> Any:
    """Value of YAML text, ${VAR} and ${VAR:-default} expanded in its strings. `source` is for messages."""
    try:
        return _expand(yaml.load(text, _Loader), source)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise SettingsError(f"{source}{where} is not valid YAML: {problem}; mend that line") from None


def _expand(value: Any, source: str) -> Any:
    if isinstance(value, dict):
        return {key: _expand(inner, source) for key, inner in value.items()}
    if isinstance(value, list):
        return [_expand(inner, source) for inner in value]
    if not isinstance(value, str):
        return value
    if PASSWORD.search(value):
        raise SettingsError(
            f"a value of {PASSWORD.sub('://...@', source)} has a password before the @ of an address, and settings are "
            "written to the run folder; leave it out and give it by the storage's own environment variables, such as "
            "AWS_SECRET_ACCESS_KEY"
        )

    def replace(match: re.Match[str]) -> str:
        name, fallback = match.group(1), match.group(2)
        if SECRET.search(name):
            raise SettingsError(
                f"{source} uses {name}, which looks like a secret, and settings are written to the run folder and the "
                "log; leave it out: what needs it reads it from the environment"
            )
        found = os.environ.get(name) or fallback
        if found is None:
            raise SettingsError(
                f"{value!r} ({source}) uses {name}, which is not set; export it, or write ${{{name}:-...}}"
            )
        return found

    return VARIABLE.sub(replace, value)


def _chain(path: Path, below: tuple[Path, ...]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Files that `path` rests on, the furthest first, each with its values (without `extends`)."""
    if path.resolve() in below:
        names = " -> ".join(p.name for p in (*below, path))
        raise SettingsError(f"these files extend one another in a circle: {names}; drop one `extends`")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else "; check the path"
        used = f", which {below[-1].name} extends" if below else ""
        raise SettingsError(f"cannot read settings file {path}{used} ({error.strerror}){hint}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"settings file {path} is not UTF-8 text; give a YAML file") from None
    values = parse_yaml(text, str(path)) or {}
    if not isinstance(values, dict):
        raise SettingsError(f"{path} holds {type(values).__name__}, not a mapping; write `key: value` lines")
    extends = values.pop("extends", [])
    for base in [extends] if isinstance(extends, str) else extends:
        yield from _chain(path.parent / str(base), (*below, path.resolve()))
    yield path, values


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise SettingsError(f"{text!r} is not an override; write key=value, such as algorithm.steps=20")
    inner: Any = parse_yaml(value, f"override {text}")
    for part in reversed(key.strip().split(".")):
        inner = {part: inner}
    result: dict[str, Any] = inner
    return result


def _check_keys(values: Mapping[Any, Any], source: str, known: frozenset[str], prefix: str = "") -> None:
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if dotted in known:
            continue
        if not any(leaf.startswith(f"{dotted}.") for leaf in known):
            while isinstance(value, Mapping) and value:
                key, value = next(iter(value.items()))
                dotted += f".{key}"
            raise SettingsError(f"unknown setting {dotted} ({source}); {_nearest(dotted, known)}")
        if isinstance(value, Mapping):
            _check_keys(value, source, known, f"{dotted}.")


def _nearest(dotted: str, known: frozenset[str]) -> str:
    """Advice on what an unknown key may have meant: a key of the same name elsewhere, else one spelt alike."""
    last = dotted.rpartition(".")[2]
    same = sorted(leaf for leaf in known if leaf.rpartition(".")[2] == last)
    names = {*known, *(leaf.rpartition(".")[0] for leaf in known if "." in leaf)}
    near = difflib.get_close_matches(dotted, sorted(names), 1, cutoff=0.75)
    if near or same:
        return f"did you mean {' or '.join(near or same[:3])}?"
    lasts = sorted({leaf.rpartition(".")[2] for leaf in known})
    alike = difflib.get_close_matches(last, lasts, 1, cutoff=0.6)
    if alike:
        return f"did you mean {' or '.join(sorted(leaf for leaf in known if leaf.rpartition('.')[2] == alike[0])[:3])}?"
    return "--help lists all settings"


def _explain(error: ValidationError, sources: Mapping[str, str]) -> str:
    """One message for all that is wrong: dotted key, value, source, what is allowed."""
    lines = [_explain_one(problem, sources) for problem in error.errors(include_url=False)]
    return lines[0] if len(lines) == 1 else f"{len(lines)} settings are wrong:\n  " + "\n  ".join(lines)


def _explain_one(problem: ErrorDetails, sources: Mapping[str, str]) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    parts = [str(part) for part in problem["loc"]]
    if not parts:
        return message
    while len(parts) > 1 and ".".join(parts) not in sources:  # an index into a list is no key of its own
        parts.pop()
    dotted = ".".join(parts)
    rule = (
        message.replace("Input should be", "must be")
        .replace("String should", "must")
        .replace(", unable to", "; could not")
    )
    about = dict(fields())[dotted].description if dotted in sources else None
    return f"{dotted}={problem['input']!r} ({sources.get(dotted, DEFAULT)}): {rule}; change it" + (
        f" (it says: {about.rstrip('.')})" if about else ""
    )
