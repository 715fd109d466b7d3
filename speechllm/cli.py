"""The `speechllm` command: transcribe, encode and decode speech, look into a codec, score and compare transcripts."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # every command imports what it needs: help and mistakes must not wait for torch
    from torch import Tensor

DESCRIPTION = "Let a language model hear: transcribe recordings, encode and decode speech, score transcripts."
NORMALIZERS = "librispeech (default), whisper_english or none"


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 when all went well, 1 after an error (one line on stderr)."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    # the package's own errors are of these kinds and say how to mend them
    except (ValueError, OSError, ImportError) as error:
        print(f"speechllm {arguments.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="speechllm", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("transcribe", help="recordings to text, one line each")
    command.add_argument("files", nargs="+", help="audio files")
    command.add_argument("--model", required=True, help="folder that recipes/train_asr.py wrote")
    command.add_argument("--codec", help="another place of the codec than the model's subfolder `codec`")
    command.add_argument("--batch-size", type=int, default=16, help="answers written at a time; a beam counts as one")
    command.add_argument("--beams", type=int, default=1, help="1, the default, is greedy")
    command.set_defaults(run=_transcribe)

    command = commands.add_parser("encode", help="recordings to codes, one JSON line each")
    command.add_argument("files", nargs="+", help="audio files")
    command.add_argument("--codec", required=True, help="folder or hub name of a speech codec")
    command.add_argument("--layers", type=int, help="codebooks, all by default")
    command.set_defaults(run=_encode)

    command = commands.add_parser("decode", help="codes (JSON lines of `speechllm encode`) to WAV files")
    command.add_argument("codes", help="file of JSON lines, or - for standard input")
    command.add_argument("--codec", required=True, help="the codec that made the codes")
    command.add_argument("--output", required=True, help="folder for the WAV files")
    command.set_defaults(run=_decode)

    command = commands.add_parser(
        "reconstruct", help="recordings as a codec gives them back: WAV files and spectrograms"
    )
    command.add_argument("files", nargs="+", help="audio files")
    command.add_argument("--codec", required=True, help="folder or hub name of a speech codec")
    command.add_argument(
        "--layers",
        type=_numbers,
        metavar="1,2,4",
        help="numbers of codebooks to decode from; 1, 2, 4, ... and all of them by default",
    )
    command.add_argument("--output", required=True, help="folder for NAME_<n>_codebooks.wav and NAME.png")
    command.set_defaults(run=_reconstruct)

    command = commands.add_parser("codebooks", help="how many codes of each codebook are in use")
    command.add_argument("files", nargs="*", help="audio files, or none with --data")
    command.add_argument("--codec", required=True, help="folder or hub name of a speech codec")
    command.add_argument("--data", help="corpus folder: manifest.jsonl or LibriSpeech's layout")
    command.add_argument("--split", action="append", help="of the corpus, can be given several times; all by default")
    command.add_argument("--output", help="also write the numbers and the count of every code to this JSON file")
    command.add_argument("--picture", help="also draw the sorted use of the codes into this PNG, PDF or SVG file")
    command.set_defaults(run=_codebooks)

    command = commands.add_parser("import-codec", help="a published codec as one of this package")
    command.add_argument("source", help="folder (or hub name, for encodec) of the published codec")
    command.add_argument("output", help="folder for the codec, as --codec of the other commands takes it")
    command.add_argument(
        "--kind", required=True, choices=("encodec", "speechtokenizer"), help="encodec: in the format of transformers"
    )
    command.set_defaults(run=_import_codec)

    command = commands.add_parser("wer", help="word error rate of two text files, one utterance a line")
    command.add_argument("reference")
    command.add_argument("hypothesis")
    command.add_argument("--normalizer", default="librispeech", help=NORMALIZERS)
    command.add_argument("--characters", action="store_true", help="also print the character error rate")
    command.set_defaults(run=_wer)

    command = commands.add_parser("compare", help="paired bootstrap between two predictions.jsonl of eval_asr")
    command.add_argument("a", metavar="A.jsonl")
    command.add_argument("b", metavar="B.jsonl", help="of the same utterances")
    command.add_argument("--normalizer", default="librispeech", help=NORMALIZERS)
    command.set_defaults(run=_compare)

    command = commands.add_parser("export", help="a model as a folder for transformers, vLLM or llama.cpp's converter")
    command.add_argument("model", help="folder that recipes/train_asr.py wrote")
    command.add_argument("output", help="new folder")
    command.set_defaults(run=_export)
    return parser


def _transcribe(arguments: argparse.Namespace) -> int:
    """Print `file<TAB>text` for every usable file; unusable ones are named on stderr and make the exit code 1."""
    from speechllm import load_speech_llm, merge, transcribe

    speech_llm = merge(load_speech_llm(arguments.model, arguments.codec))
    assert speech_llm.codec is not None
    recordings = list(_usable(arguments.files, speech_llm.codec.sample_rate))
    waveforms = [waveform for _, waveform in recordings]
    texts = transcribe(waveforms, speech_llm, arguments.batch_size, beams=arguments.beams, fallback=True)
    for (file, _), text in zip(recordings, texts, strict=True):
        print(f"{file}\t{text}")
    return int(len(recordings) < len(arguments.files))


def _encode(arguments: argparse.Namespace) -> int:
    from speechllm import SpeechCodec, load_audio

    codec = SpeechCodec.from_pretrained(arguments.codec)
    for file in arguments.files:
        waveform = load_audio(file, codec.sample_rate)
        ids = codec.encode(waveform[None], layers=arguments.layers).ids[0].tolist()
        row = {"file": file, "codec": codec.fingerprint, "samples": len(waveform), "codes": ids}
        print(json.dumps(row, ensure_ascii=False))
    return 0


def _decode(arguments: argparse.Namespace) -> int:
    import torch

    from speechllm import Codes, DataError, SpeechCodec, save_audio

    codec = SpeechCodec.from_pretrained(arguments.codec)
    text = sys.stdin.read() if arguments.codes == "-" else Path(arguments.codes).read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
            ids, samples, fingerprint = torch.tensor(row["codes"]), torch.tensor([row["samples"]]), row["codec"]
            name = Path(row["file"]).with_suffix(".wav").name
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{arguments.codes}, line {number}: not a line of `speechllm encode` ({error!r})"
            ) from error
        if fingerprint != codec.fingerprint:
            raise DataError(
                f"line {number} holds codes of codec {fingerprint}, {arguments.codec} is {codec.fingerprint}"
            )
        waveform = codec.decode(Codes(ids[None], torch.tensor([ids.shape[1]]), samples))[0]
        save_audio(Path(arguments.output) / name, waveform, codec.sample_rate)
        print(Path(arguments.output) / name)
    return 0


def _reconstruct(arguments: argparse.Namespace) -> int:
    """Print the name of every file written; unusable recordings are named on stderr and make the exit code 1."""
    from speechllm import SpeechCodec, layer_counts, reconstruct, save_audio
    from speechllm.plots import save_figure, spectrogram_figure

    repeated = [name for name, count in Counter(Path(file).stem for file in arguments.files).items() if count > 1]
    if repeated:
        raise ValueError(f"several files are named {repeated[0]} and would overwrite each other: give them one by one")
    codec = SpeechCodec.from_pretrained(arguments.codec)
    counts = layer_counts(codec, arguments.layers)
    output, done = Path(arguments.output), 0
    for file, waveform in _usable(arguments.files, codec.sample_rate):
        sounds = {"original": waveform.numpy()}
        for count, sound in reconstruct(codec, waveform, counts).items():
            path = output / f"{Path(file).stem}_{count}_codebooks.wav"
            save_audio(path, sound, codec.sample_rate)
            print(path)
            sounds[f"{count} codebook{'s' * (count != 1)}"] = sound.numpy()
        picture = output / f"{Path(file).stem}.png"
        save_figure(spectrogram_figure(sounds, codec.sample_rate), picture)
        print(picture)
        done += 1
    return int(done < len(arguments.files))


def _codebooks(arguments: argparse.Namespace) -> int:
    """Print one line per layer; unusable recordings are named on stderr and make the exit code 1."""
    import numpy as np
    from tqdm import tqdm

    from speechllm import SpeechCodec, codebook_usage, read_corpus, write_json
    from speechllm.plots import code_usage_figure, save_figure

    if bool(arguments.files) == bool(arguments.data):
        raise ValueError("give either audio files or a corpus folder with --data")
    codec = SpeechCodec.from_pretrained(arguments.codec)
    files = arguments.files or [utterance.path for utterance in read_corpus(arguments.data, arguments.split)]
    recordings = _usable(tqdm(files, "encode", unit="utt"), codec.sample_rate)
    ids = [codec.encode(waveform[None]).ids[0].numpy().astype(np.uint16) for _, waveform in recordings]
    if not ids:
        raise ValueError("none of the recordings can be used")
    layers = np.concatenate(ids, 1)
    usage = [codebook_usage(layer, codec.codebook_size) for layer in layers]
    print(f"layer  used of {codec.codebook_size}  dead  perplexity")
    for layer, row in enumerate(usage):
        print(f"{layer:5}  {row['used']:7}  {row['dead']:4}  {row['perplexity']:10.1f}")
    counts = [np.bincount(layer, minlength=codec.codebook_size) for layer in layers]
    if arguments.output:
        numbers = [{**row, "counts": count.tolist()} for row, count in zip(usage, counts, strict=True)]
        Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
        summary = {"codec_fingerprint": codec.fingerprint, "recordings": len(ids), "frames": layers.shape[1]}
        write_json(arguments.output, {**summary, "layers": numbers})
    if arguments.picture:
        shares = [np.sort(count[count > 0])[::-1] / count.sum() for count in counts]
        save_figure(code_usage_figure(shares, [codec.codebook_size] * len(counts)), arguments.picture)
    return int(len(ids) < len(files))


def _import_codec(arguments: argparse.Namespace) -> int:
    from speechllm import convert_encodec, convert_speechtokenizer, whole_folder

    convert = {"encodec": convert_encodec, "speechtokenizer": convert_speechtokenizer}[arguments.kind]
    codec = convert(arguments.source)
    with whole_folder(arguments.output) as folder:
        codec.save_pretrained(folder)
    print(
        f"{arguments.output}: {codec.num_codebooks} codebooks of {codec.codebook_size}, {codec.frame_rate:g} frames/s "
        f"at {codec.sample_rate} Hz, fingerprint {codec.fingerprint}"
    )
    return 0


def _wer(arguments: argparse.Namespace) -> int:
    from speechllm import character_error_rate, word_error_rate

    references = Path(arguments.reference).read_text(encoding="utf-8").splitlines()
    hypotheses = Path(arguments.hypothesis).read_text(encoding="utf-8").splitlines()
    print(word_error_rate(references, hypotheses, arguments.normalizer))
    if arguments.characters:
        print(f"CER {character_error_rate(references, hypotheses, arguments.normalizer):.2%}")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    """Print the word error rate of both files and how sure the difference, B minus A, is."""
    from speechllm import DataError, paired_bootstrap, word_error_rate

    a, b = _predictions(arguments.a), _predictions(arguments.b)
    differing = {
        f"are only in {arguments.a}": a.keys() - b.keys(),
        f"are only in {arguments.b}": b.keys() - a.keys(),
        "have another reference": {name for name in a.keys() & b.keys() if a[name][0] != b[name][0]},
    }
    found = [
        f"{len(ids)} {what} ({', '.join(sorted(ids)[:3] + ['...'] * (len(ids) > 3))})"
        for what, ids in differing.items()
        if ids
    ]
    if found:
        raise DataError(f"of the utterances {'; '.join(found)}: give predictions for the same splits of one corpus")
    references = [reference for reference, _ in a.values()]
    heard_a, heard_b = [heard for _, heard in a.values()], [b[name][1] for name in a]
    print(f"A: {word_error_rate(references, heard_a, arguments.normalizer)}")
    print(f"B: {word_error_rate(references, heard_b, arguments.normalizer)}")
    print(f"B - A: {paired_bootstrap(references, heard_a, heard_b, arguments.normalizer)}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from speechllm import export_model, load_speech_llm

    export_model(load_speech_llm(arguments.model), arguments.output)
    print(arguments.output)
    return 0


def _predictions(file: str) -> dict[str, tuple[str, str]]:
    """Reference and hypothesis by utterance, as eval_asr writes them."""
    from speechllm import DataError

    pairs = {}
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                pairs[row["id"]] = row["reference"], row["hypothesis"]
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{file}, line {number}: not a line of eval_asr's predictions ({error!r})") from error
    return pairs


def _usable(files: Iterable[str], sample_rate: int) -> Iterator[tuple[str, "Tensor"]]:
    """Every file with its waveform float [N]; those that cannot be used are named on stderr and left out."""
    from speechllm import AudioError, load_audio

    for file in files:
        try:
            waveform = load_audio(file, sample_rate)
        except AudioError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        yield file, waveform


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected numbers like 1,2,4, got {text!r}") from error


if __name__ == "__main__":
    sys.exit(main())
