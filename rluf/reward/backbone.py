"""Backbone of a reward model: load with a one-logit head, freeze layers, and cache the output of frozen layers.

The hidden states after the frozen layers never change, so running those layers again in every epoch (and for every dev
evaluation) is wasted work. FrozenPrefix caches their output for every training row and replays it. The cache takes rows
x tokens x hidden size x 2 bytes (bfloat16).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from rluf.errors import ModelError
from rluf.models.hub import describe_model_error, list_model_file_errors
from rluf.models.lora import add_lora_adapters
from rluf.reward.text import EncodedItem, TextEncoder, plan_token_batches
from rluf.types import Message, ScoringItem

logger = logging.getLogger(__name__)

HEAD_MODULE_NAMES = ("score", "classifier")
"""Names of the linear head in Hugging Face models for sequence classification."""

DROPOUT_CONFIG_KEYS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "attention_dropout")
"""Config keys under which Hugging Face backbones store their dropout rates."""


def load_classifier(
    folder: Path,
    *,
    require_all_weights: bool,
    device: str = "cpu",
    dropout: float | None = None,
    seed: int = 0,
    layer_count: int = 0,
    head_count: int | None = 1,
) -> PreTrainedModel:
    """Load a model folder as AutoModelForSequenceClassification with `head_count` logits, in float32.

    `head_count` None keeps the number of logits in the folder's config.

    `layer_count` retains only the lowest layers (0 retains all); middle layers are often more informative than the
    last ones. With `require_all_weights` every weight must be in the folder; otherwise a missing head is initialized
    from `seed`. `dropout` overrides the backbone's own rates. Raises ModelError if the folder has no such model.
    """
    from transformers.utils import logging as hf_logging

    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        if head_count is not None:
            config.num_labels = head_count
        _truncate_layers(config, layer_count)
        if dropout is not None:
            for key in DROPOUT_CONFIG_KEYS:
                if hasattr(config, key):
                    setattr(config, key, dropout)
        # A missing head is initialized by the global generator: fork it, so that loading changes no other random draw.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                str(folder),
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                attn_implementation="eager" if device == "cpu" else None,
                output_loading_info=True,
            )
    except list_model_file_errors() as error:
        raise ModelError(
            f"{folder} does not contain a sequence classification model: {describe_model_error(error)}; check the path"
        ) from error
    finally:
        hf_logging.set_verbosity(verbosity)
    if require_all_weights and info["missing_keys"]:
        raise ModelError(
            f"{folder} lacks the weights {', '.join(sorted(info['missing_keys'])[:4])}; it is a backbone, not a "
            "trained reward model; train one with python -m rluf.reward"
        )
    classifier: PreTrainedModel = model
    return classifier.to(device)


def _truncate_layers(config: Any, layer_count: int) -> None:
    """Limit the config to the lowest `layer_count` layers. Raises ModelError if the model has fewer."""
    if not layer_count:
        return
    if layer_count > config.num_hidden_layers:
        raise ModelError(f"layers={layer_count} exceeds the {config.num_hidden_layers} layers of the model; lower it")
    config.num_hidden_layers = layer_count
    # Hybrid decoders list the attention type of every layer and refuse a list of another length.
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layer_count]


def build_text_encoder(
    model: PreTrainedModel,
    folder: Path,
    max_tokens: int,
    *,
    read_at_next_turn: bool = False,
    is_single_model: bool = True,
    response_only: bool = False,
    mark_truncated: bool = False,
    locate_responses: bool = False,
) -> TextEncoder:
    """Build the text encoder of a model folder and set the model's pad token id, by which decoders pool.

    In an ensemble (`is_single_model` false), read_at_next_turn applies to the decoders only; encoders ignore it, as
    they ignore `locate_responses`.
    """
    from rluf.models.hub import load_tokenizer

    position_limit = int(getattr(model.config, "max_position_embeddings", max_tokens))
    tokenizer = load_tokenizer(folder)
    read_at_next_turn = read_at_next_turn and (is_single_model or tokenizer.cls_token_id is None)
    encoder = TextEncoder(
        tokenizer,
        min(max_tokens, position_limit),
        read_at_next_turn=read_at_next_turn,
        response_only=response_only,
        mark_truncated=mark_truncated,
        locate_responses=locate_responses,
        embedding_rows=(embedding_rows := model.get_input_embeddings().weight.shape[0]),
    )
    largest_id = max((*(i for row in encoder.encode(build_warmup_items()) for i in row.token_ids), encoder.pad_id))
    if largest_id >= embedding_rows:
        token = tokenizer.convert_ids_to_tokens(largest_id)
        raise ModelError(
            f"{folder} reads conversations with token id {largest_id} ({token!r}), but its model has {embedding_rows} "
            f"rows; call model.resize_token_embeddings({len(tokenizer)}) and save the model again"
        )
    model.config.pad_token_id = encoder.pad_id
    return encoder


def get_layer_list(model: nn.Module) -> nn.ModuleList:
    """Layers of the backbone, lowest first: its longest ModuleList. Raises ModelError if there is none."""
    module_lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    if not module_lists:
        raise ModelError(f"{type(model).__name__} has no list of layers, so frozen_share must be 0")
    return max(module_lists, key=len)


def freeze_lowest_layers(model: PreTrainedModel, layer_share: float) -> int:
    """Freeze the embeddings and a share of the layers, lowest first, rounded down; 0 freezes nothing.

    Returns the number of frozen layers.
    """
    if layer_share <= 0:
        return 0
    all_layers = get_layer_list(model)
    frozen_count = int(layer_share * len(all_layers))
    frozen_modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    # Encoders wrap their embedding tables in a module with a LayerNorm of its own, which must be frozen as well.
    embeddings = getattr(model.base_model, "embeddings", None)
    if isinstance(embeddings, nn.Module):
        frozen_modules.append(embeddings)
    for module in [*frozen_modules, *all_layers[:frozen_count]]:
        module.requires_grad_(requires_grad=False)
    return frozen_count


def get_linear_head(model: nn.Module) -> nn.Linear:
    """The model's linear head, one row per logit. Raises ModelError when its head is another kind of module."""
    for name in HEAD_MODULE_NAMES:
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear):
            return head
    raise ModelError(
        f"{type(model).__name__} has no linear head, so no probe can be fitted on it; set linear_probe=false"
    )


