"""Speech as about one vector per letter: a CTC network over the frames of another tokenizer, and the mean of each run.

A language model that reads 50 frames a second has to find words in them first. Here a small network finds letters
(CTC, Graves et al. 2006), frames that it calls blank are dropped, and successive frames of one letter become one vector
(CTC compression: Gaido et al., arXiv 2102.01578; Wu et al., arXiv 2307.03917).
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.errors import InputError
from tokenizer.frames import frame_count, frame_mask
from tokenizer.interface import AudioTokenizer, DiscreteTokenizer, Features, FeatureTokenizer, require_layers
from tokenizer.pretrained import module_fingerprint
from tokenizer.rates import HOP_LENGTH
from tokenizer.schemes.recoder import Recoder
from tokenizer.training.teachers import SemanticTeacher

COMPRESSOR = "compressor"  # subfolder of a teacher that is one
KERNEL = 5  # frames
BLANK = 0


class CtcNetwork(nn.Module):
    """Frames float [B, T, C] -> states float [B, T, W] and log probabilities float [B, T, V].

    A few convolutions, because a pretrained encoder's frames say enough: a Conformer at half the rate learnt the same
    letters more slowly (recipes/RESULTS.md).
    """

    def __init__(self, inputs: int, outputs: int, width: int, depth: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(inputs)
        widths = [inputs, *[width] * depth]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(before, after, KERNEL, padding=KERNEL // 2) for before, after in itertools.pairwise(widths)
        )
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(width, outputs)

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """lengths: long [B] in frames; what follows them is padding."""
        states = self.hidden_states(frames, lengths)[-1]
        return states, self.output(states).log_softmax(-1)

    def hidden_states(self, frames: Tensor, lengths: Tensor) -> list[Tensor]:
        """As `forward`: what every convolution returns, float [B, T, W] each; the last are the states."""
        inside = frame_mask(lengths, frames.shape[1], hop_length=1)[:, None]
        x, states = self.dropout(self.norm(frames)).transpose(1, 2), []
        for convolution in self.convolutions:
            x = self.dropout(F.gelu(convolution(x * inside)))
            states.append(x.transpose(1, 2))
        return states


class CtcCompressor(Recoder):
    """A `FeatureTokenizer` of one vector per run of a label: the mean state beside the mean probability of each label.

    Vectors have no fixed rate; `frame_rate` is its maximum. Speech without any label is a single vector.
    """

    kind = "compressor"
    deduplicate = True
    network: CtcNetwork

    def __init__(
        self,
        base: AudioTokenizer,
        labels: Sequence[str],
        width: int,
        depth: int,
        dropout: float = 0.0,
        layers: int | None = None,
    ):
        """labels: V texts, the letters; the first one, the blank, is "". layers: codebooks it reads, None: all."""
        super().__init__()
        if isinstance(base, DiscreteTokenizer):
            require_layers(layers, base.num_codebooks)
            self.layers = layers or base.num_codebooks
            inputs = self.layers * base.codebooks.shape[2]
        elif isinstance(base, FeatureTokenizer):
            self.layers, inputs = 1, base.width
        else:
            raise InputError(f"a compressor needs frames or codes, but {type(base).__name__} returns text")
        self.base: AudioTokenizer = base
        self.labels = tuple(labels)
        self.network = CtcNetwork(inputs, len(labels), width, depth, dropout)
        self.shape = {"width": width, "depth": depth}

    @classmethod
    def from_settings(cls, settings: dict[str, Any], base: AudioTokenizer) -> Self:
        sizes = settings["width"], settings["depth"]
        return cls(base, settings["labels"], *sizes, layers=settings["layers"])

    def settings(self) -> dict[str, Any]:
        return {"labels": self.labels, **self.shape, "layers": self.layers}

    @classmethod
    def from_trained(cls, trained: AudioTokenizer, base: AudioTokenizer, letters: Sequence[str], *sizes: Any) -> Self:
        """A copy of a trained one, to train on with these letters; its labels stay.

        sizes: as for a new one. Raises InputError if `trained` is no compressor, reads another tokenizer than `base`,
        has other sizes, or lacks a letter.
        """
        if not isinstance(trained, CtcCompressor):
            raise InputError("start: this is no compressor, and only such a one can be trained on")
        if trained.base.fingerprint != base.fingerprint:
            raise InputError("start: this compressor reads another tokenizer, which is in its folder: give it as codec")
        compressor = cls(base, trained.labels, *sizes)
        own, other = ({**one.shape, "layers": one.layers} for one in (compressor, trained))
        if unlike := [f"{key}={other[key]}" for key in own if own[key] != other[key]]:
            raise InputError(f"start: this compressor has {' '.join(unlike)}: give the same to train on it")
        if unknown := "".join(letter for letter in letters if letter not in trained.labels):
            raise InputError(f"start: the transcripts have letters that this compressor does not know: {unknown!r}")
        compressor.network.load_state_dict(trained.network.state_dict())
        return compressor

    @property
    def width(self) -> int:
        return self.shape["width"] + len(self.labels)

    @property
    def fingerprint(self) -> str:
        """Hash of base, labels and weights, whose shapes tell the layers."""
        return module_fingerprint(self.network, {"base": self.base.fingerprint, "labels": self.labels})

    @torch.no_grad()
    def encode(self, waveform: Tensor, lengths: Tensor | None = None) -> Features:
        """Waveforms float [B, N] -> vectors float [B, P, W + V], one per letter."""
        layers = {"layers": self.layers} if isinstance(self.base, DiscreteTokenizer) else {}
        encoded: Any = self.base.encode(waveform, lengths, **layers)
        vectors = self._recode_each(encoded)
        return Features(nn.utils.rnn.pad_sequence(vectors, batch_first=True), torch.tensor([len(v) for v in vectors]))

    def label(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Frames float [T, C] of one utterance -> states float [T, W] and log probabilities float [T, V]."""
        frames = frames.to(self.device)
        states, scores = self.network(frames[None], torch.tensor([len(frames)], device=self.device))
        return states[0], scores[0]

    def label_speech(self, speech: Tensor) -> tuple[Tensor, Tensor]:
        """`label` of one utterance as the base encodes it, see `frames`."""
        return self.label(self.frames(speech))

    def frames(self, speech: Tensor) -> Tensor:
        """One utterance of the base, features [T, C] of any precision or codes long [Q, T], as frames float32 [T, C].

        Codes are replaced by their vectors, those of several layers side by side. Raises InputError for fewer layers
        than it reads; others that follow are ignored.
        """
        if not isinstance(self.base, DiscreteTokenizer):
            return speech.float()
        if len(speech) < self.layers:
            raise InputError(
                f"this compressor reads {self.layers} layers of codes, not {len(speech)}: encode the speech with "
                f"layers={self.layers}, or train a compressor on these codes"
            )
        codebooks = self.base.codebooks  # not moved: an utterance is smaller than they are
        codes = speech[: self.layers].to(codebooks.device)
        return torch.cat([codebook[layer] for codebook, layer in zip(codebooks[: self.layers], codes, strict=True)], 1)

    @torch.no_grad()
    def recode(self, speech: Tensor) -> Tensor:
        """The vectors of one utterance as the base encodes it, float [P, W + V], on the CPU."""
        return compress(*self.label_speech(speech)).cpu()

    def text(self, scores: Tensor) -> str:
        """What the labels spell (greedy CTC decoding): log probabilities float [T, V] -> text."""
        return "".join(self.labels[label] for label in scores.argmax(1).unique_consecutive().tolist())


