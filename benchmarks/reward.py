"""Reward training and scoring: tokens per second compared with bare torch loops, TRL and a transformers pipeline.

Ours uses DeepSpeed, length-sorted steps and cached outputs of frozen layers. The bare loop trains the same MiniLM in
the same dtype on batches of exactly equal length, so it wastes nothing on padding, but runs frozen layers in every
epoch. On pairs, ours is compared with TRL's RewardTrainer (same rows, learning rate and step size, outside any
process group, as its users run it); scoring of texts, including tokenization, with a transformers pipeline; scoring
of token ids with a bare loop over batches of equal length. All alternate in rounds after a small warm-up, and the
medians count. Padding tokens are not counted. float32.
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

from rluf.backends.deepspeed import init_deepspeed, join_process_group, leave_process_group
from rluf.config.settings import Settings
from rluf.models.hub import resolve_model
from rluf.reward.backbone import (
    FrozenPrefix,
    build_text_encoder,
    enable_fast_cpu_matmul,
    freeze_lowest_layers,
    load_classifier,
)
from rluf.reward.encoded_split import EncodedSplit
from rluf.reward.losses import bradley_terry_loss, weighted_bce_loss
from rluf.reward.model import compute_logits
from rluf.reward.text import EncodedItem, TextEncoder
from rluf.reward.trainer import FitResult, HeadTask, RewardModelTrainer, TrainPlan, TrainProgress
from rluf.types import Message, ScoringItem
from rluf.utils.paths import resolve_cache_folder

BATCH_ROWS, LEARNING_RATE, DTYPE = 32, 3e-4, torch.float32
ROW_LENGTHS = [40, 48, 56, 64, 72, 80, 88, 96]


def random_rows(row_count: int, lengths: list[int], seed: int = 0) -> EncodedSplit:
    """Rows of random tokens with lengths sampled from `lengths`."""
    rng = random.Random(seed)
    sequences = []
    for _ in range(row_count):
        token_ids = (101, *(rng.randrange(1000, 30_000) for _ in range(rng.choice(lengths) - 2)), 102)
        sequences.append(EncodedItem(token_ids, len(token_ids) // 2))
    labels = np.asarray([float(rng.random() < 0.25) for _ in range(row_count)])
    return EncodedSplit(
        False, sequences, labels, np.ones(row_count), [str(index) for index in range(row_count)], np.ones(row_count)
    )


def pair_loss(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Bradley-Terry on logits of the chosen, then the rejected responses."""
    chosen, rejected = logits.chunk(2)
    return bradley_terry_loss(chosen, rejected, weights)


def train_with_rluf(folder: Path, rows: EncodedSplit, frozen_share: float, epochs: int) -> float:
    """Tokens per second of training as in rluf.reward, including the single pass of the frozen layers."""
    rows_per_step = BATCH_ROWS // 2 if rows.is_pairwise else BATCH_ROWS  # a pair is two sequences
    model = load_classifier(folder, require_all_weights=False, dropout=0.1)
    encoder = build_text_encoder(model, folder, 128)
    frozen_layers = freeze_lowest_layers(model, frozen_share)
    model.to(DTYPE)
    steps_per_epoch = -(-len(rows) // rows_per_step)
    engine = init_deepspeed(
        model,
        zero_stage=0,
        learning_rate=LEARNING_RATE,
        warmup_steps=1,
        weight_decay=0.01,
        dtype=DTYPE,
        world_size=1,
        device=torch.device("cpu"),
        total_steps=steps_per_epoch * epochs,
    )
    dev_rows = random_pairs(2, [8]) if rows.is_pairwise else random_rows(2, [8])
    head_task = HeadTask("reward", rows, dev_rows, pair_loss if rows.is_pairwise else weighted_bce_loss)
    plan = TrainPlan(epochs=epochs, batch_rows=rows_per_step, batch_tokens=4096, seed=0)
    trainer = RewardModelTrainer(model, encoder, plan, FrozenPrefix(model, frozen_layers) if frozen_layers else None)
    (fit_result,) = trainer.fit(
        engine, [head_task], TrainProgress([FitResult()]), on_best=lambda: None, on_epoch=lambda *_: None
    )
    return fit_result.token_count / fit_result.train_seconds


def train_bare_loop(folder: Path, rows: EncodedSplit, frozen_share: float, epochs: int) -> float:
    """Tokens per second of a plain torch loop: fused AdamW, batches of equal length."""
    model = load_classifier(folder, require_all_weights=False, dropout=0.1)
    encoder = build_text_encoder(model, folder, 128)
    freeze_lowest_layers(model, frozen_share)
    model.to(DTYPE).train()
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=LEARNING_RATE, fused=True
    )
    started, token_count = time.perf_counter(), 0
    for _ in range(epochs):
        for batch in equal_length_batches(rows):
            inputs = encoder.collate([rows.sequences[index] for index in batch])
            logits = model(**inputs).logits[:, 0].float()
            weighted_bce_loss(logits, torch.tensor(rows.labels[batch]), torch.ones(len(batch))).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            token_count += int(inputs["attention_mask"].sum())
    return token_count / (time.perf_counter() - started)


