"""Check that the policy can be trained before data and reward models are built; all of it takes seconds.

`check_policy` needs no engine and reads no weights. `compare_engine_and_learner` starts one engine and the learners.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.connect import ray_connection
from rluf.algorithms.batch_layout import EXPERT_COUNT_NAMES, choose_batch_layout, read_model_config
from rluf.artifacts import check_inputs
from rluf.backends.vllm.architectures import find_engine_fault, find_engine_problems
from rluf.backends.weight_transfer.base import WeightManifest, has_tied_embeddings, read_checkpoint_shapes
from rluf.backends.weight_transfer.lora import read_linear_shapes
from rluf.config.derived import BYTES_PER_GIB, estimate_host_bytes
from rluf.errors import ModelError, ResourceError, SettingsError
from rluf.models.chat import RejectedConversationError, check_rendered_texts, render_prompt
from rluf.models.embedded import hide_progress_bars
from rluf.models.hub import (
    check_causal_lm,
    describe_model_error,
    list_model_file_errors,
    load_tokenizer,
    resolve_policy,
)
from rluf.models.lora import add_lora_adapters, find_lora_adapters, get_checkpoint_name
from rluf.models.turn_end import find_turn_end_ids, list_stop_token_ids, read_stop_token_ids
from rluf.tracking.console import setup_logging
from rluf.train.actor_calls import put_object, switch_gpu_phase
from rluf.train.actor_supervisor import ActorSupervisor
from rluf.train.weight_sync import WeightSync
from rluf.types import Message, Prompt
from rluf.utils.event_loop import run_coroutine

if TYPE_CHECKING:
    from rluf.config.settings import Settings

logger = logging.getLogger(__name__)

CHECK_PROMPTS = ("What is the capital of France?", "Write one sentence about the sea.")
MAX_NAMED_WEIGHTS = 4


def check_policy(settings: Settings, model_path: Path) -> None:
    """Check engine support, weights, batch layout, token ids, chat template, window and memory; log each result.

    Raises ModelError, SettingsError or ResourceError on the first that fails, with what to do.
    """
    check_causal_lm(model_path)
    checks: dict[str, Callable[[Settings, Path], str]] = {
        "engine": check_engine_support,
        "context window": check_context_window,
        "tensor parallel": check_tensor_parallel,
        "weight names": check_weight_names,
        "expert weights": check_expert_weights,
        "token ids": check_token_ids,
        "chat template": check_chat_template,
        "turn end": check_turn_end,
        "memory": check_memory,
        "batch layout": describe_batch_layout,
    }
    for name, check in checks.items():
        logger.info("check: %s: %s", name, check(settings, model_path))


def check_training(settings: Settings) -> None:
    """All checks of `python -m rluf.train --check`: the policy's, then one engine against the learners."""
    setup_logging()
    check_inputs(settings)
    model_path = resolve_policy(settings)
    check_policy(settings, model_path)
    with ray_connection():
        gaps = run_coroutine(compare_engine_and_learner(settings, model_path))
    logger.info("check: passed, largest gap of engine and learner %.2g nats per token", max(gaps))


def check_engine_support(settings: Settings, model_path: Path) -> str:
    """The installed vLLM must have a model for the architecture, or be able to run that of transformers."""
    config = read_model_config(model_path, settings.model.trust_remote_code)
    architecture = (config.architectures or [""])[0]
    fault = find_engine_fault(architecture, on_gpu=settings.policy_gpus > 0, has_tied_head=has_tied_embeddings(config))
    if fault is not None:
        raise ModelError(
            f"{model_path} cannot be trained: the installed vLLM runs {architecture}, but {fault}; use another model"
        )
    problem = find_engine_problems([architecture])[architecture]
    if problem == "missing":
        raise ModelError(
            f"{model_path} cannot be trained: the installed vLLM has no model for {architecture} and cannot run that "
            "of transformers; use another model"
        )
    # On a machine without GPUs some of vLLM's models for GPUs cannot be imported.
    if problem and not settings.policy_gpus:
        raise ModelError(f"vLLM cannot import its model for {architecture}: {problem}; install what is missing")
    return f"not known whether vLLM can run {architecture}" if problem is None else f"vLLM can run {architecture}"


