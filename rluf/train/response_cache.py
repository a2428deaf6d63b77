"""Responses of the base policy, sampled once and reused by later runs.

They depend on the model, the prompts and the sampling settings alone, while most experiments change objectives, weights
or the learner. Only their scores are computed again. A file <cache>/base-responses/<key>.jsonl holds one call's groups.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rluf.config.settings import Settings
from rluf.errors import DataError
from rluf.types import Group, Prompt, Sample
from rluf.utils.cache import compute_artifact_key, hash_source_code
from rluf.utils.files import read_jsonl, write_jsonl
from rluf.utils.paths import resolve_cache_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ResponseCache:
    """Responses of one model, by prompts, number of samples, seed and temperature."""

    folder: Path
    model_key: dict[str, Any]
    """Everything else that the responses depend on."""

    @classmethod
    def open(cls, settings: Settings, model_folder: Path) -> ResponseCache:
        """The cache of the policy in `model_folder` under `settings`."""
        rollout = settings.rollout
        return cls(
            resolve_cache_folder(settings) / "base-responses",
            {
                "model": _fingerprint_model(model_folder),
                "dtype": settings.policy_dtype,
                "has_gpus": settings.policy_gpus > 0,
                "deterministic": settings.run.deterministic,
                "max_response_tokens": rollout.max_response_tokens,
                "stop": list(rollout.stop),
                "engine": _list_engine_versions(),
                "code": hash_source_code("backends.vllm"),
            },
        )

    def load(self, prompts: Sequence[Prompt], sample_count: int, seed: int, temperature: float) -> list[Group] | None:
        """The groups of the prompts, in order; None if they were not sampled yet or the file cannot be read."""
        path = self._get_path(prompts, sample_count, seed, temperature)
        try:
            rows = read_jsonl(path)
            if len(rows) != len(prompts):
                return None
            groups = [_build_group(prompt, row) for prompt, row in zip(prompts, rows, strict=True)]
        except (DataError, OSError, KeyError, TypeError, ValueError) as error:
            logger.warning("%s cannot be read (%s); sampling the responses again", path, error)
            return None
        logger.info("base responses: reused %d prompts from %s", len(prompts), path)
        return groups

    def save(self, groups: Sequence[Group], sample_count: int, seed: int, temperature: float) -> None:
        """Store the groups that `load` with the same arguments returns."""
        path = self._get_path([group.prompt for group in groups], sample_count, seed, temperature)
        # Without the prompts, which the next run reads from its own data set.
        stored = ("response_ids", "rollout_logprobs", "version_spans", "finish_reason", "text")
        rows = ([{name: getattr(sample, name) for name in stored} for sample in group.samples] for group in groups)
        write_jsonl(path, ({"samples": samples} for samples in rows))

    def _get_path(self, prompts: Sequence[Prompt], sample_count: int, seed: int, temperature: float) -> Path:
        digest = hashlib.sha256()
        for prompt in prompts:
            digest.update(repr((prompt.id, tuple(prompt.token_ids))).encode())
        call = {"prompts": digest.hexdigest(), "samples": sample_count, "seed": seed, "temperature": temperature}
        return self.folder / f"{compute_artifact_key({**self.model_key, **call})}.jsonl"


def _list_engine_versions() -> list[str]:
    """Name and version of the installed builds of vLLM, without importing it: that takes seconds."""
    distributions = importlib.metadata.distributions()
    names = {(item.metadata["Name"].lower(), item.version) for item in distributions if item.metadata["Name"]}
    return sorted(f"{name} {version}" for name, version in names if name == "vllm" or name.startswith("vllm-"))


def _build_group(prompt: Prompt, row: dict[str, Any]) -> Group:
    samples = tuple(
        Sample(
            prompt_id=prompt.id,
            prompt_ids=prompt.token_ids,
            response_ids=tuple(fields["response_ids"]),
            rollout_logprobs=tuple(fields["rollout_logprobs"]),
            version_spans=tuple((int(start), int(version)) for start, version in fields["version_spans"]),
            finish_reason=fields["finish_reason"],
            text=fields["text"],
        )
        for fields in row["samples"]
    )
    return Group(prompt, samples, 0)


def _fingerprint_model(model_folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of each file: hashing hundreds of gigabytes would take longer than it saves."""
    files = sorted(path for path in model_folder.rglob("*") if path.is_file())
    return [(str(path.relative_to(model_folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