def random_pairs(pair_count: int, lengths: list[int]) -> EncodedSplit:
    """Pairs of random tokens; the lengths of both sides are sampled from `lengths`."""
    sequences = random_rows(2 * pair_count, lengths, seed=1).sequences
    ones = np.ones(pair_count)
    return EncodedSplit(
        True, sequences, ones, ones, [str(index) for index in range(pair_count)], np.ones(2 * pair_count)
    )


def train_with_trl(folder: Path, pairs: EncodedSplit, frozen_share: float, epochs: int) -> float:
    """Tokens per second of TRL's RewardTrainer on pairs, with our batch size."""
    from datasets import Dataset
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

    model = load_classifier(folder, require_all_weights=False, dropout=0.1)
    encoder = build_text_encoder(model, folder, 128)
    freeze_lowest_layers(model, frozen_share)
    pair_count = len(pairs)
    token_ids = [list(sequence.token_ids) for sequence in pairs.sequences]
    dataset = Dataset.from_dict({"chosen_ids": token_ids[:pair_count], "rejected_ids": token_ids[pair_count:]})
    with tempfile.TemporaryDirectory() as scratch:
        config = RewardConfig(
            output_dir=scratch,
            per_device_train_batch_size=BATCH_ROWS // 2,
            num_train_epochs=epochs,
            learning_rate=LEARNING_RATE,
            bf16=False,
            use_cpu=True,
            report_to=[],
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            max_length=None,
            gradient_checkpointing=False,
            disable_dropout=False,
        )
        trainer = RewardTrainer(model=model, args=config, train_dataset=dataset, processing_class=encoder.tokenizer)
        started = time.perf_counter()
        trainer.train()
        return epochs * pairs.token_count / (time.perf_counter() - started)


