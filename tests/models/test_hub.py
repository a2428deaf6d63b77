"""Models from every source: built once and completely, prompts rendered by their template, clear errors."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rluf.algorithms.batch_layout import read_model_config
from rluf.config.settings import Settings
from rluf.errors import ModelError
from rluf.models import embedded
from rluf.models.hub import list_embedded_models, load_tokenizer, render_prompt, resolve_model
from rluf.types import Message
from rluf.utils.paths import resolve_cache_folder

MESSAGES = (Message(role="system", content="Be kind."), Message(role="user", content="Hi, what is 12 + 3? Grüße 😊"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_tiny_is_built_once_loads_and_renders_its_template(cache: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = resolve_model("tiny", cache)
    built_at = (folder / "model.safetensors").stat().st_mtime_ns
    assert resolve_model("tiny", cache) == folder == cache / "models" / "tiny"
    assert (folder / "model.safetensors").stat().st_mtime_ns == built_at
    tokenizer = load_tokenizer(folder)
    ids = render_prompt(tokenizer, MESSAGES)
    expected_text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in MESSAGES)
    assert tokenizer.decode(ids) == f"{expected_text}<|im_start|>assistant\n"
    assert ids[0] == tokenizer.bos_token_id == 1
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(weights.numel() for weights in model.parameters()) < 3_000_000
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.head_dim == 32


def test_tiny_has_equal_weights_wherever_it_is_built(cache: Path, tmp_path: Path) -> None:
    first, second = (resolve_model("tiny", cache_folder) / "model.safetensors" for cache_folder in (cache, tmp_path))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("name", ["tiny-encoder", "minilm"])
def test_encoders_load_with_a_new_head(name: str, cache: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = resolve_model(name, cache)
    tokenizer = load_tokenizer(folder)
    batch = tokenizer(["Hello there", "A longer text, so that one is padded"], padding=True, return_tensors="pt")
    assert batch["input_ids"][0, 0] == tokenizer.cls_token_id
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    assert model(**batch).logits.shape == (2, 1)


def test_a_killed_build_is_removed(tmp_path: Path) -> None:
    killed_build = tmp_path / "models" / ".tiny-killed"
    killed_build.mkdir(parents=True)
    (killed_build / "config.json").write_text("{}")
    assert (resolve_model("tiny", tmp_path) / "model.safetensors").is_file()
    assert not killed_build.exists()


def resolve_tiny_encoder(cache: str) -> None:
    resolve_model("tiny-encoder", Path(cache))


@pytest.mark.slow
def test_two_processes_may_build_one_model_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.models.bert.modeling_bert"])  # imported once for both
    processes = [context.Process(target=resolve_tiny_encoder, args=(str(tmp_path),)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(f.name for f in (tmp_path / "models").iterdir() if f.is_dir()) == ["tiny-encoder"]


def test_invalid_model_paths_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither an embedded name"):
        resolve_model("./nowhere/at/all", tmp_path)
    with pytest.raises(ModelError, match="'smol'"):
        resolve_model("smol", tmp_path)
    with pytest.raises(ModelError, match=r"lacks config\.json, tokenizer_config\.json, \*\.safetensors"):
        resolve_model(str(tmp_path), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ModelError, match="is a file"):
        resolve_model(str(file), tmp_path)


def test_a_build_without_weights_is_refused_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(embedded._EMBEDDED_MODEL_BUILDERS, "tiny", lambda folder: None)
        with pytest.raises(ModelError, match=r"model tiny: no weights were written.*--check"):
            resolve_model("tiny", tmp_path)
    assert not (tmp_path / "models" / "tiny").exists()
    assert (resolve_model("tiny", tmp_path) / "model.safetensors").is_file()


def test_an_unwritable_cache_is_reported(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file in the way")
    with pytest.raises(ModelError, match=r"set run\.cache"):
        resolve_model("tiny", tmp_path)


def test_an_unreachable_hub_model_is_one_message(tmp_path: Path) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(ModelError, match="could not be downloaded from the hub"):
        resolve_model("missing-owner/no-such-model", tmp_path)


def test_a_model_without_chat_template_cannot_render(cache: Path) -> None:
    tokenizer = load_tokenizer(resolve_model("tiny-encoder", cache))
    with pytest.raises(ModelError, match="no chat template"):
        render_prompt(tokenizer, MESSAGES)


def test_embedded_names_are_listed() -> None:
    assert set(list_embedded_models()) == {
        "smollm2-135m-instruct",
        "minilm",
        "multilingual-e5-small",
        "tiny",
        "tiny-encoder",
    }


@pytest.mark.slow
def test_smollm2_is_converted_with_its_tokenizer_and_generates() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = resolve_model("smollm2-135m-instruct", resolve_cache_folder(Settings()))
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    assert (tokenizer_config["tokenizer_class"], tokenizer_config["model_max_length"]) == (
        "PreTrainedTokenizerFast",
        8192,
    )
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    ids = torch.tensor([render_prompt(tokenizer, [Message(role="user", content="What is the capital of France?")])])
    output_ids = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output_ids[0, ids.shape[1] :])


def test_transformers_loads_without_scikit_learn_which_stays_importable() -> None:
    program = (
        "import importlib.util, sys; from rluf.models.hub import skip_scikit_learn; skip_scikit_learn()\n"
        "import transformers.generation.candidate_generator\n"
        "assert 'sklearn' not in sys.modules and importlib.util.find_spec('sklearn')"
    )
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=True, timeout=120)


CONFIG_CODE = "from transformers import LlamaConfig\nclass MyConfig(LlamaConfig):\n    model_type = 'mine'\n"
TOKENIZER_CODE = "from transformers import PreTrainedTokenizerFast\nclass MyTokenizer(PreTrainedTokenizerFast): pass\n"


def write_model_with_code(folder: Path, config_code: str, tokenizer_code: str) -> None:
    edits: dict[str, dict[str, object]] = {
        "config.json": {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_my.MyConfig"}},
        "tokenizer_config.json": {
            "tokenizer_class": "MyTokenizer", "auto_map": {"AutoTokenizer": [None, "tokenization_my.MyTokenizer"]}
        },
    }  # fmt: skip
    for name, values in edits.items():
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **values}))
    (folder / "configuration_my.py").write_text(config_code)
    (folder / "tokenization_my.py").write_text(tokenizer_code)


@pytest.mark.parametrize(
    ("is_trusted", "added_code", "message"),
    [
        (False, "", r"model\.trust_remote_code=true, if you trust its author"),
        (True, "", None),
        (True, "import no_such_package_x", "no_such_package_x"),
        (True, "def (", "SyntaxError"),
        (True, "raise RuntimeError('needs CUDA')", "needs CUDA"),
        (True, "assert False, 'too old'", "AssertionError too old"),
        (True, "undefined_name", "NameError"),
        (True, "{}['rope']", "KeyError"),
        (True, "1 / 0", "ZeroDivisionError"),
    ],
)
def test_code_shipped_with_a_model_runs_only_if_trusted_and_its_errors_are_one_message(
    is_trusted: bool, added_code: str, message: str | None, cache: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(resolve_model("tiny", cache), tmp_path / "model"))
    write_model_with_code(folder, f"{CONFIG_CODE}{added_code}\n", f"{TOKENIZER_CODE}{added_code}\n")
    if message is None:
        assert read_model_config(folder, is_trusted).model_type == "mine"
        assert type(load_tokenizer(folder, trust_remote_code=is_trusted)).__name__ == "MyTokenizer"
        return
    with pytest.raises(ModelError, match=message) as config_error:
        read_model_config(folder, is_trusted)
    with pytest.raises(ModelError, match=message) as tokenizer_error:
        load_tokenizer(folder, trust_remote_code=is_trusted)
    assert "\n" not in f"{config_error.value}{tokenizer_error.value}"
