"""Contents of the report as plain values: headline, cards, gates, tables, and texts with highlighted differences.

Pure functions from the files of a run folder to strings and numbers; every key may be missing.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rluf.config.objectives import (
    BUILTIN_OBJECTIVES,
    ObjectiveSpec,
    find_spec_by_offline_key,
)
from rluf.objectives.judges import is_harmful_request, list_failed_judges
from rluf.report.formats import format_interval, format_number, format_percent, format_points
from rluf.report.headline import check_outcome, check_status, has_user_verdicts
from rluf.tracking import metric_registry
from rluf.tracking.run_files import PolicyResponse, PromptComparison
from rluf.types import ALIGNED_ARM, BASE_ARM, PolicyAnswer
from rluf.utils.stats import wilson_interval

MODEL_DESCRIPTION = "mean score of the reward model on test prompts"
UNJUDGED_DESCRIPTION = "mean score of its reward model or judge on test prompts"
"""Of an objective that users do not judge."""
CARD_ROWS = (
    ("n", "Test rows"),
    ("auroc", "AUROC"),
    ("length_only_auroc", "… of length alone"),
    ("pair_accuracy", "Pairwise accuracy"),
    ("length_only_accuracy", "… of length alone"),
    ("log_loss", "Log-loss, nats"),
    ("normalized_entropy", "… over that of the base rate"),
    ("ece", "Calibration error (ECE)"),
    ("score_length_r", "Correlation of score and length"),
    ("training.train_rows", "Training rows"),
    ("seconds", "Seconds to train and test"),
)
"""Values of a reward card in the table, in order; dots separate nested keys."""
RENAMED_CARD_KEYS = {"normalised_entropy": "normalized_entropy"}
"""Keys of the previous release -> present keys, so that reports of older run folders stay complete for one release."""
MIN_TEXT_SIMILARITY = 0.2
"""Below this similarity of two texts, highlighting differences would highlight nearly every word."""
MIN_RELIABLE_PROMPTS = 30
"""Below this number of test prompts the page warns that the intervals themselves are unreliable."""
MIN_COLORED_CHANGE = 0.005
"""Smallest change of a score that is colored."""

_TEXT_TOKEN = re.compile(r"\s+|\w+|[^\w\s]")
_WORD_CHARACTER = re.compile(r"\w")


@dataclass(frozen=True, slots=True)
class RunFiles:
    """Contents of the files of a run folder; missing files are empty."""

    name: str
    summary: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()
    samples: Sequence[Mapping[str, Any]] = ()
    cards: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


def measure_cards(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Cards of the main results: user verdicts if there are any, otherwise means of the reward models.

    An objective that users do not judge has a card of its own scores.
    """
    check_by_name = {check["name"]: check for check in summary.get("gates", {}).get("checks", [])}
    result_cards = []
    for key, title, description, objective, measure in _list_measures(summary):
        check, lift = check_by_name.get(objective), measure.get("lift")
        result_cards.append({
            "key": key, "title": title, "about": description, "measure": measure,
            "status": check_status(check) if check else "", "outcome": check_outcome(check) if check else "",
            "lift": "n/a" if lift is None else format_percent(lift["mean"], with_sign=True),
            "lift_interval": None if lift is None else format_interval(lift, with_sign=True),
            "arms": [
                (arm, format_percent(measure[arm]["mean"]), format_interval(measure[arm]))
                for arm in ("base", "aligned")
            ],
        })  # fmt: skip
    return result_cards


def _list_measures(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str, Mapping[str, Any]]]:
    """Rows of (key, title, description, objective, measure) of the cards."""
    offline = summary.get("offline", {})
    if not has_user_verdicts(summary):
        return [
            (spec.offline_key, spec.title, MODEL_DESCRIPTION, spec.name, offline[spec.offline_key])
            for spec in _list_offline_specs(summary)
        ]
    user_measures = [
        (
            verdict.summary_key,
            f"Simulated {verdict.title.lower()}",
            verdict.description,
            spec.name,
            summary[verdict.summary_key],
        )
        for spec in BUILTIN_OBJECTIVES.values()
        if (verdict := spec.simulated_verdict) is not None and verdict.summary_key in summary
    ]
    return user_measures + [
        (spec.offline_key, spec.title, UNJUDGED_DESCRIPTION, spec.name, offline[spec.offline_key])
        for spec in _list_offline_specs(summary)
        if spec.simulated_verdict is None
    ]


