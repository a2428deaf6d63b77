"""Check on a GPU what no CPU can show, in the order in which a first run would need it; a reduced form runs on CPUs.

Every part runs in a process of its own with its own time limit, so that a crash or a hang of one does not hide the
others, and ends with a verdict: pass, fail, error, timeout or skipped, with its figures and seconds. Parts: device
(ZeRO 2 and 3 against a plain float32 step on the CPU), attention (no leak between samples; rows without padding),
logits (peak memory), offload (three turns of a colocated learner), ipc (weights between two processes), learner
(tokens/s, MFU, peak memory of benchmarks/learner_gpu.py), reward (a worker with 0 GPUs stays on the CPU, one with a
GPU uses it), engine (vLLM eager and with CUDA graphs, its logprobs against the learner's), job (three steps of the
colocated configuration, then a resume). The last two need vLLM and Ray. The last line is JSON.

Usage: python benchmarks/gpu_check.py [part ...]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
Figures = dict[str, Any]
BF16_TOLERANCE = 0.05
"""Relative difference of loss and gradient norm between a bfloat16 step and the float32 one."""
MFU_AIM = 0.45
CPU_LIMIT_FACTOR = 4
"""Time limits on CPUs, which other programs share, as a multiple of those on a GPU."""


JOB_CONFIG = "configs/qwen-0.5b-1gpu.yaml"
JOB_OVERRIDES = (
    "model.path=smollm2-135m-instruct", "algorithm.prompts_per_step=8", "evaluate.prompts=8",
    "learner.checkpoint_every_steps=1", "cluster.gpus_per_reward_worker=0",
    "objectives.love={source: judge, path: length}", "objectives.helpfulness={source: judge, path: repetition}",
    "objectives.safety={source: judge, path: refusal}",
)  # fmt: skip
"""The colocated configuration on a small embedded model, with rule judges instead of reward models."""


class CheckError(Exception):
    """A part ran and its result is wrong."""


def require(condition: bool, problem: str) -> None:
    """Raise CheckError with `problem` unless `condition`."""
    if not condition:
        raise CheckError(problem)


def find_free_port() -> int:
    """A port of this machine that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def save_model(on_gpu: bool, folder: Path) -> Path:
    """Random weights: Llama of 135M on a GPU, of two small layers on a CPU."""
    import learner_gpu

    return learner_gpu.save_random_model("135M" if on_gpu else "nano", folder)


def make_step(vocabulary_size: int) -> tuple[Any, Any, Any]:
    """Groups of uneven lengths, their learner inputs, and one plan of micro-batches."""
    import random

    from rluf.algorithms.advantages import AdvantageInputs
    from rluf.algorithms.packing import plan_micro_batches
    from rluf.algorithms.registry import build_learner_inputs
    from rluf.config.policy import AlgorithmSettings
    from rluf.types import Group, Prompt, Sample

    generator, groups = random.Random(0), []
    for index in range(4):
        prompt_ids = tuple(generator.randrange(3, vocabulary_size) for _ in range(generator.randrange(4, 60)))
        lengths = [generator.randrange(1, 50) for _ in range(4)]
        samples = tuple(
            Sample(str(index), prompt_ids, tuple(generator.randrange(3, vocabulary_size) for _ in range(length)),
                   (-math.log(vocabulary_size),) * length, ((0, 0),), "stop", "")
            for length in lengths
        )  # fmt: skip
        groups.append(Group(Prompt(str(index), (), prompt_ids, "", "train"), samples, 0))
    lengths_by_group = [[len(sample.response_ids) for sample in group.samples] for group in groups]
    plan = plan_micro_batches(
        [len(group.prompt.token_ids) for group in groups], lengths_by_group, world_size=1, token_budget=256
    )[0]
    inputs = AdvantageInputs([[1.0, 0.0, 2.0, -1.0]] * len(groups), response_lengths=lengths_by_group)
    learner_inputs = build_learner_inputs(AlgorithmSettings(), inputs, max_response_tokens=64, kl_coef=0.02)
    return groups, learner_inputs, plan


