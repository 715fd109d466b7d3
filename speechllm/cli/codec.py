"""The commands of `speechllm` that need a codec and no language model; `cli` says what they take."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # every command imports what it needs: help and mistakes must not wait for torch
    from torch import Tensor

    from tokenizer.interface import DiscreteTokenizer

WHOLE_S = 180.0  # longest recording by default where memory grows with its length


def encode_files(arguments: argparse.Namespace) -> int:
    """Print a JSON line with the codes of every file; unusable ones are named on stderr and make the exit code 1."""
    from tokenizer.loading import load_discrete

    codec, done = load_discrete(arguments.codec), 0
    fingerprint = codec.fingerprint
    for file, waveform in usable(arguments.files, codec.sample_rate, longest(codec, arguments)):
        ids = codec.encode(waveform[None], layers=arguments.layers).ids[0].tolist()
        row = {"file": file, "codec": fingerprint, "samples": len(waveform), "codes": ids}
        print(json.dumps(row))  # in ASCII: names of files need not be UTF-8
        done += 1
    return int(done < len(arguments.files))


def decode_file(arguments: argparse.Namespace) -> int:
    """Write a WAV file for every line of codes, once all lines are found to be right, and print its name."""
    import torch

    from speechllm import Codes, DataError, load_codec, save_audio
    from tokenizer.claims import claim_folder
    from tokenizer.errors import InputError

    rows, codec = [], load_codec(arguments.codec)
    own = codec.fingerprint
    for place, row in read_codes(arguments.codes):
        ids, samples, fingerprint = torch.tensor(row["codes"]), torch.tensor([row["samples"]]), row["codec"]
        if fingerprint != own:
            raise DataError(f"{place} holds codes of codec {fingerprint}, {arguments.codec} is {own}")
        codes = Codes(ids[None], torch.tensor([ids.shape[1]]), samples)
        try:
            codes.require(codec.num_codebooks, codec.codebook_size, codec.sample_rate / codec.frame_rate)
        except InputError as error:
            raise DataError(f"{place}: {error}: encode the recording again") from error
        rows.append((Path(row["file"]).with_suffix(".wav").name, codes))
    refuse_repeated(name for name, _ in rows)
    output = claim_folder(arguments.output, "decode")
    for name, codes in rows:
        save_audio(output / name, codec.decode(codes)[0], codec.sample_rate)
        print(output / name)
    return 0


def read_codes(file: str) -> list[tuple[str, dict[str, Any]]]:
    """The lines of `speechllm encode`, from a file or standard input (-), each with its place for messages.

    Raises TableError for a line that holds anything else.
    """
    from tokenizer.tables import TableError, convert_rows, decode, required_name, required_path

    columns = {"file": required_path, "codec": required_name, "samples": _positive, "codes": _code_lists}
    content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    rows = [*convert_rows(decode(content, file), "standard input" if file == "-" else file, columns)]
    if not rows:
        raise TableError(f"{file} holds no codes, expected lines of `speechllm encode`")
    return rows


def _positive(cell: Any) -> int:
    if type(cell) is not int or not 0 < cell < 2**48:
        raise ValueError("a number above 0")
    return cell


def _code_lists(cell: Any) -> list[list[int]]:
    """Codes as lists, [layers][frames]."""
    layers = cell if isinstance(cell, list) else []
    rectangular = bool(layers) and all(isinstance(layer, list) and len(layer) == len(layers[0]) > 0 for layer in layers)
    if not rectangular or not all(type(code) is int and 0 <= code < 2**31 for layer in layers for code in layer):
        raise ValueError("a list of codes for each layer, all as long, such as [[5, 7, 7], [1, 0, 3]]")
    return layers


def reconstruct_files(arguments: argparse.Namespace) -> int:
    """Print the name of every file written; unusable recordings are named on stderr and make the exit code 1."""
    from speechllm import load_codec, reconstruct, save_audio
    from speechllm.reports.plots import save_figure, spectrogram_figure
    from tokenizer.claims import claim_folder
    from tokenizer.metrics.quality import layer_counts

    refuse_repeated(Path(file).stem for file in arguments.files)
    codec = load_codec(arguments.codec)
    counts = layer_counts(codec, arguments.layers)
    output, done = claim_folder(arguments.output, "reconstruct"), 0
    for file, waveform in usable(arguments.files, codec.sample_rate, arguments.max_duration):
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


def convert_file(arguments: argparse.Namespace) -> int:
    """Write the source in the voice of the target and print the file's name."""
    from speechllm import convert_voice, load_audio, load_codec, save_audio
    from tokenizer.audio import audio_format
    from tokenizer.claims import claim_file

    audio_format(claim_file(arguments.output))
    codec = load_codec(arguments.codec)
    limit = {"max_duration_s": arguments.max_duration}
    source, target = (load_audio(file, codec.sample_rate, **limit) for file in (arguments.source, arguments.target))
    converted = convert_voice(codec, source, target, arguments.layers, arguments.matching)
    save_audio(arguments.output, converted, codec.sample_rate)
    print(arguments.output)
    return 0


