"""The order in which training reads examples."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from speechllm.encoding import DataError

BLOCK = 256  # examples whose lengths are looked up at once


def grouped_batches(lengths: Sequence[float], batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Batches of indices for one epoch: random, but with similar lengths within a batch, to keep padding low.

    Shuffles, sorts within windows of 50 batches, then shuffles the batches. Batches are full: the remainder, which
    differs between epochs, is skipped (unless it is all there is). A pure function of its arguments, so that a resumed
    run continues at the same place.
    """
    generator = np.random.default_rng((seed, epoch))
    order = generator.permutation(len(lengths))
    order = order[: len(order) // batch_size * batch_size or len(order)]
    sizes = np.asarray(lengths)
    windows = [part[np.argsort(-sizes[part], kind="stable")] for part in _chunks(order, 50 * batch_size)]
    batches = [batch for window in windows for batch in _chunks(window, batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def endless_batches(lengths: Sequence[float], batch_size: int, seed: int, start: int = 0) -> Iterator[np.ndarray]:
    """`grouped_batches` of successive epochs, from batch number `start` on."""
    epoch, skipped = divmod(start, max(1, len(lengths) // batch_size))
    while True:
        yield from grouped_batches(lengths, batch_size, seed, epoch)[skipped:]
        epoch, skipped = epoch + 1, 0


def token_batches(
    count: int,
    lengths: Callable[[np.ndarray], np.ndarray],
    batch_tokens: int,
    seed: int,
    start: int = 0,
    weights: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Endless batches of indices of `count` examples, as many as fit into `batch_tokens` but at least one.

    lengths: of the examples with these indices, long [N] -> long [N], asked for shortly before they are needed. Yields
    from batch number `start` on. Each epoch is a random order, and a batch may span the end of one and the beginning of
    the next, so that every example is used equally often; with weights, float [count], that often in an epoch: 1.5 is
    once or twice, by chance. A pure function of its arguments, so that a resumed run continues at the same place.
    Raises DataError where there is nothing to read.
    """
    if not count or (weights is not None and not weights.any()):
        raise DataError("nothing to train on: all weights are 0" if count else "nothing to train on: no examples")
    batch: list[int] = []
    number = total = 0
    for epoch in itertools.count():
        for block in _chunks(_order(count, seed, epoch, weights), BLOCK):
            for index, length in zip(block.tolist(), lengths(block).tolist(), strict=True):
                if batch and total + length > batch_tokens:
                    if number >= start:
                        yield np.array(batch)
                    batch, total, number = [], 0, number + 1
                batch.append(index)
                total += length


def _order(count: int, seed: int, epoch: int, weights: np.ndarray | None) -> np.ndarray:
    draw = np.random.default_rng((seed, epoch))
    if weights is None:
        return draw.permutation(count)
    times = np.floor(weights + draw.random(count)).astype(int)
    return draw.permutation(np.repeat(np.arange(count), times))


def _chunks(items: np.ndarray, size: int) -> list[np.ndarray]:
    return [items[start : start + size] for start in range(0, len(items), size)]
