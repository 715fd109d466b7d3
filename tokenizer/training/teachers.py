"""The frozen teachers behind one door: any HuBERT-family model of transformers, any ECAPA-TDNN of SpeechBrain.

Both load from a local folder or a hub name; the small ones `recipes/train_teacher.py` makes have the same formats.
"""

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.pretrained import check_folder, load_complete, module_fingerprint
from tokenizer.rates import HOP_LENGTH


class SemanticTeacher(nn.Module):
    """S(x) of eq. 4: hidden states of a HuBERT, WavLM or wav2vec 2.0 model, one per codec frame.

    The waveform is padded so that every teacher frame is centred on its codec frame (published HuBERT: 40 samples on
    both sides, which also gives 50 frames a second where the unpadded model gives 49).
    """

    hop = HOP_LENGTH

    def __init__(self, model: Any, layer: int | str = "avg", normalize: bool = True):
        """layer: index into the hidden states (0 is the input of the transformer), or "avg" over all of them."""
        super().__init__()
        stride, field = math.prod(model.config.conv_stride), receptive_field(model.config)
        if stride != HOP_LENGTH:
            raise ValueError(
                f"the semantic teacher must give one frame per {HOP_LENGTH} samples, this one per {stride}"
            )
        depth = model.config.num_hidden_layers
        if layer != "avg" and not (isinstance(layer, int) and -depth - 1 <= layer <= depth):
            raise ValueError(f'layer must be "avg" or an index up to {depth} into the hidden states, got {layer!r}')
        self.model = model.eval().requires_grad_(False)
        self.layer, self.normalize, self.margin = layer, normalize, field - HOP_LENGTH

    @property
    def width(self) -> int:
        """P, dimensions of the semantic feature."""
        return self.model.config.hidden_size

    @property
    def fingerprint(self) -> str:
        """Identity of the features: weights, layer and normalisation, 16 hexadecimal digits."""
        return module_fingerprint(self.model, {"layer": self.layer, "normalize": self.normalize})

    @classmethod
    def from_pretrained(cls, name: str | Path, layer: int | str = "avg") -> "SemanticTeacher":
        """Load a transformers folder or hub name, e.g. facebook/hubert-base-ls960, in float32.

        Raises ValueError for another kind of model, or one whose checkpoint lacks weights.
        """
        from transformers import AutoFeatureExtractor, AutoModel

        check_folder(name, ["config.json", "preprocessor_config.json"], "a HuBERT, WavLM or wav2vec 2.0 model")
        model = load_complete(AutoModel, name)
        if not hasattr(model.config, "conv_stride"):
            raise ValueError(f"{name} is a {model.config.model_type} model: expected HuBERT, WavLM or wav2vec 2.0")
        return cls(model, layer, AutoFeatureExtractor.from_pretrained(name).do_normalize)

    def train(self, mode: bool = True) -> "SemanticTeacher":
        """Stay in eval mode: a teacher never changes."""
        return super().train(False)

    def features(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """As `forward`, with a gradient for the waveform and none for the weights: for losses on reconstructions."""
        padded = pad_for_frames(waveform, self.margin, self.normalize, lengths)
        states = self.model(padded, output_hidden_states=True).hidden_states
        return torch.stack(states).mean(0) if self.layer == "avg" else states[self.layer]

    @torch.no_grad()
    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """waveform float [B, N] at 16 kHz, zero behind its lengths long [B] in samples -> float [B, ceil(N / 320), P].

        Waveforms of all N samples where no lengths are given. Frames of the padding hear silence.
        """
        return self.features(waveform, lengths)


def pad_for_frames(waveform: Tensor, margin: int, normalize: bool, lengths: Tensor | None = None) -> Tensor:
    """Waveforms float [B, N] -> what a HuBERT-family model needs to give exactly ceil(N / 320) centred frames.

    lengths long [B]: samples that are speech, all when None; only they are normalised, and the rest is zero.
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
    """Samples that one output frame of the convolutions sees."""
    field = 1
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        field = (field - 1) * stride + kernel
    return field


class SpeakerTeacher(nn.Module):
    """The voice of eq. 5: ECAPA-TDNN frames before pooling (output of its `mfa` layer), about 100 a second."""

    hop = 160

    def __init__(self, classifier: Any):
        """classifier: a SpeechBrain EncoderClassifier whose embedding model is an ECAPA_TDNN."""
        super().__init__()
        modules = classifier.mods
        if not hasattr(modules.embedding_model, "mfa"):
            raise ValueError(f"expected an ECAPA_TDNN embedding model, got {type(modules.embedding_model).__name__}")
        self.features, self.normalization = modules.compute_features, modules.mean_var_norm
        self.ecapa = modules.embedding_model.eval().requires_grad_(False)

    @property
    def width(self) -> int:
        """C, channels of the frames: 3072 in the published model, 1536 by the class's default."""
        return self.ecapa.mfa.conv.conv.out_channels

    @property
    def fingerprint(self) -> str:
        """Identity of the frames: every weight, 16 hexadecimal digits."""
        return module_fingerprint(self, {})

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "SpeakerTeacher":
        """Load a SpeechBrain folder (hyperparams.yaml, checkpoints) or hub name: speechbrain/spkrec-ecapa-voxceleb."""
        from speechbrain.inference.classifiers import EncoderClassifier
        from speechbrain.utils.fetching import LocalStrategy

        check_folder(name, ["hyperparams.yaml"], "a SpeechBrain ECAPA-TDNN")
        overrides = {}
        if (folder := Path(name)).is_dir():
            name = str(folder.resolve())
            # the published file names the hub as the place of its weights, also after it was downloaded
            if "pretrained_path:" in (folder / "hyperparams.yaml").read_text(encoding="utf-8"):
                overrides["pretrained_path"] = name
        with tempfile.TemporaryDirectory() as cache:  # SpeechBrain collects files somewhere, even with none to fetch
            return cls(
                EncoderClassifier.from_hparams(
                    source=str(name), savedir=cache, overrides=overrides, local_strategy=LocalStrategy.NO_LINK
                )
            )

    def train(self, mode: bool = True) -> "SpeakerTeacher":
        """Stay in eval mode: its batch normalisation must not follow the student's data."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """waveform float [B, N] at 16 kHz with lengths long [B] in samples -> frames float [B, N / 160 + 1, C].

        All N samples where no lengths are given. The means over time are those of the speech, without its padding.
        """
        frames: list[Tensor] = []
        hook = self.ecapa.mfa.register_forward_hook(lambda module, inputs, output: frames.append(output))
        try:
            self.embedding(waveform, lengths)
        finally:
            hook.remove()
        return frames[0].transpose(1, 2)

    @torch.no_grad()
    def embedding(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The voice as a whole, ECAPA's own pooled embedding: waveforms as for `forward` -> float [B, E].

        The cosine between two embeddings tells how alike the voices are.
        """
        share = waveform.new_ones(len(waveform)) if lengths is None else lengths / waveform.shape[1]
        return self.ecapa(self.normalization(self.features(waveform), share), share)[:, 0]
