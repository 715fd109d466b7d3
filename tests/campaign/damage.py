"""What happens to files of models, codes and checkpoints: changes of a case's folder."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import soundfile
import torch
from judge import Case, refused
from parts import RATE, read_json, tone
from safetensors.torch import load_file, save_file

from speechllm.data.shards import open_shard, write_table

Change = Callable[[Path], object]
PAGE = b"<!DOCTYPE html><html>403 Forbidden</html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
CODEC_WEIGHTS = "tokenizer/model/model.safetensors"
CODEC_CONFIG = "tokenizer/model/config.json"
BASE_WEIGHTS = "text/model/model.safetensors"
VOCABULARY = "asr/model/audio_vocabulary.json"
ECAPA = "speaker/model/embedding_model.ckpt"
SHARD = "codes/codes_00000.arrow"


def cut(file: str, share: float = 0.5) -> Change:
    def write(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(len(content) * share)])

    return write


def content(file: str, data: bytes) -> Change:
    return lambda folder: (folder / file).write_bytes(data)


def gone(file: str) -> Change:
    return lambda folder: (folder / file).unlink()


def settings(file: str, **changed: object) -> Change:
    """Other values in a JSON file; ... removes a key."""

    def write(folder: Path) -> None:
        values = {**read_json(folder / file), **changed}
        (folder / file).write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))

    return write


def tensors(file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """Other tensors in a safetensors file."""

    def write(folder: Path) -> None:
        values = load_file(folder / file)
        change(values)
        save_file(values, folder / file, {"format": "pt"})

    return write


def ecapa(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def write(folder: Path) -> None:
        file = folder / ECAPA
        values = torch.load(file, weights_only=True)
        change(values)
        torch.save(values, file)

    return write


def renamed(values: dict[str, torch.Tensor]) -> None:
    for key in list(values):
        values[f"module.{key}"] = values.pop(key)


def without_half(values: dict[str, torch.Tensor]) -> None:
    for key in sorted(values)[::2]:
        del values[key]


def without_one(values: dict[str, torch.Tensor]) -> None:
    del values[sorted(values)[0]]


def not_a_number(values: dict[str, torch.Tensor]) -> None:
    for value in values.values():
        if value.is_floating_point():
            value.fill_(float("nan"))


def recipe_that_runs_code(line: str) -> Change:
    """A line in hyperparams.yaml that writes a file, if it is run."""

    def write(folder: Path) -> None:
        file = folder / "speaker" / "model" / "hyperparams.yaml"
        file.write_text(f"{line}\n{file.read_text()}")

    return write


def pickle_that_runs_code(file: str) -> Change:
    def write(folder: Path) -> None:
        place = str(folder / "pwned").encode()
        (folder / file).write_bytes(b"cos\nsystem\n(S'touch " + place + b"'\ntR.")

    return write


def nothing_ran(folder: Path, _: str) -> bool:
    return not (folder / "pwned").exists()


def codes_with(change: Callable[[list[dict[str, object]]], object]) -> Change:
    def write(folder: Path) -> None:
        file = folder / SHARD
        table = open_shard(file)
        rows = table.to_pylist()
        change(rows)
        write_table(file, pa.Table.from_pylist(rows, table.schema))

    return write


def foreign_shard(folder: Path) -> None:
    write_table(folder / SHARD, pa.table({"a": [1, 2]}))


def without_column(name: str) -> Change:
    def write(folder: Path) -> None:
        file = folder / SHARD
        write_table(file, open_shard(file).drop([name]))

    return write


def recording(folder: Path) -> None:
    soundfile.write(folder / "a.wav", tone(0.5, 3), RATE)


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def loads(name: str, change: Change, file: str, part: str, command: str, needs: str = "", **more: object) -> Case:
    """A part that is changed, and refused by a command with the name of its file or folder."""
    return Case(name, command, refused(file), f"{part} {needs}".strip(), change, **more)


def wrong(name: str, command: str, pattern: str, needs: str = "", change: Change | None = None) -> Case:
    return Case(name, command, refused(pattern), needs, change)
