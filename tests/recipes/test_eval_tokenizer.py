"""The evaluation of codes: frame labels at every frame rate, and results that are skipped with a reason."""

import json
import shutil
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from sklearn.metrics import mutual_info_score
from torch import Tensor

from speechllm import AudioTokenizer, DataError, SpeechCodec, encode_shards, load_codes, read_corpus, speech_of
from tokenizer.files import read_jsonl, write_jsonl
from tokenizer.schemes.features import FeatureEncoder
from tokenizer.schemes.units import UnitTokenizer
from tokenizer.training.small_teachers import small_hubert
from tokenizer.training.teachers import SemanticTeacher

pytestmark = pytest.mark.usefixtures("module_without_pictures")
RATE, SAMPLES = 16_000, 8_000
STRIDES = {100.0: (2, 4, 5, 4), 50.0: (2, 4, 5, 8), 12.5: (4, 5, 8, 8)}  # frames/s of a codec


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, noise: Callable[..., Tensor]) -> Path:
    """Nine recordings of three speakers, half a second each; a phone ends at 0.13 s, 0.31 s and 0.5 s."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = []
    for index in range(9):
        soundfile.write(folder / f"{index}.flac", noise(SAMPLES, seed=index)[0].numpy(), RATE)
        phones = [["abc"[index % 3], 0.13], ["xyz"[index // 3], 0.31], ["s", 0.5]]
        row = {"path": f"{index}.flac", "duration_s": 0.5, "speaker": f"s{index % 3}", "phones": phones}
        rows.append(row | {"text": "a b"})
    write_jsonl(folder / "manifest.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def evaluate(
    recipe: Callable[[str], types.ModuleType], corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict]:
    """Encode the corpus (its first recordings only, where given) and run the recipe; its results."""

    def run(codec: AudioTokenizer, first: int | None = None, **settings: object) -> dict:
        folder = tmp_path_factory.mktemp("evaluation")
        codes, output = folder / "codes", folder / "results.json"
        list(encode_shards(read_corpus(corpus)[:first], codec, codes))
        module = recipe("eval_tokenizer.py")
        module.main(module.EvalTokenizerConfig(str(codes), str(corpus), str(output), **settings))
        return json.loads(output.read_text(encoding="utf-8"), parse_constant=pytest.fail)  # NaN is no JSON

    return run


@pytest.fixture(scope="module")
def evaluated(evaluate: Callable[..., dict], make_codec: Callable[..., SpeechCodec]) -> dict[float, dict]:
    """The results of codecs of every frame rate."""
    return {rate: evaluate(make_codec(strides=strides)) for rate, strides in STRIDES.items()}


@pytest.mark.parametrize("rate", STRIDES)
def test_frames_of_every_rate_are_labelled_with_the_phone_at_their_time(
    evaluated: dict[float, dict], corpus: Path, rate: float
) -> None:
    found = evaluated[rate]["content"]
    assert found["label"] == "phone" and found["utterances"] == 9
    rows, encoding = load_codes(evaluated[rate]["config"]["codes"])
    assert encoding.frame_rate == rate
    ids, phones = [], []
    for row, utterance in zip(rows, read_corpus(corpus), strict=True):
        codes = speech_of(row, encoding)[0].tolist()
        times = (np.arange(len(codes)) + 0.5) / rate
        phones += [next((p for p, end in utterance.phones if time <= end), "s") for time in times]
        ids += codes
    expected = mutual_info_score(phones, ids) / mutual_info_score(phones, phones)
    assert found["layer_0"]["pnmi"] == pytest.approx(expected)
    assert 0 < found["log_mel_kmeans"]["pnmi"] < 1


def test_the_baseline_has_50_frames_per_second_for_every_codec(evaluated: dict[float, dict]) -> None:
    first, second, third = (results["content"]["log_mel_kmeans"] for results in evaluated.values())
    assert first == second == third


def test_merged_repeats_have_no_labels_which_is_reported(
    evaluate: Callable[..., dict], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    encoder = FeatureEncoder(SemanticTeacher(small_hubert(hidden_size=16, layers=1), 1))
    found = evaluate(UnitTokenizer(encoder, torch.randn(4, 16), deduplicate=True))
    assert "content" not in found and found["speaker"]["speakers"] == 3
    assert "no phone information: repeats are merged in these codes" in capsys.readouterr().out


def test_speakers_with_a_single_utterance_are_not_evaluated(evaluate: Callable[..., dict], codec: SpeechCodec) -> None:
    assert evaluate(codec, first=3)["speaker"] == {}


def test_several_corpora_are_encoded_and_evaluated_as_one(
    recipe: Callable[[str], types.ModuleType], codec: SpeechCodec, corpus: Path, tmp_path: Path
) -> None:
    other, output = tmp_path / "other", tmp_path / "results.json"
    lines = read_jsonl(corpus / "manifest.jsonl")[:6]
    rows = [{**line, "id": line["path"], "path": f"{index}.flac", "split": "more"} for index, line in enumerate(lines)]
    write_jsonl(other / "manifest.jsonl", rows)
    for row in rows:
        shutil.copy(corpus / row["path"], other / row["path"])
    codec.save_pretrained(tmp_path / "codec")
    data, codes = [str(corpus), str(other)], str(tmp_path / "codes")
    encode, evaluation = recipe("encode_speech.py"), recipe("eval_tokenizer.py")
    encode.main(encode.EncodeConfig(str(tmp_path / "codec"), data, codes, splits=["more"], layers=None))
    rows_encoded, _ = load_codes(codes)
    assert rows_encoded["id"] == [f"other/{index}.flac" for index in range(6)]
    assert set(rows_encoded["speaker"]) == {"other/s0", "other/s1", "other/s2"}
    evaluation.main(evaluation.EvalTokenizerConfig(codes, data, str(output), baseline=False))
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["content"]["utterances"] == 6 and found["config"]["data"] == data
    with pytest.raises(DataError, match=f"^{corpus} lacks .* utterances of {codes}, other/0.flac first"):
        evaluation.main(evaluation.EvalTokenizerConfig(codes, str(corpus), str(tmp_path / "no.json"), baseline=False))


def test_results_include_configuration_and_versions(
    evaluate: Callable[..., dict], codec: SpeechCodec, corpus: Path
) -> None:
    found = evaluate(codec, kmeans_utterances=5, seed=3)
    assert found["codec_fingerprint"] == codec.fingerprint
    assert (found["config"]["data"], found["config"]["kmeans_utterances"], found["config"]["seed"]) == (
        str(corpus),
        5,
        3,
    )
    assert {"torch", "scikit-learn"} <= found["versions"].keys()
    page = Path(found["config"]["output"]).with_suffix(".html").read_text(encoding="utf-8")
    assert "<h2>Codebook usage</h2>" in page and "pnmi" in page and str(corpus) in page
