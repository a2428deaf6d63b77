"""Settings of the logs: where they are, how they are simulated, validated, split and sampled."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from rluf.config.base import ADVANCED, SettingsSection
from rluf.config.objectives import LABELS_KEY_PREFIX

READER_PREFIX_PATTERN = re.compile(r"^([A-Za-z][A-Za-z0-9_]+):(?!//)(.+)$", re.DOTALL)
"""`reader:path` of earlier releases. URLs (s3://), drive letters (C:\\) and paths with a slash or dot do not match."""


ReactionLabel = Literal["loved", "not_loved", "ignored"]
"""What a reaction means for P[Love]; a row whose only reaction is ignored is no training row."""


def _name_reactions(value: object) -> object:
    """Reaction labels with keys and values as YAML and JSON write them: 5 is "5", true is "true"."""
    if not isinstance(value, dict):
        return value
    keys = {str(key).lower() if isinstance(key, bool) else str(key): label for key, label in value.items()}
    return {key: label.replace(" ", "_") if isinstance(label, str) else label for key, label in keys.items()}


ReactionLabels = Annotated[dict[str, ReactionLabel], BeforeValidator(_name_reactions)]


def _name_roles(value: object) -> object:
    """Roles with keys as YAML writes them: true is "true", 1 is "1"."""
    if not isinstance(value, dict):
        return value
    return {str(key).lower() if isinstance(key, bool) else str(key): role for key, role in value.items()}


MessageRole = Literal["user", "assistant", "system", "ignored"]
MessageRoles = Annotated[dict[str, MessageRole], BeforeValidator(_name_roles)]

RowCondition = bool | int | float | str | None


SECRET_OPTION_PATTERN = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|PRIVATE_KEY", re.IGNORECASE)
"""Options of a table that hold secrets: a config names an environment variable instead."""


class DataSource(SettingsSection):
    """Files of one shape, or a table, and how their rows become rluf's."""

    path: str
    """File, folder, glob or URL; of a table its query, name or folder."""
    source: Literal["sql", "mongo", "bigquery", "snowflake", "delta", "iceberg"] | None = None
    """Kind of table that Ray Data reads; none: files."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the table's connection; $NAME stands for an environment variable."""
    reader: str | None = None
    """Reader name (docs/data.md lists them), or package.module:function; none: rluf's own names, or `columns`."""
    format: Literal["jsonl", "csv", "tsv", "parquet", "arrow"] | None = None
    """Format of the files; none: by the suffix of their names."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Path of each of rluf's fields in a row of the files (field: path.in.its.row, or =constant)."""
    roles: MessageRoles = Field(default_factory=dict)
    """Roles of messages that have names of their own (customer: user); ignored for what is no message."""
    labels: ReactionLabels = Field(default_factory=dict)
    """Labels of reactions in these files, in addition to `prepare.labels`."""
    where: dict[str, RowCondition | tuple[RowCondition, ...]] = Field(default_factory=dict)
    """Conditions that a row must meet, by path: a value, a list of values, `!=value`, `>=value`, or null for absent."""


class DataSettings(SettingsSection):
    """Raw data. An entry is a file, folder, glob or URL (s3://, gs://), `sample:<kind>` for the log shipped with rluf,
    `hub:owner/name` for a data set of the Hugging Face hub, or {path, reader, format, columns, roles, labels, where}
    for a log in another format; {source, path, options} is a table. An empty list omits that kind of data."""

    feedback: tuple[DataSource | str, ...] = ("sample:feedback",)
    """Feedback logs (JSONL, plain, gz or zst; Parquet; CSV; Arrow), one served response per row."""
    reactions: tuple[DataSource | str, ...] = ()
    """Reactions logged apart from the responses (id, response_id, time, reaction, retracted), joined to `feedback`."""
    preferences: tuple[DataSource | str, ...] = ("sample:preferences",)
    """Pairs (messages, chosen, rejected) to train the helpfulness model on."""
    safety: tuple[DataSource | str, ...] = ("sample:safety",)
    """Labeled responses (messages, response, label; 1 safe, 0 unsafe) to train the safety model on."""
    labels: dict[str, tuple[DataSource | str, ...]] = Field(default_factory=dict)
    """Labeled responses (messages, response, label; 1 good, 0 bad) by objective, to train the models of further
    objectives on."""
    prompts: tuple[DataSource | str, ...] = ("sample:prompts",)
    """Prompts for training and evaluation (id, messages, topic, split train or test)."""

    @property
    def sources_by_kind(self) -> dict[str, tuple[DataSource | str, ...]]:
        """Entries by kind of data; the labeled rows of each further objective are a kind of their own."""
        kinds: dict[str, tuple[DataSource | str, ...]] = {}
        for key, value in self:
            if isinstance(value, dict):
                kinds |= {f"{LABELS_KEY_PREFIX}{name}": entries for name, entries in value.items()}
            else:
                kinds[key] = value
        return kinds

    @property
    def has_tables(self) -> bool:
        """Whether an entry is a table that must be exported before its rows can be read."""
        entries = (entry for kind_entries in self.sources_by_kind.values() for entry in kind_entries)
        return any(isinstance(entry, DataSource) and entry.source is not None for entry in entries)

    @field_validator("labels", mode="before")
    @classmethod
    def _wrap_single_entries(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {name: cls._wrap_single_entry(entries) for name, entries in value.items()}

    @field_validator("feedback", "reactions", "preferences", "safety", "prompts", mode="before")
    @classmethod
    def _wrap_single_entry(cls, value: object) -> object:
        entries = (value,) if isinstance(value, (str, dict)) else value
        for entry in entries if isinstance(entries, (list, tuple)) else ():
            match = READER_PREFIX_PATTERN.match(entry) if isinstance(entry, str) else None
            if match and match[1] not in ("sample", "hub"):
                raise ValueError(
                    f"expected a path or a mapping, got {entry!r}; write {{reader: {match[1]}, path: {match[2]}}}"
                )
        return entries


class SimulateSettings(SettingsSection):
    """Simulated users who react to responses; the ground truth of the quickstart."""

    log_rows: int = Field(default=6000, ge=1)
    """Served responses (rows) to write to the log; the numbers of users, rated pairs and labels follow from it."""


_DUPLICATE_SETTINGS = {True: "exact", False: "none"}
"""Values of `prepare.drop_duplicates` in earlier releases."""


class PrepareSettings(SettingsSection):
    """Conversion of raw rows to training data."""

    quarantine_budget: float = Field(default=0.05, ge=0, le=1)
    """Maximum share of invalid rows before the job stops with a summary."""
    dev_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of users in the dev split, which selects the epoch and fits the calibration."""
    test_share: float = Field(default=0.15, gt=0, lt=1)
    """Share of users in the test split, which is only reported on."""
    positive_share: float = Field(default=0.25, gt=0, lt=1)
    """Share of loved rows in the training split after random removal of unloved rows; the factor is saved per row."""
    max_rows: int | None = Field(default=None, ge=10)
    """Maximum training rows per objective; more are removed at random, as the data card reports. None: no limit."""
    split: Literal["user", "strict"] = "user"
    """user: a user or conversation is in one split only. strict: also near-duplicate prompts, and test is later than
    train."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Columns of each entry of `data.feedback` that has none of its own (field: path.in.its.row, or =constant)."""
    labels: ReactionLabels = Field(default_factory=dict)
    """Label of each reaction (loved, not_loved, ignored) by name, emoji, number or range of numbers (">=4": loved)."""
    contradictions: Annotated[Literal["latest", "loved", "not_loved", "ignored"], ADVANCED] = "latest"
    """Label of a response with loved and not loved reactions: that of the latest one, or always the same."""
    drop_duplicates: Annotated[
        Literal["none", "exact", "near"], BeforeValidator(lambda value: _DUPLICATE_SETTINGS.get(value, value)), ADVANCED
    ] = "none"
    """Drop rows that repeat prompt and response of an earlier row (feedback: of the same user; labels: of the same
    label) under another id. near: also rows that differ in a few words."""
    broken_files: Annotated[Literal["stop", "count"], ADVANCED] = "stop"
    """File that ends early or cannot be decompressed: stop, or count its estimated rows in the quarantine budget."""
    reaction_window_hours: float = Field(default=168, gt=0)
    """Hours after a response during which a reaction counts."""
    return_window_days: float = Field(default=7, gt=0.25)
    """For logs without `returned`: whether the user was seen again between 6 hours and this many days later."""
    redact: tuple[Literal["email", "phone", "card", "iban", "ip", "id", "key"], ...] = (
        "email",
        "phone",
        "card",
        "iban",
        "ip",
        "id",
        "key",
    )
    """Kinds of personal data replaced by their kind, such as <email>, in all texts."""
    abuse_rules: tuple[
        Literal["rate", "burst", "timing", "copies", "self_love", "device", "newcomers", "taste", "cap"], ...
    ] = (
        "rate",
        "burst",
        "timing",
        "copies",
        "self_love",
        "device",
        "newcomers",
        "taste",
        "cap",
    )
    """Rules that down-weight rows of bots, brigades and farms (docs/data.md); a row gets its smallest weight."""
    output: str | None = None
    """Data set folder written by `python -m rluf.prepare`; none means <run.root>/<name>/data."""
