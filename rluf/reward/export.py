"""From trained members to checkpoint folders: calibration, the card, and the learning curve's points."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rluf.config.settings import Settings
from rluf.errors import ModelError, RlufError
from rluf.reward.calibration import Calibration, Floats, fit_shares
from rluf.reward.card import calibrate, compare, describe_training, make_card
from rluf.reward.card_page import card_page
from rluf.reward.linear_probe import HEADS
from rluf.reward.model import RewardModel, member_folder
from rluf.reward.ray_trainer import CARD, PAGE
from rluf.reward.robustness import robustness, slices
from rluf.reward.shared_backbone import label_of, labelled
from rluf.reward.trainer import Rows, Task, encode_rows

if TYPE_CHECKING:
    from rluf.reward.fit import Member

logger = logging.getLogger(__name__)

EVAL_TOKENS = 4096
"""Padded tokens of a forward pass without gradient."""


def table(path: Path) -> list[dict[str, Any]]:
    """All rows of a split. dev and test are read directly: they are not dealt out, and a Ray Data run has its cost."""
    import pyarrow.parquet

    records: list[dict[str, Any]] = pyarrow.parquet.read_table(str(path)).to_pylist()
    return records


def thinned(records: Sequence[Mapping[str, Any]], share: float, head: str) -> list[Mapping[str, Any]]:
    """About `share` of the rows of each of the head's labels, spread evenly; the same at every call.

    Rows without a label of its own (pairs, and what the head does not learn from) are one more such class.
    """
    seen: dict[Any, int] = {}
    kept = []
    for row in records:
        label = label_of(head, row)
        seen[label] = number = seen.get(label, 0) + 1
        if int(number * share) > int((number - 1) * share) or number == 1:
            kept.append(row)
    return kept


@dataclass(frozen=True, slots=True)
class Job:
    """A head to write: its prepared data, the folder it will have, the one it is built in, and an earlier model."""

    head: str
    data: Path
    out: Path
    part: Path
    before: Path | None


def balance(members: Sequence[Member]) -> None:
    """Scale the members' heads so that their logits vary equally on dev: probabilities of their own can be compared.

    A head fitted with much regularisation and a backbone trained for some epochs differ manifold in spread.
    """
    for place in range(len(members[0].tasks)):
        fits = [member.found[place] for member in members]
        spreads = [float(fit.dev_logits.std()) for fit in fits]
        linear = all(any(name.rpartition(".")[0] in HEADS for name in member.weights) for member in members)
        if len(members) < 2 or min(spreads) <= 0 or not linear:
            continue
        for member, fit, spread in zip(members, fits, spreads, strict=True):
            factor = float(np.mean(spreads)) / spread
            fit.dev_logits = fit.dev_logits * factor
            for name in [name for name in member.weights if name.rpartition(".")[0] in HEADS]:
                scaled = member.weights[name].clone()
                scaled[place] *= factor
                member.weights[name] = scaled


def finish(
    settings: Settings,
    outs: Mapping[str, tuple[Path, Path]],
    members: Sequence[Member],
    clock: float,
    *,
    thorough: bool,
    before: Mapping[str, Path] | None = None,
) -> None:
    """Calibrate the trained members together and write a checkpoint folder a head; rank 0 alone does.

    `outs` maps a head to (its prepared data, the folder to write). Each is read back as everyone else will, tried on
    the test split, and renamed into place when all are whole. `clock` is time.monotonic() at the start. Raises
    ModelError when the disk refuses.
    """
    jobs = [
        Job(head, data, out, out.with_name(f".{out.name}-{uuid.uuid4().hex[:8]}"), (before or {}).get(head))
        for head, (data, out) in outs.items()
    ]
    fused = settings.reward.of_head(members[0].tasks[0].name).fuse
    if not fused:
        balance(members)
    try:
        shared = [m.save([member_folder(job.part, number) for job in jobs]) for number, m in enumerate(members)]
        for place, job in enumerate(jobs):
            base = _uncalibrated(members, place, "-".join(filter(None, shared)), fused=fused)
            base.save(job.part)
            if any(member.found[place].best_epoch >= 0 for member in members):
                _score_dev(settings, job, members, place)
            _calibrated(settings, members, place, base).save(job.part)
            _write_card(settings, job, members, place, clock, thorough=thorough)
        for job in jobs:
            if job.out.is_dir():
                shutil.rmtree(job.out)
            os.replace(job.part, job.out)
            logger.info("%s: written to %s after %.1f s", job.head, job.out, time.monotonic() - clock)
    except OSError as error:
        where = ", ".join(str(job.out) for job in jobs)
        raise ModelError(f"the reward model could not be written to {where}: {error}; free some disk") from error
    finally:
        for job in jobs:
            shutil.rmtree(job.part, ignore_errors=True)


def _score_dev(settings: Settings, job: Job, members: Sequence[Member], place: int) -> None:
    """Replace the dev logits of head number `place` by those of the written model, read as RewardModel reads.

    Epochs run in the training dtype, partly on rounded hidden states of frozen layers. Calibration must be fitted on
    the float32 logits that the model gives from then on.
    """
    scorer = RewardModel.load(job.part, batch_tokens=EVAL_TOKENS)
    path = job.data / "dev.parquet"
    pairs = settings.reward.of_head(job.head).loss == "bradley_terry"
    dev = encode_rows(labelled(job.head, table(path), str(path)), scorer.encoder, pairs=pairs, where=str(path))
    for member, logits in zip(members, scorer.each(dev.sequences), strict=True):
        member.found[place].dev_logits = logits


def _uncalibrated(members: Sequence[Member], place: int, backbone: str, *, fused: bool) -> Calibration:
    """How head number `place` reads its text, with nothing fitted yet."""
    first = members[0]
    return Calibration(
        first.tasks[place].name,
        prior_shift=first.found[place].shift,
        max_tokens=max(member.encoder.max_tokens for member in members),
        members=len(members),
        fused=fused,
        next_turn=any(member.encoder.next_turn for member in members),
        response_alone=tuple(n for n, member in enumerate(members) if member.encoder.response_alone),
        backbone=backbone,
    )


def _calibrated(settings: Settings, members: Sequence[Member], place: int, base: Calibration) -> Calibration:
    """`base` with the shares of the members and the map to probabilities, both fitted on dev."""
    task = members[0].tasks[place]
    each = np.stack([member.found[place].dev_logits for member in members])
    if len(members) > 1 and not base.fused:
        base = replace(base, shares=_shares(task, each))
    return calibrate(task.dev, base.pooled(each), base, settings.reward.of_head(task.name).calibration)


def _shares(task: Task, each: Floats) -> tuple[float, ...]:
    """What dev says of how much each member counts; `each` are their logits [members, sequences] there."""
    count, dev = len(task.dev), task.dev
    shares = fit_shares(
        each[:, :count] - each[:, count:] if dev.pairs else each, dev.labels, dev.loss_weights, pairs=dev.pairs
    )
    logger.info("%s: the members count %s", task.name, ", ".join(f"{share:.2f}" for share in shares))
    return shares


def _write_card(
    settings: Settings,
    job: Job,
    members: Sequence[Member],
    place: int,
    clock: float,
    *,
    thorough: bool,
) -> None:
    scorer = RewardModel.load(job.part, batch_tokens=EVAL_TOKENS)
    chosen, path = settings.reward.trained_by(job.head, members[0].tasks[0].name), job.data / "test.parquet"
    records = labelled(job.head, table(path), str(path))
    test = encode_rows(records, scorer.encoder, pairs=chosen.loss == "bradley_terry", where=str(path))
    started = time.monotonic()
    logits = scorer.raw(test.sequences)
    card = make_card(scorer.calibration, test, logits, seed=settings.seed)
    card["scoring_tokens_per_second"] = round(test.tokens / max(time.monotonic() - started, 1e-9), 1)
    task = members[0].tasks[place]
    card["training"] = describe_training([member.found[place] for member in members], task.train, task.dev)
    card |= {"settings": chosen.model_dump(mode="json"), "seed": settings.seed}
    card["heads"] = [task.name for task in members[0].tasks]
    card["seconds"] = round(time.monotonic() - clock, 3)
    if job.before is not None:
        card |= _compared(job, records, test, scorer.calibration.logits(logits), settings.seed)
    if thorough:
        own = scorer.calibration.logits(logits)
        of_rows = own[: len(test)] - own[len(test) :] if test.pairs else own
        card["slices"] = slices(records, of_rows, None if test.pairs else test.labels)
        card["robustness"] = robustness(scorer, records, pairs=test.pairs, seed=settings.seed)
        (job.part / PAGE).write_text(card_page(card), encoding="utf-8")
    (job.part / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def _compared(job: Job, records: Sequence[Mapping[str, Any]], test: Rows, logits: Floats, seed: int) -> dict[str, Any]:
    """This model beside an earlier one on the same test rows; nothing when that one cannot be read any more."""
    if job.before is None:
        return {}
    try:
        earlier = RewardModel.load(job.before, batch_tokens=EVAL_TOKENS)
        rows = encode_rows(records, earlier.encoder, pairs=test.pairs, where=str(job.data))
    except RlufError as error:
        logger.warning("%s: not compared with %s: %s", job.head, job.before, error)
        return {}
    other = earlier.calibration.logits(earlier.raw(rows.sequences))
    return {"previous": {"folder": str(job.before), **compare(test, logits, other, seed=seed)}}


def point(settings: Settings, members: Sequence[Member], folders: Mapping[str, Path], *, rank: int) -> dict[str, Any]:
    """A point of the learning curve by head: rows trained on, and the figures on the test rows. Empty but on rank 0."""
    if rank:
        return {}
    with tempfile.TemporaryDirectory(prefix="rluf-curve-") as scratch:
        outs = {head: (data, Path(scratch) / head) for head, data in folders.items()}
        finish(settings, outs, members, time.monotonic(), thorough=False)
        cards = {head: json.loads((out / CARD).read_text(encoding="utf-8")) for head, (_, out) in outs.items()}
    return {head: curve_point(card) for head, card in cards.items()}


def add_curve(outs: Mapping[str, Path], points: Sequence[Mapping[str, Any]]) -> None:
    """Put the learning curve into the cards of written models, by head, and into their pages where they have one.

    The model's own figures are the curve's last point. Raises ModelError when the disk refuses.
    """
    for head, out in outs.items():
        try:
            card = json.loads((out / CARD).read_text(encoding="utf-8"))
            card["learning_curve"] = [*(part[head] for part in points), curve_point(card)]
            if (out / PAGE).is_file():
                _replace(out / PAGE, card_page(card))
            _replace(out / CARD, json.dumps(card, indent=2) + "\n")
        except OSError as error:
            raise ModelError(
                f"the learning curve could not be written to {out}: {error}; the model is there"
            ) from error


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def curve_point(card: Mapping[str, Any]) -> dict[str, Any]:
    """What the learning curve tells of a card."""
    figure = "pair_accuracy" if "pair_accuracy" in card else "auroc"
    return {"train_rows": card["training"]["train_rows"], figure: card[figure], "log_loss": card["log_loss"]}
