"""recipes/make_rows.py: rows from the columns of a manifest."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tokenizer.corpus import read_corpus
from tokenizer.errors import InputError
from tokenizer.files import read_jsonl, write_jsonl

CORPUS = [
    {"id": "a", "path": "a.wav", "duration_s": 1.0, "emotion": "happy", "split": "train", "slots": {"size": "large"}},
    {"path": "./b/c.wav", "duration_s": 1.0, "emotion": "sad", "label": 0, "split": "test", "slots": {}},
    {"id": "d", "path": "d.wav", "duration_s": 1.0, "emotion": None, "label": 3},
]


def question(name: str, answer: str) -> list[dict]:
    content = [{"type": "text", "text": "What?"}, {"type": "audio", "id": name}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


@pytest.fixture
def make(tmp_path: Path, recipe: Callable) -> Callable[[str, list[str]], dict[str, list[dict]]]:
    write_jsonl(tmp_path / "corpus" / "manifest.jsonl", CORPUS)
    module = recipe("make_rows.py")

    def made(output: str, answer: list[str]) -> dict[str, list[dict]]:
        config = module.MakeRowsConfig(str(tmp_path / "corpus"), str(tmp_path / output), "What?", answer, "guess")
        module.main(config)
        return {file.stem: read_jsonl(file) for file in (tmp_path / output).glob("*.jsonl")}

    return made


def test_a_column_answers_in_words_and_a_recording_without_an_answer_is_left_out(make: Callable) -> None:
    found = make("rows", ["emotion"])
    assert found == {
        "train": [{"messages": question("a", "happy"), "task": "guess", "weight": 1.0}],
        "test": [{"messages": question("b/c.wav", "sad"), "task": "guess", "weight": 1.0}],
    }


def test_objects_and_several_columns_answer_in_json(make: Callable) -> None:
    answers = [rows[0]["messages"][1]["content"] for _, rows in sorted(make("slots", ["slots"]).items())]
    assert answers == ["{}", '{"size": "large"}']
    found = make("both", ["emotion", "label"])
    assert [row["messages"] for row in found["test"]] == [question("b/c.wav", '{"emotion": "sad", "label": 0}')]
    assert list(found) == ["test"]
    assert make("path", ["path"])["train"][0]["messages"] == question("a", "a.wav")


def test_a_column_that_is_not_there_is_named(make: Callable, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no row has anything in mood: name other columns"):
        make("never", ["mood"])
    (tmp_path / "corpus" / "manifest.jsonl").unlink()
    with pytest.raises(InputError, match="has no manifest.jsonl or manifest.csv"):
        make("nothing", ["emotion"])


@pytest.mark.parametrize("path", ["./b/../c.wav", "f\udcfc.wav"])  # the second: a name that is not UTF-8
def test_a_recording_without_an_id_is_called_as_the_corpus_calls_it(make: Callable, tmp_path: Path, path: str) -> None:
    rows = [{"path": name, "duration_s": 1.0, "emotion": "sad"} for name in (path, "a.wav")]
    write_jsonl(tmp_path / "corpus" / "manifest.jsonl", rows)
    (tmp_path / "corpus" / "a.wav").touch()  # one may be missing
    ids = [utterance.id for utterance in read_corpus(tmp_path / "corpus")]
    assert [row["messages"] for row in make("rows", ["emotion"])["train"]] == [question(name, "sad") for name in ids]