def check_context_window(settings: Settings, model_path: Path) -> str:
    """Prompt and response must fit into the positions that the model was built for."""
    config = read_model_config(model_path, settings.model.trust_remote_code).get_text_config()
    rollout, positions = settings.rollout, getattr(config, "max_position_embeddings", None)
    row_tokens = rollout.max_prompt_tokens + rollout.max_response_tokens
    # One more, since the engine samples a token behind a row whose log-probabilities it computes.
    if positions is not None and row_tokens + 1 > positions:
        raise SettingsError(
            f"rollout.max_prompt_tokens={rollout.max_prompt_tokens} and rollout.max_response_tokens="
            f"{rollout.max_response_tokens} need {row_tokens + 1} positions, but {model_path} has {positions} "
            "(max_position_embeddings); lower them"
        )
    short_rows = _find_short_rope_limit(config)
    if short_rows is not None and row_tokens + 1 > short_rows:
        raise SettingsError(
            f"rollout.max_prompt_tokens={rollout.max_prompt_tokens} and rollout.max_response_tokens="
            f"{rollout.max_response_tokens} need {row_tokens + 1} positions, but above {short_rows} "
            f"(original_max_position_embeddings) {model_path} changes its position encoding, for short rows too as "
            "soon as a batch has one long row; lower them"
        )
    return f"{row_tokens} tokens in {positions or 'unlimited'} positions"


def _find_short_rope_limit(config: Any) -> int | None:
    """Rows up to this length have one rotary encoding, whatever else is in their batch; None without such a limit."""
    rope = getattr(config, "rope_parameters", None) or {}
    # One dict, or one for each type of layer.
    entries = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    limits = [entry["original_max_position_embeddings"] for entry in entries if entry.get("rope_type") == "longrope"]
    return min(map(int, limits), default=None)


def check_tensor_parallel(settings: Settings, model_path: Path) -> str:
    """The attention heads must divide among the GPUs of an engine, and its key-value heads among them, or they them."""
    config = read_model_config(model_path, settings.model.trust_remote_code).get_text_config()
    gpu_count, heads = settings.tensor_parallel, int(getattr(config, "num_attention_heads", 0) or 0)
    kv_heads = int(getattr(config, "num_key_value_heads", 0) or heads)

    def can_divide_heads(count: int) -> bool:
        # vLLM copies a key-value head to several GPUs, all equally often.
        return heads % count == 0 and (not kv_heads or kv_heads % count == 0 or count % kv_heads == 0)

    if not can_divide_heads(gpu_count):
        divisors = ", ".join(str(count) for count in range(1, gpu_count) if can_divide_heads(count))
        raise SettingsError(
            f"cluster.gpus_per_engine={gpu_count} cannot divide the {heads} attention heads ({kv_heads} key-value "
            f"heads) of {model_path}; set it to one of {divisors}"
        )
    return f"{heads} attention heads on {gpu_count} GPU(s) per engine"


def check_weight_names(settings: Settings, model_path: Path) -> str:
    """The learner must load every weight, and send exactly the tensors of the checkpoint that the engine reads."""
    from transformers import AutoModelForCausalLM

    read_checkpoint_shapes(model_path)  # names a damaged file, which transformers does not
    try:
        with hide_progress_bars():
            model, loading_info = AutoModelForCausalLM.from_pretrained(
                str(model_path),
                device_map="meta",
                output_loading_info=True,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=settings.model.trust_remote_code,
            )
    except list_model_file_errors() as error:
        raise ModelError(f"transformers cannot load {model_path}: {describe_model_error(error)}") from error
    if missing_names := sorted(loading_info["missing_keys"]):
        raise ModelError(
            f"{model_path} lacks {_name_some(missing_names)}, which would be random; download or save the model again"
        )
    experts = [name for name, parameter in model.named_parameters() if ".experts." in name and parameter.ndim > 2]
    if settings.learner.lora_rank and experts:
        raise SettingsError(
            f"learner.lora_rank={settings.learner.lora_rank}: adapters on fused experts ({experts[0]}) cannot be "
            "merged into weights that an engine reads; set learner.lora_rank=0"
        )
    sent_shapes = dict(_iter_sent_shapes(model))
    config = read_model_config(model_path, settings.model.trust_remote_code)
    expected_shapes = WeightManifest(model_path, has_tied_embeddings(config)).expected_shapes
    not_sent, not_expected = expected_shapes.keys() - sent_shapes.keys(), sent_shapes.keys() - expected_shapes.keys()
    misshapen = [
        name for name in expected_shapes.keys() & sent_shapes.keys() if expected_shapes[name] != sent_shapes[name]
    ]
    if not_expected and not_expected <= set(getattr(model, "_tied_weights_keys", None) or ()):
        raise ModelError(
            f"{model_path} cannot be trained: its output head {min(not_expected)} is tied to a weight that its code "
            "does not name; save it with a head of its own (tie_word_embeddings=False) or use another model"
        )
    for names, problem in (
        (not_sent, "the checkpoint has weights that the learner does not send"),
        (not_expected, "the learner sends weights that the checkpoint does not have"),
        (misshapen, "the learner sends weights in another shape"),
    ):
        if names:
            raise ModelError(
                f"{model_path} cannot be trained with this release of transformers: {problem}: "
                f"{_name_some(sorted(names))}; load and save it with transformers once, or use another model"
            )
    if settings.learner.lora_rank:
        _check_adapters(model, settings, model_path)
    return f"{len(expected_shapes)} tensors are equal in learner and checkpoint"


