"""FLOPs per token and MFU, by hand; no GPU metrics where a learner runs on the CPU."""

from __future__ import annotations

import pytest
import torch

from rluf.backends.gpu_metrics import compute_mfu, count_flops_per_token, measure_gpu, read_gpu_memory


@pytest.mark.parametrize(
    ("has_reference", "is_lora", "expected"), [(False, False, 6), (True, False, 8), (False, True, 4), (True, True, 6)]
)
def test_flops_per_token_and_parameter(has_reference: bool, is_lora: bool, expected: float) -> None:
    assert count_flops_per_token(1e9, has_reference=has_reference, is_lora=is_lora) == expected * 1e9


@pytest.mark.parametrize(
    ("device_name", "gpu_count", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 1, 8e9 * 8 * 4000 / 989e12),
        ("NVIDIA H200", 8, 8e9 * 8 * 4000 / (8 * 989e12)),
        ("NVIDIA H100 PCIe", 1, 8e9 * 8 * 4000 / 756e12),
        ("NVIDIA H100 NVL", 2, 8e9 * 8 * 4000 / (2 * 835e12)),
        ("NVIDIA H200 NVL", 1, 8e9 * 8 * 4000 / 835e12),
        ("NVIDIA A100-SXM4-80GB", 4, 8e9 * 8 * 4000 / (4 * 312e12)),
        ("NVIDIA GeForce GTX 1080", 1, None),
        ("cpu", 1, None),
    ],
)
def test_mfu_is_the_share_of_the_peak_of_all_gpus(device_name: str, gpu_count: int, expected: float | None) -> None:
    flops_per_token = count_flops_per_token(8e9, has_reference=True, is_lora=False)
    mfu = compute_mfu(flops_per_token, 4000.0, gpu_count, device_name)
    assert mfu == (None if expected is None else pytest.approx(expected))


def test_a_gpu_has_three_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3 << 30)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5 << 30)
    assert read_gpu_memory() == {"gpu_allocated_gib": 3.0, "gpu_peak_gib": 5.0}
    metrics = measure_gpu(torch.device("cuda", 0), 8e9, 989e12 / 8e9, 2)
    assert metrics == {"gpu_allocated_gib": 3.0, "gpu_peak_gib": 5.0, "learner_mfu": 0.5}