def find_final_norm_or_pooler(model: PreTrainedModel) -> nn.Module | None:
    """The module between the last layer and the head: a decoder's last norm or an encoder's pooler; None if neither."""
    for name in ("norm", "pooler"):
        module = getattr(model.base_model, name, None)
        if isinstance(module, nn.Module):
            return module
    return None


def add_layer_adapters(model: PreTrainedModel, rank: int, frozen_layers: int, dropout: float) -> None:
    """Add LoRA adapters to the linear layers above the lowest `frozen_layers`; only these and the head train."""
    head, module_names = get_linear_head(model), {id(module): name for name, module in model.named_modules()}
    target_modules = [
        f"{module_names[id(layer)]}.{inner_name}"
        for layer in list(get_layer_list(model))[frozen_layers:]
        for inner_name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]
    add_lora_adapters(model, rank, target_modules=target_modules, dropout=dropout)
    # Adding adapters freezes all other weights; the new head has to train.
    head.requires_grad_(requires_grad=True)


def enable_fast_cpu_matmul() -> None:
    """Run the float32 matrix products of this process through oneDNN: twice as fast as MKL on AMD CPUs.

    On CPUs with AMX tiles oneDNN would also round the inputs to bfloat16, so the default is left unchanged there.
    """
    if torch.backends.mkldnn.is_available() and not torch.cpu.get_capabilities().get("amx_tile", False):
        torch.set_float32_matmul_precision("medium")


def build_warmup_items() -> list[ScoringItem]:
    """Two short items, one with an empty response, for the first forward pass of a freshly loaded model."""
    question: list[Message] = [{"role": "user", "content": "How are you?"}]
    return [ScoringItem(question, "Well, thank you."), ScoringItem(question, "")]


MAX_CACHE_BYTES = 2 << 30
"""Largest cache; above it the frozen layers run in every epoch."""


