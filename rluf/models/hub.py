"""Resolve a model path (embedded name, folder or hub id) to a local Hugging Face folder; load its tokenizer.

The folder has safetensors, config, tokenizer and, for policies, a chat template, so that transformers, vLLM and
DeepSpeed can read it. Heavy imports stay inside the functions that need them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rluf.errors import DataError, ModelError
from rluf.models.chat import render_prompt
from rluf.models.embedded import EMBEDDED_EXAMPLES, list_embedded_models, resolve_embedded_model
from rluf.utils.files import atomic_folder, file_lock
from rluf.utils.paths import resolve_cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from rluf.config.settings import Settings

logger = logging.getLogger(__name__)

__all__ = ["list_embedded_models", "load_tokenizer", "render_prompt", "resolve_model", "resolve_policy"]

HUB_ID_PATTERN = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
HUB_DATA_PATTERNS = ("*.parquet", "*.jsonl*", "*.json", "*.csv*", "*.arrow")
"""Data files of a data set on the hub."""
NETWORK_ERROR_CLASSES = (
    ("aiohttp", "ClientError"), ("httpx", "HTTPError"), ("httpx2", "HTTPError"), ("requests", "RequestException"),
    ("botocore.exceptions", "BotoCoreError"), ("botocore.exceptions", "ClientError"),
    ("gcsfs.retry", "HttpError"), ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"), ("huggingface_hub.errors", "HfHubHTTPError"),
)  # fmt: skip
"""Module and base class of the errors of HTTP and storage clients."""
HUB_FILE_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
"""Files to download: no pickles, whose loading would run code, and no weights in other formats."""
CAUSAL_LM_SUFFIXES = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
"""Ends of the architecture names of causal language models in config.json."""
SINGLE_WEIGHTS_FILE, WEIGHTS_INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
TEMPLATE_FILE = "chat_template.jinja"
MAX_ERROR_CHARACTERS = 500
SYSTEM_PROMPT_TEMPLATE = (
    "{%- if not messages or messages[0]['role'] != 'system' -%}"
    "{%- set messages = [{'role': 'system', 'content': PROMPT}] + messages -%}{%- endif -%}"
)
"""Put in front of a chat template, with a JSON string for PROMPT."""
EXAMPLES_TEMPLATE = (
    "{%- if messages and messages[0]['role'] == 'system' -%}"
    "{%- set messages = messages[:1] + TURNS + messages[1:] -%}"
    "{%- else -%}{%- set messages = TURNS + messages -%}{%- endif -%}"
)
"""Put in front of a chat template, with a JSON list of messages for TURNS."""


def resolve_policy(settings: Settings) -> Path:
    """Local folder of the policy `model.path`, with system_prompt, examples and chat_template_args of `model` applied.

    They become part of the chat template, so that engines, the trained policy and every later server of it render
    conversations as in training. If the template changes, or the folder has safetensors files next to
    model.safetensors that are not its weights (vLLM would read them too), the folder is one of links under run.cache.
    """
    model, cache_folder = settings.model, resolve_cache_folder(settings)
    folder = resolve_model(model.path, cache_folder, trust_remote_code=model.trust_remote_code)
    stray_files = _list_stray_weights(folder)
    examples = EMBEDDED_EXAMPLES.get(model.path, ()) if model.examples is None else model.examples
    template_prefix = _build_template_prefix(model.system_prompt, examples, model.chat_template_args)
    if not (stray_files or template_prefix):
        return folder
    files = [file for file in folder.iterdir() if file.name not in stray_files and file.name != TEMPLATE_FILE]
    template = ""
    if template_prefix:
        template = get_chat_template(load_tokenizer(folder, trust_remote_code=model.trust_remote_code))
        if not template:
            raise ModelError(f"{folder} has no chat template for model.system_prompt, examples and chat_template_args")
    elif (folder / TEMPLATE_FILE).is_file():
        files.append(folder / TEMPLATE_FILE)
    names = sorted(file.name for file in files)
    key = hashlib.sha256(repr((str(folder), names, template_prefix, template)).encode()).hexdigest()[:12]
    link_folder = cache_folder / "models" / f"policy-{key}"
    link_folder.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(link_folder.parent / f".{link_folder.name}.lock"):
        if not link_folder.is_dir():
            with atomic_folder(link_folder) as temporary_folder:
                for file in files:
                    (temporary_folder / file.name).symlink_to(file.resolve())
                if template_prefix:
                    (temporary_folder / TEMPLATE_FILE).write_text(template_prefix + template, encoding="utf-8")
    if stray_files:
        logger.warning("model %s: not weights, left out: %s", folder, ", ".join(sorted(stray_files)))
    return link_folder


def _list_stray_weights(folder: Path) -> set[str]:
    """Names of safetensors files that transformers does not read, next to model.safetensors or an index."""
    names = {file.name for file in folder.glob("*.safetensors")}
    indexed_names = read_weights_index(folder)
    if indexed_names is not None:
        return names - indexed_names
    return names - {SINGLE_WEIGHTS_FILE} if SINGLE_WEIGHTS_FILE in names else set()


def _build_template_prefix(
    system_prompt: str, examples: Sequence[tuple[str, str]], template_args: Mapping[str, object]
) -> str:
    """Jinja code in front of a chat template that sets its variables and adds the system message and the examples."""
    # JSON values are Jinja literals too; not in ASCII, as Jinja does not know JSON's surrogate pairs.
    to_literal = functools.partial(json.dumps, ensure_ascii=False)
    prefix = "".join(f"{{%- set {name} = {to_literal(value)} -%}}" for name, value in sorted(template_args.items()))
    if system_prompt:
        prefix += SYSTEM_PROMPT_TEMPLATE.replace("PROMPT", to_literal(system_prompt))
    turns = [
        {"role": role, "content": content}
        for exchange in examples
        for role, content in zip(("user", "assistant"), exchange, strict=True)
    ]
    return prefix + (EXAMPLES_TEMPLATE.replace("TURNS", to_literal(turns)) if turns else "")


def resolve_model(model_path: str, cache_folder: Path, *, trust_remote_code: bool = False) -> Path:
    """Local folder of the model `model_path`; embedded models are built once in `cache_folder`/models/<name>.

    `model_path` is an embedded name, a Hugging Face folder, or a hub id (owner/name, downloaded into Hugging Face's own
    cache). Processes may ask for the same model at once: one builds it, the others wait, and a killed build leaves
    nothing that looks finished. Raises ModelError with what is missing and what to do.
    """
    folder = find_model_folder(model_path)
    if folder is not None:
        return folder
    if model_path in list_embedded_models():
        return _check_model_folder(resolve_embedded_model(model_path, cache_folder / "models"))
    return _check_model_folder(_download_from_hub(model_path, trust_remote_code))


def find_model_folder(model_path: str) -> Path | None:
    """The checked folder of a local model; None for an embedded name or a hub id, which is not built or downloaded.

    Raises ModelError for any other text, and for a folder without the files of a model.
    """
    if model_path in list_embedded_models():
        return None
    folder = Path(model_path).expanduser()
    if folder.exists():
        return _check_model_folder(folder)
    if HUB_ID_PATTERN.match(model_path):
        return None
    embedded_names = ", ".join(list_embedded_models())
    raise ModelError(
        f"model {model_path!r} is neither an embedded name ({embedded_names}), nor a folder, nor a hub id "
        "(owner/name); check the path"
    )


def check_causal_lm(model_folder: Path) -> None:
    """Raise ModelError for a folder without a causal language model."""
    try:
        config = dict(json.loads((model_folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"model {model_folder} has no readable config.json: {error}; give a Hugging Face folder"
        ) from error
    architectures = [str(name) for name in config.get("architectures") or []]
    if not any(name.endswith(CAUSAL_LM_SUFFIXES) for name in architectures):
        raise ModelError(
            f"model {model_folder} has architecture {', '.join(architectures) or 'none'}; the policy must be a causal "
            "language model (model.path)"
        )
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "quantized") if isinstance(quantization, dict) else "quantized"
        raise ModelError(
            f"the weights of {model_folder} are quantized ({method}), which cannot be trained; name the original model "
            "in model.path"
        )


def skip_scikit_learn() -> None:
    """Have transformers load without scikit-learn, which takes 1.4 CPU seconds to import in each process.

    Call it before the first import of a model class. transformers uses scikit-learn for assisted generation only. It
    can still be imported by others afterwards.
    """
    from transformers.utils import is_sklearn_available

    if "sklearn" in sys.modules:
        return
    sys.modules["sklearn"] = None  # type: ignore[assignment]  # as if it were not installed
    try:
        is_sklearn_available()  # transformers caches the answer
    finally:
        del sys.modules["sklearn"]


def list_model_file_errors() -> tuple[type[Exception], ...]:
    """What transformers and safetensors raise on files that are missing, damaged or contradict each other."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    # Python's own errors come from code that expects other values in a config, and from code shipped with a model.
    python_errors = (
        OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError, ArithmeticError,
        AssertionError, NameError, SyntaxError,
    )  # fmt: skip
    return *python_errors, SafetensorError, StrictDataclassError