def start_learner(on_gpu: bool, zero_stage: int, model_path: Path, **learner_settings: Any) -> Any:
    """A single learner rank of the actor's own code, without Ray."""
    from actors.learner import LearnerActor
    from rluf.config.settings import Settings

    settings = Settings.model_validate(
        {
            "model": {"dtype": "bfloat16"},
            "rollout": {"max_prompt_tokens": 64, "max_response_tokens": 64, "temperature": 1.0},
            "algorithm": {"micro_batch_tokens": 256},
            "learner": {"zero_stage": zero_stage, "learning_rate": 1e-3, "warmup_steps": 0, **learner_settings},
            "cluster": {"gpus_per_learner": float(on_gpu)},
        }
    )
    learner = LearnerActor(0, 1, settings.model_dump_json(), str(model_path))
    learner.setup("127.0.0.1", find_free_port())
    return learner


def copy_state(learner: Any) -> list[Any]:
    """Copies of weights, float32 masters and AdamW state on the CPU."""
    from rluf.backends import deepspeed as ds
    from rluf.backends.optimizer_state import list_master_weights

    tensors = [tensor for bucket in ds.gather_parameters(learner.engine, 64 << 20) for _, tensor in bucket]
    for master in list_master_weights(learner.engine):
        tensors += [master, *learner.engine.basic_optimizer.state[master].values()]
    return [tensor.detach().to("cpu", copy=True) for tensor in tensors]


def compute_plain_step(model_path: Path) -> tuple[float, float]:
    """Loss and gradient norm of the same step in float32 on the CPU, with plain torch."""
    import torch

    from rluf.algorithms.losses import compute_policy_loss
    from rluf.algorithms.packing import pack_micro_batch
    from rluf.algorithms.policy_model import compute_response_logprobs, load_policy
    from rluf.config.policy import AlgorithmSettings

    model, loss_sum = load_policy(model_path, dtype=torch.float32), 0.0
    groups, learner_inputs, plan = make_step(int(model.config.vocab_size))
    for micro_batch in plan:
        batch = pack_micro_batch(
            micro_batch, dict(enumerate(groups)), learner_inputs.advantages, learner_inputs.loss_weights
        )
        logprobs = compute_response_logprobs(model, batch)
        loss = compute_policy_loss(logprobs, logprobs.detach(), batch, AlgorithmSettings(), kl_coef=0.02).loss
        loss.backward()
        loss_sum += float(loss)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return loss_sum, float(torch.nn.utils.get_total_norm(gradients))


def check_device(on_gpu: bool, folder: Path) -> Figures:
    """One packed bfloat16 step at ZeRO 2 and 3 has the loss and gradient of a float32 step on the CPU."""
    import torch

    model_path = save_model(on_gpu, folder)
    expected_loss, expected_norm = compute_plain_step(model_path)
    figures: Figures = {"expected_grad_norm": round(expected_norm, 4)}
    for stage in (2, 3):
        learner = start_learner(on_gpu, stage, model_path)
        groups, learner_inputs, plan = make_step(int(learner.engine.module.config.vocab_size))
        metrics = learner.train_step(groups, learner_inputs, plan, 1)
        device = next(learner.engine.module.parameters()).device
        figures[f"zero{stage}"] = {key: round(metrics[key], 4) for key in ("loss", "grad_norm")}
        require(device.type == ("cuda" if on_gpu else "cpu"), f"ZeRO {stage} trains on {device}")
        for key, expected in (("loss", expected_loss), ("grad_norm", expected_norm)):
            gap = abs(metrics[key] - expected)
            require(gap <= BF16_TOLERANCE * max(abs(expected), 0.1), f"ZeRO {stage}: {key} {metrics[key]}, {expected}")
        learner.shutdown()
    figures["torch"] = torch.__version__
    return figures


