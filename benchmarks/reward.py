"""Reward training: tokens per second of ours (DeepSpeed, length-sorted steps, frozen layers replayed) over bare torch.

The bare loop trains the same MiniLM in the same type on batches of exactly equal length, so it wastes nothing on
padding; it runs frozen layers in every epoch, as a bare loop does. On pairs, ours stands beside TRL's RewardTrainer
(the same rows, rate and step size, outside any process group, as its users run it), and scoring of texts, tokenizing
included, beside a transformers pipeline; the bare loop of scoring has batches of equal length. All are timed by turns,
the medians count; each is warmed up by a small run first. Tokens are those of the rows, padding left out. float32.
Prints one JSON line last.

python benchmarks/reward.py [--rows 256] [--rounds 3] [--threads 2] [--only unfrozen]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from rluf.backends.deepspeed import init_deepspeed, join_group, leave_group
from rluf.config.settings import Settings
from rluf.models.hub import resolve_model
from rluf.reward.backbone import encoder_for, freeze, load_classifier, quick_cpu_matmul
from rluf.reward.frozen_prefix import FrozenPrefix
from rluf.reward.losses import bradley_terry, weighted_bce
from rluf.reward.model import logits_of
from rluf.reward.text import Encoded, TextEncoder
from rluf.reward.trainer import Fit, Plan, Position, Rows, Task, Trainer
from rluf.utils.paths import cache_dir

BATCH, RATE, DTYPE = 32, 3e-4, torch.float32
LENGTHS = [40, 48, 56, 64, 72, 80, 88, 96]


def made_rows(count: int, lengths: list[int], seed: int = 0) -> Rows:
    """Rows of random tokens whose lengths are drawn from `lengths`."""
    rng = random.Random(seed)
    sequences = []
    for _ in range(count):
        ids = (101, *(rng.randrange(1000, 30_000) for _ in range(rng.choice(lengths) - 2)), 102)
        sequences.append(Encoded(ids, len(ids) // 2))
    labels = np.asarray([float(rng.random() < 0.25) for _ in range(count)])
    return Rows(False, sequences, labels, np.ones(count), [str(i) for i in range(count)], np.ones(count))


def pair_loss(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Bradley-Terry on logits of the chosen, then the rejected responses."""
    chosen, rejected = logits.chunk(2)
    return bradley_terry(chosen, rejected, weights, wins=labels)


