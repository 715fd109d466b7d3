"""Jobs of several recipes, each run as its own command; finished stages are recorded and skipped next time."""

import contextlib
import functools
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import yaml

from speechllm.runs.config import ConfigError, find_config, load_config
from speechllm.runs.launch import recipe_command, recipe_environment
from speechllm.runs.machine import available_cpus
from speechllm.runs.run import RunError
from speechllm.runs.signals import GRACE_S, child_environment
from tokenizer.corpus import CorpusError, read_corpus
from tokenizer.files import read_json, write_json
from tokenizer.utterances import MissingSplitError, corpus_folders

CONFIG = "--config="
Asked = tuple[str, str, list[str]]  # a stage, where it has its splits from, and which
SPLITS = ("splits", "dev_splits", "train_splits", "test_splits")  # keys of the recipes that read a corpus


class Stages:
    """Runs each stage once; RUN/stages.json records which are finished and how many seconds they took.

    run: folder of the job; recipes: folder of the recipes.
    """

    def __init__(self, run: Path, recipes: Path):
        self.recipes = recipes
        self.file = run / "stages.json"
        self.lock = threading.Lock()  # of the file, and of the next two
        self.running: list[subprocess.Popen[bytes]] = []
        self.interrupted = False
        self.done: dict[str, dict[str, Any]] = read_json(self.file)

    @property
    def seconds(self) -> dict[str, float]:
        """Duration of each finished stage."""
        return {name: stage["seconds"] for name, stage in self.done.items() if stage["finished"]}

    def check(self, commands: Mapping[str, list[str]], advice: str = "") -> None:
        """Check the configuration of every command, by name of the stage, and the splits of the corpora they read.

        Also those of encoded speech, where one of the commands encodes it. Raises RunError listing all problems with
        stage, key and file, and the advice.
        """
        classes = {name: config_class(self.recipes / name) for name in {words[0] for words in commands.values()}}
        problems: dict[str, list[str]] = defaultdict(list)  # and the stages that have each
        encoding: dict[str, Any] = {}  # the commands that encode speech, by their output
        asked: dict[tuple[Path, ...], list[Asked]] = defaultdict(list)
        for stage, command in commands.items():
            recipe, (file, words) = command[0], configuration(command[1:])
            try:
                config: Any = load_config(classes[recipe], file, words)
            except ConfigError as error:
                problems[f"{recipe}: {error}"].append(stage)
                continue
            if changed := self._changed(stage, self._settings([command])):
                problems[changed].append(stage)
            encoded = encoding.get(str(getattr(config, "codes", "")))  # of several folders, none is encoded here
            source = config if hasattr(config, "data") else encoded
            if source is None:
                continue
            encoding[config.output] = config
            places = asked[tuple(corpus_folders(source.data))]
            for key in SPLITS:
                where, named = origin(recipe, key, file, words), getattr(config, key, None) or []
                places.append((stage, where, named))
                if encoded and encoded.splits and (left_out := [name for name in named if name not in encoded.splits]):
                    there = ", ".join(encoded.splits)
                    problems[f"{where}: {', '.join(left_out)} is not encoded, only {there}"].append(stage)
        for data, places in asked.items():
            for problem, at in missing_splits(data, places).items():
                problems[problem] += at
        if problems:
            lines = [f"[{'; '.join(at)}] {problem}" if at else problem for problem, at in problems.items()]
            raise RunError("\n".join([*lines, advice] if advice else lines))

    def run(self, commands: Mapping[str, list[str]], shared: Container[str], single: Container[str]) -> None:
        """Run commands, by name of the stage, in this order; a failure affects only stages that need its output.

        shared: recipes whose processes share the work; single: recipes that run concurrently on a CPU, because one
        alone would leave cores idle. Raises SystemExit at the end if any stage failed.
        """
        failed = False
        for recipe, group in groupby(commands.items(), key=lambda item: item[1][0]):
            named = dict(group)
            start = self.launch if recipe in shared else self.stage
            jobs = [functools.partial(start, stage, words) for stage, words in named.items()]
            if recipe in single and len(named) > 1 and not torch.cuda.is_available():
                jobs = [functools.partial(self.side_by_side, named)]
            for job in jobs:
                try:
                    job()
                except SystemExit:  # the recipe has printed why
                    failed = True
        if failed:
            raise SystemExit("some stages failed, see above: the same command retries them")

    def stage(self, name: str, *commands: list[str], at_once: int = 1) -> None:
        """Run recipes concurrently, sharing the processor cores with as many stages; stop the job if one fails."""
        words = [["python", f"{self.recipes}/{recipe}", *rest] for recipe, *rest in commands]
        self.call(name, lambda: self._run(words, at_once), commands)

    def side_by_side(self, commands: Mapping[str, list[str]]) -> None:
        """Run independent recipes, each as its own stage, as many at a time as there are cores.

        Small trainings finish sooner this way than one after another with several threads each. If one fails, the
        others finish before the job stops.
        """
        at_once = min(len(commands), available_cpus())
        with ThreadPoolExecutor(at_once) as pool:
            try:
                jobs = [pool.submit(self.stage, name, command, at_once=at_once) for name, command in commands.items()]
                wait(jobs)  # an error of one must not end the waiting for the others, in which Ctrl-C is heard
                for job in jobs:
                    job.result()
            except KeyboardInterrupt:  # which only this thread receives: the others wait for their recipes
                with self.lock:  # none is just being started
                    self.interrupted, running = True, list(self.running)
                pool.shutdown(wait=False, cancel_futures=True)
                self._end(running)
                raise

    def launch(self, name: str, command: list[str], processes: int | None = None) -> None:
        """Run one recipe on all GPUs, or in several processes if there is none.

        processes: without a GPU; when None the largest power of two up to the number of cores, at most 8. Of these as
        many are started as can share the recipe's `batch_size` equally. With large batches they are faster than one
        with several threads, which mostly wait for each other in small models; with small ones they wait for each
        other's gradients.
        """
        processes = torch.cuda.device_count() or processes or 2 ** min(3, available_cpus().bit_length() - 1)
        batch_size = getattr(self._config(command), "batch_size", 0)  # of which they take equal shares
        processes = max(count for count in range(1, processes + 1) if batch_size % count == 0)
        words = ["python", *recipe_command(f"{self.recipes}/{command[0]}", command[1:], processes)]
        self.call(name, lambda: self._run([words], processes), [command])

    def call(self, name: str, work: Callable[[], None], asked: Sequence[list[str]] = ()) -> None:
        """Do `work` unless it was done before; the recorded time includes that of interrupted attempts.

        asked: the commands; a configuration file counts by its content, not its name. Raises RunError if the stage was
        done with other settings.
        """
        words = self._settings(asked)
        if changed := self._changed(name, words):
            raise RunError(f"[{name}] {changed}")
        before = self.done.get(name, {"seconds": 0.0, "finished": False})
        if before["finished"]:
            print(f"[{name}] done before, in {before['seconds']:.0f} s")
            return
        started = time.perf_counter()
        finished = False
        try:
            work()
            finished = True
        finally:
            seconds = before["seconds"] + time.perf_counter() - started
            with self.lock:
                self.done[name] = {"seconds": seconds, "finished": finished, "words": words}
                write_json(self.file, self.done)
        print(f"[{name}] {seconds:.0f} s", flush=True)

    def _config(self, command: list[str]) -> Any:
        """The configuration of a command."""
        recipe, *words = command
        return load_config(config_class(self.recipes / recipe), *configuration(words))

    def _settings(self, asked: Sequence[list[str]]) -> list[str]:
        """What commands say; a configuration file by its content."""
        return self._movable(setting for command in asked for word in command for setting in expand(word))

    def _movable(self, words: Iterable[str]) -> list[str]:
        """Words with RUN for the folder, which may move."""
        here = re.compile(rf"(?<![\w./-]){re.escape(str(self.file.parent))}(?=/|$)")
        return [here.sub("RUN", word) for word in words]

    def _changed(self, name: str, words: list[str]) -> str:
        """What is wrong if a stage was done with other settings than these `_settings`, else nothing."""
        before = self.done.get(name)
        if before is None or not before["finished"] or (held := self._movable(before["words"])) == words:
            return ""
        changed = ", ".join(sorted(set(held) ^ set(words)))
        return f"was done with other settings ({changed}) in {self.file.parent}: choose another output folder"

    def _run(self, commands: list[list[str]], processes: int = 1) -> None:
        threads = max(1, available_cpus() // (len(commands) * processes))
        environment = {"OMP_NUM_THREADS": str(threads)} | recipe_environment() | {"TOKENIZERS_PARALLELISM": "false"}
        started: list[subprocess.Popen[bytes]] = []
        try:
            for command in commands:
                started.append(self._start(command, environment))
            failed = [process for process in started if process.wait() != 0]
        finally:
            self._end(started)
        if failed:
            raise SystemExit(
                "a stage failed, see above; finished work is kept, and the same command continues from there"
            )

    def _start(self, command: list[str], environment: dict[str, str]) -> "subprocess.Popen[bytes]":
        """Start a recipe in a process group of its own, so that Ctrl-C reaches it through this process alone."""
        with self.lock:
            if self.interrupted:
                raise SystemExit("interrupted")
            print("$ " + shlex.join(command), flush=True)
            words = [sys.executable, *command[1:]]
            process = subprocess.Popen(words, env=environment | child_environment(), process_group=0)
            self.running.append(process)
        return process

    def _end(self, processes: Sequence["subprocess.Popen[bytes]"]) -> None:
        """End recipes that still run, once they have saved a checkpoint, and what they have started."""
        ending = [process for process in processes if process.poll() is None]
        for process in ending:
            process.terminate()
        end = time.monotonic() + GRACE_S
        for process in ending:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0, end - time.monotonic()))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        with self.lock:
            self.running = [process for process in self.running if process not in processes]


