"""The `speechllm` command: run recipes, transcribe, encode and decode speech, look into a codec, score transcripts."""

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# no torch among these: every command imports what it needs itself, so that help and mistakes need not wait
from speechllm.cli.codec import (
    convert_file,
    count_codebooks,
    decode_file,
    encode_files,
    import_codec,
    reconstruct_files,
    usable,
)
from speechllm.runs.config import shipped
from speechllm.runs.launch import find_recipe, recipe_command, recipe_environment

DESCRIPTION = "Let a language model hear: transcribe recordings, encode and decode speech, score transcripts."
BASE = "another place of the language model under an adapter than the recorded one"
CHUNK = 256  # recordings in memory at a time
NEW = "an existing one is not overwritten"
OWN = "new, empty, or of an earlier call of this command, whose files are replaced"
NORMALIZERS = "librispeech (default), whisper_english or none"


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 when all went well, 1 after an error (one line on stderr)."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    # the package's own errors are of these kinds and say how to fix them
    except (ValueError, OSError, ImportError) as error:
        print(f"speechllm {arguments.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="speechllm", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"speechllm {_version()}")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser(
        "run",
        parents=[_processes()],
        usage="speechllm run [-h] [--processes N] recipe [--config FILE] [key=value ...]",
        help="a recipe: training, encoding, evaluation, the demo",
        epilog=f"Each recipe is a file in {shipped('recipes')} with a help of its own; --config takes a YAML of yours "
        f"or one of those in {shipped('configs')}, by the name it has there.",
    )
    command.add_argument("recipe", help=", ".join(sorted(path.stem for path in shipped("recipes").glob("*.py"))))
    command.add_argument("words", nargs=argparse.REMAINDER, help="what the recipe takes, its --help among it")
    command.set_defaults(run=_run)

    command = commands.add_parser("transcribe", help="recordings to text, one line each")
    command.add_argument("files", nargs="+", help="audio files")
    command.add_argument("--model", required=True, help="folder that recipes/train_asr.py wrote")
    command.add_argument("--codec", help="another place of the codec than the model's subfolder `codec`")
    command.add_argument("--base", help=BASE)
    command.add_argument("--batch-size", type=int, default=16, help="answers written at a time; a beam counts as one")
    command.add_argument("--beams", type=int, default=1, help="1, the default, is greedy")
    longest = "seconds; longer recordings are skipped, as encode_speech leaves them out of training (default 60)"
    command.add_argument("--max-duration", type=float, default=60.0, help=longest)
    command.set_defaults(run=_transcribe)

    command = commands.add_parser("encode", help="recordings to codes, one JSON line each")
    command.add_argument("files", nargs="+", help="audio files")
    command.add_argument("--codec", required=True, help="folder or hub name of a speech codec")
    command.add_argument("--layers", type=int, help="codebooks, all by default")
    command.set_defaults(run=encode_files)

    command = commands.add_parser("decode", help="codes (JSON lines of `speechllm encode`) to WAV files")
    command.add_argument("codes", help="file of JSON lines, or - for standard input")
    command.add_argument("--codec", required=True, help="the codec that made the codes")
    command.add_argument("--output", required=True, help=f"folder for the WAV files; {OWN}")
    command.set_defaults(run=decode_file)

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
    command.add_argument("--output", required=True, help=f"folder for NAME_<n>_codebooks.wav and NAME.png; {OWN}")
    command.set_defaults(run=reconstruct_files)

    command = commands.add_parser("convert", help="what one recording says in the voice of another, by swapping codes")
    command.add_argument("source", help="audio file that says what is to be said")
    command.add_argument("target", help="audio file of the voice to say it in")
    command.add_argument("--codec", required=True, help="folder or hub name of a speech codec")
    command.add_argument("--output", required=True, help=f"audio file to write; {NEW}")
    command.add_argument(
        "--layers",
        type=_numbers,
        default=[1],
        metavar="1,2,3",
        help="codes to take from the target, the first layer is 0; 1, the default, is the paper's",
    )
    command.add_argument(
        "--matching",
        choices=("position", "content"),
        default="position",
        help="take them from the target's frame of the same number (default, the paper's), or of the nearest content",
    )
    command.set_defaults(run=convert_file)

    command = commands.add_parser("codebooks", help="how many codes of each codebook are in use")
    command.add_argument("files", nargs="*", help="audio files, or none with --data")
    command.add_argument("--codec", required=True, help="folder or hub name of a speech codec")
    command.add_argument("--data", help="corpus folder: manifest.jsonl or LibriSpeech's layout")
    command.add_argument("--split", action="append", help="of the corpus, can be given several times; all by default")
    command.add_argument("--output", help=f"JSON file for the numbers and counts; {NEW}")
    command.add_argument("--picture", help=f"PNG, PDF or SVG of the sorted use; {NEW}")
    command.set_defaults(run=count_codebooks)

    command = commands.add_parser("import-codec", help="a published codec as one of this package")
    command.add_argument("source", help="folder (or hub name, for encodec) of the published codec")
    command.add_argument("output", help="new or empty folder for the codec, which --codec takes")
    command.add_argument(
        "--kind", required=True, choices=("encodec", "speechtokenizer"), help="encodec: in the format of transformers"
    )
    command.set_defaults(run=import_codec)

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
    command.add_argument("output", help="new or empty folder")
    command.add_argument("--base", help=BASE)
    command.set_defaults(run=_export)
    return parser


