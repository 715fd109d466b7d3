"""Reading ahead: the results of `map`, computed meanwhile, no more of them than asked for, and nothing left behind."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tokenizer.prefetch import AHEAD, prefetch

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 20.0  # a bound, not a time that passes


@pytest.mark.parametrize("count", [0, 1, AHEAD, 40])
@pytest.mark.parametrize("ahead", [1, AHEAD])
def test_results_come_in_the_order_of_their_items(count: int, ahead: int) -> None:
    def slow_at_first(number: int) -> int:
        time.sleep(0.002 if number % 5 == 0 else 0)
        return number * number

    assert list(prefetch(slow_at_first, range(count), ahead)) == [number * number for number in range(count)]


def test_the_next_result_is_computed_while_the_caller_works() -> None:
    begun = [threading.Event() for _ in range(3)]
    results = prefetch(lambda number: begun[number].set(), range(3), ahead=1)
    next(results)
    assert begun[1].wait(WAIT_S)
    assert not begun[2].is_set()
    next(results)
    assert begun[2].wait(WAIT_S)


@pytest.mark.parametrize("ahead", [1, 5])
def test_no_more_results_wait_than_allowed(ahead: int) -> None:
    drawn = []

    def items() -> Iterator[int]:
        for number in range(20):
            drawn.append(number)
            yield number

    for taken, _ in enumerate(prefetch(str, items(), ahead), start=1):
        assert len(drawn) == min(20, taken + ahead)


def test_an_error_is_raised_in_its_place() -> None:
    results = prefetch(lambda number: 6 // (3 - number), range(40))
    assert [next(results) for _ in range(3)] == [2, 3, 6]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert not list(results)


def test_no_thread_is_left_behind() -> None:
    before = threading.active_count()
    calls = []
    results = prefetch(calls.append, range(10_000))
    next(results)
    assert threading.active_count() > before
    results.close()
    assert threading.active_count() == before and len(calls) <= AHEAD + 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_process_while_threads_work(number: signal.Signals) -> None:
    code = (
        "import time; from tokenizer.prefetch import prefetch\n"
        "for _ in prefetch(lambda i: time.sleep(0.01), iter(int, 1)): print('one', flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=-1, stderr=-3) as process:
        assert process.stdout.readline() == b"one\n"
        process.send_signal(number)
        process.stdout.read()
        assert process.wait(WAIT_S) == -number
