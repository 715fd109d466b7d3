"""The `speechllm` command: what it prints and writes, and what becomes of files it cannot use."""

import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import speechllm
from speechllm import (
    AudioError,
    SpeechCodec,
    codebook_usage,
    load_audio,
    load_language_model,
    merge,
    paired_bootstrap,
    prepare_adapter,
    reconstruct,
    save_audio,
    transcribe,
)
from speechllm.cli.main import main
from speechllm.pieces import Piece, pieces
from speechllm.reports import plots
from tokenizer.errors import InputError
from tokenizer.files import write_jsonl

RATE = 16_000
CLAIM = ("claim.json", ".lock")
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, noise: Callable[..., Tensor]) -> Path:
    """Two recordings that are also a corpus of two splits, and a file that is no audio."""
    folder = tmp_path_factory.mktemp("recordings")
    rows = []
    for seed, (name, split) in enumerate((("a", "train"), ("b", "test"))):
        save_audio(folder / f"{name}.flac", noise(RATE, seed=seed)[0])
        rows.append({"path": f"{name}.flac", "duration_s": 1.0, "split": split})
    write_jsonl(folder / "manifest.jsonl", rows)
    (folder / "broken.wav").write_bytes(b"not a sound")
    return folder


@pytest.fixture
def speak(capsys: Capture, codec_folder: Path) -> Callable[..., tuple[int, list[str], str]]:
    """Run a command with the tiny codec: exit code, lines on stdout, stderr."""

    def run(command: str, *words: object) -> tuple[int, list[str], str]:
        capsys.readouterr()
        code = main([command, "--codec", str(codec_folder), *map(str, words)])
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err

    return run


def used(codec: SpeechCodec, *files: Path) -> np.ndarray:
    """Codes of the files one after the other, int [Q, T]."""
    return np.concatenate([codec.encode(load_audio(file)[None]).ids[0].numpy() for file in files], 1)


# ---- reconstruct


