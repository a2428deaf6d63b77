"""Rendered chat templates are split as their messages were, also when cut or padded, or they are refused."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import httpx
import jinja2
import pytest

from rluf.config.settings import Settings
from rluf.reward.model import RewardModel
from rluf.serve.api import ApiError
from rluf.serve.chat_text import build_custom_format, split_pair, split_text
from rluf.types import ScoringItem
from rluf.utils.stats import logit

USER, RESPONSE = "Hello? Is anyone there to help me?", "Hello, friend! How can I help you today?"
# Prompt, end of the response and padding as the chat templates of the named models render one user message.
TEMPLATES = {
    "chatml": ("<|im_start|>system\nYou are an assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
               "<|im_start|>assistant\n", "<|im_end|>", "<|endoftext|>"),
    "chatml without system": ("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n", "<|im_end|>"),
    "llama3": ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>", "<|finetune_right_pad_id|>"),
    "llama3 system": ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: 2023\n\n"
                      "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
                      "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>", "<|end_of_text|>"),
    "llama4": ("<|begin_of_text|><|header_start|>user<|header_end|>\n\n{}<|eot|>"
               "<|header_start|>assistant<|header_end|>\n\n", "<|eot|>", "<|finetune_right_pad|>"),
    "gemma": ("<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>\n", "<pad>"),
    "mistral v1": ("<s> [INST] {} [/INST]", "</s>", "</s>"),
    "mistral v3": ("<s>[INST] {}[/INST]", "</s>", "<pad>"),
    "mistral v7": ("<s>[SYSTEM_PROMPT]Be kind.[/SYSTEM_PROMPT][INST]{}[/INST]", "</s>", "</s>"),
    "llama2": ("<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\n{} [/INST]", " </s>", "<pad>"),
    "phi": ("<|user|>\n{}<|end|>\n<|assistant|>\n", "<|end|>", "<|endoftext|>"),
    "zephyr": ("<|system|>\nBe kind.</s>\n<|user|>\n{}</s>\n<|assistant|>\n", "</s>", "</s>"),
    "gemma 2": ("<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn><eos>", "<pad>"),
    "gemma4": ("<bos><|turn>system\nBe kind.<turn|>\n<|turn>user\n{}<turn|>\n<|turn>model\n", "<turn|>\n", "<pad>"),
    "phi4": ("<|im_start|>system<|im_sep|>Be kind.<|im_end|><|im_start|>user<|im_sep|>{}<|im_end|>"
             "<|im_start|>assistant<|im_sep|>", "<|im_end|>", "<|endoftext|>"),
    "phi4 mini": ("<|system|>Be kind.<|end|><|user|>{}<|end|><|assistant|>", "<|end|>", "<|endoftext|>"),
    "tulu": ("<|system|>\nBe kind.\n<|user|>\n{}\n<|assistant|>\n", "<|end_of_text|>", "<pad>"),
    "olmo": ("<|endoftext|><|user|>\n{}\n<|assistant|>\n", "<|endoftext|>", "<|padding|>"),
    "granite": ("<|start_of_role|>system<|end_of_role|>Be kind.<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>{}"
                "<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>", "<|end_of_text|>", "<|end_of_text|>"),
    "command r": ("<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be kind.<|END_OF_TURN_TOKEN|>"
                  "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{}<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
                  "<|END_OF_TURN_TOKEN|>", "<PAD>"),
    "command a": ("<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|># System Preamble\nBe kind.<|END_OF_TURN_TOKEN|>"
                  "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{}<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
                  "<|START_RESPONSE|>", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "<PAD>"),
    "gpt-oss": ("<|start|>system<|message|>You are ChatGPT.\nReasoning: low<|end|><|start|>developer<|message|>"
                "# Instructions\n\nBe kind.\n\n<|end|><|start|>user<|message|>{}<|end|><|start|>assistant"
                "<|channel|>final<|message|>", "<|return|>", "<|endoftext|>"),
    "kimi": ("<|im_system|>system<|im_middle|>You are Kimi.<|im_end|><|im_user|>user<|im_middle|>{}<|im_end|>"
             "<|im_assistant|>assistant<|im_middle|>", "<|im_end|>", "[PAD]"),
    "openchat": ("<s>GPT4 Correct User: {}<|end_of_turn|>GPT4 Correct Assistant:", "<|end_of_turn|>",
                 "<|end_of_turn|>"),
    "openchat system": ("<s>Be kind.<|end_of_turn|>GPT4 Correct User: {}<|end_of_turn|>GPT4 Correct Assistant: ",
                        "<|end_of_turn|>", "<|end_of_turn|>"),
    "deepseek": ("<\uff5cbegin\u2581of\u2581sentence\uff5c>Be kind.<\uff5cUser\uff5c>{}<\uff5cAssistant\uff5c>",
                 "<\uff5cend\u2581of\u2581sentence\uff5c>", "<\uff5c\u2581pad\u2581\uff5c>"),
    "spaces between tokens": ("<|im_start|> user\n{}<|im_end|> \n<|im_start|> assistant\n", "<|im_end|>", "<|im_end|>"),
    "llama3 with spaces": ("<|begin_of_text|><|start_header_id|> user <|end_header_id|>\n\n{}<|eot_id|> "
                           "<|start_header_id|> assistant <|end_header_id|>\n\n", "<|eot_id|>", "<pad>"),
    "line ends of Windows": ("<|im_start|>user\r\n{}<|im_end|>\r\n<|im_start|>assistant\r\n", "<|im_end|>\r\n",
                             "<|im_end|>"),
    "custom": ("### Human: {}@@### Bot: ", "@@", "</s>"),
}  # fmt: skip
CUSTOM = build_custom_format({"user": "### Human: ", "assistant": "### Bot: ", "end": "@@"})


def render(name: str) -> tuple[str, str, str]:
    prompt, end, pad = TEMPLATES[name]
    return prompt.format(USER), end, pad


def get_last_message(item: ScoringItem) -> tuple[str, str, str]:
    return item.messages[-1]["role"], item.messages[-1]["content"], item.response


@pytest.mark.parametrize("with_prompt", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_rendered_conversation_is_split(name: str, with_prompt: bool) -> None:
    prompt, end, pad = render(name)
    header_start = max(
        prompt.rfind(marker) for marker in ("<|im_start|>", "<|start_header", "<|header", "<start_of", "<|a")
    )
    user_start = prompt.index(USER)
    texts = {
        "whole": prompt + RESPONSE + end,
        "no end": prompt + RESPONSE,
        "padded": pad * 5 + prompt + RESPONSE + end + pad * 7,
        "padded with spaces": f"{pad} {pad} {prompt}{RESPONSE}{end} {pad} {pad}",
        "cut before the user": prompt[max(0, user_start - 24) :] + RESPONSE + end,
        "cut and padded": pad * 3 + prompt[max(0, user_start - 24) :] + RESPONSE + pad * 4,
        "cut on both sides": prompt[max(0, user_start - 24) :] + RESPONSE,
    }
    if name == "llama3 with spaces":  # the rest of such a header cannot be told from a message
        texts = {label: text for label, text in texts.items() if "cut" not in label}
    for label, text in texts.items():
        prompts = [prompt] + ([prompt[:header_start]] if header_start > 0 and label == "whole" else [])
        for given_prompt in prompts if with_prompt else [""]:
            item = split_text(text, given_prompt, CUSTOM)
            assert get_last_message(item) == ("user", USER, RESPONSE), label
    item = split_pair(prompt, RESPONSE + end, CUSTOM)
    assert get_last_message(item) == ("user", USER, RESPONSE)


@pytest.mark.parametrize("response_length", [0, 1, 17])
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_cut_is_split_right_or_refused(name: str, response_length: int) -> None:
    prompt, _, _ = render(name)
    response = RESPONSE[:response_length]
    for cut in range(len(prompt)):
        text = prompt[cut:] + response
        try:
            item = split_text(text, prompt, CUSTOM)
        except ApiError as error:
            assert error.status == 422
            assert cut > prompt.index(USER)
            continue
        is_stripped = any(marker in prompt for marker in ("[INST]", "GPT4", "### Human"))
        assert get_last_message(item) == ("user", USER, response.strip() if is_stripped else response)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_long_conversation_has_all_its_turns(name: str) -> None:
    prompt, end, _ = render(name)
    second_prompt = TEMPLATES["openchat" if name == "openchat system" else name][0].format("And then?")
    text = prompt + "First answer." + end + second_prompt + RESPONSE + end
    item = split_text(text, "", CUSTOM)
    assert [m["content"] for m in item.messages if m["role"] == "assistant"] == ["First answer."]
    assert get_last_message(item) == ("user", "And then?", RESPONSE)


@pytest.mark.parametrize(
    "text",
    [
        "<|im_start|>user\nHello?<|im_end|>\n", "<|im_start|>assistant\nHi", "Hello <|im_end|> there", "[INST] Hello?",
        "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>tool\n{}<|im_end|>\n<|im_start|>assistant\nHi",
        "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\nMore text",
        "<|unknown|>user: Hello<|sep|>bot: Hi", "<start_of_turn>user\n <end_of_turn>\n<start_of_turn>model\nHi",
        "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\nHi <|eot_id|> there",
    ],
)  # fmt: skip
def test_what_cannot_be_split_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(ApiError, match=r"cannot be split.*/v1/score.*serve\.chat_markers") as error:
        split_text(text)
    assert error.value.status == 422


def test_plain_text_is_not_touched_and_must_start_with_its_prompt() -> None:
    assert split_text("Is 3 < 5? <s>No</s> yes").response == "Is 3 < 5? <s>No</s> yes"
    assert split_pair("What is [x]?", " [1] ").response == " [1] "
    for text in ("Is `User: ann` right?", "Question: Why?\nAnswer:", "<role>You are a teacher.</role>", "My GPT: x"):
        assert get_last_message(split_pair(text, "Yes.")) == ("user", text, "Yes.")
        assert split_text(text).response == text
    assert get_last_message(split_text("Question one? Yes.", "Question one?")) == ("user", "Question one?", "Yes.")
    assert split_text("stion one? Yes.", "A long question one?").response == "Yes."
    assert split_text("<s> Question one? Yes.</s>", "Question one?").response == "Yes."
    assert split_pair("Is it?", "Yes.</s>").response == "Yes."
    run_on = "Yes.\n\nHuman: Thanks!\n\nAssistant: You are welcome."
    assert (
        split_text(f"Question one?\n{run_on}", "Question one?").response
        == split_pair("Why?", run_on).response
        == run_on
    )
    with pytest.raises(ApiError, match="does not start with its prompt"):
        split_text("Something else", "Question?")


THINKING = (
    "<think>\n\n</think>\n\n", "<think>\n\n</think>\n", "<think>\n", "<think></think>", "</think>", "</think>\n\n",
)  # fmt: skip


@pytest.mark.parametrize("name", ["chatml", "deepseek", "llama3"])
@pytest.mark.parametrize("thinking", THINKING)
def test_an_empty_block_of_reasoning_belongs_to_the_template(name: str, thinking: str) -> None:
    prompt, end, _ = render(name)
    expected = ("user", USER, RESPONSE)
    for text in (prompt + thinking + RESPONSE + end, prompt + thinking + RESPONSE):
        for given_prompt in ("", prompt, prompt + thinking, (prompt + thinking).rstrip()):
            assert get_last_message(split_text(text, given_prompt)) == expected
    assert get_last_message(split_pair(prompt + thinking, RESPONSE + end)) == expected
    assert get_last_message(split_text(prompt + RESPONSE + end, prompt + thinking)) == expected
    reasoned = f"<think>\nA greeting.\n</think>\n\n{RESPONSE}"
    assert split_text(prompt + reasoned + end, prompt).response == reasoned
    messages = split_text(prompt + thinking + "One." + end + prompt + RESPONSE + end).messages
    assert [m["content"] for m in messages if m["role"] == "assistant"] == ["One."]


@pytest.mark.parametrize("name", ["chatml", "deepseek", "gemma", "phi", "command r", "granite"])
def test_a_response_continues_the_first_words_that_its_prompt_gives(name: str) -> None:
    prompt, end, _ = render(name)
    expected = ("user", USER, RESPONSE)
    assert get_last_message(split_text(prompt + RESPONSE + end, prompt + RESPONSE[:9])) == expected
    assert get_last_message(split_pair(prompt + RESPONSE[:9], RESPONSE[9:] + end)) == expected


SYSTEM_TEXTS = {
    "chatml": ["You are an assistant."], "mistral v7": ["Be kind."], "llama2": ["Be kind."], "deepseek": ["Be kind."],
    "gpt-oss": ["You are ChatGPT.\nReasoning: low", "# Instructions\n\nBe kind.\n\n"], "kimi": ["You are Kimi."],
    "command a": ["# System Preamble\nBe kind."], "openchat": [], "openchat system": ["Be kind."],
}  # fmt: skip


@pytest.mark.parametrize("name", SYSTEM_TEXTS)
def test_the_system_messages_are_those_of_the_template(name: str) -> None:
    prompt, end, pad = render(name)
    for text in (prompt + RESPONSE + end, pad * 3 + prompt + RESPONSE):
        messages = split_text(text).messages
        assert [message["content"] for message in messages if message["role"] == "system"] == SYSTEM_TEXTS[name]


SAMPLED = {
    "gpt-oss": (
        "<|channel|>final<|message|>",
        ["", "<|channel|>analysis<|message|>A greeting.<|end|><|start|>assistant"],
    ),
    "command a": ("<|START_RESPONSE|>", ["", "<|START_THINKING|><|END_THINKING|>"]),
}
"""End of the prompt above that the model itself may generate, and what it may generate before that."""


@pytest.mark.parametrize("name", SAMPLED)
def test_a_response_may_start_with_the_rest_of_its_header(name: str) -> None:
    full_prompt, end, _ = render(name)
    sampled_header, reasonings = SAMPLED[name]
    prompt = full_prompt.removesuffix(sampled_header)
    for reasoning in reasonings:
        sampled = reasoning + sampled_header + RESPONSE + end
        items = [split_text(prompt + sampled), split_text(prompt + sampled, prompt), split_pair(prompt, sampled)]
        assert [get_last_message(item) for item in items] == [("user", USER, RESPONSE)] * 3
        assert all(item.messages == split_text(full_prompt + RESPONSE).messages for item in items)
        follow_up = prompt + sampled + full_prompt + RESPONSE
        answers = [m["content"] for m in split_text(follow_up).messages if m["role"] == "assistant"]
        assert answers == [RESPONSE]


@pytest.mark.parametrize(
    "sampled",
    [
        "<|channel|>analysis<|message|>A greeting. I", "<|channel|>analysis<|message|>A greeting.<|end|>",
        "<|channel|>commentary to=functions.x<|message|>{}<|call|>", "analysisA greeting.assistantfinalHi",
        "<|channel|>final<|message|>Hi<|return|>more", " to=functions.x<|channel|>commentary json<|message|>{}<|call|>",
    ],
)  # fmt: skip
def test_reasoning_without_a_response_and_tool_calls_are_refused(sampled: str) -> None:
    prompt = render("gpt-oss")[0].removesuffix("<|channel|>final<|message|>")
    earlier = prompt + "<|channel|>final<|message|>One.<|end|>" + prompt
    for context in (prompt, earlier):
        for split, arguments in ((split_text, (context + sampled,)), (split_text, (context + sampled, context)),
                                 (split_pair, (context, sampled))):  # fmt: skip
            with pytest.raises(ApiError, match="cannot be split"):
                split(*arguments)


WRITTEN = {
    "vicuna": "A chat between a curious user and an assistant. USER: {} ASSISTANT: ",
    "vicuna alone": "USER: {} ASSISTANT: ", "hh": "\n\nHuman: {}\n\nAssistant: ",
    "deepseek v2": "User: {}\n\nAssistant: ",
    "alpaca": "Below is an instruction that describes a task.\n\n### Instruction:\n{}\n\n### Response:\n",
    "guanaco": "### Human: {}\n### Assistant: ", "solar": "### User:\n{}\n\n### Assistant:\n",
    "redpajama": "<human>: {}\n<bot>: ", "chatml without tokens": "user\n{}\nassistant\n",
    "qwen without tokens": "system\nYou are Qwen.\nuser\n{}\nassistant\n", "gemma without tokens": "user\n{}\nmodel\n",
    "llama3 without tokens": "system\n\nCutting Knowledge Date: 2023\n\nuser\n\n{}assistant\n\n",
    "exaone": "[|user|]{}\n[|assistant|]", "baichuan": "<reserved_106>{}<reserved_107>",
    "nemotron": "<extra_id_1>User\n{}\n<extra_id_1>Assistant\n",
    "seed": "<seed:bos>user\n{}<seed:eos><seed:bos>assistant\n",
    "openchat coding": "<s>Code User: {}<|end_of_turn|>Code Assistant: ",
    "internlm": "<|User|>:{}<eoh>\n<|Bot|>:", "hunyuan": "<|hy_User|>{}<|hy_Assistant|>",
    "vicuna with its own system message": "You are kind. USER: {} ASSISTANT:",
    "deepseek v2 with a system message": "You are kind.\n\nUser: {}\n\nAssistant:",
    "r1 zero": "A conversation between User and Assistant. The Assistant helps. User: {} Assistant: <think>",
    "tiny zero": "A conversation between User and Assistant. The user asks.\nUser: {}\nAssistant: Let me see.\n",
    "falcon": "User: {}\nFalcon:", "falcon with a system message": "System: Be kind.\nUser: {}\nFalcon:",
    "koala": "BEGINNING OF CONVERSATION: USER: {} GPT:", "phi 2": "Instruct: {}\nOutput:",
    "ernie with a system message": "<|begin_of_sentence|>Be kind.\nUser: {}\nAssistant: ",
    "chatglm 2": "[Round 1]\n\n\u95ee\uff1a{}\n\n\u7b54\uff1a", "longcat": "[Round 0] USER:{} ASSISTANT:",
    "markdown": "**User:** {}\n\n**Assistant:** ", "brackets": "[User]: {}\n[Assistant]: ",
    "tags": "<user>{}</user><assistant>", "minicpm": "<s><\u7528\u6237>{}<AI>",
    "nemotron h": "<SPECIAL_10>System\n\n<SPECIAL_11>User\n{}\n<SPECIAL_11>Assistant\n",
    "minimax": "<beginning_of_sentence>user name=user\n{}<end_of_sentence>\n<beginning_of_sentence>ai name=ai\n",
    "minimax 2": "]~!b[]~b]user\n{}[e~[\n]~b]ai\n", "ling": "<role>HUMAN</role>{}<role>ASSISTANT</role>",
}  # fmt: skip
"""Chat formats without support; many mark turns by words alone."""


@pytest.mark.parametrize("name", WRITTEN)
def test_a_format_without_support_is_refused(name: str) -> None:
    prompt = WRITTEN[name].format(USER)
    for text, given_prompt in (
        (prompt + RESPONSE, ""), (prompt + RESPONSE, prompt), (prompt + RESPONSE + "</s>", prompt),
        (prompt.lstrip() + RESPONSE, ""),
    ):  # fmt: skip
        with pytest.raises(ApiError, match="cannot be split"):
            split_text(text, given_prompt)
    with pytest.raises(ApiError, match="cannot be split"):
        split_pair(prompt, RESPONSE)


CONFIGURED = {
    "vicuna": ("USER:", "ASSISTANT:", "</s>"), "vicuna alone": ("USER:", "ASSISTANT:", "</s>"),
    "hh": ("\n\nHuman:", "\n\nAssistant:", "<|endoftext|>"), "deepseek v2": ("User:", "Assistant:", "<|eos|>"),
    "alpaca": ("### Instruction:", "### Response:", "</s>"), "guanaco": ("### Human:", "### Assistant:", "</s>"),
    "solar": ("### User:", "### Assistant:", "</s>"), "redpajama": ("<human>:", "<bot>:", "<|endoftext|>"),
    "exaone": ("[|user|]", "[|assistant|]", "[|endofturn|]"), "baichuan": ("<reserved_106>", "<reserved_107>", "</s>"),
    "nemotron": ("<extra_id_1>User", "<extra_id_1>Assistant", "<extra_id_1>"),
    "seed": ("<seed:bos>user", "<seed:bos>assistant", "<seed:eos>"),
    "openchat coding": ("Code User:", "Code Assistant:", "<|end_of_turn|>"),
    "internlm": ("<|User|>:", "<|Bot|>:", "<eoh>"), "hunyuan": ("<|hy_User|>", "<|hy_Assistant|>", "<|hy_eos|>"),
}  # fmt: skip
"""serve.chat_markers of the formats above: user, assistant, end."""


@pytest.mark.parametrize("name", CONFIGURED)
def test_a_format_without_support_can_be_configured(name: str) -> None:
    markers = dict(zip(("user", "assistant", "end"), CONFIGURED[name], strict=True))
    chat_format = build_custom_format(Settings.model_validate({"serve": {"chat_markers": markers}}).serve.chat_markers)
    prompt, end = WRITTEN[name].format(USER), markers["end"]
    items = [
        split_text(prompt + RESPONSE + end, "", chat_format), split_text(prompt + RESPONSE, prompt, chat_format),
        split_text(prompt + RESPONSE + end, prompt.rstrip(), chat_format),
        split_pair(prompt, RESPONSE + end, chat_format),
    ]  # fmt: skip
    assert [get_last_message(item) for item in items] == [("user", USER, RESPONSE)] * 4
    if name not in ("vicuna", "alpaca"):  # their first turn has an introduction
        messages = split_text(prompt + "One." + end + prompt + RESPONSE, "", chat_format).messages
        assert [message["content"] for message in messages] == [USER, "One.", USER]


def list_trl_templates() -> list[Path]:
    spec = find_spec("trl")
    return sorted(Path(str(spec.origin)).parent.glob("chat_templates/*.jinja")) if spec else []


@pytest.mark.parametrize("path", list_trl_templates(), ids=lambda path: path.stem)
def test_chat_templates_of_real_models_are_split_or_refused(path: Path) -> None:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template = _compile_jinja_template(path.read_text())
    messages = [
        {"role": "user", "content": "First?"}, {"role": "assistant", "content": "One."},
        {"role": "user", "content": USER},
    ]  # fmt: skip
    options = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    try:
        prompt = template.render(messages=messages, add_generation_prompt=True, **options)
        full_text = template.render(messages=[*messages, {"role": "assistant", "content": RESPONSE}], **options)
    except jinja2.TemplateError:  # the template of a vision model, for lists of parts
        pytest.skip("does not take text")
    for text, given_prompt in (
        (full_text, ""),
        (full_text, prompt),
        (prompt + RESPONSE, prompt),
        (prompt + RESPONSE, ""),
    ):
        try:
            item = split_text(text, given_prompt)
        except ApiError as error:
            assert error.status == 422
            continue
        turns = [(message["role"], message["content"]) for message in item.messages if message["role"] != "system"]
        assert turns == [(message["role"], message["content"]) for message in messages]
        assert item.response == RESPONSE


def test_markers_in_the_settings_are_checked() -> None:
    markers = {"user": "U:", "assistant": "A:", "end": "$"}
    assert Settings.model_validate({"serve": {"chat_markers": markers}}).serve.chat_markers == markers
    for wrong in ({"user": "U:"}, {**markers, "end": ""}, {**markers, "robot": "R:"}, {**markers, "user": "A:"}):
        with pytest.raises(ValueError, match="chat_markers"):
            Settings.model_validate({"serve": {"chat_markers": wrong}})


@pytest.mark.parametrize(
    "name",
    ["chatml", "llama3", "gemma", "mistral v7", "tulu", "deepseek", "command a", "gpt-oss", "kimi", "openchat system"],
)
def test_every_text_route_gives_the_score_of_the_messages(
    name: str, service_url: str, reward_models: dict[str, RewardModel]
) -> None:
    prompt, end, pad = render(name)
    text = pad * 3 + prompt + RESPONSE + end + pad * 2
    item = split_text(text)
    value = reward_models["love"].score([item], "love")[0].value
    safety = reward_models["safety"].score([item], "safety")[0].value
    with httpx.Client(base_url=service_url) as client:

        def post(path: str, body: dict[str, object]) -> dict[str, object]:
            response = client.post(path, json=body)
            assert response.status_code == 200, response.text
            return {"reply": response.json()}

        messages = {"messages": item.messages, "response": item.response}
        expected = client.post("/v1/score", json=messages).json()["scores"]["love"]["value"]
        assert expected == pytest.approx(value, abs=1e-4)
        replies = {
            # OpenRLHF's HTTP reward client; verl's reward loop; vLLM's score, classify, pooling; TEI; cohere; openai.
            "openrlhf": post("/get_reward", {"query": [text], "prompts": [prompt], "labels": [""]}),
            "verl": post("/classify", {"model": "love", "input": text, "activation": False}),
            "classify": post("/classify", {"model": "love", "input": [text], "use_activation": True}),
            "pooling": post("/pooling", {"model": "love", "input": text, "use_activation": False}),
            "score": post("/score", {"model": "love", "text_1": prompt, "text_2": RESPONSE + end}),
            "data": post("/score", {"data_1": [prompt], "data_2": [RESPONSE], "use_activation": False}),
            "rerank": post("/v1/rerank", {"model": "love", "query": prompt, "documents": [RESPONSE]}),
            "tei": post("/predict", {"inputs": text}),
            "tei pair": post("/predict", {"inputs": [[prompt, RESPONSE]]}),
            "openai": post("/v1/moderations", {"input": text, "model": "omni-moderation-latest"}),
        }  # fmt: skip
    results = {key: reply["reply"] for key, reply in replies.items()}
    found = {
        "openrlhf": results["openrlhf"]["scores"][0],
        "classify": results["classify"]["data"][-1]["probs"][-1],
        "score": results["score"]["data"][0]["score"],
        "rerank": results["rerank"]["results"][0]["relevance_score"],
        "tei": results["tei"][0]["score"],
        "tei pair": results["tei pair"][0][0]["score"],
    }
    assert found == pytest.approx(dict.fromkeys(found, value), abs=1e-4)
    logits = {
        "openrlhf": results["openrlhf"]["rewards"][0],
        "verl": results["verl"]["data"][-1]["probs"][-1],
        "pooling": results["pooling"]["data"][0]["data"][0],
        "data": results["data"]["data"][0]["score"],
    }
    assert logits == pytest.approx(dict.fromkeys(logits, logit(value)), abs=1e-3)
    assert results["openai"]["results"][0]["category_scores"]["unsafe"] == pytest.approx(1 - safety, abs=1e-4)
    assert results["score"]["usage"]["total_tokens"] > 5


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text",
    [
        " " * 100_000, "a" + " " * 99_000 + "b", "A chat between " + "USER: " * 16_000, "\n### Human " * 8_000,
        "system\n" + "a\n\nuser\n" * 11_000, "<think>" + " " * 50_000 + "a" * 40_000 + "</think>", "<s>" * 30_000,
        "[INST]a" + " " * 90_000 + "b<</SYS>>[/INST]c", "<|im_start|>assistant\n" + "\n" * 90_000,
        "<|im_start|>user\n" * 6_000, "<|turn" + "a" * 90_000, "user\n" * 20_000,
    ],
    ids=range(12),
)  # fmt: skip
def test_a_hostile_text_is_split_or_refused_in_linear_time(text: str) -> None:
    def split_or_refuse(split: Callable[[str, str], ScoringItem], first: str, second: str) -> None:
        try:
            item = split(first, second)
        except ApiError as error:
            assert error.status == 422
        else:
            assert item.response in first + second

    for prompt in ("", "hello", "user\n" * 5):
        split_or_refuse(split_text, text, prompt)
        split_or_refuse(split_pair, text, "yes" + text)
