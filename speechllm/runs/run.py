"""A run folder: configuration, log, checkpoints and results. Its files are written atomically."""

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import filter_trackers
from tqdm import tqdm

from speechllm.runs.machine import provenance, versions
from speechllm.runs.recipe import claim_output
from tokenizer.errors import InputError
from tokenizer.files import atomic_file, json_text, read_json, read_jsonl, write_json, write_jsonl, write_text

KEPT_CHECKPOINTS = 2
PRINTED = 5  # skipped recordings that are printed


class RunError(InputError):
    """A run folder or a setting that cannot be used for this run."""


class Run:
    """Folder of one training: config.yaml, versions.json, log.jsonl, checkpoints/, and done.json at the end.

    Started again with the same configuration, a run continues from the newest checkpoint; another configuration is
    refused. Only the main process writes.
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
        self._started, self._seconds_before = time.perf_counter(), 0.0
        self.accelerator = accelerator
        self.main = accelerator is None or accelerator.is_main_process
        self.log_file = self.folder / "log.jsonl"
        self.skipped = self.folder / "skipped.jsonl"  # unusable recordings, see `Crops`
        if self.main:
            claim_output(self.folder, config)
            try:
                (self.folder / "checkpoints").mkdir(exist_ok=True)
                self._settle_config(asdict(config), free)
            except OSError as error:
                raise RunError(f"cannot write the run folder {self.folder}: {error}") from error
        if accelerator is not None:
            accelerator.wait_for_everyone()
            self._start_trackers(accelerator, trackers or [], asdict(config))

    def _start_trackers(self, accelerator: Accelerator, trackers: Sequence[str], config: dict[str, Any]) -> None:
        if trackers and self.summary is None:
            accelerator.project_configuration.set_directories(str(self.folder))
            accelerator.log_with = filter_trackers(list(trackers), accelerator.logging_dir)
            if absent := set(trackers) - set(map(str, accelerator.log_with)):
                names = ", ".join(absent)
                raise RunError(f"trackers: {names} is not installed: run pip install {' '.join(absent)}")
            accelerator.init_trackers(self.folder.name, {name: str(value) for name, value in config.items()})

    def _settle_config(self, config: dict[str, Any], free: Collection[str]) -> None:
        config = json.loads(json.dumps(config))  # tuples become lists, as read from YAML
        file = self.folder / "config.yaml"
        held = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else None
        if held is not None:
            places = str(held.get("output")), str(config.get("output"))
            changed = {key for key in held | config if not _same(held.get(key), config.get(key), *places)} - set(free)
            if changed:
                changes = "; ".join(f"{key}: {held.get(key)} -> {config.get(key)}" for key in sorted(changed))
                raise RunError(
                    f"{self.folder} holds a run with another configuration ({changes}): "
                    "choose another output folder or delete this one"
                )
        else:
            write_json(self.folder / "versions.json", versions())
        if held != config:
            write_text(file, yaml.safe_dump(config, sort_keys=False))

    @property
    def summary(self) -> dict[str, Any] | None:
        """The summary that `finish` wrote; None for an unfinished run."""
        return read_json(self.folder / "done.json") or None

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
        """Mark the run as finished and delete its checkpoints, which the exported model replaces.

        Skipped recordings are listed with the reason and counted in the summary.
        """
        if self.main:
            rows = {row["path"]: row for row in read_jsonl(self.skipped)}  # each is recorded in every epoch
            if rows:
                report_skipped(self.folder, [*rows.values()])
            write_json(self.folder / "done.json", summary | ({"skipped": len(rows)} if rows else {}))
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)

    def log(self, step: int, **metrics: float) -> None:
        """Append one line to log.jsonl and send it to the trackers."""
        if self.accelerator is not None:
            self.accelerator.log(metrics, step=step)
        if self.main:
            with self.log_file.open("a", encoding="utf-8") as file:
                file.write(json_text({"step": step, **metrics}) + "\n")

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint after `step` finished steps and delete the oldest ones."""
        if not self.main:
            return
        file = self.folder / "checkpoints" / f"step_{step:08d}.pt"
        with atomic_file(file) as part:
            torch.save({"step": step, "seconds": self._seconds, **state}, part)
        for old in self._checkpoints()[:-KEPT_CHECKPOINTS]:
            old.unlink()

    def resume(self) -> dict[str, Any] | None:
        """The newest checkpoint, or None; log lines after it are removed, since those steps will run again."""
        files = self._checkpoints()
        # memory-mapped: otherwise every process would hold a second copy of all weights and moments
        state = torch.load(files[-1], map_location="cpu", weights_only=True, mmap=True) if files else None
        self.cut_log(state["step"] if state else 0)
        if state:
            self._seconds_before = state.pop("seconds", 0.0)
        return state

    def cut_log(self, done: int) -> None:
        """Remove log lines after `done` steps, and an incomplete last line."""
        if self.main and self.log_file.exists():
            kept = [line for line in self.log_file.read_text().splitlines(True) if _logged_step(line) <= done]
            write_text(self.log_file, "".join(kept))

    def _checkpoints(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob("step_*.pt"))

    def steps(self, start: int, stop: int, description: str) -> tqdm:
        """Progress bar over training steps, shown in the main process only."""
        return tqdm(
            range(start, stop),
            description,
            initial=start,
            total=stop,
            disable=not self.main,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10,  # less often in log files
        )


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
