"""The order in which training reads examples."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np


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


def token_batches(lengths: Sequence[int], batch_tokens: int, seed: int, start: int = 0) -> Iterator[np.ndarray]:
    """Endless batches of example indices, as many as fit into `batch_tokens` but at least one; from number `start` on.

    Each epoch is a random order, and a batch may span the end of one and the beginning of the next, so that every
    example is used equally often. A pure function of its arguments, so that a resumed run continues at the same place.
    """
    sizes = np.asarray(lengths)
    most = batch_tokens // int(sizes.min()) + 1  # examples that one batch can hold, and one more
    order, epoch = np.empty(0, dtype=np.int64), 0
    for number in itertools.count():
        while len(order) <= most:
            order = np.concatenate([order, np.random.default_rng((seed, epoch)).permutation(len(sizes))])
            epoch += 1
        count = max(1, int(np.searchsorted(np.cumsum(sizes[order[:most]]), batch_tokens, side="right")))
        if number >= start:
            yield order[:count]
        order = order[count:]


def _chunks(items: np.ndarray, size: int) -> list[np.ndarray]:
    return [items[start : start + size] for start in range(0, len(items), size)]
