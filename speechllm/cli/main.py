"""The `speechllm` command: run recipes, transcribe, encode and decode speech, look into a codec, score transcripts."""

import argparse
import itertools
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

# no torch among these: every command imports what it needs itself, so that help and mistakes need not wait
from speechllm.cli.codec import (
    WHOLE_S,
    convert_file,
    count_codebooks,
    decode_file,
    encode_files,
    import_codec,
    reconstruct_files,
)
from speechllm.cli.scores import FORMATS, compare_files, score_files
from speechllm.cli.serve import loaded, page, serve
from speechllm.runs.config import find_config, shipped, spell_unprintable
from speechllm.runs.launch import find_recipe, recipe_command, recipe_environment
from speechllm.runs.recipe import out_of_space
from speechllm.runs.signals import GOES_ON, STARTS_ANEW, end_with_parent, interruptible, say_interrupted
from tokenizer.errors import InputError
from tokenizer.settings import Count, NonNegative, Port, Positive, argument, layer_numbers

if TYPE_CHECKING:
    from torch import Tensor

    from speechllm.model import SpeechLLM
    from speechllm.pauses import Cut

DESCRIPTION = "Let a language model hear: transcribe recordings, encode and decode speech, score transcripts."
BASE = "another place of the language model under an adapter than the recorded one"
LETTERS = "a compressor over the model's codes, for --letters-weight; none is needed where the model reads its vectors"
VAD = "cut where Silero VAD hears no speech: an ONNX file of it, or `silero` for the package's (extra `vad`)"
ONE_LINE = dict.fromkeys(map(ord, "\t\r\n"), " ")  # a text must not look like a further line or column
COUNT, SECONDS, WEIGHT, PORT = map(argument, (Count, Positive, NonNegative, Port))
CHUNK = 64  # pieces of recordings in memory
BATCH_TOKENS = "prompts and answers decoded at a time, in tokens (default 32768); fewer need less memory"
WHOLE = "longer recordings are skipped or refused (default 180)"
CHUNKED = "longer recordings are skipped; by default those of over 180 s, where a codec cannot work in chunks"
NEW = "an existing one is not overwritten"
OWN = "new, empty, or of an earlier call of this command, whose files are replaced"
NORMALIZERS = "librispeech (default), whisper_english or none"


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 when all went well, 1 after an error (one line on stderr)."""
    spell_unprintable()
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["rehearse"]:  # argparse would take the options behind it for its own
        words = ["run", *words]
    arguments = _parser().parse_args(words)
    try:
        with interruptible(GOES_ON if arguments.command == "run" else STARTS_ANEW):
            return arguments.run(arguments)
    except KeyboardInterrupt as interrupt:
        return say_interrupted(interrupt)
    except Exception as error:
        full = out_of_space(error)
        # the package's own errors are of these kinds and say how to fix them
        if not full and not isinstance(error, (ValueError, OSError, ImportError)):
            raise
        print(f"speechllm {arguments.command}: {error}{'; the disk is full: make room' * full}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="speechllm", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"speechllm {_version()}")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser(
        "run",
        parents=[_processes()],
        usage="speechllm run [-h] [--processes N | --accelerate FILE] recipe [--config FILE] [key=value ...]",
        help="a recipe: training, encoding, evaluation, the demo",
        epilog=f"Each recipe is a file in {shipped('recipes')} with a help of its own; --config takes a YAML of yours "
        f"or one of those in {shipped('configs')}, by the name it has there.",
    )
    command.add_argument("recipe", help=", ".join(sorted(path.stem for path in shipped("recipes").glob("*.py"))))
    command.add_argument("words", nargs=argparse.REMAINDER, help="what the recipe takes, its --help among it")
    command.set_defaults(run=_run)

    commands.add_parser("rehearse", help="`run rehearse`: whether every stage fits this machine, and how long it takes")

    command = commands.add_parser(
        "transcribe", parents=[_decoding()], help="recordings to text, one line each: the file, a tab, the text"
    )
    command.add_argument("files", nargs="+", help="audio files")
    command.add_argument("--model", required=True, help="folder that recipes/train_asr.py wrote")
    command.add_argument("--codec", help="another place of the codec than the model's subfolder `codec`")
    command.add_argument("--base", help=BASE)
    command.add_argument("--batch-tokens", type=COUNT, default=32_768, help=BATCH_TOKENS)
    longest = "seconds; longer recordings are skipped (default 7200); those of over 30 s are cut where it is quiet"
    command.add_argument("--max-duration", type=SECONDS, default=7200.0, help=longest)
    command.add_argument("--vad", metavar="FILE", help=VAD)
    command.set_defaults(run=_transcribe)

    command = commands.add_parser(
        "serve",
        parents=[_decoding()],
        help="a model behind HTTP, as OpenAI's clients ask for it",
        epilog="Needs the extra `serve`. Its paths are described at /openapi.json of its address.",
    )
    command.add_argument("model", help="folder that recipes/train_asr.py wrote")
    command.add_argument("--host", default="127.0.0.1", help="address to listen at; by default this machine's own only")
    command.add_argument("--port", type=PORT, default=8000, help="0 finds a free one (default 8000)")
    command.add_argument(
        "--api-key", metavar="KEY", help="callers must show it; or SPEECHLLM_API_KEY in the environment"
    )
    command.add_argument("--name", help="of the model, as callers see it; that of its folder by default")
    command.add_argument("--codec", help="another place of the codec than the model's subfolder `codec`")
    command.add_argument("--base", help=BASE)
    command.add_argument("--batch-size", type=COUNT, default=16, help="utterances transcribed together (default 16)")
    command.add_argument("--max-requests", type=COUNT, default=64, help="at a time; more are told to wait (default 64)")
    command.add_argument("--max-megabytes", type=SECONDS, default=512.0, help="of an upload (default 512)")
    command.add_argument("--max-duration", type=SECONDS, default=7200.0, help="seconds of a recording (default 7200)")
    command.add_argument("--vad", metavar="FILE", help=VAD)
    command.add_argument("--timeout", type=SECONDS, default=3600.0, help="seconds for an answer (default 3600)")
    command.set_defaults(run=serve)

    command = commands.add_parser(
        "page",
        parents=[_decoding()],
        help="speak to a model in a browser",
        epilog="Needs the extra `page`. Works without a network.",
    )
    command.add_argument(
        "models", nargs="+", metavar="model", help="folder that recipes/train_asr.py wrote; several stand side by side"
    )
    command.add_argument("--host", default="127.0.0.1", help="address to listen at, of this machine only")
    command.add_argument("--port", type=PORT, help="the first free one from 7860 on by default")
    command.add_argument("--vad", metavar="FILE", help=VAD)
    command.set_defaults(run=page)

    command = commands.add_parser("encode", help="recordings to codes, one JSON line each")
    command.add_argument("files", nargs="+", help="audio files")
    command.add_argument("--codec", required=True, help="folder or hub name of a speech codec")
    command.add_argument("--layers", type=COUNT, help="codebooks, all by default")
    command.add_argument("--max-duration", type=SECONDS, metavar="SECONDS", help=CHUNKED)
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
        type=_layers,
        metavar="1,2,4",
        help="numbers of codebooks to decode from; 1, 2, 4, ... and all of them by default",
    )
    command.add_argument("--output", required=True, help=f"folder for NAME_<n>_codebooks.wav and NAME.png; {OWN}")
    command.add_argument("--max-duration", type=SECONDS, default=WHOLE_S, metavar="SECONDS", help=WHOLE)
    command.set_defaults(run=reconstruct_files)

    command = commands.add_parser("convert", help="what one recording says in the voice of another, by swapping codes")
    command.add_argument("source", help="audio file that says what is to be said")
    command.add_argument("target", help="audio file of the voice to say it in")
    command.add_argument("--codec", required=True, help="folder or hub name of a speech codec")
    command.add_argument("--output", required=True, help=f"audio file to write; {NEW}")
    command.add_argument(
        "--layers",
        type=_layers,
        default=[1],
        metavar="1,2,3",
        help="codes to take from the target, the first layer is 0; 1, the default, is the paper's",
    )
    command.add_argument(
        "--matching",
        choices=("position", "content", "mean"),
        default="position",
        help="from the target's frame of the same number (default, the paper's), of the nearest content, or its means",
    )
    command.add_argument("--max-duration", type=SECONDS, default=WHOLE_S, metavar="SECONDS", help=WHOLE)
    command.set_defaults(run=convert_file)

    command = commands.add_parser("codebooks", help="how many codes of each codebook are in use")
    command.add_argument("files", nargs="*", help="audio files, or none with --data")
    command.add_argument("--codec", required=True, help="folder or hub name of a speech codec")
    command.add_argument("--data", help="corpus folder: manifest.jsonl or LibriSpeech's layout")
    command.add_argument("--split", action="append", help="of the corpus, can be given several times; all by default")
    command.add_argument("--output", help=f"JSON file for the numbers and counts; {NEW}")
    command.add_argument("--picture", help=f"PNG, PDF or SVG of the sorted use; {NEW}")
    command.add_argument("--max-duration", type=SECONDS, metavar="SECONDS", help=CHUNKED)
    command.set_defaults(run=count_codebooks)

    command = commands.add_parser("import-codec", help="a published codec as one of this package")
    command.add_argument("source", help="folder (or hub name, for encodec) of the published codec")
    command.add_argument("output", help="new or empty folder for the codec, which --codec takes")
    command.add_argument(
        "--kind", required=True, choices=("encodec", "speechtokenizer"), help="encodec: in the format of transformers"
    )
    command.set_defaults(run=import_codec)

    command = commands.add_parser(
        "wer", help="word error rate of two text files, one utterance a line", description=FORMATS
    )
    command.add_argument("reference", help="text file of what was said")
    command.add_argument("hypothesis", help="text file of what was recognised")
    command.add_argument("--normalizer", default="librispeech", help=NORMALIZERS)
    command.add_argument("--characters", action="store_true", help="also print the character error rate")
    command.set_defaults(run=score_files)

    command = commands.add_parser("compare", help="paired bootstrap between two results of eval_asr")
    command.add_argument("a", metavar="A", help="folder that recipes/eval_asr.py wrote, or its predictions.jsonl")
    command.add_argument("b", metavar="B", help="of the same utterances")
    results = "librispeech, whisper_english or none; by default the one in the results.json beside the files"
    command.add_argument("--normalizer", help=results)
    command.set_defaults(run=compare_files)

    command = commands.add_parser("export", help="a model as a folder for transformers, vLLM or llama.cpp's converter")
    command.add_argument("model", help="folder that recipes/train_asr.py wrote")
    command.add_argument("output", help="new or empty folder")
    command.add_argument("--base", help=BASE)
    command.add_argument("--precision", choices=["bf16"], help="of the weights; by default as they are stored")
    command.set_defaults(run=_export)

    command = commands.add_parser("merge", help="an adapter and its language model as one model, to train further")
    command.add_argument("model", help="folder that recipes/train_asr.py wrote with train=lora or rows")
    command.add_argument("output", help="new or empty folder")
    command.add_argument("--base", help=BASE)
    command.set_defaults(run=_merge, precision=None)
    return parser


def _processes() -> argparse.ArgumentParser:
    """The options that may stand before and behind the recipe's name."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--processes", type=COUNT, metavar="N", help="several that share the work, one on each GPU")
    how.add_argument(
        "--accelerate", metavar="FILE", help="as this configuration of Accelerate says, which may be shipped"
    )
    return parser


