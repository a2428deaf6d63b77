"""Weights & Biases, as a guest: offline without a key, inside the run folder, and never able to stop a run."""

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
from rluf.tracking import metric_registry as catalogue
from rluf.tracking.background import Guest
from rluf.tracking.provenance import origin
from rluf.tracking.run_files import DrawnRow, SampleRow, jsonable, read_json, read_jsonl

if TYPE_CHECKING:
    from wandb import Run

    from rluf.utils.cache import Stage

logger = logging.getLogger(__name__)

Mode = Literal["online", "offline", "off"]
OFFLINE: Mode = "offline"
START_TIMEOUT_S = 20.0
"""Seconds that an online run may take to answer before the run goes on offline."""
START_GRACE_S = 60.0
"""Seconds that W&B's own service may take to come up beside that, on a machine that is busy."""
FINISH_TIMEOUT_S = 30.0
"""Seconds the last upload may take; what is not sent by then stays in the run folder for `wandb sync`."""
BINS = 24
"""Bins of a histogram."""
LONGEST_CELL = 1000
"""Characters of a text in a table; longer ones are cut, so that tables stay small."""


class Tracker:
    """One W&B run of one rluf run. After a failure it warns once and every later call does nothing.

    The files lie in <folder>/wandb. `wandb sync <folder>/wandb/offline-run-*` sends an offline run later. A run that is
    started again in the same folder goes on as the same W&B run.
    """

    def __init__(
        self, settings: Settings, folder: Path, run_name: str | None = None, config: Mapping[str, Any] | None = None
    ) -> None:
        """Start the W&B run in `folder` by `tracking.wandb` and the key.

        `run_name` is "<configuration name>-<folder name>" if not given, `config` the whole settings tree.
        """
        self._run: Run | None = None
        self._guest: Guest | None = None
        self._project, self._folder = settings.tracking.project, folder
        self._name = run_name or f"{settings.name}-{folder.name}"
        self._objectives = list(settings.objectives.named)
        self._title = settings.name
        self._sums: dict[int, dict[str, float]] = {}
        with contextlib.suppress(DataError):  # sums then begin anew; W&B may not stop a run
            for row in read_jsonl(folder / "metrics.jsonl"):
                self._count(row.get("step", 0), row)
        self._skipped = 0.0
        self.mode = self._wanted = _mode(settings.tracking.wandb)
        if self.mode == "off":
            return
        import wandb

        config = settings.model_dump(mode="json") if config is None else config
        self._guest = Guest("W&B", (wandb.errors.Error, OSError, ValueError, TypeError, RuntimeError))
        for mode in dict.fromkeys((self.mode, OFFLINE)):
            self.mode = mode
            self._guest.welcome()
            start = self._guest.ask(f"start {mode}", self._starter(mode, {**config, "origin": origin()}))
            if self._guest.wait(start, START_TIMEOUT_S + START_GRACE_S):
                break

    def __enter__(self) -> Tracker:
        """Use as a context manager that finishes the W&B run, as failed when an error passes through."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the W&B run."""
        self.finish(failed=kind is not None)

    @property
    def active(self) -> bool:
        """Whether W&B still records."""
        return self._run is not None and self._guest is not None and not self._guest.gone

    def log(
        self,
        step: int,
        metrics: Mapping[str, float | int | None],
        values: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Record the numbers of one optimiser step; missing and non-finite ones are left out.

        Each metric is drawn over its axis of `tracking.metric_registry`; `samples` and `tokens` there are running sums.
        `values` [N] are those of single samples, by what they are of; they become histograms.
        """
        self._count(step, metrics)
        row = self._row(step, metrics)

        def record(run: Run) -> None:
            import numpy as np
            import wandb

            pictures = {
                f"distributions/{name}": wandb.Histogram(np_histogram=np.histogram(np.asarray(drawn), bins=BINS))
                for name, drawn in (values or {}).items()
                if len(drawn) and all(map(math.isfinite, drawn))
            }
            run.log({**row, **pictures})

        self._do("log", record)
        skipped = metrics.get("skipped") or 0.0
        if skipped > self._skipped:
            self._skipped = skipped
            self.alert(f"{self._title}: update skipped", f"The gradient of step {step} was not finite.")

    def alert(self, title: str, text: str) -> None:
        """Tell people by the ways they chose in W&B (mail or chat); offline it is sent with the run's files."""
        self._do("alert", lambda run: run.alert(title=title, text=text, level="WARN"))

    def log_drawn(self, step: int, rows: Iterable[DrawnRow]) -> None:
        """Record a small table of responses that step `step` drew: scores, the judges' verdicts, reward and KL."""
        kept = list(rows)

        def record(run: Run) -> None:
            import wandb

            names = sorted({name for row in kept for name in row["scores"]})
            columns = ["step", "version", "topic", "prompt", "response", *names, "reward", "kl", "verdicts"]
            data = [
                [row["step"], row["version"], row["topic"], _cell(row["prompt"]), _cell(row["response"])]
                + [row["scores"].get(name) for name in names]
                + [row["reward"], row["kl"], _verdicts(row["failed"])]
                for row in kept
            ]
            run.log({"step": step, "drawn": wandb.Table(columns=columns, data=data)})

        if kept:
            self._do("log drawn samples", record)

    def log_samples(self, rows: Iterable[SampleRow]) -> None:
        """Record a small table of prompts with both policies' responses and scores."""
        kept = list(rows)

        def record(run: Run) -> None:
            import wandb

            names = sorted({name for row in kept for arm in (row["base"], row["aligned"]) for name in arm["scores"]})
            arms: tuple[Literal["base", "aligned"], ...] = ("base", "aligned")
            columns = ["topic", "prompt", "base", "aligned", *(f"{name}/{arm}" for name in names for arm in arms)]
            columns += [f"verdicts/{arm}" for arm in arms]
            data = [
                [row["topic"], _cell(row["prompt"]), _cell(row["base"]["text"]), _cell(row["aligned"]["text"])]
                + [row[arm]["scores"].get(name) for name in names for arm in arms]
                + [_verdicts(row[arm]["failed"]) for arm in arms]
                for row in kept
            ]
            run.log({"side_by_side": wandb.Table(columns=columns, data=data)})

        self._do("log samples", record)

    def log_stages(self, data: Stage, rewards: Mapping[str, Stage | None]) -> None:
        """Record the cards of the data and of the reward models as artifacts, each naming what it was made from.

        What the run began with is taken by it (the log, and stages that it reused), what it made is given: so W&B draws
        log -> run -> data, rewards and policy, and later runs from the data and rewards that they reuse. The chain of
        single artifacts, log -> data -> reward -> policy, is in each one's metadata (`made_from`).
        """
        card = read_json(data.folder / "data_card.json")
        log = {"sources": card.get("sources", []), "rows": {k: v.get("in") for k, v in card.get("counts", {}).items()}}
        self._record("log", "log", data.key, log, taken=True)
        made = {"reused": data.reused}
        self._record("data", "data", data.key, made, ("log",), "cards/data.json", taken=data.reused)
        for name, stage in rewards.items():
            if stage is not None:
                about = {"reused": stage.reused, "objective": name}
                card_path = f"cards/{name}.json"
                self._record(
                    f"reward-{name}", "reward-model", stage.key, about, ("data",), card_path, taken=stage.reused
                )

    def log_policy(self, summary: Mapping[str, Any]) -> None:
        """Record the policy of the run folder as an artifact that points to it, with the verdict on it."""
        if not (self._folder / "policy").is_dir():
            return
        about = {"gates": summary.get("gates", {}).get("verdict"), "kl": summary.get("kl")}
        made_from = ("data", *(f"reward-{name}" for name in self._objectives))
        self._record("policy", "policy", "", about, made_from, "policy")

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Put the content of summary.json on the run's summary, such as love_rate.lift.mean; alert on bad news."""
        self._do("summarise", lambda run: run.summary.update(jsonable(summary)))
        gates = summary.get("gates", {})
        if gates.get("alarms"):
            self.alert(f"{self._title}: monitors", f"Raised an alarm: {', '.join(gates['alarms'])}.")
        if gates.get("verdict") == "fail":
            failed = ", ".join(check["name"] for check in gates.get("checks", []) if not check["passed"])
            self.alert(f"{self._title}: gates", f"Did not pass: {failed}.")

    def finish(self, *, failed: bool = False) -> None:
        """End the W&B run and wait until its files are whole; `failed` marks it so.

        W&B's own finish returns some milliseconds before its service has written the last records, so the service is
        shut down as well, which waits for it.
        """

        def end(run: Run) -> None:
            import wandb

            run.finish(exit_code=int(failed))
            wandb.teardown()

        if self._guest is not None and self.active:
            run = self._run
            if run is not None:
                self._guest.wait(self._guest.ask("finish", lambda: end(run)), FINISH_TIMEOUT_S + START_GRACE_S)
        self._run = None

    def _row(self, step: int, metrics: Mapping[str, float | int | None]) -> dict[str, float]:
        """What W&B gets of a step: the axes, and each metric under its name there."""
        names = {spec.key: spec.name for spec in catalogue.catalogue(self._objectives)}
        row = {
            names.get(key, f"other/{key}"): float(value)
            for key, value in metrics.items()
            if key not in catalogue.AXES and value is not None and math.isfinite(value)
        }
        return {**row, "step": step, **self._sums[step], "version": metrics.get("version") or 0}

    def _count(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        """Samples and tokens drawn until this step; one that is taken again after a restart counts once."""
        before = self._sums.get(step - 1, {})
        self._sums[step] = {
            axis: before.get(axis, 0) + (metrics.get(key) or 0)
            for axis, key in (("samples", "samples"), ("tokens", "response_tokens"))
        }

    def _record(
        self,
        name: str,
        kind: str,
        key: str,
        about: Mapping[str, Any],
        made_from: Sequence[str] = (),
        path: str = "",
        *,
        taken: bool = False,
    ) -> None:
        """Log an artifact with the file at `path` of the run folder, or a reference to the folder there.

        The run gives it, or, if `taken`, has it as an input. `run.use_artifact` would refuse that offline and wait for
        the server online; what it calls does neither.
        """

        def record(run: Run) -> None:
            import wandb

            sources = [f"{self._title}-{one}" for one in made_from]
            metadata = jsonable({**about, "key": key, "made_from": sources})
            artifact = wandb.Artifact(f"{self._title}-{name}", type=kind, metadata=metadata)
            place = self._folder / path
            if path and place.is_file():
                artifact.add_file(str(place), policy="immutable", skip_cache=True)
            elif path and place.is_dir():
                artifact.add_reference(place.resolve().as_uri(), checksum=False)
            aliases = ["latest", *([key] if key else [])]
            if taken:
                run._log_artifact(artifact, aliases=aliases, is_user_created=True, use_after_commit=True)
            else:
                run.log_artifact(artifact, aliases=aliases)

        self._do(f"log the artifact {name}", record)

    def _starter(self, mode: Mode, config: Mapping[str, Any]) -> Callable[[], None]:
        return lambda: self._start(mode, config)

    def _start(self, mode: Mode, config: Mapping[str, Any]) -> None:
        import wandb

        if mode != self._wanted:
            wandb.teardown()  # its service still holds the run that could not start
        self._folder.mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            project=self._project,
            name=self._name,
            id=self._identity(),
            resume="allow",
            dir=str(self._folder),
            mode="online" if mode == "online" else "offline",
            config=jsonable(config),
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
        for axis in catalogue.AXES:
            run.define_metric(axis, hidden=axis != "step")
        run.define_metric("*", step_metric="step")
        for spec in catalogue.catalogue(self._objectives):
            run.define_metric(spec.name, step_metric=spec.axis, summary=spec.keep)
        self._run = run

    def _identity(self) -> str:
        """The W&B run's id: kept in the run folder, so that a run that goes on is the same run there."""
        path = self._folder / "wandb" / "id"
        if path.is_file():
            return path.read_text("utf-8").strip()
        path.parent.mkdir(parents=True, exist_ok=True)
        identity = secrets.token_hex(4)
        path.write_text(identity, "utf-8")
        return identity

    def _do(self, what: str, action: Callable[[Run], object]) -> None:
        run = self._run
        if run is not None and self._guest is not None and not self._guest.gone:
            self._guest.ask(what, lambda: action(run))


def _verdicts(failed: Sequence[str]) -> str:
    return f"fails {', '.join(failed)}" if failed else "passes"


def _cell(text: str) -> str:
    return text if len(text) <= LONGEST_CELL else f"{text[:LONGEST_CELL]} …"


def _mode(wanted: Literal["auto", "online", "offline", "off"]) -> Mode:
    """auto is online with a WANDB_API_KEY and offline without; WANDB_MODE, when set, rules over auto."""
    if wanted != "auto":
        return wanted
    asked = os.environ.get("WANDB_MODE", "").lower()
    if asked in ("online", "offline"):
        return "online" if asked == "online" else "offline"
    if asked in ("disabled", "off"):
        return "off"
    return "online" if os.environ.get("WANDB_API_KEY") else "offline"
