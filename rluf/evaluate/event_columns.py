"""Columns of an event log: read JSON lines, CSV and Parquet, and parse the spellings that products write.

A value that is not understood raises DataError with the column, the value, its row and what to do; nothing is guessed
in silence.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NoReturn

import emoji
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rluf.errors import DataError
from rluf.prepare.schema import LOVE_REACTION
from rluf.utils.stats import Floats

Columns = dict[str, list[Any]]

FORMATS = "expected JSON lines or Parquet (.jsonl, .jsonl.gz, .parquet) or CSV (.csv, .tsv, .csv.gz)"
MISSING_TEXTS = frozenset({"", "null", "none", "nan", "n/a", "na", "<na>", "nil", "undefined", "\\n"})
"""Spellings of a missing value (lower case) that exporters write as text."""
PLACEHOLDER_USERS = frozenset({"anonymous", "unknown", "guest", "-1", "00000000-0000-0000-0000-000000000000"})
"""User ids that stand for "no id": as one user they would join thousands of people."""
YES_TEXTS = frozenset({"true", "yes", "y", "t", "on"})
NO_TEXTS = frozenset({"false", "no", "n", "f", "off"})
NO_REACTIONS = MISSING_TEXTS | {"no_reaction", "noreaction", "[]", "{}"}
LOVE_SPELLINGS = frozenset({
    LOVE_REACTION, "loved", "loves", "loved_it", "love_it", "love_reaction", "reaction_love", "heart", "hearts",
    "hearted", "red_heart", "heart_suit", "<3", "\u2764", "\u2665", "\u2661", "\u2763", "\U0001fa77", "\U0001f9e1",
    "\U0001f90e", "\U0001f90d", "\U0001f5a4", "\U0001f970", "\U0001f60d", "\U0001fa75", "\U0001fa76",
    "\U0001f493", "\U0001f63b", "\u2764\u200d\U0001f525", *map(chr, range(0x1F495, 0x1F4A0)),
})  # fmt: skip
"""Spellings of the love reaction, after normalize_reaction(). U+1F494 is left out: it is the broken heart."""
EPOCH_UNITS = ((1e8, 1.0), (1e11, 1e3), (1e14, 1e6), (1e17, 1e9))
"""Lowest magnitude of epoch times in seconds, milliseconds, microseconds and nanoseconds, and units per second."""
MAX_EPOCH = 1e20
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?")
_BYTES_SNIFFED = 4096


@dataclass(frozen=True, slots=True)
class ColumnSource:
    """Where a column comes from, for error messages: the file and the column's name."""

    path: Path
    name: str

    def raise_error(self, row: int, value: Any, expectation: str) -> NoReturn:
        """Raise DataError for the value of `row` (from 0)."""
        raise DataError(f"{self.path}: column {self.name!r}, row {row + 1}: {expectation}, got {_shorten_value(value)}")


def _shorten_value(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_columns(path: Path, names: Collection[str]) -> tuple[Columns, list[str]]:
    """The columns of `names` that the file has, as Python values, and all its column names. DataError if broken."""
    if not path.is_file():
        raise DataError(f"{path} is not a file; {FORMATS}")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] in ([".parquet"], [".pq"]):
        return _read_parquet(path, names)
    read_text: Callable[[IO[str], Path, Collection[str]], tuple[Columns, list[str]]] = _read_json_lines
    if suffixes and (suffixes[-2] if suffixes[-1] == ".gz" and len(suffixes) > 1 else suffixes[-1]) in (".csv", ".tsv"):
        read_text = _read_csv
    try:
        with path.open("rb") as binary:
            stream = gzip.GzipFile(fileobj=binary) if suffixes[-1:] == [".gz"] else binary
            # utf-8-sig: spreadsheets write a byte order mark, which would become part of the first column's name.
            with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text_stream:
                return read_text(text_stream, path, names)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); {FORMATS}") from error
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({error}); {FORMATS}") from error


