"""Score with a trained reward model: batches sorted by length under a token budget, calibrated values.

Scoring is float32 on every device; probe features and calibration are computed in float32 too, so that a head is
calibrated on the logits it later gives. In bfloat16 scoring on CPUs was 1.7 times as fast, but the score of a response
then differed by up to 0.004 between a single row and a batch (float32: less than 1e-6). Reward models are small
compared with the policy.

An ensemble needs one pass through the deepest model for all members that are truncations of it. Decoders also read each
conversation only once for all of its messages that are scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from rluf.config.reward import HeadReading, Pooling
from rluf.errors import ModelError
from rluf.reward.backbone import (
    HEAD_MODULE_NAMES,
    build_text_encoder,
    find_final_norm_or_pooler,
    get_layer_list,
    get_linear_head,
    load_classifier,
)
from rluf.reward.calibration import Calibration
from rluf.reward.external import check_label_count
from rluf.reward.shared_backbone import load_heads
from rluf.reward.text import SCORING_BATCH_TOKENS, EncodedItem, TextEncoder, iter_shared_batches, plan_token_batches
from rluf.types import Score, ScoringItem
from rluf.utils.stats import Floats, sigmoid

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def get_member_folder(folder: Path, member_index: int) -> Path:
    """Folder of an ensemble member; the first is the model folder itself, so that plain transformers can load it."""
    return folder if member_index == 0 else folder / f"member-{member_index}"


def _load_calibration(folder: Path) -> Calibration:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json; name a reward model folder written by rluf.reward")
    return Calibration.load(folder)


class CapturePoints(NamedTuple):
    """Modules of a model at which HeadInputCapture finds what heads read."""

    readings: tuple[HeadReading, ...]
    head: torch.nn.Linear | None
    """The model's head, whose input is captured; None with readings at several depths."""
    layers: tuple[torch.nn.Module, ...] = ()
    """The last layer of each depth, shallowest first, where the head is not captured."""
    final_module: torch.nn.Module | None = None
    """A decoder's last norm or an encoder's pooler, applied to the output of each of `layers`."""


NO_CAPTURE = CapturePoints((), None)


def find_capture_points(model: PreTrainedModel, readings: Sequence[HeadReading] = (HeadReading(),)) -> CapturePoints:
    """Where the inputs of heads are captured; `readings` at a single depth are of the whole model, which ends there.

    Raises ModelError when the model has no linear head, or cannot be read at several depths.
    """
    depths = sorted({reading.layers for reading in readings})
    if len(depths) == 1:
        return CapturePoints(tuple(readings), get_linear_head(model))
    final_module = find_final_norm_or_pooler(model)
    if final_module is None:
        raise ModelError(
            f"{type(model).__name__} has neither a last norm nor a pooler, so one pass cannot "
            "read it at several depths; set a single entry in members"
        )
    layers = get_layer_list(model)
    return CapturePoints(tuple(readings), None, tuple(layers[depth - 1] for depth in depths), final_module)


class HeadInputCapture:
    """Capture the input of the head during forward passes: the last token (decoders) or the pooler (encoders).

    A reading may ask for the response's own tokens in place of the last one. With readings at several depths,
    capture what the head would read if only so many of the lowest layers existed, so that one pass serves several
    members of an ensemble.
    """

    def __init__(self, points: CapturePoints) -> None:
        """Capture until `close`; a model has one capture at a time."""
        self.captured_states: list[torch.Tensor] = []
        self._points = points
        # At a single depth the hook on the head sees exactly what the head reads. At several the head is not involved:
        # each layer's output goes through the final norm or pooler here, as in a model truncated after that layer.
        # Layers run lowest first, so the captured states are in ascending order of depth.
        self._hooks = [layer.register_forward_hook(self._capture_layer_output) for layer in points.layers]
        if points.head is not None:
            self._hooks.append(points.head.register_forward_pre_hook(self._capture_head_input))

    def _capture_head_input(self, _module: torch.nn.Module, args: Any) -> None:
        self.captured_states.append(args[0].detach())

    def _capture_layer_output(self, _module: torch.nn.Module, _args: Any, output: Any) -> None:
        hidden_states = output[0] if isinstance(output, tuple) else output
        if self._points.final_module is not None:
            self.captured_states.append(self._points.final_module(hidden_states).detach())

    def take_features(self, readers: Sequence[tuple[int, EncodedItem]]) -> Floats:
        """Features [readings, N, H] of the last forward pass for (row of the batch, item that is read there) pairs.

        An item whose response has no tokens is read at its last token.
        """
        readings = self._points.readings
        depths = sorted({reading.layers for reading in readings})
        states_by_depth = dict(zip(depths, self.captured_states, strict=True))
        features = [self._read_states(states_by_depth[reading.layers], readers, reading) for reading in readings]
        self.captured_states.clear()
        return torch.stack(features).float().cpu().numpy().astype(np.float64)

    def _read_states(
        self, states: torch.Tensor, readers: Sequence[tuple[int, EncodedItem]], reading: HeadReading
    ) -> torch.Tensor:
        rows = torch.tensor([row for row, _ in readers])
        # Decoders apply the head to every token [B, T, H], encoders to the pooled output [B, H].
        if states.dim() == 2:
            return states[rows]
        last_tokens = states[rows, torch.tensor([len(item) - 1 for _, item in readers])]
        if reading.pooling == "last":
            return last_tokens
        spans = [item.response_span for _, item in readers]
        if reading.pooling == "response_end":
            spans = [(max(start, end - 1), end) for start, end in spans]
        return torch.stack(
            [
                states[row, start:end].float().mean(0).to(states.dtype) if end > start else last_token
                for (row, _), (start, end), last_token in zip(readers, spans, last_tokens, strict=True)
            ]
        )

    def close(self) -> None:
        """Remove the hooks from the model."""
        for hook in self._hooks:
            hook.remove()


