"""The check before a run refuses models that would fail or be trained on wrong log-probabilities, with the reason."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rluf.algorithms.policy_model import load_policy
from rluf.config.settings import Settings
from rluf.errors import ModelError, RlufError, SettingsError
from rluf.models.embedded import EMBEDDED_EXAMPLES
from rluf.models.hub import check_causal_lm, load_tokenizer, render_prompt, resolve_model, resolve_policy
from rluf.models.turn_end import (
    count_tokens_before_stop,
    find_turn_end_ids,
    list_stop_token_ids,
    read_stop_token_ids,
)
from rluf.train.startup_check import (
    check_chat_template,
    check_context_window,
    check_expert_weights,
    check_memory,
    check_policy,
    check_tensor_parallel,
    check_token_ids,
    check_turn_end,
    check_weight_names,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_model("tiny", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def add_tokens(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    tokenizer.save_pretrained(folder)


def set_template(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)


ENDLESS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|endoftext|>{% endfor %}<|im_start|>assistant\n"
)
FAULTS: dict[str, tuple[Callable[[Settings, Path], str], Callable[[Path], object], type[RlufError], str]] = {
    "missing weight": (
        check_weight_names, lambda f: edit_weights(f, lambda w: w.pop("model.layers.1.mlp.up_proj.weight")), ModelError,
        r"lacks 1 weights \(model\.layers\.1\.mlp\.up_proj\.weight\)",
    ),
    "missing norm": (
        check_weight_names, lambda f: edit_weights(f, lambda w: w.pop("model.norm.weight")), ModelError,
        r"model\.norm\.weight",
    ),
    "untied without a head": (
        check_weight_names, lambda f: edit_json(f / "config.json", tie_word_embeddings=False), ModelError, r"lm_head",
    ),
    "weights that are no numbers": (
        lambda _, f: str(load_policy(f, dtype=torch.float32)),
        lambda f: edit_weights(f, lambda w: w["model.norm.weight"].fill_(float("nan"))), ModelError,
        r"model\.norm\.weight of .* has values that are not finite",
    ),
    "infinite weight": (
        lambda _, f: str(load_policy(f, dtype=torch.float32)),
        lambda f: edit_weights(f, lambda w: w["model.layers.1.mlp.up_proj.weight"][0].fill_(float("inf"))), ModelError,
        r"model\.layers\.1\.mlp\.up_proj\.weight of .* not finite",
    ),
    "unknown weight": (
        check_weight_names, lambda f: edit_weights(f, lambda w: w.update({"model.extra.weight": torch.ones(2)})),
        ModelError, r"does not send: 1 weights \(model\.extra\.weight\)",
    ),
    "unknown architecture": (
        check_weight_names, lambda f: edit_json(f / "config.json", model_type="none"), ModelError, r"cannot load",
    ),
    "more ids than rows": (check_token_ids, add_tokens, ModelError, r"ids up to 260 .*has 259 rows"),
    "small embedding": (
        check_token_ids, lambda f: edit_json(f / "config.json", vocab_size=200), ModelError, r"258 .*200 rows",
    ),
    "window": (
        check_context_window, lambda f: edit_json(f / "config.json", max_position_embeddings=240), SettingsError,
        r"257 positions, but .* has 240",
    ),
    "long rope": (
        check_context_window,
        lambda f: edit_json(
            f / "config.json", rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 16,
            "long_factor": [2.0] * 16, "original_max_position_embeddings": 200},
        ), SettingsError, r"257 positions, but above 200 .* changes its position encoding",
    ),
    "experts on a CPU engine": (
        check_expert_weights, lambda f: edit_json(f / "config.json", num_local_experts=4), SettingsError,
        r"4 experts per layer.*train it on GPUs",
    ),
    "turn end": (check_turn_end, lambda f: set_template(f, ENDLESS), ModelError, r"'<\|endoftext\|>' \(id 0\)"),
    "failing template": (
        check_chat_template, lambda f: set_template(f, "{{ raise_exception('not today') }}"), ModelError, r"not today",
    ),
    "empty template": (check_chat_template, lambda f: set_template(f, " "), ModelError, r"leaves out messages"),
    "template of lists": (
        check_chat_template,
        lambda f: set_template(f, "{% for m in messages %}{% for c in m.content %}{{ c.x }}{% endfor %}{% endfor %}"),
        ModelError, r"leaves out messages .*contents are texts, not lists",
    ),
    "template without the question": (
        check_chat_template, lambda f: set_template(f, "<|im_start|>assistant\n"), ModelError, r"leaves out messages",
    ),
    "reversed template": (
        check_chat_template,
        lambda f: set_template(f, "{% for m in messages | reverse %}{{ m.role }}: {{ m.content }}\n{% endfor %}"),
        ModelError, r"changes their order",
    ),
    "last message only": (
        check_chat_template, lambda f: set_template(f, "{{ messages[-1].content }}"), ModelError, r"leaves out",
    ),
    "Git LFS pointer": (
        check_weight_names,
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 12\n"),
        ModelError, r"model\.safetensors \(\d+ bytes\) is not a complete safetensors file.*git lfs pull",
    ),
    "cut weights": (
        check_weight_names,
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
        ModelError, r"is not a complete safetensors file",
    ),
    "empty weights": (
        check_weight_names, lambda f: (f / "model.safetensors").write_bytes(b""), ModelError, r"\(0 bytes\)",
    ),
    "index of missing files": (
        check_weight_names,
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "none.safetensors"}}'),
        ModelError, r"lacks 1 of the 1 files .*none\.safetensors",
    ),
    "damaged index": (
        check_weight_names, lambda f: (f / "model.safetensors.index.json").write_text("{"), ModelError,
        r"index\.json cannot be read",
    ),
    "impossible heads": (
        check_context_window, lambda f: edit_json(f / "config.json", num_attention_heads=7), ModelError,
        r"not a multiple of the number of attention heads",
    ),
    "no vocabulary size": (
        check_token_ids, lambda f: edit_json(f / "config.json", vocab_size=None), ModelError, r"vocab_size",
    ),
    "config of another type": (
        check_token_ids, lambda f: (f / "config.json").write_text("[]"), ModelError, r"no tokenizer could be read",
    ),
    "damaged generation config": (
        check_turn_end, lambda f: (f / "generation_config.json").write_text("{"), ModelError, r"no eos_token_id could",
    ),
    "end token as text": (
        check_turn_end, lambda f: edit_json(f / "generation_config.json", eos_token_id="<|im_end|>"), ModelError,
        r"generation_config\.json.*must be an id",
    ),
    "quantized": (
        lambda _, f: str(check_causal_lm(f) or "original weights"),
        lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "fp8"}), ModelError,
        r"quantized \(fp8\), which cannot be trained",
    ),
    "long template": (
        check_chat_template, lambda f: set_template(f, "x" * 300 + "{{ messages[0].content }}"), SettingsError,
        r"302 tokens, more than rollout\.max_prompt_tokens=192",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_one_message_that_names_it(fault: str, folder: Path) -> None:
    check, break_folder, error_type, pattern = FAULTS[fault]
    break_folder(folder)
    with pytest.raises(error_type, match=pattern):
        check(Settings(), folder)


def test_a_good_model_passes_each_check(folder: Path) -> None:
    for check in {fault[0] for fault in FAULTS.values()} | {check_memory}:
        assert check(Settings(), folder)


def test_more_rows_than_ids_and_another_end_of_turn_are_fine(folder: Path) -> None:
    edit_json(folder / "config.json", vocab_size=400, eos_token_id=[2, 0])
    assert "400 rows" in check_token_ids(Settings(), folder)
    (folder / "generation_config.json").unlink()
    assert read_stop_token_ids(folder, None) == [0, 2]
    set_template(folder, ENDLESS)
    assert "id 0" in check_turn_end(Settings(), folder)
    edit_json(folder / "config.json", eos_token_id=None)
    assert "id 0" in check_turn_end(Settings.model_validate({"rollout": {"stop": ["<|endoftext|>"]}}), folder)


def test_the_last_response_of_a_conversation_may_end_with_a_token_of_its_own(folder: Path) -> None:
    # As in the template of gpt-oss: <|return|> ends a response that is sampled, <|end|> one of the history.
    set_template(
        folder,
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if loop.last and m.role == 'assistant' %}<|im_end|>{% else %}<|endoftext|>{% endif %}{% endfor %}",
    )
    assert find_turn_end_ids(load_tokenizer(folder)) == [2, 0]
    assert "id 2 stops" in check_turn_end(Settings(), folder)
    for file in ("config.json", "generation_config.json"):
        edit_json(folder / file, eos_token_id=0)
    edit_json(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    assert "id 0 stops" in check_turn_end(Settings(), folder)
    set_template(folder, "{% if messages|length > 1 %}{{ raise_exception('one question') }}{% endif %}" + ENDLESS)
    assert "not checked" in check_turn_end(Settings(), folder)


@pytest.mark.parametrize(("gpu_count", "choices"), [(3, "1, 2"), (8, "1, 2, 4"), (6, "1, 2, 4"), (4, ""), (1, "")])
def test_an_engines_gpus_divide_the_attention_heads(gpu_count: int, choices: str, folder: Path) -> None:
    settings = Settings.model_validate({"cluster": {"gpus_per_engine": gpu_count}})
    if not choices:
        assert f"on {gpu_count} GPU" in check_tensor_parallel(settings, folder)
        return
    with pytest.raises(SettingsError, match=rf"gpus_per_engine={gpu_count} cannot divide the 4 .* one of {choices}$"):
        check_tensor_parallel(settings, folder)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "gpu_count", "choices"),
    [(24, 8, 3, "1, 2"), (40, 10, 4, "1, 2"), (28, 4, 7, "1, 2, 4"), (12, 2, 3, "1, 2"), (16, 2, 8, ""), (8, 8, 4, "")],
    ids=["Llama 3.2 3B", "Phi 4", "Qwen2.5 7B", "Qwen2.5 1.5B", "one head on four GPUs", "no groups"],
)
def test_an_engines_gpus_divide_the_key_value_heads_or_share_them_evenly(
    heads: int, kv_heads: int, gpu_count: int, choices: str, folder: Path
) -> None:
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": 16 * heads, "head_dim": 16}
    edit_json(folder / "config.json", **sizes)
    settings = Settings.model_validate({"cluster": {"gpus_per_engine": gpu_count}})
    if not choices:
        assert check_tensor_parallel(settings, folder)
        return
    with pytest.raises(SettingsError, match=rf"\({kv_heads} key-value heads\) of .* one of {choices}$"):
        check_tensor_parallel(settings, folder)


@pytest.mark.slow
def test_the_whole_check_passes_for_the_tiny_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings.model_validate({"model": {"path": "tiny"}, "run": {"cache": str(tmp_path)}})
    with caplog.at_level("INFO"):
        check_policy(settings, resolve_policy(settings))
    assert sum(message.startswith("check: ") for message in caplog.messages) == 10
    assert "check: batch layout: packed" in caplog.text


def test_a_response_ends_with_the_token_that_completes_a_stop_string(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    ids = tokenizer.encode("One.\n\nTwo.\n\nThree", add_special_tokens=False)
    for stop, expected in ((["\n\n"], "One.\n\n"), (["Two", "Thr"], "One.\n\nTwo"), (["z"], "One.\n\nTwo.\n\nThree")):
        assert tokenizer.decode(ids[: count_tokens_before_stop(tokenizer, ids, stop)]) == expected
    assert count_tokens_before_stop(tokenizer, [], ["x"]) == 0
    assert list_stop_token_ids(tokenizer, ["<|endoftext|>", "\n\n"]) == [0]


def resolve_with(folder: Path, tmp_path: Path, **model: Any) -> Path:
    values = {"model": {"path": str(folder), **model}, "run": {"cache": str(tmp_path / "cache")}}
    return resolve_policy(Settings.model_validate(values))


def test_system_prompt_and_template_variables_are_part_of_the_policys_template(folder: Path, tmp_path: Path) -> None:
    assert resolve_with(folder, tmp_path) == folder.resolve()
    set_template(folder, "{{ mood | default('none') }} {{ on is defined and on is false }}: " + tiny_template(folder))
    prompt = 'Be "kind" {% endif %} {{ 1 }} \\ 😊'
    linked = resolve_with(folder, tmp_path, system_prompt=prompt, chat_template_args={"mood": "calm", "on": False})
    assert (
        resolve_with(folder, tmp_path, system_prompt=prompt, chat_template_args={"mood": "calm", "on": False}) == linked
    )
    tokenizer = load_tokenizer(linked)
    text = tokenizer.decode(render_prompt(tokenizer, [{"role": "user", "content": "Hi"}]))
    assert text.startswith(f"calm True: <|im_start|>system\n{prompt}<|im_end|>\n<|im_start|>user\nHi<|im_end|>")
    own_system = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "Hi"}]
    assert prompt not in tokenizer.decode(render_prompt(tokenizer, own_system))
    assert (linked / "model.safetensors").samefile(folder / "model.safetensors")
    with pytest.raises(ValueError, match="cannot be set"):
        resolve_with(folder, tmp_path, chat_template_args={"messages": "x"})


def test_examples_follow_the_system_message(folder: Path, tmp_path: Path) -> None:
    linked = resolve_with(folder, tmp_path, examples=(("What?", 'A "quote".'),), system_prompt="Be brief.")
    tokenizer = load_tokenizer(linked)
    shown = (
        '<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nA "quote".<|im_end|>\n<|im_start|>user\nHi<|im_end|>'
    )
    for system, messages in (("Be brief.", []), ("Mine.", [{"role": "system", "content": "Mine."}])):
        text = tokenizer.decode(render_prompt(tokenizer, [*messages, {"role": "user", "content": "Hi"}]))
        assert text.startswith(f"<|im_start|>system\n{system}<|im_end|>\n{shown}")
    without_system = load_tokenizer(resolve_with(folder, tmp_path, examples=(("What?", 'A "quote".'),)))
    text = without_system.decode(render_prompt(without_system, [{"role": "user", "content": "Hi"}]))
    assert text.startswith(shown)


def test_only_the_embedded_chat_model_has_an_example_by_default() -> None:
    assert set(EMBEDDED_EXAMPLES) == {"smollm2-135m-instruct"}
    assert Settings().model.examples is None


def tiny_template(folder: Path) -> str:
    return str(load_tokenizer(folder).chat_template)


def test_a_default_among_named_templates_gets_the_system_prompt(folder: Path, tmp_path: Path) -> None:
    templates = [
        {"name": "tool_use", "template": "{{ tools }}"},
        {"name": "default", "template": tiny_template(folder)},
    ]
    (folder / "chat_template.jinja").unlink()
    edit_json(folder / "tokenizer_config.json", chat_template=templates)
    tokenizer = load_tokenizer(resolve_with(folder, tmp_path, system_prompt="Be brief."))
    text = tokenizer.decode(render_prompt(tokenizer, [{"role": "user", "content": "Hi"}]))
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>")
    edit_json(folder / "tokenizer_config.json", chat_template=templates[:1])
    with pytest.raises(ModelError, match="has no chat template for model"):
        resolve_with(folder, tmp_path, system_prompt="Be brief.")


@pytest.mark.parametrize("stray", ["consolidated.safetensors", "adapter_model.safetensors", "model-old.safetensors"])
def test_safetensors_next_to_the_weights_are_left_out(stray: str, folder: Path, tmp_path: Path) -> None:
    save_file({"other.weight": torch.ones(2)}, folder / stray)
    assert "tensors are equal" in check_weight_names(Settings(), folder)
    linked = resolve_with(folder, tmp_path)
    assert [file.name for file in linked.glob("*.safetensors")] == ["model.safetensors"]
    assert render_prompt(load_tokenizer(linked), [{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("key", ["top_p", "top_k", "min_p", "repetition_penalty"])
def test_truncated_sampling_is_refused_with_the_reason(key: str) -> None:
    from rluf.config.load import load_settings

    with pytest.raises(SettingsError, match=re.escape(f"rollout.{key} is now refused: training needs")):
        load_settings(None, overrides=[f"rollout.{key}=0.9"])


def test_temperatures_that_vllm_would_change_are_refused() -> None:
    with pytest.raises(ValueError, match=r"greater than or equal to 0\.01"):
        Settings.model_validate({"rollout": {"temperature": 0.005}})
