"""User erasure: rewrite a data set without a user's rows, verify it, and exclude the user from later builds."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence, Set
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rluf.errors import DataError
from rluf.prepare.card_page import write_card_page
from rluf.prepare.workspace import CARD_FILE_NAME, write_table
from rluf.utils.files import replace_folder
from rluf.utils.hashing import hash_user_id, is_hashed_user_id, list_user_id_forms, read_user_salt, strip_user_id_tag

ERASURE_REASON = "user asked to be forgotten"

USER_COLUMNS = frozenset({"user_id", "device", "author"})
"""Columns with ids of users and devices."""


def erase_users(data_folder: Path, user_ids: Sequence[str]) -> dict[str, Any]:
    """Remove users from a prepared data set and return the proof. Each id may be raw, as the user knows it, or hashed.

    Rows that name a user in any column are removed from every file: ids in columns, and in quarantine the parsed raw
    bytes. The files are written to a second folder and read back: no row of the users is left, and all other rows are
    unchanged. Card and page are built from counts and the rows that are left. Then the folder is replaced in one step.
    The card keeps a one-way mark of each user, also of ids without a row, so that the next prepare from the same logs
    into this folder excludes them too. `users_not_found` of the proof lists ids without a row. Raises DataError when
    `data_folder` is not a prepared data set, or has no row of any of the users.
    """
    data_folder = data_folder.resolve()
    if not (data_folder / CARD_FILE_NAME).is_file():
        raise DataError(f"{data_folder} has no {CARD_FILE_NAME}; name the folder of a data set (prepare.output)")
    if blank_ids := [user_id for user_id in user_ids if not user_id.strip()]:
        raise DataError(f"expected ids of users, got {blank_ids[0]!r}; give each as in the raw log")
    forms_by_user = {user_id: list_user_id_forms(user_id) for user_id in user_ids}
    id_forms = sorted({id_form for forms in forms_by_user.values() for id_form in forms})
    found_ids: set[str] = set()
    new_folder = data_folder.with_name(f".{data_folder.name}.forget")
    shutil.rmtree(new_folder, ignore_errors=True)
    try:
        removed_rows = {}
        for path in sorted(path for path in data_folder.rglob("*") if path.is_file()):
            relative_path = path.relative_to(data_folder)
            (new_folder / relative_path).parent.mkdir(parents=True, exist_ok=True)
            if path.suffix != ".parquet":
                shutil.copyfile(path, new_folder / relative_path)
                continue
            old_table = pq.read_table(path)
            row_ids = _list_row_ids(old_table, id_forms)
            found_ids.update(*row_ids)
            new_table = old_table.filter(pa.array([not ids for ids in row_ids], pa.bool_()))
            write_table(new_folder / relative_path, new_table)
            _verify_file(new_folder / relative_path, new_table, id_forms)
            removed_rows[str(relative_path)] = old_table.num_rows - new_table.num_rows
        unknown_users = [user_id for user_id, forms in forms_by_user.items() if not found_ids.intersection(forms)]
        if not any(removed_rows.values()):
            raise DataError(
                f"none of {len(user_ids)} users has a row in {data_folder}: {', '.join(unknown_users[:5])}; give ids "
                "as in the raw log, and set RLUF_USER_SALT to the salt that the ids were hashed with (a service on one "
                "machine keeps its salt in the file .log/salt of its feedback folder)"
            )
        proof = _update_card(new_folder, id_forms, removed_rows)
        replace_folder(new_folder, data_folder)
    finally:
        shutil.rmtree(new_folder, ignore_errors=True)
    # Not in the card: an id without a row may be that of a user of another data set.
    return proof | {"users_not_found": unknown_users}


def _list_row_ids(table: pa.Table, id_forms: Sequence[str]) -> list[set[str]]:
    """Ids of these users that each row [N] names: in a column with ids, or in the raw bytes of quarantine."""
    row_ids: list[set[str]] = [set() for _ in range(table.num_rows)]
    known_ids = pa.array(id_forms, pa.string())
    for name in {*USER_COLUMNS, "id", "group"}.intersection(table.column_names):
        for index in np.flatnonzero(pc.is_in(table[name], known_ids).to_numpy()).tolist():
            row_ids[index].add(table[name][index].as_py())
    hashed_forms, salt = {form for form in id_forms if is_hashed_user_id(form)}, read_user_salt()
    for name in {"raw", "extra_fields"}.intersection(table.column_names):
        for index, raw in enumerate(table[name].cast(pa.binary()).to_pylist()):
            row_ids[index] |= find_named_ids(raw or b"", id_forms)
            if hashed_forms and salt is not None:
                # These rows are not hashed: a user who is given by the hashed id stands in them with the raw one.
                hashed_words = {hash_user_id(word, salt) for word in _list_possible_ids(raw or b"")}
                row_ids[index] |= hashed_words & hashed_forms
    return row_ids


def find_named_ids(raw: bytes, id_forms: Sequence[str]) -> set[str]:
    """Ids that a raw row names: as a value of its JSON, or, as such rows may not parse, as a whole word in its bytes.

    The bytes are searched as they are and with JSON's escapes resolved.
    """
    text = _decode_with_escapes(raw)
    # Whole words: user-1 is not user-12. Most rows name none of them, so a plain search comes first.
    return {
        id_form
        for id_form in id_forms
        if id_form in text and re.search(rf"(?<![\w-]){re.escape(id_form)}(?![\w-])", text)
    }


_JSON_ESCAPE = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[\"\\/bfnrt])"
)
_JSON_LITERAL = re.compile(r'"((?:[^"\\]|\\.)*+)(?:"|\Z|\\)')
"""A JSON string, which may be cut off: otherwise a search from each of its quotes would read the rest of the text."""

_CSV_CELL = re.compile(r'"((?:[^"\n]|"")*+)"')


def _decode_with_escapes(raw: bytes) -> str:
    """Text of a raw row; where it has JSON's escapes, or the doubled quotes of a CSV, also with them resolved."""
    text = raw.decode("utf-8", "replace")
    forms = [text]
    if "\\" in text:
        forms.append(_JSON_ESCAPE.sub(_resolve_escape, text))
    if '""' in text:
        forms.append(text.replace('""', '"'))
    return "\n".join(forms)


