"""Rows of messages that users write: any task in which a language model hears or reads something and answers."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np

from speechllm.data.conversations import LazyRows, Row
from speechllm.encoding import DataError
from speechllm.messages import Audio, Message, Role
from tokenizer.errors import InputError
from tokenizer.tables import json_rows, optional_text, read_text, shown


class RowError(InputError):
    """A row of messages that cannot be used; the message names the file and the row."""


def read_rows(file: str | Path, numbers: Mapping[str, int], learnt: bool = True) -> list[Row]:
    """The rows of a JSONL file, in the form of chats: {"messages": [...], "task": ..., "weight": ...} in each line.

    A message is {"role": "system", "user" or "assistant", "content": a text or a list of parts}; a part is
    {"type": "text", "text": ...} or {"type": "audio", "id": an utterance's}; assistants answer in text. task: a name
    under which answers are scored; weight: how often the row is read in an epoch, 1 if not given.
    numbers: of the encoded utterances, by their ids. learnt: whether a row must hold an answer, as for training. Raises
    RowError or TableError for the first row that is wrong.
    """
    rows = []
    for place, cells in json_rows(str(file), read_text(file)):
        try:
            rows.append(_row(cells, numbers, place, learnt))
        except ValueError as error:
            raise RowError(f"{place}: {error}") from error
    if not rows:
        raise RowError(f"{file} holds no rows, expected one JSON object with messages per line")
    return rows


def _row(cells: dict[str, Any], numbers: Mapping[str, int], place: str, learnt: bool) -> Row:
    messages = cells.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages is {shown(messages)}, expected a list of messages")
    turns = [_message(message, numbers) for message in messages]
    if learnt and not any(turn.role == "assistant" for turn in turns):
        raise ValueError("no message by the assistant, expected an answer to learn")
    if any(turn.role == "assistant" and not "".join(map(str, turn.parts)).strip() for turn in turns):
        raise ValueError("an answer of the assistant is empty, expected text")
    weight = cells.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise ValueError(f"weight is {shown(weight)}, expected a number of at least 0")
    task = cells.get("task", "untitled")
    if not isinstance(task, str) or not task:
        raise ValueError(f"task is {shown(task)}, expected a name")
    return Row(turns, place, task, float(weight))


def _message(message: Any, numbers: Mapping[str, int]) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"a message is {shown(message)}, expected an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in get_args(Role):
        raise ValueError(f"role is {shown(role)}, expected one of {', '.join(get_args(Role))}")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts:
        raise ValueError(f"content of the {role} is {shown(content)}, expected a text or a list of parts")
    found = tuple(_part(part, numbers) for part in parts)
    if role == "assistant" and not all(isinstance(part, str) for part in found):
        raise ValueError("the assistant speaks, expected text: a language model answers in text")
    return Message(cast(Role, role), found)


def _part(part: Any, numbers: Mapping[str, int]) -> str | Audio:
    match part:
        case {"type": "text", "text": str(text)} if text:
            try:
                optional_text(text)  # refuses what no text in UTF-8 holds
            except ValueError as error:
                raise ValueError(f"a text is {shown(text)}, expected {error}") from error
            return text
        case {"type": "audio", "id": str(name)}:
            if name not in numbers:
                raise ValueError(
                    f"audio {shown(name)} is not among the {len(numbers):,} encoded utterances of the splits"
                )
            return Audio(numbers[name])
        case _:
            expected = '{"type": "text", "text": ...} or {"type": "audio", "id": ...}'
            raise ValueError(f"a part is {shown(part)}, expected {expected}")


def mixed(*sources: tuple[Sequence[Row], float]) -> tuple[Sequence[Row], np.ndarray | None]:
    """Rows of several sources as one, and how often each is to be read in an epoch: None if each is read once.

    sources: rows with a weight, by which those of the rows are multiplied. Raises DataError if there are rows and all
    weights are 0.
    """
    ends = np.cumsum([len(rows) for rows, _ in sources])

    def pick(place: int) -> Row:
        source = int(np.searchsorted(ends, place, side="right"))
        return sources[source][0][place - int(ends[source])]  # from the end of that source

    weights = np.concatenate([weight * _weights(rows) for rows, weight in sources])
    if len(weights) and not weights.any():
        raise DataError(f"nothing to read: all {len(weights)} rows have a weight of 0")
    return LazyRows(int(ends[-1]), pick), None if (weights == 1).all() else weights


def _weights(rows: Sequence[Row]) -> np.ndarray:
    return np.ones(len(rows)) if isinstance(rows, LazyRows) else np.array([row.weight for row in rows])


def same_answer(reference: str, answer: str) -> bool:
    """Whether two answers are equal in their `canonical_answer`."""
    return canonical_answer(reference) == canonical_answer(answer)


def canonical_answer(text: str) -> str:
    """An object or a list in JSON in one way of writing it, in which 1.0 is 1; any other text stripped."""

    def number(digits: str) -> float:
        value = float(digits)
        return int(value) if value.is_integer() else value

    try:
        value = json.loads(text, parse_float=number)
        return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else text.strip()
    except (ValueError, RecursionError):
        return text.strip()