class FrozenPrefix:
    """Replay the cached output of a model's lowest `layer_count` layers for the rows of a batch."""

    def __init__(self, model: PreTrainedModel, layer_count: int) -> None:
        self.model = model
        self.all_layers = get_layer_list(model)
        self.layer_count = layer_count
        self.batch_states: torch.Tensor | None = None
        self._returns_tuple = False

    @classmethod
    def is_worthwhile(cls, model: PreTrainedModel, layer_count: int, token_count: int) -> bool:
        """Whether any layer is frozen and the hidden states of `token_count` tokens fit in MAX_CACHE_BYTES."""
        return layer_count > 0 and token_count * int(model.config.hidden_size) * 2 <= MAX_CACHE_BYTES

    @torch.no_grad()
    def compute_hidden_states(
        self, encoder: TextEncoder, rows: Sequence[EncodedItem], batch_tokens: int
    ) -> list[torch.Tensor]:
        """Hidden states [T, H] of each row after the frozen layers, without dropout, on the CPU in bfloat16."""
        states_by_row: list[torch.Tensor] = [torch.empty(0)] * len(rows)
        device = next(self.model.parameters()).device
        captured_states: list[torch.Tensor] = []

        def capture_output(_module: nn.Module, _args: Any, output: Any) -> None:
            self._returns_tuple = isinstance(output, tuple)
            captured_states.append(output[0] if self._returns_tuple else output)

        hook = self.all_layers[self.layer_count - 1].register_forward_hook(capture_output)
        was_training = self.model.training
        self.model.eval()
        try:
            # The layers above are bypassed: only the frozen part of the model is computed here.
            with _bypass_layers(self.all_layers[self.layer_count :]):
                for batch in plan_token_batches([len(row) for row in rows], batch_tokens):
                    inputs = encoder.collate([rows[index] for index in batch])
                    self.model(**{name: tensor.to(device) for name, tensor in inputs.items()})
                    batch_states = captured_states.pop().to("cpu", torch.bfloat16)
                    for batch_index, row_index in enumerate(batch):
                        # Cloned, so that a row does not keep the padded tensor of its whole batch in memory.
                        states_by_row[row_index] = batch_states[batch_index, : len(rows[row_index])].clone()
        finally:
            hook.remove()
            self.model.train(was_training)
        return states_by_row

    def load_batch(self, hidden_states: Sequence[torch.Tensor]) -> None:
        """Set the batch to replay: hidden states of its rows, padded here on the right to [B, T, H]."""
        parameter = next(self.model.parameters())
        padded_states = nn.utils.rnn.pad_sequence(list(hidden_states), batch_first=True)
        self.batch_states = padded_states.to(parameter.device, parameter.dtype)

    @contextmanager
    def replay_batch(self) -> Iterator[None]:
        """Within the context, the frozen layers return the batch last passed to `load_batch`."""

        def replay_batch_states(_hidden: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
            return (self.batch_states,) if self._returns_tuple else self.batch_states

        # Only forward methods are replaced: parameters and module names stay as DeepSpeed has registered them.
        last_frozen_layer = self.all_layers[self.layer_count - 1]
        with (
            _bypass_layers(self.all_layers[: self.layer_count - 1]),
            _override_forward(last_frozen_layer, replay_batch_states),
        ):
            yield


@contextmanager
def _bypass_layers(layers: Sequence[nn.Module] | nn.ModuleList) -> Iterator[None]:
    """Within the context, these layers return their input."""

    def pass_input(hidden: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return hidden

    previous_forwards = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = pass_input
    try:
        yield
    finally:
        for layer, forward in zip(layers, previous_forwards, strict=True):
            _restore_forward(layer, forward)


@contextmanager
def _override_forward(layer: nn.Module, forward: Any) -> Iterator[None]:
    previous_forward = layer.__dict__.get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        _restore_forward(layer, previous_forward)


def _restore_forward(layer: nn.Module, forward: Any) -> None:
    # Without an override of its own, the instance attribute is deleted, so that the class's method is found again.
    if forward is None:
        del layer.forward
    else:
        layer.forward = forward
