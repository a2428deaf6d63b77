"""From settings to a Ray Serve application: which models, which deployments, how they scale.

`build` is what a Serve config file or a KubeRay RayService names: `import_path: rluf.serve.application:build`, with
args {config: FILE, overrides: [key=value, ...]}.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import socket
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import RayError

from cluster.placement import role_environment
from rluf.config.load import load_settings
from rluf.errors import ModelError, ResourceError, SettingsError
from rluf.reward.calibration import Calibration
from rluf.serve.backend import Rules
from rluf.serve.deployments import NAME, Gateway, Ledger, Limits, Scorer
from rluf.serve.limits import token_digest
from rluf.serve.policy_deployment import TOLD, Policy
from rluf.utils.cache import code_digest, file_digest, stage_key
from rluf.utils.paths import runs_root

if TYPE_CHECKING:
    from ray.serve import Application

    from rluf.config.settings import Settings

logger = logging.getLogger("rluf.serve")

CODE = code_digest("serve", "objectives", "reward")
"""Stands for the code that replicas run."""
TOKEN, SALT = "RLUF_SERVE_TOKEN", "RLUF_SERVE_SALT"
LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")
LEAN = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
}
"""Ray Serve's own throughput options, for replicas whose code never blocks their loop: a call from gateway to scorer
takes a third of the CPU. (RAY_SERVE_THROUGHPUT_OPTIMIZED is these and more, for a whole cluster.)"""
CHAT_AT_ONCE = 64
"""Chats under way on one policy before more of them wait."""
PASSING = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Entries of a policy's config.json that say nothing about its engine."""
GATEWAY_REQUESTS = 4096
"""Requests that the gateway holds at once; its own limits answer 429 long before."""


def check_secrets(settings: Settings) -> None:
    """Raise SettingsError when the service can be reached from elsewhere but lacks its token or salt."""
    if settings.serve.local:
        return
    for name, what in ((TOKEN, "the bearer token that clients send"), (SALT, "the salt of hashed user ids")):
        if not os.environ.get(name):
            raise SettingsError(
                f"serve.host={settings.serve.host} can be reached from other machines, but {name} is not set: export "
                f"it ({what}), or set serve.host=127.0.0.1"
            )


def feedback_root(settings: Settings) -> str:
    """Folder or URL of the feedback log."""
    return settings.serve.feedback or str(runs_root(settings) / settings.name / "feedback")


def log_folder(settings: Settings) -> Path:
    """Local folder of the write-ahead log: beside local Parquet, in the runs folder for a URL."""
    root = feedback_root(settings)
    if "://" not in root:
        return Path(root).expanduser().resolve() / ".log"
    return (
        runs_root(settings).resolve() / settings.name / f"feedback-log-{hashlib.sha256(root.encode()).hexdigest()[:8]}"
    )


def salt_of(settings: Settings) -> str:
    """RLUF_SERVE_SALT; on this machine alone, one that is drawn once and kept beside the store."""
    if found := os.environ.get(SALT):
        return found
    file = log_folder(settings) / "salt"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(secrets.token_hex(16))
    return file.read_text()


