"""A run folder: configuration, log, checkpoints and results. Its files are written atomically."""

import contextlib
import hashlib
import json
import math
import os
import shutil
import sys
import time
import uuid
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import filter_trackers
from tqdm import tqdm

from speechllm.runs.machine import provenance, versions
from speechllm.runs.recipe import claim_output
from tokenizer.claims import CLAIM
from tokenizer.errors import InputError
from tokenizer.files import atomic_file, json_text, read_json, read_jsonl, write_json, write_jsonl, write_text
from tokenizer.locks import LOCK
from tokenizer.progress import progress_bar
from tokenizer.reading import reading

T = TypeVar("T")
KEPT_CHECKPOINTS = 2
# keys of trainings that may change while they are interrupted; the schedule of the learning rate follows `steps`
MAY_CHANGE = "steps log_every save_every validate_every trackers num_workers".split()
CHECKPOINTS, LABELS = "checkpoints", "labels.json"
# what a folder holds of a run that has not begun, so that nothing is lost with it
FROM_THE_START = (CLAIM, LOCK, "config.yaml", "versions.json", CHECKPOINTS, LABELS)
PRINTED = 5  # skipped recordings that are printed


class RunError(InputError):
    """A run folder or a setting that cannot be used for this run."""


class Run:
    """Folder of one training: config.yaml, versions.json, log.jsonl, checkpoints/, and done.json at the end.

    Started again with the same configuration, a run continues from the newest checkpoint; another configuration is
    refused, unless the run ended before it had written anything else. Only the main process writes.
    """

    def __init__(
        self,
        folder: str | Path,
        config: Any,
        accelerator: Accelerator | None = None,
        trackers: Sequence[str] | None = None,
        free: Collection[str] = (),
    ):
        """trackers: names of experiment trackers, as in Accelerate, that also receive the log. free: keys of the
        configuration that may change during a run, because the result does not depend on them.

        Raises OutputError for a folder that is not this recipe's, is in use or cannot be written (`claim_output`), and
        RunError for one that holds another configuration, or for a tracker that is not installed.
        """
        self.folder = Path(folder)
        self.config = config
        self.trackers = list(trackers or [])
        self._started, self._seconds_before = time.perf_counter(), 0.0
        self.accelerator = accelerator
        self.main = accelerator is None or accelerator.is_main_process
        self.log_file = self.folder / "log.jsonl"
        self.skipped = self.folder / "skipped.jsonl"  # unusable recordings, see `Crops`
        if self.main:
            claim_output(self.folder, config)
            try:
                self._settle_config(asdict(config), free)
                if self.summary is None:
                    (self.folder / CHECKPOINTS).mkdir(exist_ok=True)
                else:  # killed just before they were deleted
                    self._delete_checkpoints()
            except OSError as error:
                raise RunError(f"cannot write the run folder {self.folder}: {error}") from error
        if accelerator is not None:
            accelerator.wait_for_everyone()
            self._find_trackers(accelerator)

    def _find_trackers(self, accelerator: Accelerator) -> None:
        if self.trackers:
            accelerator.project_configuration.set_directories(str(self.folder))
            accelerator.log_with = filter_trackers(self.trackers, accelerator.logging_dir)
            if absent := set(self.trackers) - set(map(str, accelerator.log_with)):
                names = ", ".join(absent)
                raise RunError(f"trackers: {names} is not installed: run pip install {' '.join(absent)}")

    def _start_trackers(self, done: int) -> None:
        """Start the trackers, or go on with what they hold up to step `done`."""
        if self.trackers and self.accelerator is not None:
            file = self.folder / "trackers.json"
            names = {"wandb": uuid.uuid4().hex, **read_json(file)}
            if self.main:
                write_json(file, names)
            settings = {
                "wandb": {"id": names["wandb"], "resume": "allow"},
                "tensorboard": {"purge_step": done + 1},
            }
            config = {name: str(value) for name, value in asdict(self.config).items()}
            self.accelerator.init_trackers(self.folder.name, config, settings)

    def _settle_config(self, config: dict[str, Any], free: Collection[str]) -> None:
        config = json.loads(json.dumps(config))  # tuples become lists, as read from YAML
        file = self.folder / "config.yaml"
        with reading(file, "the configuration of a run", "restore it, or choose another output folder", RunError):
            held = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else None
        if held is not None and self._has_begun:
            places = str(held.get("output")), str(config.get("output"))
            changes = {key for key in held | config if not _same(held.get(key), config.get(key), *places)}
            if changed := changes - set(free):
                named = "; ".join(f"{key}: {held.get(key)} -> {config.get(key)}" for key in sorted(changed))
                raise RunError(
                    f"{self.folder} holds a run with another configuration ({named}): "
                    "choose another output folder or delete this one"
                )
            if "steps" in changes and self.summary is not None:
                raise RunError(
                    f"{self.folder} is finished with steps={held['steps']}, and a finished run has no checkpoint to go "
                    f"on from to steps={config['steps']}: choose another output folder (train_asr goes on with the "
                    "finished model as model=RUN/model, train_tokenizer and train_compressor as start=RUN/model)"
                )
        else:
            write_json(self.folder / "versions.json", versions())
        if held != config:
            write_text(file, yaml.safe_dump(config, sort_keys=False))

    @property
    def _has_begun(self) -> bool:
        """Whether it holds more than every run does from its start on."""
        found = [*self.folder.iterdir(), *(self.folder / CHECKPOINTS).glob("*")]
        return any(file.name not in FROM_THE_START for file in found)

    @property
    def summary(self) -> dict[str, Any] | None:
        """The summary that `finish` wrote; None for an unfinished run."""
        return read_json(self.folder / "done.json") or None

    def require_labels(self, labels: object, resumed: bool) -> None:
        """Raise RunError if a resumed run would learn other labels than those it began with.

        labels: what the numbers that are learnt stand for, in JSON's types, where the data decide it, such as letters.
        """
        found = {"labels": hashlib.sha256(json_text(labels).encode()).hexdigest()[:16]}
        if resumed and read_json(self.folder / LABELS) not in ({}, found):
            raise RunError(
                f"{self.folder} began with other labels, made from texts or speakers that have been changed since: "
                "restore them, or choose another output folder"
            )
        if self.main:
            write_json(self.folder / LABELS, found)

    @property
    def provenance(self) -> dict[str, Any]:
        """How the run was made, see `provenance`.

        The seconds are those since this start and, of a resumed run, those before its checkpoint.
        """
        return provenance(self.config, self._seconds)

    @property
    def _seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._started

    def finish(self, summary: dict[str, Any]) -> None:
        """Mark the run as finished, end its trackers and delete its checkpoints, which the exported model replaces.

        Skipped recordings are listed with the reason and counted in the summary, as are steps without finite numbers.
        """
        if self.main:
            rows = {row["path"]: row for row in read_jsonl(self.skipped)}  # each is recorded in every epoch
            if rows:
                report_skipped(self.folder, [*rows.values()])
            counts = {"skipped": len(rows), "non_finite": sum("non_finite" in line for line in read_log(self.folder))}
            write_json(self.folder / "done.json", summary | {name: count for name, count in counts.items() if count})
            for tracker in self.accelerator.trackers if self.accelerator is not None else ():
                tracker.finish()
            self._delete_checkpoints()

    def _delete_checkpoints(self) -> None:
        for file in self._checkpoints():
            file.unlink()
        for folder in (self.folder / CHECKPOINTS).glob("checkpoint-*"):  # of transformers' Trainer
            shutil.rmtree(folder)
        with contextlib.suppress(OSError):  # not there, or somebody keeps something in it
            (self.folder / CHECKPOINTS).rmdir()

    def log(self, step: int, **metrics: float) -> None:
        """Append one line to log.jsonl and send it to the trackers."""
        if self.accelerator is not None:
            self.accelerator.log(metrics, step=step)
        if self.main:
            with self.log_file.open("a", encoding="utf-8") as file:
                file.write(json_text({"step": step, **metrics}) + "\n")

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint after `step` finished steps and delete the oldest ones.

        Raises RunError if it cannot be written; those before are kept.
        """
        if not self.main:
            return
        name = self.folder / CHECKPOINTS / f"step_{step:08d}.pt"
        try:
            with atomic_file(name) as part, part.open("wb") as file:
                torch.save({"step": step, "seconds": self._seconds, **state}, file)
                file.flush()
                os.fsync(file.fileno())  # or a power cut may leave the new name and not yet its content
        except (OSError, RuntimeError) as error:  # torch hides the first in the second
            raise RunError(
                f"cannot write the checkpoint {name}: {error}; those before are kept, the same command goes on there"
            ) from error
        for old in self._checkpoints()[:-KEPT_CHECKPOINTS]:
            old.unlink()

    def resume(self) -> dict[str, Any] | None:
        """The newest checkpoint, or None; log lines after it are removed, since those steps will run again.

        One that cannot be read is passed over for the one before. Raises RunError if none can be read.
        """
        if self.main:
            for part in (self.folder / CHECKPOINTS).glob("*.part"):  # of a process that was killed
                part.unlink()
        state = newest_usable(self._checkpoints(), _load_checkpoint, self.main)
        done = state["step"] if state else 0
        self.cut_log(done)
        self._start_trackers(done)
        if state:
            self._seconds_before = state.pop("seconds", 0.0)
        return state

    def cut_log(self, done: int) -> None:
        """Remove log lines after `done` steps, and an incomplete last line."""
        if self.main and self.log_file.exists():
            kept = [line for line in self.log_file.read_text().splitlines(True) if _logged_step(line) <= done]
            write_text(self.log_file, "".join(kept))

    def _checkpoints(self) -> list[Path]:
        return sorted((self.folder / CHECKPOINTS).glob("step_*.pt"))

    def steps(self, start: int, stop: int, description: str) -> tqdm:
        """Progress bar over training steps, shown in the main process only."""
        return progress_bar(range(start, stop), description, initial=start, total=stop, disable=not self.main, delay=0)


def _load_checkpoint(file: Path) -> dict[str, Any]:
    check_archive(file)
    # memory-mapped: otherwise every process would hold a second copy of all weights and moments
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def check_archive(file: Path) -> None:
    """Compare the content of a file that `torch.save` wrote with its checksums, which torch does not do."""
    with zipfile.ZipFile(file) as archive:
        if (broken := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {broken}")


def newest_usable(files: Sequence[Path], load: Callable[[Path], T], tell: bool = True) -> T | None:
    """What `load` returns for the last of these checkpoints, oldest first, that it can read; None without files.

    tell: print which it cannot. Raises RunError if it can read none.
    """
    for file in reversed(files):
        try:
            return load(file)
        except Exception as error:  # of many kinds: whatever a file that was cut short makes a reader stumble over
            if tell:
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                print(f"{file} cannot be read ({reason}): trying the checkpoint before it", file=sys.stderr)
    if files:
        raise RunError(
            f"none of the checkpoints in {files[0].parent} can be read: restore one, or delete the folder "
            f"{files[0].parent} to start the training anew"
        )
    return None


def _same(held: Any, asked: Any, before: str, now: str) -> bool:
    """Whether two values of a configuration are equal; paths are if they were moved as the output was, to `now`."""
    if isinstance(held, dict) and isinstance(asked, dict):
        return held.keys() == asked.keys() and all(_same(held[key], asked[key], before, now) for key in held)
    if isinstance(held, list) and isinstance(asked, list):
        return len(held) == len(asked) and all(_same(*pair, before, now) for pair in zip(held, asked, strict=True))
    if isinstance(held, str) and isinstance(asked, str) and held and asked and before != now:
        return held == asked or os.path.relpath(held, before) == os.path.relpath(asked, now)
    return held == asked


def _logged_step(line: str) -> float:
    """Step of a log line; infinite for an incomplete line."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def read_log(folder: str | Path) -> list[dict[str, float]]:
    """Lines of a run's log.jsonl, oldest first."""
    return read_jsonl(Path(folder) / "log.jsonl")


def report_skipped(folder: str | Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write FOLDER/skipped.jsonl, one line per unusable recording, and print the first ones."""
    file = Path(folder) / "skipped.jsonl"
    write_jsonl(file, rows)
    for row in rows[:PRINTED]:
        print(f"skipped: {row['detail']}")
    if len(rows) > PRINTED:
        print(f"skipped: {len(rows) - PRINTED} more, see {file}")
