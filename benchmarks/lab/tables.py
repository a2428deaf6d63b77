"""From kept results to docs/claims.md: one section and one figure a claim, each by its own command."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.drawing import Figure
from lab.store import Store

PAGE, PICTURES = "claims.md", "images"


@dataclass(frozen=True, slots=True)
class Told:
    """What a claim's results say: the verdict by the rule set before, a table, remarks, a figure, and plain numbers."""

    title: str
    passed: bool | None
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    remarks: Sequence[str] = ()
    figure: Figure | None = None
    numbers: dict[str, Any] = field(default_factory=dict)


def tell(store: Store, claim: int, docs: Path, claims: dict[int, Callable[[Store], Told]]) -> dict[str, Any]:
    """Make what is missing, write the claim's section and figure into `docs`, and return its numbers."""
    told = claims[claim](store)
    verdict = (
        "told, neither passed nor failed" if told.passed is None else "passes" if told.passed else "**does not pass**"
    )
    lines = [
        f"## {f'Claim {claim}' if claim else 'Headline'}: {told.title}", "",
        f"`make bench NAME=claims ARGS={claim}`, world `{store.world}`: {verdict}.", "",
        f"| {' | '.join(told.header)} |", f"|{'---|' * len(told.header)}",
        *(f"| {' | '.join(row)} |" for row in told.rows), "",
    ]  # fmt: skip
    if told.figure is not None:
        name = f"claim-{claim:02d}.svg"
        (docs / PICTURES / name).write_text(told.figure.svg(), "utf-8")
        lines += [f"![{told.figure.title}]({PICTURES}/{name})", ""]
    lines += [line for remark in told.remarks for line in (remark, "")]
    page = docs / PAGE
    page.write_text(put(page.read_text("utf-8"), claim, "\n".join(lines)), "utf-8")
    return {"claim": claim, "world": store.world, "passed": told.passed, **told.numbers}


def put(page: str, claim: int, section: str) -> str:
    """The page with the claim's section in its place: between its marks, or in the order of the claims' marks."""
    begin, end = f"<!-- claim {claim} -->", f"<!-- end of claim {claim} -->"
    block = f"{begin}\n{section.rstrip()}\n{end}\n"
    if begin in page:
        return re.sub(re.escape(begin) + ".*?" + re.escape(end) + "\n", lambda _: block, page, flags=re.DOTALL)
    for match in re.finditer(r"<!-- claim (\d+) -->", page):
        if int(match.group(1)) > claim:
            return f"{page[: match.start()]}{block}\n{page[match.start() :]}"
    return f"{page.rstrip()}\n\n{block}"


def lift(one: dict[str, Any], *, mean: str = "lift") -> str:
    """A lift with its interval."""
    return "undefined" if one.get("low") is None else f"{one[mean]:+.1%} [{one['low']:+.1%}, {one['high']:+.1%}]"


def interval(one: dict[str, float], value: str) -> str:
    """A coefficient with its interval."""
    return f"{one[value]:.2f} [{one['low']:.2f}, {one['high']:.2f}]"
