"""The codec's evaluation on a tiny corpus: rates, means, and recordings that cannot be scored."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from speechllm import SpeechCodec, Transcripts, load_audio, save_audio, speech_quality
from speechllm.runs.config import load_config
from tokenizer.errors import InputError
from tokenizer.files import write_jsonl

pytest.importorskip("pesq")
pytest.importorskip("pystoi")

RATE = 16_000
GOOD = ("a", "b", "c", "d", "e")
RECIPE = "eval_codec.py"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, noise: Callable[..., Tensor]) -> Path:
    """Five seconds of usable speech in three recordings of the test split and two of another; three of no use."""
    folder = tmp_path_factory.mktemp("corpus")
    for seed, name in enumerate(GOOD):
        save_audio(folder / f"{name}.wav", noise(RATE, seed=seed)[0])
    save_audio(folder / "brief.wav", noise(3_000)[0])
    soundfile.write(folder / "silent.wav", np.zeros(RATE), RATE)
    (folder / "corrupt.wav").write_bytes(b"not a sound")
    rows = [
        {"id": name, "path": f"{name}.wav", "duration_s": 1.0, "speaker": "s", "split": split}
        for split, names in (("test", ("a", "silent", "b", "corrupt", "brief", "c")), ("dev", ("d", "e")))
        for name in names
    ]
    write_jsonl(folder / "manifest.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def evaluate(
    recipe: Callable[[str], ModuleType], config_class: Callable[[str], type], corpus: Path, codec_folder: Path
) -> Callable[..., dict]:
    """Run the recipe; the content of its results.json."""

    def run(output: Path, *words: str) -> dict:
        common = (f"codec={codec_folder}", f"data={corpus}", f"output={output}")
        recipe(RECIPE).main(load_config(config_class(RECIPE), None, [*common, *words]))
        return json.loads((output / "results.json").read_text(encoding="utf-8"))

    return run


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("output")


@pytest.fixture(scope="module")
def results(evaluate: Callable[..., dict], output: Path) -> dict:
    return evaluate(output, "splits=[test]", "layers=[1,3]")


def qualities(codec: SpeechCodec, corpus: Path, name: str, layers: int) -> dict[str, float]:
    waveform = load_audio(corpus / f"{name}.wav")
    decoded = codec.decode(codec.encode(waveform[None]).first(layers))[0]
    return asdict(speech_quality(waveform, decoded, RATE))


def test_rates_depend_on_the_number_of_codebooks(results: dict) -> None:
    assert list(results["codebooks"]) == ["1", "3"]
    for layers, row in results["codebooks"].items():
        assert row["tokens_per_second"] == int(layers) * 50
        assert row["kbps"] == pytest.approx(int(layers) * 50 * 3 / 1000)  # 8 codes are 3 bits


def test_means_are_over_usable_recordings_only(results: dict, codec: SpeechCodec, corpus: Path) -> None:
    for layers, row in results["codebooks"].items():
        expected = [qualities(codec, corpus, name, int(layers)) for name in "abc"]
        assert row["utterances"] == 3
        for measure in expected[0]:
            values = [scores[measure] for scores in expected]
            assert row[measure]["mean"] == pytest.approx(np.mean(values), rel=1e-5)
            low, high = row[measure]["ci95"]
            assert min(values) - 1e-6 <= low < np.mean(values) < high <= max(values) + 1e-6


def test_the_original_against_itself_is_the_bound_of_every_measure(results: dict) -> None:
    original = results["original"]
    assert original["utterances"] == 3 and original["mel_distance"]["mean"] == 0
    assert original["pesq_wb"]["mean"] == pytest.approx(4.644, abs=1e-3)
    assert original["stoi"]["mean"] == pytest.approx(1)
    assert not {"wer", "speaker_similarity"} & original.keys()  # without evaluators


def test_evaluators_score_what_was_decoded(
    evaluate: Callable[..., dict],
    corpus: Path,
    codec: SpeechCodec,
    tmp_path: Path,
    recipe: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A voice is the beginning of a recording; the recogniser knows the original."""

    class Speaker(torch.nn.Linear):
        def embedding(self, waveform: Tensor) -> Tensor:
            return waveform[:, :4_000]

    class Recognizer(torch.nn.Module):
        sample_rate, frame_rate, device = RATE, 0.0, torch.device("cpu")

        def encode(self, waveform: Tensor) -> Transcripts:
            return Transcripts(["LOUD" if (waveform[0] - original).abs().max() < 1e-3 else "LOW"])

    original = load_audio(corpus / "a.wav")
    reconstruction = codec.decode(codec.encode(original[None], layers=1))[0]
    row = {"id": "a", "path": str(corpus / "a.wav"), "duration_s": 1.0, "text": "loud"}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row), encoding="utf-8")
    monkeypatch.setattr(recipe(RECIPE).SpeakerTeacher, "from_pretrained", lambda name: Speaker(1, 1))
    monkeypatch.setattr(recipe(RECIPE), "load_recognizer", lambda name: Recognizer())
    found = evaluate(tmp_path / "new", f"data={tmp_path}", "layers=[1]", "speaker=x", "recognizer=recognizer:x")
    assert found["original"]["speaker_similarity"]["mean"] == pytest.approx(1)
    similarity = torch.cosine_similarity(original[:4_000], reconstruction[:4_000], dim=0)
    assert found["codebooks"]["1"]["speaker_similarity"]["mean"] == pytest.approx(float(similarity), abs=1e-5)
    assert found["original"]["wer"] == {"mean": 0, "ci95": [0, 0], "words": 1, "normalizer": "librispeech"}
    assert found["codebooks"]["1"]["wer"]["mean"] == 1
    line = json.loads((tmp_path / "new" / "utterances.jsonl").read_text(encoding="utf-8"))
    assert line["recognized"] == {"original": "LOUD", "1": "LOW"}