def check_attention(on_gpu: bool, folder: Path) -> Figures:
    """Changing one sample leaves the logprobs of the others bit-equal; rows without padding agree with padded rows."""
    import torch

    from rluf.algorithms.packing import pack_micro_batch
    from rluf.algorithms.policy_model import compute_response_logprobs, load_policy
    from rluf.types import Group

    device = torch.device("cuda" if on_gpu else "cpu")
    model = load_policy(save_model(on_gpu, folder), dtype=torch.bfloat16).to(device).eval()
    groups, _, _ = make_step(int(model.config.vocab_size))
    pairs = [(index, sample) for index in range(len(groups)) for sample in range(4)]

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def compute_rows(step_groups: Sequence[Group]) -> list[Any]:
        batch = pack_micro_batch(pairs, dict(enumerate(step_groups)), [[0.0] * 4] * len(step_groups)).to(device)
        lengths = [len(step_groups[index].samples[sample].response_ids) for index, sample in pairs]
        return list(compute_response_logprobs(model, batch).split(lengths))

    before = compute_rows(groups)
    sample = groups[1].samples[2]
    object.__setattr__(sample, "response_ids", tuple(token + 1 for token in sample.response_ids))
    after = compute_rows(groups)
    changed = [index for index, rows in enumerate(zip(before, after, strict=True)) if not torch.equal(*rows)]
    require(changed == [6], f"changing sample 6 changed the logprobs of samples {changed}")
    if not on_gpu:
        return {"changed": changed}
    float32_model = model.float()  # takes the padded rows
    gap = max(float((a - b).abs().max()) for a, b in zip(after, compute_rows(groups), strict=True))
    del float32_model
    require(gap < 0.2, f"logprobs without padding in bfloat16 differ by {gap} from padded float32")
    return {"changed": changed, "largest_gap_nats": round(gap, 4)}


def check_logits(on_gpu: bool, folder: Path) -> Figures:
    """Peak memory of logprobs and their gradient is logits, gradient and one float32 chunk, not float32 copies."""
    import torch

    from rluf.algorithms.policy_model import compute_target_logprobs

    device, (tokens, vocabulary) = torch.device("cuda" if on_gpu else "cpu"), ((8192, 151_936) if on_gpu else (300, 64))
    logits = torch.randn(tokens, vocabulary, device=device, dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), device=device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    logprobs = compute_target_logprobs(logits, targets)
    logprobs.sum().backward()
    sample = slice(0, 64)
    expected = torch.log_softmax(logits.detach()[sample].float(), -1).gather(-1, targets[sample, None])[:, 0]
    require(torch.allclose(logprobs[sample], expected, atol=1e-4), "logprobs differ from log_softmax")
    if not on_gpu:
        return {}
    peak_gb, expected_gb = torch.cuda.max_memory_allocated() / 1e9, 4 * tokens * vocabulary / 1e9
    require(peak_gb < 1.25 * expected_gb, f"peak {peak_gb:.1f} GB, expected about {expected_gb:.1f} GB")
    return {"peak_gb": round(peak_gb, 2), "planned_gb": round(expected_gb, 2)}


def check_offload(on_gpu: bool, folder: Path) -> Figures:
    """Three turns of a colocated learner: weights and AdamW state survive bit for bit, and the memory comes back."""
    import torch

    from rluf.backends.colocation import OPTIMIZER_STATES_TAG, WEIGHTS_TAG

    learner = start_learner(on_gpu, 2, save_model(on_gpu, folder))
    groups, learner_inputs, plan = make_step(int(learner.engine.module.config.vocab_size))
    offload_seconds, used_bytes = [], []
    for step in range(3):
        learner.train_step(groups, learner_inputs, plan, step)
        before, start_time = copy_state(learner), time.perf_counter()
        learner.offload((WEIGHTS_TAG, OPTIMIZER_STATES_TAG))
        if on_gpu:
            torch.cuda.synchronize()
            used_bytes.append(torch.cuda.memory_allocated())
        offload_seconds.append(time.perf_counter() - start_time)
        learner.reload()
        after = copy_state(learner)
        require(all(map(torch.equal, before, after)), f"turn {step}: weights or optimizer state changed")
    learner.shutdown()
    require(not used_bytes or max(used_bytes) < 1.1 * min(used_bytes) + (16 << 20), f"memory grows: {used_bytes}")
    return {"offload_s": round(max(offload_seconds), 3), "offloaded_mib": [used >> 20 for used in used_bytes]}


