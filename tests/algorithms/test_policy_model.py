"""Policy folders are written completely or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors import SafetensorError

from rluf.algorithms.policy_model import copy_companion_files, load_policy, remove_noise
from rluf.errors import ModelError, ResourceError
from rluf.utils.files import atomic_folder, build_write_error


def test_folder_appears_only_when_complete_and_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "policy"
    for text in ("one", "two"):
        with atomic_folder(target) as staging_folder:
            (staging_folder / "a").write_text(text)
            assert not target.exists() or (target / "a").read_text() == "one"
        assert (target / "a").read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


def test_failure_leaves_only_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "policy"
    with atomic_folder(target) as staging_folder:
        (staging_folder / "a").write_text("one")
    with pytest.raises(KeyError), atomic_folder(target) as staging_folder:
        (staging_folder / "a").write_text("two")
        raise KeyError
    assert (target / "a").read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


def test_files_are_as_readable_as_their_folder(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "policy") as staging_folder:
        (staging_folder / "a").write_text("one")
        (staging_folder / "a").chmod(0o600)
    folder = (tmp_path / "policy").stat().st_mode
    assert (tmp_path / "policy" / "a").stat().st_mode & 0o777 == folder & 0o666


def test_unwritable_path_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="free some disk"), atomic_folder(tmp_path / "file" / "policy"):
        pass


def test_missing_model_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no causal language model"):
        load_policy(tmp_path, dtype=torch.float32)


def test_a_full_disk_is_a_resource_error_and_the_old_folder_remains(tmp_path: Path) -> None:
    target = tmp_path / "policy"
    with atomic_folder(target) as staging_folder:
        (staging_folder / "a").write_text("one")
    pattern = r"No space left on device.*earlier checkpoints remain"
    with pytest.raises(ResourceError, match=pattern), atomic_folder(target) as staging_folder:
        (staging_folder / "a").symlink_to("/dev/full")
        (staging_folder / "a").write_text("two")
    assert (target / "a").read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


def test_the_error_number_in_a_safetensors_message_is_recognized(tmp_path: Path) -> None:
    message = "Error while serializing: I/O error: No space left on device (os error 28)"
    assert isinstance(build_write_error("the policy", tmp_path, SafetensorError(message)), ResourceError)
    assert isinstance(build_write_error("the policy", tmp_path, SafetensorError("invalid header")), ModelError)


@pytest.mark.parametrize(
    ("config_name", "noise"),
    [
        ("FalconConfig", {"hidden_dropout": 0.5, "attention_dropout": 0.5, "alibi": False}),  # read from the config
        ("OPTConfig", {"dropout": 0.5, "layerdrop": 0.5, "ffn_dim": 32, "word_embed_proj_dim": 32}),
        ("GPT2Config", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
        ("LlamaConfig", {"attention_dropout": 0.5}),
        ("BloomConfig", {"hidden_dropout": 0.5, "attention_dropout": 0.5}),
    ],
)
def test_a_learner_that_recomputes_activations_has_no_dropout(config_name: str, noise: dict[str, float]) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    config = getattr(transformers, config_name)(**sizes, **noise)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    token_ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=token_ids, use_cache=False).logits
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    remove_noise(model)
    assert torch.equal(model(input_ids=token_ids, use_cache=False).logits, expected)
    assert all(getattr(model.config, name) == value for name, value in noise.items())  # the saved config is unchanged


def test_python_code_of_a_model_is_part_of_the_trained_policy(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    source.mkdir()
    for name in ("tokenization_x.py", "tokenizer.json", "weights.bin"):
        (source / name).write_text(name)
    copy_companion_files(source, target)
    assert sorted(file.name for file in target.iterdir()) == ["tokenization_x.py", "tokenizer.json"]
