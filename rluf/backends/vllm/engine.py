"""Rollout engine: vLLM's AsyncLLM with token ids in and out, and weights that are updated while it runs."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rluf.backends.vllm.architectures import has_recurrent_layers
from rluf.backends.vllm.core_process import METHOD_VARIABLE, fork_core_process
from rluf.backends.weight_transfer.base import has_tied_embeddings
from rluf.backends.weight_transfer.lora import (
    build_zero_adapter,
    check_adapter,
    list_target_modules,
    read_linear_shapes,
    select_max_lora_rank,
    write_adapter,
)
from rluf.config.settings import Settings
from rluf.errors import ActorLostError, DataError, DeadlineError, ModelError, ResourceError, WeightSyncError
from rluf.models.hub import check_causal_lm, load_tokenizer, skip_scikit_learn
from rluf.models.turn_end import count_tokens_before_stop, list_stop_token_ids, read_stop_token_ids

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM


logger = logging.getLogger(__name__)

CPU_KV_BLOCK_TOKENS = 32
"""KV cache block of CPU engines: the smallest for which vLLM's CPU attention is fast, so that short prompts share."""
MAX_CPU_STEP_TOKENS = 1024
"""Maximum tokens per engine step on the CPU: bounds the activations of a prefill and its full-vocabulary logits."""
MAX_CAUSE_CHARACTERS = 1000
SHARED_GPU_START_ATTEMPTS, START_RETRY_S = 3, 20.0
"""Starts of an engine on a GPU that it shares with a learner, and the seconds between them: after a loss all actors
start again at once, and vLLM refuses a GPU whose memory the ended learner has not given back yet."""
SHUTDOWN_TIMEOUT_S = 2
"""Seconds an engine core has to exit by itself before it is killed."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One sampled response: ids [R] (end-of-turn token included), their logprobs [R] in nats, version spans, text."""

    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    version_spans: tuple[tuple[int, int], ...]
    finish_reason: str
    text: str


def set_vllm_environment(settings: Settings) -> None:
    """Set the environment variables that vLLM reads on import and when it starts its core process.

    Call it before the first import of vllm. Variables that are already set (by Ray's runtime_env, by the user) stay,
    except for two. VLLM_CPU_KVCACHE_SPACE is removed: it counts whole GiB only and would override rollout.kv_cache_gib.
    OMP_NUM_THREADS follows cluster.threads_per_actor when that is set, since Ray sets a default of its own.
    """
    defaults = {
        "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_PLUGINS": "", "VLLM_ENGINE_READY_TIMEOUT_S": str(int(settings.timeouts.actor_start_s)),
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    if settings.cluster.gpus_per_engine == 0:
        # Threads bound to cores starve when actors share them. Without dynamo, torch.compile-decorated helpers of
        # the sampler run uncompiled: compiling them costs the first request 3 to 15 s.
        defaults |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}
        # Waiting threads must sleep: with two spinning threads on busy cores one engine fell from 450 to 60 tokens/s.
        defaults |= {"OMP_WAIT_POLICY": "PASSIVE"}
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    if settings.cluster.threads_per_actor:
        os.environ["OMP_NUM_THREADS"] = str(settings.cluster.threads_per_actor)
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def derive_sample_seed(seed: int, prompt_id: str, sample_index: int) -> int:
    """Seed of one sample, independent of the engine; unlike seed + index it does not repeat across prompts."""
    digest = hashlib.blake2b(f"{seed}/{prompt_id}/{sample_index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")


