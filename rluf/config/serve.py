"""Settings of the service: reward models and policies over HTTP, and the store of reactions."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rluf.config.base import Section

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Hosts that only this machine reaches."""


class ServeSettings(Section):
    """The service. Its secrets come from the environment: RLUF_SERVE_TOKEN (bearer token) and RLUF_SERVE_SALT (user
    ids are hashed with it); both are demanded when `host` is reachable from elsewhere."""

    host: str = "127.0.0.1"
    """Address to listen on; anything but this machine's own needs a token and a salt."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port to listen on."""
    objectives: tuple[Literal["love", "helpfulness", "safety"], ...] = ("love", "helpfulness", "safety")
    """Objectives that are served, from objectives.<name> (a model folder, a judge, or trained from the log)."""
    candidate: str | None = None
    """Folder with <objective>/ models of a candidate version (what rluf.reward writes); it gets canary_share."""
    canary_share: float = Field(default=0.0, ge=0, le=1)
    """Share of conversations that the candidate version scores; the same conversation always goes to the same one."""
    policies: tuple[str, ...] = ()
    """name:path pairs of policies to chat with, such as base:smollm2-135m-instruct; the first is the default."""
    min_replicas: int = Field(default=1, ge=1)
    """Scorer replicas kept when idle, for each version."""
    max_replicas: int = Field(default=1, ge=1)
    """Scorer replicas that load may start, for each version; each takes cluster.{cpus,gpus}_per_reward."""
    max_waiting: int = Field(default=1024, ge=1)
    """Responses that may wait to be scored before requests get 429 with Retry-After."""
    requests_per_s: float = Field(default=500.0, gt=0)
    """Requests a second that one client address may send (bursts of two seconds' worth); more get 429."""
    max_body_kib: int = Field(default=1024, ge=1)
    """Longest request body in KiB; longer ones get 413."""
    deadline_s: float = Field(default=30.0, gt=0)
    """Seconds a request may take before it gets 503, and in which running requests may end at shutdown."""
    feedback: str | None = None
    """Folder or URL (s3://, gs://) of the feedback log; none means <run.root>/<name>/feedback."""
    settle_s: float = Field(default=300.0, ge=0)
    """Seconds in which the reaction to a response may still change; then its row goes to Parquet."""
    rotate_s: float = Field(default=60.0, gt=0)
    """Seconds between Parquet files of settled rows."""
    log_text: bool = False
    """Write the text of messages and responses to the service's log."""

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the service."""
        return self.host in LOOPBACK

    @property
    def chat(self) -> dict[str, str]:
        """Path of each served policy by its name, in order."""
        return {name: path for name, _, path in (pair.partition(":") for pair in self.policies)}
