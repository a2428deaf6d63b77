"""Resolve a model path (embedded name, folder or hub id) to a local Hugging Face folder; tokenizer, chat template.

The folder has safetensors, config, tokenizer and, for policies, a chat template, so that transformers, vLLM and
DeepSpeed can read it. Heavy imports stay inside the functions that need them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rluf.errors import ModelError
from rluf.models.embedded import list_embedded_models, resolve_embedded_model
from rluf.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["list_embedded_models", "load_tokenizer", "render_prompt", "resolve_model"]

HUB_ID_PATTERN = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
HUB_FILE_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
"""Files to download: no pickles, whose loading would run code, and no weights in other formats."""


def resolve_model(model_path: str, cache_folder: Path) -> Path:
    """Local folder of the model `model_path`; embedded models are built once in `cache_folder`/models/<name>.

    `model_path` is an embedded name, a Hugging Face folder, or a hub id (owner/name, downloaded into Hugging Face's own
    cache). Processes may ask for the same model at once: one builds it, the others wait, and a killed build leaves
    nothing that looks finished. Raises ModelError with what is missing and what to do.
    """
    if model_path in list_embedded_models():
        return _check_model_folder(resolve_embedded_model(model_path, cache_folder / "models"))
    folder = Path(model_path).expanduser()
    if folder.exists():
        return _check_model_folder(folder)
    if HUB_ID_PATTERN.match(model_path):
        return _check_model_folder(_download_from_hub(model_path))
    embedded_names = ", ".join(list_embedded_models())
    raise ModelError(
        f"model {model_path!r} is neither an embedded name ({embedded_names}), nor a folder, nor a hub id "
        "(owner/name); check the path"
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load the fast tokenizer of a resolved model folder. Raises ModelError if it cannot be read or is a slow one."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"no tokenizer could be read from {folder}: {error}; add tokenizer.json to it") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(f"the tokenizer in {folder} is not a fast one; add a tokenizer.json to the folder")
    return tokenizer


def render_prompt(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> tuple[int, ...]:
    """Token ids [P] of the chat template applied to `messages`, including the generation prompt.

    Raises ModelError if the tokenizer has no chat template or the template rejects the messages.
    """
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template; use an instruct model, "
            "or add chat_template.jinja to its folder"
        )
    # Templates may read any key of a message, so only the two known ones are passed on.
    conversation = [{"role": message["role"], "content": message["content"]} for message in messages]
    try:
        prompt_text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ModelError(f"the chat template of {tokenizer.name_or_path} rejected the messages: {error}") from error
    # The template has written the special tokens already; adding them again would double the BOS token.
    return tuple(tokenizer(str(prompt_text), add_special_tokens=False)["input_ids"])


def _check_model_folder(folder: Path) -> Path:
    """`folder`, resolved, if it is a readable Hugging Face model; ModelError that lists the missing files otherwise."""
    if not folder.is_dir():
        raise ModelError(f"model {folder} is a file; name the folder with config.json and the safetensors")
    missing_files = [name for name in ("config.json", "tokenizer_config.json") if not (folder / name).is_file()]
    if not any(folder.glob("*.safetensors")):
        missing_files.append("*.safetensors")
    if missing_files:
        raise ModelError(
            f"model folder {folder} lacks {', '.join(missing_files)}; save the model and its tokenizer into it with "
            "save_pretrained"
        )
    return folder.resolve()


def _download_from_hub(hub_id: str) -> Path:
    """Snapshot of a hub model in Hugging Face's cache (honors HF_HOME, HF_TOKEN and HF_HUB_OFFLINE)."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(HUB_FILE_PATTERNS)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model {hub_id!r} is not a local folder and could not be downloaded from the hub: {error}; "
            "check the id, the network and HF_TOKEN, or name a local folder"
        ) from error
