"""The commands of `speechllm` that need a codec and no language model; `cli` says what they take."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # every command imports what it needs: help and mistakes must not wait for torch
    from torch import Tensor


def encode_files(arguments: argparse.Namespace) -> int:
    """Print a JSON line with the codes of every file."""
    from speechllm import load_audio
    from tokenizer.loading import load_discrete

    codec = load_discrete(arguments.codec)
    for file in arguments.files:
        waveform = load_audio(file, codec.sample_rate)
        ids = codec.encode(waveform[None], layers=arguments.layers).ids[0].tolist()
        row = {"file": file, "codec": codec.fingerprint, "samples": len(waveform), "codes": ids}
        print(json.dumps(row, ensure_ascii=False))
    return 0


def decode_file(arguments: argparse.Namespace) -> int:
    """Write a WAV file for every line of codes and print its name."""
    import torch

    from speechllm import Codes, DataError, load_codec, save_audio

    codec = load_codec(arguments.codec)
    text = sys.stdin.read() if arguments.codes == "-" else Path(arguments.codes).read_text(encoding="utf-8")
    for number, line in enumerate(text.rstrip("\n").split("\n"), 1):
        try:
            row = json.loads(line)
            ids, samples, fingerprint = torch.tensor(row["codes"]), torch.tensor([row["samples"]]), row["codec"]
            name = Path(row["file"]).with_suffix(".wav").name
            Codes(ids[None], torch.tensor([len(ids[0])]), samples).require(codec.num_codebooks, codec.codebook_size)
        except (IndexError, KeyError, TypeError, ValueError) as error:
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


def reconstruct_files(arguments: argparse.Namespace) -> int:
    """Print the name of every file written; unusable recordings are named on stderr and make the exit code 1."""
    from speechllm import load_codec, reconstruct, save_audio
    from speechllm.reports.plots import save_figure, spectrogram_figure
    from tokenizer.metrics.quality import layer_counts

    repeated = [name for name, count in Counter(Path(file).stem for file in arguments.files).items() if count > 1]
    if repeated:
        raise ValueError(f"several files are named {repeated[0]} and would overwrite each other: give them one by one")
    codec = load_codec(arguments.codec)
    counts = layer_counts(codec, arguments.layers)
    output, done = Path(arguments.output), 0
    for file, waveform in usable(arguments.files, codec.sample_rate):
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

    codec = load_codec(arguments.codec)
    source, target = (load_audio(file, codec.sample_rate) for file in (arguments.source, arguments.target))
    converted = convert_voice(codec, source, target, arguments.layers, arguments.matching)
    save_audio(arguments.output, converted, codec.sample_rate)
    print(arguments.output)
    return 0


def count_codebooks(arguments: argparse.Namespace) -> int:
    """Print one line per layer; unusable recordings are named on stderr and make the exit code 1."""
    import numpy as np
    from tqdm import tqdm

    from speechllm import codebook_usage, read_corpus
    from speechllm.reports.plots import code_usage_figure, save_figure
    from tokenizer.files import write_json
    from tokenizer.loading import load_discrete

    if bool(arguments.files) == bool(arguments.data):
        raise ValueError("give either audio files or a corpus folder with --data")
    codec = load_discrete(arguments.codec)
    files = arguments.files or [utterance.path for utterance in read_corpus(arguments.data, arguments.split)]
    recordings = usable(tqdm(files, "encode", unit="utt"), codec.sample_rate)
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


def import_codec(arguments: argparse.Namespace) -> int:
    """Write a published codec as one of this package and print what it is."""
    from speechllm import convert_encodec, convert_speechtokenizer
    from tokenizer.files import atomic_folder

    convert = {"encodec": convert_encodec, "speechtokenizer": convert_speechtokenizer}[arguments.kind]
    codec = convert(arguments.source)
    with atomic_folder(arguments.output) as folder:
        codec.save_pretrained(folder)
    print(
        f"{arguments.output}: {codec.num_codebooks} codebooks of {codec.codebook_size}, {codec.frame_rate:g} frames/s "
        f"at {codec.sample_rate} Hz, fingerprint {codec.fingerprint}"
    )
    return 0


def usable(
    files: Iterable[str], sample_rate: int, max_duration_s: float | None = None
) -> Iterator[tuple[str, "Tensor"]]:
    """Every file with its waveform float [N]; those that cannot be used are named on stderr and skipped."""
    from speechllm import AudioError, load_audio

    for file in files:
        try:
            waveform = load_audio(file, sample_rate, max_duration_s=max_duration_s)
        except AudioError as error:
            print(f"skipped: {error}", file=sys.stderr)
            continue
        yield file, waveform
