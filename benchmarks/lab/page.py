"""The results part of docs/claims.md: verdicts, the table of each claim, and the phase diagram, from stored results."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lab.claim_results import ResultsMissingError
from lab.store import ResultStore
from lab.verdicts import ClaimResult

BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def write_page(
    page_path: Path, store: ResultStore, functions: Mapping[int, Callable[[ResultStore], ClaimResult]]
) -> dict[str, Any]:
    """Replace the results of the page; returns verdicts by claim and the number of complete seeds."""
    results, not_run = {}, []
    for claim, function in sorted(functions.items()):
        try:
            results[claim] = function(store)
        except ResultsMissingError:
            not_run.append(str(claim))
    missing_seeds = {seed for seed, _, name in store.list_missing() if name != "phase"}
    complete = [seed for seed in store.seeds if seed not in missing_seeds]
    verdict_rows = [
        [_format_title(claim, result.title), _count_seeds(result), _emphasize(result.verdict)]
        for claim, result in results.items()
    ]
    lines = [
        f"`make bench NAME=claims ARGS=write`, world `{store.world_fingerprint}`, seeds {store.seeds[0]} to "
        f"{store.seeds[-1]}, {len(complete)} of {len(store.seeds)} with all results. Intervals are over seeds, 95%.",
        "",
        *_format_table(["claim", "seeds", "verdict"], verdict_rows),
    ]
    if not_run:
        lines += [f"Not run: claims {', '.join(not_run)}.", ""]
    for claim, result in results.items():
        lines += [f"### {_format_title(claim, result.title)}", ""]
        if result.checks:
            check_rows = [check.format_row() for check in result.checks]
            lines += _format_table(["condition", "estimate", "verdict"], check_rows)
        if result.rows:
            lines += _format_table(result.header, result.rows)
        lines += [line for remark in result.remarks for line in (remark, "")]
    lines += _format_phase_diagram(list(store.load_stored("study", "phase").values()))
    page = page_path.read_text("utf-8")
    block = f"{BEGIN}\n" + "\n".join(lines).rstrip() + f"\n{END}"
    page_path.write_text(re.sub(f"{BEGIN}.*?{END}", lambda _: block, page, flags=re.DOTALL), "utf-8")
    return {"complete_seeds": len(complete), "verdicts": {str(claim): item.verdict for claim, item in results.items()}}


def _format_title(claim: int, title: str) -> str:
    return f"{claim}: {title}" if claim else f"Headline: {title}"


def _count_seeds(result: ClaimResult) -> str:
    return str(min(check.seed_count for check in result.checks)) if result.checks else "see below"


def _emphasize(verdict: str) -> str:
    return verdict if verdict == "pass" else f"**{verdict}**"


def _format_table(header: Any, rows: Any) -> list[str]:
    return [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *(f"| {' | '.join(row)} |" for row in rows), ""]


def _format_phase_diagram(studies: list[dict[str, Any]]) -> list[str]:
    """One row per cell, means over seeds; alarms and verdicts with the number of seeds that have them."""
    if not studies:
        return []
    rows = [_format_cell(cells) for cells in zip(*(study["cells"] for study in studies), strict=True)]
    header = [
        "price", "KL weight", "love weight", "nats", "farewells of w0", "farewells", "hacks", "love", "continuing",
        "monitors that alarm", "measured gate", "farewells with a mitigation",
    ]  # fmt: skip
    return [
        "### Phase diagram of hacking", "",
        f"Means of {len(studies)} seeds; no verdict. Love and continuing against w0 of the same KL weight. Monitors "
        "compare 3 replies a prompt with the base, as the quickstart does; alarms in at least half of the seeds.",
        "", *_format_table(header, rows),
    ]  # fmt: skip


def _format_cell(cells: tuple[dict[str, Any], ...]) -> list[str]:
    first, count = cells[0], len(cells)
    base_rate, rate, love, continuing, nats = (
        float(np.mean([cell[name] for cell in cells]))
        for name in ("control_farewells", "farewells", "love_lift", "continue_lift", "kl")
    )
    alarms = Counter(alarm for cell in cells for alarm in cell["alarms"])
    mitigated = [cell["mitigated"] for cell in cells if cell["mitigated"]]
    mitigations = [f"{name} {np.mean([item[name] for item in mitigated]):.1%}" for name in (mitigated or [{}])[0]]
    return [
        f"{first['price']:g}", f"{first['kl_coef']:g}", f"{first['weight']:g}", f"{nats:.1f}", f"{base_rate:.1%}",
        f"{rate:.1%}", f"{sum(cell['is_hacked'] for cell in cells)} of {count}", f"{love:+.0%}", f"{continuing:+.0%}",
        ", ".join(name.replace("_", " ") for name, hits in alarms.most_common() if 2 * hits >= count) or "none",
        " / ".join(f"{verdict} {hits}" for verdict, hits in Counter(cell["gate"] for cell in cells).items()),
        ", ".join(mitigations),
    ]  # fmt: skip
