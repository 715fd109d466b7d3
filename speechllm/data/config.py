"""Settings of the training data, without torch, so that they can be checked before heavy imports."""

from dataclasses import dataclass

from tokenizer.settings import Natural, Settings, Share


@dataclass(frozen=True)
class AugmentationConfig(Settings):
    """Random changes, drawn anew at every step; off by default. Labels stay unchanged."""

    tempo: Share = 0.0  # each utterance up to this share longer or shorter: frames evenly repeated or dropped
    substitute: Share = 0.0  # share of codes replaced by close ones, so that voices matter less
    mask: Share = 0.0  # share of the codes and of the transcript's tokens that are masked
    spans: Natural = 0  # spans of audio masked in each utterance
    span: Share = 0.05  # maximum length of a span, as a share of the utterance