def _list_offline_specs(summary: Mapping[str, Any]) -> list[ObjectiveSpec]:
    """Objectives with a mean score in the summary: the built-in ones first, in the order of their table."""
    specs = {spec.name: spec for spec in map(find_spec_by_offline_key, summary.get("offline", {}))}
    further_names = [name for name in specs if name not in BUILTIN_OBJECTIVES]
    return [specs[name] for name in (*BUILTIN_OBJECTIVES, *further_names) if name in specs]


def build_lift_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, float]]]:
    """Rows of (measure, judged by, lift): users first, then reward models."""
    verdicts = [spec.simulated_verdict for spec in BUILTIN_OBJECTIVES.values() if spec.simulated_verdict is not None]
    user_rows = [(v.title, "simulated users", summary.get(v.summary_key, {}).get("lift")) for v in verdicts]
    model_rows = [
        (
            spec.title if spec.simulated_verdict is None else spec.simulated_verdict.title,
            "reward models",
            summary["offline"][spec.offline_key].get("lift"),
        )
        for spec in _list_offline_specs(summary)
    ]
    return [(title, judge_name, lift) for title, judge_name, lift in user_rows + model_rows if lift]


def build_offline_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Rows of (objective, base, aligned, difference, interval of the difference) of the reward models' means."""
    table_rows = []
    for objective_key, comparison in summary.get("offline", {}).items():
        difference = comparison["difference"]
        interval = f"{format_points(difference['low'])} to {format_points(difference['high'])}".replace(" pp", "")
        table_rows.append((
            find_spec_by_offline_key(objective_key).title, format_percent(comparison["base"]["mean"]),
            format_percent(comparison["aligned"]["mean"]), format_points(difference["mean"]), interval,
        ))  # fmt: skip
    return table_rows


def format_evaluation_sentence(summary: Mapping[str, Any]) -> str:
    """Describe in one sentence how the policies were compared."""
    arms = summary.get("arms", {})
    if not {"base", "aligned"} <= set(arms):
        return ""
    base, aligned = arms["base"], arms["aligned"]
    sentence_start = (
        f"{format_number(base['prompts'])} unseen prompts, {format_number(base['responses'])} base and "
        f"{format_number(aligned['responses'])} aligned responses"
    )
    interval_note = "95% intervals clustered by prompt."
    if base["users"]:
        sentence_start += f", {format_number(base['users'])} new simulated users per arm"
        interval_note = "95% intervals clustered by user and prompt."
    has_few_prompts = base["prompts"] < MIN_RELIABLE_PROMPTS
    reliability_note = " With so few prompts the intervals themselves are unreliable." if has_few_prompts else ""
    return f"{sentence_start}; {interval_note}{reliability_note}"