def ours(folder: Path, rows: Rows, frozen: float, epochs: int) -> float:
    """Tokens per second of the training that rluf.reward does, frozen layers' single pass included."""
    size = BATCH // 2 if rows.pairs else BATCH  # rows of a step; a pair is two sequences
    model = load_classifier(folder, trained=False, dropout=0.1)
    encoder = encoder_for(model, folder, 128)
    layers = freeze(model, frozen)
    model.to(DTYPE)
    steps = -(-len(rows) // size)
    engine = init_deepspeed(
        model, zero_stage=0, learning_rate=RATE, warmup_steps=1, weight_decay=0.01, grad_clip=1.0, dtype=DTYPE, world=1,
        total_steps=steps * epochs,
    )  # fmt: skip
    dev = made_pairs(2, [8]) if rows.pairs else made_rows(2, [8])
    task = Task("reward", rows, dev, pair_loss if rows.pairs else weighted_bce)
    plan = Plan(epochs=epochs, batch_rows=size, batch_tokens=4096, seed=0)
    trainer = Trainer(model, encoder, plan, FrozenPrefix(model, layers) if layers else None)
    (found,) = trainer.fit(engine, [task], Position([Fit()]), snapshot=lambda: None, report=lambda *_: None)
    return found.tokens / found.seconds


def bare(folder: Path, rows: Rows, frozen: float, epochs: int) -> float:
    """Tokens per second of a plain torch loop: fused AdamW, batches of equal length."""
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


def made_pairs(count: int, lengths: list[int]) -> Rows:
    """Pairs of random tokens, chosen and rejected each of a length drawn from `lengths`."""
    sequences = made_rows(2 * count, lengths, seed=1).sequences
    ones = np.ones(count)
    return Rows(True, sequences, ones, ones, [str(i) for i in range(count)], np.ones(2 * count))


def trl(folder: Path, pairs: Rows, frozen: float, epochs: int) -> float:
    """Tokens per second of TRL's RewardTrainer on pairs, batches as large as ours."""
    from datasets import Dataset
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

    model = load_classifier(folder, trained=False, dropout=0.1)
    encoder = encoder_for(model, folder, 128)
    freeze(model, frozen)
    count = len(pairs)
    ids = [list(sequence.ids) for sequence in pairs.sequences]
    data = Dataset.from_dict({"chosen_ids": ids[:count], "rejected_ids": ids[count:]})
    with tempfile.TemporaryDirectory() as scratch:
        config = RewardConfig(
            output_dir=scratch, per_device_train_batch_size=BATCH // 2, num_train_epochs=epochs, learning_rate=RATE,
            bf16=False, use_cpu=True, report_to=[], logging_strategy="no", save_strategy="no", disable_tqdm=True,
            max_length=None, gradient_checkpointing=False, disable_dropout=False,
        )  # fmt: skip
        trainer = RewardTrainer(model=model, args=config, train_dataset=data, processing_class=encoder.tokenizer)
        started = time.perf_counter()
        trainer.train()
        return epochs * pairs.tokens / (time.perf_counter() - started)


def made_texts(encoder: TextEncoder, count: int, lengths: list[int]) -> list[tuple[str, str]]:
    """Questions and responses of whole words of the vocabulary, a token each."""
    words = sorted(word for word in encoder.tokenizer.get_vocab() if word.isalpha() and word.isascii())
    rng = random.Random(2)
    halves = [[max(1, rng.choice(lengths) // 2) for _ in range(2)] for _ in range(count)]
    return [(" ".join(rng.choices(words, k=a)), " ".join(rng.choices(words, k=b))) for a, b in halves]


def pipeline_scoring(folder: Path, texts: list[tuple[str, str]], encoder: TextEncoder) -> tuple[float, float]:
    """Texts per second of our scorer, tokenizing included, over those of a transformers pipeline on the same texts."""
    from transformers import pipeline

    model = load_classifier(folder, trained=False).eval()
    started = time.perf_counter()
    rows = encoder.encode([([{"role": "user", "content": a}], b) for a, b in texts])
    logits_of(model, encoder, rows, 8192)
    ours_s = time.perf_counter() - started
    told = [{"text": a, "text_pair": b} for a, b in texts]
    scorer = pipeline("text-classification", model=model, tokenizer=encoder.tokenizer, device="cpu", batch_size=BATCH)
    started = time.perf_counter()
    scorer(told, function_to_apply="none")
    tokens = sum(map(len, rows))
    return tokens / ours_s, tokens / (time.perf_counter() - started)


def equal_length_batches(rows: Rows) -> list[list[int]]:
    """Row indices in batches of up to BATCH rows of one length."""
    by_length: dict[int, list[int]] = {}
    for index, sequence in enumerate(rows.sequences):
        by_length.setdefault(len(sequence), []).append(index)
    return [same[i : i + BATCH] for same in by_length.values() for i in range(0, len(same), BATCH)]


def scoring(folder: Path, rows: Rows, encoder: TextEncoder) -> tuple[float, float]:
    """Tokens per second of scoring as reward actors do, and of a bare loop over batches of equal length."""
    model = load_classifier(folder, trained=False).eval()
    started = time.perf_counter()
    logits_of(model, encoder, rows.sequences, 8192)
    ours_s, started = time.perf_counter() - started, time.perf_counter()
    with torch.inference_mode():
        for batch in equal_length_batches(rows):
            model(**encoder.collate([rows.sequences[i] for i in batch])).logits[:, 0].tolist()
    return rows.tokens / ours_s, rows.tokens / (time.perf_counter() - started)


def join() -> None:
    """A process group of this process alone, which DeepSpeed wants and TRL would take for distributed training."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    join_group(rank=0, world=1, host="127.0.0.1", port=port, device=torch.device("cpu"), timeout_s=60)


def one_round(
    folder: Path, rows: Rows, pairs: Rows, texts: list[tuple[str, str]], only: str | None
) -> dict[str, float]:
    """Tokens per second of everything, each once, or of what trains without frozen layers alone."""
    reward, encoder = Settings().reward, encoder_for(load_classifier(folder, trained=False), folder, 128)
    frozen, epochs = reward.love.frozen_share, reward.love.epochs
    found: dict[str, float] = {}
    join()
    found["ours_unfrozen"], found["bare_unfrozen"] = ours(folder, rows, 0, 1), bare(folder, rows, 0, 1)
    if only is None:
        found["ours"], found["bare"] = ours(folder, rows, frozen, epochs), bare(folder, rows, frozen, epochs)
        found["pairs"], found["pairs_unfrozen"] = ours(folder, pairs, frozen, epochs), ours(folder, pairs, 0, 1)
    leave_group()
    if only is None:
        found["trl_pairs"], found["trl_pairs_unfrozen"] = trl(folder, pairs, frozen, epochs), trl(folder, pairs, 0, 1)
        found["scoring"], found["bare_scoring"] = scoring(folder, rows, encoder)
        found["scoring_texts"], found["pipeline_texts"] = pipeline_scoring(folder, texts, encoder)
    return found


RATIOS = {
    "ratio": ("ours", "bare"),
    "ratio_unfrozen": ("ours_unfrozen", "bare_unfrozen"),
    "ratio_to_trl": ("pairs", "trl_pairs"),
    "ratio_to_trl_unfrozen": ("pairs_unfrozen", "trl_pairs_unfrozen"),
    "ratio_scoring": ("scoring", "bare_scoring"),
    "ratio_to_pipeline": ("scoring_texts", "pipeline_texts"),
}


def main() -> None:
    """Time all by turns and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", choices=["unfrozen"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quick_cpu_matmul()
    folder = resolve_model("minilm", cache_dir(Settings()))
    encoder = encoder_for(load_classifier(folder, trained=False), folder, 128)
    rows, pairs = made_rows(options.rows, LENGTHS), made_pairs(options.rows // 2, LENGTHS)
    texts = made_texts(encoder, options.rows, LENGTHS)
    one_round(folder, made_rows(BATCH, [40]), made_pairs(BATCH // 2, [40]), texts[:BATCH], options.only)
    made: dict[str, list[float]] = defaultdict(list)
    for _ in range(options.rounds):
        for name, speed in one_round(folder, rows, pairs, texts, options.only).items():
            made[name].append(speed)
    speeds = {name: round(statistics.median(values), 1) for name, values in made.items()}
    line = {
        "benchmark": "reward",
        "tokens_per_second": speeds,
        **{name: round(speeds[a] / speeds[b], 3) for name, (a, b) in RATIOS.items() if a in speeds},
        "frozen_share": Settings().reward.love.frozen_share,
        "epochs": Settings().reward.love.epochs,
        "rows": options.rows,
        "threads": options.threads,
        "dtype": str(DTYPE).removeprefix("torch."),
    }
    sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
