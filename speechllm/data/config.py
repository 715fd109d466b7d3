"""Settings of the training data, without torch, so that they can be checked before heavy imports."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AugmentationConfig:
    """Random changes, drawn anew at every step; off by default. Labels stay unchanged."""

    tempo: float = 0.0  # each utterance up to this share longer or shorter: frames evenly repeated or dropped
    substitute: float = 0.0  # share of codes replaced by close ones, so that voices matter less
    mask: float = 0.0  # share of the codes and of the transcript's tokens that are masked
    spans: int = 0  # spans of audio masked in each utterance
    span: float = 0.05  # maximum length of a span, as a share of the utterance

    def __post_init__(self) -> None:
        shares = ("tempo", "substitute", "mask", "span")
        problems = [
            f"{name} must be at least 0 and below 1, got {getattr(self, name)}"
            for name in shares
            if not 0 <= getattr(self, name) < 1
        ]
        if self.spans < 0:
            problems.append(f"spans must be at least 0, got {self.spans}")
        if problems:
            raise ValueError("; ".join(problems))