def _read_parquet(path: Path, names: Collection[str]) -> tuple[Columns, list[str]]:
    try:
        available = list(pq.read_schema(path).names)
        table = pq.read_table(path, columns=[name for name in available if name in names], partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file; {FORMATS}") from error
    columns = {}
    for name in table.column_names:
        column = table.column(name)
        if pa.types.is_timestamp(column.type):
            column = pc.cast(column, pa.timestamp("us", tz=column.type.tz), safe=False)
        columns[name] = column.to_pylist(maps_as_pydicts="lossy")
    return columns, available


def _read_csv(stream: IO[str], path: Path, names: Collection[str]) -> tuple[Columns, list[str]]:
    first_line = stream.readline()
    stream.seek(0)
    delimiter = max(",;\t|", key=first_line.count)
    try:
        reader = csv.reader(stream, delimiter=delimiter)
        available = [name.strip() for name in next(reader, [])]
        positions = {name: available.index(name) for name in available if name in names}
        columns: Columns = {name: [] for name in positions}
        for row in reader:
            if not row:
                continue
            if len(row) != len(available):
                raise DataError(
                    f"{path} line {reader.line_num}: expected {len(available)} fields as in the header, got {len(row)}"
                    "; quote fields that contain the delimiter"
                )
            for name, position in positions.items():
                columns[name].append(row[position])
    except csv.Error as error:
        raise DataError(f"{path} is not readable CSV ({error}); {FORMATS}") from error
    return columns, available


def _read_json_lines(stream: IO[str], path: Path, names: Collection[str]) -> tuple[Columns, list[str]]:
    wanted = list(names)
    # A Struct parses these fields only: the messages of a log are most of its bytes.
    fields = [(f"field_{index}", Any, None) for index in range(len(wanted))]
    row_type = msgspec.defstruct(
        "EventRow", fields, rename={f"field_{index}": name for index, name in enumerate(wanted)}
    )
    decoder = msgspec.json.Decoder(row_type)
    columns: Columns = {name: [] for name in wanted}
    appends = [(columns[name].append, f"field_{index}") for index, name in enumerate(wanted)]
    available: list[str] = []
    for number, line in _iter_json_texts(stream, path):
        try:
            try:
                row = decoder.decode(line)
            except msgspec.DecodeError:
                # Python writes NaN, which is not JSON: read it as Python does, then as a missing value.
                line = json.dumps(_replace_nan(json.loads(line)), ensure_ascii=False)
                row = decoder.decode(line)
            available = available or list(msgspec.json.decode(line))
        except (msgspec.DecodeError, ValueError) as error:
            raise DataError(
                f"{path} line {number}: expected one JSON object, got {_shorten_value(line)}; {FORMATS}"
            ) from error
        for append, field in appends:
            append(getattr(row, field))
    # Writers leave out null fields, so the first row alone does not name all columns.
    with_values = [name for name, values in columns.items() if any(value is not None for value in values)]
    return columns, list(dict.fromkeys([*available, *with_values]))


def _replace_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _replace_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return list(map(_replace_nan, value))
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _iter_json_texts(stream: IO[str], path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers and JSON texts of the rows: lines, or the items of one array."""
    start = stream.read(_BYTES_SNIFFED).lstrip()
    stream.seek(0)
    if not start.startswith("["):
        yield from ((number, line) for number, line in enumerate(stream, start=1) if line.strip())
        return
    try:
        rows = json.load(stream)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {error.lineno}: not a JSON array ({error.msg}); {FORMATS}") from error
    yield from ((number, json.dumps(row)) for number, row in enumerate(rows, start=1))


def is_missing(value: Any) -> bool:
    """Whether a value is null, nan or a text that stands for it."""
    if isinstance(value, str):
        return value.strip().lower() in MISSING_TEXTS
    return value is None or (isinstance(value, float) and math.isnan(value))


def parse_texts(values: Sequence[Any], source: ColumnSource) -> list[str | None]:
    """Ids and names [N]: texts without surrounding space, whole numbers as their digits, None where missing."""
    texts: list[str | None] = []
    for row, value in enumerate(values):
        if type(value) is str and value and value.strip() == value and value.lower() not in MISSING_TEXTS:
            texts.append(value)
        elif is_missing(value):
            texts.append(None)
        elif isinstance(value, str | bool):
            texts.append(str(value).strip())
        elif _is_whole(value):
            # A column of whole numbers with gaps comes as floats from pandas: 17.0 is the user 17.
            texts.append(str(int(value)))
        elif isinstance(value, bytes):
            texts.append(value.hex())
        else:
            is_large = isinstance(value, float) and value.is_integer()
            advice = " (a float above 2^53 has lost digits: write it as text)" if is_large else ""
            source.raise_error(row, value, f"expected a text or a whole number{advice}")
    return texts


def _is_whole(value: Any) -> bool:
    # From 2^53 on, neighboring integers are the same float: two users would become one.
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer() and abs(value) < 2.0**53)


def parse_times(values: Sequence[Any], source: ColumnSource) -> Floats:
    """Seconds since 1970 [N] of ISO times with a zone, or epoch seconds, milli-, micro- or nanoseconds."""
    return np.array([_parse_time(value, row, source) for row, value in enumerate(values)], dtype=np.float64)


def _parse_time(value: Any, row: int, source: ColumnSource) -> float:
    expectation = "expected times with a time zone, such as 2026-01-31T12:00:00+00:00, or epoch seconds"
    if isinstance(value, str):
        text = value.strip()
        if _NUMBER.fullmatch(text):
            value = float(text)
        else:
            try:
                value = datetime.fromisoformat(f"{text[:-4]}+00:00" if text.upper().endswith(" UTC") else text)
            except ValueError:
                source.raise_error(row, value, expectation)
    if isinstance(value, datetime):
        if value.tzinfo is None:
            source.raise_error(row, value.isoformat(" "), expectation)
        return value.timestamp()
    if isinstance(value, int | float) and not isinstance(value, bool | date) and EPOCH_UNITS[0][0] <= value < MAX_EPOCH:
        return float(value) / next(units for lowest, units in reversed(EPOCH_UNITS) if value >= lowest)
    return source.raise_error(row, value, expectation)


def parse_numbers(values: Sequence[Any], source: ColumnSource, *, is_flag: bool = False) -> Floats:
    """Numbers [N], yes/no texts as 1 and 0, nan where missing; with `is_flag` nothing but 0 and 1 is allowed."""
    numbers = np.empty(len(values))
    expectation = "expected yes or no (true/false, 1/0)" if is_flag else "expected a number or yes/no"
    for row, value in enumerate(values):
        number = math.nan
        if isinstance(value, bool | int | float):
            number = float(value)
        elif isinstance(value, str) and not is_missing(value):
            text = value.strip().lower()
            if text in YES_TEXTS or text in NO_TEXTS:
                number = float(text in YES_TEXTS)
            elif _NUMBER.fullmatch(text):
                number = float(text)
            else:
                source.raise_error(row, value, expectation)
        elif not is_missing(value):
            source.raise_error(row, value, expectation)
        if math.isinf(number) or (is_flag and number not in (0.0, 1.0) and number == number):
            source.raise_error(row, value, expectation)
        numbers[row] = number
    return numbers


@lru_cache(maxsize=4096)
def normalize_reaction(name: str) -> str:
    """Spelling-independent form: lower case, underscores, emoji for a name in colons, 1 for 1.0."""
    text = re.sub(r"^(\d+)\.0+$", r"\1", name.strip().casefold())
    # A name between colons is an emoji for chat programs: ":heart_eyes:".
    text = emoji.emojize(text, language="alias").replace("\ufe0f", "").replace("\ufe0e", "").strip(":")
    return re.sub(r"[\s-]+", "_", text)


@dataclass(frozen=True, slots=True)
class ReactionColumn:
    """Reactions of N rows: the rows [K] with each name, and those of each spelling that was read as love."""

    rows_by_name: dict[str, list[int]]
    rows_by_spelling: dict[str, list[int]]


def parse_reactions(values: Sequence[Any], source: ColumnSource, love_names: Sequence[str] = ()) -> ReactionColumn:
    """Reactions of each row: a name, a list of names, or a mapping of names to counts.

    `love_names` are the spellings that mean love; without any, LOVE_SPELLINGS. DataError for a bare number or boolean
    that no love name explains, and for a love name that no row has.
    """
    love_keys = frozenset(map(normalize_reaction, love_names)) or LOVE_SPELLINGS
    rows_by_name: dict[str, list[int]] = {}
    rows_by_spelling: dict[str, list[int]] = {}
    for row, value in enumerate(values):
        for name in dict.fromkeys(_iter_reaction_names(value, row, source, love_keys)):
            if normalize_reaction(name) in love_keys:
                rows_by_spelling.setdefault(name, []).append(row)
                name = LOVE_REACTION
            elif name == LOVE_REACTION:
                name = f"{LOVE_REACTION} (not --love)"
            rows = rows_by_name.setdefault(name, [])
            if not rows or rows[-1] != row:
                rows.append(row)
    for name in love_names:
        if normalize_reaction(name) not in set(map(normalize_reaction, rows_by_spelling)):
            raise DataError(
                f"{source.path}: no row has the reaction {name!r} of --love; column {source.name!r} has "
                f"{', '.join(rows_by_name) or 'no reactions'}"
            )
    return ReactionColumn(rows_by_name, rows_by_spelling)


def _iter_reaction_names(value: Any, row: int, source: ColumnSource, love_keys: Collection[str]) -> Iterable[str]:
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in NO_REACTIONS:
            return ()
        if text[0] in "[{":
            return _iter_reaction_names(_parse_list_text(text, row, source), row, source, love_keys)
        names = [name.strip() for name in re.split(r"[|;,]", text)]
        return [name for name in names if name.lower() not in NO_REACTIONS]
    if is_missing(value):
        return ()
    if isinstance(value, dict):
        # {"love": 2, "laugh": 0}: a name with a count of 0 was not given.
        value = [name for name, count in value.items() if _is_given(count, row, source, value)]
    if isinstance(value, list | tuple):
        return [name for item in value for name in _iter_reaction_names(item, row, source, love_keys)]
    if isinstance(value, bool | int | float):
        # 1.0 is the 1 of a column with gaps.
        name = str(value if isinstance(value, bool) or not _is_whole(value) else int(value))
        if love_keys is LOVE_SPELLINGS:
            expectation = f"expected the name of a reaction; if this value means love, add --love {name}"
            source.raise_error(row, value, expectation)
        # With --love, other numbers are other reactions, and 0 is none.
        return (name,) if value or name.lower() in love_keys else ()
    return source.raise_error(row, value, "expected the name of a reaction or a list of names")


def _is_given(count: Any, row: int, source: ColumnSource, reactions: Any) -> bool:
    """Whether a count of a mapping {name: count} says that the reaction was given; a list is of those who gave it."""
    if isinstance(count, bool | int | float | list | None):
        return bool(count) and count == count
    return source.raise_error(row, reactions, 'expected counts by name, such as {"love": 2}, or a list of names')


def _parse_list_text(text: str, row: int, source: ColumnSource) -> Any:
    # CSV exports write lists as JSON or as Python text with single quotes.
    for candidate in (text, text.replace("'", '"')):
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(candidate)
    return source.raise_error(row, text, 'expected a list of reaction names, such as ["love"]')
