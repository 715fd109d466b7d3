"""Rows of messages in JSONL files: how they are read, mixed and scored, and that bad ones are one clear line."""

import json
from pathlib import Path

import pytest

from speechllm import DataError
from speechllm.data.conversations import LazyRows, Row
from speechllm.data.rows import mixed, read_rows, same_answer
from speechllm.messages import Audio, Message
from tokenizer.errors import InputError

ASK = {"role": "user", "content": [{"type": "text", "text": "Feeling?"}, {"type": "audio", "id": "u1"}]}
ANSWER = {"role": "assistant", "content": "happy"}
GOOD = {"messages": [ASK, ANSWER], "task": "emotion", "weight": 2, "license": "ignored"}


def written(folder: Path, *rows: object) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return file


def test_rows_are_read_as_they_are_written(tmp_path: Path) -> None:
    text_only = {"messages": [{"role": "user", "content": "How?"}, ANSWER]}
    first, second = read_rows(written(tmp_path, GOOD, "", text_only), {"u0": 0, "u1": 1})
    assert first.turns == [Message("user", ("Feeling?", Audio(1))), Message("assistant", ("happy",))]
    assert (first.task, first.weight, first.answers) == ("emotion", 2.0, ["happy"])
    assert first.name == f"{tmp_path / 'rows.jsonl'}, row 1" and second.name.endswith("row 3")
    assert (second.task, second.weight) == ("untitled", 1.0) and second.turns[0].parts == ("How?",)


def said(role: str, content: object) -> dict:
    return {"messages": [{"role": role, "content": content}, ANSWER]}


@pytest.mark.parametrize(
    "row, message",
    [
        ("{", "not JSON"),
        ("[1]", "expected one JSON object per line"),
        ({}, "messages is null, expected a list"),
        ({"messages": []}, r"messages is \[\], expected a list"),
        ({"messages": ["hello"]}, "a message is 'hello', expected an object with role and content"),
        ({"messages": [ASK]}, "no message by the assistant"),
        (said("tool", "a"), "role is 'tool', expected one of system, user, assistant"),
        (said("user", []), r"content of the user is \[\], expected a text or a list of parts"),
        (said("user", None), "content of the user is null"),
        (said("user", ""), "a part is .*'text': ''.*, expected"),
        (said("assistant", " "), "an answer of the assistant is empty"),
        (said("user", "\ud800"), "a text is .*, expected whole characters"),
        (said("user", [{"type": "image", "url": "a"}]), r"a part is \{'type': 'image', .*expected"),
        (said("user", [{"type": "audio", "id": "u7"}]), "audio 'u7' is not among the 1 encoded utterances"),
        (said("user", [{"type": "audio", "id": 7}]), "a part is"),
        (said("assistant", [{"type": "audio", "id": "u1"}]), "the assistant speaks, expected text"),
        (GOOD | {"weight": -1}, "weight is -1, expected a number of at least 0"),
        (GOOD | {"weight": True}, "weight is True"),
        (GOOD | {"task": 3}, "task is 3, expected a name"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(InputError, match=rf"rows\.jsonl, row 2: .*{message}") as error:
        read_rows(written(tmp_path, GOOD, row), {"u1": 0})
    assert "\n" not in str(error.value)


def test_a_file_without_rows_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rows\.jsonl holds no rows"):
        read_rows(written(tmp_path, "", " "), {})


def test_sources_are_one_after_the_other_with_their_weights() -> None:
    rows = [Row([], name, weight=weight) for name, weight in (("a", 1.0), ("b", 0.5))]
    lazy = LazyRows(2, lambda place: Row([], f"lazy {place}"))
    both, weights = mixed((lazy, 1.0), (rows, 4.0))
    assert [row.name for row in both] == ["lazy 0", "lazy 1", "a", "b"] and weights.tolist() == [1, 1, 4, 2]
    assert mixed((lazy, 1.0))[1] is None and mixed((LazyRows(0, both.make), 0.0), (rows[:1], 1.0))[1] is None
    assert both[-1].name == "b" and [row.name for row in both[1:3]] == ["lazy 1", "a"]
    with pytest.raises(DataError, match="all 2 rows have a weight of 0"):
        mixed((rows, 0.0))
    assert len(mixed((rows[:0], 1.0))[0]) == 0


@pytest.mark.parametrize(
    "reference, answer, equal",
    [
        ("happy", " happy\n", True),
        ("happy", "Happy", False),
        ('{"a": "x", "b": [1, 2]}', '{"b":[1,2],"a":"x"}', True),
        ('{"a": 1}', '{"a": 2}', False),
        ('{"a": 1}', "a is 1", False),
        ('{"a": 1}', '{"a": 1.0}', True),
        ('{"a": 1}', '{"a": true}', False),
        ('{"a": 9007199254740993}', '{"a": 9007199254740992}', False),  # equal as floats
        ("[" * 100_000, "[", False),
        ("7", "7.0", False),  # a word, not a value
    ],
)
def test_answers_are_compared_as_texts_or_as_json(reference: str, answer: str, equal: bool) -> None:
    assert same_answer(reference, answer) is equal
