"""Settings of the HTTP service: reward scoring, chat with policies, and the feedback log."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from rluf.config.base import ADVANCED, ActorCount, SettingsSection, refuse_list
from rluf.config.objectives import BUILTIN_OBJECTIVES

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
"""Addresses reachable from this machine only."""

PolicyName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]*[A-Za-z0-9][A-Za-z0-9_-]*$")]


class ServeSettings(SettingsSection):
    """The service. Secrets come from the environment: RLUF_SERVE_TOKEN (bearer token; RLUF_SERVE_TOKENS: several, with
    scopes) and RLUF_USER_SALT (key of the user id hash); both are required when other machines can reach `host`."""

    host: str = "127.0.0.1"
    """Address to listen on; anything but loopback requires a token and a salt."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port to listen on."""
    objectives: tuple[str, ...] = tuple(BUILTIN_OBJECTIVES)
    """Objectives to serve, configured by objectives.<name> (model folder, judge, or trained on the log)."""
    candidate: str | None = None
    """Folder with <objective>/ models of a candidate version (output of rluf.reward); canary_share sets its traffic."""
    canary_share: float = Field(default=0.0, ge=0, le=1)
    """Share of users (of conversations without a user) scored by the candidate; each always gets the same version."""
    replicas: ActorCount | tuple[ActorCount, ActorCount] = 1
    """Scorer replicas per version; [min, max] scales them with the load. Each reserves cluster.gpus_per_reward."""
    policies: Annotated[dict[PolicyName, str], refuse_list("{base: smollm2-135m-instruct}")] = Field(
        default_factory=dict
    )
    """Policies to chat with, path by name, such as {base: smollm2-135m-instruct}; the first is the default."""
    client_requests_per_s: float = Field(default=500.0, gt=0)
    """Requests per second and client address (bursts of two seconds' worth); more get 429."""
    trusted_proxies: Annotated[tuple[str, ...], ADVANCED] = ()
    """Addresses and networks (10.0.0.0/8) of proxies whose X-Forwarded-For header names the client."""
    feedback_path: str | None = None
    """Folder or URL (s3://, gs://) of the feedback log; none means <run.root>/<name>/feedback."""
    reaction_window_s: float = Field(default=300.0, ge=0)
    """Seconds during which a reaction may change; afterwards the row is written to Parquet."""

    @property
    def replica_limits(self) -> tuple[int, int]:
        """Scorer replicas per version when idle, and at most."""
        return (self.replicas, self.replicas) if isinstance(self.replicas, int) else self.replicas

    @property
    def is_local(self) -> bool:
        """Whether the service is reachable from this machine only."""
        return self.host in LOOPBACK_HOSTS
