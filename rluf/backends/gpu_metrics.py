"""GPU memory and model FLOPs utilization (MFU) of a learner or reward actor."""

from __future__ import annotations

import torch

PEAK_FLOPS = {
    "H200 NVL": 835e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12, "B200": 2250e12,
}  # fmt: skip
"""Dense bfloat16 FLOPs per second by GPU, from the vendor's data sheets; the first name that fits counts."""


def count_flops_per_token(parameter_count: float, *, has_reference: bool, is_lora: bool) -> float:
    """FLOPs of one training token: 2 per parameter each for forward pass, activation gradients and weight gradients.

    A reference policy adds a forward pass. With LoRA frozen weights have no weight gradients. As usual for MFU,
    recomputed activations do not count; attention over the sequence is left out, so long sequences read low. Source:
    Chowdhery et al., arXiv 2204.02311, appendix B.
    """
    return parameter_count * (2.0 + 2.0 + (0.0 if is_lora else 2.0) + (2.0 if has_reference else 0.0))


def compute_mfu(flops_per_token: float, tokens_per_s: float, gpu_count: int, device_name: str) -> float | None:
    """Share of the peak FLOPs of `gpu_count` GPUs that training at `tokens_per_s` uses; None for unknown GPUs."""
    peak_flops = next((flops for gpu_name, flops in PEAK_FLOPS.items() if gpu_name in device_name), None)
    return None if peak_flops is None else flops_per_token * tokens_per_s / (gpu_count * peak_flops)


def measure_gpu(device: torch.device, flops_per_token: float, tokens_per_s: float, gpu_count: int) -> dict[str, float]:
    """`gpu_allocated_gib` and `gpu_peak_gib` of this process, and `learner_mfu` of all learners on GPUs."""
    mfu = compute_mfu(flops_per_token, tokens_per_s, gpu_count, torch.cuda.get_device_name(device))
    return {**read_gpu_memory(), **({} if mfu is None else {"learner_mfu": mfu})}


def read_gpu_memory() -> dict[str, float]:
    """`gpu_allocated_gib` now and `gpu_peak_gib` since the start of this process, of its GPU."""
    gib = 2.0**30
    return {
        "gpu_allocated_gib": torch.cuda.memory_allocated() / gib,
        "gpu_peak_gib": torch.cuda.max_memory_allocated() / gib,
    }
