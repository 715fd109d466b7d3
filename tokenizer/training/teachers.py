"""Frozen teachers: HuBERT, WavLM, wav2vec 2.0 or Whisper of transformers, and ECAPA-TDNN models of SpeechBrain.

All are loaded from a folder or hub name; `recipes/train_teacher.py` trains small ones in the same formats.
"""

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.audio import pad_waveforms
from tokenizer.errors import InputError
from tokenizer.frames import frame_count, frame_mask
from tokenizer.pretrained import (
    check_folder,
    describe,
    fill_weights,
    find_file,
    load_config,
    load_frozen,
    load_part,
    module_fingerprint,
    read_weights,
)
from tokenizer.rates import HOP_LENGTH, SAMPLE_RATE
from tokenizer.reading import reading, unreachable
from tokenizer.training.speechbrain_files import speechbrain_settings
from tokenizer.training.whisper import WhisperSpectrogram, encoder_states, load_whisper_encoder

SILENCE = 25  # frames (0.5 s) that Whisper sees after the speech, in place of silence up to 30 s


class SemanticTeacher(nn.Module):
    """S(x) of eq. 4: hidden states of a HuBERT, WavLM or wav2vec 2.0 model, one per codec frame.

    The waveform is padded so that every teacher frame is centred on its codec frame (published HuBERT: 40 samples on
    both sides, which also gives 50 frames per second of speech instead of 49). `WhisperTeacher` is the same of Whisper.
    """

    hop = HOP_LENGTH

    def __init__(self, model: Any, layer: int | str = "avg", normalize: bool = True):
        """layer: index into the hidden states (0 is the transformer's input), or "avg", the mean of all of them.

        Raises InputError for a model with another frame rate, or a layer that it does not have.
        """
        super().__init__()
        stride = math.prod(getattr(model.config, "conv_stride", [2, 160]))  # Whisper's are no settings
        if stride != HOP_LENGTH:
            raise InputError(
                f"the semantic teacher must have one frame per {HOP_LENGTH} samples, this one per {stride}: "
                "choose another HuBERT, WavLM or wav2vec 2.0 model"
            )
        depth = model.config.num_hidden_layers
        if layer != "avg" and not (isinstance(layer, int) and -depth - 1 <= layer <= depth):
            raise InputError(f'layer must be "avg" or an index up to {depth} into the hidden states, got {layer!r}')
        self.model = model.eval().requires_grad_(False)
        self.layer = layer
        self.normalize = normalize

    @property
    def margin(self) -> int:
        """Samples that a frame sees besides its own, half of them on either side."""
        return receptive_field(self.model.config) - HOP_LENGTH

    @property
    def width(self) -> int:
        """P, the dimension of the semantic features."""
        return self.model.config.hidden_size

    @property
    def fingerprint(self) -> str:
        """Hash of weights, layer and normalisation, 16 hexadecimal digits."""
        return module_fingerprint(self.model, {"layer": self.layer, "normalize": self.normalize})

    @classmethod
    def from_pretrained(cls, name: str | Path, layer: int | str | None = None) -> "SemanticTeacher":
        """Load a transformers folder or hub name, e.g. facebook/hubert-base-ls960 or openai/whisper-base, in float32.

        Of a Whisper it is a `WhisperTeacher`. layer: as for the class; None: "avg", or the output of Whisper's encoder.
        Raises InputError for another kind of model, or a checkpoint that lacks weights.
        """
        from transformers import AutoFeatureExtractor, AutoModel, WhisperFeatureExtractor

        expected = "HuBERT, WavLM or wav2vec 2.0, or Whisper"
        name = check_folder(name, ["config.json"], expected)
        config = load_config(name, expected)
        if config.model_type != "whisper" and not hasattr(config, "conv_stride"):
            raise InputError(f"{name} is a {config.model_type} model: expected {expected}")
        if not (Path(name) / "processor_config.json").is_file():  # in which transformers 5 writes the same settings
            check_folder(name, ["preprocessor_config.json"], expected)
        settings = f"the preprocessor settings of {expected}"
        if config.model_type == "whisper":
            extractor = load_part(WhisperFeatureExtractor, name, settings)
            return WhisperTeacher(load_whisper_encoder(name, expected), extractor, -1 if layer is None else layer)
        extractor = load_part(AutoFeatureExtractor, name, settings)
        return cls(load_frozen(AutoModel, name, expected), "avg" if layer is None else layer, extractor.do_normalize)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a transformers folder for `from_pretrained`, which has to be told the layer."""
        from transformers import Wav2Vec2FeatureExtractor

        self.model.save_pretrained(folder)
        Wav2Vec2FeatureExtractor(do_normalize=self.normalize).save_pretrained(folder)

    def train(self, mode: bool = True) -> "SemanticTeacher":
        """Stay in eval mode, because a teacher is never trained."""
        return super().train(False)

    def hidden_states(self, waveform: Tensor, lengths: Tensor | None = None) -> list[Tensor]:
        """As `features`, of every layer up to the last that is needed, behind which nothing is computed."""
        return self._layer_states(self._layer_input(pad_for_frames(waveform, self.margin, self.normalize, lengths)))

    def features(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """As `forward`, but with a gradient for the waveform (not for the weights), for losses on reconstructions."""
        return self._choose(self.hidden_states(waveform, lengths))

    @torch.no_grad()
    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """waveform float [B, N] at 16 kHz, zero after its lengths long [B] in samples (all N when None).

        Returns float [B, ceil(N / 320), P]; frames of the padding encode silence.
        """
        return self.features(waveform, lengths)

    @torch.no_grad()
    def forward_each(self, waveforms: Sequence[Tensor]) -> list[Tensor]:
        """`forward` of utterances float [N_i], float [ceil(N_i / 320), P] each, equal up to rounding.

        Only the transformer takes all at once, with a mask: the convolutions may normalise over time.
        """
        inner = [self._layer_input(pad_for_frames(one[None], self.margin, self.normalize))[0] for one in waveforms]
        sizes = [len(x) for x in inner]
        padded = nn.utils.rnn.pad_sequence(inner, batch_first=True)
        mask = frame_mask(torch.tensor(sizes, device=padded.device), padded.shape[1], hop_length=1)
        chosen = self._choose(self._layer_states(padded, mask))
        return [x[:size] for x, size in zip(chosen, sizes, strict=True)]

    @property
    def last(self) -> int:
        """The number of the last hidden state that is needed."""
        depth = self.model.config.num_hidden_layers
        return depth if isinstance(self.layer, str) else self.layer % (depth + 1)

    def _layer_input(self, padded: Tensor) -> Tensor:
        """Padded waveforms float [B, N] -> what the transformer reads, float [B, T, P]."""
        projected = self.model.feature_projection(self.model.feature_extractor(padded).transpose(1, 2))
        return projected[0] if isinstance(projected, tuple) else projected

    def _layer_states(self, x: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """The hidden states of transformers: the input of the first layer and the output of each, float [B, T, P]."""
        layers, states = self.model.encoder.layers, list[Tensor]()

        def keep(state: Tensor) -> None:
            states.append(state)
            if len(states) > self.last:
                raise _Reached

        hooks = [layers[0].register_forward_pre_hook(lambda layer, inputs: keep(inputs[0]))]
        for layer in layers:
            hooks.append(
                layer.register_forward_hook(lambda layer, inputs, out: keep(out[0] if isinstance(out, tuple) else out))
            )
        try:
            with contextlib.suppress(_Reached):
                self.model.encoder(x, mask)
        finally:
            for hook in hooks:
                hook.remove()
        return states

    def _choose(self, states: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(states)).mean(0) if isinstance(self.layer, str) else states[-1]


class _Reached(Exception):
    """The last layer that is needed has been computed."""


class WhisperTeacher(SemanticTeacher):
    """S(x) of eq. 4: hidden states of a Whisper encoder, one per codec frame.

    Whisper's frame t is centred on the beginning of codec frame t; here the spectrogram begins 10 ms later, without its
    first frame, so that both have the same centre. A window is not padded to 30 s but by 0.5 s of silence: for 5 s of
    speech a tenth of the cost, and not the same frames (cosine about 0.95 in Whisper base). Longer speech is encoded in
    consecutive windows of 30 s, which have no silence at their end. An utterance in a padded batch has the frames that
    it has alone.
    """

    def __init__(self, encoder: Any, extractor: Any, layer: int | str = "avg"):
        """encoder, extractor: transformers' WhisperEncoder and WhisperFeatureExtractor; layer: see `SemanticTeacher`.

        Raises InputError if they do not belong together, or for a layer that the encoder does not have.
        """
        super().__init__(encoder, layer, normalize=False)
        found = extractor.sampling_rate, 2 * extractor.hop_length, extractor.feature_size
        if found != (expected := (SAMPLE_RATE, HOP_LENGTH, encoder.config.num_mel_bins)):
            raise InputError(
                "preprocessor settings of another Whisper: expected a sampling_rate of {} and a hop_length of half of "
                "{} with a feature_size of {}, got {}, half of {} and {}".format(*expected, *found)
            )
        self.extractor = extractor
        self.log_mel = WhisperSpectrogram(extractor)

    @property
    def fingerprint(self) -> str:
        """Hash of weights, layer and the silence after the speech, 16 hexadecimal digits."""
        return module_fingerprint(self.model, {"layer": self.layer, "silence": SILENCE})

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the encoder without the decoder, and the preprocessor settings, as `SemanticTeacher` does."""
        self.model.save_pretrained(folder, save_original_format=False)
        self.extractor.save_pretrained(folder)

    def hidden_states(self, waveform: Tensor, lengths: Tensor | None = None) -> list[Tensor]:
        """As of `SemanticTeacher`; frames of the padding mean nothing."""
        size = HOP_LENGTH * self.model.config.max_source_positions
        windows = []
        for index, window in enumerate(waveform.split(size, 1)):
            rest = None if lengths is None else (lengths - index * size).clamp(0, size)
            windows.append(self._window_states(window, rest))
        return [torch.cat(states, 1) for states in zip(*windows, strict=True)]

    @torch.no_grad()
    def forward_each(self, waveforms: Sequence[Tensor]) -> list[Tensor]:
        """As of `SemanticTeacher`."""
        padded, lengths = pad_waveforms(waveforms)
        frames = self(padded, lengths.to(padded.device))
        return [x[: frame_count(len(waveform))] for x, waveform in zip(frames, waveforms, strict=True)]

    def _window_states(self, waveform: Tensor, lengths: Tensor | None) -> list[Tensor]:
        frames, longest = frame_count(waveform.shape[1]), self.model.config.max_source_positions
        padded = min(frames + SILENCE, longest)
        seen = None if lengths is None else (frame_count(lengths) + SILENCE).clamp(max=longest)
        mel = self.log_mel(F.pad(waveform, (0, padded * HOP_LENGTH - waveform.shape[1])))[:, :, 1:]
        return [states[:, :frames] for states in encoder_states(self.model, mel, self.last, seen)]