def test_reconstruct_writes_a_sound_per_number_of_codebooks_and_a_picture(
    speak: Callable, folder: Path, tmp_path: Path, codec: SpeechCodec
) -> None:
    code, lines, _ = speak("reconstruct", folder / "a.flac", "--layers", "3,1", "--output", tmp_path / "out")
    names = ["a_1_codebooks.wav", "a_3_codebooks.wav", "a.png"]
    assert code == 0 and lines == [str(tmp_path / "out" / name) for name in names]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*names, *CLAIM}
    for count, expected in reconstruct(codec, load_audio(folder / "a.flac"), [1, 3]).items():
        found = load_audio(tmp_path / "out" / f"a_{count}_codebooks.wav")
        torch.testing.assert_close(found, expected.clamp(-1, 1), atol=2 / 32768, rtol=0)
    assert (tmp_path / "out" / "a.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_reconstruct_takes_powers_of_two_and_all_codebooks(speak: Callable, folder: Path, tmp_path: Path) -> None:
    speak("reconstruct", folder / "a.flac", "--output", tmp_path)
    assert {path.name for path in tmp_path.glob("*.wav")} == {f"a_{n}_codebooks.wav" for n in (1, 2, 3)}


def test_reconstruct_names_unusable_files_and_does_the_others(speak: Callable, folder: Path, tmp_path: Path) -> None:
    files = [folder / name for name in ("broken.wav", "a.flac", "missing.wav", "b.flac")]
    code, lines, errors = speak("reconstruct", *files, "--layers", "1", "--output", tmp_path)
    assert code == 1 and len(lines) == 4
    names = {"a_1_codebooks.wav", "a.png", "b_1_codebooks.wav", "b.png"}
    assert {path.name for path in tmp_path.iterdir()} == {*names, *CLAIM}
    skipped = errors.splitlines()
    assert len(skipped) == 2 and "broken.wav: not a readable audio file" in skipped[0]
    assert skipped[1] == f"skipped: {folder / 'missing.wav'}: no such audio file"


@pytest.mark.parametrize(
    "words, message",
    [
        ("transcribe a.wav --model m --beams 0", "argument --beams: must be int at least 1, got '0'"),
        ("transcribe a.wav --model m --batch-tokens -1", "argument --batch-tokens: must be int at least 1, got '-1'"),
        ("transcribe a.wav --model m --max-duration nan", "argument --max-duration: must be float above 0, got 'nan'"),
        ("encode a.wav --codec c --layers 0", "argument --layers: must be int at least 1, got '0'"),
        ("run train_asr --processes 0", "argument --processes: must be int at least 1, got '0'"),
        ("run --processes x train_asr", "argument --processes: must be int at least 1, got 'x'"),
    ],
)
def test_a_number_that_cannot_work_is_refused_before_anything_loads(words: str, message: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words.split())
    assert capsys.readouterr().err.endswith(f"{message}\n")


def test_reconstruct_does_not_overwrite_one_file_by_another(speak: Callable, folder: Path, tmp_path: Path) -> None:
    code, lines, errors = speak("reconstruct", folder / "a.flac", "other/a.wav", "--output", tmp_path / "out")
    assert code == 1 and not lines and not (tmp_path / "out").exists()
    assert errors.startswith("speechllm reconstruct: several files are named a ")


@pytest.mark.parametrize("layers", ["4", "0,1", "1,9"])
def test_reconstruct_refuses_codebooks_the_codec_lacks(
    speak: Callable, folder: Path, tmp_path: Path, layers: str
) -> None:
    code, _, errors = speak("reconstruct", folder / "a.flac", "--layers", layers, "--output", tmp_path / "out")
    assert code == 1 and "layers must be numbers from 1 to 3" in errors and not (tmp_path / "out").exists()


@pytest.mark.parametrize("layers", ["one", "1,", "1.5"])
def test_layers_that_are_no_numbers_are_a_mistake_in_the_command(
    speak: Callable, folder: Path, layers: str, capsys: Capture
) -> None:
    with pytest.raises(SystemExit) as end:
        speak("reconstruct", folder / "a.flac", "--layers", layers, "--output", "out")
    assert end.value.code == 2 and f"expected layers like 1,2,4, got '{layers}'" in capsys.readouterr().err


def test_the_picture_has_a_panel_per_sound_on_the_scale_of_the_original(noise: Callable[..., Tensor]) -> None:
    wave = noise(RATE)[0].numpy()
    figure = plots.spectrogram_figure({"original": wave, "2 codebooks": 0.1 * wave}, RATE)
    panels = [axis for axis in figure.axes if axis.get_title("left")]
    assert [axis.get_title("left") for axis in panels] == ["original", "2 codebooks"]
    loudest = [float(axis.images[0].get_array().max()) for axis in panels]
    assert loudest == pytest.approx([0, -20], abs=1e-3)  # a tenth is 20 dB less
    assert all(axis.images[0].get_extent() == [0, 1, 0, 8] for axis in panels)  # seconds and kHz


def test_a_picture_that_cannot_be_drawn_leaves_no_file(tmp_path: Path) -> None:
    figure = plots.code_usage_figure([np.ones(8)])
    with pytest.raises(InputError, match=r"a.bmp3: expected the name of a picture, ending in \.png"):
        plots.save_figure(figure, tmp_path / "a.bmp3")
    assert not list(tmp_path.iterdir())


# ---- codebooks


def test_codebooks_prints_the_use_of_every_layer(speak: Callable, folder: Path, codec: SpeechCodec) -> None:
    files = folder / "a.flac", folder / "b.flac"
    code, lines, _ = speak("codebooks", *files)
    assert code == 0 and lines[0].split() == ["layer", "used", "of", "8", "dead", "perplexity"]
    for layer, (line, ids) in enumerate(zip(lines[1:], used(codec, *files), strict=True)):
        expected = codebook_usage(ids, 8)
        numbers = (layer, expected["used"], expected["dead"], f"{expected['perplexity']:.1f}")
        assert line.split() == [str(number) for number in numbers]


def test_codebooks_of_a_split_as_numbers_and_picture(
    speak: Callable, folder: Path, tmp_path: Path, codec: SpeechCodec
) -> None:
    outputs = "--output", tmp_path / "new" / "use.json", "--picture", tmp_path / "new" / "use.png"
    code, _, _ = speak("codebooks", "--data", folder, "--split", "test", *outputs)
    assert code == 0
    found = json.loads((tmp_path / "new" / "use.json").read_text(encoding="utf-8"))
    ids = used(codec, folder / "b.flac")
    assert found["codec_fingerprint"] == codec.fingerprint and found["recordings"] == 1 and found["frames"] == 50
    assert [row["counts"] for row in found["layers"]] == [np.bincount(row, minlength=8).tolist() for row in ids]
    for row, layer in zip(found["layers"], ids, strict=True):
        assert {name: row[name] for name in ("used", "dead", "perplexity")} == codebook_usage(layer, 8)
    assert (tmp_path / "new" / "use.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_codebooks_of_a_corpus_takes_all_splits_or_several(
    speak: Callable, folder: Path, tmp_path: Path, codec: SpeechCodec
) -> None:
    for number, splits in enumerate(([], ["--split", "train", "--split", "test"])):
        file = tmp_path / f"{number}.json"
        speak("codebooks", "--data", folder, *splits, "--output", file)
        assert json.loads(file.read_text(encoding="utf-8"))["recordings"] == 2


def test_codebooks_leaves_out_what_it_cannot_use(speak: Callable, folder: Path) -> None:
    code, lines, errors = speak("codebooks", folder / "broken.wav", folder / "a.flac")
    assert code == 1 and len(lines) == 4 and "skipped: " in errors
    code, lines, errors = speak("codebooks", folder / "broken.wav")
    assert code == 1 and not lines and errors.endswith("speechllm codebooks: none of the recordings can be used\n")


def test_codebooks_wants_files_or_a_corpus(speak: Callable, folder: Path) -> None:
    for words in ((), (folder / "a.flac", "--data", folder)):
        code, _, errors = speak("codebooks", *words)
        assert code == 1 and "give either audio files or a corpus folder with --data" in errors


# ---- import-codec


@pytest.mark.parametrize("kind", ["encodec", "speechtokenizer"])
def test_import_codec_saves_what_the_conversion_gives(
    codec: SpeechCodec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, kind: str
) -> None:
    asked = []
    for name in ("encodec", "speechtokenizer"):
        convert = lambda source, name=name: asked.append((name, source)) or codec  # noqa: E731
        monkeypatch.setattr(speechllm, f"convert_{name}", convert, raising=False)
    assert main(["import-codec", "published", str(tmp_path / "codec"), "--kind", kind]) == 0
    assert asked == [(kind, "published")]
    assert SpeechCodec.from_pretrained(tmp_path / "codec").fingerprint == codec.fingerprint
    assert f"3 codebooks of 8, 50 frames/s at 16000 Hz, fingerprint {codec.fingerprint}" in capsys.readouterr().out


def test_a_failed_import_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def fail(source: str) -> SpeechCodec:
        raise ValueError(f"{source} is no EnCodec")

    for name in ("convert_encodec", "convert_speechtokenizer"):
        monkeypatch.setattr(speechllm, name, fail, raising=False)
    assert main(["import-codec", "x", str(tmp_path / "codec"), "--kind", "encodec"]) == 1
    assert capsys.readouterr().err == "speechllm import-codec: x is no EnCodec\n" and not list(tmp_path.iterdir())


# ---- encode, decode, transcribe, export


def test_what_is_encoded_is_decoded_again(speak: Callable, folder: Path, tmp_path: Path, codec: SpeechCodec) -> None:
    code, lines, _ = speak("encode", folder / "a.flac", folder / "b.flac")
    assert code == 0 and [json.loads(line)["samples"] for line in lines] == [RATE, RATE]
    (tmp_path / "codes.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    code, lines, _ = speak("decode", tmp_path / "codes.jsonl", "--output", tmp_path / "out")
    assert code == 0 and lines == [str(tmp_path / "out" / name) for name in ("a.wav", "b.wav")]
    expected = reconstruct(codec, load_audio(folder / "b.flac"), [3])[3].clamp(-1, 1)
    torch.testing.assert_close(load_audio(tmp_path / "out" / "b.wav"), expected, atol=2 / 32768, rtol=0)


def test_encode_names_unusable_files_and_does_the_others(speak: Callable, folder: Path) -> None:
    code, lines, errors = speak("encode", folder / "broken.wav", folder / "a.flac", "--max-duration", "1")
    assert code == 1 and [json.loads(line)["file"] for line in lines] == [str(folder / "a.flac")]
    assert errors.startswith("skipped: ") and "broken.wav" in errors and errors.count("\n") == 1


def test_a_codec_that_cannot_work_in_chunks_states_its_limit_first(
    speak: Callable, folder: Path, codec: SpeechCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not speak("encode", folder / "a.flac")[2]
    monkeypatch.setattr(SpeechCodec, "bounded", False)
    monkeypatch.setattr("speechllm.cli.codec.WHOLE_S", 0.5)
    code, lines, errors = speak("encode", folder / "a.flac")
    first, second = errors.splitlines()
    assert code == 1 and not lines and "those of more than 0.5 s are skipped; --max-duration changes" in first
    assert "1.0 s long, at most 0.5 s are allowed" in second
    assert speak("encode", folder / "a.flac", "--max-duration", "1")[::2] == (0, "")


def test_codes_of_another_codec_are_not_decoded(speak: Callable, folder: Path, tmp_path: Path) -> None:
    line = json.loads(speak("encode", folder / "a.flac")[1][0])
    (tmp_path / "codes.jsonl").write_text(json.dumps({**line, "codec": "another"}), encoding="utf-8")
    code, _, errors = speak("decode", tmp_path / "codes.jsonl", "--output", tmp_path / "out")
    assert code == 1 and "row 1 holds codes of codec another" in errors and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "cells, message",
    [
        ({"codes": [[1, 2], [3]]}, "codes is .*, expected a list of codes for each layer"),
        ({"codes": [1, 2]}, "codes is .*, expected a list of codes for each layer"),
        ({"codes": [["1"]]}, "codes is .*, expected a list of codes for each layer"),
        ({"codes": [[True, -1]]}, "codes is .*, expected a list of codes for each layer"),
        ({"codes": []}, "codes is .*, expected a list of codes for each layer"),
        ({"codes": [[999_999]]}, r"codes must be 0\.\.7, got 999999\.\.999999: .*: encode the recording again"),
        ({"codes": [[0]] * 99}, r"expected codes long \[B, 1\.\.3, T\], got torch.int64 \[1, 99, 1\]"),
        ({"samples": 10**13}, "10000000000000 samples are more than 2 frames of codes hold"),
        ({"samples": -1}, "samples is -1, expected a number above 0"),
        ({"samples": 1.5}, "samples is 1.5, expected a number above 0"),
        ({"file": ["a"]}, "file is .*, expected the name of a file"),
    ],
)
def test_codes_of_another_shape_or_kind_are_named(
    speak: Callable, folder: Path, tmp_path: Path, cells: dict, message: str, codec: SpeechCodec
) -> None:
    line = {"file": "a.wav", "codec": codec.fingerprint, "samples": 640, "codes": [[0, 0]]} | cells
    (tmp_path / "codes.jsonl").write_text(f"\n{json.dumps(line)}\n", encoding="utf-8")
    code, _, errors = speak("decode", tmp_path / "codes.jsonl", "--output", tmp_path / "out")
    assert code == 1 and re.search(rf"codes\.jsonl, row 2: {message}", errors) and not (tmp_path / "out").exists()


def test_two_recordings_of_one_name_are_not_decoded_into_one_file(
    speak: Callable, folder: Path, tmp_path: Path
) -> None:
    line = json.loads(speak("encode", folder / "a.flac")[1][0])
    lines = [json.dumps({**line, "file": name}) for name in ("a/1.wav", "b/1.flac")]
    (tmp_path / "codes.jsonl").write_text("\n".join(lines), encoding="utf-8")
    code, _, errors = speak("decode", tmp_path / "codes.jsonl", "--output", tmp_path / "out")
    assert code == 1 and "several files are named 1.wav and would overwrite each other" in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["decode", "reconstruct"])
def test_sounds_do_not_go_into_a_folder_with_other_files(
    speak: Callable, folder: Path, tmp_path: Path, command: str
) -> None:
    (tmp_path / "codes.jsonl").write_text(speak("encode", folder / "a.flac")[1][0], encoding="utf-8")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    source = {"decode": tmp_path / "codes.jsonl", "reconstruct": folder / "a.flac"}[command]
    code, _, errors = speak(command, source, "--output", folder)  # the originals are there
    assert code == 1 and f"holds what {command} did not write" in errors
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_decoding_again_replaces_what_was_decoded(speak: Callable, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "codes.jsonl").write_text(speak("encode", folder / "a.flac")[1][0], encoding="utf-8")
    for _ in range(2):
        assert speak("decode", tmp_path / "codes.jsonl", "--output", tmp_path / "out")[0] == 0
    code, _, errors = speak("reconstruct", folder / "a.flac", "--output", tmp_path / "out")
    assert code == 1 and "out is the output of decode, not of reconstruct" in errors


@pytest.mark.parametrize("option", ["convert --output a.wav", "codebooks --output a.json", "codebooks --picture a.png"])
def test_an_existing_file_is_refused_before_the_work(
    speak: Callable, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr(speechllm, "load_codec", lambda _: pytest.fail("the work began"))
    monkeypatch.setattr("tokenizer.loading.load_discrete", lambda _: pytest.fail("the work began"))
    command, word, name = option.split()
    (tmp_path / name).write_text("mine")
    files = [folder / "a.flac", folder / "b.flac"]
    code, _, errors = speak(command, *files, word, tmp_path / name)
    assert code == 1 and errors.endswith(f"{name} already exists: choose another name or delete it\n")
    assert (tmp_path / name).read_text() == "mine"
    if name != "a.json":
        assert "a.unknown: expected the name of" in speak(command, *files, word, tmp_path / "a.unknown")[2]


@pytest.mark.parametrize("kind", ["encodec", "speechtokenizer"])
@pytest.mark.parametrize("output", ["mine", "source", "source/codec", ".", "file"])
def test_importing_a_codec_deletes_nothing(
    tmp_path: Path, codec: SpeechCodec, monkeypatch: pytest.MonkeyPatch, kind: str, output: str
) -> None:
    for name in ("mine", "source", "mine.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("weights")
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for name in ("encodec", "speechtokenizer"):
        monkeypatch.setattr(speechllm, f"convert_{name}", lambda _: pytest.fail("the work began"), raising=False)
    assert main(["import-codec", str(tmp_path / "source"), str(tmp_path / output), "--kind", kind]) == 1
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.setattr(speechllm, f"convert_{kind}", lambda _: codec, raising=False)
    (tmp_path / "empty").mkdir()
    assert main(["import-codec", str(tmp_path / "source"), str(tmp_path / "empty"), "--kind", kind]) == 0


def test_transcribe_prints_a_text_per_file_and_decodes_runaways_again(
    folder: Path, make_speech_llm: Callable, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    speech_llm, files = make_speech_llm(), [str(folder / name) for name in ("a.flac", "broken.wav", "b.flac")]
    asked = []
    monkeypatch.setattr(
        speechllm, "load_speech_llm", lambda *places, **more: asked.append((*places, more)) or speech_llm, raising=False
    )
    assert main(["transcribe", *files, "--model", "asr", "--beams", "2"]) == 1
    printed = capsys.readouterr()
    texts = transcribe([files[0], files[2]], speech_llm, beams=2)
    assert texts != transcribe([files[0], files[2]], speech_llm) and asked[0][:2] == ("asr", None)
    assert asked[0][-1] == {"letters": None}
    assert printed.out == "".join(f"{file}\t{text}\n" for file, text in zip(files[::2], texts, strict=True))
    assert printed.err.startswith("skipped: ") and "broken.wav" in printed.err
    monkeypatch.setattr("speechllm.cli.main.CHUNK", 1)  # in parts it is the same
    assert main(["transcribe", *files, "--model", "asr", "--beams", "2"]) == 1
    assert capsys.readouterr() == printed
    assert main(["transcribe", files[0], "--model", "asr", "--max-duration", "0.01"]) == 1
    assert "at most 0.01 s are allowed" in capsys.readouterr().err


@pytest.mark.parametrize("chunk", [1, 2, 64])
def test_a_long_recording_is_transcribed_in_pieces(
    folder: Path, make_speech_llm: Callable, monkeypatch: pytest.MonkeyPatch, capsys: Capture, chunk: int
) -> None:
    speech_llm, files = make_speech_llm(), [str(folder / name) for name in ("a.flac", "b.flac")]
    monkeypatch.setattr(speechllm, "load_speech_llm", lambda *places, **_: speech_llm, raising=False)
    cut = functools.partial(pieces, longest_s=0.4)
    monkeypatch.setattr("speechllm.pieces.pieces", cut)
    monkeypatch.setattr("speechllm.cli.main.CHUNK", chunk)
    assert main(["transcribe", *files, "--model", "asr"]) == 0
    parts = [[piece.waveform for piece in cut(file, RATE)] for file in files]
    texts = [" ".join(filter(None, transcribe(part, speech_llm))) for part in parts]
    assert capsys.readouterr().out == "".join(f"{file}\t{text}\n" for file, text in zip(files, texts, strict=True))
    assert min(map(len, parts)) > 2


def test_a_recording_that_breaks_while_it_is_read_is_skipped(
    folder: Path, make_speech_llm: Callable, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    speech_llm, files = make_speech_llm(), [str(folder / name) for name in ("a.flac", "b.flac")]
    monkeypatch.setattr(speechllm, "load_speech_llm", lambda *places, **_: speech_llm, raising=False)
    cut = functools.partial(pieces, longest_s=0.4)

    def breaking(file: str, *words: object, **more: object) -> Iterator[Piece]:
        for number, piece in enumerate(cut(file, *words, **more)):
            if file == files[0] and number == 2:
                raise AudioError(file, "unreadable", "the disk is gone")
            yield piece

    monkeypatch.setattr("speechllm.pieces.pieces", breaking)
    (text,) = [" ".join(filter(None, transcribe([p.waveform for p in cut(files[1], RATE)], speech_llm)))]
    for chunk in (1, 64):
        monkeypatch.setattr("speechllm.cli.main.CHUNK", chunk)
        assert main(["transcribe", *files, "--model", "asr"]) == 1
        assert capsys.readouterr() == (f"{files[1]}\t{text}\n", f"skipped: {files[0]}: the disk is gone\n")


def test_export_writes_the_model_into_a_new_folder(make_speech_llm: Callable, tmp_path: Path, capsys: Capture) -> None:
    make_speech_llm().save(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["suppress_tokens"]
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out")]) == 1
    assert "already exists" in capsys.readouterr().err


def test_export_rounds_the_weights_when_asked(make_speech_llm: Callable, tmp_path: Path) -> None:
    speech_llm = make_speech_llm()
    speech_llm.save(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--precision", "bf16"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = {name: weight.bfloat16() for name, weight in speech_llm.model.state_dict().items()}
    assert all(weight.dtype == torch.bfloat16 and torch.equal(weight, expected[name]) for name, weight in found.items())


def test_merge_makes_of_an_adapter_a_model_to_train_further(
    make_speech_llm: Callable, tmp_path: Path, capsys: Capture
) -> None:
    speech_llm = make_speech_llm()
    speech_llm.model.save_pretrained(tmp_path / "base")
    speech_llm.model.name_or_path = str(tmp_path / "base")
    plain = speech_llm.model(torch.arange(20)[None]).logits
    speech_llm.model = prepare_adapter(speech_llm.model, speech_llm.vocabulary, rank=2, alpha=4)
    for name, weight in speech_llm.model.named_parameters():
        if "lora_B" in name:  # which begins at 0, so that an adapter does nothing
            torch.nn.init.normal_(weight)
    speech_llm.save(tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out")
    further = load_language_model(tmp_path / "out", speech_llm.codec)
    assert further.vocabulary == speech_llm.vocabulary
    ids = torch.arange(20)[None]
    assert torch.equal(further.model(ids).logits, merge(speech_llm).model(ids).logits)
    assert not torch.allclose(further.model(ids).logits, plain, atol=0.01)
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "out")]) == 1
    assert "already exists" in capsys.readouterr().err


# ---- wer, compare


def test_wer_prints_the_rate_of_two_files(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "said.txt").write_text("THE CAT SAT\nON A MAT\n", encoding="utf-8")
    (tmp_path / "heard.txt").write_text("the cat sat\non the mat\n", encoding="utf-8")
    assert main(["wer", str(tmp_path / "said.txt"), str(tmp_path / "heard.txt")]) == 0
    assert capsys.readouterr().out.startswith("WER 16.67% ")
    assert main(["wer", str(tmp_path / "said.txt"), str(tmp_path / "heard.txt"), "--characters"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "CER 15.79%"  # "a" or "the" in 11 + 8


def write_predictions(file: Path, **texts: tuple[str, str]) -> str:
    rows = ({"id": name, "reference": said, "hypothesis": heard} for name, (said, heard) in texts.items())
    write_jsonl(file, rows)
    return str(file)


def test_compare_prints_both_rates_and_the_difference(tmp_path: Path, capsys: Capture) -> None:
    a = write_predictions(tmp_path / "a.jsonl", u1=("THE CAT", "the cat"), u2=("a\u2028mat", "a hat"))
    b = write_predictions(tmp_path / "b.jsonl", u2=("a\u2028mat", "a mat"), u1=("THE CAT", "the cat"))
    assert main(["compare", a, b]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in lines] == ["A: WER 25.00%", "B: WER 0.00%", "B - A: difference -25.00%"]
    assert str(paired_bootstrap(["the cat", "a mat"], ["the cat", "a hat"], ["the cat", "a mat"])) in lines[2]
    assert main(["compare", a, b, "--normalizer", "none"]) == 0
    assert "A: WER 75.00%" in capsys.readouterr().out
    write_predictions(tmp_path / "predictions.jsonl", u2=("a\u2028mat", "a mat"), u1=("THE CAT", "the cat"))
    assert main(["compare", a, str(tmp_path)]) == 0  # the folder of an evaluation
    assert capsys.readouterr().out.splitlines() == lines


def test_compare_names_the_utterances_that_differ(tmp_path: Path, capsys: Capture) -> None:
    a = write_predictions(
        tmp_path / "a.jsonl", same=("x", "x"), other=("x", "x"), **{f"a{i}": ("x", "x") for i in range(5)}
    )
    b = write_predictions(tmp_path / "b.jsonl", same=("x", "x"), other=("y", "x"), b0=("x", "x"))
    assert main(["compare", a, b]) == 1
    assert capsys.readouterr().err == (
        f"speechllm compare: of the utterances 5 are only in {a} (a0, a1, a2, ...); 1 are only in {b} (b0); 1 have "
        "another reference (other): give predictions for the same splits of one corpus\n"
    )


@pytest.mark.parametrize("line", ["no JSON", "[]", '{"id": "a", "reference": "a"}'])
def test_compare_names_a_line_that_is_no_prediction(tmp_path: Path, capsys: Capture, line: str) -> None:
    a = write_predictions(tmp_path / "a.jsonl", u1=("a", "a"))
    (tmp_path / "b.jsonl").write_text(Path(a).read_text() + line + "\n", encoding="utf-8")
    assert main(["compare", a, str(tmp_path / "b.jsonl")]) == 1
    assert re.search(r"b\.jsonl, row 2: .*, expected ", capsys.readouterr().err)


def test_predictions_are_read_with_their_types_and_ids_counted(tmp_path: Path, capsys: Capture) -> None:
    rows = [{"id": 7, "reference": "a b", "hypothesis": ""}, {"id": 8, "reference": "a", "hypothesis": 1}]
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl")]
    for file, kept in zip(files, (rows, rows, [*rows, rows[0]], []), strict=True):
        file.write_text("\n".join(map(json.dumps, kept)) + "\n\n", encoding="utf-16")
    a, b, c, d = map(str, files)
    assert main(["compare", a, b]) == 0
    assert main(["compare", a, c]) == 1
    assert f"{c}, row 3: id '7' is that of {c}, row 1, too: give one prediction for each" in capsys.readouterr().err
    assert main(["compare", a, d]) == 1
    assert f"{d} is empty, expected predictions.jsonl of eval_asr" in capsys.readouterr().err


def test_an_error_is_one_line(capsys: Capture) -> None:
    assert main(["codebooks", "--codec", "./nowhere", "a.wav"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert printed.err.startswith("speechllm codebooks: ./nowhere: no such folder")


def test_a_full_disk_is_one_line_in_the_words_of_any_library(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("speechllm.cli.main._export", fail)
    assert main(["export", "model", "out"]) == 1
    expected = "speechllm export: I/O error: No space left on device (os error 28); the disk is full: make room\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("port", ["70000", "-1", "web"])
def test_a_port_that_there_is_not_is_a_mistake(port: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "model", "--port", port])
    assert "must be int from 0 to 65535" in capsys.readouterr().err


# ---- rehearse


def test_rehearse_is_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr("os.execve", lambda file, words, environment: started.append(words[1:]))
    main(["rehearse", "--config", "paper.yaml", "output=x"])
    ((file, *words),) = started
    assert Path(file).name == "rehearse.py" and words == ["--config", "paper.yaml", "output=x"]
