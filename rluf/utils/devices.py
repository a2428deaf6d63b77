"""Which GPUs the process of an actor or worker may use."""

from __future__ import annotations

NO_GPU_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
"""Hides every GPU, also from DeepSpeed, which otherwise takes the first one that it sees."""
ASSIGNED_GPU_ENVIRONMENT = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "0"}
"""Makes Ray show a process the GPUs that it reserved for it, as cuda:0 and so on. Where a cluster sets this variable to
1, every process sees all GPUs of its node, and all ranks would take the first one."""


def build_device_environment(gpu_count: float) -> dict[str, str]:
    """Environment variables for a process that reserves `gpu_count` GPUs of Ray, which may be a fraction or 0."""
    # Ray 2.60 leaves CUDA_VISIBLE_DEVICES as it is for a process with 0 GPUs: such a process sees all of them.
    return dict(ASSIGNED_GPU_ENVIRONMENT if gpu_count > 0 else NO_GPU_ENVIRONMENT)
