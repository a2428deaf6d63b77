"""Dropout on a CPU with random bits in place of random numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_MASK_BITS = 16
"""Random bits per element: the rate is rounded to a multiple of 2**-16."""


class CpuDropout(TorchFunctionMode):
    """While active, `torch.nn.functional.dropout` takes its masks of CPU tensors from 16 random bits per element.

    Torch draws a whole random number per element, which slows the training of small encoders (benchmarks/reward.py).
    The bits come from torch's global generator, so a seed fixes them. Outputs are scaled by the rounded rate.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run `func`, dropout as described above."""
        if func is functional.dropout:
            return _drop_out(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _drop_out(values: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    dropped_codes = round(p * 2**_MASK_BITS)
    if not training or values.device.type != "cpu" or not 0 < dropped_codes < 2**_MASK_BITS:
        return functional.dropout(values, p, training, inplace)
    element_count = values.numel()
    words = torch.empty(-(-element_count * _MASK_BITS // 64), dtype=torch.int64).random_(-(2**63), None)
    codes = words.view(torch.int16)[:element_count].view(values.shape)
    mask = (codes >= dropped_codes - 2 ** (_MASK_BITS - 1)).to(values.dtype)
    mask *= 2**_MASK_BITS / (2**_MASK_BITS - dropped_codes)
    return values.mul_(mask) if inplace else values * mask
