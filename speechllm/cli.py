"""The `speechllm` command: transcribe recordings, encode and decode speech, score transcripts."""

import argparse
import json
import sys
from pathlib import Path

DESCRIPTION = "Let a language model hear: transcribe recordings, encode and decode speech, score transcripts."


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 when all went well, 1 after an error (one line on stderr)."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, OSError) as error:  # the package's own errors are of these kinds and say how to mend them
        print(f"speechllm {arguments.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="speechllm", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("transcribe", help="recordings to text, one line each")
    command.add_argument("files", nargs="+", help="audio files")
    command.add_argument("--model", required=True, help="folder that recipes/train_asr.py wrote")
    command.add_argument("--codec", help="another place of the codec than the model's subfolder `codec`")
    command.add_argument("--batch-size", type=int, default=16)
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

    command = commands.add_parser("wer", help="word error rate of two text files, one utterance a line")
    command.add_argument("reference")
    command.add_argument("hypothesis")
    command.add_argument("--normalizer", default="librispeech", help="librispeech (default) or none")
    command.set_defaults(run=_wer)
    return parser


def _transcribe(arguments: argparse.Namespace) -> int:
    """Print `file<TAB>text` for every usable file; unusable ones are named on stderr and make the exit code 1."""
    from speechllm import AudioError, load_audio, load_speech_llm, transcribe

    speech_llm = load_speech_llm(arguments.model, arguments.codec)
    assert speech_llm.codec is not None
    files, waveforms, failed = [], [], 0
    for file in arguments.files:
        try:
            waveforms.append(load_audio(file, speech_llm.codec.sample_rate))
            files.append(file)
        except AudioError as error:
            failed += 1
            print(f"left out: {error}", file=sys.stderr)
    texts = transcribe(waveforms, speech_llm, arguments.batch_size)
    for file, text in zip(files, texts, strict=True):
        print(f"{file}\t{text}")
    return int(failed > 0)


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


def _wer(arguments: argparse.Namespace) -> int:
    from speechllm import word_error_rate

    references = Path(arguments.reference).read_text(encoding="utf-8").splitlines()
    hypotheses = Path(arguments.hypothesis).read_text(encoding="utf-8").splitlines()
    print(word_error_rate(references, hypotheses, arguments.normalizer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