class RolloutEngine:
    """One vLLM engine: generate, compute logprobs, update weights. All calls belong to one asyncio loop."""

    def __init__(
        self, name: str, engine_index: int, settings: Settings, model_folder: Path, weight_version: int = 0
    ) -> None:
        """`name` appears in errors, `engine_index` is the position among the engines. Starts nothing yet.

        `weight_version` is that of the model in `model_folder`.
        """
        self.name, self.engine_index, self.settings, self.model_folder = name, engine_index, settings, model_folder
        self.weight_version = weight_version
        self._deterministic_lock = asyncio.Lock()
        self.running_samples = 0
        self._engine: AsyncLLM | None = None
        self._transfer_group_id: str | None = None
        self._is_updating = False
        self._lora_request: LoRARequest | None = None
        self._linear_shapes: dict[str, tuple[int, ...]] = {}
        self._request_count = 0

    async def start(self) -> dict[str, Any]:
        """Load the model and start vLLM's core process; returns its name, process ids, model and KV cache size.

        Blocks the loop meanwhile (vLLM's start is synchronous). Raises ModelError for a model that vLLM cannot run,
        ResourceError when memory is short or the core process exits before it is ready.
        """
        check_causal_lm(self.model_folder)
        skip_scikit_learn()
        self._tokenizer = load_tokenizer(self.model_folder, trust_remote_code=self.settings.model.trust_remote_code)
        self._stop_token_ids = [
            *read_stop_token_ids(self.model_folder, self._tokenizer.eos_token_id),
            *list_stop_token_ids(self._tokenizer, self.settings.rollout.stop),
        ]
        self._check_free_memory()
        chosen_method = os.environ.get(METHOD_VARIABLE)
        try:
            config = self._build_engine_args().create_engine_config()
        except (ValueError, OSError, KeyError, NotImplementedError, ImportError) as error:
            raise ModelError(
                f"{self.name}: vLLM cannot run the model {self.model_folder}: {format_cause(error)}"
            ) from error
        self._engine = await self._start_core_process(config, chosen_method)
        await self._engine.update_weight_version(str(self.weight_version))
        await self._load_zero_adapter()
        return {
            "engine": self.name,
            "pid": os.getpid(),
            "core_pids": list_core_pids(self._engine),
            "model": str(self.model_folder),
            "kv_tokens": (config.cache_config.num_gpu_blocks or 0) * config.cache_config.block_size,
        }

    async def _start_core_process(self, config: Any, chosen_method: str | None = None) -> AsyncLLM:
        """Start vLLM's core process; on a shared GPU try again. Raises ResourceError with the last reason."""
        from vllm.v1.engine.async_llm import AsyncLLM

        attempts_left = SHARED_GPU_START_ATTEMPTS if self.settings.is_colocated else 1
        on_gpu = self.settings.cluster.gpus_per_engine > 0
        # The workers of several processes are started by the core, which has computed in parallel by then.
        may_fork = not on_gpu and self.settings.tensor_parallel == 1
        while True:
            attempts_left -= 1
            try:
                with fork_core_process(chosen_method) if may_fork else nullcontext():
                    return AsyncLLM.from_vllm_config(config, disable_log_stats=True)
            except (RuntimeError, ValueError, OSError, MemoryError) as error:
                reason = format_cause(error)
                if not attempts_left:
                    advice = describe_memory_advice(reason, on_gpu=on_gpu)
                    raise ResourceError(
                        f"{self.name}: vLLM's core process did not start with {self.model_folder}: {reason}{advice}; "
                        "its own message is in this actor's log"
                    ) from error
            logger.warning("%s: vLLM's core did not start: %s; again in %g s", self.name, reason, START_RETRY_S)
            await asyncio.sleep(START_RETRY_S)

    async def generate(
        self,
        prompt_ids: Sequence[int],
        seeds: Sequence[int],
        temperature: float | None = None,
        *,
        max_tokens: int | None = None,
    ) -> list[Generation]:
        """Sample one response per seed; equal seeds and weights give equal responses.

        Sampling is from the whole vocabulary at `temperature` (None: rollout.temperature), and ends at an end-of-turn
        token, after rollout.max_response_tokens, or after `max_tokens` if that is less. Raises DataError for a prompt
        that is too long, DeadlineError past timeouts.call_s, ActorLostError when the engine has died.
        """
        max_prompt_tokens = self.settings.rollout.max_prompt_tokens
        if not 0 < len(prompt_ids) <= max_prompt_tokens:
            raise DataError(
                f"{self.name}: a prompt has {len(prompt_ids)} tokens, rollout.max_prompt_tokens is "
                f"{max_prompt_tokens}; raise it or drop the prompt"
            )
        token_ids = list(prompt_ids)
        self.running_samples += len(seeds)
        try:
            async with self._call_deadline(self.settings.timeouts.call_s, "to generate a group"):
                sampling_params = [self._build_sampling_params(seed, temperature, max_tokens) for seed in seeds]
                tasks = [asyncio.ensure_future(self._run_request(token_ids, params)) for params in sampling_params]
                try:
                    outputs = await asyncio.gather(*tasks)
                finally:
                    # When one sample fails, gather leaves the others running: their results would have no reader.
                    for task in tasks:
                        task.cancel()
        finally:
            self.running_samples -= len(seeds)
        return [self._build_generation(output) for output in outputs]

    async def compute_logprobs(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[float]:
        """Logprobs [R] (nats, temperature 1) of a given response after a given prompt, under the current weights."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        # prompt_logprobs=0: of the prompt's own tokens only. vLLM must sample at least one token.
        sampling_params = SamplingParams(
            max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        token_ids = [*prompt_ids, *response_ids]
        async with self._call_deadline(self.settings.timeouts.call_s, "to compute logprobs"):
            output = await self._run_request(token_ids, sampling_params)
        position_logprobs: list[Any] = list(output.prompt_logprobs or [])
        start = len(prompt_ids)
        return [
            float(by_token[token].logprob)
            for token, by_token in zip(token_ids[start:], position_logprobs[start:], strict=True)
        ]

    async def sleep(self) -> None:
        """Move the weights to host memory and drop the KV cache; no request may be running. GPUs only."""
        async with self._call_deadline(self.settings.timeouts.call_s, "to sleep"):
            await self._require_engine().sleep(level=1)

    async def wake(self, tags: Sequence[str]) -> None:
        """Restore weights, kv_cache or both to the GPU."""
        async with self._call_deadline(self.settings.timeouts.call_s, "to wake up"):
            await self._require_engine().wake_up(tags=list(tags))

    async def begin_weight_update(self, transfer_info: dict[str, Any]) -> None:
        """Phase 1: connect to the learner, pause running requests, open the update.

        It connects the first time, and over NCCL again where the learner has made a new group.

        Paused requests lose their KV cache: once resumed they continue after their own tokens with the new weights. An
        update that was begun but never finished is abandoned first. `transfer_info` is that of WeightSender.begin.
        Raises WeightSyncError, or DeadlineError past timeouts.call_s.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        engine = self._require_engine()
        async with self._call_deadline(self.settings.timeouts.call_s, "to begin a weight update"):
            if self._lora_request is not None:
                # Only to check the transport: adapters are read from disk and need no connection.
                self._build_init_info(transfer_info)
                await engine.pause_generation(mode="keep", clear_cache=True)
                return
            group_id = str(transfer_info.get("group_id", ""))
            if self._transfer_group_id != group_id:
                init_info = {"transfer_info": self._build_init_info(transfer_info)}
                await engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))
                await self._raise_transfer_problem()
                self._transfer_group_id = group_id
            if self._is_updating:
                logger.warning("%s: the previous weight update was not finished; starting a new one", self.name)
                await engine.finish_weight_update()
                self._is_updating = False
            # The cache is cleared, since its keys and values were computed with the old weights.
            await engine.pause_generation(mode="keep", clear_cache=True)
            await engine.start_weight_update()
            self._is_updating = True

    async def load_weight_bucket(self, bucket: dict[str, Any]) -> None:
        """Phase 2, once per bucket: load the tensors; `bucket` is the bucket info of WeightSender.send_bucket.

        Raises WeightSyncError on a tensor that the model does not have, or of another shape; the engine then stays
        paused.
        """
        if self._lora_request is not None:
            check_adapter(Path(bucket["path"]), self._linear_shapes)
            await self._load_adapter(str(bucket["path"]))
            return
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        engine = self._require_engine()
        async with self._call_deadline(self.settings.timeouts.call_s, "to load a bucket of weights"):
            await engine.update_weights(WeightTransferUpdateRequest(update_info={"bucket_info": bucket}))
            # Closing a bad update restores the old weights of the layers that received none.
            await self._raise_transfer_problem(abandon_update=True)

    async def finish_weight_update(self, weight_version: int) -> None:
        """Phases 3 and 4: put the weights in place under `weight_version`, then resume generation.

        Raises WeightSyncError naming tensors that were not sent; the engine then stays paused, under its old version.
        """
        engine = self._require_engine()
        async with self._call_deadline(self.settings.timeouts.call_s, "to finish a weight update"):
            if self._lora_request is None:
                await engine.finish_weight_update()
                self._is_updating = False
                await self._raise_transfer_problem()
            await engine.update_weight_version(str(weight_version))
            self.weight_version = weight_version
            await engine.resume_generation()

    @property
    def has_tied_embeddings(self) -> bool:
        """Whether the output head of the running model is its embeddings."""
        return has_tied_embeddings(self._require_engine().model_config.hf_config)

    def get_health(self) -> dict[str, Any]:
        """Name, weight version, running samples, and whether vLLM's core process is alive."""
        engine = self._engine
        alive = engine is not None and not engine.errored
        return {"engine": self.name, "version": self.weight_version, "running": self.running_samples, "alive": alive}

    def shutdown(self) -> None:
        """Stop the core process; harmless when it has ended or was never started."""
        if self._engine is not None:
            self._engine.shutdown(timeout=SHUTDOWN_TIMEOUT_S)
            self._engine = None

    async def _load_zero_adapter(self) -> None:
        """Load an adapter that changes nothing, so that requests running during the first sync follow it too."""
        settings = self.settings
        if settings.weight_sync.transport != "lora":
            return
        self._linear_shapes = read_linear_shapes(self.model_folder)
        dtype = getattr(torch, settings.policy_dtype)
        with tempfile.TemporaryDirectory() as folder:
            adapter_folder = Path(folder) / "adapter"
            write_adapter(adapter_folder, build_zero_adapter(self.model_folder, settings.learner.lora_rank, dtype))
            await self._load_adapter(str(adapter_folder))

    async def _load_adapter(self, adapter_path: str) -> None:
        """Replace the adapter in place: requests refer to it by name and id, not by its files."""
        from vllm.lora.request import LoRARequest

        async with self._call_deadline(self.settings.timeouts.call_s, "to load an adapter"):
            await self._require_engine().add_lora(LoRARequest("policy", 1, adapter_path, load_inplace=True))
        self._lora_request = LoRARequest("policy", 1, adapter_path)

    def _build_engine_args(self) -> AsyncEngineArgs:
        from vllm.config.weight_transfer import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs

        from rluf.backends.vllm.worker import (
            BACKEND_PREFIX,
            RlufMultiprocExecutor,
            RlufUniProcExecutor,
            RlufWorkerExtension,
        )

        rollout, on_gpu = self.settings.rollout, self.settings.cluster.gpus_per_engine > 0
        # One more, since compute_logprobs samples a token after the longest prompt and response.
        max_model_tokens = rollout.max_prompt_tokens + rollout.max_response_tokens + 1
        # A cached prefix changes the batch that a prefill is computed in, and with it the last bits.
        caches_prefixes = not self.settings.run.deterministic
        device_args: dict[str, Any]
        if on_gpu:
            device_args = {
                "gpu_memory_utilization": rollout.gpu_memory_share,
                "enable_prefix_caching": caches_prefixes,
            }
        else:
            is_recurrent = has_recurrent_layers(self.model_folder)
            device_args = {
                "kv_cache_memory_bytes": int(rollout.kv_cache_gib * 2**30),
                "block_size": CPU_KV_BLOCK_TOKENS,
                # A prompt cut into chunks rewinds its seeded generator, which vLLM's CPU build cannot: the core dies.
                "enable_chunked_prefill": False,
                # vLLM caches the state of a recurrent layer (Mamba, linear attention) only in chunks.
                "enable_prefix_caching": caches_prefixes and not is_recurrent,
                "max_num_batched_tokens": max(MAX_CPU_STEP_TOKENS, max_model_tokens, rollout.concurrency),
            }
        transport = self.settings.weight_sync.transport
        transfer_args: dict[str, Any] = {
            "weight_transfer_config": WeightTransferConfig(backend=f"{BACKEND_PREFIX}{transport}")
        }
        if transport == "lora":
            # Modules are listed to leave out the output head: vLLM's CPU build crashes on prompt logprobs through a
            # LoRA head.
            transfer_args = {
                "enable_lora": True,
                "max_lora_rank": select_max_lora_rank(self.settings.learner.lora_rank),
                "lora_target_modules": list_target_modules(read_linear_shapes(self.model_folder)),
            }
        return AsyncEngineArgs(
            model=str(self.model_folder),
            skip_tokenizer_init=True,
            load_format="safetensors",
            trust_remote_code=self.settings.model.trust_remote_code,
            dtype=self.settings.policy_dtype,
            # Not the model's own generation settings: their top_p or repetition penalty would change the distribution
            # that the learner assumes.
            generation_config="vllm",
            max_model_len=max_model_tokens,
            max_num_seqs=rollout.concurrency,
            enforce_eager=rollout.eager or not on_gpu,
            # Logprobs of the distribution that was sampled from: after the temperature.
            logprobs_mode="processed_logprobs",
            tensor_parallel_size=self.settings.tensor_parallel,
            distributed_executor_backend=RlufUniProcExecutor
            if self.settings.tensor_parallel == 1
            else RlufMultiprocExecutor,
            worker_extension_cls=f"{RlufWorkerExtension.__module__}.{RlufWorkerExtension.__qualname__}",
            enable_sleep_mode=self.settings.is_colocated,
            seed=self.settings.seed,
            disable_log_stats=True,
            **device_args,
            **transfer_args,
        )

    def _check_free_memory(self) -> None:
        """Raise ResourceError if weights and KV cache of a CPU engine do not fit into the memory that is free now."""
        if self.settings.cluster.gpus_per_engine > 0:
            return
        weight_bytes = sum(file.stat().st_size for file in self.model_folder.glob("*.safetensors"))
        needed_bytes = weight_bytes + int(self.settings.rollout.kv_cache_gib * 2**30)
        free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        # MemAvailable also counts the page cache, which the system gives up on demand.
        meminfo_file = Path("/proc/meminfo")
        if meminfo_file.is_file():
            fields = dict(line.split(":", 1) for line in meminfo_file.read_text().splitlines())
            free_bytes = int(fields["MemAvailable"].split()[0]) * 1024
        if needed_bytes > free_bytes:
            raise ResourceError(
                f"{self.name} needs {needed_bytes / 2**30:.1f} GiB ({weight_bytes / 2**30:.1f} for weights, "
                f"rollout.kv_cache_gib={self.settings.rollout.kv_cache_gib:g}), but {free_bytes / 2**30:.1f} GiB are "
                "free; lower rollout.kv_cache_gib or use a smaller model"
            )

    def _build_sampling_params(
        self, seed: int, temperature: float | None = None, max_tokens: int | None = None
    ) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        rollout = self.settings.rollout
        return SamplingParams(
            temperature=rollout.temperature if temperature is None else temperature,
            max_tokens=min(rollout.max_response_tokens, max_tokens or rollout.max_response_tokens),
            seed=seed,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            stop_token_ids=self._stop_token_ids,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    async def _run_request(self, token_ids: list[int], sampling_params: SamplingParams) -> RequestOutput:
        # The last bits of a sample depend on the other samples of its batch, so deterministic runs have batches of one.
        if self.settings.run.deterministic:
            async with self._deterministic_lock:
                return await self._stream_request(token_ids, sampling_params)
        return await self._stream_request(token_ids, sampling_params)

    async def _stream_request(self, token_ids: list[int], sampling_params: SamplingParams) -> RequestOutput:
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        self._request_count += 1
        final_output: RequestOutput | None = None
        try:
            request_id = f"{self.engine_index}-{self._request_count}"
            async for output in self._require_engine().generate(
                tokens_input(token_ids), sampling_params, request_id, lora_request=self._lora_request
            ):
                final_output = output
        except EngineDeadError as error:
            raise ActorLostError(f"{self.name}: {self._format_core_death()}", self.name) from error
        except EngineGenerateError as error:
            raise ResourceError(f"{self.name}: vLLM failed on a request: {format_cause(error.__cause__)}") from error
        if final_output is None or not final_output.finished:
            raise ResourceError(f"{self.name}: vLLM ended a request without a result")
        return final_output

    def _build_generation(self, output: RequestOutput) -> Generation:
        completion = output.outputs[0]
        logprobs: Any = completion.logprobs
        response_ids, finish_reason = tuple(completion.token_ids), completion.finish_reason
        # An aborted request also arrives as finished. The logprobs must be of the sampled tokens, not of the top ones.
        is_complete = finish_reason in ("stop", "length") and logprobs is not None
        if not is_complete or tuple(logprobs.token_ids) != response_ids:
            raise ResourceError(
                f"{self.name}: vLLM ended a request with {finish_reason!r} and {len(response_ids)} tokens"
            )
        spans = tuple((span.start, int(span.version)) for span in completion.weight_versions or [])
        version_spans = spans or ((0, self.weight_version),)
        token_count = len(response_ids)
        if stop_strings := self.settings.rollout.stop:
            # vLLM finds stop strings only with its own tokenizer. Tokens after the string are as if never sampled: the
            # probabilities of those before do not depend on them.
            token_count = count_tokens_before_stop(self._tokenizer, response_ids, stop_strings)
        if token_count < len(response_ids):
            response_ids, finish_reason = response_ids[:token_count], "stop"
            version_spans = tuple(span for span in version_spans if span[0] < token_count)
        # Control tokens stay visible, except for the one that ends the turn: monitors count them.
        is_turn_end = bool(response_ids) and response_ids[-1] in self._stop_token_ids
        text = str(self._tokenizer.decode(response_ids[: len(response_ids) - is_turn_end], skip_special_tokens=False))
        return Generation(response_ids, tuple(logprobs.logprobs[:token_count]), version_spans, finish_reason, text)

    def _build_init_info(self, transfer_info: dict[str, Any]) -> dict[str, Any]:
        """The transport's own part of the transfer info, with the ranks of this engine in the NCCL group."""
        transport = self.settings.weight_sync.transport
        if transfer_info.get("transport") != transport:
            raise WeightSyncError(
                f"{self.name}: the learner uses weight_sync.transport={transfer_info.get('transport')!r}, this engine "
                f"{transport!r}"
            )
        own_keys = ("transport", "weight_version", "group_id", "first_ranks")
        init_info = {key: value for key, value in transfer_info.items() if key not in own_keys}
        if transport != "nccl":
            return init_info
        return init_info | {"rank_offset": int(transfer_info["first_ranks"][str(self.engine_index)])}

    async def _raise_transfer_problem(self, *, abandon_update: bool = False) -> None:
        """Raise the problem that a worker has recorded as WeightSyncError; `abandon_update` closes the update first."""
        engine = self._require_engine()
        problems = [
            problem for problem in await engine.collective_rpc("describe_rluf_transfer_problem") if problem is not None
        ]
        if problems:
            if abandon_update:
                await engine.finish_weight_update()
                self._is_updating = False
            raise WeightSyncError(f"{self.name} refused weights: {problems[0]}")

    @asynccontextmanager
    async def _call_deadline(self, timeout_s: float, action: str) -> AsyncIterator[None]:
        """Limit a call to `timeout_s` and translate vLLM's error for a dead core process."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError as error:
            raise DeadlineError(f"{self.name} took longer than {timeout_s:g} s {action}") from error
        except EngineDeadError as error:
            raise ActorLostError(f"{self.name}: {self._format_core_death()}", self.name) from error

    def _require_engine(self) -> AsyncLLM:
        if self._engine is None:
            raise ResourceError(f"{self.name} is not running: it was not started, or was shut down")
        if self._engine.errored:
            raise ActorLostError(f"{self.name}: {self._format_core_death()}", self.name)
        return self._engine

    def _format_core_death(self) -> str:
        return (
            "vLLM's core process has died; its last output is in this actor's log (often it was killed for memory: "
            "lower rollout.kv_cache_gib or rollout.concurrency)"
        )


def list_core_pids(engine: AsyncLLM) -> list[int]:
    """Process ids of vLLM's engine core processes."""
    manager = engine.engine_core.resources.engine_manager
    return [process.pid for process in manager.processes] if manager is not None else []


def describe_memory_advice(reason: str, *, on_gpu: bool) -> str:
    """What to do about the error of an engine's start with this `reason`; empty if it is not about memory."""
    setting = "rollout.gpu_memory_share" if on_gpu else "rollout.kv_cache_gib"
    if re.search(r"No available memory for the cache|larger than the available KV cache", reason):
        return f"; raise {setting}, or lower rollout.max_prompt_tokens or rollout.max_response_tokens"
    # Not the word alone, which the name of a weight or a path may contain.
    if re.search(r"MemoryError|out of memory|(available|free|enough|allocate) memory", reason, re.IGNORECASE):
        return f"; lower {setting} or rollout.concurrency"
    return ""


def format_cause(error: BaseException | None) -> str:
    """Type and whole message of an error and of the innermost error that caused it, on one line."""
    chain = [error]
    while (cause := _get_cause(chain[-1])) is not None and cause not in chain:
        chain.append(cause)
    errors = [error] if len(chain) == 1 else [error, chain[-1]]
    return ", caused by ".join(f"{type(e).__name__}: {_join_lines(str(e))}" for e in errors)


def _get_cause(error: BaseException | None) -> BaseException | None:
    if error is None or isinstance(error, BaseExceptionGroup):
        return error and error.exceptions[0]
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _join_lines(message: str) -> str:
    # pydantic's errors, which vLLM's configs raise, end each problem with a link and a dump of all arguments.
    lines = [line.strip().split(" [type=", 1)[0] for line in message.splitlines()]
    useful_lines = [line for line in lines if line and not line.startswith("For further information visit")]
    return " ".join(useful_lines)[:MAX_CAUSE_CHARACTERS] or "no message"
