"""Build the Ray Serve application from the settings: which models, which deployments, how they scale.

`build` is the entry point for a Serve config file or a KubeRay RayService: `import_path: rluf.serve.application:build`
with args {config: FILE, overrides: [key=value, ...]}.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import socket
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.exceptions import RayError

from cluster.connect import read_ray_address
from cluster.placement import actor_environment
from rluf.config.derived import list_configured_reward_folders
from rluf.config.load import load_settings
from rluf.config.serve import LOOPBACK_HOSTS
from rluf.errors import DataError, ModelError, ResourceError, SettingsError
from rluf.reward.calibration import Calibration
from rluf.reward.text import SCORING_BATCH_TOKENS
from rluf.serve.batching import MAX_QUEUED_RESPONSES
from rluf.serve.deployments import (
    APPLICATION_NAME,
    FEEDBACK_WRITER_NAME,
    BatchLimits,
    FeedbackWriter,
    GatewayDeployment,
    ScorerDeployment,
    check_ray_token,
)
from rluf.serve.middleware import (
    MAX_BODY_BYTES,
    MIN_TOKEN_CHARS,
    TOKEN_LIST_VARIABLE,
    TOKEN_VARIABLE,
    ServiceRules,
    read_access_tokens,
)
from rluf.serve.policy_deployment import ENGINE_SETTING_KEYS, PolicyDeployment
from rluf.serve.store import FeedbackStore
from rluf.serve.store_database import DATABASE_FILE
from rluf.serve.writers import list_writer_names, read_writer_name, resolve_writer_folders
from rluf.utils.cache import compute_artifact_key, hash_files, hash_source_code
from rluf.utils.files import atomic_write, fsync_path
from rluf.utils.hashing import (
    LEGACY_SERVE_SALT_VARIABLE,
    USER_SALT_VARIABLE,
    hash_user_id,
    list_user_id_forms,
    read_user_salt,
)
from rluf.utils.paths import resolve_runs_root

if TYPE_CHECKING:
    from ray.serve import Application

    from rluf.config.settings import Settings

logger = logging.getLogger("rluf.serve")

REPLICA_CODE_DIGEST = hash_source_code("serve", "objectives", "reward")
"""Digest of the code that replicas run; a change of it restarts them."""
SALT_FILE = "salt"
"""File in the log folder with the salt of a local service whose environment has none."""
LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")
SERVE_THROUGHPUT_ENV = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
}
"""Ray Serve's throughput options, for replicas whose code never blocks the event loop: with them a call from gateway
to scorer takes a third of the CPU time. (RAY_SERVE_THROUGHPUT_OPTIMIZED sets these and more for a whole cluster.)"""
MIN_FLUSH_INTERVAL_S, MAX_FLUSH_INTERVAL_S = 1.0, 60.0
"""Limits of the seconds between Parquet files of settled rows; in between, as long as a reaction may change."""
MAX_CONCURRENT_CHATS = 64
"""Chats that run on one policy at a time; as many wait in Ray Serve's queue, further ones get 429."""
IGNORED_CONFIG_KEYS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Keys of a policy's config.json that do not affect its engine: they differ between checkpoints of one run."""
MAX_GATEWAY_REQUESTS = 4096
"""Concurrent requests that Ray Serve lets through to the gateway; the gateway's own limits return 429 long before."""


def check_secrets(settings: Settings) -> None:
    """Raise SettingsError when other machines can reach the service but its secrets or Ray's token are missing."""
    if settings.serve.is_local:
        return
    check_ray_token(settings.serve.host)
    has_tokens = bool(read_access_tokens(os.environ, min_chars=MIN_TOKEN_CHARS))
    has_salt = bool(os.environ.get(USER_SALT_VARIABLE) or os.environ.get(LEGACY_SERVE_SALT_VARIABLE))
    for variable, purpose, is_set in (
        (TOKEN_VARIABLE, f"the bearer token that clients send; {TOKEN_LIST_VARIABLE} for several", has_tokens),
        (USER_SALT_VARIABLE, "the salt of hashed user ids, the same as for rluf.prepare", has_salt),
    ):
        if not is_set:
            raise SettingsError(
                f"serve.host={settings.serve.host} can be reached from other machines, but {variable} is not set: "
                f"export it ({purpose}), or set serve.host=127.0.0.1"
            )


def get_feedback_root(settings: Settings) -> str:
    """Folder or URL of the feedback log."""
    return settings.serve.feedback_path or str(resolve_runs_root(settings) / settings.name / "feedback")