def describe_model_error(error: Exception) -> str:
    """One of `list_model_file_errors` on one line, with what to do where code shipped with the model is the reason."""
    if "trust_remote_code" in str(error):
        return (
            "it needs Python code that is shipped with it; such code runs for the policy alone, with "
            "model.trust_remote_code=true, if you trust its author"
        )
    if "does not recognize this architecture" in str(error):
        return f"{_format_first_line(error).partition('. This could be')[0]}; choose another model"
    if "Unrecognized configuration class" in str(error):
        return "it is not a causal language model; choose another model"
    message = " ".join(line.strip() for line in str(error).splitlines() if line.strip())[:MAX_ERROR_CHARACTERS]
    is_text = isinstance(error, (OSError, ValueError, ImportError, RuntimeError)) and message
    return message if is_text else f"{type(error).__name__} {message}".rstrip()


def read_weights_index(folder: Path) -> set[str] | None:
    """Names of the files in the folder's index of weights; None without an index.

    Raises ModelError if it cannot be read or names a file that is not there.
    """
    index_file = folder / WEIGHTS_INDEX_FILE
    if not index_file.is_file():
        return None
    try:
        names = {str(name) for name in json.loads(index_file.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index_file} cannot be read: {error}; download or save the model again") from error
    missing_files = sorted(name for name in names if not (folder / name).is_file())
    if missing_files:
        raise ModelError(
            f"{folder} lacks {len(missing_files)} of the {len(names)} files that {WEIGHTS_INDEX_FILE} names, such as "
            f"{missing_files[0]}; download or copy the model again"
        )
    return names


def get_chat_template(tokenizer: PreTrainedTokenizerFast) -> str:
    """The tokenizer's chat template; the default one where it has several by name, empty without one."""
    template = tokenizer.chat_template or ""
    return str(template.get("default", "")) if isinstance(template, dict) else str(template)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """Load the fast tokenizer of a resolved model folder. Raises ModelError if it cannot be read or is a slow one."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except list_model_file_errors() as error:
        raise ModelError(
            f"no tokenizer could be read from {folder}: {describe_model_error(error)}; check tokenizer.json, "
            "tokenizer_config.json and config.json in it"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(f"the tokenizer in {folder} is not a fast one; add a tokenizer.json to the folder")
    return tokenizer


def _check_model_folder(folder: Path) -> Path:
    """`folder`, resolved, if it is a readable Hugging Face model; ModelError that lists the missing files otherwise."""
    if not folder.is_dir():
        raise ModelError(f"model {folder} is a file; name the folder with config.json and the safetensors")
    missing_files = [name for name in ("config.json", "tokenizer_config.json") if not (folder / name).is_file()]
    if not any(folder.glob("*.safetensors")):
        missing_files.append("*.safetensors")
    if missing_files:
        advice = "save the model and its tokenizer into it with save_pretrained"
        if (folder / "policy" / "config.json").is_file():
            advice = f"the policy of this run is in {folder / 'policy'}"
        elif (folder / "adapter_config.json").is_file():
            advice = "it is a LoRA adapter: merge it into its base model and save that (merge_and_unload of peft)"
        raise ModelError(f"model folder {folder} lacks {', '.join(missing_files)}; {advice}")
    return folder.resolve()


def download_data_set(reference: str) -> list[str]:
    """Paths of the data files of a data set on the hub, downloaded into Hugging Face's cache, in order of their names.

    `reference` is owner/name, with an optional revision and pattern of files: owner/name@main/data/train-*.parquet.
    Raises DataError that names the reference if it is not one, or could not be downloaded.
    """
    owner, _, rest = reference.partition("/")
    name_and_revision, _, pattern = rest.partition("/")
    name, _, revision = name_and_revision.partition("@")
    if not HUB_ID_PATTERN.match(f"{owner}/{name}"):
        raise DataError(f"{reference!r} is not a data set of the hub; expected owner/name, such as trl-lib/tldr")
    patterns = [pattern, f"{pattern.rstrip('/')}/*"] if pattern else list(HUB_DATA_PATTERNS)
    try:
        folder = _download_snapshot(
            f"{owner}/{name}", repo_type="dataset", revision=revision or None, allow_patterns=patterns
        )
    except list_hub_errors() as error:
        raise DataError(
            f"data set {f'{owner}/{name}'!r} could not be downloaded from the hub: {_format_first_line(error)}; "
            "check the id, the network and HF_TOKEN, or name a local folder"
        ) from error
    # The cache has one folder for a revision, also with the files of other patterns.
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [str(path) for path in files if any(fnmatch(path.relative_to(folder).as_posix(), text) for text in patterns)]


def _download_from_hub(hub_id: str, trust_remote_code: bool) -> Path:
    """Snapshot of a hub model in Hugging Face's cache (honors HF_HOME, HF_TOKEN and HF_HUB_OFFLINE)."""
    try:
        patterns = [*HUB_FILE_PATTERNS, *(["*.py"] if trust_remote_code else [])]
        return _download_snapshot(hub_id, allow_patterns=patterns)
    except list_hub_errors() as error:
        raise ModelError(
            f"model {hub_id!r} is not a local folder and could not be downloaded from the hub: "
            f"{_format_first_line(error)}; check the id, the network and HF_TOKEN, or name a local folder"
        ) from error


def _download_snapshot(hub_id: str, **options: Any) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(hub_id, **options))


def list_hub_errors() -> tuple[type[Exception], ...]:
    """What a download raises without network, without access, for an unknown id, and on a full or read-only disk."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    return HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, *list_network_errors()


def list_network_errors() -> tuple[type[Exception], ...]:
    """Base classes of the errors of the HTTP and storage clients that are loaded; not all are OSErrors."""
    classes = (
        getattr(sys.modules.get(module_name), class_name, None) for module_name, class_name in NETWORK_ERROR_CLASSES
    )
    return tuple(error_class for error_class in classes if error_class is not None)


def _format_first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
