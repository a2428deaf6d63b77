"""Settings of the HTTP service: reward scoring, chat with policies, and the feedback log."""

from __future__ import annotations

import ipaddress
from typing import Annotated

from pydantic import Field, StringConstraints, model_validator

from rluf.config.base import ADVANCED, ActorCount, SettingsSection, refuse_list
from rluf.config.objectives import BUILTIN_OBJECTIVES

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
"""Addresses reachable from this machine only."""

DEFAULT_REACTIONS = ("love", "like", "dislike", "thumbs_up", "thumbs_down")
"""Reactions of serve.reactions; `love` is the one that P[Love] predicts."""

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
    chat_markers: Annotated[dict[str, str], ADVANCED] = Field(default_factory=dict)
    """Further chat format in texts of other systems' clients, such as {user: "U:", assistant: "A:", end: "$"}."""
    reactions: Annotated[tuple[str, ...], ADVANCED] = DEFAULT_REACTIONS
    """Reactions that clients may send; others are refused, since any text would become data."""
    experiment: Annotated[dict[PolicyName, float], ADVANCED] = Field(default_factory=dict)
    """Shares of users by policy, such as {base: 0.9, aligned: 0.1}, for chats with a user or conversation that name no
    policy; rows log the arm."""
    feedback_path: str | None = None
    """Folder or URL (s3://, gs://) of the feedback log; none means <run.root>/<name>/feedback."""
    reaction_window_s: float = Field(default=300.0, ge=0)
    """Seconds during which a reaction may change; afterwards the row is written to Parquet."""

    @model_validator(mode="after")
    def _check_chat_markers(self) -> ServeSettings:
        names = self.chat_markers.keys() - {"system"}
        markers = self.chat_markers.values()
        is_ambiguous = "" in markers or len(set(markers)) < len(markers)
        if names not in (set(), {"user", "assistant", "end"}) or is_ambiguous:
            raise ValueError(
                "chat_markers: expected user, assistant, end and optionally system, different and not empty"
            )
        return self

    @model_validator(mode="after")
    def _check_trusted_proxies(self) -> ServeSettings:
        for proxy in self.trusted_proxies:
            try:
                ipaddress.ip_network(proxy, strict=False)
            except ValueError as error:
                raise ValueError(f"trusted_proxies: expected addresses and networks, got {proxy!r}") from error
        return self

    @model_validator(mode="after")
    def _check_experiment(self) -> ServeSettings:
        unknown_names = self.experiment.keys() - self.policies.keys()
        if unknown_names:
            raise ValueError(f"experiment: {', '.join(sorted(unknown_names))} is not in serve.policies")
        shares = self.experiment.values()
        if shares and (min(shares) < 0 or abs(sum(shares) - 1) > 1e-6):
            raise ValueError(f"experiment: shares must be at least 0 and sum to 1, got {sum(shares):g}")
        return self

    @property
    def replica_limits(self) -> tuple[int, int]:
        """Scorer replicas per version when idle, and at most."""
        return (self.replicas, self.replicas) if isinstance(self.replicas, int) else self.replicas

    @property
    def is_local(self) -> bool:
        """Whether the service is reachable from this machine only."""
        return self.host in LOOPBACK_HOSTS
