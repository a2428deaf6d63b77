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