def _decoding() -> argparse.ArgumentParser:
    """The options of all that answers with a model."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--beams", type=COUNT, default=1, help="1, the default, is greedy")
    parser.add_argument("--letters-weight", type=WEIGHT, default=0.0, help="of a compressor's letters beside the model")
    parser.add_argument("--letters", metavar="FOLDER", help=LETTERS)
    return parser


def _version() -> str:
    try:
        return version("speechllm")
    except PackageNotFoundError:
        return "(not installed)"


def _run(arguments: argparse.Namespace) -> int:
    """Become the recipe; of several processes, once the configuration is found to be right."""
    behind, words = _processes().parse_known_args(arguments.words)
    named = behind.accelerate or arguments.accelerate
    how = find_config(named).resolve() if named else behind.processes or arguments.processes or 1
    file, environment, code = find_recipe(arguments.recipe), recipe_environment(), 0
    if {"-h", "--help", "--check"} & set(words):
        how = 1
    if how != 1:
        several = {"WORLD_SIZE": "2", "LOCAL_RANK": "0"}  # as the launcher will tell it
        check = [sys.executable, *recipe_command(file, [*words, "--check"])]
        code = subprocess.call(check, env=environment | several)
    if code == 0:
        command = [sys.executable, *recipe_command(file, words, how)]
        os.execve(command[0], command, environment)  # signals and the exit code are the recipe's own
    return code


def _transcribe(arguments: argparse.Namespace) -> int:
    """Print `file<TAB>text` for every usable file; unusable ones are named on stderr and make the exit code 1."""
    from speechllm import transcribe
    from speechllm.pauses import load_cut

    cut = load_cut(arguments.vad)
    speech_llm = loaded(arguments.model, arguments)
    assert speech_llm.codec is not None
    found = _pieces(arguments.files, speech_llm.codec.sample_rate, arguments.max_duration, cut)
    texts: list[str] = []
    done = 0
    while some := [*itertools.islice(found, CHUNK)]:  # print the texts before more is read
        waveforms = [waveform for _, waveform in some if waveform is not None]
        options = {"beams": arguments.beams, "letters_weight": arguments.letters_weight}
        heard = iter(transcribe(waveforms, speech_llm, arguments.batch_tokens, **options))
        for ends, waveform in some:
            if waveform is None:
                texts = []
                continue
            texts.append(next(heard))
            if ends is not None:
                print(f"{ends.translate(ONE_LINE)}\t{' '.join(filter(None, texts)).translate(ONE_LINE)}", flush=True)
                texts, done = [], done + 1
    return int(done < len(arguments.files))


def _pieces(
    files: Iterable[str], sample_rate: int, max_duration_s: float, cut: "Cut"
) -> "Iterator[tuple[str | None, Tensor | None]]":
    """The waveforms float [N] of all files in pieces; with the last one of a file comes its name.

    Files that cannot be used are named on stderr and skipped. A waveform None says that what came of a file is void.
    """
    from speechllm.pieces import pieces
    from tokenizer.audio import AudioError

    for file in files:
        ahead = None
        try:
            for piece in pieces(file, sample_rate, max_duration_s=max_duration_s, cut=cut):
                if ahead is not None:
                    yield None, ahead
                ahead = piece.waveform
            yield file, ahead
        except AudioError as error:
            print(f"skipped: {error}", file=sys.stderr)
            yield None, None


def _export(arguments: argparse.Namespace) -> int:
    from speechllm import export_model

    export_model(_loaded_for_output(arguments), arguments.output)
    print(arguments.output)
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    from speechllm import merge
    from tokenizer.files import atomic_folder

    merged = merge(_loaded_for_output(arguments))
    with atomic_folder(arguments.output) as folder:
        merged.save(folder)
    print(arguments.output)
    return 0


def _loaded_for_output(arguments: argparse.Namespace) -> "SpeechLLM":
    """The model, once it is known that the output can be written; its codec only if it is beside it."""
    import torch

    from speechllm import load_speech_llm
    from tokenizer.claims import new_folder
    from tokenizer.pretrained import check_folder

    model = Path(check_folder(arguments.model, [], "a speech language model"))
    new_folder(arguments.output, model)
    dtype = torch.bfloat16 if arguments.precision == "bf16" else None
    return load_speech_llm(model, dtype=dtype, base=arguments.base, with_codec=(model / "codec").is_dir())


def _layers(text: str) -> list[int]:
    try:
        return layer_numbers(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


if __name__ == "__main__":
    end_with_parent()  # if a program of ours started it, as benchmark_serve does
    sys.exit(main())
