"""How a process ends: asked to by a signal, with one line, and never later than the process that started it."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Slurm announces the end of a job with the last
GRACE_S = 600  # for the checkpoint of a training that is to end: 30 GB for 1.5 B weights, behind a validation
PARENT = "SPEECHLLM_PARENT"  # in the environment: the process with which a started one ends
PR_SET_PDEATHSIG = 1  # of Linux's prctl
GOES_ON = "the same command goes on from what is finished"
STARTS_ANEW = "nothing is kept, the same command starts anew"


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to end; `hint` says how to go on."""

    def __init__(self, number: int, hint: str = GOES_ON):
        super().__init__(f"ended by {signal.Signals(number).name}: {hint}")
        self.exit_code = 128 + number  # as a shell reports it


def say_interrupted(error: KeyboardInterrupt) -> int:
    """Print one line about the interruption; returns the exit code.

    Of several processes only the first prints, and only what their launcher does not say itself.
    """
    error = error if isinstance(error, Interrupted) else Interrupted(signal.SIGINT)
    first, said = os.environ.get("RANK", "0") == "0", "LOCAL_RANK" in os.environ and str(error).endswith(GOES_ON)
    if first and not said:
        print(f"\n{error}", file=sys.stderr, flush=True)
    return error.exit_code


def catch_early_interrupts() -> None:
    """From now on Ctrl-C ends this process with one line; call it before slow imports."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)
            return
        code = say_interrupted(error)
        sys.stdout.flush()
        os._exit(code)  # behind a hook, Python would end itself by the signal

    sys.excepthook = hook


@contextmanager
def handled(handler: Callable[[int], None]) -> Iterator[None]:
    """While active, each of the STOPPING signals calls `handler` with its number.

    A second Ctrl-C ends the process at once. Not in a process that a launcher started: it receives every Ctrl-C twice.
    Signals that are ignored (nohup) stay ignored. Outside the main thread, which alone receives signals, this does
    nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: object) -> None:
        if number == signal.SIGINT and "LOCAL_RANK" not in os.environ:
            signal.signal(number, signal.SIG_DFL)
        handler(number)

    held = {number: signal.getsignal(number) or signal.SIG_DFL for number in STOPPING}
    replaced = [number for number in STOPPING if held[number] != signal.SIG_IGN]
    for number in replaced:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, held[number])


@contextmanager
def interruptible(hint: str = GOES_ON) -> Iterator[None]:
    """While active, the first of the STOPPING signals raises Interrupted with `hint`; others meanwhile are ignored."""
    asked: list[int] = []

    def interrupt(number: int) -> None:
        asked.append(number)
        if len(asked) == 1:
            raise Interrupted(number, hint)

    with handled(interrupt):
        yield


def child_environment() -> dict[str, str]:
    """What to add to the environment of a recipe that is to end with this process."""
    return {PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """Have the system kill this process when the one that started it and said so (`child_environment`) ends.

    Linux only. The start must come from a thread that lives as long as this process.
    """
    parent = os.environ.pop(PARENT, None)  # not for those that this process starts
    if parent is not None:
        kill_with_parent()
        if os.getppid() != int(parent):  # it has ended already
            os._exit(1)


def kill_with_parent() -> None:
    """Have the system kill this process when the thread that started it ends; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def follow_parent(number: int = 0) -> None:
    """For a process that only works for another one, as a data loader does: ends with it, and by it alone.

    number: of the worker, which torch passes and nothing depends on.
    """
    for stopping in STOPPING:
        signal.signal(stopping, signal.SIG_IGN)
    kill_with_parent()
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it has ended while this one was starting
        os._exit(1)