def _check_adapters(model: Any, settings: Settings, model_path: Path) -> None:
    """Raise SettingsError if adapters cannot be added to the model, merged into its weights, or sent as they are."""
    problem = ""
    try:
        adapters = find_lora_adapters(add_lora_adapters(model, settings.learner.lora_rank))
    except (ValueError, NotImplementedError) as error:
        adapters, problem = {}, (str(error).splitlines() or [type(error).__name__])[0]
    weights = {get_checkpoint_name(name): weight for name, weight in model.named_parameters()}
    for name, adapter in adapters.items():
        shape = (adapter.lora_b.shape[0], adapter.lora_a.shape[1])
        # GPT-2's layers have their weights transposed.
        if shape != tuple(weights[name].shape) or "Conv1D" in type(_get_base_layer(model, name)).__name__:
            problem = f"{name} is not a weight of a linear layer [out, in]"
            break
    if problem:
        raise SettingsError(
            f"learner.lora_rank={settings.learner.lora_rank}: adapters do not fit {model_path}: {problem}; set "
            "learner.lora_rank=0"
        )
    different_names = sorted(read_linear_shapes(model_path).keys() ^ adapters.keys())
    if settings.weight_sync.transport == "lora" and different_names:
        raise SettingsError(
            f"weight_sync.transport=lora: engines expect an adapter for each matrix of {model_path} but embeddings and "
            f"the output head, and the learner's are for others ({_name_some(different_names)}); set "
            "weight_sync.transport=shm"
        )


def _get_base_layer(model: Any, weight_name: str) -> Any:
    layer = model.get_submodule(weight_name.removesuffix(".weight"))
    return getattr(layer, "base_layer", layer)


def check_expert_weights(settings: Settings, model_path: Path) -> str:
    """Engines on CPUs cannot take new weights of expert layers, which they repack at the first load."""
    config = read_model_config(model_path, settings.model.trust_remote_code).get_text_config()
    expert_count = max((getattr(config, name, None) or 0 for name in EXPERT_COUNT_NAMES), default=0)
    if expert_count > 1 and not settings.policy_gpus:
        raise SettingsError(
            f"{model_path} has {expert_count} experts per layer, and vLLM's CPU engine cannot load new weights of "
            "experts; train it on GPUs (cluster.gpus_per_engine), or use a model without experts"
        )
    return f"{expert_count} experts per layer" if expert_count else "no experts"


