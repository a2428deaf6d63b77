"""Log-probabilities of logged responses under another policy, for off-policy evaluation."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rluf.algorithms.policy_model import compute_target_logprobs, load_policy
from rluf.models.chat import RejectedConversationError, encode_texts, render_prompt
from rluf.models.hub import load_tokenizer
from rluf.models.turn_end import find_response_end_id

logger = logging.getLogger(__name__)


def compute_target_scores(policy_folder: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Log-probability (nats) of each logged response under a policy, at the temperature of its row, by row id.

    `rows` have id, messages, response, finish_reason, temperature, response_tokens and response_logprob. A row gets no
    score when it has no response_logprob or temperature, or when its text is encoded as another number of tokens than
    were sampled: then the log-probability would be of other tokens. Such rows are counted in one warning.
    """
    tokenizer = load_tokenizer(policy_folder)
    end_id = find_response_end_id(tokenizer)
    model = load_policy(policy_folder, dtype=torch.float32, is_packed=False).eval()
    scores: dict[str, float] = {}
    other_token_count = 0
    for row in rows:
        if row["response_logprob"] is None or not row["temperature"]:
            continue
        response_ids = encode_texts(tokenizer, [row["response"]])[0]
        if row["finish_reason"] != "length":
            response_ids = [*response_ids, end_id]
        try:
            prompt_ids = render_prompt(tokenizer, row["messages"])
        except RejectedConversationError:
            continue
        if len(response_ids) != row["response_tokens"]:
            other_token_count += 1
            continue
        token_ids = torch.tensor([[*prompt_ids, *response_ids]])
        with torch.inference_mode():
            logits = model(input_ids=token_ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1]
            logprobs = compute_target_logprobs(logits, torch.tensor(response_ids), row["temperature"])
        scores[row["id"]] = float(logprobs.double().sum())
    if other_token_count:
        logger.warning(
            "policy %s: rows left out: count=%d of %d; their text is encoded as another number of tokens than were "
            "sampled", policy_folder, other_token_count, len(rows),
        )  # fmt: skip
    return scores
