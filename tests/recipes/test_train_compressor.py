"""train_compressor: it learns letters, resumes as if never killed, and what it saves encodes speech."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch

from speechllm import (
    DataError,
    InputError,
    SpeechCodec,
    Utterance,
    VocabularyError,
    load_codes,
    load_speech_llm,
    load_tokenizer,
    speech_of,
    transcribe_codes,
)
from speechllm.data.encoded import require_texts
from speechllm.data.recoding import recode_shards
from speechllm.data.shards import encode_shards, open_shard, write_table
from speechllm.data.spelling import letters_of_codes
from speechllm.runs.run import read_log
from speechllm.vocabulary import text_token_ids
from tokenizer.files import read_jsonl
from tokenizer.schemes.compressor import CtcCompressor

pytestmark = pytest.mark.usefixtures("new_accelerator")
RATE = 16_000
TEXTS = ["AB", "A B", "BA", "B"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, small_codec: SpeechCodec, noise: Callable) -> Path:
    folder = tmp_path_factory.mktemp("compressor")
    utterances = []
    for i in range(8):
        path, seconds = folder / f"u{i}.wav", 0.6 + 0.05 * i
        soundfile.write(path, noise(round(seconds * RATE), seed=i)[0].numpy(), RATE)
        split = "train" if i < 6 else "dev"
        utterances.append(Utterance(path.stem, path, seconds, text=TEXTS[i % 4], speaker="s", split=split))
    list(encode_shards(utterances, small_codec, folder / "codes", layers=2))
    small_codec.save_pretrained(folder / "codec")
    torch.save(utterances, folder / "utterances.pt")
    return folder


@pytest.fixture
def train(recipe: Callable[[str], ModuleType], work: Path, without_pictures: None) -> Callable[..., Path]:
    module = recipe("train_compressor.py")

    def train(name: str, **settings: object) -> Path:
        words = {"splits": ["train"], "dev_splits": ["dev"], "width": 64, "depth": 1, "steps": 6, "batch_size": 4}
        words |= {"warmup": 1, "validate_every": 3, "save_every": 2, "log_every": 1}
        words |= {"codes": str(work / "codes"), "codec": str(work / "codec"), "output": str(work / name)}
        module.main(module.CompressorConfig(**(words | settings)))
        return work / name

    train.module = module
    return train


def die(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_killed_training_ends_as_if_it_had_not_been(
    train: Callable[..., Path], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train("whole")
    with monkeypatch.context() as patch:
        patch.setattr(train.module, "letters_wer", die)
        with pytest.raises(KeyboardInterrupt):
            train("killed")
    killed = train("killed")
    assert read_log(killed) == read_log(whole)
    weights = [(run / "model" / "compressor.safetensors").read_bytes() for run in (whole, killed)]
    assert weights[0] == weights[1]
    losses = [line["loss"] for line in read_log(whole) if "loss" in line]
    assert len(losses) == 6 and losses[-1] < losses[0]

    compressor = load_tokenizer(whole / "model")
    assert isinstance(compressor, CtcCompressor) and compressor.labels == ("", " ", "a", "b")  # normalised
    list(encode_shards(torch.load(work / "utterances.pt", weights_only=False), compressor, work / "vectors"))
    rows, encoding = load_codes(work / "vectors")
    assert (len(rows), encoding.kind, encoding.labels) == (8, "features", ("", " ", "a", "b"))
    assert encoding.fingerprint == compressor.fingerprint
    compressed, same = load_codes(whole / "codes")  # without reading a recording
    assert same == encoding and len(compressed) == len(rows)
    for row, other in zip(rows, compressed, strict=True):
        assert torch.equal(speech_of(row, encoding), speech_of(other, encoding))
        assert {**row, "features": None} == {**other, "features": None}
    requests = [(folder / "request.json").read_text() for folder in (work / "vectors", whole / "codes")]
    assert json.loads(requests[0]) == json.loads(requests[1])


def test_vectors_of_a_network_that_was_trained_on_are_written_again(
    train: Callable[..., Path], work: Path, small_codec: SpeechCodec
) -> None:
    """A run that is killed while it compresses trains its last steps again, and may end elsewhere in the last bits."""
    compressor = load_tokenizer(train("letters") / "model")
    two = work / "codes_of_two"
    two.mkdir()
    shutil.copy(work / "codes" / "request.json", two)
    for number in (0, 1):
        write_table(
            two / f"codes_0000{number}.arrow", open_shard(work / "codes" / "codes_00000.arrow").slice(4 * number, 4)
        )
    whole, stopped = work / "vectors_whole", work / "vectors_stopped"
    list(recode_shards(two, compressor, whole))
    first = compressor.network.norm.bias.detach().clone()
    compressor.network.norm.bias.data.add_(1e-3)
    next(recode_shards(two, compressor, stopped))
    (stopped / "codes_00001.arrow").write_bytes(b"cut short")
    compressor.network.norm.bias.data.copy_(first)
    for process in (1, 0):
        assert list(recode_shards(two, compressor, stopped, process, 2)) == [4]
    for file in two.glob("codes_*.arrow"):
        assert (stopped / file.name).read_bytes() == (whole / file.name).read_bytes()
    spoken = open_shard(file := two / "codes_00001.arrow")
    texts = pa.array(["OTHER WORDS"] * 4)
    write_table(file, spoken.set_column(spoken.schema.get_field_index("text"), spoken.schema.field("text"), texts))
    assert list(recode_shards(two, compressor, stopped)) == [4, 4]
    assert open_shard(stopped / file.name)["text"].to_pylist() == texts.to_pylist()
    assert (stopped / "codes_00000.arrow").read_bytes() == (whole / "codes_00000.arrow").read_bytes()


def test_it_starts_with_the_weights_and_the_letters_of_a_trained_one(
    train: Callable[..., Path], work: Path, small_codec: SpeechCodec, other_codec: SpeechCodec
) -> None:
    trained = train("letters") / "model"
    settings = {"start": str(trained), "learning_rate": 1e-12, "max_utterances": 1, "mask_s": 0, "dropout": 0.0}
    run = train("on", **settings)
    first, compressor = load_tokenizer(trained), load_tokenizer(run / "model")
    assert (
        compressor.labels == first.labels == ("", " ", "a", "b")
    )  # though a single utterance without a space is heard
    for name, weights in first.network.state_dict().items():
        torch.testing.assert_close(compressor.network.state_dict()[name], weights, rtol=0, atol=1e-9)
    assert load_tokenizer(train("new", **{**settings, "start": None}) / "model").labels == ("", "a", "b")

    for wrong, said in (
        ({"width": 32, "depth": 2}, "has width=64 depth=1: give"),
        ({"layers": 1}, "has layers=2: give"),
    ):
        with pytest.raises(InputError, match=said):
            train("other_sizes", **settings, **wrong)
    with pytest.raises(InputError, match="this is no compressor"):
        train("a_codec", **{**settings, "start": str(work / "codec")})
    sizes = 64, 1, 0.0, 2
    with pytest.raises(InputError, match="have letters that this compressor does not know: 'xy'"):
        CtcCompressor.from_trained(first, small_codec, ["a", "x", "y"], *sizes)
    with pytest.raises(InputError, match="reads another tokenizer, which is in its folder"):
        CtcCompressor.from_trained(first, other_codec, ["a"], *sizes)


def test_letters_are_scored_without_a_language_model(
    train: Callable[..., Path], work: Path, recipe: Callable[[str], ModuleType]
) -> None:
    run = train("spelled", steps=150, learning_rate=1e-2, mask_s=0, dropout=0.0, dev_splits=["train"])
    eval_asr = recipe("eval_asr.py")
    eval_asr.main(eval_asr.EvalAsrConfig(None, str(run / "codes"), str(run / "test"), splits=["train"]))
    results = json.loads((run / "test" / "results.json").read_text(encoding="utf-8"))
    assert results["wer"] == json.loads((run / "done.json").read_text(encoding="utf-8"))["dev_wer"]
    compressor, (codes, encoding) = load_tokenizer(run / "model"), load_codes(work / "codes", ["train"])
    scores = [compressor.label_speech(speech_of(row, encoding))[1] for row in codes]
    spelled = [compressor.text(one) for one in scores]
    assert [row["hypothesis"] for row in read_jsonl(run / "test" / "predictions.jsonl")] == spelled and any(spelled)


def test_of_codes_with_more_layers_it_reads_as_many_as_it_is_told(
    train: Callable[..., Path], work: Path, small_codec: SpeechCodec
) -> None:
    run, utterances = train("one_layer", layers=1), torch.load(work / "utterances.pt", weights_only=False)
    compressor = load_tokenizer(run / "model")
    assert compressor.layers == 1 and load_tokenizer(train("letters") / "model").layers == 2
    list(encode_shards(utterances, compressor, work / "vectors_of_one"))  # of recordings, as of the codes
    for row, other in zip(load_codes(run / "codes")[0], load_codes(work / "vectors_of_one")[0], strict=True):
        assert np.array_equal(row["features"], other["features"])
    with pytest.raises(DataError, match="holds 2 layers of codes, fewer than layers=3"):
        train("three", layers=3)


def test_codes_are_cut_at_words_and_begin_as_letters(
    train: Callable[..., Path], work: Path, recipe: Callable[[str], ModuleType]
) -> None:
    """What train_asr reads of these pieces are rows that the compressor's letters have made."""
    letters, codes, codec = train("one_layer", layers=1) / "model", work / "codes", work / "codec"
    cut_speech, train_asr, eval_asr = map(recipe, ("cut_speech.py", "train_asr.py", "eval_asr.py"))
    cut_speech.main(cut_speech.CutConfig(str(codes), str(letters), str(work / "cut"), ["train"], words=1))
    pieces, encoding = load_codes(work / "cut" / "codes")
    assert sorted(pieces["text"]) == sorted(["ab", "a", "b", "ba", "b", "ab", "a", "b"])
    results = json.loads((work / "cut" / "results.json").read_text(encoding="utf-8"))
    assert (results["pieces"], results["skipped"], results["codec_fingerprint"]) == (8, {}, encoding.fingerprint)
    with pytest.raises(DataError, match="normalised by librispeech when they were written, of which none cannot"):
        require_texts(str(work / "cut" / "codes"), "none")
    capitals = cut_speech.CutConfig(str(codes), str(letters), str(work / "none"), ["train"], "none")
    with pytest.raises(DataError, match="aligns no transcript"):
        cut_speech.main(capitals)

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    small = train_asr.SmallModelConfig(num_key_value_heads=1, text_tokens=300, text_steps=1, **shape)
    settings = {"steps": 2, "warmup": 1, "learning_rate": 1e-9, "precision": "no", "model": None, "small": small}
    folders = str(work / "cut" / "codes"), str(codec), str(work / "asr")
    train_asr.main(train_asr.AsrConfig(*folders, **settings, letters=str(letters)))
    speech_llm = load_speech_llm(work / "asr" / "model")
    rows, spelled = speech_llm.model.get_input_embeddings().weight, letters_of_codes(load_tokenizer(letters), pieces)
    ids = text_token_ids(speech_llm.text_tokenizer, list(spelled.labels))
    known = spelled.shares.sum(1) > 0
    expected = spelled.shares @ torch.stack([rows[one].mean(0) for one in ids])
    found = rows[speech_llm.vocabulary.offset :][: len(expected)]
    assert encoding == load_codes(codes)[1] and known.sum() > 8
    torch.testing.assert_close(found[known], expected[known], rtol=0, atol=1e-5)
    words = eval_asr.EvalAsrConfig(str(work / "asr"), str(codes), str(work / "joint"), shuffled_audio=False)
    eval_asr.main(replace(words, letters=str(letters), letters_weight=2.0, fallback=False))
    hearing = load_speech_llm(work / "asr", letters=letters)
    jointly = transcribe_codes([speech_of(row, encoding) for row in load_codes(codes)[0]], hearing, letters_weight=2.0)
    results = json.loads((work / "joint" / "results.json").read_text(encoding="utf-8"))
    assert results["letters_fingerprint"] == hearing.letters.fingerprint
    assert [row["hypothesis"] for row in read_jsonl(work / "joint" / "predictions.jsonl")] == jointly
    assert any(jointly) and set("".join(jointly)) <= set("".join(load_tokenizer(letters).labels))
    with pytest.raises(ValueError, match="letters without letters_weight change nothing"):
        replace(words, letters=str(letters))
    again = train_asr.AsrConfig(*folders[:2], str(work / "again"), **settings | {"model": str(work / "asr" / "model")})
    with pytest.raises(VocabularyError, match="reads codes already: its rows cannot begin as letters"):
        train_asr.main(replace(again, letters=str(letters), small=train_asr.SmallModelConfig()))


