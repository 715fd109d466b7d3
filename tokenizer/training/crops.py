"""Random crops of a corpus for training, each a pure function of its index."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from tokenizer.audio import AudioError, fit_length, load_audio
from tokenizer.codec.speech_codec import SpeechCodec
from tokenizer.corpus import CorpusError, Utterance, as_skip, record_skip, recorded_s
from tokenizer.errors import InputError
from tokenizer.frames import frame_count
from tokenizer.rates import HOP_LENGTH
from tokenizer.training.feature_cache import FeatureCache

ATTEMPTS = 10  # recordings tried for one crop before giving up


class Crops(Dataset):
    """Endless random crops for training: item i is a pure function of (utterances, seed, i).

    So no position in the data has to be saved: a resumed run continues with the next index. An epoch has as many crops
    as fit into the corpus, in a new order, and every utterance gives as many of them as its share of the duration.
    Utterances that are shorter than a crop are zero-padded.
    A recording that cannot be used is skipped with a warning and replaced by another one; its path and the reason are
    appended to the file `skipped`, one JSON object per line.
    Crops start at any sample, so that frame boundaries vary; with cached features at whole frames of these (of 320
    samples, as a rule), so that the frames of the crop are frames of the utterance.
    Items: dict with "waveform" float [N], "length" in samples and "utterance" index, both int, and under the name of
    each cache the features float [ceil(N / hop), P] of the crop, zero after the end of the utterance. (Applied to the
    crop itself, a speaker teacher returns one frame more, which is centred on the end.)
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        crop_s: float,
        sample_rate: int = 16_000,
        seed: int = 0,
        caches: "Mapping[str, FeatureCache] | None" = None,
        skipped: str | Path | None = None,
    ):
        if not utterances:
            raise CorpusError("no utterances to train on")
        self.utterances = list(utterances)
        self.crop_s = crop_s
        self.sample_rate = sample_rate
        self.seed = seed
        self.caches = dict(caches or {})
        self.skipped = skipped
        self.ends = np.cumsum([utterance.duration_s for utterance in self.utterances])  # in s, one after the other
        self.per_epoch = max(1, math.ceil(self.ends[-1] / crop_s))

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch, position = divmod(index, self.per_epoch)
        draw = np.random.default_rng((self.seed, 1, index))
        place_s = (_order(self.seed, epoch, self.per_epoch)[position] + draw.random()) / self.per_epoch * self.ends[-1]
        number = min(int(np.searchsorted(self.ends, place_s, "right")), len(self.utterances) - 1)
        for _ in range(ATTEMPTS):  # a broken file must not end a long training run: any other one replaces it
            try:
                return {**self._crop(self.utterances[number], draw), "utterance": number}
            except (AudioError, OSError) as error:
                problem, one = str(error), self.utterances[number]
                record_skip(one, as_skip(one, error), self.skipped)
                number = int(draw.integers(len(self.utterances)))
        raise CorpusError(f"{ATTEMPTS} recordings in a row cannot be used; the last one is {problem}")

    def _crop(self, utterance: Utterance, draw: np.random.Generator) -> dict[str, Any]:
        step = math.lcm(HOP_LENGTH, *(cache.hop for cache in self.caches.values())) if self.caches else 1
        room = round(max(0.0, recorded_s(utterance) - self.crop_s) * self.sample_rate) // step
        start = step * int(draw.integers(room + 1))
        start_s = start / self.sample_rate
        crop = load_audio(utterance.path, self.sample_rate, start_s=start_s, duration_s=self.crop_s)
        size = round(self.crop_s * self.sample_rate)
        features = {
            name: cache.crop(utterance, start // cache.hop, frame_count(size, cache.hop))
            for name, cache in self.caches.items()
        }
        return {"waveform": fit_length(crop, size), "length": min(size, len(crop)), **features}

    def __len__(self) -> int:
        return 2**40  # endless; the sampler decides when to stop


def units_of(codec: SpeechCodec, batch: Mapping[str, Tensor]) -> Tensor | None:
    """The codes of layer 0 that are given for a batch of crops, long [B, T]: from the cache, or of the crops alone.

    None if the codec searches them itself.
    """
    if "units" not in batch:
        return codec.given_codes(batch["waveform"], batch["length"])
    return batch["units"][..., 0].long().to(codec.device)


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, per_epoch: int) -> np.ndarray:
    """The places of an epoch in their order; a function, so that threads may read crops of two epochs at once."""
    return np.random.default_rng((seed, epoch)).permutation(per_epoch)


def require_equal_shares(batch_size: int, processes: int) -> None:
    """Raise InputError unless the processes can have equally large shares of a batch."""
    if batch_size % processes:
        raise InputError(f"batch_size {batch_size} must be a multiple of the number of processes, {processes}")


class StepSampler:
    """Batch sampler of the steps start..stop-1: the indices of one of `processes` equal shares of every batch."""

    def __init__(self, batch_size: int, start: int, stop: int, process: int = 0, processes: int = 1):
        require_equal_shares(batch_size, processes)
        self.batch_size = batch_size
        self.start = start
        self.stop = stop
        self.share = batch_size // processes
        self.process = process

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.stop):
            first = step * self.batch_size + self.process * self.share
            yield list(range(first, first + self.share))

    def __len__(self) -> int:
        return self.stop - self.start
