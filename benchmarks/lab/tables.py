"""Write docs/claims.md from stored results: one section and one figure per claim, each by its own command."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.drawing import Figure
from lab.store import ResultStore

PAGE_NAME, PICTURE_FOLDER = "claims.md", "images"


@dataclass(frozen=True, slots=True)
class ClaimResult:
    """Result of a claim: the verdict by the rule set before the runs, a table, remarks, a figure, and plain numbers."""

    title: str
    passed: bool | None
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    remarks: Sequence[str] = ()
    figure: Figure | None = None
    numbers: dict[str, Any] = field(default_factory=dict)


def write_claim_section(
    store: ResultStore, claim: int, docs_folder: Path, claim_functions: dict[int, Callable[[ResultStore], ClaimResult]]
) -> dict[str, Any]:
    """Compute missing results, write the claim's section and figure into the docs, and return its numbers."""
    result = claim_functions[claim](store)
    verdict = (
        "reported, neither passed nor failed"
        if result.passed is None
        else "passes"
        if result.passed
        else "**does not pass**"
    )
    lines = [
        f"## {f'Claim {claim}' if claim else 'Headline'}: {result.title}", "",
        f"`make bench NAME=claims ARGS={claim}`, world `{store.world_fingerprint}`: {verdict}.", "",
        f"| {' | '.join(result.header)} |", f"|{'---|' * len(result.header)}",
        *(f"| {' | '.join(row)} |" for row in result.rows), "",
    ]  # fmt: skip
    if result.figure is not None:
        picture_name = f"claim-{claim:02d}.svg"
        (docs_folder / PICTURE_FOLDER / picture_name).write_text(result.figure.svg(), "utf-8")
        lines += [f"![{result.figure.title}]({PICTURE_FOLDER}/{picture_name})", ""]
    lines += [line for remark in result.remarks for line in (remark, "")]
    page_path = docs_folder / PAGE_NAME
    page_path.write_text(insert_section(page_path.read_text("utf-8"), claim, "\n".join(lines)), "utf-8")
    return {"claim": claim, "world": store.world_fingerprint, "passed": result.passed, **result.numbers}


def insert_section(page: str, claim: int, section: str) -> str:
    """Replace the claim's section between its marks, or insert it in the order of the claims."""
    begin_mark, end_mark = f"<!-- claim {claim} -->", f"<!-- end of claim {claim} -->"
    section_block = f"{begin_mark}\n{section.rstrip()}\n{end_mark}\n"
    if begin_mark in page:
        return re.sub(
            re.escape(begin_mark) + ".*?" + re.escape(end_mark) + "\n", lambda _: section_block, page, flags=re.DOTALL
        )
    for match in re.finditer(r"<!-- claim (\d+) -->", page):
        if int(match.group(1)) > claim:
            return f"{page[: match.start()]}{section_block}\n{page[match.start() :]}"
    return f"{page.rstrip()}\n\n{section_block}"


def format_lift(estimate: dict[str, Any], *, mean_key: str = "lift") -> str:
    """A lift with its interval."""
    return (
        "undefined"
        if estimate.get("low") is None
        else f"{estimate[mean_key]:+.1%} [{estimate['low']:+.1%}, {estimate['high']:+.1%}]"
    )


def format_interval(estimate: dict[str, float], value_key: str) -> str:
    """A coefficient with its interval."""
    return f"{estimate[value_key]:.2f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"