def get_log_folder(settings: Settings) -> Path:
    """Local folder of the open rows: inside a local feedback folder, or in the runs folder if that is a URL."""
    root = get_feedback_root(settings)
    if "://" not in root:
        return Path(root).expanduser().resolve() / ".log"
    return (
        resolve_runs_root(settings).resolve()
        / settings.name
        / f"feedback-log-{hashlib.sha256(root.encode()).hexdigest()[:8]}"
    )


def load_or_create_salt(settings: Settings) -> bytes:
    """Return the salt of user ids: RLUF_USER_SALT, or for a local service one that is created once next to the log."""
    if salt := read_user_salt():
        return salt
    if legacy_salt := os.environ.get(LEGACY_SERVE_SALT_VARIABLE):
        logger.warning("service: %s is deprecated; set %s instead", LEGACY_SERVE_SALT_VARIABLE, USER_SALT_VARIABLE)
        return legacy_salt.encode()
    if salt := read_salt_file(settings):
        return salt
    with atomic_write(get_log_folder(settings) / SALT_FILE) as partial_file:
        # Mode 0600 from the start: no moment at which others can read the salt.
        with os.fdopen(os.open(partial_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(secrets.token_hex(16))
        fsync_path(partial_file)
    return read_salt_file(settings)


def read_salt_file(settings: Settings) -> bytes:
    """The salt that a local service has created; empty without one."""
    salt_file = get_log_folder(settings) / SALT_FILE
    return salt_file.read_bytes() if salt_file.is_file() else b""


def erase_users(settings: Settings, user_ids: Sequence[str]) -> None:
    """Remove users from the feedback store of a service that does not run, from the folders of all writers.

    Raises DataError when there is no such folder, or when some users have no row, after the others are erased;
    ResourceError while a service has the store open.
    """
    root = get_feedback_root(settings)
    # Before the salt: a mistyped path must not become an empty log.
    if "://" not in root and not Path(root).expanduser().is_dir():
        raise DataError(f"{root}: no feedback log; set serve.feedback_path to the folder of the service")
    # Rows from before the operator set a salt have that of the file.
    salts = {load_or_create_salt(settings), read_salt_file(settings)} - {b""}
    forms_by_user = {
        user: {*list_user_id_forms(user), *(hash_user_id(user, salt) for salt in salts)} for user in user_ids
    }
    id_forms = sorted({id_form for forms in forms_by_user.values() for id_form in forms})
    counts: Counter[str] = Counter()
    found_ids: set[str] = set()
    with contextlib.ExitStack() as stack:
        stores = []
        # All are opened before a row is removed: a cluster that still runs refuses the erasure as a whole.
        for writer_name in list_writer_names(root):
            location = resolve_writer_folders(root, get_log_folder(settings), writer_name)
            if "://" in root and not (location[1] / DATABASE_FILE).is_file():
                logger.warning("feedback store %s: its open rows are on another machine; erase there too", location[0])
            stores.append(FeedbackStore(*location, reaction_window_s=0))
            stack.callback(stores[-1].close)
            stores[-1].start()
        # A reaction or choice may be with another writer than its response.
        rows_by_store = [store.find_user_rows(id_forms) for store in stores]
        ids_by_context: defaultdict[str, set[str]] = defaultdict(set)
        for context, row_ids in chain.from_iterable(rows.items() for rows in rows_by_store):
            ids_by_context[context] |= row_ids
        for store in stores:
            found_ids |= store.find_user_ids(id_forms)
            counts.update(store.erase_related(ids_by_context))
        for store in stores:
            counts.update(store.erase_users(id_forms))
    logger.info("feedback log: erased %s", " ".join(f"{kind}={count}" for kind, count in counts.items()))
    unknown_users = [user for user, forms in forms_by_user.items() if not found_ids.intersection(forms)]
    if unknown_users:
        raise DataError(
            f"{len(unknown_users)} of {len(forms_by_user)} users have no row in {root}: {', '.join(unknown_users)}; "
            f"the others are erased. Give ids as in the chat requests, and set {USER_SALT_VARIABLE} to the salt of the "
            "service"
        )


def build_scorer_config(settings: Settings, reward_folders: Mapping[str, Path | None]) -> dict[str, Any]:
    """Build the user_config of a scorer: source of each objective, facts from reward cards, a version.

    The version is a hash of the files, so the same models have the same version on every machine. Raises ModelError
    for a folder without a reward model.
    """
    models: dict[str, dict[str, str]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name in settings.serve.objectives:
        objective, folder = settings.objectives.by_objective[name], reward_folders.get(name)
        if folder is not None:
            if not (folder / "config.json").is_file():
                raise ModelError(f"{folder} has no config.json; name a reward model folder written by rluf.reward")
            models[name] = {"path": str(folder)}
            facts[name] = {"version": hash_files([folder])[:12], **_read_card_facts(folder)}
        elif objective.source in ("judge", "function"):
            models[name] = objective.rule_arguments
            facts[name] = {"version": f"{objective.source} {objective.path}", "max_tokens": 1, "mean_value": None}
        else:
            raise ModelError(f"no reward model for {name}: set objectives.{name}.path, or omit it in serve.objectives")
    versions = json.dumps({name: model_facts["version"] for name, model_facts in facts.items()}, sort_keys=True)
    return {
        "version": hashlib.sha256(versions.encode()).hexdigest()[:12],
        "models": models,
        "facts": facts,
        "batch_tokens": SCORING_BATCH_TOKENS,
        "device": "cuda" if settings.cluster.gpus_per_reward > 0 else "cpu",
    }


def _read_card_facts(model_folder: Path) -> dict[str, Any]:
    """Read the maximum token count of a model and its mean value on test users (0.5 if trained on pairs)."""
    calibration, card_file = Calibration.load(model_folder), model_folder / "reward_card.json"
    card: dict[str, Any] = json.loads(card_file.read_text(encoding="utf-8")) if card_file.is_file() else {}
    # A Bradley-Terry model is centered, not calibrated: its values have a mean of 0.5 by construction.
    mean_value = 0.5 if calibration.method == "centered" else card.get("mean_value")
    return {"max_tokens": calibration.max_tokens, "mean_value": mean_value}


def find_candidate_folders(settings: Settings) -> dict[str, Path] | None:
    """Find the candidate's model folders by objective; the live models fill in missing ones. None: no candidate."""
    if settings.serve.candidate is None:
        return None
    root = Path(settings.serve.candidate).expanduser().resolve()
    folders: dict[str, Path] = {
        name: root / name for name in settings.serve.objectives if (root / name / "config.json").is_file()
    }
    if not folders:
        names = ", ".join(settings.serve.objectives)
        raise ModelError(f"serve.candidate={root} has no reward model; name a folder with {names}")
    return folders


def build_application(
    settings: Settings,
    reward_folders: Mapping[str, Path | None],
    policy_paths: Mapping[str, Path],
    *,
    listen_directly: bool,
) -> Application:
    """Build the application from `reward_folders` by objective (None for a judge) and `policy_paths` by name.

    With `listen_directly` the gateway itself listens at serve.host and serve.port. Otherwise Ray Serve's proxies
    listen on every node. A cluster needs them because the gateway may run on any node, but their hop costs more CPU
    time than the score of a small model.
    """
    check_secrets(settings)
    serve_settings, tokens = settings.serve, read_access_tokens(os.environ)
    scorers = {"live": _build_scorer_application(settings, "live", build_scorer_config(settings, reward_folders))}
    candidate_folders = find_candidate_folders(settings)
    if candidate_folders is not None:
        scorers["candidate"] = _build_scorer_application(
            settings, "candidate", build_scorer_config(settings, {**reward_folders, **candidate_folders})
        )
    policy_versions = {name: hash_files([path])[:12] for name, path in policy_paths.items()}
    rules = ServiceRules(
        tokens=tokens,
        max_body_bytes=MAX_BODY_BYTES,
        requests_per_s=serve_settings.client_requests_per_s,
        deadline_s=settings.timeouts.serve_request_s,
        # Without a token only the Host header protects a local service from DNS rebinding.
        allowed_hosts=LOCAL_HOSTS if serve_settings.is_local and not tokens else None,
        trusted_proxies=serve_settings.trusted_proxies,
        listen_host=serve_settings.host,
        chat_markers=serve_settings.chat_markers,
        reactions=serve_settings.reactions,
    )
    batch_limits = BatchLimits(
        SCORING_BATCH_TOKENS,
        MAX_QUEUED_RESPONSES,
        serve_settings.replica_limits[1],
        settings.timeouts.serve_request_s,
        listen_address=(serve_settings.host, serve_settings.port) if listen_directly else None,
    )
    writer_arguments = (
        get_feedback_root(settings),
        str(get_log_folder(settings)),
        serve_settings.reaction_window_s,
        min(max(serve_settings.reaction_window_s, MIN_FLUSH_INTERVAL_S), MAX_FLUSH_INTERVAL_S),
        read_writer_name(),
    )
    gateway = serve.deployment(
        serve.ingress()(GatewayDeployment), name="gateway", num_replicas=1, max_ongoing_requests=MAX_GATEWAY_REQUESTS,
        graceful_shutdown_timeout_s=settings.timeouts.serve_request_s,
        ray_actor_options={"num_cpus": 0.1, "runtime_env": {"env_vars": SERVE_THROUGHPUT_ENV}},
        user_config={
            "roles": list(scorers), "share": serve_settings.canary_share, "policies": policy_versions,
            "experiment": serve_settings.experiment,
        },
    )  # fmt: skip
    feedback_writer = serve.deployment(
        FeedbackWriter, name=FEEDBACK_WRITER_NAME, num_replicas=1, max_ongoing_requests=MAX_GATEWAY_REQUESTS,
        health_check_period_s=2, ray_actor_options={"num_cpus": 0.1, "runtime_env": {"env_vars": SERVE_THROUGHPUT_ENV}},
    )  # fmt: skip
    gateway_arguments = (rules, batch_limits, load_or_create_salt(settings))
    return _with_content_version(gateway, *gateway_arguments).bind(
        *gateway_arguments,
        *scorers.values(),
        _with_content_version(feedback_writer, *writer_arguments).bind(*writer_arguments),
        *(
            _build_policy_application(settings, name, path, policy_versions[name])
            for name, path in policy_paths.items()
        ),
    )


def _with_content_version(deployment: serve.Deployment, *content: object) -> serve.Deployment:
    """Set a deployment version that changes only with the code and with `content`, its constructor arguments.

    Without a version Ray Serve treats each `serve.run` as new code and restarts every replica.
    """
    version_inputs = {"from": [repr(value) for value in content], "code": REPLICA_CODE_DIGEST}
    # `_internal` because `options(version=...)` is deprecated for users; Ray Serve has no public replacement.
    return deployment.options(version=compute_artifact_key(version_inputs), _internal=True)


def _build_scorer_application(settings: Settings, role: str, scorer_config: dict[str, Any]) -> Application:
    serve_settings = settings.serve
    min_replicas, max_replicas = serve_settings.replica_limits
    scaling: dict[str, Any] = {"num_replicas": min_replicas}
    if max_replicas > min_replicas:
        scaling = {
            "autoscaling_config": {
                "min_replicas": min_replicas,
                "max_replicas": max_replicas,
                "target_ongoing_requests": 1,
                "upscale_delay_s": 5,
            }
        }
    scorer = serve.deployment(
        ScorerDeployment,
        name=f"scorer-{role}",
        user_config=scorer_config,
        # One batch on the device and one queued at the replica, so that short batches do not wait for the network.
        max_ongoing_requests=2,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=settings.timeouts.serve_request_s,
        ray_actor_options={
            **_build_ray_resources(settings, "reward"),
            "runtime_env": {"env_vars": actor_environment(settings, "reward") | SERVE_THROUGHPUT_ENV},
        },
        **scaling,
    )
    return _with_content_version(scorer).bind()


def _build_ray_resources(settings: Settings, role: str) -> dict[str, float]:
    """Ray options of a replica that needs what an actor of `role` needs."""
    return dict(zip(("num_cpus", "num_gpus"), settings.cluster.get_role_resources(role), strict=True))


def _build_policy_application(settings: Settings, policy_name: str, policy_folder: Path, version: str) -> Application:
    """Build a policy's deployment. New weights load in place; another architecture or vocabulary restarts the engine.

    Path and version are user_config and so not part of the deployment version; the fingerprint is.
    """
    settings_json = settings.model_dump_json(include=ENGINE_SETTING_KEYS)
    policy = serve.deployment(
        PolicyDeployment,
        name=f"policy-{policy_name}",
        num_replicas=1,
        max_ongoing_requests=MAX_CONCURRENT_CHATS,
        max_queued_requests=MAX_CONCURRENT_CHATS,
        user_config={"path": str(policy_folder), "version": version},
        graceful_shutdown_timeout_s=settings.timeouts.serve_request_s,
        ray_actor_options={
            **_build_ray_resources(settings, "rollout"),
            "runtime_env": {"env_vars": actor_environment(settings, "rollout")},
        },
    )
    return _with_content_version(policy, settings_json, _fingerprint_engine(policy_folder)).bind(settings_json)


def _fingerprint_engine(policy_folder: Path) -> str:
    """Fingerprint of what an engine reads only once, at its start: configuration and tokenizer, not the weights.

    Raises ModelError for a folder without a policy.
    """
    from rluf.algorithms.policy_model import COMPANION_FILE_PATTERNS

    if not (policy_folder / "config.json").is_file():
        raise ModelError(f"{policy_folder} has no config.json; name a policy's Hugging Face folder in serve.policies")
    config: dict[str, Any] = json.loads((policy_folder / "config.json").read_text(encoding="utf-8"))
    companion_files = {file for pattern in COMPANION_FILE_PATTERNS for file in policy_folder.glob(pattern)}
    engine_config = {key: value for key, value in config.items() if key not in IGNORED_CONFIG_KEYS}
    return json.dumps(engine_config, sort_keys=True) + hash_files(companion_files)


def resolve_policy_folders(settings: Settings) -> dict[str, Path]:
    """Local folders of the served policies by name."""
    from rluf.models.hub import resolve_model
    from rluf.utils.paths import resolve_cache_folder

    return {name: resolve_model(path, resolve_cache_folder(settings)) for name, path in settings.serve.policies.items()}


def build(args: dict[str, Any]) -> Application:
    """Build the application of a settings file, for `serve deploy` and RayService; model paths must be given.

    Raises SettingsError when Ray Serve's proxies, which listen for it, are less local than the settings say.
    """
    config_path = args.get("config")
    settings = load_settings(None if config_path is None else Path(config_path), args.get("overrides", [])).settings
    proxy_host = _read_proxy_host()
    if settings.serve.is_local and proxy_host is not None and proxy_host not in LOOPBACK_HOSTS:
        raise SettingsError(
            f"serve.host={settings.serve.host}, but Ray Serve's proxies listen at {proxy_host}, where other machines "
            f"can reach them: set http_options.host=127.0.0.1 in the Serve config, or serve.host={proxy_host} with "
            "token and salt"
        )
    return build_application(
        settings, list_configured_reward_folders(settings), resolve_policy_folders(settings), listen_directly=False
    )


def _read_proxy_host() -> str | None:
    """Address at which the proxies of the running Ray Serve listen; None without one."""
    if not ray.is_initialized():  # the call below would start Ray
        return None
    # Ray Serve has no public function for this.
    client = serve.context._get_global_client(raise_if_no_controller_running=False)
    return None if client is None else client.http_config.host


def deploy_service(settings: Settings, reward_folders: Mapping[str, Path | None]) -> Any:
    """Start the service on the connected Ray, or update the running one; returns the gateway's handle.

    A running service stays available: only deployments that differ are replaced, and new reward models load in place.
    Raises ModelError or SettingsError before anything is started, ResourceError when Ray Serve cannot start it.
    """
    serve_settings, is_local = settings.serve, read_ray_address() is None
    host, port = serve_settings.host, serve_settings.port
    app = build_application(settings, reward_folders, resolve_policy_folders(settings), listen_directly=is_local)
    # An update finds its own gateway on the port, so only a first start can check it.
    if is_local and APPLICATION_NAME not in _list_running_applications():
        check_port_free(host, port)
    logging_config = {"log_level": "WARNING", "enable_access_log": False}
    # 5 s longer than the gateway's own deadline, so that the client gets the gateway's error rather than the proxy's.
    http_options = {"host": host, "port": port, "request_timeout_s": settings.timeouts.serve_request_s + 5}
    try:
        serve.start(
            proxy_location="Disabled" if is_local else "EveryNode",
            http_options=http_options,
            logging_config=logging_config,
        )
        return serve.run(app, name=APPLICATION_NAME, route_prefix="/", logging_config=logging_config)
    except (RuntimeError, RayError) as error:
        # Ray puts the replica's traceback first; its last line is the cause.
        reason = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "no reason given")
        raise ResourceError(
            f"Ray Serve could not start the service at {host}:{port}: {reason}; check that the port is free, that the "
            "models can be read and that there are CPUs and GPUs for serve.replicas; see the replicas' logs"
        ) from error


def _list_running_applications() -> Collection[str]:
    return serve.status().applications


def check_port_free(host: str, port: int) -> None:
    """Raise ResourceError when the address is in use or does not belong to this machine."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise ResourceError(
            f"cannot listen at {host}:{port}: {error.strerror}; set serve.host and serve.port to a free address of "
            "this machine"
        ) from error