@dataclass(frozen=True, slots=True)
class SharedForward:
    """One forward pass: the model to run and the members it serves, with their heads and where these read it.

    `heads` and the points are empty when the model's head is not linear.
    """

    model: PreTrainedModel
    member_indices: tuple[int, ...]
    heads: tuple[torch.nn.Linear, ...]
    capture_points: CapturePoints


def plan_forward_passes(
    models: Sequence[PreTrainedModel], response_only: Sequence[bool], poolings: Sequence[Pooling]
) -> list[SharedForward]:
    """Plan the passes that serve all models, each model in one pass.

    A model whose head is not linear gets a pass without heads. Members that read only the response do not share a pass
    with members that read the conversation.
    """
    heads = [_find_linear_head(model) for model in models]
    layer_counts = [len(get_layer_list(model)) if len(models) > 1 else 0 for model in models]
    # Deepest first: a pass through the deepest model passes through every truncation of it.
    remaining = sorted(range(len(models)), key=lambda index: -layer_counts[index])
    forward_passes = []
    while remaining:
        deepest = remaining[0]
        truncations = [
            index
            for index in remaining[1:]
            if heads[deepest]
            and heads[index]
            and response_only[deepest] == response_only[index]
            and _is_truncation_of(models[deepest], models[index])
        ]
        # Shallowest first; the model that runs comes last.
        served = sorted([deepest, *truncations], key=lambda index: layer_counts[index])
        served_heads = tuple(head for head in (heads[index] for index in served) if head is not None)
        readings = tuple(HeadReading(layer_counts[index], poolings[index]) for index in served)
        capture_points = find_capture_points(models[deepest], readings) if served_heads else NO_CAPTURE
        forward_passes.append(SharedForward(models[deepest], tuple(served), served_heads, capture_points))
        remaining = [index for index in remaining if index not in served]
    return forward_passes


def _find_linear_head(model: PreTrainedModel) -> torch.nn.Linear | None:
    try:
        return get_linear_head(model)
    except ModelError:
        return None


def _is_truncation_of(deep_model: PreTrainedModel, shallow_model: PreTrainedModel) -> bool:
    """Whether `shallow_model` consists of the lowest layers of `deep_model`, or of all, with another head."""
    if type(deep_model) is not type(shallow_model) or find_final_norm_or_pooler(deep_model) is None:
        return False
    if len(get_layer_list(shallow_model)) > len(get_layer_list(deep_model)):
        return False
    # Compare the weights themselves: members may come from different folders, or have been trained apart.
    deep_weights, shallow_weights = deep_model.state_dict(), shallow_model.state_dict()
    backbone_names = [name for name in shallow_weights if name.partition(".")[0] not in HEAD_MODULE_NAMES]
    return all(
        name in deep_weights and torch.equal(deep_weights[name], shallow_weights[name]) for name in backbone_names
    )


@torch.inference_mode()
def compute_shared_logits(
    forward_pass: SharedForward, encoder: TextEncoder, rows: Sequence[EncodedItem], batch_tokens: int
) -> Floats:
    """Logits [members of the pass, N, logits per head] of rows, in order."""
    logits = np.zeros((len(forward_pass.member_indices), len(rows), forward_pass.heads[0].out_features))
    device = next(forward_pass.model.parameters()).device
    # The heads are applied here, in float64: the model's own head reads only the deepest layer.
    heads = [
        (_to_float64(head.weight).T, 0.0 if head.bias is None else _to_float64(head.bias))
        for head in forward_pass.heads
    ]
    capture = HeadInputCapture(forward_pass.capture_points)
    try:
        for batch, readers in iter_shared_batches(
            rows, is_causal=not encoder.uses_text_pairs, batch_tokens=batch_tokens
        ):
            inputs = encoder.collate([rows[index] for index in batch])
            forward_pass.model(**{name: tensor.to(device) for name, tensor in inputs.items()})
            # A row that is a prefix of another is read at its own tokens of the longer row.
            features = capture.take_features([(batch_index, rows[row]) for batch_index, row in readers])
            row_indices = [row_index for _, row_index in readers]
            for head_index, (weight, bias) in enumerate(heads):
                logits[head_index, row_indices] = features[head_index] @ weight + bias
    finally:
        capture.close()
    return logits


