"""Plug-ins by package.module:name, and what their errors say."""

from __future__ import annotations

import pytest

from rluf.errors import SettingsError
from rluf.utils.plugins import load_plugin


def test_functions_and_objects_are_imported() -> None:
    assert load_plugin("json:dumps", kind="writer")({"a": 1}) == '{"a": 1}'
    assert load_plugin("math:pi", float, kind="constant") == pytest.approx(3.14159, abs=1e-5)


@pytest.mark.parametrize(
    ("reference", "expected_words"),
    [
        ("refusals", ["there is no judge 'refusals'", "choose one of length, refusal", "package.module:name"]),
        ("json:", ["there is no judge 'json:'"]),
        ("no_such_module_here:judge", ["cannot be imported", "no_such_module_here"]),
        ("json:no_such_function", ["cannot be imported", "no_such_function"]),
        ("math:pi", ["expected a function (text) -> bool, got float"]),
    ],
)
def test_errors_name_the_reference_and_the_choices(reference: str, expected_words: list[str]) -> None:
    with pytest.raises(SettingsError) as raised:
        load_plugin(reference, kind="judge", known_names=["refusal", "length"], signature="a function (text) -> bool")
    assert [word for word in expected_words if word not in str(raised.value)] == []


def test_the_expected_type_is_named_without_a_signature() -> None:
    with pytest.raises(SettingsError, match="constant 'json:dumps': expected float, got function"):
        load_plugin("json:dumps", float, kind="constant")


def take_two(first: object, second: object) -> None: ...


def test_a_function_with_other_arguments_is_refused_when_it_is_loaded() -> None:
    assert load_plugin(f"{__name__}:take_two", kind="judge", argument_count=2) is take_two
    with pytest.raises(SettingsError, match=r"judge '.*take_two': expected a function of text; missing a required"):
        load_plugin(f"{__name__}:take_two", kind="judge", signature="a function of text", argument_count=1)
    load_plugin("builtins:print", kind="judge", argument_count=3)


@pytest.mark.parametrize("reference", ["mine.py:score", "rewards/mine.py:score", "./mine.py:score"])
def test_a_path_of_a_file_gets_the_name_of_its_module(reference: str) -> None:
    with pytest.raises(SettingsError, match=r"write mine:score, without \.py"):
        load_plugin(reference, kind="reward function")
