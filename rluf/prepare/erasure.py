"""User erasure: rewrite a data set without a user's rows, verify it, and exclude the user from later builds."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rluf.errors import DataError
from rluf.prepare.card_page import write_card_page
from rluf.prepare.workspace import CARD_FILE_NAME, write_table
from rluf.utils.files import replace_folder
from rluf.utils.hashing import list_user_id_forms, strip_user_id_tag

ERASURE_REASON = "user asked to be forgotten"


def erase_users(data_folder: Path, user_ids: Sequence[str]) -> dict[str, Any]:
    """Remove users from a prepared data set and return the proof. Each id may be raw, as the user knows it, or hashed.

    Every file is rewritten in a second folder and read back: no row of the users is left, no raw bytes in quarantine
    name them, and all other rows are unchanged. Then the folder is replaced in one step. The card keeps a one-way mark
    of each user, so that the next prepare from the same logs into this folder excludes them too. Raises DataError when
    `data_folder` is not a prepared data set, or has no row of any of the users.
    """
    data_folder = data_folder.resolve()
    if not (data_folder / CARD_FILE_NAME).is_file():
        raise DataError(f"{data_folder} has no {CARD_FILE_NAME}; name the folder of a data set (prepare.output)")
    id_forms = sorted({id_form for user_id in user_ids for id_form in list_user_id_forms(user_id)})
    new_folder = data_folder.with_name(f".{data_folder.name}.forget")
    shutil.rmtree(new_folder, ignore_errors=True)
    try:
        removed_rows = {}
        for path in sorted(path for path in data_folder.rglob("*") if path.is_file()):
            relative_path = path.relative_to(data_folder)
            if path.suffix != ".parquet":
                (new_folder / relative_path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, new_folder / relative_path)
                continue
            old_table = pq.read_table(path)
            new_table = old_table.filter(pc.invert(_find_user_rows(old_table, id_forms)))
            write_table(new_folder / relative_path, new_table)
            _verify_file(new_folder / relative_path, new_table, id_forms)
            removed_rows[str(relative_path)] = old_table.num_rows - new_table.num_rows
        if not any(removed_rows.values()):
            raise DataError(
                f"none of {len(user_ids)} users has a row in {data_folder}; give ids as in the raw log, and set "
                "RLUF_USER_SALT to the salt that the ids were hashed with (a service on one machine keeps its salt in "
                "the file .log/salt of its feedback folder)"
            )
        proof = _update_card(new_folder, id_forms, removed_rows)
        replace_folder(new_folder, data_folder)
    finally:
        shutil.rmtree(new_folder, ignore_errors=True)
    return proof


def _find_user_rows(table: pa.Table, user_ids: Sequence[str]) -> pa.Array:
    """Rows of these users; in quarantine, rows whose raw bytes name one of them."""
    if "user_id" in table.column_names:
        return pc.is_in(table["user_id"], pa.array(user_ids, pa.string()))
    if "raw" in table.column_names:
        # Quarantined rows may not parse, so the id is searched in the bytes, as a whole word: user-1 is not user-12.
        alternatives = b"|".join(re.escape(user_id.encode()) for user_id in user_ids)
        id_pattern = re.compile(rb"(?<![\w-])(?:" + alternatives + rb")(?![\w-])")
        return pa.array([bool(id_pattern.search(raw)) for raw in table["raw"].to_pylist()], pa.bool_())
    return pa.array([False] * table.num_rows, pa.bool_())


def _verify_file(path: Path, expected_table: pa.Table, user_ids: Sequence[str]) -> None:
    """Read a new file back. Raises DataError when it has a row of these users or differs from the expected table."""
    actual_table = pq.read_table(path)
    if pc.any(_find_user_rows(actual_table, user_ids)).as_py() or not actual_table.equals(expected_table):
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