def receive_buckets(connection: Any, on_gpu: bool) -> None:
    """The engine's side of check_ipc: checksums of every tensor of every bucket."""
    import torch

    from rluf.backends.weight_transfer.cuda_ipc import CudaIpcReceiver

    receiver = CudaIpcReceiver(torch.device("cuda", 0))
    receiver.begin({})
    while (bucket_info := connection.recv()) is not None:
        if not bucket_info:  # the end of a sync
            receiver.end()
            connection.send({})
            continue
        checksums: dict[str, float] = {}

        def load_weights(weights: Any, checksums: dict[str, float] = checksums) -> None:
            checksums.update({name: float(tensor.double().sum()) for name, tensor in weights})

        receiver.receive_bucket(bucket_info, load_weights)
        connection.send(checksums)


def check_ipc(on_gpu: bool, folder: Path) -> Figures:
    """Three weight syncs of three buckets between two processes that share the GPU; the memory comes back."""
    import torch

    from rluf.backends.weight_transfer.cuda_ipc import CudaIpcSender, describe_bucket, fill_buffer

    buckets = [[(f"w{index}.{width}", torch.randn(256, width)) for width in (128, 129, 130)] for index in range(3)]
    if not on_gpu:
        buffer = torch.empty(3 * 256 * 131 * 4, dtype=torch.uint8)
        sizes = fill_buffer(buffer, buckets[0])
        require(sum(sizes) <= buffer.numel() and len(describe_bucket(buckets[0], sizes)["names"]) == 3, "layout")
        return {"layout_only": True}
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    engine = context.Process(target=receive_buckets, args=(there, on_gpu), daemon=True)
    engine.start()
    sender, levels = CudaIpcSender(1 << 20), []
    for version in range(3):
        sender.begin(version)
        for bucket in buckets:
            on_device = [(name, tensor.cuda()) for name, tensor in bucket]
            here.send(sender.send_bucket(on_device))
            expected = {name: float(tensor.double().sum()) for name, tensor in on_device}
            require(here.recv() == expected, f"sync {version}: the engine received other weights")
        here.send({})
        here.recv()
        sender.end()
        levels.append(torch.cuda.mem_get_info()[0])
    here.send(None)
    require(levels[-1] >= levels[0] - (8 << 20), f"free memory falls from sync to sync: {levels}")
    return {"free_mib_after_each_sync": [level >> 20 for level in levels]}


def check_learner(on_gpu: bool, folder: Path) -> Figures:
    """Throughput, MFU and peak memory of the learner."""
    import learner_gpu

    shapes = ("135M", "1B", "3B") if on_gpu else ("nano",)
    figures = {shape: learner_gpu.measure_shape(shape, "127.0.0.1", find_free_port()) for shape in shapes}
    best = max((shape_figures["mfu"] or 0.0) for shape_figures in figures.values())
    require(not on_gpu or best >= MFU_AIM, f"MFU {best}, aim {MFU_AIM}: {figures}")
    return figures


def check_reward(on_gpu: bool, folder: Path) -> Figures:
    """A reward worker trains on the device of its settings, whatever it sees."""
    import torch

    from rluf.backends import deepspeed as ds
    from rluf.models.hub import resolve_model
    from rluf.reward.backbone import load_classifier

    name, device = ("minilm", "cuda:0") if on_gpu else ("tiny-encoder", "cpu")
    ds.join_process_group(
        rank=0, world_size=1, host="127.0.0.1", port=find_free_port(), device=torch.device(device), timeout_s=60
    )
    model = load_classifier(resolve_model(name, folder), require_all_weights=False, device=device)
    engine = ds.init_deepspeed(
        model, zero_stage=0, learning_rate=1e-3, warmup_steps=0, dtype=torch.float32, world_size=1,
        device=torch.device(device),
    )  # fmt: skip
    tokens, losses = torch.randint(5, 200, (8, 32), device=device), []
    for _ in range(5):
        ds.accumulate_gradients(engine, lambda: (engine(input_ids=tokens).logits.float().square().mean(), None),
                                is_last=True)  # fmt: skip
        losses.append(ds.apply_optimizer_step(engine)[1])
    used = next(engine.module.parameters()).device
    require(str(used) == device, f"the worker trains on {used}, expected {device}")
    require(all(map(math.isfinite, losses)), f"gradient norms {losses}")
    ds.leave_process_group()
    return {"device": str(used)}


