"""One rollout engine: vLLM's AsyncLLM with token ids in and out, and weights that can be replaced while it runs."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rluf.backends.colocation import shares_gpus
from rluf.backends.vllm.model_folder import check_model, stop_ids
from rluf.backends.weight_transfer.lora import (
    check_adapter,
    kinds_of,
    linear_shapes,
    no_change,
    room_for,
    write_adapter,
)
from rluf.config.settings import Settings
from rluf.errors import DataError, LostError, ModelError, ResourceError, StallError, SyncError
from rluf.models.hub import load_tokenizer

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

logger = logging.getLogger(__name__)

CPU_BLOCK_TOKENS = 32
"""KV cache block of CPU engines: the smallest that vLLM's CPU attention is fast with, so that short prompts share."""
CPU_STEP_TOKENS = 1024
"""Most tokens in one engine step on the CPU: bounds the activations of a prefill (and its full-vocabulary logits)."""
SHUTDOWN_S = 2
"""Seconds an engine core gets to end by itself before it is killed."""


@dataclass(frozen=True, slots=True)
class Draft:
    """One sampled response: ids [R] (end-of-turn token included), their logprobs [R] in nats, version spans, text."""

    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    version_spans: tuple[tuple[int, int], ...]
    finish_reason: str
    text: str


def set_environment(settings: Settings) -> None:
    """Set what vLLM reads from the environment when it is imported and when it starts its core process.

    Call it before the first import of vllm. Values that are set already (by Ray's runtime_env, by the user) stay, but
    for two. VLLM_CPU_KVCACHE_SPACE is taken out: it holds whole GiB only and would override rollout.kv_cache_gib.
    OMP_NUM_THREADS follows cluster.threads when that is set, since Ray puts a default of its own there.
    """
    defaults = {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_PLUGINS": "",
        "VLLM_ENGINE_READY_TIMEOUT_S": str(int(settings.cluster.start_deadline_s)),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if settings.cluster.gpus_per_engine == 0:
        # Threads bound to cores starve when actors share them. Without dynamo, torch.compile-decorated helpers of
        # the sampler run as they are: compiling them costs the first request 3 to 15 s.
        defaults |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}
        # Waiting threads must sleep: with two spinning threads on busy cores one engine fell from 450 to 60 tokens/s.
        defaults |= {"OMP_WAIT_POLICY": "PASSIVE"}
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    if settings.cluster.threads:
        os.environ["OMP_NUM_THREADS"] = str(settings.cluster.threads)
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def sample_seed(seed: int, prompt_id: str, index: int) -> int:
    """Seed of one sample, the same whichever engine takes it; unlike seed + index it never repeats across prompts."""
    digest = hashlib.blake2b(f"{seed}/{prompt_id}/{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")