def test_frames_of_several_folders_train_one_compressor(
    train: Callable[..., Path], work: Path, small_codec: SpeechCodec
) -> None:
    utterances = torch.load(work / "utterances.pt", weights_only=False)
    folders = [work / "first", work / "second"]
    for folder, some in zip(folders, (utterances[:3], utterances[3:]), strict=True):
        list(encode_shards(some, small_codec, folder, layers=2))
    whole, both = train("one"), train("both", codes=[*map(str, folders)])
    weights = [(run / "model" / "compressor.safetensors").read_bytes() for run in (whole, both)]
    assert weights[0] == weights[1]
    vectors = [load_codes(data)[0] for data in (whole / "codes", [both / "codes" / folder.name for folder in folders])]
    for row, other in zip(*vectors, strict=True):
        assert row["id"] == other["id"] and row["features"].tolist() == other["features"].tolist()
    assert not list((both / "codes").glob("*.arrow"))


def test_fewer_utterances_are_spread_over_those_that_are_short_enough(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, ids = train.module.read_batches, []
    monkeypatch.setattr(train.module, "read_batches", lambda rows, *rest: ids.extend(rows["id"]) or read(rows, *rest))
    train("few", max_utterances=2, max_duration_s=0.76, steps=1)  # without u4 and u5
    assert ids == ["u0", "u2"]


def test_a_training_without_words_is_refused(train: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="no utterance of up to 0.1 s has a transcript"):
        train("short", max_duration_s=0.1)
