"""Moving averages of weights, in which the first steps soon no longer count."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from tokenizer.codec.speech_codec import SpeechCodec


def decay_at(decay: float, updates: int) -> float:
    """The decay at the next update of an average that has had so many.

    It rises from 2/11 to `decay`, so that an average reaches back over about a ninth of the steps so far: with 0.999
    from the start on, the first step would have a third of the weight after a thousand.
    """
    return min(decay, (1 + updates) / (10 + updates))


def average_weights(codec: SpeechCodec, decay: float | None) -> AveragedModel | None:
    """Moving average of all weights, which sounds cleaner than any single step; None without decay.

    Codebooks are those of the last step: averaged over its dead codes, which start anew elsewhere, and, if normalised,
    off the sphere, a codebook shrinks to its centre and uses a few codes only.
    """
    if decay is None:
        return None

    @torch.no_grad()
    def update(averages: Sequence[Tensor], weights: Sequence[Tensor], _: Tensor | int) -> None:
        updates = int(averaged.n_averaged)  # which lies on the CPU: what is given would have to wait for a GPU
        torch._foreach_lerp_([*averages], [*weights], 1 - decay_at(decay, updates))

    units = codec.units
    object.__setattr__(codec, "units", None)  # frozen, and as large as a whole encoder: not to be copied
    averaged = AveragedModel(codec, multi_avg_fn=update, use_buffers=False)
    for one in (codec, averaged.module):
        object.__setattr__(one, "units", units)
    return averaged
