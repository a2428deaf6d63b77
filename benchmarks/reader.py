"""Fit of the reader behind the simulated users, and its agreement with people.

python benchmarks/reader.py fit --data ../shared/data --readings FOLDER   writes rluf/simulate/reader_weights.json
python benchmarks/reader.py phrases                                       writes benchmarks/lab/phrase_readings.json
python benchmarks/reader.py rates [--target 0.02]                         love rates of the sample log's versions

`fit` first reads every response with the frozen model (minutes on two idle cores) and keeps what it measured in FOLDER:
an interrupted run resumes, and a second fit takes seconds. The last line is JSON: the out-of-fold figures that the
weights file records as its provenance.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lab.reader_data import (
    EXAMPLES_PATH,
    REFUSALS_PATH,
    LabeledSet,
    PairSet,
    build_mismatch_pairs,
    build_requests,
    build_validity_pairs,
    load_offenses,
    load_preferences,
    load_thumbs,
)
from lab.reader_fit import (
    FOLD_COUNT,
    Floats,
    HeadRows,
    Ints,
    Probe,
    describe_weights,
    fit_head,
    fit_probe,
    fit_sets,
    probe_out_of_fold,
    split_groups,
    split_together,
)
from lab.replies import CLOSINGS, MIDDLES, OPENERS, PHRASE_READINGS
from numpy.typing import NDArray
from sklearn.utils.class_weight import compute_sample_weight

from rluf.config.run import READER_MODEL
from rluf.config.settings import Settings
from rluf.models.hub import resolve_model
from rluf.reward.metrics import auroc, compute_accuracy_interval, compute_auroc_interval, round_for_json
from rluf.simulate import reader_features
from rluf.simulate.experiment import read_served_responses
from rluf.simulate.ground_truth import ReaderInput, load_reader
from rluf.simulate.prompts import SimulatedPrompt, load_prompts
from rluf.simulate.reader_features import PROBE_SOURCES, ReadingScores, build_features
from rluf.simulate.reader_model import ReaderModel, Reading
from rluf.simulate.styles import MODEL_VERSIONS
from rluf.simulate.users import expected_love_probability, find_logit_shift, love_logits_by_user
from rluf.simulate.world import WORLD
from rluf.utils.cache import hash_files
from rluf.utils.paths import find_sample_log, resolve_cache_folder

WEIGHTS_PATH = Path(reader_features.__file__).with_name("reader_weights.json")
DATA_FILES = (
    "convai2_reactions/dialogs.jsonl.gz", "pandalm_test/pairs.jsonl.gz", "diasafety/train.jsonl.gz",
    "prompts/harmfulqa.jsonl.gz", "prompts/mt_bench.jsonl.gz", "prompts/self_instruct_seed_tasks.jsonl.gz",
    "topical_chat_ratings/valid_rare.jsonl.gz",
)  # fmt: skip
PHRASE_PROMPTS = 4
"""Prompts per topic over which the reading of a phrase is averaged."""
INPUTS_PER_BATCH = 200
PROBE_STRENGTHS = {"taste": 1e-4, "misfit": 1e-3, "offense": 1e-4, "stock": 1e-3, "refusal": 1e-3, "harm": 1e-3}
"""Inverse ridge penalty of each probe on 576 standardized hidden values; smaller where labels are noisy."""
APPROVAL_SET_WEIGHTS = {"thumbs": 1.0, "validity": 1.0, "preferences": 0.3}
APPROVAL_RIDGE = 0.3
"""Of the probe `approval`, which is fitted to three sets at once: on thumbs alone it would favor replies that do not
answer, and validity alone says nothing about people's reactions."""
HEAD_RIDGE = 1e-2
SET_WEIGHTS = {"validity": 1.0, "thumbs": 2.0, "preferences": 0.5, "mismatches": 0.5}
"""Weight of the mean log-likelihood of each set in the heads."""
STOCK_KINDS = ("generic", "flattery", "signoff", "loop", "echo")
MISFIT_KINDS = ("mismatch", "contradict", "generic", "echo", "flattery", "signoff")
READING_FIELDS = tuple(Reading.__dataclass_fields__)
HIDDEN_FIELDS = tuple(name for name in READING_FIELDS if name.endswith("hidden"))