def _processes() -> argparse.ArgumentParser:
    """The option that may stand before and behind the recipe's name."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--processes", type=int, metavar="N", help="several that share the work, one on each GPU")
    return parser


def _version() -> str:
    try:
        return version("speechllm")
    except PackageNotFoundError:
        return "(not installed)"


def _run(arguments: argparse.Namespace) -> int:
    """Become the recipe; of several processes, once the configuration is found to be right."""
    behind, words = _processes().parse_known_args(arguments.words)
    processes, file = behind.processes or arguments.processes or 1, find_recipe(arguments.recipe)
    environment, code = recipe_environment(), 0
    if {"-h", "--help", "--check"} & set(words):
        processes = 1
    if processes > 1:
        code = subprocess.call([sys.executable, *recipe_command(file, [*words, "--check"])], env=environment)
    if code == 0:
        command = [sys.executable, *recipe_command(file, words, processes)]
        os.execve(command[0], command, environment)  # signals and the exit code are the recipe's own
    return code


def _transcribe(arguments: argparse.Namespace) -> int:
    """Print `file<TAB>text` for every usable file; unusable ones are named on stderr and make the exit code 1."""
    import torch

    from speechllm import load_speech_llm, merge, transcribe

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", None)
    speech_llm = merge(load_speech_llm(arguments.model, arguments.codec, device, dtype, arguments.base))
    assert speech_llm.codec is not None
    files, done = arguments.files, 0
    for start in range(0, len(files), CHUNK):  # print the texts before more is read
        recordings = [*usable(files[start : start + CHUNK], speech_llm.codec.sample_rate, arguments.max_duration)]
        waveforms = [waveform for _, waveform in recordings]
        texts = transcribe(waveforms, speech_llm, arguments.batch_size, beams=arguments.beams, fallback=True)
        for (file, _), text in zip(recordings, texts, strict=True):
            print(f"{file}\t{text}", flush=True)
        done += len(recordings)
    return int(done < len(files))


def _wer(arguments: argparse.Namespace) -> int:
    from speechllm import character_error_rate, word_error_rate

    references, hypotheses = map(_lines, (arguments.reference, arguments.hypothesis))
    print(word_error_rate(references, hypotheses, arguments.normalizer))
    if arguments.characters:
        print(f"CER {character_error_rate(references, hypotheses, arguments.normalizer):.2%}")
    return 0


def _lines(file: str) -> list[str]:
    with open(file, encoding="utf-8") as lines:  # not splitlines, which also ends a line at what texts may hold
        return [line.rstrip("\n") for line in lines]


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
    texts_a, texts_b = [text for _, text in a.values()], [b[name][1] for name in a]
    print(f"A: {word_error_rate(references, texts_a, arguments.normalizer)}")
    print(f"B: {word_error_rate(references, texts_b, arguments.normalizer)}")
    print(f"B - A: {paired_bootstrap(references, texts_a, texts_b, arguments.normalizer)}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from speechllm import export_model, load_speech_llm
    from tokenizer.claims import new_folder

    new_folder(arguments.output, arguments.model)  # before the model is loaded
    codec_too = (Path(arguments.model) / "codec").is_dir()  # what it exports needs none
    export_model(load_speech_llm(arguments.model, base=arguments.base, with_codec=codec_too), arguments.output)
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


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected numbers like 1,2,4, got {text!r}") from error


if __name__ == "__main__":
    sys.exit(main())
