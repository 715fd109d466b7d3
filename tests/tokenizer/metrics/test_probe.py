"""The CTC probe: it recognises codes that spell their text, no others, and is compared with a baseline."""

import json
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from speechllm import DataError, InputError, SpeechCodec, encode_shards, load_codes, read_corpus, speech_of
from tokenizer.metrics.probe import ctc_probe

WORDS = ("ab", "cab", "bed", "dada", "ace")
SPLITS = {"train_splits": ["train"], "test_splits": ["test"]}


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenizer.metrics.probe.BATCH", 8)


def spelling(text: str) -> Tensor:
    """Codes int [T] that spell a text: three frames a character (two codes of its own), one of silence behind it."""
    return torch.tensor([code for c in text for code in (2 * ord(c) % 31, 2 * ord(c) % 31 + 1, 2 * ord(c) % 31, 31)])


def sentences(count: int, seed: int) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, 2)) for _ in range(count)]


def test_codes_that_spell_their_text_are_read() -> None:
    train, test = sentences(200, 0), ["bed cab", "dad", "cab ab"]  # `dad` is no word of those
    read = ctc_probe([(spelling(text), text) for text in train], [spelling(text) for text in test], 32, steps=60)
    assert read == test


def test_the_seed_determines_the_result_and_no_global_state_changes() -> None:
    train = [(spelling(text), text) for text in WORDS]
    # random codes, for which every model returns another text
    test = list(torch.randint(32, (8, 40), generator=torch.Generator().manual_seed(0)))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with torch.no_grad():  # as recipes are run
        first = ctc_probe(train, test, 32, steps=30, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert any(first)
    assert ctc_probe(train, test, 32, steps=30, seed=1) == first
    assert ctc_probe(train, test, 32, steps=30, seed=2) != first


def test_what_is_read_does_not_depend_on_the_other_utterances() -> None:
    from tokenizer.metrics.probe import _Recogniser

    torch.manual_seed(0)
    model = _Recogniser(32, 5).eval()
    codes = [torch.randint(32, (length,)) for length in (9, 30, 1)]
    scores, lengths = model(codes)
    assert scores.shape == (30, 3, 5) and lengths.tolist() == [9, 30, 1]
    for column, row in enumerate(codes):
        torch.testing.assert_close(scores[: len(row), column], model([row])[0][:, 0], atol=1e-6, rtol=1e-5)


def test_texts_are_needed() -> None:
    with pytest.raises(InputError, match="the training utterances have none"):
        ctc_probe([(spelling("a"), "")], [], 32, steps=1)


# ---- the recipe


@pytest.fixture
def evaluation(recipe: Callable[[str], types.ModuleType], without_pictures: None) -> types.ModuleType:
    return recipe("eval_tokenizer.py")


@pytest.fixture(scope="module")
def work(
    tmp_path_factory: pytest.TempPathFactory, make_codec: Callable[..., SpeechCodec], noise: Callable[..., Tensor]
) -> Path:
    """A corpus of sentences without alignment, one training utterance without text, and its codes."""
    folder = tmp_path_factory.mktemp("probe")
    rows = []
    for index, text in enumerate(sentences(24, 3)):
        soundfile.write(folder / f"{index}.flac", noise(4_800, seed=index)[0].numpy(), 16_000)
        row = {"path": f"{index}.flac", "duration_s": 0.3, "split": "train" if index < 16 else "test", "speaker": "s"}
        rows.append(json.dumps(row if index == 0 else {**row, "text": text.upper() + "."}))
    (folder / "manifest.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    list(encode_shards(read_corpus(folder), make_codec(codebook_size=8), folder / "codes"))
    return folder


def evaluate(evaluation: types.ModuleType, work: Path, **settings: object) -> dict:
    output = work / "results.json"
    evaluation.main(evaluation.EvalTokenizerConfig(str(work / "codes"), str(work), str(output), **settings))
    return json.loads(output.read_text(encoding="utf-8"))


def test_the_probe_is_off_unless_asked_for(evaluation: types.ModuleType, work: Path) -> None:
    assert not {"probe", "content"} & evaluate(evaluation, work).keys()


def test_both_kinds_of_units_are_learnt_in_training_and_scored_in_the_test(
    evaluation: types.ModuleType, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, asked = sentences(24, 3), []

    def one_wrong_letter(*asked_for: object) -> list[str]:
        asked.append(asked_for)
        return ["x" + texts[16][1:], *texts[17:]]

    monkeypatch.setattr(evaluation, "ctc_probe", one_wrong_letter)
    found = evaluate(evaluation, work, **SPLITS, probe_steps=7, seed=4)["probe"]
    assert found.pop("steps") == 7
    assert list(found) == ["layer_0", "log_mel_kmeans"]
    for score in found.values():
        assert score["wer"] == pytest.approx(1 / sum(len(text.split()) for text in texts[16:]))
        assert score["cer"] == pytest.approx(1 / sum(len(text) for text in texts[16:]))  # spaces are characters
        assert score["wer_ci95"][0] <= score["wer"] <= score["wer_ci95"][1]
    for train, test, size, steps, seed in asked:
        assert [text for _, text in train] == texts[1:16] and len(test) == 8  # the first one has no text
        assert (size, steps, seed) == (8, 7, 4)
    rows, encoding = load_codes(work / "codes")
    layer_0 = [speech_of(row, encoding)[0] for row in rows][1:]
    units = [[*(units for units, _ in train), *test] for train, test, *_ in asked]
    assert all(torch.equal(a, b) for a, b in zip(units[0], layer_0, strict=True))
    assert all(len(a) == len(b) == 15 for a, b in zip(*units, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(*units, strict=True))


def test_the_whole_evaluation_with_a_probe(evaluation: types.ModuleType, work: Path) -> None:
    found = evaluate(evaluation, work, **SPLITS, probe_steps=2)
    assert set(found["probe"]) == {"steps", "layer_0", "log_mel_kmeans"}
    again = evaluate(evaluation, work, **SPLITS, probe_steps=2)
    assert again | {"seconds": found["seconds"]} == found


def test_a_probe_is_not_tested_on_what_it_learns_from(evaluation: types.ModuleType, work: Path) -> None:
    with pytest.raises(DataError, match="learn from 8 utterances it is tested on: choose train_splits and test_splits"):
        evaluate(evaluation, work, test_splits=["test"], probe_steps=2)


def test_a_probe_needs_texts(evaluation: types.ModuleType, work: Path) -> None:
    rows, _ = load_codes(work / "codes")
    with pytest.raises(DataError, match="no utterance of test_splits has one: choose probe_steps=0"):
        evaluation.check_for_probe(rows.select([1]), rows.select([0]))


def test_the_probe_learns_from_texts_only() -> None:
    with pytest.raises(ValueError, match=r"texts of train\[0\] is None, which is no text"):
        ctc_probe([(torch.tensor([1, 2]), None)], [torch.tensor([1])], 4, steps=1)
