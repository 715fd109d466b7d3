"""The evaluation of conversion: which recordings make a pair, the bounds, and what cannot be scored."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from speechllm import (
    SpeechCodec,
    Transcripts,
    Utterance,
    convert_voice,
    load_audio,
    reconstruct,
    save_audio,
    swap_layers,
)
from speechllm.runs.config import load_config
from tokenizer.errors import InputError
from tokenizer.files import read_jsonl, write_jsonl
from tokenizer.metrics.prosody import align_voices, mel_cepstral_distortion, pitch_correlation, voice_frames
from tokenizer.training.small_teachers import save_ecapa

pytest.importorskip("pyworld")

RATE = 16_000
RECIPE = "eval_conversion.py"
ECAPA = {"channels": [8, 8, 8, 8, 16], "attention_channels": 8, "se_channels": 8, "res2net_scale": 2, "lin_neurons": 6}
PITCH = {"low": 110.0, "high": 190.0}
MELODY = {"ONE": 1.0, "TWO": -1.0}  # up or down
BOUNDS = {"source", "target"}


def voice(speaker: str, text: str, duration_s: float) -> Tensor:
    """A hum that rises for ONE and falls for TWO, with the speaker's pitch and brightness: float [N]."""
    time = np.linspace(0, 1, round(duration_s * RATE))
    phase = 2 * np.pi * np.cumsum(PITCH[speaker] * np.exp(0.2 * MELODY[text] * np.sin(3 * time))) / RATE
    dark = 0.7 if speaker == "low" else 0.9
    wave = sum(dark**k * (1 + np.sin(k * time)) * np.sin(k * phase) for k in range(1, 25))
    noise = 0.01 * np.random.default_rng(len(time)).normal(size=len(time))
    return torch.from_numpy(0.05 * wave + noise).float()


