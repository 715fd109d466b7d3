"""Settings of the training data. Free of torch, so that they can be checked before anything heavy is imported."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AugmentationConfig:
    """What is drawn anew at every step; nothing by default. Labels keep what was said."""

    tempo: float = 0.0  # each utterance up to this share longer or shorter: frames repeated or skipped, evenly
    substitute: float = 0.0  # share of codes replaced by close ones, against dependence on voices
    mask: float = 0.0  # share of the codes and of the transcript's tokens hidden from the model
    spans: int = 0  # stretches of audio hidden in each utterance
    span: float = 0.05  # longest of them, as share of the utterance

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
