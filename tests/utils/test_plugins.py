"""Plug-ins by package.module:name, and what their errors say."""

from __future__ import annotations

from pathlib import Path

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
        (":dumps", ["there is no judge ':dumps'"]),
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


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import imported\n", "NameError in broken.py, line 1 > imported.py, line 1: name 'missing' is not defined"),
        ("def score(rows)\n    return []\n", "SyntaxError in broken.py, line 1: expected ':'"),
        ("def score(rows):\nreturn []\n", "IndentationError in broken.py, line 2: expected an indented block"),
        ("import os\nLIMIT = np.inf\n", "NameError in broken.py, line 2: name 'np' is not defined"),
        ("import json\njson.loads('{')\n", "JSONDecodeError in broken.py, line 2 > decoder.py, line"),
        ("\nimport package_that_is_missing\n", "ModuleNotFoundError in broken.py, line 2: No module named"),
        ("raise RuntimeError('set MY_KEY first')\n", "RuntimeError in broken.py, line 1: set MY_KEY first"),
    ],
)
def test_a_mistake_in_a_module_of_the_users_own_is_one_line_with_its_place(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text(source)
    (tmp_path / "imported.py").write_text("missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SettingsError) as raised:
        load_plugin("broken:score", kind="reward function")
    assert f"reward function 'broken:score' cannot be imported: {message}" in str(raised.value)
    assert str(raised.value).endswith("; correct that line") and "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x05\x95\x10"])
def test_a_damaged_file_of_a_function_says_what_to_do(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "function.pkl"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(SettingsError, match=r"function\.pkl' cannot be imported: .*; pass the function to rluf\.load"):
        load_plugin(f"pickle:{path}", kind="reward function")


async def take_one_later(first: object) -> None: ...


def test_an_async_function_is_refused_where_nothing_awaits_it() -> None:
    with pytest.raises(
        SettingsError, match=r"monitor '.*take_one_later': expected a measure; an async one is not await"
    ):
        load_plugin(f"{__name__}:take_one_later", kind="monitor", signature="a measure", argument_count=1)
