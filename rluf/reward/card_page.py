"""The reward card as a page that a person can read: one self-contained HTML file, no scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;color:#1d2430}"
    "table{border-collapse:collapse;margin:.5rem 0 1.5rem}td,th{padding:.2rem .8rem;border-bottom:1px solid #dde2ea;"
    "text-align:left}td+td,th+th{text-align:right}svg{background:#f6f8fb}h2{margin-top:2rem}"
)
SIDE = 260
"""Pixels of the reliability plot's sides."""


def card_page(card: Mapping[str, Any]) -> str:
    """The page of a reward card (see rluf.reward.card.make_card)."""
    pairs = "pair_accuracy" in card
    figure = card["pair_accuracy" if pairs else "auroc"]
    floor = card["length_floor_accuracy" if pairs else "length_floor_auroc"]
    rows = [
        ("pair accuracy" if pairs else "AUROC", _interval(figure)),
        ("by length alone", floor),
        ("correlation of score and length", card["score_length_r"]),
        ("log-loss (nats)", card["log_loss"]),
        ("normalised entropy (1 knows only the base rate)", card["normalised_entropy"]),
        ("expected calibration error", card["ece"]),
        ("Brier score", card["brier"]),
    ]
    if not pairs:
        rows += [("PR-AUC", card["pr_auc"]), ("base rate", card["base_rate"]), ("mean value", card["mean_value"])]
    parts = [
        f"<h1>Reward card: {escape(str(card['objective']))}</h1>",
        f"<p>{card['n']} test rows of {card['clusters']} users or prompts that training never saw. Intervals are 95%, "
        "resampled by user or prompt.</p>",
        _table(("figure", "value"), rows),
        "<h2>Calibration</h2><p>Bins of equal mass: what the model says against what happened.</p>",
        _plot(card["reliability"]),
        _slices(card.get("slices", {})),
        _robustness(card.get("robustness", {})),
        _curve(card.get("learning_curve", [])),
        _previous(card.get("previous", {})),
        "<h2>Training</h2>",
        _table(("", "value"), [(k.replace("_", " "), v) for k, v in card["training"].items() if k != "history"]),
        _table(("setting", "value"), sorted(card["settings"].items())),
    ]
    title = f"<title>Reward card: {escape(str(card['objective']))}</title>"
    return f'<!doctype html><meta charset="utf-8">{title}<style>{STYLE}</style>' + "\n".join(parts) + "\n"


def _interval(figure: Mapping[str, Any]) -> str:
    return f"{_text(figure['mean'])} ({_text(figure['low'])} to {_text(figure['high'])})"


def _text(value: Any) -> str:
    if value is None:
        return "n/a"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(_text(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def _plot(bins: Sequence[Mapping[str, float]]) -> str:
    """Reliability: mean probability to the right, rate upwards; the diagonal is perfect."""
    most = max((max(b["mean"], b["rate"]) for b in bins), default=1.0) or 1.0
    top = 1.0 if most > 0.5 else most * 1.1
    dots = "".join(
        f'<circle cx="{SIDE * b["mean"] / top:.1f}" cy="{SIDE * (1 - b["rate"] / top):.1f}" r="4" fill="#c2185b"/>'
        for b in bins
    )
    line = f'<line x1="0" y1="{SIDE}" x2="{SIDE}" y2="0" stroke="#99a"/>'
    return (
        f'<svg width="{SIDE}" height="{SIDE}" role="img" aria-label="reliability plot">{line}{dots}</svg>'
        f"<p>Both axes run from 0 to {top:.3g}.</p>"
    )


def _slices(slices: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    text = "<h2>Slices</h2>" if slices else ""
    for column, parts in slices.items():
        heads = list(next(iter(parts.values())))
        rows = [(name, *(part.get(head) for head in heads)) for name, part in parts.items()]
        text += _table((column, *heads), rows)
    return text


def _curve(points: Sequence[Mapping[str, Any]]) -> str:
    if not points:
        return ""
    name = "pair_accuracy" if "pair_accuracy" in points[0] else "auroc"
    rows = [(point["train_rows"], _interval(point[name]), point["log_loss"]) for point in points]
    told = "<h2>Learning curve</h2><p>The same training on fewer rows, all tried on the same test rows.</p>"
    return told + _table(("rows", name.replace("_", " "), "log-loss"), rows)


def _previous(found: Mapping[str, Any]) -> str:
    if not found:
        return ""
    name = "pair_accuracy" if "pair_accuracy" in found else "auroc"
    rows = [
        (f"{name.replace('_', ' ')} of the earlier model", found[name]),
        ("this model's minus that", _interval(found[f"{name}_difference"])),
        ("correlation of the two scores", found["score_r"]),
    ]
    return f"<h2>Beside {escape(found['folder'])}</h2>" + _table(("figure", "value"), rows)


def _robustness(found: Mapping[str, Any]) -> str:
    if not found:
        return ""
    rows = [(n, c["mean_shift_sd"], c["raised"], c["rank_kept"]) for n, c in found["changes"].items()]
    return (
        f"<h2>Robustness</h2><p>{found['rows']} responses, changed. The shift of the mean logit is in its standard "
        "deviations; near 0 means that the change earns nothing.</p>"
        + _table(("change", "shift (sd)", "share raised", "order kept"), rows)
    )
