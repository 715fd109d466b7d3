"""Doing in threads what the next step waits for, as reading recordings while a model works on the ones before."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

THREADS = 4  # decoding and resampling release the interpreter's lock, and a network disk lets them wait
AHEAD = 8  # results that may wait, which bounds the memory

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(
    function: Callable[[Item], Result], items: Iterable[Item], ahead: int = AHEAD, threads: int = THREADS
) -> Iterator[Result]:
    """`map(function, items)` with up to `ahead` results computed before they are asked for; order and errors stay.

    Threads, because they start at once, pass large arrays without a copy and cannot outlive this process. They end with
    the iterator: what has not begun is dropped. With one thread the results are computed one after the other, so that
    `function` may remember where it was.
    """
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
