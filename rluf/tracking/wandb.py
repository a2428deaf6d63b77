"""Weights & Biases tracking: offline without an API key, files in the run folder; failures never stop a run."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from rluf.config.settings import Settings
from rluf.errors import DataError
from rluf.tracking import metric_registry
from rluf.tracking.background import BackgroundCaller
from rluf.tracking.plugin_tracker import PluginTracker
from rluf.tracking.run_files import PromptComparison, RolloutSample, read_provenance
from rluf.utils.files import read_json, read_jsonl, to_jsonable

if TYPE_CHECKING:
    from wandb import Run

    from rluf.utils.cache import Artifact

logger = logging.getLogger(__name__)

WandbMode = Literal["online", "offline", "off"]
OFFLINE_MODE: WandbMode = "offline"
START_TIMEOUT_S = 20.0
"""Seconds to wait for W&B's server before the run continues offline."""
START_GRACE_S = 60.0
"""Additional seconds for W&B's local service process to start or stop on a busy machine."""
FINISH_TIMEOUT_S = 30.0
"""Seconds for the last upload; what is not sent by then stays in the run folder for `wandb sync`."""
HISTOGRAM_BINS = 24
MAX_TAG_CHARS = 64
"""Longest tag that W&B accepts."""
MAX_CELL_CHARS = 1000
"""Maximum length of a text in a table; longer texts are truncated to keep tables small."""
ROLLOUT_TABLE, COMPARISON_TABLE = "rollout_samples", "side_by_side"
"""Names of the W&B tables: responses sampled in training, and both policies on test prompts."""