def _to_float64(parameter: torch.Tensor) -> Floats:
    return parameter.detach().float().cpu().numpy().astype(np.float64)


class RewardModel:
    """One objective's reward model: the models of its members, a text encoder and a calibration."""

    def __init__(
        self, members: Sequence[PreTrainedModel], encoder: TextEncoder, calibration: Calibration, batch_tokens: int
    ) -> None:
        """`batch_tokens` limits the padded tokens of one forward pass."""
        self.members = [member.eval() for member in members]
        self.encoder = encoder
        self.calibration = calibration
        if calibration.is_external:
            # The model's own head and pooling: where it reads its input is part of how it was trained.
            self._forward_passes = [SharedForward(self.members[0], (0,), (), NO_CAPTURE)]
        else:
            self._forward_passes = plan_forward_passes(
                self.members,
                [member_encoder.response_only for member_encoder in self._list_member_encoders()],
                calibration.member_poolings or tuple("last" for _ in self.members),
            )
        self.batch_tokens = batch_tokens

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        batch_tokens: int = SCORING_BATCH_TOKENS,
        device: str = "cpu",
        head_folders: Sequence[Path] = (),
    ) -> RewardModel:
        """Load a folder written by rluf.reward, or any Hugging Face model for sequence classification.

        Raises ModelError that names the problem with it.

        `head_folders` are the folders of several heads on one backbone, `path` among them: the model then has a logit
        for each head, in order.
        """
        path = Path(path).expanduser()
        calibration = _load_calibration(path)
        folders = [get_member_folder(path, index) for index in range(calibration.member_count)]
        head_count = None if calibration.is_external else 1
        members = [
            load_classifier(folder, require_all_weights=True, device=device, head_count=head_count)
            for folder in folders
        ]
        if calibration.is_external:
            check_label_count(members[0].config, path)
        if len(head_folders) > 1:
            for index, member in enumerate(members):
                load_heads(member, [get_member_folder(folder, index) for folder in head_folders])
        encoders = [
            build_text_encoder(
                member,
                folder,
                calibration.max_tokens,
                read_at_next_turn=calibration.read_at_next_turn,
                is_single_model=len(folders) < 2,
                response_only=index in calibration.response_only_members,
                mark_truncated=calibration.mark_truncated,
                locate_responses=bool(calibration.member_poolings),
            )
            for index, (member, folder) in enumerate(zip(members, folders, strict=True))
        ]
        # Members that read the same ids share one encoder: each text is then tokenized once.
        if not all(encoder.is_equivalent_to(encoders[0]) for encoder in encoders):
            encoders[0].member_encoders = tuple(encoders[1:])
        return cls(members, encoders[0], calibration, batch_tokens)

    def score(self, items: Sequence[ScoringItem], objective: str) -> list[Score]:
        """Scores of items, in order: calibrated probability, raw logit and spread.

        The spreads are the standard deviations of the members' own probabilities and calibrated logits; 0 for a single
        model and for members with a shared head.
        """
        rows = self.encoder.encode(items)
        return _build_scores(objective, self.calibration, self.compute_member_logits(rows), rows)

    def compute_raw_logits(self, rows: Sequence[EncodedItem]) -> list[float]:
        """Uncalibrated logits of encoded rows, in order: the weighted mean over the members."""
        logits: list[float] = self.calibration.pool_members(self.compute_member_logits(rows)).tolist()
        return logits

    def compute_member_logits(self, rows: Sequence[EncodedItem]) -> Floats:
        """Uncalibrated logits [members, N] of encoded rows."""
        return self.compute_head_logits(rows)[:, :, 0]

    def compute_head_logits(self, rows: Sequence[EncodedItem]) -> Floats:
        """Uncalibrated logits [members, N, heads] of encoded rows."""
        logits = np.zeros((len(self.members), len(rows), self.members[0].config.num_labels))
        for forward_pass in self._forward_passes:
            # The deepest member of a pass comes last; it runs, so the text is encoded as it reads it.
            member_index = forward_pass.member_indices[-1]
            encoder = self._list_member_encoders()[member_index]
            member_rows = [
                row.member_encodings[member_index - 1] if member_index and row.member_encodings else row for row in rows
            ]
            if forward_pass.heads:
                pass_logits = compute_shared_logits(forward_pass, encoder, member_rows, self.batch_tokens)
                logits[list(forward_pass.member_indices)] = pass_logits
            else:
                logits[member_index] = compute_logits(forward_pass.model, encoder, member_rows, self.batch_tokens)
        if self.calibration.is_external and logits.shape[2] == 2:
            return logits[:, :, 1:] - logits[:, :, :1]
        return logits

    def _list_member_encoders(self) -> Sequence[TextEncoder]:
        if self.encoder.member_encoders:
            return (self.encoder, *self.encoder.member_encoders)
        return [self.encoder] * len(self.members)