class Recognizer(nn.Module):
    """A recogniser that takes every recording for ONE."""

    sample_rate, frame_rate, device = 8_000, 0.0, torch.device("cpu")

    def encode(self, waveform: Tensor, lengths: Tensor | None = None) -> Transcripts:
        return Transcripts(["ONE"])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two speakers who say each word twice, and one recording that is no audio."""
    folder, rows = tmp_path_factory.mktemp("corpus"), []
    for speaker in PITCH:
        for text in MELODY:
            for take, duration_s in enumerate((0.8, 0.9)):
                name = f"{speaker}-{text}-{take}"
                save_audio(folder / f"{name}.wav", voice(speaker, text, duration_s))
                row = {"id": name, "path": f"{name}.wav", "duration_s": duration_s, "text": text, "speaker": speaker}
                rows.append({**row, "split": "test"})
    (folder / "broken.wav").write_bytes(b"not a sound")
    broken = {"id": "broken", "path": "broken.wav", "duration_s": 1.0, "text": "ONE"}
    rows += [
        {**broken, "speaker": "third", "split": "broken"},
        {**rows[0], "id": "again", "speaker": "low", "split": "broken"},
    ]
    write_jsonl(folder / "manifest.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def ecapa_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN

    folder = tmp_path_factory.mktemp("ecapa")
    torch.manual_seed(0)
    save_ecapa(ECAPA_TDNN(8, **ECAPA), ECAPA, 8, ["a", "b"], folder)
    return folder


@pytest.fixture(scope="module")
def evaluate(
    recipe: Callable[[str], ModuleType],
    config_class: Callable[[str], type],
    corpus: Path,
    codec_folder: Path,
    ecapa_folder: Path,
) -> Callable[..., dict]:
    """Run the recipe; the content of its results.json."""

    def run(output: Path, *words: str) -> dict:
        common = (f"codec={codec_folder}", f"data={corpus}", f"output={output}", "splits=[test]")
        recipe(RECIPE).main(load_config(config_class(RECIPE), None, [*common, *words]))
        return json.loads((output / "results.json").read_text(encoding="utf-8"))

    return run


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("output")


@pytest.fixture(scope="module")
def results(
    evaluate: Callable[..., dict], recipe: Callable[[str], ModuleType], output: Path, ecapa_folder: Path
) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe(RECIPE), "load_recognizer", lambda name: Recognizer())
        return evaluate(output, "layers=[[1],[1,2]]", f"speaker={ecapa_folder}", "recognizer=recognizer:x", "pairs=20")


@pytest.fixture(scope="module")
def rows(results: dict, output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]


# ---- pairs


def test_a_pair_has_two_speakers_and_recordings_that_the_method_does_not_use(rows: list[dict]) -> None:
    assert len(rows) == 8 and len({row["source"] for row in rows}) == 8
    for row in rows:
        source, target, reference, voice = (row[role].split("-") for role in ("source", "target", "reference", "voice"))
        assert target[0] == reference[0] == voice[0] != source[0]
        assert reference[1] == source[1] != target[1]
        assert reference[2] == source[2]  # the take that is as long
        assert row["voice"] not in (row["target"], row["reference"])


def recording(speaker: str, text: str | None, number: int = 0) -> Utterance:
    return Utterance(f"{speaker}{text}{number}", f"{number}.wav", 1.0 + number, "test", text, speaker)


def test_a_reference_has_the_same_words(recipe: Callable[[str], ModuleType]) -> None:
    choose = recipe(RECIPE).choose_pairs
    for words in (("ONE", "TWO"), (None, None)):
        pairs = choose([recording("a", words[0]), recording("b", words[1])], 9, 0)
        assert len(pairs) == 2 and all(pair.reference is None for pair in pairs)
        assert all(pair.voice is None and pair.target.speaker != pair.source.speaker for pair in pairs)


def test_the_only_recording_is_the_target_and_never_its_own_reference(recipe: Callable[[str], ModuleType]) -> None:
    choose = recipe(RECIPE).choose_pairs
    assert all(pair.reference is None for pair in choose([recording("a", "ONE"), recording("b", "ONE")], 9, 0))
    pairs = choose([recording("a", "ONE"), recording("b", "ONE", 1), recording("b", "ONE", 2)], 9, 0)
    pair = next(pair for pair in pairs if pair.source.speaker == "a")
    assert {pair.target.duration_s, pair.reference.duration_s} == {2.0, 3.0} and pair.voice is None


def test_pairs_depend_on_the_seed(recipe: Callable[[str], ModuleType]) -> None:
    choose = recipe(RECIPE).choose_pairs
    recordings = [recording(speaker, "ONE", number) for speaker in "abc" for number in range(4)]
    assert choose(recordings, 5, 0) == choose(recordings, 5, 0) != choose(recordings, 5, 1)
    assert len(choose(recordings, 5, 0)) == 5


# ---- results


def test_every_set_of_layers_is_swapped_by_every_matching(results: dict) -> None:
    swaps = [f"swap {layers}, by {way}" for layers in ("1", "1-2") for way in ("position", "content", "mean")]
    assert list(results["methods"]) == ["source", "source, 2 codebooks", "source, 3 codebooks", *swaps, "target"]
    assert results["pairs"] == results["parallel"] == 8 and results["failed"] == []
    assert all(method["pairs"] == 8 for method in results["methods"].values())


def test_the_reference_is_the_bound_of_distortion_and_correlation(results: dict) -> None:
    target = results["methods"].pop("target")
    assert target["mcd"] == {"mean": 0, "ci95": [0, 0], "pairs": 8}
    assert target["f0_correlation"]["mean"] == pytest.approx(1)
    assert all(method["mcd"]["mean"] > 0.5 for method in results["methods"].values())
    results["methods"]["target"] = target


def test_scores_match_the_functions(rows: list[dict], corpus: Path, codec: SpeechCodec) -> None:
    row = rows[3]
    source, target, reference = (load_audio(corpus / f"{row[role]}.wav") for role in ("source", "target", "reference"))
    aim = voice_frames(reference, RATE)
    assert row["scores"]["source"]["mcd"] == pytest.approx(
        mel_cepstral_distortion(align_voices(voice_frames(source, RATE), aim))
    )
    assert row["scores"]["source"]["f0_correlation"] == pytest.approx(
        pitch_correlation(align_voices(voice_frames(source, RATE), aim))
    )
    for layers, name in (([1], "swap 1, by content"), ([1, 2], "swap 1-2, by content")):
        converted = voice_frames(convert_voice(codec, source, target, layers, "content"), RATE)
        assert row["scores"][name]["mcd"] == pytest.approx(
            mel_cepstral_distortion(align_voices(converted, aim)), rel=1e-6
        )


def test_means_are_over_the_pairs(results: dict, rows: list[dict]) -> None:
    for name, method in results["methods"].items():
        for measure in ("mcd", "speaker_similarity", "source_similarity"):
            values = [row["scores"][name][measure] for row in rows]
            assert method[measure]["mean"] == pytest.approx(np.mean(values))
            low, high = method[measure]["ci95"]
            assert min(values) - 1e-9 <= low <= np.mean(values) + 1e-9 and high <= max(values) + 1e-9


def test_the_recognizer_is_scored_against_the_words_of_the_source(results: dict) -> None:
    for method in results["methods"].values():
        assert method["wer"]["mean"] == 0.5 and method["wer"]["words"] == 8  # half of them are ONE


def test_the_sounds_of_some_pairs_are_saved(results: dict, output: Path, rows: list[dict], corpus: Path) -> None:
    names = {path.name for path in (output / "audio").iterdir()}
    assert {name.split("_")[0] for name in names} == set("01234")
    assert {"0_source.wav", "0_target.wav", "0_swap_1_by_position.wav", "4_swap_1-2_by_content.wav"} <= names
    assert "<h2>Table 2: voice conversion</h2>" in (output / "report.html").read_text(encoding="utf-8")
    for role in ("source", "target", "reference"):
        kept, given = load_audio(output / "audio" / f"0_{role}.wav"), load_audio(corpus / f"{rows[0][role]}.wav")
        torch.testing.assert_close(kept, given, atol=2 / 32768, rtol=0)


def test_failures_are_listed_and_not_averaged(
    evaluate: Callable[..., dict], tmp_path: Path, recipe: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversion that gives silence, and a recording that cannot be read."""
    decode = SpeechCodec.decode

    def quiet(self: SpeechCodec, codes: object) -> Tensor:
        return decode(self, codes) * (codes.ids.shape[1] != 2)

    monkeypatch.setattr(SpeechCodec, "decode", quiet)
    found = evaluate(tmp_path, "layers=[[1]]", "pairs=3")
    assert found["methods"]["swap 1, by content"] == {"pairs": 3} and found["methods"]["source"]["mcd"]["pairs"] == 3
    assert {failure["reason"] for failure in found["failed"]} == {"silent"} and len(found["failed"]) == 12
    assert {failure["method"] for failure in found["failed"]} == {
        "source, 2 codebooks",
        "swap 1, by position",
        "swap 1, by content",
        "swap 1, by mean",
    }


