"""What a frozen language model reads in a response: does it fit this prompt, has it ended, and what it is about.

The model is the embedded SmolLM2-135M-Instruct (rluf.config.run.READER_MODEL), never trained. A rule of the settings
refuses reward models on this backbone while simulated users judge the run: they would be graded by their own features.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rluf.config.cpu_dtype import Dtype, detect_cpu_dtype
from rluf.models.hub import load_tokenizer, render_prompt
from rluf.types import Message
from rluf.utils.stats import Floats

if TYPE_CHECKING:
    import torch

READER_SYSTEM_MESSAGE = Message(role="system", content="You are a helpful AI assistant.")
"""Replaces the system messages of a conversation, so that the score does not depend on the served instruction."""
NEUTRAL_PROMPT = "Say something."
"""What is as likely after this prompt as after its own does not answer its own. A second fixed prompt decided no more
of the validity pairs (benchmarks/lab/reader_data.py), and each costs one more pass over every response."""
NEXT_TURN = "<|im_end|>\n<|im_start|>user\n"
"""End of the response's turn and opening of the user's next one, where the model is about to give the reaction."""
MIDDLE_DEPTH = 0.6
"""Share of the layers after which `middle_hidden` is taken: layer 18 of 30."""
MAX_PROMPT_TOKENS = 160
MAX_RESPONSE_TOKENS = 80
"""Longer texts are read in part: the end of a prompt, the start of a response."""
MAX_BATCH_TOKENS = 1600
"""Padded tokens per forward pass; more is not faster on a CPU."""
TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """What the model measured of one response with T tokens.

    `prompt_logprob` is log p(response | prompt) and `neutral_logprob` the same after NEUTRAL_PROMPT, both in nats and
    summed over T; `end_logprob` is the log-probability of the end of the turn after the response. Of the last layer,
    `last_hidden` [H] is the value at the response's last token and `prompt_hidden` [H] at the end of the prompt, and
    `neutral_hidden` [H] is the mean over the response's tokens after NEUTRAL_PROMPT. `middle_hidden` [2H] is of the
    layer at MIDDLE_DEPTH: the value at the end of NEXT_TURN, then the mean over the response's tokens.
    """

    token_count: int
    prompt_logprob: float
    neutral_logprob: float
    end_logprob: float
    last_hidden: Floats
    prompt_hidden: Floats
    neutral_hidden: Floats
    middle_hidden: Floats


@dataclass(frozen=True, slots=True)
class _Continuation:
    """Log-probabilities [T + 1] of a response and the end of the turn, and hidden states [H] or [2H] (see Reading)."""

    logprobs: Floats
    mean_hidden: Floats
    last_hidden: Floats
    prompt_hidden: Floats
    middle_hidden: Floats


class ReaderModel:
    """The frozen model with its tokenizer.

    In bfloat16 where the device multiplies it, half the time of float32; scores are computed from float32 logits.
    """

    def __init__(self, folder: Path, device: str = "cpu", dtype: Dtype | None = None) -> None:
        """Load from a resolved model folder onto `device`; `dtype` overrides what the device multiplies.

        Raises ModelError if there is no usable tokenizer.
        """
        import torch
        from transformers import AutoModelForCausalLM

        self.tokenizer = load_tokenizer(folder)
        self.device = torch.device(device)
        torch_dtype = getattr(torch, dtype or (detect_cpu_dtype() if self.device.type == "cpu" else "bfloat16"))
        self.model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch_dtype).to(self.device).eval()
        self.next_turn = self._encode(NEXT_TURN)
        self.end_token = self.next_turn[0]
        self.middle_layer = round(MIDDLE_DEPTH * self.model.config.num_hidden_layers)
        self.neutral_prompt = self._encode_prompt((Message(role="user", content=NEUTRAL_PROMPT),))

    def read(self, conversations: Sequence[Sequence[Message]], responses: Sequence[str]) -> list[Reading]:
        """Read response i as the answer to conversation i. Batches change the result by rounding only.

        The keys and values of each distinct prompt are computed once and serve all its responses.
        """
        response_ids = [self._encode(text)[:MAX_RESPONSE_TOKENS] for text in responses]
        own_jobs = [
            (self._encode_prompt(messages), tokens)
            for messages, tokens in zip(conversations, response_ids, strict=True)
        ]
        all_jobs = {*own_jobs, *((self.neutral_prompt, tokens) for tokens in response_ids)}
        results = dict(self._score_jobs(all_jobs))
        return [self._build_reading(results, job) for job in own_jobs]

    def _build_reading(
        self, results: dict[tuple[TokenIds, TokenIds], _Continuation], job: tuple[TokenIds, TokenIds]
    ) -> Reading:
        own, neutral = results[job], results[self.neutral_prompt, job[1]]
        return Reading(
            token_count=len(job[1]),
            prompt_logprob=float(own.logprobs[:-1].sum()),
            neutral_logprob=float(neutral.logprobs[:-1].sum()),
            end_logprob=float(own.logprobs[-1]),
            last_hidden=own.last_hidden,
            prompt_hidden=own.prompt_hidden,
            neutral_hidden=neutral.mean_hidden,
            middle_hidden=own.middle_hidden,
        )

    def _encode(self, text: str) -> TokenIds:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _encode_prompt(self, messages: Sequence[Message]) -> TokenIds:
        turns = [message for message in messages if message["role"] != "system"]
        return render_prompt(self.tokenizer, (READER_SYSTEM_MESSAGE, *turns))[-MAX_PROMPT_TOKENS:]

    def _score_jobs(
        self, jobs: set[tuple[TokenIds, TokenIds]]
    ) -> Iterator[tuple[tuple[TokenIds, TokenIds], _Continuation]]:
        """Score (prompt, response) jobs; prompts of similar length share a batch, and so do their responses."""
        import torch

        responses_of_prompt: defaultdict[TokenIds, list[TokenIds]] = defaultdict(list)
        for prompt, response in sorted(jobs, key=lambda job: (len(job[0]), job)):
            responses_of_prompt[prompt].append(response)
        prompts = list(responses_of_prompt)
        for prompt_block in _split_by_padded_length([len(prompt) for prompt in prompts], MAX_BATCH_TOKENS):
            block_prompts = [prompts[index] for index in prompt_block]
            block_jobs = [(row, tokens) for row, p in enumerate(block_prompts) for tokens in responses_of_prompt[p]]
            block_jobs.sort(key=lambda job: len(job[1]))
            with torch.inference_mode():
                prefix = self._read_prompts(block_prompts)
                lengths = [1 + len(tokens) + len(self.next_turn) for _, tokens in block_jobs]
                for batch in _split_by_padded_length(lengths, MAX_BATCH_TOKENS // 2):
                    batch_jobs = [block_jobs[index] for index in batch]
                    for (row, tokens), result in zip(batch_jobs, self._score_batch(prefix, batch_jobs), strict=True):
                        yield (block_prompts[row], tokens), result

    def _read_prompts(self, prompts: Sequence[TokenIds]) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """Cache of all but the last token of each prompt, left-padded, with its mask and the last tokens [B]."""
        import torch
        from transformers import DynamicCache

        width = max(len(prompt) for prompt in prompts) - 1
        token_ids = torch.full((len(prompts), width), self.end_token, device=self.device)
        mask = torch.zeros((len(prompts), width), dtype=torch.long, device=self.device)
        for row, prompt in enumerate(prompts):
            token_ids[row, width - len(prompt) + 1 :] = torch.tensor(prompt[:-1], device=self.device)
            mask[row, width - len(prompt) + 1 :] = 1
        cache = DynamicCache()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        self.model.model(
            input_ids=token_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        last_tokens = torch.tensor([prompt[-1] for prompt in prompts], device=self.device)
        return cache, mask, last_tokens

    def _score_batch(
        self, prefix: tuple[Any, torch.Tensor, torch.Tensor], jobs: Sequence[tuple[int, TokenIds]]
    ) -> list[_Continuation]:
        """Score the responses of `jobs` (row of the prefix, tokens of the response), right-padded."""
        import torch
        from transformers import DynamicCache

        cache, prefix_mask, last_tokens = prefix
        rows = torch.tensor([row for row, _ in jobs], device=self.device)
        width = 1 + max(len(tokens) for _, tokens in jobs) + len(self.next_turn)
        token_ids = torch.full((len(jobs), width), self.end_token, device=self.device)
        mask = torch.zeros((len(jobs), width), dtype=torch.long, device=self.device)
        is_scored = torch.zeros((len(jobs), width), dtype=torch.bool, device=self.device)
        token_ids[:, 0] = last_tokens[rows]
        for index, (_, tokens) in enumerate(jobs):
            length = len(tokens) + len(self.next_turn)
            token_ids[index, 1 : 1 + length] = torch.tensor(tokens + self.next_turn, device=self.device)
            mask[index, : 1 + length] = 1
            is_scored[index, 1 : 2 + len(tokens)] = True  # the response and the end of its turn
        row_cache = DynamicCache([(layer.keys[rows], layer.values[rows]) for layer in cache.layers])
        positions = prefix_mask[rows].sum(1, keepdim=True) + torch.arange(width, device=self.device)
        output = self.model.model(
            input_ids=token_ids,
            attention_mask=torch.cat([prefix_mask[rows], mask], dim=1),
            position_ids=positions,
            past_key_values=row_cache,
            use_cache=True,
            output_hidden_states=True,
        )
        hidden, middle = output.last_hidden_state, output.hidden_states[self.middle_layer]
        # Only scored positions pass the output layer, a fifth of the model's work.
        is_scored = is_scored[:, 1:]
        logits = self.model.lm_head(hidden[:, :-1][is_scored]).float()
        targets = token_ids[:, 1:][is_scored]
        scored_logprobs = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)
        logprobs = torch.zeros(is_scored.shape, device=self.device).masked_scatter(is_scored, scored_logprobs)
        results = []
        for index, (_, tokens) in enumerate(jobs):
            length = len(tokens)
            read_positions = slice(1, 1 + length) if length else slice(0, 1)
            mean_hidden = hidden[index, read_positions].mean(0)
            middle_hidden = torch.cat(
                [middle[index, length + len(self.next_turn)], middle[index, read_positions].mean(0)]
            )
            arrays = (
                logprobs[index, : length + 1], mean_hidden, hidden[index, length], hidden[index, 0], middle_hidden,
            )  # fmt: skip
            results.append(_Continuation(*(array.float().cpu().numpy().astype(np.float64) for array in arrays)))
        return results


def _split_by_padded_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Split indices of ascending `lengths` into batches of at most `max_tokens` with padding (at least one each)."""
    batch: list[int] = []
    for index, length in enumerate(lengths):
        if batch and (len(batch) + 1) * length > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
