"""Starting a recipe: as one process, or as several that share the work.

`python -m speechllm.runs.launch HOW FILE ARGUMENTS` starts several processes with Accelerate's launcher: as its
configuration file HOW says, or HOW of them, one per GPU. Without a GPU that launcher would start a single process, so
torch's own is used.
"""

import contextlib
import difflib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from speechllm.runs.config import shipped
from speechllm.runs.signals import (
    GRACE_S,
    Interrupted,
    catch_early_interrupts,
    child_environment,
    end_with_parent,
    say_interrupted,
)
from tokenizer.errors import InputError
from tokenizer.reading import reading


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path, or the shipped one of that name, with or without .py. Raises InputError."""
    if Path(name).is_file():
        return Path(name)
    recipes = {path.stem: path for path in sorted(shipped("recipes").glob("*.py"))}
    stem = name.removeprefix("recipes/").removesuffix(".py")
    if stem in recipes:
        return recipes[stem]
    near = difflib.get_close_matches(stem, recipes, n=1)
    raise InputError(
        f"no recipe {name}: " + (f"did you mean {near[0]}?" if near else "there are " + ", ".join(recipes))
    )


def recipe_command(file: str | Path, words: Sequence[str], how: int | Path = 1) -> list[str]:
    """The arguments of `python` that start a recipe; how: number of processes, or a configuration of Accelerate."""
    several = [] if how == 1 else ["-m", "speechllm.runs.launch", str(how)]
    return [*several, str(file), *words]


def recipe_environment() -> dict[str, str]:
    """An environment in which recipes find the package even if it is not installed."""
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def processes_of(file: Path) -> int:
    """How many processes a configuration of Accelerate starts on each machine that need a GPU each."""
    with reading(file, "a configuration of Accelerate", "write one with accelerate config"):
        asked = yaml.safe_load(file.read_text(encoding="utf-8"))
        return 0 if asked.get("use_cpu") else asked.get("num_processes", 0) // asked.get("num_machines", 1)


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """While active, torch's launcher leaves processes GRACE_S after a signal for their checkpoints, in place of 30 s.

    Not after the failure of one of them, for which the others may wait for ever, and not after a second signal.
    """
    from torch.distributed.elastic.multiprocessing.api import PContext, SignalException

    close, first = PContext.close, True

    def close_patiently(self: PContext, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        nonlocal first
        if not (first and isinstance(sys.exception(), SignalException)):
            return close(self, death_sig, timeout)
        first = False
        try:
            close(self, death_sig, GRACE_S)
        except SignalException:
            close(self, signal.SIGKILL, 1)
            raise

    PContext.close = close_patiently  # type: ignore[method-assign]
    try:
        yield
    finally:
        PContext.close = close  # type: ignore[method-assign]


@patience()
def launch(how: int | Path, file: str, words: Sequence[str]) -> int:
    """Start the processes, wait for them and return the exit code. The processes print their own errors.

    how: their number, or a configuration of Accelerate.
    """
    import torch
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from speechllm.runs.machine import ACCELERATE, available_cpus

    gpus, own = torch.cuda.device_count(), dict(os.environ)
    each = how if isinstance(how, int) else processes_of(how) if gpus else 0
    if 0 < gpus < each:
        mend = f"use --processes {gpus}" if isinstance(how, int) else f"copy {how} and change num_processes"
        raise InputError(f"{each} processes need one GPU each, but there are {gpus}: {mend}")
    if isinstance(how, int):
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cpus() // how)))
    # forwarded to the processes, which save a checkpoint: torch's own, and the one by which Slurm announces the end
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    os.environ |= child_environment() | ({ACCELERATE: str(how)} if isinstance(how, Path) else {})
    logging.disable(logging.ERROR)  # the launchers' own lines around the error of a process
    try:
        if gpus or isinstance(how, Path):
            from accelerate.commands.launch import launch_command, launch_command_parser

            # its defaults, which it warns about unless given; the recipes choose the precision
            kind = ["--multi_gpu", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
            chosen = [f"--config_file={how}"] if isinstance(how, Path) else [*kind, f"--num_processes={how}"]
            launch_command(launch_command_parser().parse_args([*chosen, file, *words]))
        else:
            run.main(["--standalone", f"--nproc_per_node={how}", file, *words])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # killed, so it printed nothing
            print(f"process {rank} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        return abs(failure.exitcode) or 1
    except subprocess.CalledProcessError as error:  # of Accelerate where it starts one process, or other launchers
        return abs(error.returncode)
    except SignalException as ended:
        return say_interrupted(Interrupted(ended.sigval))
    finally:  # what was set for the processes is not for this one
        os.environ.clear()
        os.environ.update(own)
    return 0


if __name__ == "__main__":
    catch_early_interrupts()
    end_with_parent()
    try:
        _, chosen, recipe, *arguments = sys.argv
        sys.exit(launch(int(chosen) if chosen.isdecimal() else Path(chosen), recipe, arguments))
    except InputError as error:
        sys.exit(f"error: {error}")
