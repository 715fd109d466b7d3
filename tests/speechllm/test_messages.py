"""Conversations as tokens and labels, written out by hand in both templates."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from speechllm import AudioVocabulary, Encoding
from speechllm.messages import Audio, ConversationError, ConversationWriter, Message, fixed_template
from speechllm.prompt import conversation_example, transcription
from speechllm.small_model import small_text_tokenizer

BEGIN, END = 1, 2  # <|im_start|>, <|im_end|>
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = AudioVocabulary(Encoding("f" * 16, 16_000, 50.0, 1, 16), 300, 316, 317, 318)
ONE, TWO = Audio(torch.tensor([[3, 0]])), Audio(torch.tensor([[7]]))
HEARD = [(ONE, [316, 303, 300, 317]), (TWO, [316, 307, 317])]


@pytest.fixture(scope="module")
def characters() -> object:
    """A text tokenizer that has learnt no pairs, with a chat template: every character is one token."""
    made = small_text_tokenizer([], 259)
    made.chat_template = CHATML
    return made


@pytest.fixture
def ids(characters: Callable) -> Callable[[str], list[int]]:
    return lambda text: characters(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def user(*parts: str | Audio) -> Message:
    return Message("user", parts)


def assistant(*parts: str) -> Message:
    return Message("assistant", parts)


CONVERSATIONS = {
    "transcription": transcription(ONE.speech, "ON A"),
    "audio in the middle": [user("hear ", ONE, " what?"), assistant("on")],
    "two recordings": [user(ONE, "or", TWO), assistant("the ", "first")],
    "several turns": [
        Message("system", ("be brief",)),
        user(ONE),
        assistant("on"),
        user("and ", TWO, "?"),
        assistant("off"),
    ],
    "text only": [user("how?"), assistant("well")],
    "text that looks special": [user("<|im_end|> <|audio_3|>"), assistant("<|im_start|>")],
    "an answer to nothing": [assistant("on monday")],
    "a question after the answer": [user("a"), assistant("b"), user("c")],
}


@pytest.mark.parametrize("template", ["plain", "chat"])
@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_every_token_and_label_of_a_conversation(
    characters: object, ids: Callable[[str], list[int]], kind: str, template: str
) -> None:
    turns = CONVERSATIONS[kind]
    chat = template == "chat"
    expected: list[tuple[int, bool]] = []
    for turn in turns:
        learnt = turn.role == "assistant"
        frame = [BEGIN, *ids(f"{turn.role}\n")] if chat else []
        said = [token for part in turn.parts for token in (ids(part) if isinstance(part, str) else heard(part))]
        expected += [(token, False) for token in frame] + [(token, learnt) for token in said]
        expected += [(END, learnt)] * (chat or learnt) + [(token, False) for token in ids("\n") * chat]
    writer = ConversationWriter(replace(VOCABULARY, template=template), characters)
    example = conversation_example(turns, writer)
    assert example.input_ids.tolist() == [token for token, _ in expected]
    assert example.labels.tolist() == [token if learnt else -100 for token, learnt in expected]
    assert example.features is None
    # the pieces of several conversations are those of each
    (alone,), (_, together) = writer.pieces([turns]), writer.pieces([[user("x", ONE)], turns])
    assert alone == together


def heard(part: Audio) -> list[int]:
    return next(tokens for audio, tokens in HEARD if audio.speech is part.speech)


@pytest.mark.parametrize("template", ["plain", "chat"])
@pytest.mark.parametrize("kind", [kind for kind in CONVERSATIONS if kind not in ("an answer to nothing",)])
def test_a_prompt_is_what_stands_before_the_answer(characters: object, kind: str, template: str) -> None:
    turns = CONVERSATIONS[kind]
    last = max(place for place, turn in enumerate(turns) if turn.role == "assistant")
    writer = ConversationWriter(replace(VOCABULARY, template=template), characters)
    prompt = conversation_example(turns[:last], writer, answering=True)
    example = conversation_example(turns[: last + 1], writer)
    size = len(prompt)
    assert torch.equal(prompt.input_ids, example.input_ids[:size])
    assert example.labels[size] == example.input_ids[size]  # the answer begins at once


def test_codes_are_learnt_where_asked_for_and_only_there(characters: object) -> None:
    turns = [user("a", ONE), assistant("b")]
    for template in ("plain", "chat"):
        writer = ConversationWriter(replace(VOCABULARY, template=template), characters)
        both, text = conversation_example(turns, writer, learn_speech=True), conversation_example(turns, writer)
        codes = VOCABULARY.is_code(both.input_ids)
        assert torch.equal(both.labels[codes], both.input_ids[codes]) and int(codes.sum()) == 2
        assert torch.equal(both.labels[~codes], text.labels[~codes]) and (text.labels[codes] == -100).all()


@pytest.mark.parametrize(
    "template, message",
    [
        (None, "needs a text tokenizer with a chat template"),
        (CHATML.replace("| trim", "if message.role != 'user'"), "leaves out or moves"),
        (
            CHATML.replace("<|im_end|>", "</s>"),
            r"goes on after an answer with '</s>\\n', but the end token .*'<\|im_end",
        ),
        (CHATML.replace("<|im_start|>assistant\n{% endif", "<|im_start|>bot\n{% endif"), "otherwise than it asks"),
        ("{{ raise_exception('users only') }}", "refuses messages by user, assistant: users only"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_one_error(characters: object, template: str, message: str) -> None:
    characters.chat_template = template
    try:
        with pytest.raises(ConversationError, match=message):
            conversation_example(
                [user("a"), assistant("b")], ConversationWriter(replace(VOCABULARY, template="chat"), characters)
            )
    finally:
        characters.chat_template = CHATML


FRAMED = "<|im_start|>{{ message.role }}\n{{ THOUGHT }}{{ message.content }}<|im_end|>\n"
EMPTY = "'<think>\n\n</think>\n\n'"
ASKED = "{% if add_generation_prompt %}<|im_start|>assistant\n{{ THOUGHT }}{% endif %}"
TEMPLATES = {  # cut down
    "Qwen3": (
        "{% for message in messages %}"
        + FRAMED.replace("THOUGHT", f"{EMPTY} if loop.last and message.role == 'assistant'")
        + "{% endfor %}"
        + ASKED.replace("THOUGHT", f"{EMPTY} if enable_thinking is defined and enable_thinking is false")
    ),
    "SmolLM3": (
        "{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}\n"
        "{%- set today = strftime_now('%d %B %Y') -%}\n"
        "<|im_start|>system\n{{ today }} {{ '/think' if enable_thinking else '/no_think' }}<|im_end|>\n"
        "{% for message in messages %}"
        + FRAMED.replace("THOUGHT", f"{EMPTY} if message.role == 'assistant' and not enable_thinking")
        + "{% endfor %}"
        + ASKED.replace("THOUGHT", f"{EMPTY} if not enable_thinking")
    ),
    "Llama-3.2": (
        "\n{%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n"
        '        {%- set date_string = strftime_now("%d %b %Y") %}\n    {%- else %}\n'
        '        {%- set date_string = "26 Jul 2024" %}\n    {%- endif %}\n{%- endif %}\n'
        "<|im_start|>system\n{{ date_string }}<|im_end|>\n" + CHATML
    ),
}
SYSTEMS = {"Qwen3": "", "SmolLM3": "26 July 2024 /no_think", "Llama-3.2": "26 Jul 2024"}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_chat_is_without_thinking_and_the_same_on_every_day(
    characters: object, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(characters, "chat_template", TEMPLATES[kind])
    writer = ConversationWriter(replace(VOCABULARY, template="chat"), characters)
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    prompt = conversation_example(turns[:3], writer, answering=True)
    first, one = conversation_example(turns[:1], writer, answering=True), conversation_example(turns[:2], writer)
    assert torch.equal(one.input_ids[: len(first)], first.input_ids)
    assert characters.decode(one.input_ids[len(first) :]) == "b<|im_end|>\n"
    if kind == "Qwen3":  # it would learn "b" behind a prompt that is never asked
        with pytest.raises(ConversationError, match="begins an answer within a conversation otherwise"):
            conversation_example(turns, writer)
    else:
        example = conversation_example(turns, writer)
        assert torch.equal(example.input_ids[: len(prompt)], prompt.input_ids)
        assert characters.decode(example.input_ids[len(prompt) :]) == "d<|im_end|>\n"
    thought = "" if kind == "Llama-3.2" else "<think>\n\n</think>\n\n"
    system = f"<|im_start|>system\n{SYSTEMS[kind]}<|im_end|>\n" if SYSTEMS[kind] else ""
    before = (
        f"<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n{thought if kind == 'SmolLM3' else ''}b<|im_end|>\n"
    )
    asked = f"<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n{thought}"
    assert characters.decode(prompt.input_ids) == system + before + asked
    # what an export keeps, by transformers alone
    monkeypatch.setattr(characters, "chat_template", fixed_template(characters))
    messages = [{"role": turn.role, "content": turn.parts[0]} for turn in turns[:3]]
    written = characters.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert written == system + before + asked


def test_the_template_is_saved_with_the_vocabulary(tmp_path: Path) -> None:
    replace(VOCABULARY, template="chat").save(tmp_path)
    assert AudioVocabulary.load(tmp_path).template == "chat"
    file = tmp_path / "audio_vocabulary.json"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(',\n  "template": "chat"', ""), encoding="utf-8")
    assert AudioVocabulary.load(tmp_path).template == "plain"  # of an earlier version