class WandbTracker:
    """The W&B run of one rluf run, and the trackers of `tracking.trackers`.

    After a failure W&B or a tracker logs one warning, and every later call of it does nothing.

    The files are in <run folder>/wandb; `wandb sync <run folder>/wandb/offline-run-*` uploads an offline run later. A
    run that is restarted in the same folder continues the same W&B run.
    """

    def __init__(
        self,
        settings: Settings,
        run_folder: Path,
        run_name: str | None = None,
        config: Mapping[str, Any] | None = None,
        *,
        job_type: str = "train",
    ) -> None:
        """Start the W&B run in `run_folder`; `tracking.wandb` and the API key decide on the mode.

        `run_name` defaults to "<configuration name>-<folder name>", `config` to the complete settings. `job_type` is
        the command, by which W&B filters and groups runs.
        """
        self._wandb_run: Run | None = None
        self._background_caller: BackgroundCaller | None = None
        self._plugin_trackers = [PluginTracker(name, settings, run_folder) for name in settings.tracking.trackers]
        self._project_name, self._run_folder = settings.tracking.project, run_folder
        self._run_name = run_name or f"{settings.name}-{run_folder.name}"
        self._objective_names = list(settings.objectives.by_objective)
        self._config_name = settings.name
        tags = (settings.algorithm.name, Path(settings.model.path).name, *settings.tracking.tags)
        self._run_labels: dict[str, Any] = {
            "group": settings.tracking.group or settings.name,
            "job_type": job_type,
            "tags": [tag[:MAX_TAG_CHARS] for tag in dict.fromkeys(tags) if tag],
        }
        # Sums by step, not one running total: a step that is repeated after a restart must count once.
        self._running_sums: dict[int, dict[str, float]] = {}
        with contextlib.suppress(DataError):  # the sums then start at 0: W&B must not stop a run
            for row in read_jsonl(run_folder / "metrics.jsonl"):
                self._add_to_sums(row.get("step", 0), row)
        self._skipped_updates = 0.0
        self.mode = self._requested_mode = _resolve_mode(settings.tracking.wandb)
        if self.mode == "off":
            return
        import wandb

        config = settings.model_dump(mode="json") if config is None else config
        self._background_caller = BackgroundCaller(
            "W&B", (wandb.errors.Error, OSError, ValueError, TypeError, RuntimeError)
        )
        # Online first, offline if that fails; a single attempt if the mode is offline already.
        for mode in dict.fromkeys((self.mode, OFFLINE_MODE)):
            self.mode = mode
            self._background_caller.reset()
            start_call = self._background_caller.submit(
                f"start {mode}", self._make_starter(mode, {**config, "origin": read_provenance()})
            )
            if self._background_caller.wait_for_call(start_call, START_TIMEOUT_S + START_GRACE_S):
                break

    def __enter__(self) -> WandbTracker:
        """Use as a context manager that finishes the W&B run, as failed if the block raises."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the W&B run."""
        self.finish(failed=kind is not None)

    @property
    def is_active(self) -> bool:
        """Whether calls are still recorded."""
        return (
            self._wandb_run is not None
            and self._background_caller is not None
            and not self._background_caller.is_stopped
        )

    def log_step(
        self,
        step: int,
        metrics: Mapping[str, float | int | None],
        sample_values: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Log the metrics of one optimizer step; missing and non-finite values are omitted.

        Each metric is plotted over its axis in `metric_registry`; the axes `samples` and `tokens` are running sums.
        `sample_values` are values [N] of single samples by name; they become histograms.
        """
        for tracker in self._plugin_trackers:
            tracker.log_step(step, metrics)
        self._add_to_sums(step, metrics)
        wandb_row = self._build_wandb_step_row(step, metrics)

        def record(run: Run) -> None:
            import numpy as np
            import wandb

            wandb_histograms = {
                f"distributions/{name}": wandb.Histogram(
                    np_histogram=np.histogram(np.asarray(values), bins=HISTOGRAM_BINS)
                )
                for name, values in (sample_values or {}).items()
                # numpy raises on a histogram of NaN, which would end the tracking of the run.
                if len(values) and all(map(math.isfinite, values))
            }
            run.log({**wandb_row, **wandb_histograms})

        self._submit_call("log", record)
        skipped_updates = metrics.get("skipped") or 0.0
        if skipped_updates > self._skipped_updates:
            self._skipped_updates = skipped_updates
            self.send_alert(f"{self._config_name}: update skipped", f"The gradient of step {step} was not finite.")

    def send_alert(self, title: str, text: str) -> None:
        """Send a W&B alert (mail or chat, as configured there); an offline run sends it when it is synced."""
        self._submit_call("alert", lambda run: run.alert(title=title, text=text, level="WARN"))

    def log_rollout_samples(self, step: int, rows: Iterable[RolloutSample]) -> None:
        """Log a table of responses sampled in a step: scores, judge verdicts, reward and KL."""
        samples = list(rows)  # now, because the closure runs later on another thread

        def record(run: Run) -> None:
            import wandb

            objective_names = sorted({objective for row in samples for objective in row["scores"]})
            column_names = ["step", "version", "topic", "prompt", "response"]
            column_names += [*objective_names, "reward", "kl", "verdicts"]
            table_data = [
                [
                    row["step"],
                    row["version"],
                    row["topic"],
                    _truncate_cell(row["prompt"]),
                    _truncate_cell(row["response"]),
                ]
                + [row["scores"].get(objective) for objective in objective_names]
                + [row["reward"], row["kl"], _format_verdicts(row["failed"])]
                for row in samples
            ]
            run.log({"step": step, ROLLOUT_TABLE: wandb.Table(columns=column_names, data=table_data)})

        if samples:
            self._submit_call("log rollout samples", record)

    def log_comparisons(self, rows: Iterable[PromptComparison]) -> None:
        """Log a table of prompts with the responses and scores of both policies."""
        comparisons = list(rows)

        def record(run: Run) -> None:
            import wandb

            arm_names: tuple[Literal["base", "aligned"], ...] = ("base", "aligned")
            objective_names = sorted(
                {objective for row in comparisons for arm in arm_names for objective in row[arm]["scores"]}
            )
            column_names = ["topic", "prompt", "base", "aligned"]
            column_names += [f"{objective}/{arm}" for objective in objective_names for arm in arm_names]
            column_names += [f"verdicts/{arm}" for arm in arm_names]
            table_data = [
                [
                    row["topic"],
                    _truncate_cell(row["prompt"]),
                    _truncate_cell(row["base"]["text"]),
                    _truncate_cell(row["aligned"]["text"]),
                ]
                + [row[arm]["scores"].get(objective) for objective in objective_names for arm in arm_names]
                + [_format_verdicts(row[arm]["failed"]) for arm in arm_names]
                for row in comparisons
            ]
            run.log({COMPARISON_TABLE: wandb.Table(columns=column_names, data=table_data)})

        self._submit_call("log comparisons", record)

    def log_artifacts(self, data_artifact: Artifact, reward_artifacts: Mapping[str, Artifact | None]) -> None:
        """Log the cards of the data and of the reward models as W&B artifacts with their lineage.

        Artifacts that existed before the run (the log, reused caches) are inputs of it, built ones are outputs. So
        W&B shows log -> run -> data, reward models and policy, and later runs start from the data and reward models
        that they reuse. The chain of single artifacts, log -> data -> reward -> policy, is in the metadata of each
        (`made_from`).
        """
        data_card = read_json(data_artifact.folder / "data_card.json")
        row_counts = {kind: counts.get("in") for kind, counts in data_card.get("counts", {}).items()}
        log_facts = {"sources": data_card.get("sources", []), "rows": row_counts}
        self._log_artifact("log", "log", data_artifact.key, log_facts, is_input=True)
        data_facts = {"reused": data_artifact.reused}
        self._log_artifact(
            "data", "data", data_artifact.key, data_facts, ("log",), "cards/data.json", is_input=data_artifact.reused
        )
        for objective, artifact in reward_artifacts.items():
            if artifact is not None:
                self._log_artifact(
                    f"reward-{objective}",
                    "reward-model",
                    artifact.key,
                    {"reused": artifact.reused, "objective": objective},
                    ("data",),
                    f"cards/{objective}.json",
                    is_input=artifact.reused,
                )

    def log_reward_training(self) -> None:
        """Log the losses of each epoch of the reward models, from the cards in the run folder.

        They are curves over their own epoch, reward_training/<objective>/..., also of models that were reused.
        """
        histories = {
            name: read_json(self._run_folder / "cards" / f"{name}.json").get("training", {}).get("history", ())
            for name in self._objective_names
        }

        def record(run: Run) -> None:
            if run.resumed:  # a continued run has these curves already
                return
            for name, history in histories.items():
                prefix = f"reward_training/{name}"
                run.define_metric(f"{prefix}/epoch", hidden=True)
                for metric_name in history[0] if history else ():
                    if metric_name != "epoch":
                        run.define_metric(f"{prefix}/{metric_name}", step_metric=f"{prefix}/epoch", summary="min")
                for row in history:
                    run.log({f"{prefix}/{metric_name}": value for metric_name, value in row.items()})

        self._submit_call("log the reward training", record)

    def log_policy_artifact(self, summary: Mapping[str, Any]) -> None:
        """Log the policy of the run folder as an artifact that refers to the folder, with the gate verdict."""
        if not (self._run_folder / "policy").is_dir():
            return
        gates = summary.get("gates", {})
        policy_facts = {
            "gates": gates.get("verdict"),
            "measured": gates.get("measured_verdict"),
            "kl": summary.get("kl"),
        }
        made_from = ("data", *(f"reward-{name}" for name in self._objective_names))
        self._log_artifact("policy", "policy", "", policy_facts, made_from, "policy")

    def update_summary(self, summary: Mapping[str, Any]) -> None:
        """Copy summary.json to the run's summary (love_rate.lift.mean ...); alert unless the measured gates pass."""
        for tracker in self._plugin_trackers:
            tracker.update_summary(summary)
        self._submit_call("update the summary", lambda run: run.summary.update(to_jsonable(summary)))
        gates = summary.get("gates", {})
        # Every run waits for its blind reading; that is no alert.
        if (verdict := gates.get("measured_verdict")) in ("fail", "undecided"):
            self.send_alert(f"{self._config_name}: gates {verdict}", f"{'; '.join(gates.get('reasons', []))}.")

    def finish(self, *, failed: bool = False) -> None:
        """Finish the W&B run and wait until its files are complete; `failed` sets the exit code."""

        def finish_run(run: Run) -> None:
            import wandb

            run.finish(exit_code=int(failed))
            # finish returns some milliseconds before W&B's service has written the last records; teardown waits for it.
            wandb.teardown()

        for tracker in self._plugin_trackers:
            tracker.finish(failed=failed)
        if self._background_caller is not None and self.is_active:
            run = self._wandb_run
            if run is not None:
                self._background_caller.wait_for_call(
                    self._background_caller.submit("finish", lambda: finish_run(run)), FINISH_TIMEOUT_S + START_GRACE_S
                )
        self._wandb_run = None

    def _build_wandb_step_row(self, step: int, metrics: Mapping[str, float | int | None]) -> dict[str, float]:
        """Build the row of a step for W&B: the axes, and each metric by its W&B name."""
        metric_specs = metric_registry.list_metric_specs(self._objective_names)
        wandb_names = {metric_spec.key: metric_spec.wandb_name for metric_spec in metric_specs}
        wandb_row = {
            wandb_names.get(key, f"other/{key}"): float(value)
            for key, value in metrics.items()
            if key not in metric_registry.AXIS_TITLES and value is not None and math.isfinite(value)
        }
        return {**wandb_row, "step": step, **self._running_sums[step], "version": metrics.get("version") or 0}

    def _add_to_sums(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        """Store the samples and tokens up to this step; a step that is repeated after a restart counts once."""
        previous_sums = self._running_sums.get(step - 1, {})
        self._running_sums[step] = {
            axis: previous_sums.get(axis, 0) + (metrics.get(key) or 0)
            for axis, key in (("samples", "samples"), ("tokens", "response_tokens"))
        }

    def _log_artifact(
        self,
        name: str,
        artifact_type: str,
        cache_key: str,
        facts: Mapping[str, Any],
        made_from: Sequence[str] = (),
        relative_path: str = "",
        *,
        is_input: bool = False,
    ) -> None:
        """Log an artifact with the file at `relative_path` of the run folder, or a reference if that is a folder.

        It is an output of the run, or an input with `is_input`.
        """

        def record(run: Run) -> None:
            import wandb

            source_names = [f"{self._config_name}-{source_name}" for source_name in made_from]
            metadata = to_jsonable({**facts, "key": cache_key, "made_from": source_names})
            artifact = wandb.Artifact(f"{self._config_name}-{name}", type=artifact_type, metadata=metadata)
            artifact_path = self._run_folder / relative_path
            if relative_path and artifact_path.is_file():
                artifact.add_file(str(artifact_path), policy="immutable", skip_cache=True)
            elif relative_path and artifact_path.is_dir():
                # Without a checksum, which would read all weights, and without an upload of them.
                artifact.add_reference(artifact_path.resolve().as_uri(), checksum=False)
            aliases = ["latest", *([cache_key] if cache_key else [])]
            if is_input:
                # run.use_artifact is refused offline and waits for the server online; this call, which it makes, is not
                # and does not.
                run._log_artifact(artifact, aliases=aliases, is_user_created=True, use_after_commit=True)
            else:
                run.log_artifact(artifact, aliases=aliases)

        self._submit_call(f"log the artifact {name}", record)

    def _make_starter(self, mode: WandbMode, config: Mapping[str, Any]) -> Callable[[], None]:
        return lambda: self._start_run(mode, config)

    def _start_run(self, mode: WandbMode, config: Mapping[str, Any]) -> None:
        import wandb

        if mode != self._requested_mode:
            wandb.teardown()  # W&B's service still has the run that could not start
        self._run_folder.mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            project=self._project_name,
            name=self._run_name,
            id=self._read_or_create_run_id(),
            **self._run_labels,
            resume="allow",
            dir=str(self._run_folder),
            mode="online" if mode == "online" else "offline",
            config=to_jsonable(config),
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                disable_job_creation=True,
                init_timeout=START_TIMEOUT_S,
                finish_timeout=FINISH_TIMEOUT_S,
                finish_timeout_raises=False,
            ),
        )
        for axis in metric_registry.AXIS_TITLES:
            run.define_metric(axis, hidden=axis != "step")
        run.define_metric("*", step_metric="step")
        for metric_spec in metric_registry.list_metric_specs(self._objective_names):
            run.define_metric(
                metric_spec.wandb_name, step_metric=metric_spec.axis, summary=metric_spec.summary_statistic
            )
        self._wandb_run = run

    def _read_or_create_run_id(self) -> str:
        """Return the id of the W&B run. It is stored in the run folder, so a resumed run continues the same W&B run."""
        id_path = self._run_folder / "wandb" / "id"
        if id_path.is_file():
            return id_path.read_text("utf-8").strip()
        id_path.parent.mkdir(parents=True, exist_ok=True)
        run_id = secrets.token_hex(4)
        id_path.write_text(run_id, "utf-8")
        return run_id

    def _submit_call(self, description: str, action: Callable[[Run], object]) -> None:
        run = self._wandb_run
        if run is not None and self._background_caller is not None and not self._background_caller.is_stopped:
            self._background_caller.submit(description, lambda: action(run))


def _format_verdicts(failed_judges: Sequence[str]) -> str:
    return f"fails {', '.join(failed_judges)}" if failed_judges else "passes"


def _truncate_cell(text: str) -> str:
    return text if len(text) <= MAX_CELL_CHARS else f"{text[:MAX_CELL_CHARS]} …"


def _resolve_mode(requested_mode: Literal["auto", "online", "offline", "off"]) -> WandbMode:
    """Resolve auto: WANDB_MODE if set, else online with a WANDB_API_KEY and offline without one."""
    if requested_mode != "auto":
        return requested_mode
    environment_mode = os.environ.get("WANDB_MODE", "").lower()
    if environment_mode in ("online", "offline"):
        return "online" if environment_mode == "online" else "offline"
    if environment_mode in ("disabled", "off"):
        return "off"
    return "online" if os.environ.get("WANDB_API_KEY") else "offline"
