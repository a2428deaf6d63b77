"""Choose how a model reads a micro-batch: packed, or one sample per row where packing would be wrong.

Packing separates samples inside the attention function only. A layer that mixes tokens in another way (convolution,
state space, delta rule) would continue from the sample before, and some attention variants do not go through the
function at all. Hence packing is used only where it is proven: a small random model of the same architecture must give
the same log-probabilities and gradients packed, in rows, and one sample at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
from copy import deepcopy
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from rluf.algorithms.packing import PackedBatch, pack_micro_batch
from rluf.algorithms.policy_model import (
    PACKED_ATTENTION,
    compute_response_logprobs,
    has_packed_attention,
    register_packed_attention,
)
from rluf.errors import ModelError
from rluf.models.hub import describe_model_error, list_model_file_errors
from rluf.types import Group, Prompt, Sample
from rluf.utils.files import write_json
from rluf.utils.paths import resolve_cache_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rluf.config.settings import Settings

logger = logging.getLogger(__name__)

BatchLayout = Literal["packed", "rows"]

MAX_LOGPROB_ERROR = 1e-3
"""Mean absolute difference in nats per token from one sample at a time, in float32; rounding gives 1e-6."""
MIN_GRADIENT_COSINE = 0.999
MAX_TRIAL_PARAMETERS = 500_000_000
"""Parameters of the trial model; it has few layers and a vocabulary of TRIAL_VOCABULARY tokens."""
TRIAL_VOCABULARY = 64
TRIAL_WINDOW = 8
"""Attention window of the trial model where the real window is shorter than a row: shorter than the trial's rows."""
SMALL_SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "ffn_dim": 96, "moe_intermediate_size": 48, "head_dim": 16,
    "shared_expert_intermediate_size": 48, "word_embed_proj_dim": 64,
}  # fmt: skip
EXPERT_COUNT_NAMES = ("num_experts", "num_local_experts", "n_routed_experts")
WINDOW_NAMES = ("sliding_window", "attention_chunk_size")
# Whatever a model's code raises on a size that it does not expect.
TRIAL_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError)


@dataclass(frozen=True, slots=True)
class LayoutTrial:
    """The layout chosen for an architecture, and how far packing was from one sample at a time."""

    layout: BatchLayout
    reason: str
    """Why packing is not used; empty if it is."""
    logprob_error: float
    """Mean absolute difference of the chosen layout in nats per token; NaN where it could not be measured."""
    gradient_cosine: float


def choose_batch_layout(settings: Settings, model_folder: Path) -> LayoutTrial:
    """Layout for the policy at `model_folder` and rows of the longest prompt and response.

    The result is stored under run.cache. Raises ModelError if the config cannot be read, or if the algorithm needs a
    packed batch and the model does not support it.
    """
    config = read_model_config(model_folder, settings.model.trust_remote_code)
    max_row_tokens = settings.rollout.max_prompt_tokens + settings.rollout.max_response_tokens
    code_files = sorted(model_folder.glob("*.py")) if settings.model.trust_remote_code else []
    texts = [file.read_text(encoding="utf-8") for file in (model_folder / "config.json", *code_files)]
    key = f"{version('transformers')} {version('torch')} {max_row_tokens} {texts}"
    folder = resolve_cache_folder(settings) / "batch-layouts"
    file = folder / f"{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}.json"
    if file.is_file():
        trial = LayoutTrial(**json.loads(file.read_text(encoding="utf-8")))
    else:
        trial = compare_layouts(config, max_row_tokens, trust_remote_code=settings.model.trust_remote_code)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, asdict(trial))
    if trial.layout == "rows" and settings.algorithm.name == "ppo":
        raise ModelError(
            f"the critic of algorithm.name=ppo reads packed batches only, which {config.model_type} models do not "
            f"support ({trial.reason}); choose another algorithm or model.path"
        )
    return trial


