"""Random crops of a corpus for training, each a pure function of its number."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from tokenizer.audio import AudioError, load_audio
from tokenizer.frames import frame_count
from tokenizer.rates import HOP_LENGTH

if TYPE_CHECKING:
    from tokenizer.training.feature_cache import FeatureCache
from tokenizer.corpus import CorpusError, Utterance, record_skip

ATTEMPTS = 10  # recordings tried for one crop before giving up


class Crops(Dataset):
    """Endless random crops for training: item i is a pure function of (utterances, seed, i).

    So nothing about the position in the data needs to be saved: a resumed run asks for the items after the last one.
    Every epoch visits each utterance once, in a new order. Shorter utterances are padded with zeros.
    A recording that cannot be used is skipped with a warning and replaced by the next one; its path and the reason are
    added to the file `skipped`, a line of JSON each time.
    Crops start anywhere, so that speech meets the frames as it happens to; with cached features on whole codec frames
    (320 samples), since the utterance's frames are then those of the crop.
    Items: dict of waveform float [N], its length in samples and the utterance's index, both int, and by the name of
    each cache the features float [ceil(N / hop), P] of the crop, zero behind the utterance. A speaker teacher heard on
    the crop itself gives one frame more, which is centred on the end.
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
        self.utterances, self.crop_s, self.sample_rate, self.seed = list(utterances), crop_s, sample_rate, seed
        self.caches, self.skipped = dict(caches or {}), skipped
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, int))

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch, position = divmod(index, len(self.utterances))
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.utterances)))
        for attempt in range(ATTEMPTS):  # a broken file must not end a long training: the next one takes its place
            number = int(self._order[1][(position + attempt) % len(self.utterances)])
            try:
                return {**self._crop(self.utterances[number], index), "utterance": number}
            except AudioError as error:
                problem = str(error)
                record_skip(self.utterances[number], error, self.skipped)
        raise CorpusError(f"{ATTEMPTS} recordings in a row cannot be used; the last one is {problem}")

    def _crop(self, utterance: Utterance, index: int) -> dict[str, Any]:
        step = HOP_LENGTH if self.caches else 1
        room = round(max(0.0, utterance.duration_s - self.crop_s) * self.sample_rate) // step
        start = step * int(np.random.default_rng((self.seed, 1, index)).integers(room + 1))
        start_s = start / self.sample_rate
        crop = load_audio(utterance.path, self.sample_rate, start_s=start_s, duration_s=self.crop_s)
        size = round(self.crop_s * self.sample_rate)
        waveform = torch.zeros(size)
        length = min(size, len(crop))
        waveform[:length] = crop[:length]
        features = {n: c.crop(utterance, start // c.hop, frame_count(size, c.hop)) for n, c in self.caches.items()}
        return {"waveform": waveform, "length": length, **features}

    def __len__(self) -> int:
        return 2**40  # endless; the sampler decides when to stop


class StepSampler:
    """Batch sampler: indices of the steps start..stop-1 for one of `processes` equal shares of every batch."""

    def __init__(self, batch_size: int, start: int, stop: int, process: int = 0, processes: int = 1):
        if batch_size % processes:
            raise ValueError(f"batch_size {batch_size} cannot be shared equally by {processes} processes")
        self.batch_size, self.start, self.stop = batch_size, start, stop
        self.share, self.process = batch_size // processes, process

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.stop):
            first = step * self.batch_size + self.process * self.share
            yield list(range(first, first + self.share))

    def __len__(self) -> int:
        return self.stop - self.start