class SharedBackboneModel:
    """Reward models that are heads of one backbone (or a single model): one forward pass gives all their scores."""

    def __init__(self, model: RewardModel, calibrations: Mapping[str, Calibration]) -> None:
        """`model` has a logit for each of `calibrations` (by objective), in order."""
        self.model, self.calibrations = model, calibrations

    @classmethod
    def load(cls, folders: Mapping[str, Path], *, batch_tokens: int, device: str = "cpu") -> SharedBackboneModel:
        """Load the folders of heads that were trained together. Raises ModelError that names the problem with one."""
        head_folders = list(folders.values())
        model = RewardModel.load(head_folders[0], batch_tokens=batch_tokens, device=device, head_folders=head_folders)
        return cls(model, {objective: Calibration.load(folder) for objective, folder in folders.items()})

    def score(self, items: Sequence[ScoringItem]) -> dict[str, list[Score]]:
        """Scores of items in order, by objective."""
        if not items:
            return {objective: [] for objective in self.calibrations}
        rows = self.model.encoder.encode(items)
        head_logits = self.model.compute_head_logits(rows)
        return {
            objective: _build_scores(objective, calibration, head_logits[:, :, head_index], rows)
            for head_index, (objective, calibration) in enumerate(self.calibrations.items())
        }


def load_reward_scorer(
    folders: Mapping[str, Path], *, batch_tokens: int, device: str = "cpu"
) -> Callable[[Sequence[ScoringItem]], dict[str, list[Score]]]:
    """Load the reward models of these objectives as one scoring function; heads of one backbone share a pass."""
    folders_by_backbone: dict[str, dict[str, Path]] = {}
    for objective, folder in folders.items():
        # A separate model has no backbone hash and gets a key of its own.
        backbone_key = _load_calibration(folder).backbone_hash or f"separate {objective}"
        folders_by_backbone.setdefault(backbone_key, {})[objective] = folder
    models = [
        SharedBackboneModel.load(head_folders, batch_tokens=batch_tokens, device=device)
        for head_folders in folders_by_backbone.values()
    ]

    def score_items(items: Sequence[ScoringItem]) -> dict[str, list[Score]]:
        scores = {objective: head_scores for model in models for objective, head_scores in model.score(items).items()}
        return {objective: scores[objective] for objective in folders}

    return score_items


def _build_scores(
    objective: str, calibration: Calibration, member_logits: Floats, rows: Sequence[EncodedItem]
) -> list[Score]:
    """Scores of N encoded rows from the members' logits [members, N]."""
    raw_logits = calibration.pool_members(member_logits)
    probabilities = calibration.compute_probabilities(raw_logits)
    spreads = logit_spreads = np.zeros_like(probabilities)
    if not calibration.shared_head:
        member_calibrated = calibration.calibrate_logits(member_logits)
        spreads, logit_spreads = sigmoid(member_calibrated).std(0), member_calibrated.std(0)
    columns = zip(probabilities.tolist(), raw_logits.tolist(), spreads.tolist(), logit_spreads.tolist(), strict=True)
    return [
        Score(
            objective,
            probability,
            raw_logit,
            spread,
            logit_spread=logit_spread,
            exact_logit=raw_logit if calibration.is_external else None,
            is_cut=row.dropped_prompt_tokens + row.dropped_response_tokens > 0,
        )
        for row, (probability, raw_logit, spread, logit_spread) in zip(rows, columns, strict=True)
    ]


@torch.inference_mode()
def compute_logits(
    model: torch.nn.Module, encoder: TextEncoder, rows: Sequence[EncodedItem], batch_tokens: int
) -> Floats:
    """Logits [N, heads] of `rows` in order, batched by length. `model` returns an object with logits [B, heads]."""
    logits_by_row: list[list[float]] = [[]] * len(rows)
    device = next(model.parameters()).device
    for batch in plan_token_batches([len(row) for row in rows], batch_tokens):
        inputs = encoder.collate([rows[row_index] for row_index in batch])
        batch_logits = model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits
        for row_index, row_logits in zip(batch, batch_logits.float().tolist(), strict=True):
            logits_by_row[row_index] = row_logits
    return np.asarray(logits_by_row, dtype=np.float64) if rows else np.empty((0, 1))
