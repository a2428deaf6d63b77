"""LoRA adapters on SmolLM2 for helpfulness, next to a linear head on its frozen layers, on prompts that neither saw.

python benchmarks/helpfulness_lora.py [--folds 2] [--layers 24] [--frozen 16] [--rank 16] [--epochs 2] [key=value]

Reads the pairs of configs/reward/helpfulness-human.yaml (select data sets with data.preferences=...). Folds by
prompt: each fold trains on the others. A head is fitted on the frozen model, read at the next turn after `--layers`
layers. From this head on, adapters of `--rank` above the `--frozen` layers are trained with the Bradley-Terry loss by
the trainer of rluf.reward, with plain AdamW. No epoch is selected: every one is scored. Prints a JSON line per fold:
accuracy by source of the frozen head and of each epoch, as in benchmarks/human.py, next to length alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from human import list_sources, measure_by_source, read_raw_rows

from rluf.config.load import load_settings
from rluf.config.settings import Settings
from rluf.models.hub import resolve_model
from rluf.reward.backbone import (
    FrozenPrefix,
    add_layer_adapters,
    build_text_encoder,
    enable_fast_cpu_matmul,
    freeze_lowest_layers,
    load_classifier,
)
from rluf.reward.encoded_split import EncodedSplit, encode_split
from rluf.reward.linear_probe import assign_folds, fit_probe
from rluf.reward.losses import build_loss
from rluf.reward.metrics import compute_accuracy_interval, round_for_json
from rluf.reward.trainer import FitResult, HeadTask, RewardModelTrainer, TrainPlan, TrainProgress
from rluf.utils.paths import resolve_cache_folder
from rluf.utils.stats import Floats

logger = logging.getLogger("helpfulness_lora")

BACKBONE = "smollm2-135m-instruct"
DROPOUT_RATE = 0.1


class TorchEngine:
    """Plain AdamW in place of DeepSpeed, with linear warm-up over the first tenth of the steps, then linear decay."""

    def __init__(self, model: Any, learning_rate: float, step_count: int) -> None:
        self.model = model
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
        warmup = max(1, step_count // 10)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / warmup, (step_count - step) / max(1, step_count - warmup))
        )

    def __call__(self, **inputs: torch.Tensor) -> Any:
        """The model's output."""
        return self.model(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of the loss."""
        loss.backward()

    def step(self) -> None:
        """Update the weights and clear the gradient."""
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()

    def train(self) -> None:
        """Enable dropout."""
        self.model.train()

    def eval(self) -> None:
        """Disable dropout."""
        self.model.eval()


def score_fold(
    settings: Settings, args: argparse.Namespace, train_records: Sequence[Any], test_records: Sequence[Any]
) -> tuple[list[Floats], EncodedSplit]:
    """Logits [2N] of the test rows by the frozen head and after each epoch, and the encoded test rows."""
    model_settings = settings.reward.helpfulness
    folder = resolve_model(BACKBONE, resolve_cache_folder(settings))
    model = load_classifier(folder, require_all_weights=False, layer_count=args.layers)
    encoder = build_text_encoder(model, folder, model_settings.token_limit, read_at_next_turn=True, mark_truncated=True)
    train, test = (
        encode_split(records, encoder, is_pairwise=True, source_name="pairs")
        for records in (train_records, test_records)
    )
    frozen_layers = freeze_lowest_layers(model, args.frozen / args.layers)
    plan = TrainPlan(epochs=args.epochs, batch_rows=args.batch_rows, batch_tokens=4096, seed=settings.seed)
    trainer = RewardModelTrainer(model, encoder, plan, FrozenPrefix(model, frozen_layers))
    train_features, test_features = (trainer.compute_features(split)[0] for split in (train, test))
    weights, _, _ = fit_probe(
        train_features, train.labels, train.weights, train.clusters, is_pairwise=True, seed=settings.seed
    )
    logits = [test_features @ weights]
    add_layer_adapters(model, args.rank, frozen_layers, DROPOUT_RATE)
    with torch.no_grad():
        model.score.weight.copy_(torch.as_tensor(weights)[None])
    engine = TorchEngine(model, args.learning_rate, args.epochs * -(-len(train) // args.batch_rows))
    task = HeadTask("helpfulness", train, test, build_loss(model_settings))

    def score_epoch(_name: str, metrics: dict[str, float]) -> None:
        head = model.score.weight[0].detach().double().numpy()
        logits.append(trainer.compute_features(test)[0] @ head)
        logger.info("epoch %d: train loss %.4f, test log-loss %.4f", *metrics.values())

    trainer.fit(engine, [task], TrainProgress([FitResult()]), on_best=lambda: None, on_epoch=score_epoch)
    return logits, test


def summarize(records: Sequence[Any], rows: EncodedSplit, logits: Sequence[Floats]) -> dict[str, Any]:
    """Accuracy of the frozen head and of each epoch, in all and by source."""
    count = len(rows)
    length_difference = rows.response_lengths[:count] - rows.response_lengths[count:]
    names = ["frozen", *(f"epoch {epoch}" for epoch in range(1, len(logits)))]
    return {
        name: {
            "all": compute_accuracy_interval(values[:count] - values[count:], np.ones(count), rows.clusters),
            "by_source": measure_by_source(
                list_sources(records), values[:count] - values[count:], length_difference, rows.clusters
            ),
        }
        for name, values in zip(names, logits, strict=True)
    }


def main() -> None:
    """Train and score every fold, and print the JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/reward/helpfulness-human.yaml"))
    for name, default in (("folds", 2), ("layers", 24), ("frozen", 16), ("rank", 16), ("epochs", 2), ("batch-rows", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    torch.set_num_threads(os.cpu_count() or 1)
    enable_fast_cpu_matmul()
    settings = load_settings(args.config, args.overrides).settings
    torch.manual_seed(settings.seed)
    records = read_raw_rows(settings, "helpfulness")
    folds = assign_folds([str(record["group"]) for record in records], args.folds, seed=settings.seed)
    for fold in range(args.folds):
        started = time.monotonic()
        train_records, test_records = (
            [record for record, is_test in zip(records, folds == fold, strict=True) if is_test == wanted]
            for wanted in (False, True)
        )
        logits, rows = score_fold(settings, args, train_records, test_records)
        report = {"fold": fold, "n": len(rows), "seconds": round(time.monotonic() - started, 1)}
        sys.stdout.write(json.dumps(round_for_json(report | summarize(test_records, rows, logits))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
