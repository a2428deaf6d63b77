"""The card in a saved policy's folder: what it is, what it learnt from, how it was judged. Made from a run folder."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import rluf
from rluf.tracking.run_files import read_json, write_json

FILES = "rluf"
"""Folder beside the weights for the cards and settings; model loaders do not look into it."""


def code_version() -> str:
    """The git commit of the code, marked when files differ from it; the package's version outside a checkout."""
    here = Path(rluf.__file__).parent
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=here, capture_output=True, text=True
    )
    tracked = subprocess.run(["git", "ls-files", "--error-unmatch", "errors.py"], cwd=here, capture_output=True)
    return told.stdout.strip() if told.returncode == tracked.returncode == 0 else "unknown (no git checkout)"


def write_model_card(folder: Path) -> Path:
    """Write <folder>/policy/README.md and <folder>/policy/rluf/*.json from the files of run folder `folder`."""
    policy = folder / "policy"
    config, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
    cards = {file.stem: read_json(file) for file in sorted((folder / "cards").glob("*.json"))}
    data = cards.pop("data", {})
    sources = [{**source, "file": Path(str(source["file"])).name} for source in data.get("sources", [])]
    public = {key: value for key, value in config.items() if key not in ("run", "cluster")}
    for name, content in {"settings": public, "data": {**data, "sources": sources}, **cards}.items():
        write_json(policy / FILES / f"{name}.json", content)
    base = str(config.get("model", {}).get("path", "unknown"))
    head = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["rlhf", "rluf"]}
    if base.count("/") == 1 and not base.startswith((".", "/", "~")):  # a hub id, not a folder
        head["base_model"] = base
    lines = ["---", yaml.safe_dump(head, sort_keys=False).rstrip(), "---", "", f"# {config.get('name', 'policy')}", ""]
    lines += [f"{Path(base).name}, moved towards what users love with rluf {rluf.__version__}, code {code_version()}."]
    lines += ["", "## How it was made", "", *_training(config, summary), "", "## Data", "", *_data(data, sources)]
    lines += [
        "",
        "## Reward models",
        "",
        *_rewards(cards),
        "",
        "## Results",
        "",
        *_results(summary),
        "",
        "## Limits",
        "",
    ]
    lines += [
        "The figures hold for prompts like those of the log. Love is not worth: watch the monitors in the report for",
        "flattery, farewells and length. Weights are safetensors; no code comes with them.",
    ]
    card = policy / "README.md"
    card.write_text("\n".join(lines) + "\n", "utf-8")
    return card


def _training(config: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    algorithm, learner = config.get("algorithm", {}), config.get("learner", {})
    weights = {name: one["weight"] for name, one in config.get("objectives", {}).items() if isinstance(one, Mapping)}
    kl, versions = summary.get("kl"), summary.get("versions", {})
    return [
        f"- algorithm {algorithm.get('name')}, {algorithm.get('steps')} steps of {algorithm.get('prompts_per_step')} x "
        f"{algorithm.get('samples_per_prompt')} samples, learning rate {learner.get('learning_rate')}, "
        f"seed {config.get('seed')}",
        f"- objectives and weights: {', '.join(f'{name} {weight}' for name, weight in weights.items())}",
        f"- KL to the base policy at the end: {'unknown' if kl is None else f'{kl:.4f} nats a token'}",
        f"- {', '.join(f'{name} {number}' for name, number in versions.items() if name not in ('weights', 'rluf'))}",
        f"- every setting: {FILES}/settings.json",
    ]


def _data(data: Mapping[str, Any], sources: list[dict[str, Any]]) -> list[str]:
    lines = [f"- {one['kind']}: {one['file']}, {one['rows']} rows" for one in sources]
    return [*lines, f"- the whole data card: {FILES}/data.json"]


def _rewards(cards: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = []
    for name, card in cards.items():
        figure = "auroc" if "auroc" in card else "pair_accuracy"
        found, calibration = card.get(figure), card.get("ece")
        if isinstance(found, Mapping):
            mean, low, high = (found[key] for key in ("mean", "low", "high"))
            shown = "unknown" if None in (mean, low, high) else f"{mean:.3f} [{low:.3f}, {high:.3f}]"
            lines.append(f"- {name}: {figure} {shown} on n = {card.get('n')}, calibration error {calibration}")
    return [*lines, f"- the whole cards: {FILES}/<objective>.json"]


def _results(summary: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, one in summary.get("offline", {}).items():
        gap = one["difference"]
        lines.append(
            f"- {name} by the reward model on unseen prompts: {one['base']['mean']:.3f} -> "
            f"{one['aligned']['mean']:.3f}, difference {gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]"
        )
    gates = summary.get("gates", {})
    return [*lines, f"- gates: {gates.get('verdict')} (judged by {gates.get('judged_by')})"]