def count_codebooks(arguments: argparse.Namespace) -> int:
    """Print one line per layer; unusable recordings are named on stderr and make the exit code 1."""
    from tqdm import tqdm

    from speechllm import read_corpus
    from speechllm.reports.plots import code_usage_figure, figure_format, save_figure
    from tokenizer.claims import claim_file
    from tokenizer.files import write_json
    from tokenizer.loading import load_discrete
    from tokenizer.metrics.code_usage import count_codes, usage_of_counts

    if bool(arguments.files) == bool(arguments.data):
        raise ValueError("give either audio files or a corpus folder with --data")
    if arguments.picture:
        figure_format(claim_file(arguments.picture))
    if arguments.output:
        claim_file(arguments.output)
    codec = load_discrete(arguments.codec)
    files = arguments.files or [utterance.path for utterance in read_corpus(arguments.data, arguments.split)]
    recordings = usable(tqdm(files, "encode", unit="utt"), codec.sample_rate, longest(codec, arguments))
    codes = (codec.encode(waveform[None]).ids[0].cpu().numpy() for _, waveform in recordings)
    counts, used = count_codes(codes, codec.num_codebooks, codec.codebook_size)
    if not used:
        raise ValueError("none of the recordings can be used")
    usage = [usage_of_counts(count) for count in counts]
    print(f"layer  used of {codec.codebook_size}  dead  perplexity")
    for layer, row in enumerate(usage):
        print(f"{layer:5}  {row['used']:7}  {row['dead']:4}  {row['perplexity']:10.1f}")
    if arguments.output:
        numbers = [{**row, "counts": count.tolist()} for row, count in zip(usage, counts, strict=True)]
        summary = {"codec_fingerprint": codec.fingerprint, "recordings": used, "frames": int(counts[0].sum())}
        write_json(arguments.output, {**summary, "layers": numbers})
    if arguments.picture:
        save_figure(code_usage_figure([*counts]), arguments.picture)
    return int(used < len(files))


def import_codec(arguments: argparse.Namespace) -> int:
    """Write a published codec as one of this package and print what it is."""
    from speechllm import convert_encodec, convert_speechtokenizer
    from tokenizer.claims import new_folder
    from tokenizer.files import atomic_folder

    new_folder(arguments.output, arguments.source)
    convert = {"encodec": convert_encodec, "speechtokenizer": convert_speechtokenizer}[arguments.kind]
    codec = convert(arguments.source)
    with atomic_folder(arguments.output) as folder:
        codec.save_pretrained(folder)
    print(
        f"{arguments.output}: {codec.num_codebooks} codebooks of {codec.codebook_size}, {codec.frame_rate:g} frames/s "
        f"at {codec.sample_rate} Hz, fingerprint {codec.fingerprint}"
    )
    return 0


def longest(codec: "DiscreteTokenizer", arguments: argparse.Namespace) -> float | None:
    """Seconds of the longest recording to encode: --max-duration, or no limit for a codec that works in chunks.

    The limit of the others, whose memory grows with the recording, is said before anything is encoded.
    """
    if arguments.max_duration is not None or getattr(codec, "bounded", False):
        return arguments.max_duration
    print(
        f"{arguments.codec} encodes a recording as a whole, with 1 to 2 GB of memory a minute (see "
        f"tokenizer/README.md): those of more than {WHOLE_S:g} s are skipped; --max-duration changes the limit",
        file=sys.stderr,
    )
    return WHOLE_S


def refuse_repeated(names: Iterable[str]) -> None:
    """Raise ValueError for names of outputs that occur twice."""
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"several files are named {repeated[0]} and would overwrite each other: give them one by one")


def usable(
    files: Iterable[str], sample_rate: int, max_duration_s: float | None = None
) -> Iterator[tuple[str, "Tensor"]]:
    """Every file with its waveform float [N]; those that cannot be used are named on stderr and skipped."""
    from speechllm import AudioError, load_audio
    from tokenizer.prefetch import prefetch

    def read(file: str) -> "tuple[str, Tensor | AudioError]":
        try:
            return file, load_audio(file, sample_rate, max_duration_s=max_duration_s)
        except AudioError as error:
            return file, error

    for file, found in prefetch(read, files, ahead=1):  # no more: they may be hours long
        if isinstance(found, AudioError):
            print(f"skipped: {found}", file=sys.stderr)
        else:
            yield file, found