def build_comparison_rows(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the lifts of every pair of arms, with their sizes; empty without a control or an A/A arm."""
    comparisons, arms = summary.get("comparisons", {}), summary.get("arms", {})
    if len(comparisons) < 2:
        return [], []
    objectives = list(next(iter(comparisons.values()))["lifts"])
    simulated = [name for name in objectives if has_user_verdicts(summary) and name in BUILTIN_OBJECTIVES]
    titles = [
        f"{'simulated ' if name in simulated else ''}{name.replace('_', ' ')}".capitalize() for name in objectives
    ]
    columns = ["Comparison", *titles, "Responses"]
    rows = []
    for comparison in comparisons.values():
        pair = [arms[comparison["arm"]], arms[comparison["reference"]]]
        lifts = [comparison["lifts"].get(name) for name in objectives]
        cells = [
            "n/a" if lift is None
            else f"{format_percent(lift['mean'], with_sign=True)} ({format_interval(lift, with_sign=True)})"
            for lift in lifts
        ]  # fmt: skip
        responses = " and ".join(format_number(arm["responses"]) for arm in pair)
        rows.append([comparison["title"], *cells, responses])
    return columns, rows


def format_repeat_sentence(summary: Mapping[str, Any]) -> str:
    """What the A/A comparison shows: whether two draws of one policy differ."""
    comparison = summary.get("comparisons", {}).get("repeat_vs_base")
    if comparison is None:
        return ""
    differing = [
        name for name, lift in comparison["lifts"].items() if lift is not None and not lift["low"] <= 0 <= lift["high"]
    ]
    if not differing:
        return "The A/A row includes zero everywhere, as it must in 19 of 20 intervals."
    return (
        f"The A/A row excludes zero for {' and '.join(differing)}: one interval in 20 does by chance; if it happens in "
        "run after run, the intervals are wrong."
    )


ARM_LABELS = {"base": "base", "base_repeat": "base, second draw", "control": "control", "aligned": "aligned"}


def build_arm_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Rows of (arm, prompts, responses, users, tokens, truncated share, entropy)."""
    return [
        [
            ARM_LABELS.get(name, name), format_number(arm["prompts"]), format_number(arm["responses"]),
            format_number(arm["users"] or None), f"{arm['tokens']:.1f}", format_percent(arm["truncated_share"]),
            "–" if arm["entropy"] is None else f"{arm['entropy']:.2f}",
        ]
        for name, arm in summary.get("arms", {}).items()
    ]  # fmt: skip


def build_reference_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Weights and scores of the base policy before training, one row by objective."""
    return [
        [
            metric_registry.format_objective_title(name),
            f"{row['weight']:.3g}",
            f"{row['effective_weight']:.2g}",
            *(f"{row[key]:.2f}" for key in ("mean", "within_sd", "pooled_sd", "scale")),
            f"{row['prompt_count']:.0f} × {row['sample_count'] / max(1, row['prompt_count']):.0f}",
        ]
        for name, row in summary.get("reference", {}).items()
    ]


def build_blind_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Rows of (topic, pairs in which aligned is better, base is better, tie) of the blind reading."""
    by_topic = summary.get("blind", {}).get("by_topic", {})
    return [
        [topic.replace("_", " "), *(format_number(counts[outcome]) for outcome in ("aligned", "base", "tie"))]
        for topic, counts in by_topic.items()
    ]


def monitor_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per monitor, alarms first."""
    table_rows = []
    # Older summaries have no `unit`; there `kind` is "share" for a share.
    for monitor in summary.get("monitors", {}).get("items", {}).values():
        unit, ratio, p_value = monitor.get("unit", monitor["kind"]), monitor.get("ratio"), monitor.get("p")
        base, aligned = (
            format_percent(monitor[arm])
            if unit == "share"
            else f"{monitor[arm]:.2f} {unit}".replace("-", "−")
            if unit in ("nats", "cosine")
            else _format_one_digit(monitor[arm])
            for arm in ("base", "aligned")
        )
        table_rows.append({
            "label": monitor["label"], "detail": str(monitor.get("detail", "")).replace("->", "→"), "base": base,
            "aligned": aligned, "ratio": "–" if ratio is None else f"× {ratio:.2f}",
            "z": _format_one_digit(monitor["z"], with_sign=True), "alarm": monitor["alarm"],
            "p": "–" if p_value is None else "not worse" if _has_improved(monitor) else f"{p_value:.3f}",
        })  # fmt: skip
    return sorted(table_rows, key=lambda row: not row["alarm"])


def _has_improved(monitor: Mapping[str, Any]) -> bool:
    """Whether the change goes in the good direction, in which the one-sided test gives p = 1 however large it is."""
    # Summaries of earlier releases do not say which direction is worse.
    sign = {"up": 1.0, "down": -1.0, None: 0.0}[monitor.get("worse")]
    return bool(sign * monitor["z"] < -0.05)


def _format_one_digit(value: float, *, with_sign: bool = False) -> str:
    number_text = f"{value:{'+' if with_sign else ''},.1f}"
    # Rounding may leave a signed zero, which would read as a change.
    return "0.0" if number_text in ("+0.0", "-0.0") else number_text.replace("-", "−")


def format_alarm_sentence(monitor_table: Sequence[Mapping[str, Any]]) -> str:
    """Name the monitors that raised an alarm in one sentence."""
    labels = [row["label"] for row in monitor_table if row["alarm"]]
    if not labels:
        return "No monitor raised an alarm."
    return f"{len(labels)} of {len(monitor_table)} monitors raised an alarm: {', '.join(labels)}."


def pair_responses(
    answers: Sequence[PolicyAnswer], prompt_count: int, safety_topics: Collection[str] = ()
) -> list[PromptComparison]:
    """First responses of base and aligned to `prompt_count` prompts spread over the test set.

    A refusal of a harmful request, or on one of `safety_topics`, is wanted and is not a failed judge.
    """
    first_by_arm: dict[str, dict[str, PolicyAnswer]] = {BASE_ARM: {}, ALIGNED_ARM: {}}
    for answer in answers:
        if answer.arm in first_by_arm:
            first_by_arm[answer.arm].setdefault(answer.prompt_id, answer)
    base, aligned = first_by_arm[BASE_ARM], first_by_arm[ALIGNED_ARM]
    prompt_ids = [prompt_id for prompt_id in base if prompt_id in aligned]
    # Evenly spaced: the first prompts of a file are often all of one topic.
    selected_ids = prompt_ids[:: max(1, len(prompt_ids) // prompt_count)][:prompt_count] if prompt_count else []
    return [
        {
            "prompt_id": prompt_id,
            "topic": base[prompt_id].topic,
            "prompt": base[prompt_id].messages[-1]["content"],
            "base": _find_policy_response(base[prompt_id], safety_topics),
            "aligned": _find_policy_response(aligned[prompt_id], safety_topics),
        }
        for prompt_id in selected_ids
    ]


def _find_policy_response(answer: PolicyAnswer, safety_topics: Collection[str]) -> PolicyResponse:
    failed = [
        name
        for name in list_failed_judges(answer.messages, answer.text)
        if not ("refusal" in name and (answer.topic in safety_topics or is_harmful_request(answer.messages)))
    ]
    return {"text": answer.text, "scores": dict(answer.scores), "failed": failed}


def diff_runs(base_text: str, aligned_text: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]], bool]:
    """Split both texts into runs (text, whether it is only in this text); also return whether they are similar enough.

    The comparison is by word and ignores case (difflib); differences in white space alone do not count.
    """
    base_tokens, aligned_tokens = _TEXT_TOKEN.findall(base_text), _TEXT_TOKEN.findall(aligned_text)
    # autojunk off: it would treat frequent words of a long text as noise.
    matcher = difflib.SequenceMatcher(
        None, [token.lower() for token in base_tokens], [token.lower() for token in aligned_tokens], autojunk=False
    )
    word_count = sum(bool(_WORD_CHARACTER.match(token)) for token in (*base_tokens, *aligned_tokens))
    shared_words = sum(
        bool(_WORD_CHARACTER.match(base_tokens[match_start + offset]))
        for match_start, _, match_size in matcher.get_matching_blocks()
        for offset in range(match_size)
    )
    # Share of words in both texts, as difflib's ratio() but without white space and punctuation.
    if not word_count or 2 * shared_words / word_count < MIN_TEXT_SIMILARITY:
        return [(base_text, False)], [(aligned_text, False)], False
    base_runs: list[tuple[str, bool]] = []
    aligned_runs: list[tuple[str, bool]] = []
    for opcode_tag, base_start, base_end, aligned_start, aligned_end in matcher.get_opcodes():
        for text_runs, tokens in (
            (base_runs, base_tokens[base_start:base_end]),
            (aligned_runs, aligned_tokens[aligned_start:aligned_end]),
        ):
            if run_text := "".join(tokens):
                _append_run(text_runs, run_text, opcode_tag != "equal")
    return base_runs, aligned_runs, True


def _append_run(text_runs: list[tuple[str, bool]], run_text: str, is_different: bool) -> None:
    """Append a run; only text with a word counts as different, and never the white space around it."""
    if not (is_different and _WORD_CHARACTER.search(run_text)):
        _merge_run(text_runs, run_text, False)
        return
    stripped_text = run_text.strip()
    marked_start = run_text.index(stripped_text)
    marked_end = marked_start + len(stripped_text)
    for segment, is_marked in ((run_text[:marked_start], False), (stripped_text, True), (run_text[marked_end:], False)):
        if segment:
            _merge_run(text_runs, segment, is_marked)


def _merge_run(text_runs: list[tuple[str, bool]], run_text: str, is_different: bool) -> None:
    """Append a run and merge it with the previous one of its kind, also across white space between two marked ones."""
    if text_runs and text_runs[-1][1] == is_different:
        text_runs[-1] = (text_runs[-1][0] + run_text, is_different)
    elif is_different and len(text_runs) > 1 and not text_runs[-1][0].strip() and text_runs[-2][1]:
        white_space, _ = text_runs.pop()
        text_runs[-1] = (text_runs[-1][0] + white_space + run_text, True)
    else:
        text_runs.append((run_text, is_different))


def sample_views(sample_rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Samples with highlighted differences and one score row per objective."""
    rendered_samples = []
    for row in sample_rows:
        base, aligned = row.get("base", {}), row.get("aligned", {})
        base_runs, aligned_runs, is_similar = diff_runs(str(base.get("text", "")), str(aligned.get("text", "")))
        base_scores, aligned_scores = base.get("scores", {}), aligned.get("scores", {})
        rendered_samples.append({
            "topic": row.get("topic", ""), "prompt": row.get("prompt", ""), "base": base_runs, "aligned": aligned_runs,
            "is_similar": is_similar,
            "scores": [
                _score_row(name, base_scores.get(name), aligned_scores.get(name))
                for name in dict.fromkeys([*base_scores, *aligned_scores])
            ],
            "failed": [
                (arm, " and ".join(name.replace("_", " ") for name in response["failed"]))
                for arm, response in (("base", base), ("aligned", aligned)) if response.get("failed")
            ],
        })  # fmt: skip
    return rendered_samples


def _score_row(objective: str, base_score: float | None, aligned_score: float | None) -> dict[str, Any]:
    """One objective's scores of both policies; `rose` is None for a missing score or a small change."""
    score_change = None if base_score is None or aligned_score is None else aligned_score - base_score
    return {
        "name": metric_registry.format_objective_title(objective),
        "base": format_percent(base_score),
        "aligned": format_percent(aligned_score),
        "change": "–" if score_change is None else format_points(score_change),
        "rose": None if score_change is None or abs(score_change) < MIN_COLORED_CHANGE else score_change > 0,
    }


def build_card_table(cards: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Titles of the reward cards, and one row per value that any of them has, with its interval if there is one."""
    card_titles = [metric_registry.format_objective_title(objective) for objective in cards]
    present_cards = [{RENAMED_CARD_KEYS.get(key, key): value for key, value in card.items()} for card in cards.values()]
    table_rows = []
    for value_path, label in CARD_ROWS:
        values = [_read_nested_value(card, value_path) for card in present_cards]
        if any(value is not None for value in values):
            table_rows.append((label, [_format_with_interval(value) for value in values]))
    return card_titles, table_rows


def _read_nested_value(card: Mapping[str, Any], value_path: str) -> Any:
    nested_value: Any = card
    for key in value_path.split("."):
        nested_value = nested_value.get(key) if isinstance(nested_value, Mapping) else None
    return nested_value


def _format_with_interval(value: Any) -> str:
    if not isinstance(value, Mapping):
        return format_number(round(value, 3) if isinstance(value, float) else value)
    mean, low, high = (value.get(key) for key in ("mean", "low", "high"))
    if mean is None:
        return format_number(None)
    return f"{mean:.3f}" if low is None or high is None else f"{mean:.3f} ({low:.3f} to {high:.3f})"


def format_trust_sentences(cards: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say for each reward card whether to trust the model's order of responses, and its probabilities."""
    sentences = []
    for objective, card in cards.items():
        title = metric_registry.format_objective_title(objective)
        key, length_key = (
            ("auroc", "length_only_auroc") if "auroc" in card else ("pair_accuracy", "length_only_accuracy")
        )
        ranking, length_value = card.get(key), card.get(length_key)
        if not isinstance(ranking, Mapping) or ranking.get("low") is None:
            continue
        length_value = length_value.get("mean") if isinstance(length_value, Mapping) else length_value
        rival, rival_value = ("length alone", length_value) if (length_value or 0.0) > 0.5 else ("chance", 0.5)
        is_better = ranking["low"] > rival_value
        sentence = f"{title} ranks responses {'better' if is_better else 'not clearly better'} than {rival}"
        relative_loss = card.get("normalized_entropy", card.get("normalised_entropy"))
        if isinstance(relative_loss, int | float):
            sentence += (
                ", and its probabilities predict better than the base rate."
                if relative_loss < 1.0
                else "; its probabilities predict no better than the base rate, so read its order, not its values."
            )
        sentences.append(sentence.rstrip(".") + ".")
    return sentences


def read_reliability_bins(card: Mapping[str, Any]) -> list[dict[str, float]]:
    """Bins {predicted, observed, low, high, n} of a card's `reliability` (each {mass, mean, rate}).

    The row count of a bin is its mass times the card's `n`. The interval is Wilson's at 95%. It assumes independent
    rows, so it is too narrow where users contributed several rows.
    """
    plot_bins = []
    for card_bin in card.get("reliability") or ():
        # A bin of a small split may have less than one row's mass; the interval needs at least one.
        row_count, observed_share = max(1.0, card_bin["mass"] * (card.get("n") or 0)), card_bin["rate"]
        low, high = wilson_interval(observed_share * row_count, row_count)
        interval_ends = {"low": max(0.0, float(low)), "high": min(1.0, float(high))}
        plot_bins.append(
            {"predicted": card_bin["mean"], "observed": observed_share, **interval_ends, "n": round(row_count)}
        )
    return plot_bins


def build_reliability_rows(cards: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str, str, str]]:
    """Rows of (objective, predicted, observed, interval of observed, rows), one per bin of the reliability plots."""
    return [
        (
            metric_registry.format_objective_title(objective),
            format_percent(reliability_bin["predicted"]),
            format_percent(reliability_bin["observed"]),
            format_interval(reliability_bin),
            format_number(reliability_bin["n"]),
        )
        for objective, card in cards.items()
        for reliability_bin in read_reliability_bins(card)
    ]


def build_funnel_table(counts: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """One row per kind of data: rows in, kept, dropped, quarantined, and the reasons for the last two."""
    table_rows = []
    for data_kind, kind_counts in counts.items():
        excluded_counts = {outcome: kind_counts.get(outcome, 0) for outcome in ("dropped", "quarantined")}
        # Either a total or a mapping from reason to count, depending on the age of the card.
        excluded_totals = {
            outcome: sum(value.values()) if isinstance(value, Mapping) else value
            for outcome, value in excluded_counts.items()
        }
        reason_texts = [
            f"{reason} {format_number(row_count)}"
            for value in excluded_counts.values()
            if isinstance(value, Mapping)
            for reason, row_count in value.items()
        ]
        table_rows.append({
            "kind": data_kind, "in": format_number(kind_counts.get("in")),
            "kept": format_number(kind_counts.get("kept")), "dropped": format_number(excluded_totals["dropped"]),
            "quarantined": format_number(excluded_totals["quarantined"]),
            "reasons": ", ".join(reason_texts) or "–",
        })  # fmt: skip
    return table_rows


def sort_by_step(step_rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Sort rows by step under present metric keys; of a step that was repeated after a restart, the last row counts."""
    row_by_step = {
        step_row["step"]: metric_registry.rename_old_metrics(step_row)
        for step_row in step_rows
        if isinstance(step_row.get("step"), int | float)
    }
    return [row_by_step[step] for step in sorted(row_by_step)]


def step_table(step_rows: Sequence[Mapping[str, Any]], metric_keys: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table behind the curves; columns without any value are omitted."""
    present_keys = [
        metric_key for metric_key in metric_keys if any(step_row.get(metric_key) is not None for step_row in step_rows)
    ]
    table_rows = [
        [format_number(step_row.get(metric_key)) for metric_key in ("step", *present_keys)] for step_row in step_rows
    ]
    return ["step", *present_keys], table_rows


def sum_phase_seconds(summary: Mapping[str, Any]) -> tuple[dict[str, float], float]:
    """Seconds by phase, and their total (the sum if the summary has no total)."""
    seconds_by_phase = {
        phase: float(value) for phase, value in (summary.get("phases") or {}).items() if value is not None
    }
    total_seconds = seconds_by_phase.pop("total", None)
    return seconds_by_phase, sum(seconds_by_phase.values()) if total_seconds is None else total_seconds


def list_summary_facts(summary: Mapping[str, Any], duration_text: str | None) -> list[tuple[str, str]]:
    """Facts under the headline: seed, duration, training volume, KL."""
    fact_rows = [("Seed", format_number(summary["seed"]))] if "seed" in summary else []
    if duration_text:
        fact_rows.append(("Time", duration_text))
    if summary.get("samples"):
        fact_rows.append(("Training samples", format_number(summary["samples"])))
    if summary.get("tokens"):
        fact_rows.append(("Training tokens", format_number(summary["tokens"])))
    if summary.get("kl") is not None:
        fact_rows.append(("KL to base", f"{summary['kl']:.3g} nats/token"))
    return fact_rows


def build_reused_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows of (artifact, how it was obtained): built in this run, or reused, with its hash."""
    artifact_rows = []
    for artifact_name, origin in summary.get("reused", {}).items():
        if isinstance(origin, Mapping):
            cache_key, is_reused = origin.get("key") or origin.get("hash"), bool(origin.get("reused"))
        else:
            cache_key, is_reused = origin if isinstance(origin, str) else None, bool(origin)
        hash_text = f" ({cache_key})" if cache_key else ""
        artifact_rows.append((artifact_name, ("reused" if is_reused else "built") + hash_text))
    return artifact_rows
