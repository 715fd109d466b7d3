"""Augmentation of training examples: makes a model less dependent on single tokens, voices and speaking rate."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from speechllm.data.config import AugmentationConfig
from speechllm.encoding import DataError
from speechllm.prompt import IGNORED, Example
from speechllm.vocabulary import AudioVocabulary


class Augmentation:
    """Augments examples as configured; a pure function of an example and a seed.

    Masked tokens become <|audio_start|>: no language model has attached a meaning to it, every form of training can
    train its row, and it is never a label. (SLD masks with the end token, Chen et al. 2023; Qwen2 has no mask token.)
    Its regular position right after the prompt remains unambiguous.
    """

    def __init__(self, config: AugmentationConfig, vocabulary: AudioVocabulary, codebooks: Tensor | None):
        """codebooks float [Q, K, D]: their distances decide which codes are close.

        Raises DataError for `substitute` without codebooks.
        """
        if config.substitute and codebooks is None:
            raise DataError(
                "augmentation.substitute replaces codes by close ones, but this speech has no codes: set it to 0"
            )
        self.config = config
        self.vocabulary = vocabulary
        self.neighbours = None if codebooks is None or not config.substitute else vocabulary.neighbours(codebooks)

    def __call__(self, example: Example, seed: tuple[int, ...]) -> Example:
        """The augmented example."""
        config, random = self.config, np.random.default_rng(seed)
        if config.tempo:
            example = self.change_tempo(example, random.uniform(1 - config.tempo, 1 + config.tempo))
        ids = example.input_ids
        codes = self.vocabulary.is_code(ids)
        if self.neighbours is not None:  # another voice shifts sounds to neighbouring codes
            pick = torch.from_numpy(random.integers(self.neighbours.shape[1], size=len(ids)))
            ids = torch.where(codes & draw(random, ids, config.substitute), self.neighbours[ids, pick], ids)
        masked = (codes | (example.labels != IGNORED)) & draw(random, ids, config.mask)
        places = codes.nonzero().flatten()
        for _ in range(config.spans):
            size = int(random.uniform(0, config.span) * len(places))
            start = random.integers(len(places) - size + 1)
            masked[places[start : start + size]] = True
        features = None if example.features is None else example.features[~masked[places]]
        parts = self.vocabulary.audio_parts(ids) if self.vocabulary.prefix_attention else None
        masked_ids = ids.masked_fill(masked, self.vocabulary.start_id)
        return replace(example, input_ids=masked_ids, features=features, parts=parts)

    def change_tempo(self, example: Example, factor: float) -> Example:
        """Make each recording `factor` times as long by repeating or dropping frames at even intervals."""
        places = self.vocabulary.is_code(example.input_ids).nonzero().flatten()
        if not len(places):
            return example
        kept, frames, end, seen = [], [], 0, 0
        for part in places.tensor_split((places.diff() > 1).nonzero().flatten() + 1):  # recordings are apart by markers
            size = len(part) // self.vocabulary.encoding.layers
            count = max(1, round(factor * size))
            chosen = ((torch.arange(count) + 0.5) * size / count).long()
            grid = part[self.vocabulary.arrangement(size).argsort()].view(-1, size)  # position of code [q, t]
            kept += [torch.arange(end, int(part[0])), grid[:, chosen].flatten()[self.vocabulary.arrangement(count)]]
            frames.append(chosen + seen)
            end, seen = int(part[-1]) + 1, seen + size
        order = torch.cat([*kept, torch.arange(end, len(example))])
        features = None if example.features is None else example.features[torch.cat(frames)]
        return Example(example.input_ids[order], example.labels[order], features)


def draw(random: np.random.Generator, ids: Tensor, share: float) -> Tensor:
    """bool, like ids: a random `share` of the positions."""
    return torch.from_numpy(random.random(len(ids)) < share)