def read_model_config(model_folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    """The transformers config of a model folder. Raises ModelError if transformers cannot read it."""
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            str(model_folder), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except list_model_file_errors() as error:
        raise ModelError(f"the config of {model_folder} cannot be read: {describe_model_error(error)}") from error
    return config


def compare_layouts(config: PretrainedConfig, max_row_tokens: int, *, trust_remote_code: bool = False) -> LayoutTrial:
    """Run the trial for a config; see choose_batch_layout. Takes 1 to 10 seconds.

    Raises ModelError where no layout is exact: a sample depends on the others of its batch even in a row of its own.
    """
    failure = f"a small {config.model_type} model has more than {MAX_TRIAL_PARAMETERS:,} parameters"
    # Narrow models first; some architectures accept only the widths that they have.
    for is_narrow in (True, False):
        try:
            model = _build_trial_model(_make_trial_config(config, max_row_tokens, is_narrow), trust_remote_code)
            if model is not None:
                return _compare_layouts(model)
        except TRIAL_ERRORS as error:
            failure = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    logger.warning("model %s: packing could not be tried (%s); training one sample per row", config.model_type, failure)
    return LayoutTrial("rows", failure, float("nan"), float("nan"))


def _make_trial_config(config: PretrainedConfig, max_row_tokens: int, is_narrow: bool) -> PretrainedConfig:
    trial = deepcopy(config)
    text_config = trial.get_text_config()
    _set_if_present(text_config, {"vocab_size": TRIAL_VOCABULARY, "initializer_range": 0.1})
    # Padding rows of an embedding get no gradient, so no token of the trial may have the pad id.
    _set_if_present(text_config, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    layer_count = _count_trial_layers(text_config)
    if layer_types := getattr(text_config, "layer_types", None):
        _set_if_present(text_config, {"layer_types": list(layer_types[:layer_count])})
    _set_if_present(text_config, {"num_hidden_layers": layer_count})
    for name in WINDOW_NAMES:
        window = getattr(text_config, name, None)
        if window is not None and window < max_row_tokens:
            _set_if_present(text_config, {name: TRIAL_WINDOW})
    if is_narrow:
        _make_narrow(text_config)
    return trial


def _count_trial_layers(text_config: PretrainedConfig) -> int:
    """Layers that contain every kind of layer of the model, at least two."""
    layer_types = getattr(text_config, "layer_types", None)
    if layer_types:
        first_layers = [layer_types.index(layer_type) for layer_type in set(layer_types)]
        return min(len(layer_types), max(2, max(first_layers) + 1))
    periods = [
        int(value) + 1
        for name, value in text_config.to_dict().items()
        if isinstance(value, int) and any(word in name for word in ("period", "interval", "dense_replace", "_step"))
    ]
    return min(int(text_config.num_hidden_layers), max([2, *periods]))


def _make_narrow(text_config: PretrainedConfig) -> None:
    head_count = getattr(text_config, "num_attention_heads", 4)
    kv_count = getattr(text_config, "num_key_value_heads", None) or head_count
    kv_heads = 4 if kv_count == head_count else min(2, kv_count)
    _set_if_present(text_config, {"num_attention_heads": 4, "num_key_value_heads": kv_heads, **SMALL_SIZES})
    for name in EXPERT_COUNT_NAMES:
        _set_if_present(text_config, {name: min(4, getattr(text_config, name, None) or 4)})
    experts_per_token = getattr(text_config, "num_experts_per_tok", None) or 2
    _set_if_present(text_config, {"num_experts_per_tok": min(2, experts_per_token), "n_group": 1, "topk_group": 1})


def _set_if_present(config: PretrainedConfig, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if getattr(config, name, None) is not None:
            with contextlib.suppress(AttributeError):  # a value that the config computes from others
                setattr(config, name, value)


def _build_trial_model(config: PretrainedConfig, trust_remote_code: bool) -> nn.Module | None:
    """A random float32 model with eager attention; None if it would be too large."""
    from transformers import AutoModelForCausalLM

    options = {"attn_implementation": "eager", "trust_remote_code": trust_remote_code, "dtype": torch.float32}
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(deepcopy(config), **options).parameters()
    if sum(parameter.numel() for parameter in parameters) > MAX_TRIAL_PARAMETERS:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model: nn.Module = AutoModelForCausalLM.from_config(config, **options).eval()
    return model


def _compare_layouts(model: Any) -> LayoutTrial:
    """Compare both layouts with one sample at a time. Raises ModelError if one sample per row is not exact."""
    groups = _build_trial_groups()
    pairs = [(group, sample) for group in groups for sample in range(len(groups[group].samples))]

    def pack(batch_pairs: list[tuple[int, int]]) -> PackedBatch:
        return pack_micro_batch(batch_pairs, groups, [[1.0] * 2] * len(groups))

    single = _measure(model, [pack([pair]) for pair in pairs])
    batch = pack(pairs)
    # Rows first: if a sample depends on its neighbors even there, no layout is exact.
    row_error, row_cosine = _compare(single, _measure(model, [batch]))
    if math.isnan(row_error + row_cosine):
        raise ArithmeticError("log-probabilities or gradients are not numbers")
    if row_error > MAX_LOGPROB_ERROR or row_cosine < MIN_GRADIENT_COSINE:
        raise ModelError(
            f"{model.config.model_type} models with this config cannot be trained: the log-probabilities of a sample "
            f"depend on the other samples of its batch, by {row_error:.2g} nats per token; choose another model.path"
        )
    try:
        register_packed_attention()
        model.set_attn_implementation(PACKED_ATTENTION)
        if not has_packed_attention(model):
            raise ModelError(f"{type(model).__name__} has its own attention")
        error, cosine = _compare(single, _measure(model, [batch]))
        reason = f"packing changes its log-probabilities by {error:.2g} nats per token"
    except (*TRIAL_ERRORS, ModelError) as failure:
        error, cosine, reason = float("inf"), 0.0, (str(failure).splitlines() or [type(failure).__name__])[0]
    if error <= MAX_LOGPROB_ERROR and cosine >= MIN_GRADIENT_COSINE:
        return LayoutTrial("packed", "", error, cosine)
    return LayoutTrial("rows", reason, row_error, row_cosine)


def _build_trial_groups() -> dict[int, Group]:
    """Two prompts of two responses each, of different lengths, all longer than TRIAL_WINDOW with their prompt."""
    lengths = ((12, (5, 4)), (17, (9, 3)))
    generator = torch.Generator().manual_seed(0)
    groups = {}
    for index, (prompt_length, response_lengths) in enumerate(lengths):
        prompt_ids = _sample_ids(prompt_length, generator)
        samples = tuple(
            Sample(str(index), prompt_ids, _sample_ids(length, generator), (-1.0,) * length, ((0, 0),), "stop", "")
            for length in response_lengths
        )
        groups[index] = Group(Prompt(str(index), (), prompt_ids, "", "train"), samples, 0)
    return groups


def _sample_ids(count: int, generator: torch.Generator) -> tuple[int, ...]:
    return tuple(torch.randint(3, TRIAL_VOCABULARY, (count,), generator=generator).tolist())


def _measure(model: nn.Module, batches: list[PackedBatch]) -> tuple[Tensor, Tensor]:
    """Log-probabilities [K] of all response tokens, and the gradient of their weighted sum as one vector."""
    model.zero_grad()
    logprobs = torch.cat([compute_response_logprobs(model, batch) for batch in batches])
    torch.dot(logprobs, torch.linspace(-1.0, 1.0, len(logprobs))).backward()
    gradients = [
        torch.zeros(parameter.numel()) if parameter.grad is None else parameter.grad.flatten().float()
        for parameter in model.parameters()
    ]
    return logprobs.detach(), torch.cat(gradients)


def _compare(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Mean absolute difference of log-probabilities, and cosine of the gradients."""
    error = (first[0] - second[0]).abs().mean().item()
    return error, torch.cosine_similarity(first[1].double(), second[1].double(), dim=0).item()