class RolloutEngine:
    """Generates from, measures with, and updates one vLLM engine. All calls belong to one asyncio loop."""

    def __init__(self, name: str, index: int, settings: Settings, model: Path, version: int = 0) -> None:
        """`name` is what errors call this engine, `index` its place among the engines. Starts nothing yet.

        `version` is the weight version of the model in folder `model`.
        """
        self.name, self.index, self.settings, self.model = name, index, settings, model
        self.version = version
        self._alone = asyncio.Lock()
        self.running = 0
        self._engine: AsyncLLM | None = None
        self._greeted = False
        self._updating = False
        self._adapter: LoRARequest | None = None
        self._linear: dict[str, tuple[int, ...]] = {}
        self._requests = 0

    async def start(self) -> dict[str, Any]:
        """Load the model and start vLLM's core process; returns what was started.

        Blocks the loop meanwhile (vLLM's start is synchronous). Raises ModelError for a model that vLLM cannot take,
        ResourceError when memory is short or the core process ends before it is ready.
        """
        check_model(self.model)
        self._tokenizer = load_tokenizer(self.model)
        self._stop_ids = stop_ids(self.model, self._tokenizer.eos_token_id)
        self._check_memory()
        from vllm.v1.engine.async_llm import AsyncLLM

        if self.settings.cluster.gpus_per_engine == 0:
            _inspect_here(self.model)
        try:
            config = self._arguments().create_engine_config()
        except (ValueError, OSError, KeyError, NotImplementedError) as error:
            raise ModelError(f"{self.name}: vLLM cannot run the model {self.model}: {_first_line(error)}") from error
        try:
            self._engine = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
        except (RuntimeError, ValueError, OSError, MemoryError) as error:
            raise ResourceError(
                f"{self.name}: vLLM's core process did not start with {self.model}: {_first_line(error)}; its own "
                "message is in this actor's log (memory short? lower rollout.kv_cache_gib, rollout.concurrency)"
            ) from error
        await self._engine.update_weight_version(str(self.version))
        await self._begin_adapter()
        return {
            "engine": self.name,
            "pid": os.getpid(),
            "core_pids": core_pids(self._engine),
            "model": str(self.model),
            "kv_tokens": (config.cache_config.num_gpu_blocks or 0) * config.cache_config.block_size,
        }

    async def generate(self, prompt_ids: Sequence[int], seeds: Sequence[int]) -> list[Draft]:
        """Sample one response for each seed; equal seeds and weights give equal responses.

        Sampling is from the whole vocabulary at rollout.temperature, and ends at an end-of-turn token or after
        rollout.max_response_tokens. Raises DataError for a prompt that is too long, StallError past
        rollout.deadline_s, ResourceError when the engine has died.
        """
        limit = self.settings.rollout.max_prompt_tokens
        if not 0 < len(prompt_ids) <= limit:
            raise DataError(
                f"{self.name}: a prompt has {len(prompt_ids)} tokens, rollout.max_prompt_tokens is {limit}; raise it "
                "or drop the prompt"
            )
        ids = list(prompt_ids)
        self.running += len(seeds)
        try:
            async with self._deadline(self.settings.rollout.deadline_s, "to generate a group"):
                tasks = [asyncio.ensure_future(self._request(ids, self._sampling(seed))) for seed in seeds]
                try:
                    outputs = await asyncio.gather(*tasks)
                finally:
                    for task in tasks:
                        task.cancel()
        finally:
            self.running -= len(seeds)
        texts = self._tokenizer.batch_decode([list(o.outputs[0].token_ids) for o in outputs], skip_special_tokens=True)
        return [self._draft(output, text) for output, text in zip(outputs, texts, strict=True)]

    async def logprobs(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[float]:
        """Logprobs [R] (nats, temperature 1) of a given response after a given prompt, under the present weights."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        ids = [*prompt_ids, *response_ids]
        async with self._deadline(self.settings.rollout.deadline_s, "to measure logprobs"):
            output = await self._request(ids, params)
        measured: list[Any] = list(output.prompt_logprobs or [])
        start = len(prompt_ids)
        return [float(found[token].logprob) for token, found in zip(ids[start:], measured[start:], strict=True)]

    async def sleep(self) -> None:
        """Move the weights to host memory and drop the KV cache; no request may be under way. GPUs only."""
        async with self._deadline(self.settings.publish.deadline_s, "to fall asleep"):
            await self._alive().sleep(level=1)

    async def wake(self, parts: Sequence[str]) -> None:
        """Bring weights, kv_cache or both back to the GPU."""
        async with self._deadline(self.settings.publish.deadline_s, "to wake up"):
            await self._alive().wake_up(tags=list(parts))

    async def begin_update(self, offer: dict[str, Any]) -> None:
        """Phase 1: meet the learner (first time only), freeze running requests where they are, open the update.

        Frozen requests lose their KV cache: once resumed they go on from their own tokens with the new weights. An
        update that was begun but never finished is given up first.
        `offer` comes from a Sender. Raises SyncError, or StallError past publish.deadline_s.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        engine = self._alive()
        async with self._deadline(self.settings.publish.deadline_s, "to begin a weight update"):
            if self._adapter is not None:
                self._greeting(offer)
                await engine.pause_generation(mode="keep", clear_cache=True)
                return
            if not self._greeted:
                await engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=self._greeting(offer)))
                await self._raise_problem()
                self._greeted = True
            if self._updating:
                logger.warning("%s: the last weight update was never finished; starting a new one", self.name)
                await engine.finish_weight_update()
                self._updating = False
            await engine.pause_generation(mode="keep", clear_cache=True)
            await engine.start_weight_update()
            self._updating = True

    async def update(self, bucket: dict[str, Any]) -> None:
        """Phase 2, once a bucket: load the tensors that a Sender sent.

        Raises SyncError on a tensor that the model does not have, or of another shape; the engine then stays paused.
        """
        if self._adapter is not None:
            check_adapter(Path(bucket["path"]), self._linear)
            await self._load_adapter(str(bucket["path"]))
            return
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        engine = self._alive()
        async with self._deadline(self.settings.publish.deadline_s, "to load a bucket of weights"):
            await engine.update_weights(WeightTransferUpdateRequest(update_info=bucket))
            await self._raise_problem(abandon=True)

    async def finish_update(self, version: int) -> None:
        """Phases 3 and 4: put the weights in place under `version`, then go on generating.

        Raises SyncError naming tensors that never came; the engine then stays paused, under its old version.
        """
        engine = self._alive()
        async with self._deadline(self.settings.publish.deadline_s, "to finish a weight update"):
            if self._adapter is None:
                await engine.finish_weight_update()
                self._updating = False
                await self._raise_problem()
            await engine.update_weight_version(str(version))
            self.version = version
            await engine.resume_generation()

    @property
    def tied(self) -> bool:
        """Whether the running model's output head is its embeddings."""
        return bool(getattr(self._alive().model_config.hf_config, "tie_word_embeddings", False))

    def health(self) -> dict[str, Any]:
        """Name, weight version, samples running, and whether vLLM's core still lives."""
        engine = self._engine
        alive = engine is not None and not engine.errored
        return {"engine": self.name, "version": self.version, "running": self.running, "alive": alive}

    def shutdown(self) -> None:
        """End the core process; harmless when it has ended or never started."""
        if self._engine is not None:
            self._engine.shutdown(timeout=SHUTDOWN_S)
            self._engine = None

    async def _begin_adapter(self) -> None:
        """Load an adapter that changes nothing, so that requests under way follow the first publish too."""
        settings = self.settings
        if settings.publish.engine != "adapter":
            return
        self._linear = linear_shapes(self.model)
        with tempfile.TemporaryDirectory() as folder:
            path, dtype = Path(folder) / "adapter", getattr(torch, settings.policy_dtype)
            write_adapter(path, no_change(self.model, settings.learner.lora_rank, dtype))
            await self._load_adapter(str(path))

    async def _load_adapter(self, path: str) -> None:
        """Replace the adapter in place: requests name it, not its files."""
        from vllm.lora.request import LoRARequest

        async with self._deadline(self.settings.publish.deadline_s, "to load an adapter"):
            await self._alive().add_lora(LoRARequest("policy", 1, path, load_inplace=True))
        self._adapter = LoRARequest("policy", 1, path)

    def _arguments(self) -> AsyncEngineArgs:
        from vllm.config.weight_transfer import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs

        from rluf.backends.vllm.worker import HouseExecutor, HouseExtension

        rollout, on_gpu = self.settings.rollout, self.settings.cluster.gpus_per_engine > 0
        length = rollout.max_prompt_tokens + rollout.max_response_tokens + 1
        device: dict[str, Any]
        if on_gpu:
            device = {"gpu_memory_utilization": rollout.gpu_memory_share}
        else:
            device = {
                "kv_cache_memory_bytes": int(rollout.kv_cache_gib * 2**30),
                "block_size": CPU_BLOCK_TOKENS,
                # A prompt cut into chunks rewinds its seeded generator, which vLLM's CPU build cannot: the core dies.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(CPU_STEP_TOKENS, length, rollout.concurrency),
            }
        backend: dict[str, Any] = {
            "weight_transfer_config": WeightTransferConfig(backend=f"rluf_{self.settings.publish.engine}")
        }
        if self.settings.publish.engine == "adapter":
            # Named so that the output head stays plain: vLLM's CPU build dies of prompt logprobs through a LoRA head.
            backend = {
                "enable_lora": True,
                "max_lora_rank": room_for(self.settings.learner.lora_rank),
                "lora_target_modules": kinds_of(linear_shapes(self.model)),
            }
        return AsyncEngineArgs(
            model=str(self.model),
            skip_tokenizer_init=True,
            load_format="safetensors",
            trust_remote_code=self.settings.model.trust_remote_code,
            dtype=self.settings.policy_dtype,
            generation_config="vllm",
            max_model_len=length,
            max_num_seqs=rollout.concurrency,
            enforce_eager=True,
            enable_prefix_caching=not self.settings.run.deterministic,
            logprobs_mode="processed_logprobs",
            tensor_parallel_size=rollout.tensor_parallel,
            distributed_executor_backend=HouseExecutor if rollout.tensor_parallel == 1 else "mp",
            worker_extension_cls=f"{HouseExtension.__module__}.{HouseExtension.__qualname__}",
            enable_sleep_mode=shares_gpus(self.settings),
            seed=self.settings.seed,
            disable_log_stats=True,
            **device,
            **backend,
        )

    def _check_memory(self) -> None:
        """Raise ResourceError if weights and KV cache of a CPU engine cannot fit in what is free now."""
        if self.settings.cluster.gpus_per_engine > 0:
            return
        weights = sum(file.stat().st_size for file in self.model.glob("*.safetensors"))
        needed = weights + int(self.settings.rollout.kv_cache_gib * 2**30)
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        meminfo = Path("/proc/meminfo")
        if meminfo.is_file():
            lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
            free = int(lines["MemAvailable"].split()[0]) * 1024
        if needed > free:
            raise ResourceError(
                f"{self.name} needs {needed / 2**30:.1f} GiB ({weights / 2**30:.1f} for weights, "
                f"rollout.kv_cache_gib={self.settings.rollout.kv_cache_gib:g}), but {free / 2**30:.1f} GiB are free; "
                "lower rollout.kv_cache_gib or use a smaller model"
            )

    def _sampling(self, seed: int) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        rollout = self.settings.rollout
        return SamplingParams(
            temperature=rollout.temperature,
            max_tokens=rollout.max_response_tokens,
            seed=seed,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            stop_token_ids=self._stop_ids,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    async def _request(self, ids: list[int], params: SamplingParams) -> RequestOutput:
        if self.settings.run.deterministic:  # a sample's last bits depend on what else is in its batch
            async with self._alone:
                return await self._answer(ids, params)
        return await self._answer(ids, params)

    async def _answer(self, ids: list[int], params: SamplingParams) -> RequestOutput:
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        self._requests += 1
        final: RequestOutput | None = None
        try:
            name = f"{self.index}-{self._requests}"
            async for output in self._alive().generate(tokens_input(ids), params, name, lora_request=self._adapter):
                final = output
        except EngineDeadError as error:
            raise LostError(f"{self.name}: {self._died()}", self.name) from error
        except EngineGenerateError as error:
            raise ResourceError(f"{self.name}: vLLM failed on a request: {_first_line(error.__cause__)}") from error
        if final is None or not final.finished:
            raise ResourceError(f"{self.name}: vLLM ended a request without a result")
        return final

    def _draft(self, output: RequestOutput, text: str) -> Draft:
        done = output.outputs[0]
        flat: Any = done.logprobs
        ids = tuple(done.token_ids)
        if done.finish_reason not in ("stop", "length") or flat is None or tuple(flat.token_ids) != ids:
            raise ResourceError(f"{self.name}: vLLM ended a request with {done.finish_reason!r} and {len(ids)} tokens")
        spans = tuple((span.start, int(span.version)) for span in done.weight_versions or [])
        return Draft(ids, tuple(flat.logprobs), spans or ((0, self.version),), done.finish_reason, text)

    def _greeting(self, offer: dict[str, Any]) -> dict[str, Any]:
        if offer.get("engine") != self.settings.publish.engine:
            raise SyncError(
                f"{self.name}: the learner offers {offer.get('engine')!r}, but publish.engine is "
                f"{self.settings.publish.engine!r}"
            )
        kept = {key: value for key, value in offer.items() if key not in ("engine", "version")}
        if offer["engine"] != "nccl":
            return kept
        return kept | {"rank_offset": 1 + self.index * self.settings.rollout.tensor_parallel}

    async def _raise_problem(self, *, abandon: bool = False) -> None:
        """Raise what a worker has noted; `abandon` first closes the update under way.

        SyncError, or LostError where the learner was out of reach: another engine may reach it.
        """
        engine = self._alive()
        problems = [p for p in await engine.collective_rpc("rluf_transfer_problem") if p is not None]
        if problems:
            if abandon:
                await engine.finish_weight_update()
                self._updating = False
            text, unreachable = problems[0]
            if unreachable:
                raise LostError(f"{self.name}: {text}", self.name)
            raise SyncError(f"{self.name} refused weights: {text}")

    @asynccontextmanager
    async def _deadline(self, seconds: float, what: str) -> AsyncIterator[None]:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError as error:
            raise StallError(f"{self.name} took longer than {seconds:g} s {what}") from error
        except EngineDeadError as error:
            raise LostError(f"{self.name}: {self._died()}", self.name) from error

    def _alive(self) -> AsyncLLM:
        if self._engine is None:
            raise ResourceError(f"{self.name} is not running: start it, or it was shut down")
        if self._engine.errored:
            raise LostError(f"{self.name}: {self._died()}", self.name)
        return self._engine

    def _died(self) -> str:
        return (
            "vLLM's core process has died; its last words are in this actor's log (often it was killed for memory: "
            "lower rollout.kv_cache_gib or rollout.concurrency)"
        )


def core_pids(engine: AsyncLLM) -> list[int]:
    """Process ids of vLLM's engine core processes."""
    manager = engine.engine_core.resources.engine_manager
    return [process.pid for process in manager.processes] if manager is not None else []


def _inspect_here(folder: Path) -> None:
    """Let vLLM look at the model's class in this process.

    By default it starts a process only for that (so as not to touch CUDA here), which costs 5 to 15 s on the first run
    of a machine. An architecture that vLLM does not know is left to vLLM's own error.
    """
    from vllm.model_executor.models.registry import ModelRegistry

    for architecture in json.loads((folder / "config.json").read_text()).get("architectures") or []:
        known = ModelRegistry.models.get(architecture)
        if known is not None:
            ModelRegistry.register_model(architecture, known.load_model_cls())


def _first_line(error: BaseException | None) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    detail = next((line for line in lines if line.startswith("Value error,")), lines[0] if lines else "no message")
    return f"{type(error).__name__}: {detail.removeprefix('Value error, ')[:300]}"