class ReadingStore:
    """Readings by key in FOLDER/readings.npz; what is missing is read in parts, so an interrupted run resumes."""

    def __init__(self, folder: Path) -> None:
        """Load the readings of earlier runs."""
        self._path = folder / "readings.npz"
        self._model: ReaderModel | None = None
        self.readings: dict[str, Reading] = {}
        if self._path.is_file():
            with np.load(self._path) as stored:
                columns = {field: stored[field].astype(np.float64) for field in READING_FIELDS}
                for index, key in enumerate(stored["keys"].tolist()):
                    values = {field: column[index] for field, column in columns.items()}
                    self.readings[key] = Reading(**{**values, "token_count": int(values["token_count"])})

    def read(self, inputs: Sequence[ReaderInput]) -> None:
        """Add the readings of new inputs; those of one prompt are read together."""
        missing = list({item.key: item for item in inputs if item.key not in self.readings}.values())
        missing.sort(key=lambda item: json.dumps(item.messages))
        for first in range(0, len(missing), INPUTS_PER_BATCH):
            batch = missing[first : first + INPUTS_PER_BATCH]
            self._model = self._model or ReaderModel(
                resolve_model(READER_MODEL, resolve_cache_folder(Settings())), dtype="float32"
            )
            readings = self._model.read([item.messages for item in batch], [item.response for item in batch])
            self.readings |= {item.key: reading for item, reading in zip(batch, readings, strict=True)}
            self._save()
            sys.stderr.write(f"read {first + len(batch)} of {len(missing)} responses\n")

    def _save(self) -> None:
        columns = {name: np.array([getattr(r, name) for r in self.readings.values()]) for name in READING_FIELDS}
        arrays: dict[str, Any] = {
            name: column.astype(np.float16) if name in HIDDEN_FIELDS else column for name, column in columns.items()
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary_path = self._path.with_name("partial.npz")
        np.savez(temporary_path, keys=np.array(list(self.readings)), **arrays)
        temporary_path.replace(self._path)


@dataclass(frozen=True, slots=True)
class ProbeRows:
    """Rows that a probe is fitted to: hidden states [N, H], labels [N] and groups, and the keys of the inputs."""

    hidden: Floats
    labels: Floats
    groups: list[str]
    keys: list[str]


class ReaderFit:
    """All sets with their readings, the fitted probes and heads, and the out-of-fold figures."""

    def __init__(self, data: Path, folder: Path) -> None:
        """Read all sets."""
        self.labeled: dict[str, LabeledSet] = {
            "thumbs": load_thumbs(data), "offenses": load_offenses(data), "requests": build_requests(data),
        }  # fmt: skip
        self.pairs: dict[str, PairSet] = {
            "validity": build_validity_pairs(data), "preferences": load_preferences(data),
            "mismatches": build_mismatch_pairs(data),
        }  # fmt: skip
        store = ReadingStore(folder)
        for inputs in self.inputs_of_set.values():
            store.read(inputs)
        self.readings = store.readings
        self.probe_rows = {name: self._probe_rows(name) for name in PROBE_STRENGTHS}
        self.probes: dict[str, Probe] = {}
        self.probe_aurocs: dict[str, float] = {}
        self.out_of_fold: dict[str, dict[str, float]] = {}
        for name, rows in self.probe_rows.items():
            scores = probe_out_of_fold(rows.hidden, rows.labels, split_groups(rows.groups), PROBE_STRENGTHS[name])
            self.out_of_fold[name] = dict(zip(rows.keys, scores.tolist(), strict=True))
            self.probe_aurocs[name] = auroc(scores, rows.labels)
            self.probes[name] = fit_probe(rows.hidden, rows.labels, PROBE_STRENGTHS[name])
        self.folds = self._split_sets()
        self._fit_approval()

    @property
    def inputs_of_set(self) -> dict[str, list[ReaderInput]]:
        """All responses of each set."""
        labeled = {name: rows.inputs for name, rows in self.labeled.items()}
        return labeled | {name: pairs.inputs for name, pairs in self.pairs.items()}

    def _split_sets(self) -> dict[str, Ints]:
        """Fold of each row by set. Validity pairs and mismatches have the same prompts, which share a fold."""
        folds = {"thumbs": split_groups(self.labeled["thumbs"].groups)}
        folds["preferences"] = split_groups(self.pairs["preferences"].groups)
        names = ("validity", "mismatches")
        return folds | dict(zip(names, split_together([self.pairs[name].groups for name in names]), strict=True))

    def _fit_approval(self) -> None:
        """Fit the probe `approval` to all rows, and fold by fold for its scores of the rows themselves."""
        rows: dict[str, HeadRows] = {}
        for name, set_weight in APPROVAL_SET_WEIGHTS.items():
            states = [self._hidden_states(inputs) for inputs in self._inputs_by_row(name)]
            if name in self.pairs:
                rows[name] = HeadRows(states[0] - states[1], None, set_weight, _weigh_kinds(self.pairs[name].kinds))
            else:
                labels = np.array(self.labeled[name].labels, dtype=np.float64)
                rows[name] = HeadRows(states[0], labels, set_weight, compute_sample_weight("balanced", labels))
        scores: dict[str, float] = {}
        self.out_of_fold["approval"] = scores
        for fold in range(FOLD_COUNT):
            probe = self._fit_approval_probe([_select(rows[name], self.folds[name] != fold) for name in rows])
            for name in rows:
                for inputs in self._inputs_by_row(name):
                    held_out = [item for item, own in zip(inputs, self.folds[name], strict=True) if own == fold]
                    values = probe.apply(self._hidden_states(held_out))
                    scores.update(zip((item.key for item in held_out), values.tolist(), strict=True))
        self.probes["approval"] = self._fit_approval_probe(list(rows.values()))
        thumbs = self.labeled["thumbs"]
        thumb_scores = np.array([scores[item.key] for item in thumbs.inputs])
        self.probe_aurocs["approval"] = auroc(thumb_scores, np.array(thumbs.labels, dtype=np.float64))

    def _inputs_by_row(self, name: str) -> list[list[ReaderInput]]:
        """The responses of a set's rows: one list for labeled rows, chosen and rejected for pairs."""
        if name in self.labeled:
            return [self.labeled[name].inputs]
        return [self.pairs[name].chosen, self.pairs[name].rejected]

    def _fit_approval_probe(self, sets: Sequence[HeadRows]) -> Probe:
        weights, biases = fit_sets(sets, APPROVAL_RIDGE)
        return Probe(weights, float(biases[0]))

    def _hidden_states(self, inputs: Sequence[ReaderInput]) -> Floats:
        return np.array([getattr(self.readings[item.key], PROBE_SOURCES["approval"]) for item in inputs])

    def _probe_rows(self, name: str) -> ProbeRows:
        labels: dict[str, float] = {}
        groups: dict[str, str] = {}

        def add(inputs: Sequence[ReaderInput], values: Sequence[float], names: Sequence[str]) -> None:
            for item, value, group in zip(inputs, values, names, strict=True):
                labels[item.key], groups[item.key] = value, group

        sets = {"taste": "thumbs", "offense": "offenses", "harm": "requests"}
        if name in sets:
            rows = self.labeled[sets[name]]
            add(rows.inputs, rows.labels, rows.groups)
        else:
            pairs = self.pairs["validity"]
            positive_kinds = {"stock": STOCK_KINDS, "misfit": MISFIT_KINDS, "refusal": ("comply",)}[name]
            for chosen, rejected, group, kind in zip(
                pairs.chosen, pairs.rejected, pairs.groups, pairs.kinds, strict=True
            ):
                # A phrase that stands under many prompts is one group for the probe that sees only the phrase.
                names = [group, group] if name == "misfit" else [chosen.response, rejected.response]
                if name == "refusal":
                    add((chosen, rejected), (float(kind == "comply"), 0.0), names)
                elif kind in positive_kinds:
                    add((chosen, rejected), (0.0, 1.0), names)
        keys = list(labels)
        hidden = np.array([getattr(self.readings[key], PROBE_SOURCES[name]) for key in keys])
        return ProbeRows(hidden, np.array([labels[key] for key in keys]), [groups[key] for key in keys], keys)

    def features(self, inputs: Sequence[ReaderInput]) -> Floats:
        """Features [N, F]; a probe's score of a row that it was fitted to is the out-of-fold one."""
        rows = []
        for item in inputs:
            reading = self.readings[item.key]
            probe_scores = {
                name: self.out_of_fold[name].get(
                    item.key, float(self.probes[name].apply(getattr(reading, PROBE_SOURCES[name])))
                )
                for name in PROBE_SOURCES
            }
            scores = ReadingScores(
                token_count=reading.token_count, prompt_logprob=reading.prompt_logprob,
                neutral_logprob=reading.neutral_logprob, end_logprob=reading.end_logprob, **probe_scores,
            )  # fmt: skip
            rows.append(build_features(item.messages, item.response, scores, is_finished=item.is_finished))
        return np.array(rows)

    def head_rows(self) -> dict[str, tuple[HeadRows, Ints]]:
        """Rows of each set for the heads, and the fold of each row."""
        rows: dict[str, tuple[HeadRows, Ints]] = {}
        for name, pairs in self.pairs.items():
            features = self.features(pairs.chosen) - self.features(pairs.rejected)
            rows[name] = HeadRows(features, None, SET_WEIGHTS[name], _weigh_kinds(pairs.kinds)), self.folds[name]
        thumbs = self.labeled["thumbs"]
        labels = np.array(thumbs.labels, dtype=np.float64)
        features = self.features(thumbs.inputs)
        rows["thumbs"] = (
            HeadRows(features, labels, SET_WEIGHTS["thumbs"], np.ones(len(labels))),
            self.folds["thumbs"],
        )
        return rows


def _weigh_kinds(kinds: Sequence[str]) -> Floats:
    """Weight [N] of each pair. Every kind counts equally: no fit may pay for the most frequent one with the others."""
    counts = Counter(kinds)
    return np.array([1.0 / counts[kind] for kind in kinds])


def fit_reader(fit: ReaderFit) -> tuple[dict[str, Any], dict[str, Any]]:
    """Heads fitted to all rows, and the figures of each set out of fold."""
    rows = fit.head_rows()
    heads = {}
    scores: dict[str, dict[str, Floats]] = {head: {} for head in HEADS}
    for head, (set_names, excluded) in HEADS.items():
        for name in rows:
            scores[head][name] = np.zeros(len(rows[name][1]))
        for fold in range(FOLD_COUNT):
            weights, _ = fit_head(
                [_select(rows[name][0], rows[name][1] != fold) for name in set_names], HEAD_RIDGE, excluded
            )
            for name, (head_rows, folds) in rows.items():
                scores[head][name][folds == fold] = head_rows.features[folds == fold] @ weights
        weights, _ = fit_head([rows[name][0] for name in set_names], HEAD_RIDGE, excluded)
        heads[head] = {"weights": describe_weights(weights), "bias": _head_bias(fit, weights)}
    return heads, {"probes": fit.probe_aurocs, **_summarize_folds(fit, scores)}


HEADS: dict[str, tuple[tuple[str, ...], frozenset[str]]] = {
    "fit": (("validity", "preferences"), frozenset({"taste", "approval", "length"})),
    "value": (("validity", "preferences", "mismatches", "thumbs"), frozenset({"length"})),
}
"""Head -> sets that it is fitted to, and features that it may not use: a longer response is not better for its length,
and whether a response fits its prompt is no matter of taste."""


def _select(rows: HeadRows, mask: NDArray[np.bool_]) -> HeadRows:
    labels = None if rows.labels is None else rows.labels[mask]
    return HeadRows(rows.features[mask], labels, rows.set_weight, rows.row_weights[mask])


def _head_bias(fit: ReaderFit, weights: Floats) -> float:
    """Bias with which a fitting and an unfitting response of the validity pairs have opposite mean log-odds."""
    pairs = fit.pairs["validity"]
    middle = np.mean([np.median(fit.features(inputs) @ weights) for inputs in (pairs.chosen, pairs.rejected)])
    return float(f"{-middle:.4g}")


def _summarize_folds(fit: ReaderFit, scores: Mapping[str, Mapping[str, Floats]]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    thumbs, preferences, validity = fit.labeled["thumbs"], fit.pairs["preferences"], fit.pairs["validity"]
    labels, ones = np.array(thumbs.labels, dtype=np.float64), np.ones(len(thumbs.labels))
    lengths = [np.array([len(item.response) for item in inputs], dtype=np.float64)
               for inputs in (preferences.chosen, preferences.rejected)]  # fmt: skip
    for head, by_set in scores.items():
        kinds = np.array(validity.kinds)
        figures[head] = {
            "thumbs_auroc": compute_auroc_interval(by_set["thumbs"], labels, ones, thumbs.groups, seed=0),
            "preferences_accuracy": _accuracy(by_set["preferences"], preferences.groups),
            "validity_accuracy": _accuracy(by_set["validity"], validity.groups),
            "mismatches_accuracy": _accuracy(by_set["mismatches"], fit.pairs["mismatches"].groups),
            "validity_by_kind": {
                kind: float((by_set["validity"][kinds == kind] > 0).mean()) for kind in sorted(set(kinds))
            },
        }
    figures["length_alone"] = {"preferences_accuracy": _accuracy(lengths[0] - lengths[1], preferences.groups)}
    return figures


def _accuracy(margins: Floats, groups: Sequence[str]) -> dict[str, float]:
    return compute_accuracy_interval(margins, np.ones(len(margins)), groups, seed=0)


def write_weights(fit: ReaderFit, heads: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
    """Write reader_weights.json: provenance, probes and heads."""
    probes = {
        name: {"weights": [float(f"{weight:.4g}") for weight in probe.weights], "bias": float(f"{probe.bias:.4g}")}
        for name, probe in fit.probes.items()
    }
    content = {"provenance": provenance, "heads": heads, "probes": probes}
    text = json.dumps(content, indent=1)
    # One line per probe instead of one per number.
    text = re.sub(r"\[\s+([^\]]*?)\s+\]", lambda match: "[" + re.sub(r"\s+", " ", match[1]) + "]", text)
    WEIGHTS_PATH.write_text(text + "\n", "utf-8")


def read_phrases() -> None:
    """Read each phrase of the claims' composer after a few prompts of each topic and write the mean readings."""
    prompts_of_topic: defaultdict[str, list[SimulatedPrompt]] = defaultdict(list)
    for prompt in load_prompts():
        if prompt.split == "train" and len(prompts_of_topic[prompt.topic]) < PHRASE_PROMPTS:
            prompts_of_topic[prompt.topic].append(prompt)
    reader = load_reader(resolve_cache_folder(Settings()))
    phrases = [phrase for phrase in dict.fromkeys((*OPENERS, *MIDDLES, *CLOSINGS)) if phrase]
    # All at once, so that the model reads full batches; the loop below finds every reading in the reader's memory.
    all_prompts = [prompt for prompts in prompts_of_topic.values() for prompt in prompts]
    reader.read([ReaderInput(prompt.messages, phrase, True) for prompt in all_prompts for phrase in phrases])
    content: dict[str, dict[str, Any]] = {}
    for topic, prompts in prompts_of_topic.items():
        content[topic] = {}
        for phrase in phrases:
            readings = reader.read([ReaderInput(prompt.messages, phrase, True) for prompt in prompts])
            columns = {name: [asdict(reading)[name] for reading in readings] for name in asdict(readings[0])}
            means = {name: round(float(np.mean(values)), 4) for name, values in columns.items()}
            content[topic][phrase] = {**means, "token_count": readings[0].token_count}
    lines = ",\n".join(f'"{topic}": {json.dumps(rows, ensure_ascii=False)}' for topic, rows in content.items())
    PHRASE_READINGS.write_text("{\n" + lines + "\n}\n", "utf-8")


def print_rates(target: float) -> None:
    """Print the natural love rate and mean scores of each version, and the intercept with which plain has `target`."""
    version_names = [f"base-{version.name}" for version in MODEL_VERSIONS]
    served_rows = read_served_responses(find_sample_log("feedback"), version_names)
    reader = load_reader(resolve_cache_folder(Settings()))
    rates: dict[str, Any] = {}
    for version, rows in zip(MODEL_VERSIONS, served_rows, strict=True):
        truths = reader.score_responses([ReaderInput.from_row(row) for row in rows])
        topics = [row["topic"] for row in rows]
        scores = {name: float(np.mean([asdict(truth)[name] for truth in truths])) for name in asdict(truths[0])}
        rates[version.name] = {"love": float(expected_love_probability(truths, topics).mean()), **scores}
        if version.name == "plain":
            logits = love_logits_by_user(truths, topics, user_count=400)
            rates["love_intercept_for_target"] = WORLD.love_intercept + find_logit_shift(logits, target)
    sys.stdout.write(json.dumps(round_for_json(rates)) + "\n")


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("fit", "phrases", "rates"))
    parser.add_argument("--data", type=Path, help="folder of the shared data sets (fit)")
    parser.add_argument("--readings", type=Path, help="folder for the readings (fit)")
    parser.add_argument("--target", type=float, default=0.02, help="love rate of the plain version (rates)")
    args = parser.parse_args()
    if args.command != "fit":
        read_phrases() if args.command == "phrases" else print_rates(args.target)
        return
    if args.data is None or args.readings is None:
        parser.error("fit needs --data and --readings")
    fit = ReaderFit(args.data, args.readings)
    heads, figures = fit_reader(fit)
    digest = hash_files([args.data / name for name in DATA_FILES] + [EXAMPLES_PATH, REFUSALS_PATH])
    counts = {name: len(inputs) for name, inputs in fit.inputs_of_set.items()}
    provenance = {
        "command": "python benchmarks/reader.py fit", "model": READER_MODEL, "data": list(DATA_FILES),
        "data_digest": digest, "responses": counts, "out_of_fold": round_for_json(figures),
    }  # fmt: skip
    write_weights(fit, heads, provenance)
    sys.stdout.write(json.dumps(provenance) + "\n")


if __name__ == "__main__":
    main()
