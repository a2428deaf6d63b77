"""Model card of a saved policy: what it is, what it was trained on and how it was evaluated, from a run folder."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

import rluf
from rluf.config.objectives import BUILTIN_OBJECTIVES
from rluf.report.headline import has_user_verdicts, read_gates, report_headline
from rluf.report.presentation import measure_cards
from rluf.tracking.run_files import read_provenance
from rluf.utils.files import read_json, write_json

CARD_FOLDER = "rluf"
"""Folder next to the weights with the cards and settings. Model loaders read top-level files only."""
SIMULATION_NOTE = (
    "- Simulated users judged the policy, not people: programs that rluf ships for tests. Their verdict says nothing "
    "about\n  real users."
)
PRIVATE_SECTIONS = ("run", "cluster")
"""Sections of the settings that stay out of the card: they have paths and host names of the training machines."""
PLACE_PATTERN = re.compile(r"(pickle:)?(/|~|\.\.?(?=/))[^/\s]*/.*|(?!hf:)[a-z][a-z0-9+.-]*://.*", re.DOTALL)
"""Paths outside the working directory, and URLs that need not be public; in the card only their file names are."""
CONNECTION_KEY = "options"
"""Key of an entry of data with the host, user and database of a connection."""


def read_code_version() -> str:
    """The git commit of the code, marked as changed if files differ from it, else the digest of the source."""
    origin = read_provenance()
    if origin["git_commit"] is None:
        return f"digest {origin['code_digest']} (no git commit)"
    return f"{origin['git_commit']}{' with changes' if origin['git_changed'] else ''}"


def write_model_card(run_folder: Path) -> Path:
    """Write policy/README.md and policy/rluf/*.json in the run folder, from its other files; returns the README."""
    policy_folder = run_folder / "policy"
    config, summary = read_json(run_folder / "config.json"), read_json(run_folder / "summary.json")
    reward_cards = {path.stem: read_json(path) for path in sorted((run_folder / "cards").glob("*.json"))}
    data_card = reward_cards.pop("data", {})
    # The card is published with the weights, so paths of the training machine are removed from it.
    public_sources = [{**source, "file": Path(str(source["file"])).name} for source in data_card.get("sources", [])]
    public_settings = {key: value for key, value in config.items() if key not in PRIVATE_SECTIONS}
    public_data_card = {**data_card, "sources": public_sources}
    for card_name, card_content in {"settings": public_settings, "data": public_data_card, **reward_cards}.items():
        write_json(policy_folder / CARD_FOLDER / f"{card_name}.json", _remove_places(card_content))
    base_model = str(config.get("model", {}).get("path", "unknown"))
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["rlhf", "rluf"],
        # A folder is no hub id.
        base_model=base_model if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base_model) else None,
        license=_read_base_license(base_model),
        model_name=str(config.get("name", "policy")),
        eval_results=list(_iter_eval_results(summary)) or None,
    )
    introduction = (
        f"{Path(base_model).name}, trained on user feedback with rluf {rluf.__version__}, code {read_code_version()}."
    )
    limits_text = (
        "The results hold for prompts like those of the log. Love is not usefulness: check the monitors in the report "
        "for\nflattery, farewells and length. Weights are safetensors; the folder contains no code."
    )
    readme_lines = [f"# {config.get('name', 'policy')}", "", introduction, ""]
    for section_title, section_lines in (
        ("Training", _format_training(config, summary)),
        ("Data", _format_data(public_sources)),
        ("Reward models", _format_rewards(reward_cards)),
        ("Results", _format_results(summary)),
        ("Limits", [limits_text]),
    ):
        readme_lines += [f"## {section_title}", "", *section_lines, ""]
    readme_path = policy_folder / "README.md"
    card_text = "\n".join(readme_lines).rstrip()
    ModelCard(f"---\n{card_data.to_yaml()}\n---\n\n{card_text}\n").save(readme_path)
    return readme_path


def _remove_places(value: Any) -> Any:
    """Settings or a card with file names in place of paths and URLs."""
    if isinstance(value, Mapping):
        return {key: _remove_places(item) for key, item in value.items() if key != CONNECTION_KEY}
    if isinstance(value, list):
        return [_remove_places(item) for item in value]
    if not isinstance(value, str) or not PLACE_PATTERN.fullmatch(value):
        return value
    path = urlsplit(value).path if "://" in value else value
    return Path(path).name or value.partition(":")[0]


def _read_base_license(base_model: str) -> str | None:
    """License in the card of the base model's folder; None where it is unknown: the base model's license decides."""
    card_path = Path(base_model).expanduser() / "README.md"
    if not card_path.is_file():
        return None
    try:
        base_license = ModelCard.load(card_path, ignore_metadata_errors=True).data.get("license")
    except (ValueError, yaml.YAMLError):  # a card whose metadata cannot be read
        return None
    return str(base_license) if base_license else None


def _iter_eval_results(summary: Mapping[str, Any]) -> Iterator[EvalResult]:
    """The aligned policy's means as the hub displays them; each says who judged."""
    simulated = [spec.simulated_verdict for spec in BUILTIN_OBJECTIVES.values() if spec.simulated_verdict is not None]
    judgments = [
        (verdict.summary_key, summary[verdict.summary_key], f"{verdict.title}, share by simulated users")
        for verdict in simulated
        if verdict.summary_key in summary
    ]
    for key, values in summary.get("offline", {}).items():
        judgments.append((key, values, f"{key}, mean score of the reward model"))
    for key, values, metric_name in judgments:
        mean = values["aligned"]["mean"]
        if mean is not None and math.isfinite(mean):
            yield EvalResult(
                task_type="text-generation",
                dataset_type="rluf-test-prompts",
                dataset_name="test prompts of the run",
                metric_type=key,
                metric_value=round(float(mean), 6),
                metric_name=metric_name,
            )


def _format_training(config: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    algorithm, learner = config.get("algorithm", {}), config.get("learner", {})
    objective_settings = config.get("objectives", {})
    objective_weights = {
        name: values["weight"] for name, values in objective_settings.items() if isinstance(values, Mapping)
    }
    kl, versions = summary.get("kl"), summary.get("versions", {})
    return [
        f"- algorithm {algorithm.get('name')}, {algorithm.get('steps')} steps of {algorithm.get('prompts_per_step')} x "
        f"{algorithm.get('samples_per_prompt')} samples, learning rate {learner.get('learning_rate')}, "
        f"seed {config.get('seed')}",
        f"- objectives and weights: {', '.join(f'{name} {weight}' for name, weight in objective_weights.items())}",
        f"- KL to the base policy at the end: {'unknown' if kl is None else f'{kl:.4f} nats per token'}",
        f"- {', '.join(f'{name} {version}' for name, version in versions.items() if name not in ('weights', 'rluf'))}",
        f"- all settings: {CARD_FOLDER}/settings.json",
    ]


def _format_data(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    source_lines = [f"- {source['kind']}: {source['file']}, {source['rows']} rows" for source in sources]
    return [*source_lines, f"- complete data card: {CARD_FOLDER}/data.json"]


def _format_rewards(cards: Mapping[str, Mapping[str, Any]]) -> list[str]:
    card_lines = []
    for objective, card in cards.items():
        metric_key = "auroc" if "auroc" in card else "pair_accuracy"
        estimate, calibration_error = card.get(metric_key), card.get("ece")
        if isinstance(estimate, Mapping):
            mean, low, high = (estimate[key] for key in ("mean", "low", "high"))
            estimate_text = "unknown" if None in (mean, low, high) else f"{mean:.3f} [{low:.3f}, {high:.3f}]"
            card_lines.append(
                f"- {objective}: {metric_key} {estimate_text} on n = {card.get('n')}, "
                f"calibration error {calibration_error}"
            )
    return [*card_lines, f"- complete cards: {CARD_FOLDER}/<objective>.json"]


def _format_results(summary: Mapping[str, Any]) -> list[str]:
    result_lines = [f"- {report_headline(summary)}"] if summary.get("gates", {}).get("checks") else []
    if has_user_verdicts(summary):
        result_lines.insert(0, SIMULATION_NOTE)
        for card in measure_cards(summary):
            (_, base_share, _), (_, aligned_share, _) = card["arms"]
            result_lines.append(
                f"- {card['title']}: {base_share} -> {aligned_share}, relative lift {card['lift']} "
                f"({card['lift_interval'] or 'undefined'})"
            )
    for objective, comparison in summary.get("offline", {}).items():
        base, aligned, difference = comparison["base"], comparison["aligned"], comparison["difference"]
        result_lines.append(
            f"- {objective} by the reward model on unseen prompts: {base['mean']:.3f} -> {aligned['mean']:.3f}, "
            f"difference {difference['mean']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]"
        )
    gates = read_gates(summary)
    reasons = "".join(f"; {reason}" for reason in gates["reasons"])
    return [*result_lines, f"- gates: {gates['verdict']} (judged by {gates.get('judged_by')}){reasons}"]