def random_texts(encoder: TextEncoder, text_count: int, lengths: list[int]) -> list[tuple[str, str]]:
    """Questions and responses of whole vocabulary words, one token each."""
    words = sorted(word for word in encoder.tokenizer.get_vocab() if word.isalpha() and word.isascii())
    rng = random.Random(2)
    word_counts = [[max(1, rng.choice(lengths) // 2) for _ in range(2)] for _ in range(text_count)]
    return [
        (" ".join(rng.choices(words, k=question_words)), " ".join(rng.choices(words, k=response_words)))
        for question_words, response_words in word_counts
    ]


def score_texts(folder: Path, texts: list[tuple[str, str]], encoder: TextEncoder) -> tuple[float, float]:
    """Tokens per second of our scorer, including tokenization, and of a transformers pipeline on the same texts."""
    from transformers import pipeline

    model = load_classifier(folder, require_all_weights=False).eval()
    started = time.perf_counter()
    encoded_rows = encoder.encode(
        [ScoringItem([Message(role="user", content=question)], response) for question, response in texts]
    )
    compute_logits(model, encoder, encoded_rows, 8192)
    rluf_seconds = time.perf_counter() - started
    pipeline_inputs = [{"text": question, "text_pair": response} for question, response in texts]
    scorer = pipeline(
        "text-classification", model=model, tokenizer=encoder.tokenizer, device="cpu", batch_size=BATCH_ROWS
    )
    started = time.perf_counter()
    scorer(pipeline_inputs, function_to_apply="none")
    token_count = sum(map(len, encoded_rows))
    return token_count / rluf_seconds, token_count / (time.perf_counter() - started)


def equal_length_batches(rows: EncodedSplit) -> list[list[int]]:
    """Row indices in batches of up to BATCH rows of one length."""
    by_length: dict[int, list[int]] = {}
    for index, sequence in enumerate(rows.sequences):
        by_length.setdefault(len(sequence), []).append(index)
    return [
        indices[start : start + BATCH_ROWS]
        for indices in by_length.values()
        for start in range(0, len(indices), BATCH_ROWS)
    ]


def score_token_ids(folder: Path, rows: EncodedSplit, encoder: TextEncoder) -> tuple[float, float]:
    """Tokens per second of scoring as reward actors do, and of a bare loop over batches of equal length."""
    model = load_classifier(folder, require_all_weights=False).eval()
    started = time.perf_counter()
    compute_logits(model, encoder, rows.sequences, 8192)
    rluf_seconds, started = time.perf_counter() - started, time.perf_counter()
    with torch.inference_mode():
        for batch in equal_length_batches(rows):
            model(**encoder.collate([rows.sequences[index] for index in batch])).logits[:, 0].tolist()
    return rows.token_count / rluf_seconds, rows.token_count / (time.perf_counter() - started)


def join_single_process_group() -> None:
    """Join a process group of one: DeepSpeed requires it, but TRL would mistake it for distributed training."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    join_process_group(rank=0, world_size=1, host="127.0.0.1", port=port, device=torch.device("cpu"), timeout_s=60)


def run_round(
    folder: Path, rows: EncodedSplit, pairs: EncodedSplit, texts: list[tuple[str, str]], only: str | None
) -> dict[str, float]:
    """Tokens per second of every part, once each; with `only`, of training without frozen layers."""
    reward_settings, encoder = (
        Settings().reward,
        build_text_encoder(load_classifier(folder, require_all_weights=False), folder, 128),
    )
    frozen_share, epochs = reward_settings.love.frozen_share, reward_settings.love.epochs
    tokens_per_s: dict[str, float] = {}
    join_single_process_group()
    tokens_per_s["ours_unfrozen"], tokens_per_s["bare_unfrozen"] = (
        train_with_rluf(folder, rows, 0, 1),
        train_bare_loop(folder, rows, 0, 1),
    )
    if only is None:
        tokens_per_s["ours"], tokens_per_s["bare"] = (
            train_with_rluf(folder, rows, frozen_share, epochs),
            train_bare_loop(folder, rows, frozen_share, epochs),
        )
        tokens_per_s["pairs"], tokens_per_s["pairs_unfrozen"] = (
            train_with_rluf(folder, pairs, frozen_share, epochs),
            train_with_rluf(folder, pairs, 0, 1),
        )
    leave_process_group()
    if only is None:
        tokens_per_s["trl_pairs"], tokens_per_s["trl_pairs_unfrozen"] = (
            train_with_trl(folder, pairs, frozen_share, epochs),
            train_with_trl(folder, pairs, 0, 1),
        )
        tokens_per_s["scoring"], tokens_per_s["bare_scoring"] = score_token_ids(folder, rows, encoder)
        tokens_per_s["scoring_texts"], tokens_per_s["pipeline_texts"] = score_texts(folder, texts, encoder)
    return tokens_per_s


RATIO_PARTS = {
    "ratio": ("ours", "bare"),
    "ratio_unfrozen": ("ours_unfrozen", "bare_unfrozen"),
    "ratio_to_trl": ("pairs", "trl_pairs"),
    "ratio_to_trl_unfrozen": ("pairs_unfrozen", "trl_pairs_unfrozen"),
    "ratio_scoring": ("scoring", "bare_scoring"),
    "ratio_to_pipeline": ("scoring_texts", "pipeline_texts"),
}


def main() -> None:
    """Time all parts in alternating rounds and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", choices=["unfrozen"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    enable_fast_cpu_matmul()
    folder = resolve_model("minilm", resolve_cache_folder(Settings()))
    encoder = build_text_encoder(load_classifier(folder, require_all_weights=False), folder, 128)
    rows, pairs = random_rows(args.rows, ROW_LENGTHS), random_pairs(args.rows // 2, ROW_LENGTHS)
    texts = random_texts(encoder, args.rows, ROW_LENGTHS)
    run_round(folder, random_rows(BATCH_ROWS, [40]), random_pairs(BATCH_ROWS // 2, [40]), texts[:BATCH_ROWS], args.only)
    speeds_by_name: dict[str, list[float]] = defaultdict(list)
    for _ in range(args.rounds):
        for name, tokens_per_s in run_round(folder, rows, pairs, texts, args.only).items():
            speeds_by_name[name].append(tokens_per_s)
    speeds = {name: round(statistics.median(values), 1) for name, values in speeds_by_name.items()}
    report = {
        "benchmark": "reward",
        "tokens_per_second": speeds,
        **{
            name: round(speeds[numerator] / speeds[denominator], 3)
            for name, (numerator, denominator) in RATIO_PARTS.items()
            if numerator in speeds
        },
        "frozen_share": Settings().reward.love.frozen_share,
        "epochs": Settings().reward.love.epochs,
        "rows": args.rows,
        "threads": args.threads,
        "dtype": str(DTYPE).removeprefix("torch."),
    }
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
