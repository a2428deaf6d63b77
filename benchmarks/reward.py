"""Reward training: tokens per second of ours (DeepSpeed, length-sorted steps, frozen layers replayed) over bare torch.

The bare loop trains the same MiniLM in the same type on batches of exactly equal length, so it wastes nothing on
padding; it runs frozen layers in every epoch, as a bare loop does. Both are timed by turns, the medians count. Tokens
are those of the rows, padding left out. Prints one JSON line last.

python benchmarks/reward.py [--rows 256] [--rounds 3] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from rluf.config.settings import Settings
from rluf.engine.deepspeed import init_deepspeed, join_group, leave_group
from rluf.models import resolve_model
from rluf.objectives.backbone import encoder_for, freeze, load_classifier, quick_cpu_matmul
from rluf.objectives.losses import weighted_bce
from rluf.objectives.prefix import FrozenPrefix
from rluf.objectives.scorer import logits_of
from rluf.objectives.text import Encoded, TextEncoder
from rluf.objectives.training import Plan, Rows, Trainer
from rluf.paths import cache_dir

BATCH, RATE, DTYPE = 32, 3e-4, torch.bfloat16


def made_rows(count: int, lengths: list[int], seed: int = 0) -> Rows:
    """Rows of random tokens whose lengths are drawn from `lengths`."""
    rng = random.Random(seed)
    sequences = []
    for _ in range(count):
        ids = (101, *(rng.randrange(1000, 30_000) for _ in range(rng.choice(lengths) - 2)), 102)
        sequences.append(Encoded(ids, len(ids) // 2))
    labels = np.asarray([float(rng.random() < 0.25) for _ in range(count)])
    return Rows(False, sequences, labels, np.ones(count), [str(i) for i in range(count)], np.ones(count))


def ours(folder: Path, rows: Rows, frozen: float, epochs: int) -> float:
    """Tokens per second of the training that rluf.reward does, frozen layers' single pass included."""
    model = load_classifier(folder, trained=False, dropout=0.1)
    encoder = encoder_for(model, folder, 128)
    layers = freeze(model, frozen)
    model.to(DTYPE)
    steps = -(-len(rows) // BATCH)
    engine = init_deepspeed(
        model, zero_stage=0, learning_rate=RATE, warmup_steps=1, weight_decay=0.01, grad_clip=1.0, dtype=DTYPE, world=1,
        total_steps=steps * epochs,
    )  # fmt: skip
    plan = Plan(epochs=epochs, batch_rows=BATCH, batch_tokens=4096, steps=steps, seed=0)
    prefix = FrozenPrefix(model, layers) if layers else None
    dev = made_rows(2, [8])
    found = Trainer(engine, model, encoder, plan, prefix).fit(rows, dev, snapshot=lambda: None, report=lambda _: None)
    return found.tokens / found.seconds


def bare(folder: Path, rows: Rows, frozen: float, epochs: int) -> float:
    """Tokens per second of a plain torch loop: bfloat16 weights, fused AdamW, batches of equal length."""
    model = load_classifier(folder, trained=False, dropout=0.1)
    encoder = encoder_for(model, folder, 128)
    freeze(model, frozen)
    model.to(DTYPE).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, fused=True)
    started, tokens = time.perf_counter(), 0
    for _ in range(epochs):
        for batch in equal_length_batches(rows):
            inputs = encoder.collate([rows.sequences[i] for i in batch])
            logits = model(**inputs).logits[:, 0].float()
            weighted_bce(logits, torch.tensor(rows.labels[batch]), torch.ones(len(batch))).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            tokens += int(inputs["attention_mask"].sum())
    return tokens / (time.perf_counter() - started)


def equal_length_batches(rows: Rows) -> list[list[int]]:
    """Row indices in batches of up to BATCH rows of one length."""
    by_length: dict[int, list[int]] = {}
    for index, sequence in enumerate(rows.sequences):
        by_length.setdefault(len(sequence), []).append(index)
    return [same[i : i + BATCH] for same in by_length.values() for i in range(0, len(same), BATCH)]


def scoring(folder: Path, rows: Rows, encoder: TextEncoder) -> float:
    """Tokens per second of scoring in float32, as reward actors do."""
    model = load_classifier(folder, trained=False).eval()
    started = time.perf_counter()
    logits_of(model, encoder, rows.sequences, 8192)
    return rows.tokens / (time.perf_counter() - started)


def main() -> None:
    """Time both by turns and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quick_cpu_matmul()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    join_group(rank=0, world=1, host="127.0.0.1", port=port, device=torch.device("cpu"), timeout_s=60)
    settings = Settings()
    folder = resolve_model("minilm", cache_dir(settings))
    rows = made_rows(options.rows, [40, 48, 56, 64, 72, 80, 88, 96])
    encoder = encoder_for(load_classifier(folder, trained=False), folder, 128)
    frozen, epochs = settings.reward.love.frozen_share, settings.reward.love.epochs
    made: dict[str, list[float]] = {"ours": [], "bare": [], "ours_unfrozen": [], "bare_unfrozen": [], "scoring": []}
    ours(folder, made_rows(BATCH, [64]), frozen, 1)  # builds DeepSpeed's op and warms up
    for _ in range(options.rounds):
        made["ours"].append(ours(folder, rows, frozen, epochs))
        made["bare"].append(bare(folder, rows, frozen, epochs))
        made["ours_unfrozen"].append(ours(folder, rows, 0, 1))
        made["bare_unfrozen"].append(bare(folder, rows, 0, 1))
        made["scoring"].append(scoring(folder, rows, encoder))
    leave_group()
    speeds = {name: round(statistics.median(values), 1) for name, values in made.items()}
    line = {
        "benchmark": "reward",
        "tokens_per_second": speeds,
        "ratio": round(speeds["ours"] / speeds["bare"], 3),
        "ratio_unfrozen": round(speeds["ours_unfrozen"] / speeds["bare_unfrozen"], 3),
        "frozen_share": frozen,
        "epochs": epochs,
        "rows": options.rows,
        "threads": options.threads,
        "dtype": "bfloat16",
    }
    sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
