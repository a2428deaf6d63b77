"""Deleting a user: the data set is made anew from itself without the user's rows, with proof, and stays so."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rluf.errors import DataError
from rluf.prepare.card_page import write_page
from rluf.prepare.redact import forget_mark, hash_user, user_salt
from rluf.prepare.tables import write_table
from rluf.prepare.workspace import CARD, swap

REASON = "user asked to be forgotten"


def forget(folder: Path, users: Sequence[str]) -> dict[str, Any]:
    """Take users out of a prepared data set and return the proof. `users` are ids as in the raw log, or hashed ones.

    Every file is written anew beside and checked: no row of the users is left, in quarantine no raw bytes that name
    them, and all other rows are equal to what they were. Then the folder is swapped in one go. The card keeps a mark of
    each user, from which nobody can tell who it was without the id, so that the next prepare from the same logs into
    this folder leaves them out too. Raises DataError when `folder` is no data set of ours, or holds no such user.
    """
    folder = folder.resolve()
    if not (folder / CARD).is_file():
        raise DataError(f"{folder} holds no {CARD}; name the folder of a data set (prepare.output)")
    salt = user_salt()
    ids = sorted({*users, *(hash_user(user, salt) for user in users)})
    fresh = folder.with_name(f".{folder.name}.forget")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        removed = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder)
            if path.suffix != ".parquet":
                (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, fresh / name)
                continue
            before = pq.read_table(path)
            stay = before.filter(pc.invert(_theirs(before, ids)))
            write_table(fresh / name, stay)
            _prove(fresh / name, stay, ids)
            removed[str(name)] = before.num_rows - stay.num_rows
        if not any(removed.values()):
            raise DataError(
                f"none of {len(users)} users has a row in {folder}; give ids as in the raw log, with the salt that it "
                "was prepared with"
            )
        proof = _write_card(fresh, ids, removed)
        swap(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return proof


def _theirs(table: pa.Table, ids: Sequence[str]) -> pa.Array:
    """Rows of these users; in quarantine, rows whose raw bytes name one of them."""
    if "user_id" in table.column_names:
        return pc.is_in(table["user_id"], pa.array(ids, pa.string()))
    if "raw" in table.column_names:
        names = b"|".join(re.escape(user.encode()) for user in ids)
        named = re.compile(rb"(?<![\w-])(?:" + names + rb")(?![\w-])")
        return pa.array([bool(named.search(raw)) for raw in table["raw"].to_pylist()], pa.bool_())
    return pa.array([False] * table.num_rows, pa.bool_())


def _prove(path: Path, expected: pa.Table, ids: Sequence[str]) -> None:
    """Read a new file back. Raises DataError when it holds a row of these users or differs from what it must hold."""
    found = pq.read_table(path)
    if pc.any(_theirs(found, ids)).as_py() or not found.equals(expected):
        raise DataError(f"{path} is not what it must be after the deletion; the data set was left as it is: try again")


def _write_card(fresh: Path, ids: Sequence[str], removed: dict[str, int]) -> dict[str, Any]:
    card = json.loads((fresh / CARD).read_text(encoding="utf-8"))
    sizes = {name: pq.read_metadata(fresh / name).num_rows for name in removed}
    proof = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows_removed": removed,
        "rows_left": sizes,
        "rows_of_these_users_left": 0,
        "sha256": {name: _sha256(fresh / name) for name in removed},
    }
    card["forgotten"] = sorted({*card.get("forgotten", []), *(forget_mark(user) for user in ids)})
    card["deletions"] = [*card.get("deletions", []), proof]
    gone = sum(count for name, count in removed.items() if name.startswith("love/"))
    if gone:
        count = card["counts"]["feedback"]
        count["kept"] -= gone
        count["dropped"][REASON] = count["dropped"].get(REASON, 0) + gone
    for side, part in card["splits"].get("love", {}).items():
        table = pq.read_table(fresh / "love" / f"{side}.parquet", columns=["user_id"])
        part |= {"rows": table.num_rows, "users": pc.count_distinct(table["user_id"]).as_py()}
    (fresh / CARD).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_page(card, fresh)
    return proof


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def forgotten(users: Iterable[str], marks: Sequence[str]) -> list[bool]:
    """Whether each user [N] is among those whose marks a card keeps."""
    known = set(marks)
    seen: dict[str, bool] = {}
    return [seen[user] if user in seen else seen.setdefault(user, forget_mark(user) in known) for user in users]
