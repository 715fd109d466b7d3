"""Changes of training examples that make a model depend less on single tokens, voices and the pace of speech."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from speechllm.data.config import AugmentationConfig
from speechllm.encoding import DataError
from speechllm.prompt import IGNORED, Example
from speechllm.vocabulary import AudioVocabulary


class Augmentation:
    """Applies a configuration to examples; a pure function of the examples and a seed.

    What is hidden becomes <|audio_start|>: of the tokens there are it is the one that no language model attached a
    meaning to, every form of training may teach it a meaning, and none has to predict it. (SLD hides behind the end
    token, Chen et al. 2023; Qwen2 has no mask token.) Its own place right behind the prompt stays unmistakable.
    """

    def __init__(self, config: AugmentationConfig, vocabulary: AudioVocabulary, codebooks: Tensor | None):
        """codebooks float [Q, K, D]: their distances tell which codes are close.

        Raises DataError for `substitute` where there are none.
        """
        if config.substitute and codebooks is None:
            raise DataError("augmentation.substitute replaces codes by close ones, but here are no codes: set it to 0")
        self.config = config
        self.vocabulary = vocabulary
        self.neighbours = None if codebooks is None or not config.substitute else vocabulary.neighbours(codebooks)

    def __call__(self, examples: Sequence[Example], seed: tuple[int, ...]) -> list[Example]:
        random = np.random.default_rng(seed)
        return [self.augment(example, random) for example in examples]

    def augment(self, example: Example, random: np.random.Generator) -> Example:
        """One example, changed."""
        config = self.config
        if config.tempo:
            example = self.change_tempo(example, random.uniform(1 - config.tempo, 1 + config.tempo))
        ids = example.input_ids
        codes = self.vocabulary.is_code(ids)
        if self.neighbours is not None:  # a voice turns sounds into neighbouring codes of another one's
            pick = torch.from_numpy(random.integers(self.neighbours.shape[1], size=len(ids)))
            ids = torch.where(codes & draw(random, ids, config.substitute), self.neighbours[ids, pick], ids)
        hidden = (codes | (example.labels != IGNORED)) & draw(random, ids, config.mask)
        places = codes.nonzero().flatten()
        for _ in range(config.spans):
            size = int(random.uniform(0, config.span) * len(places))
            start = random.integers(len(places) - size + 1)
            hidden[places[start : start + size]] = True
        features = None if example.features is None else example.features[~hidden[places]]
        return replace(example, input_ids=ids.masked_fill(hidden, self.vocabulary.start_id), features=features)

    def change_tempo(self, example: Example, factor: float) -> Example:
        """Make the audio `factor` times as long by repeating or leaving out frames at even distances."""
        places = self.vocabulary.is_code(example.input_ids).nonzero().flatten()
        if not len(places):
            return example
        size = len(places) // self.vocabulary.encoding.layers
        count = max(1, round(factor * size))
        frames = ((torch.arange(count) + 0.5) * size / count).long()
        grid = places[self.vocabulary.arrangement(size).argsort()].view(-1, size)  # where code [q, t] stands
        codes = grid[:, frames].flatten()[self.vocabulary.arrangement(count)]
        before, behind = torch.arange(int(places[0])), torch.arange(int(places[-1]) + 1, len(example))
        kept = torch.cat([before, codes, behind])
        features = None if example.features is None else example.features[frames]
        return Example(example.input_ids[kept], example.labels[kept], features)


def draw(random: np.random.Generator, ids: Tensor, share: float) -> Tensor:
    """bool, like ids: a random `share` of the places."""
    return torch.from_numpy(random.random(len(ids)) < share)