def test_several_splits_have_means_of_their_own(recipe: Callable[[str], ModuleType]) -> None:
    rows = [
        {"split": split, "text": text, "scores": {1: {"stoi": stoi}}, "recognized": {1: "loud"}}
        for split, text, stoi in (("a", "loud", 0.5), ("b", "...", 1.0))
    ]
    found = recipe(RECIPE).split_means(rows, [1], seed=0)
    assert {split: means[1]["stoi"]["mean"] for split, means in found.items()} == {"a": 0.5, "b": 1.0}
    assert found["a"][1]["wer"]["mean"] == 0 and "wer" not in found["b"][1]  # without words there is none
    assert recipe(RECIPE).split_means(rows[:1], [1], seed=0) == {}


def test_failures_are_listed_once_with_the_reason(results: dict) -> None:
    assert results["utterances"] == 6
    found = [(failure["id"], failure["reason"], failure["codebooks"]) for failure in results["failed"]]
    each = ["original", 1, 3]
    assert found == [("silent", "silent", each), ("corrupt", "unreadable", each), ("brief", "too short", each)]
    assert all(failure["detail"] for failure in results["failed"])


def test_results_include_configuration_and_versions(results: dict, codec: SpeechCodec, corpus: Path) -> None:
    assert results["codec_fingerprint"] == codec.fingerprint
    config = results["config"]
    assert (config["data"], config["splits"], config["layers"]) == (str(corpus), ["test"], [1, 3])
    assert (config["max_utterances"], config["seed"]) == (None, 0)
    assert {"torch", "pesq", "pystoi"} <= results["versions"].keys() and results["seconds"] > 0 and results["command"]


def test_the_page_shows_the_table_and_what_was_not_scored(results: dict, output: Path) -> None:
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "<h2>Table 1: speech quality</h2>" in page and f"{results['codebooks']['3']['pesq_wb']['mean']:.3f}" in page
    assert all(failure["id"] in page for failure in results["failed"]) and results["config"]["data"] in page