def chosen_models(settings: Settings, folders: Mapping[str, Path | None]) -> dict[str, Any]:
    """What a scorer loads (its user_config): path or judge of each objective, facts from the cards, and a version.

    The version is a hash of the files, so the same models have the same one everywhere. Raises ModelError for a folder
    that holds no reward model.
    """
    models: dict[str, dict[str, str]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name in settings.serve.objectives:
        objective, folder = settings.objectives.named[name], folders.get(name)
        if folder is not None:
            if not (folder / "config.json").is_file():
                raise ModelError(f"{folder} holds no config.json; name a reward model folder that rluf.reward wrote")
            models[name] = {"path": str(folder)}
            facts[name] = {"version": file_digest([folder])[:12], **_card_facts(folder)}
        elif objective.source == "judge":
            models[name] = {"judge": str(objective.judge)}
            facts[name] = {"version": f"judge {objective.judge}", "max_tokens": 1, "mean_value": None}
        else:
            raise ModelError(
                f"no reward model for {name}: set objectives.{name}.path, or leave it out of serve.objectives"
            )
    stated = json.dumps({name: fact["version"] for name, fact in facts.items()}, sort_keys=True)
    return {
        "version": hashlib.sha256(stated.encode()).hexdigest()[:12],
        "models": models,
        "facts": facts,
        "batch_tokens": settings.objectives.batch_tokens,
        "device": "cuda" if settings.cluster.gpus_per_reward > 0 else "cpu",
    }


def _card_facts(folder: Path) -> dict[str, Any]:
    """Tokens that the model reads, and the mean value that its card promises (0.5 for one learnt from pairs)."""
    calibration, file = Calibration.load(folder), folder / "reward_card.json"
    card: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    mean = 0.5 if calibration.method == "centred" else card.get("mean_value")
    return {"max_tokens": calibration.max_tokens, "mean_value": mean}


def candidate_folders(settings: Settings) -> dict[str, Path] | None:
    """Folders of the candidate version by objective; those it lacks are the live ones. None without a candidate."""
    if settings.serve.candidate is None:
        return None
    root = Path(settings.serve.candidate).expanduser().resolve()
    found: dict[str, Path] = {
        name: root / name for name in settings.serve.objectives if (root / name / "config.json").is_file()
    }
    if not found:
        raise ModelError(
            f"serve.candidate={root} holds no reward model; name a folder with {', '.join(settings.serve.objectives)}"
        )
    return found


def application(
    settings: Settings, folders: Mapping[str, Path | None], policies: Mapping[str, Path], *, direct: bool
) -> Application:
    """The application: reward model `folders` by objective (None for a judge), `policies` by name.

    `direct`: the gateway listens at serve.host and serve.port itself. Without it Ray Serve's proxies listen, on every
    node, which a cluster needs since the gateway may be on any of them; but their hop costs more CPU than a small
    model's score.
    """
    check_secrets(settings)
    chosen, token = settings.serve, os.environ.get(TOKEN)
    scorers = {"live": _scorer(settings, "live", chosen_models(settings, folders))}
    candidate = candidate_folders(settings)
    if candidate is not None:
        scorers["candidate"] = _scorer(settings, "candidate", chosen_models(settings, {**folders, **candidate}))
    served = {name: file_digest([path])[:12] for name, path in policies.items()}
    rules = Rules(
        token_digest=token_digest(token) if token else None,
        max_body_bytes=chosen.max_body_kib * 1024,
        requests_per_s=chosen.requests_per_s,
        deadline_s=chosen.deadline_s,
        log_text=chosen.log_text,
        hosts=LOCAL_HOSTS if chosen.local and not token else None,
    )
    limits = Limits(
        settings.objectives.batch_tokens,
        chosen.max_waiting,
        chosen.max_replicas,
        chosen.deadline_s,
        listen=(chosen.host, chosen.port) if direct else None,
    )
    stored = (feedback_root(settings), str(log_folder(settings)), chosen.settle_s, chosen.rotate_s)
    gateway = serve.deployment(
        serve.ingress()(Gateway),
        name="gateway",
        num_replicas=1,
        max_ongoing_requests=GATEWAY_REQUESTS,
        graceful_shutdown_timeout_s=chosen.deadline_s,
        ray_actor_options={"num_cpus": 0.1, "runtime_env": {"env_vars": LEAN}},
        user_config={"roles": list(scorers), "share": chosen.canary_share, "policies": served},
    )
    ledger = serve.deployment(
        Ledger,
        name="ledger",
        num_replicas=1,
        max_ongoing_requests=GATEWAY_REQUESTS,
        health_check_period_s=2,
        ray_actor_options={"num_cpus": 0.1, "runtime_env": {"env_vars": LEAN}},
    )
    told = (rules, limits, salt_of(settings))
    return _lasting(gateway, *told).bind(
        *told,
        *scorers.values(),
        _lasting(ledger, *stored).bind(*stored),
        *(_policy(settings, name, path, served[name]) for name, path in policies.items()),
    )


def _lasting(deployment: serve.Deployment, *made_from: object) -> serve.Deployment:
    """The deployment under a version that changes with our code and with what it is made from, and only then.

    Ray Serve would otherwise take each `serve.run` for new code and start every replica anew.
    """
    parts = {"from": [repr(part) for part in made_from], "code": CODE}
    return deployment.options(version=stage_key(parts), _internal=True)


def _scorer(settings: Settings, role: str, models: dict[str, Any]) -> Application:
    chosen, cluster = settings.serve, settings.cluster
    scaling: dict[str, Any] = {"num_replicas": chosen.min_replicas}
    if chosen.max_replicas > chosen.min_replicas:
        scaling = {
            "autoscaling_config": {
                "min_replicas": chosen.min_replicas,
                "max_replicas": chosen.max_replicas,
                "target_ongoing_requests": 1,
                "upscale_delay_s": 5,
            }
        }
    scorer = serve.deployment(
        Scorer,
        name=f"scorer-{role}",
        user_config=models,
        max_ongoing_requests=2,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=chosen.deadline_s,
        ray_actor_options={
            "num_cpus": cluster.cpus_per_reward,
            "num_gpus": cluster.gpus_per_reward,
            "runtime_env": {"env_vars": role_environment(settings, "reward") | LEAN},
        },
        **scaling,
    )
    return _lasting(scorer).bind()


def _policy(settings: Settings, name: str, path: Path, version: str) -> Application:
    """A policy's deployment: other weights are taken in place, another architecture or vocabulary is a new engine."""
    cluster = settings.cluster
    told = settings.model_dump_json(include=TOLD)
    policy = serve.deployment(
        Policy,
        name=f"policy-{name}",
        num_replicas=1,
        max_ongoing_requests=CHAT_AT_ONCE,
        user_config={"path": str(path), "version": version},
        graceful_shutdown_timeout_s=settings.serve.deadline_s,
        ray_actor_options={
            "num_cpus": cluster.cpus_per_engine,
            "num_gpus": cluster.gpus_per_engine,
            "runtime_env": {"env_vars": role_environment(settings, "rollout")},
        },
    )
    return _lasting(policy, told, _shape(path)).bind(told)


def _shape(policy: Path) -> str:
    """Stands for what an engine reads of a policy once, when it starts: all but the weights.

    Raises ModelError for a folder that holds no policy.
    """
    from rluf.algorithms.policy_io import COMPANIONS

    if not (policy / "config.json").is_file():
        raise ModelError(f"{policy} holds no config.json; name a policy's Hugging Face folder in serve.policies")
    config: dict[str, Any] = json.loads((policy / "config.json").read_text(encoding="utf-8"))
    beside = {file for pattern in COMPANIONS for file in policy.glob(pattern)}
    lasting = {name: value for name, value in config.items() if name not in PASSING}
    return json.dumps(lasting, sort_keys=True) + file_digest(beside)


def given_folders(settings: Settings) -> dict[str, Path | None]:
    """Reward model folders that the settings name themselves, by served objective; None for judges."""
    named = settings.objectives.named
    return {
        name: Path(str(named[name].path)).expanduser().resolve() if named[name].path is not None else None
        for name in settings.serve.objectives
        if named[name].source == "judge" or named[name].path is not None
    }


def policy_folders(settings: Settings) -> dict[str, Path]:
    """Local folders of the served policies by name."""
    from rluf.models.hub import resolve_model
    from rluf.utils.paths import cache_dir

    return {name: resolve_model(path, cache_dir(settings)) for name, path in settings.serve.chat.items()}


def build(args: dict[str, Any]) -> Application:
    """The application of a settings file, for `serve deploy` and RayService. Models are named by path, not trained."""
    config = args.get("config")
    settings = load_settings(None if config is None else Path(config), args.get("overrides", [])).settings
    return application(settings, given_folders(settings), policy_folders(settings), direct=False)


def deploy(settings: Settings, folders: Mapping[str, Path | None]) -> Any:
    """Start the service on the connected Ray, or change the one that runs there; returns the gateway's handle.

    A service that runs goes on answering: only what differs is replaced, and new reward models change over in place.
    Raises ResourceError when Ray Serve cannot start it, ModelError or SettingsError for what is wrong before that.
    """
    chosen, direct = settings.serve, on_this_machine(settings)
    app = application(settings, folders, policy_folders(settings), direct=direct)
    if direct and NAME not in _running():
        check_port(chosen.host, chosen.port)
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    http = {"host": chosen.host, "port": chosen.port, "request_timeout_s": chosen.deadline_s + 5}
    try:
        serve.start(proxy_location="Disabled" if direct else "EveryNode", http_options=http, logging_config=quiet)
        return serve.run(app, name=NAME, route_prefix="/", logging_config=quiet)
    except (RuntimeError, RayError) as error:
        reason = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "no reason given")
        raise ResourceError(
            f"Ray Serve could not start the service at {chosen.host}:{chosen.port}: {reason}; is the port free, can "
            "the models be read, and are there CPUs and GPUs for serve.min_replicas? The replicas' logs say more"
        ) from error


def on_this_machine(settings: Settings) -> bool:
    """Whether Ray is this process's own rather than a named cluster."""
    return not (settings.cluster.address or os.environ.get("RAY_ADDRESS"))


def _running() -> Collection[str]:
    return serve.status().applications


def check_port(host: str, port: int) -> None:
    """Raise ResourceError when nothing can listen there: in use, or no address of this machine."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise ResourceError(
            f"cannot listen at {host}:{port}: {error.strerror}; set serve.host and serve.port to a free address of "
            "this machine"
        ) from error
