"""Settings of the logs: where they lie, how they are simulated, checked, split and sampled."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from rluf.config.base import Section


class DataSettings(Section):
    """Where the raw data lies. An entry is a file, a folder, a glob or a URL (s3://, gs://); `sample:<kind>` is the log
    shipped with rluf, `<reader>:<path>` a foreign log (readers in rluf/prepare/readers, among them
    openai, wildchat, lmsys, langfuse). An empty list leaves that kind out."""

    feedback: tuple[str, ...] = ("sample:feedback",)
    """Reaction logs (JSONL, plain, gz or zst; Parquet; CSV; Arrow), one served response a row."""
    reactions: tuple[str, ...] = ()
    """Reactions logged apart from the responses (id, response_id, time, reaction, retracted), joined to `feedback`."""
    preferences: tuple[str, ...] = ("sample:preferences",)
    """Pairs (messages, chosen, rejected) that the helpfulness model learns from."""
    safety: tuple[str, ...] = ("sample:safety",)
    """Labelled responses (messages, response, label; 1 safe, 0 unsafe) that the safety model learns from."""
    prompts: tuple[str, ...] = ("sample:prompts",)
    """Prompts for training and evaluation (id, messages, topic, split train or test)."""

    @field_validator("*", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


class SimulateSettings(Section):
    """The simulated users who put hearts on responses; the ground truth of quickstart."""

    users: int = Field(default=1500, ge=1)
    """Users in the population that writes the log."""
    responses_per_prompt: int = Field(default=21, ge=1)
    """Responses sampled for each training prompt, shared among the served model versions (risky prompts get more)."""
    events: int = Field(default=6000, ge=1)
    """Served responses (rows) to write to the log."""
    base_love_rate: float = Field(default=0.06, gt=0, lt=1)
    """Share of served responses that get a heart in the log, by calibration of the intercept."""
    preference_pairs: int = Field(default=1200, ge=1)
    """Pairs that simulated raters judge for helpfulness."""
    safety_labels: int = Field(default=900, ge=1)
    """Responses that simulated raters label safe or unsafe."""
    output: str = "runs/simulated"
    """Folder that receives feedback, preferences, safety and prompts files."""


class PrepareSettings(Section):
    """How raw rows become training data."""

    quarantine_budget: float = Field(default=0.05, ge=0, le=1)
    """Largest share of bad rows before the job stops with a summary."""
    dev_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of users whose rows pick the epoch and fit the calibration."""
    test_share: float = Field(default=0.15, gt=0, lt=1)
    """Share of users whose rows are only reported on."""
    positive_share: float = Field(default=0.25, gt=0, lt=1)
    """Share of loved rows in the training split after dropping unloved rows at random; the factor is kept per row."""
    max_rows: int = Field(default=4000, ge=10)
    """Most training rows kept for one objective (rows drop at random past it, and the card says so)."""
    split: Literal["user", "strict"] = "user"
    """user: users and conversations on one side. strict: near-duplicate prompts too, and test later than train."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Where a foreign feedback log keeps our fields (field: path.in.its.row, or =constant); empty: our own names."""
    attribution_hours: float = Field(default=168, gt=0)
    """Reactions that come later than this after their response do not count (hours)."""
    return_days: float = Field(default=7, gt=0)
    """Where the log does not say `returned`: whether the user was seen again 6 hours to this many days later."""
    redact: tuple[Literal["email", "phone", "card", "iban", "ip", "key"], ...] = (
        "email",
        "phone",
        "card",
        "iban",
        "ip",
        "key",
    )
    """Personal data that is replaced by its kind, such as <email>, in all texts."""
    abuse: tuple[Literal["rate", "burst", "timing", "copies", "self_love", "device", "cap"], ...] = (
        "rate",
        "burst",
        "timing",
        "copies",
        "self_love",
        "device",
        "cap",
    )
    """Rules that take weight from rows of bots, brigades and farms (docs/data.md); the smallest weight counts."""
    user_cap: int = Field(default=200, ge=1)
    """Rows of one user that count in full; a user with more has the weight of this many (rule cap)."""
    previous: str | None = None
    """Data set that the card compares with; none means the one that is replaced."""
    blocks: int = Field(default=2, ge=1)
    """Ray Data blocks (read and map parallelism)."""
    output: str | None = None
    """Folder of the data set that `python -m rluf.prepare` writes; none means <run.root>/<name>/data."""