def pad_for_frames(waveform: Tensor, margin: int, normalize: bool, lengths: Tensor | None = None) -> Tensor:
    """Pad waveforms float [B, N] so that a HuBERT-like model returns exactly ceil(N / 320) centred frames.

    lengths: long [B], samples of speech (all N when None); only these are normalised, the others stay zero.
    """
    if normalize:
        size = waveform.shape[1]
        lengths = waveform.new_full(waveform.shape[:1], size, dtype=torch.long) if lengths is None else lengths
        speech = torch.arange(size, device=waveform.device) < lengths[:, None]
        mean = (waveform * speech).sum(1, keepdim=True) / lengths[:, None]
        centred = (waveform - mean) * speech
        waveform = centred / (centred.square().sum(1, keepdim=True) / lengths[:, None] + 1e-7).sqrt()
    left = margin // 2
    return F.pad(waveform, (left, margin - left + -waveform.shape[1] % HOP_LENGTH))


def receptive_field(config: Any) -> int:
    """Samples in the receptive field of one output frame of the convolutions."""
    field = 1
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        field = (field - 1) * stride + kernel
    return field


class SpeakerTeacher(nn.Module):
    """The speaker features of eq. 5: ECAPA-TDNN frames before pooling (output of its `mfa` layer), 100 per second."""

    hop = 160

    def __init__(self, features: nn.Module, normalization: nn.Module, ecapa: Any):
        """SpeechBrain's Fbank, InputNormalization and ECAPA_TDNN."""
        super().__init__()
        self.features, self.normalization = features, normalization
        self.ecapa: Any = ecapa.eval().requires_grad_(False)

    @property
    def width(self) -> int:
        """C, channels of the frames: 3072 in the published model, 1536 by the class's default."""
        return self.ecapa.mfa.conv.conv.out_channels

    @property
    def fingerprint(self) -> str:
        """Hash of all weights, 16 hexadecimal digits."""
        return module_fingerprint(self, {})

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "SpeakerTeacher":
        """Load a SpeechBrain folder (hyperparams.yaml, embedding_model.ckpt) or hub name.

        Made for speechbrain/spkrec-ecapa-voxceleb, whose file is read and never run (`speechbrain_settings`). Raises
        FileNotFoundError, InputError for another kind of model or a checkpoint that is damaged or incomplete.
        """
        from speechbrain.lobes.features import Fbank
        from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
        from speechbrain.processing.features import InputNormalization

        expected = "an ECAPA-TDNN of SpeechBrain"
        name = check_folder(name, [], expected)
        if (file := find_file(name, "hyperparams.yaml")) is None:
            if not Path(name).is_dir():
                raise FileNotFoundError(unreachable(name, expected))
            raise FileNotFoundError(f"{name} holds {describe(name)} and not {expected}: it lacks hyperparams.yaml")
        if (checkpoint := find_file(name, "embedding_model.ckpt")) is None:
            raise FileNotFoundError(f"{name} is not whole: it lacks embedding_model.ckpt, the weights of {expected}")
        settings = speechbrain_settings(file)
        with reading(file, f"the settings of {expected}"):
            features = Fbank(**settings["compute_features"])
            normalization = InputNormalization(**settings["mean_var_norm"])
            ecapa = ECAPA_TDNN(**settings["embedding_model"])
        fill_weights(ecapa, read_weights(checkpoint, f"the weights of {expected}"), checkpoint)
        teacher = cls(features, normalization, ecapa)
        with reading(file, f"the settings of {expected} whose parts fit together"):
            teacher.embedding(torch.zeros(1, 1_600))
        return teacher

    def train(self, mode: bool = True) -> "SpeakerTeacher":
        """Stay in eval mode, because its batch normalisation must not adapt to the training data."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """waveform float [B, N] at 16 kHz with lengths long [B] in samples -> frames float [B, N / 160 + 1, C].

        All N samples when lengths is None. The means over time exclude the padding.
        """
        frames: list[Tensor] = []
        hook = self.ecapa.mfa.register_forward_hook(lambda module, inputs, output: frames.append(output))
        try:
            self.embedding(waveform, lengths)
        finally:
            hook.remove()
        return frames[0].transpose(1, 2)

    @property
    def embedding_size(self) -> int:
        """E, the dimension of a speaker embedding: 192 in the published model."""
        return self.ecapa.fc.conv.out_channels

    @torch.no_grad()
    def pool(self, frames: Tensor, mask: Tensor) -> Tensor:
        """Frames float [B, T_e, C] of which those with speech come first, mask bool [B, T] -> embeddings float [B, E].

        The mask may have another frame rate.
        """
        pooled = self.ecapa.asp(frames.transpose(1, 2), lengths=mask.float().mean(1))
        return self.ecapa.fc(self.ecapa.asp_bn(pooled))[:, :, 0]

    @torch.no_grad()
    def embedding(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The speaker embedding, pooled by ECAPA itself: waveforms as for `forward` -> float [B, E].

        The cosine of two embeddings measures the similarity of the speakers.
        """
        share = waveform.new_ones(len(waveform)) if lengths is None else lengths / waveform.shape[1]
        return self.ecapa(self.normalization(self.features(waveform), share), share)[:, 0]