def _iter_sent_shapes(model: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes that rluf.backends.deepspeed.gather_checkpoint_tensors sends."""
    from transformers.core_model_loading import revert_weight_conversion

    saved_names = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved_names}
    for tensors in (*({name: p} for name, p in model.named_parameters(remove_duplicate=False)), buffers):
        for name, tensor in revert_weight_conversion(model, tensors).items():
            yield name, tuple(tensor.shape)


def _name_some(names: list[str]) -> str:
    return (
        f"{len(names)} weights ({', '.join(names[:MAX_NAMED_WEIGHTS])}{', ...' if names[MAX_NAMED_WEIGHTS:] else ''})"
    )


def check_token_ids(settings: Settings, model_path: Path) -> str:
    """Every id of the tokenizer must be a row of the embedding; more rows than ids are fine."""
    tokenizer = load_tokenizer(model_path, trust_remote_code=settings.model.trust_remote_code)
    config = read_model_config(model_path, settings.model.trust_remote_code).get_text_config()
    row_count, largest_id = int(config.vocab_size), max(tokenizer.get_vocab().values())
    if largest_id >= row_count:
        token = tokenizer.convert_ids_to_tokens(largest_id)
        raise ModelError(
            f"the tokenizer of {model_path} has ids up to {largest_id} ({token!r}), but the model's embedding has "
            f"{row_count} rows; call model.resize_token_embeddings({largest_id + 1}) and save the model again"
        )
    return f"ids up to {largest_id}, {row_count} rows"


def check_chat_template(settings: Settings, model_path: Path) -> str:
    """A conversation must be rendered whole and in order, and a question fit into rollout.max_prompt_tokens."""
    tokenizer = load_tokenizer(model_path, trust_remote_code=settings.model.trust_remote_code)
    token_count = len(render_prompt(tokenizer, [Message(role="user", content="Hi")]))
    max_tokens = settings.rollout.max_prompt_tokens
    if token_count > max_tokens:
        raise SettingsError(
            f"the chat template of {model_path} turns a message of one word into {token_count} tokens, more than "
            f"rollout.max_prompt_tokens={max_tokens}; raise it"
        )
    check_rendered_texts(tokenizer)
    return f"a message of one word has {token_count} tokens"


def check_turn_end(settings: Settings, model_path: Path) -> str:
    """The token that ends the assistant's turn must be a stop id, or every response runs to the limit."""
    tokenizer = load_tokenizer(model_path, trust_remote_code=settings.model.trust_remote_code)
    stop_ids = [
        *read_stop_token_ids(model_path, tokenizer.eos_token_id),
        *list_stop_token_ids(tokenizer, settings.rollout.stop),
    ]
    try:
        turn_end_ids = find_turn_end_ids(tokenizer)
    except RejectedConversationError:
        return "not checked: the chat template rejects a conversation with a response"
    if not turn_end_ids:
        return "none in the chat template"
    if not set(turn_end_ids).intersection(stop_ids):
        token = str(tokenizer.convert_ids_to_tokens(turn_end_ids[0]))
        raise ModelError(
            f"the chat template of {model_path} ends a turn with {token!r} (id {turn_end_ids[0]}), which is no stop "
            f"token ({stop_ids}), so responses would run to the limit; add the id to eos_token_id in "
            f"generation_config.json, or set rollout.stop=[{token!r}]"
        )
    return f"id {next(i for i in turn_end_ids if i in stop_ids)} stops a response"


def check_memory(settings: Settings, model_path: Path) -> str:
    """CPU actors must fit into the memory of this machine, where they all run on it."""
    cluster = settings.cluster
    if cluster.node_labels or cluster.gpus_per_engine or cluster.gpus_per_learner:
        return "not checked: actors run on GPUs or labeled nodes (--dry-run has the estimates)"
    weight_bytes = sum(file.stat().st_size for file in model_path.glob("*.safetensors"))
    # Each engine and learner has the weights; the learners' optimizer state is at least as large again.
    needed_bytes = weight_bytes * (settings.rollout.engines + 2) + settings.rollout.kv_cache_gib * BYTES_PER_GIB
    total_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed_bytes > total_bytes:
        raise ResourceError(
            f"engines and learners of {model_path} need at least {needed_bytes / BYTES_PER_GIB:.1f} GiB, but this "
            f"machine has {total_bytes / BYTES_PER_GIB:.1f} GiB; lower rollout.kv_cache_gib or use a smaller model"
        )
    return (
        f"about {estimate_host_bytes(settings) / BYTES_PER_GIB:.1f} GiB of {total_bytes / BYTES_PER_GIB:.1f} GiB with "
        "all actors"
    )


def describe_batch_layout(settings: Settings, model_path: Path) -> str:
    """Whether micro-batches are packed; see rluf.algorithms.batch_layout."""
    trial = choose_batch_layout(settings, model_path)
    if trial.layout == "packed":
        return f"packed, error {trial.logprob_error:.1g} nats per token, gradient cosine {trial.gradient_cosine:.6f}"
    return f"one sample per row, slower than packing: {trial.reason}"


async def compare_engine_and_learner(settings: Settings, model_path: Path) -> list[float]:
    """Mean |logprob difference| of engine and learner in nats per token on each of two prompts.

    Raises WeightSyncError if one is above weight_sync.logprob_tolerance, ModelError if the engine cannot run the model.
    """
    tokenizer = load_tokenizer(model_path, trust_remote_code=settings.model.trust_remote_code)
    gaps = []
    async with ActorSupervisor(settings, model_path, {}, with_learners=True) as supervisor:
        for index, text in enumerate(CHECK_PROMPTS):
            messages = (Message(role="user", content=text),)
            prompt = Prompt(f"check-{index}", messages, render_prompt(tokenizer, messages), "", "train")
            engine = supervisor.actor_groups.rollout_actors[0]
            await switch_gpu_phase(settings, supervisor.actor_groups, "generate")
            group, _ = await engine.handle.generate_group.remote(prompt, 2, settings.seed)
            weight_sync = WeightSync(settings, supervisor.actor_groups)
            await weight_sync.prepare_probe(put_object(group))
            gaps.append(float(weight_sync.get_state()["worst_gap"]))
            logger.info("check: log-probabilities: gap %.2g nats per token on %r", gaps[-1], text)
    return gaps