def check_engine(on_gpu: bool, folder: Path) -> Figures:
    """Start seconds, tokens per second eager and with graphs, and the gap between engine and learner logprobs."""
    from statistics import fmean

    import torch

    from rluf.algorithms.packing import pack_micro_batch
    from rluf.algorithms.policy_model import compute_response_logprobs, load_policy
    from rluf.backends.vllm.engine import RolloutEngine, set_vllm_environment
    from rluf.config.settings import Settings
    from rluf.models.hub import load_tokenizer, resolve_model
    from rluf.types import Group, Prompt, Sample

    model_path = resolve_model("smollm2-135m-instruct", folder)
    prompt_ids = tuple(load_tokenizer(model_path).encode("Write about a walk in the rain."))
    figures: Figures = {}
    generation: Any = None
    for eager in (True, False):
        settings = Settings.model_validate(
            {"model": {"dtype": "bfloat16"}, "cluster": {"gpus_per_engine": 1},
             "rollout": {"eager": eager, "max_response_tokens": 256, "concurrency": 256, "gpu_memory_share": 0.4,
                         "temperature": 1.0}}
        )  # fmt: skip
        set_vllm_environment(settings)

        async def run(settings: Settings = settings) -> tuple[float, dict[int, float], Any]:
            engine, start_time = RolloutEngine("rollout 0", 0, settings, model_path), time.perf_counter()
            await engine.start()
            start_s, rates, generations = time.perf_counter() - start_time, {}, []
            for count in (64, 256):
                await engine.generate(prompt_ids, range(8))
                start_time = time.perf_counter()
                generations = await engine.generate(prompt_ids, range(count))
                tokens = sum(len(generation.response_ids) for generation in generations)
                rates[count] = round(tokens / (time.perf_counter() - start_time), 1)
            engine.shutdown()
            return start_s, rates, generations[0]

        start_s, rates, generation = asyncio.run(run())
        figures["eager" if eager else "graphs"] = {"start_s": round(start_s, 1), "tokens_per_s": rates}
    model = load_policy(model_path, dtype=torch.bfloat16).cuda()
    sample = Sample("p", prompt_ids, generation.response_ids, generation.logprobs, (), "stop", "")
    batch = pack_micro_batch([(0, 0)], {0: Group(Prompt("p", (), prompt_ids, "", ""), (sample,), 0)}, [[0.0]])
    with torch.no_grad():
        logprobs = compute_response_logprobs(model, batch.to(torch.device("cuda"))).tolist()
    gap = fmean(abs(a - b) for a, b in zip(logprobs, generation.logprobs, strict=True))
    require(gap < 0.1, f"engine and learner differ by {gap} nats per token")
    speedup = figures["graphs"]["tokens_per_s"][64] / figures["eager"]["tokens_per_s"][64]
    return {**figures, "logprob_gap_nats": round(gap, 4), "graphs_over_eager": round(speedup, 2)}


def check_job(on_gpu: bool, folder: Path) -> Figures:
    """Three steps of the colocated configuration on a small model, then a resume of that run."""
    figures: Figures = {}
    for steps, extra in ((3, []), (4, ["--resume"])):
        command = [sys.executable, "-m", "rluf.train", "--config", JOB_CONFIG, *extra, *JOB_OVERRIDES]
        start_time = time.perf_counter()
        environment = {**os.environ, "RLUF_RUNS": str(folder / "runs")}
        process = subprocess.run([*command, f"algorithm.steps={steps}"], cwd=ROOT, env=environment, check=False,
                                 capture_output=True, text=True)  # fmt: skip
        require(process.returncode == 0, f"{steps} steps: exit {process.returncode}: {process.stderr[-800:]}")
        figures[f"steps{steps}_s"] = round(time.perf_counter() - start_time, 1)
    return figures


