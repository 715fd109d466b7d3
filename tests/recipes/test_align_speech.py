"""Forced alignment, tested with synthetic speech of known phone times."""

from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile

from speechllm import InputError, Utterance, read_corpus
from tokenizer.files import read_jsonl, write_jsonl
from tokenizer.utterances import frame_phones

pytest.importorskip("pocketsphinx", reason="needs the align extra")
pytest.importorskip("espeakng_loader", reason="needs the demo extra")


@pytest.fixture(scope="module")
def run(start_recipe: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Run a recipe as a command; what it printed."""
    folder = tmp_path_factory.mktemp("started_in")

    def run(recipe: str, *words: object) -> str:
        process = start_recipe(recipe, " ".join(map(str, words)), folder)
        output, errors = process.communicate()
        assert process.returncode == 0, errors[-2000:]
        return output

    return run


@pytest.fixture(scope="module")
def corpus(run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six synthetic sentences with the synthesiser's own phone times, one without a text and one broken file."""
    folder = tmp_path_factory.mktemp("corpus")
    run("synthesize_speech.py", folder, "--train=4", "--dev=1", "--test=1")
    manifest = folder / "manifest.jsonl"
    rows = read_jsonl(manifest)
    rows.append({**rows[0], "id": "silent-text", "text": None, "phones": None})
    (folder / "broken.flac").write_bytes(b"no sound")
    rows.append({**rows[0], "id": "broken", "path": "broken.flac", "phones": None})
    write_jsonl(manifest, rows)
    return folder


@pytest.fixture(scope="module")
def aligned(
    run: Callable[..., str], corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Utterance], str]:
    folder = tmp_path_factory.mktemp("aligned")
    output = run("align_speech.py", f"data={corpus}", f"output={folder}")
    return read_corpus(folder), output


def test_all_other_columns_of_the_manifest_are_kept(corpus: Path, aligned: tuple[list[Utterance], str]) -> None:
    for before, after in zip(read_corpus(corpus), aligned[0], strict=True):
        assert Path(before.path).resolve() == Path(after.path).resolve()
        for name in ("id", "duration_s", "split", "text", "speaker"):
            assert getattr(before, name) == getattr(after, name)


def test_utterances_that_cannot_be_aligned_have_no_phones_and_are_counted(aligned: tuple[list[Utterance], str]) -> None:
    utterances, output = aligned
    without = [u.id for u in utterances if not u.phones]
    assert len(without) <= 5 and without[-2:] == ["silent-text", "broken"]  # synthetic voices are hard for it too
    assert f"aligned {8 - len(without)} of 8 utterances" in output
    assert "'no transcript': 1" in output and "'unreadable': 1" in output


def test_phone_times_match_those_of_the_synthesiser(corpus: Path, aligned: tuple[list[Utterance], str]) -> None:
    """The two phone sets have other names; so: phone changes come in the same places, and times rise to the end."""
    agreements = []
    pairs = [pair for pair in zip(read_corpus(corpus), aligned[0], strict=True) if pair[1].phones]
    for known, found in pairs:
        ends = [end for _, end in found.phones]
        assert ends == sorted(ends) and abs(ends[-1] - found.duration_s) < 0.1
        names = {phone for phone, _ in found.phones}
        assert len(names) > 5 and all(name.isupper() for name in names)
        frames = int(known.duration_s * 50)
        changes = [
            np.flatnonzero([a != b for a, b in zip(labels, labels[1:], strict=False)])
            for labels in (frame_phones(known, frames), frame_phones(found, frames))
        ]
        near = [np.abs(changes[0] - change).min() <= 2 for change in changes[1]]  # 40 ms
        agreements.append(np.mean(near))
    assert np.mean(agreements) > 0.75  # by chance about a half


def test_an_alignment_does_not_depend_on_those_before(corpus: Path, recipe: Callable[[str], ModuleType]) -> None:
    """So a resumed run ends as one that was never killed, on however many processors."""
    align, utterances = recipe("align_speech.py").align, read_corpus(corpus)[:6]
    forwards = list(map(align, utterances))
    assert forwards == list(map(align, reversed(utterances)))[::-1] and any(phones for phones, _ in forwards)


def test_a_corpus_of_silence_gives_no_phones(run: Callable[..., str], tmp_path: Path) -> None:
    soundfile.write(tmp_path / "quiet.wav", np.zeros(16_000, np.float32), 16_000)
    row = {"path": "quiet.wav", "duration_s": 1.0, "text": "hello there"}
    write_jsonl(tmp_path / "manifest.jsonl", [row])
    output = run("align_speech.py", f"data={tmp_path}", f"output={tmp_path / 'aligned'}")
    assert "aligned 0 of 1" in output


@pytest.mark.parametrize("error", [KeyboardInterrupt(), BrokenProcessPool("a process was killed")])
def test_a_killed_run_is_resumed(
    recipe: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException
) -> None:
    rows = [{"path": f"{i}.wav", "duration_s": 1.0, "text": f"{i}", "phones": [["X", 0.5]]} for i in range(5)]
    write_jsonl(tmp_path / "manifest.jsonl", rows)
    for row in rows:
        (tmp_path / row["path"]).touch()
    module, asked = recipe("align_speech.py"), []

    class Pool:
        def __init__(self, *_: object, **__: object):
            pass

        def map(self, function: Callable, utterances: list[Utterance], **_: object) -> Iterator[Any]:
            for utterance in utterances:
                if utterance.text == "3" and "3" not in asked:
                    asked.append("3")
                    raise error
                asked.append(utterance.text)
                yield (None, "unreadable") if asked == ["0", "1"] else ([("A", int(utterance.text) / 10)], None)

        def __enter__(self) -> "Pool":
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(module, "ProcessPoolExecutor", Pool)
    config = module.AlignConfig(str(tmp_path), str(tmp_path / "aligned"))
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else InputError):
        module.main(config)
    journal = tmp_path / "aligned" / "phones.jsonl"
    with journal.open("a", encoding="utf-8") as file:
        file.write('{"id": "3.w')  # cut off
    module.main(config)
    assert asked == ["0", "1", "2", "3", "1", "3", "4"]  # what could not be aligned is tried again
    found = read_corpus(tmp_path / "aligned")
    assert [utterance.phones for utterance in found] == [(("A", i / 10),) for i in range(5)] and not journal.exists()