def test_an_unreadable_recording_affects_only_its_pairs(
    evaluate: Callable[..., dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluate(tmp_path, "splits=[broken]")
    assert found["methods"] == {} and found["pairs"] == 2
    assert [failure["reason"] for failure in found["failed"]] == ["unreadable"] * 2
    assert "2 not scored" in capsys.readouterr().out


def test_without_parallel_text_only_similarity_is_measured_which_is_reported(
    evaluate: Callable[..., dict],
    tmp_path: Path,
    corpus: Path,
    ecapa_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = read_jsonl(corpus / "manifest.jsonl")
    texts = {**{row["id"]: row | {"text": row["id"], "path": str(corpus / row["path"])} for row in rows[:8]}}
    write_jsonl(tmp_path / "manifest.jsonl", texts.values())
    words = [f"data={tmp_path}", "pairs=2", "layers=[[1]]", f"speaker={ecapa_folder}"]
    found = evaluate(tmp_path / "out", *words)
    assert found["parallel"] == 0 and found["methods"]["target"].keys() == {
        "speaker_similarity",
        "source_similarity",
        "pairs",
    }
    printed = capsys.readouterr().out
    assert "distortion and pitch correlation were not measured" in printed
    assert "| method | speaker similarity | to the source | pairs |" in printed


def test_without_a_further_recording_there_is_no_similarity(
    evaluate: Callable[..., dict], tmp_path: Path, corpus: Path, ecapa_folder: Path
) -> None:
    """One recording of one speaker, two of the other: only as a target's can the other's be a further one."""
    rows = read_jsonl(corpus / "manifest.jsonl")
    kept = [row | {"path": str(corpus / row["path"]), "text": row["id"]} for row in (rows[0], rows[4], rows[6])]
    write_jsonl(tmp_path / "manifest.jsonl", kept)
    found = evaluate(tmp_path / "out", f"data={tmp_path}", "layers=[[1]]", f"speaker={ecapa_folder}")
    pairs = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    for pair in pairs:
        assert (pair["voice"] is None) == pair["source"].startswith("high")
        for scores in pair["scores"].values():
            assert ("speaker_similarity" in scores) == (pair["voice"] is not None)
    method = found["methods"]["target"]
    assert (method["pairs"], method["speaker_similarity"]["pairs"]) == (3, 1)
    assert method["speaker_similarity"]["mean"] < 0.9999  # it is not measured against itself


def test_results_include_configuration_and_versions(
    results: dict, codec: SpeechCodec, corpus: Path, ecapa_folder: Path
) -> None:
    assert results["codec_fingerprint"] == codec.fingerprint and "pyworld" in results["versions"]
    config = results["config"]
    assert (config["data"], config["splits"], config["layers"]) == (str(corpus), ["test"], [[1], [1, 2]])
    assert (config["speaker"], config["recognizer"], config["pairs"], config["seed"]) == (
        str(ecapa_folder),
        "recognizer:x",
        20,
        0,
    )


def test_freevc_is_a_further_method(recipe: Callable[[str], ModuleType], codec: SpeechCodec) -> None:
    class Echo:
        sample_rate = RATE

        def convert(self, source: Tensor, target: Tensor) -> Tensor:
            return source + 2 * target

    sounds = {role: voice("low", "ONE", 0.8) for role in ("source", "target")}
    found = recipe(RECIPE).convert(sounds, codec, [[1]], Echo())
    assert torch.equal(found["FreeVC"], 3 * sounds["source"]) and torch.equal(found["target"], sounds["target"])


def test_code_vectors_are_collected_once(recipe: Callable[[str], ModuleType], codec: SpeechCodec) -> None:
    """A published codec stacks its codebooks whenever it is asked for them."""
    stacked = []

    class Stacking:
        device = codec.device
        encode, decode = codec.encode, codec.decode

        @property
        def codebooks(self) -> Tensor:
            stacked.append(codec.codebooks)
            return stacked[-1]

    sounds = {role: voice("low", "ONE", 0.8) for role in ("source", "target")}
    recipe(RECIPE).convert(sounds, Stacking(), [[1], [1, 2]], None)
    assert len(stacked) == 1
    convert_voice(Stacking(), sounds["source"], sounds["target"], [1], "content")
    assert len(stacked) == 2
    reconstruct(Stacking(), sounds["source"], [1, 2])
    assert len(stacked) == 2


@pytest.mark.parametrize(
    "word, message",
    [
        ("layers=[[3]]", r"layers must be sets of numbers from 0 to 2, such as \[\[1\]\]; got \[\[3\]\]"),
    ],
)
def test_errors_are_reported_in_one_line(
    evaluate: Callable[..., dict], tmp_path: Path, word: str, message: str
) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        evaluate(tmp_path / "new", word)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"claim.json", ".lock"}  # nothing was written


def test_one_speaker_is_not_enough(recipe: Callable[[str], ModuleType]) -> None:
    with pytest.raises(ValueError, match="recordings of two speakers, found 1"):
        recipe(RECIPE).choose_pairs([recording("a", "ONE"), recording("a", "TWO")], 9, 0)


def test_layers_have_short_names(recipe: Callable[[str], ModuleType]) -> None:
    module = recipe(RECIPE)
    assert [module.numbers(layers) for layers in ([1], [1, 2, 3], [1, 3], [0, 1])] == ["1", "1-3", "1,3", "0-1"]
    assert module.layer_sets(None, 8) == [[1], [1, 2, 3, 4, 5, 6, 7]] and module.layer_sets(None, 2) == [[1]]
    assert module.layer_sets([[2, 1, 2]], 3) == [[1, 2]]
    assert swap_layers is module.swap_layers