def missing_splits(data: tuple[Path, ...], asked: Sequence[Asked]) -> dict[str, list[str]]:
    """What is wrong with a corpus and the splits that stages ask for, each problem with the stages that have it."""
    problems: dict[str, list[str]] = defaultdict(list)
    try:
        read_corpus(data, sorted({split for *_, named in asked for split in named}) or None)
    except MissingSplitError as error:
        for stage, where, named in asked:
            if absent := [name for name in named if name in error.absent]:
                problems[f"{where}: {MissingSplitError(data, absent, error.found)}"].append(stage)
    except CorpusError as error:
        problems[str(error)] = []
    return problems


def origin(recipe: str, key: str, file: str | None, words: Sequence[str]) -> str:
    """Where a command has the value of a key from: its own words or a file, else the recipe's default."""
    given = [word for word in words if word.startswith(f"{key}=")]
    return f"{recipe} {given[-1]}" if given else f"{recipe}, {key} in {file}" if file else f"{recipe}, {key} by default"


def configuration(words: list[str]) -> tuple[str | None, list[str]]:
    """The file behind --config, None without one, and the other words of a command."""
    if words and words[0].startswith(CONFIG):
        return words[0].removeprefix(CONFIG), words[1:]
    return None, words


def config_class(recipe: Path) -> type:
    """The configuration class of a recipe, without the slow imports below the line that parses it."""
    head, _, rest = recipe.read_text(encoding="utf-8").partition('\nif __name__ == "__main__":')
    names: dict[str, Any] = {"__name__": recipe.stem, "__file__": str(recipe)}
    exec(compile(head, recipe, "exec"), names)
    return names[re.findall(r"parse_config\((\w+)", rest)[0]]


def expand(word: str) -> list[str]:
    """An argument of a command; for a configuration file the equivalent `key=value` arguments."""
    if not word.startswith(CONFIG):
        return [word]
    values = yaml.safe_load(find_config(word.removeprefix(CONFIG)).read_text(encoding="utf-8")) or {}
    return [f"{key}={value}" for key, value in values.items()]