@dataclass(frozen=True)
class CheckPart:
    """One check, its time limit in seconds on a GPU, and whether it has a reduced form on CPUs."""

    check: Callable[[bool, Path], Figures]
    limit_s: float
    runs_on_cpu: bool = True


PARTS: Mapping[str, CheckPart] = {
    "device": CheckPart(check_device, 60),
    "attention": CheckPart(check_attention, 60),
    "logits": CheckPart(check_logits, 60),
    "offload": CheckPart(check_offload, 60),
    "ipc": CheckPart(check_ipc, 60),
    "learner": CheckPart(check_learner, 120, runs_on_cpu=False),
    "reward": CheckPart(check_reward, 60),
    "engine": CheckPart(check_engine, 150, runs_on_cpu=False),
    "job": CheckPart(check_job, 240, runs_on_cpu=False),
}


def run_child(name: str, on_gpu: bool, connection: Any) -> None:
    """Run one part and send its verdict and figures; the entry point of its process."""
    # Without this a part on the CPU of a machine with a GPU would not be the reduced form.
    if not on_gpu:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        try:
            connection.send(("pass", PARTS[name].check(on_gpu, Path(folder))))
        except CheckError as failure:
            connection.send(("fail", {"problem": str(failure)}))
        except Exception as error:  # noqa: BLE001  one part must not hide the others
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{frame.filename}:{frame.lineno}"
            connection.send(("error", {"problem": f"{type(error).__name__}: {str(error)[:500]}", "where": where}))


def run_part(name: str, on_gpu: bool) -> Figures:
    """Verdict, figures and seconds of one part, in a process of its own."""
    if not on_gpu and not PARTS[name].runs_on_cpu:
        return {"verdict": "skipped", "problem": "needs a GPU"}
    # CUDA does not survive a fork; without it a fork saves the import of torch in each part.
    context: Any = multiprocessing.get_context("spawn" if on_gpu else "fork")
    here, there = context.Pipe(duplex=False)
    process, start_time = context.Process(target=run_child, args=(name, on_gpu, there)), time.perf_counter()
    process.start()
    there.close()
    limit_s = PARTS[name].limit_s * (1 if on_gpu else CPU_LIMIT_FACTOR)
    verdict, figures = "timeout", dict[str, Any](limit_s=limit_s)
    if here.poll(limit_s):
        with contextlib.suppress(EOFError):
            verdict, figures = "error", {"problem": "the process ended without a result"}
            verdict, figures = here.recv()
    if process.is_alive():
        process.join(5 if verdict != "timeout" else 0)
        process.kill()
    process.join()
    return {"verdict": verdict, "seconds": round(time.perf_counter() - start_time, 1), **figures}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; returns 1 if one of them is neither pass nor skipped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"among {', '.join(PARTS)}; all by default")
    names = parser.parse_args(arguments).parts or list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"unknown part {unknown[0]}; choose among {', '.join(PARTS)}")
    on_gpu = Path("/dev/nvidiactl").exists()
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed  # noqa: F401  imported once, before the parts fork
        import learner_gpu  # noqa: F401
        from transformers import BertForSequenceClassification, LlamaForCausalLM  # noqa: F401
    results = {}
    for name in names:
        results[name] = run_part(name, on_gpu)
        sys.stderr.write(f"{name}: {json.dumps(results[name])}\n")
    sys.stdout.write(json.dumps({"benchmark": "gpu_check", "device": "cuda" if on_gpu else "cpu", "parts": results}))
    sys.stdout.write("\n")
    return int(any(result["verdict"] not in ("pass", "skipped") for result in results.values()))


if __name__ == "__main__":
    raise SystemExit(main())
