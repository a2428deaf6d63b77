"""Render the reward card as one self-contained HTML page without scripts, in the style of the run report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rluf.report.page import render_html_page

CARD_PAGE_FILE = "reward_card.html"
PLOT_SIZE_PX = 260
"""Width and height of the reliability plot in pixels."""


def render_card_page(card: Mapping[str, Any]) -> str:
    """HTML page of a reward card (see rluf.reward.card.build_reward_card)."""
    is_pairwise = "pair_accuracy" in card
    ranking = card["pair_accuracy" if is_pairwise else "auroc"]
    length_baseline = card["length_only_accuracy" if is_pairwise else "length_only_auroc"]
    metric_rows = [
        ("pair accuracy" if is_pairwise else "AUROC", _format_interval(ranking)),
        ("by length only", length_baseline),
        ("correlation of score and length", card["score_length_r"]),
        ("log-loss (nats)", card["log_loss"]),
        ("normalized entropy (1: no better than the base rate)", card["normalized_entropy"]),
        ("expected calibration error", card["ece"]),
        ("Brier score", card["brier"]),
    ]
    if not is_pairwise:
        metric_rows += [("PR-AUC", card["pr_auc"]), ("base rate", card["base_rate"])]
        metric_rows += [("mean value", card["mean_value"])]
    training_rows = [(key.replace("_", " "), value) for key, value in card["training"].items() if key != "history"]
    training_tables: list[tuple[str, Sequence[str], Sequence[Sequence[Any]]]]
    training_tables = [("Training", ("", "Value"), training_rows)]
    training_tables.append(_build_truncation_table(card.get("truncation", {})))
    training_tables.append(("Settings", ("Setting", "Value"), sorted(card["settings"].items())))
    sections = [
        _build_slice_section(card.get("slices", {})),
        _build_prompt_fit_section(card.get("prompt_fit", {})),
        _build_robustness_section(card.get("robustness", {})),
        _build_learning_curve_section(card.get("learning_curve", [])),
        _build_comparison_section(card.get("previous", {})),
        _build_section("Training", " ".join(f"Warning: {text}." for text in card.get("warnings", [])), training_tables),
    ]
    return render_html_page(
        "reward_card.html.j2",
        package="rluf.reward",
        objective=card["objective"],
        row_count=card["n"],
        cluster_count=card["clusters"],
        metric_rows=_format_rows(metric_rows),
        plot=_build_reliability_plot(card["reliability"]),
        sections=[section for section in sections if section is not None],
    )


def _format_interval(estimate: Mapping[str, Any]) -> str:
    return f"{_format_value(estimate['mean'])} ({_format_value(estimate['low'])} to {_format_value(estimate['high'])})"


def _format_value(value: Any) -> str:
    if value is None:
        return "n/a"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _format_rows(rows: Sequence[Sequence[Any]]) -> list[list[str]]:
    return [[_format_value(cell) for cell in row] for row in rows]


def _build_section(
    heading: str, text: str, tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[Any]]]]
) -> dict[str, Any]:
    """A section of the page: heading, paragraph, and tables of (caption, column names, rows)."""
    formatted_tables = [(caption, columns, _format_rows(rows)) for caption, columns, rows in tables]
    return {"heading": heading, "text": text, "tables": formatted_tables}


def _build_reliability_plot(bins: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Points of the reliability plot in pixels: mean probability on the x axis, rate on the y axis."""
    size = PLOT_SIZE_PX
    largest = max((max(b["mean"], b["rate"]) for b in bins), default=1.0) or 1.0
    # Reactions are rare: at low base rates all points would crowd the origin of a 0 to 1 plot.
    axis_max = 1.0 if largest > 0.5 else largest * 1.1
    points = [(size * b["mean"] / axis_max, size * (1 - b["rate"] / axis_max)) for b in bins]
    return {"size": size, "axis_max": axis_max, "points": points}


def _build_slice_section(slices: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any] | None:
    tables = []
    for slice_column, metrics_by_value in slices.items():
        metric_names = list(next(iter(metrics_by_value.values())))
        rows = [(value, *(metrics.get(name) for name in metric_names)) for value, metrics in metrics_by_value.items()]
        tables.append((f"By {slice_column}", (slice_column, *metric_names), rows))
    return _build_section("Slices", "", tables) if tables else None


def _build_learning_curve_section(curve_points: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not curve_points:
        return None
    metric_name = "pair_accuracy" if "pair_accuracy" in curve_points[0] else "auroc"
    rows = [(point["train_rows"], _format_interval(point[metric_name]), point["log_loss"]) for point in curve_points]
    columns = ("rows", metric_name.replace("_", " "), "log-loss")
    text = "The same training on fewer rows, evaluated on the same test rows."
    return _build_section("Learning curve", text, [("Learning curve", columns, rows)])


def _build_comparison_section(comparison: Mapping[str, Any]) -> dict[str, Any] | None:
    if not comparison:
        return None
    metric_name = "pair_accuracy" if "pair_accuracy" in comparison else "auroc"
    rows = [
        (f"{metric_name.replace('_', ' ')} of the earlier model", comparison[metric_name]),
        ("difference to this model", _format_interval(comparison[f"{metric_name}_difference"])),
        ("correlation of the two scores", comparison["score_r"]),
    ]
    return _build_section(
        f"Compared with {comparison['folder']}", "", [("Earlier model against this one", ("metric", "value"), rows)]
    )


def _build_truncation_table(shares_by_split: Mapping[str, Mapping[str, float]]) -> tuple[str, Sequence[str], list[Any]]:
    rows = [
        (split, *(shares.get(name) for name in ("cut_share", "prompt_cut_share", "response_cut_share",
                                                "no_prompt_share", "equal_pairs")))
        for split, shares in shares_by_split.items()
    ]  # fmt: skip
    columns = ("split", "cut", "of the conversation", "of the response", "without a prompt", "equal pairs, left out")
    return "Share of rows longer than max_tokens", columns, rows


def _build_prompt_fit_section(prompt_fit: Mapping[str, Any]) -> dict[str, Any] | None:
    if not prompt_fit:
        return None
    rows = [(kind, _format_interval(share), share["n"]) for kind, share in prompt_fit["shares"].items()]
    text = (
        "Share of test pairs in which a good response scores higher than an alternative to the same prompt: a good "
        "response to another prompt (mismatched), a response that resembles those to all prompts (generic), the user's "
        "own message (echo), its own first words, cut at the token limit (cut) or with the last of them repeated "
        "(loop), or flattery that answers nothing."
    )
    if prompt_fit["below_minimum"]:
        text += (
            f" Warning: below {prompt_fit['minimum']:g} for {', '.join(prompt_fit['below_minimum'])}; a policy trained "
            "on this score may learn such responses."
        )
    return _build_section("Prompt fit", text, [("Good response preferred", ("alternative", "share", "pairs"), rows)])


def _build_robustness_section(robustness: Mapping[str, Any]) -> dict[str, Any] | None:
    if not robustness:
        return None
    rows = [
        (name, change["mean_shift_sd"], change["raised_share"], change["order_preserved_share"])
        for name, change in robustness["changes"].items()
    ]
    columns = ("perturbation", "shift (sd)", "share raised", "order preserved")
    text = (
        f"{robustness['rows']} perturbed responses. The shift of the mean logit is in standard deviations of the "
        "logit; near 0 means that the perturbation earns nothing."
    )
    return _build_section("Robustness", text, [("Perturbations", columns, rows)])