def test_every_utterance_has_a_line_with_its_scores(
    results: dict, output: Path, codec: SpeechCodec, corpus: Path
) -> None:
    lines = [json.loads(line) for line in (output / "utterances.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines] == ["a", "silent", "b", "corrupt", "brief", "c"]
    for line in lines:
        usable = line["id"] in GOOD
        assert list(line["scores"]) == (["original", "1", "3"] if usable else []) and bool(line["failed"]) != usable
    assert lines[2]["scores"]["3"] == pytest.approx(qualities(codec, corpus, "b", 3), rel=1e-5)
    assert lines[2]["scores"]["3"] != lines[2]["scores"]["1"]


def test_a_failure_affects_only_its_number_of_codebooks(
    evaluate: Callable[..., dict],
    corpus: Path,
    tmp_path: Path,
    recipe: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One codebook that gives silence for one recording does not cost the score of three; its words are lost."""
    module = recipe(RECIPE)
    loud = []

    class Recognizer(torch.nn.Module):
        sample_rate, frame_rate, device = RATE, 0.0, torch.device("cpu")

        def encode(self, waveform: Tensor) -> Transcripts:
            return Transcripts(["one two" if waveform.any() else ""])

    def reconstruct(codec: SpeechCodec, waveform: Tensor, counts: list[int]) -> dict[int, Tensor]:
        loud.append(waveform)
        return {n: torch.zeros_like(waveform) if n == 1 and len(loud) == 1 else waveform for n in counts}

    monkeypatch.setattr(module, "reconstruct", reconstruct)
    monkeypatch.setattr(module, "load_recognizer", lambda name: Recognizer())
    rows = [{"id": name, "path": str(corpus / f"{name}.wav"), "duration_s": 1.0, "text": "one two"} for name in "de"]
    write_jsonl(tmp_path / "manifest.jsonl", rows)
    found = evaluate(tmp_path / "new", f"data={tmp_path}", "layers=[1,3]", "recognizer=recognizer:x")
    assert [found["codebooks"][n]["utterances"] for n in ("1", "3")] == [1, 2]
    assert [(failure["id"], failure["codebooks"]) for failure in found["failed"]] == [("d", [1])]
    assert found["codebooks"]["1"]["pesq_wb"]["mean"] == pytest.approx(4.644, abs=1e-3)
    assert [(found["codebooks"][n]["wer"]["mean"], found["codebooks"][n]["wer"]["words"]) for n in ("1", "3")] == [
        (0.5, 4),
        (0, 4),
    ]


def test_all_codebooks_and_all_splits_are_the_default(
    evaluate: Callable[..., dict], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    found = evaluate(tmp_path)
    assert list(found["codebooks"]) == ["1", "2", "3"] and found["codebooks"]["2"]["utterances"] == 5
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 6 and len({line.count("|") for line in table}) == 1
    row = found["codebooks"]["2"]
    cells = [cell.strip() for cell in table[4].strip("|").split("|")]
    assert cells[1:4] == ["2", "100", "0.3"] and cells[-1] == "5"
    assert cells[4].startswith(f"{row['pesq_wb']['mean']:.3f} (")


def test_a_limited_number_of_utterances_is_evenly_chosen(evaluate: Callable[..., dict], tmp_path: Path) -> None:
    found = evaluate(tmp_path, "layers=[1]", "max_utterances=4")
    lines = (tmp_path / "utterances.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["a", "b", "brief", "d"]
    assert found["utterances"] == 4


def test_a_corpus_without_a_usable_recording_has_no_means(
    evaluate: Callable[..., dict], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    row = {"path": str(corpus / "silent.wav"), "duration_s": 1.0}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row), encoding="utf-8")
    found = evaluate(tmp_path / "out", f"data={tmp_path}", "layers=[2]")
    assert found["codebooks"] == {"2": {"tokens_per_second": 100.0, "kbps": pytest.approx(0.3), "utterances": 0}}
    assert found["original"] == {"utterances": 0}
    assert "| 2 | 100 | 0.3 | 0 |\n" in capsys.readouterr().out


def test_the_order_is_kept_with_a_full_queue(
    recipe: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, evaluate: Callable[..., dict], tmp_path: Path
) -> None:
    monkeypatch.setattr(recipe(RECIPE), "available_cpus", lambda: 1)
    evaluate(tmp_path, "layers=[1]")
    lines = (tmp_path / "utterances.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["id"] for line in lines] == [*("a", "silent", "b", "corrupt", "brief", "c"), "d", "e"]


def test_missing_codebooks_are_refused_in_one_line(evaluate: Callable[..., dict], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^layers must be numbers from 1 to 3.*got \[1, 8\]$"):
        evaluate(tmp_path / "new", "layers=[1,8]")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"claim.json", ".lock"}  # nothing was written


def test_a_missing_package_ends_the_evaluation_with_the_remedy(
    evaluate: Callable[..., dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pesq", None)
    with pytest.raises(ImportError, match=r'pip install "speechllm\[eval\]"'):
        evaluate(tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"claim.json", ".lock"}  # nothing was written