class LettersTeacher(nn.Module):
    """S(x) of eq. 4 of an encoder that was taught letters: states of a compressor's network over its frames.

    The frames of an encoder hold the voice and the room as well. The first convolution tells most about phones: those
    after it gather what is known of a letter in a single frame of it, as CTC asks (recipes/RESULTS.md).
    """

    hop = HOP_LENGTH

    def __init__(self, compressor: CtcCompressor, layer: int | str = 1):
        """compressor: over the frames of a `FeatureEncoder`.

        layer: which convolution, from 1 on, or from the last one, -1; "avg": their mean. Raises InputError for one that
        there is not.
        """
        super().__init__()
        depth = compressor.shape["depth"]
        if layer != "avg" and not (isinstance(layer, int) and 1 <= abs(layer) <= depth):
            raise InputError(f'layer must be "avg", or of this compressor a number from 1 to {depth}, got {layer!r}')
        self.compressor, self.layer = compressor.requires_grad_(False), layer
        self.width = compressor.shape["width"]
        self.eval()

    @property
    def encoder(self) -> SemanticTeacher:
        """Whose frames the network reads."""
        return cast(Any, self.compressor.base).model

    @property
    def fingerprint(self) -> str:
        """Hash of weights, layer and encoder, 16 hexadecimal digits."""
        settings = {"encoder": self.encoder.fingerprint, "layer": self.layer}
        return module_fingerprint(self.compressor.network, settings)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the compressor into a subfolder; `load_semantic_teacher` has to be told the layer."""
        self.compressor.save_pretrained(Path(folder) / COMPRESSOR)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, because a teacher is never trained."""
        return super().train(False)

    def features(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """As `forward`, but with a gradient for the waveform (not for the weights), for losses on reconstructions."""
        frames = self.encoder.features(waveform, lengths)
        sizes = frames.new_full(frames.shape[:1], frames.shape[1], dtype=torch.long)
        return self.of_frames(frames, sizes if lengths is None else frame_count(lengths))

    def of_frames(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """The encoder's frames float [B, T, C], lengths long [B] of them -> float [B, T, W]."""
        states = self.compressor.network.hidden_states(frames, lengths)
        if isinstance(self.layer, str):
            return torch.stack(states).mean(0)
        return states[self.layer - 1 if self.layer > 0 else self.layer]

    @torch.no_grad()
    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """waveform float [B, N] at 16 kHz, zero after its lengths long [B] in samples (all N when None).

        Returns float [B, ceil(N / 320), W].
        """
        return self.features(waveform, lengths)

    @torch.no_grad()
    def forward_each(self, waveforms: Sequence[Tensor]) -> list[Tensor]:
        """`forward` of utterances float [N_i], float [ceil(N_i / 320), W] each, equal up to rounding."""
        each = self.encoder.forward_each(waveforms)
        return [self.of_frames(frames[None], torch.tensor([len(frames)], device=frames.device))[0] for frames in each]


def compress(states: Tensor, scores: Tensor) -> Tensor:
    """States float [T, W] and log probabilities float [T, V] -> their means over each letter, float [P, W + V]."""
    runs, counts = scores.argmax(1).unique_consecutive(return_counts=True)
    vectors = torch.cat([states, scores.exp()], 1)
    means = torch.stack([part.mean(0) for part in vectors.split(counts.tolist())])
    letters = means[runs != BLANK]
    return letters if len(letters) else vectors.mean(0, keepdim=True)