def _resolve_escape(match: re.Match[str]) -> str:
    return str(json.loads(f'"{match[0]}"'))


def _verify_file(path: Path, expected_table: pa.Table, user_ids: Sequence[str]) -> None:
    """Read a new file back. Raises DataError when it has a row of these users or differs from the expected table."""
    actual_table = pq.read_table(path)
    if any(_list_row_ids(actual_table, user_ids)) or not actual_table.equals(expected_table):
        raise DataError(
            f"{path} reads back with rows of the erased users or with other rows changed; the data set is unchanged: "
            "check the disk and run again"
        )


def _update_card(new_folder: Path, user_ids: Sequence[str], removed_rows: dict[str, int]) -> dict[str, Any]:
    """Record the erasure in the card of the new folder, correct its counts, and return the proof."""
    card = json.loads((new_folder / CARD_FILE_NAME).read_text(encoding="utf-8"))
    proof = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows_removed": removed_rows,
        "rows_left": {name: pq.read_metadata(new_folder / name).num_rows for name in removed_rows},
        "rows_of_these_users_left": 0,
        "sha256": {name: _hash_file(new_folder / name) for name in removed_rows},
    }
    card["forgotten"] = sorted({*card.get("forgotten", []), *(compute_erasure_mark(user_id) for user_id in user_ids)})
    card["deletions"] = [*card.get("deletions", []), proof]
    love_rows = sum(count for name, count in removed_rows.items() if name.startswith("love/"))
    if love_rows:
        # The card's equation (in = kept + dropped + quarantined) must still hold after the erasure.
        feedback_counts = card["counts"]["feedback"]
        feedback_counts["kept"] -= love_rows
        feedback_counts["dropped"][ERASURE_REASON] = feedback_counts["dropped"].get(ERASURE_REASON, 0) + love_rows
    for split, split_summary in card["splits"].get("love", {}).items():
        table = pq.read_table(new_folder / "love" / f"{split}.parquet", columns=["user_id"])
        split_summary |= {"rows": table.num_rows, "users": pc.count_distinct(table["user_id"]).as_py()}
    (new_folder / CARD_FILE_NAME).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_card_page(card, new_folder)
    return proof


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def compute_erasure_mark(user_id: str) -> str:
    """One-way mark of an erased user (raw or hashed id) in the card: it recognizes the id and reveals nothing else."""
    data = user_id.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=16, person=b"rluf-forgotten").hexdigest()


def match_erased_users(user_ids: Sequence[str], erasure_marks: Sequence[str]) -> list[bool]:
    """Whether each user [N] is among those whose marks a card records."""
    known_marks = set(erasure_marks)
    is_erased: dict[str, bool] = {}
    for user_id in user_ids:
        if user_id not in is_erased:
            # Cards of earlier releases mark the hash without its tag.
            forms = (user_id, strip_user_id_tag(user_id))
            is_erased[user_id] = any(compute_erasure_mark(form) in known_marks for form in forms)
    return [is_erased[user_id] for user_id in user_ids]


def is_row_of_erased_user(raw: bytes, erasure_marks: Set[str], hash_user: Callable[[str], str]) -> bool:
    """Whether the raw bytes of a row name an erased user: as a JSON value, a cell or a word, raw or hashed."""
    words = _list_possible_ids(raw)
    return any(compute_erasure_mark(form) in erasure_marks for word in words for form in (word, hash_user(word)))


def _list_possible_ids(raw: bytes) -> set[str]:
    """JSON values, cells and words of the raw bytes of a row: one of them is the id that the row names."""
    text = _decode_with_escapes(raw)
    words = {word for pattern in (r'[^"\n]+', r"[^\s\",;{}\[\]]+", r"[\w-]+") for word in re.findall(pattern, text)}
    words |= {cell.replace('""', '"') for cell in _CSV_CELL.findall(text)}
    return words | {_JSON_ESCAPE.sub(_resolve_escape, literal) for literal in _JSON_LITERAL.findall(text)}
