"""Small teachers in the formats of the published ones, to train where those cannot be downloaded."""

import copy
import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from torch import Tensor, nn

from tokenizer.frames import frame_count
from tokenizer.rates import HOP_LENGTH
from tokenizer.training.teachers import pad_for_frames, receptive_field

if TYPE_CHECKING:  # transformers takes seconds to import, and encoding speech does not need it
    from transformers import HubertModel


GABOR_BANDS = 40


def small_hubert(hidden_size: int = 128, layers: int = 3) -> "HubertModel":
    """A HuBERT of about a million parameters: 16 kHz waveform -> 50 frames of `hidden_size` per second.

    Its first convolution is initialised with a mel-spaced Gabor filterbank (four phases per band, so that rectified
    outputs add up to an envelope); minutes of training on two cores are not enough to learn one from random weights.
    """
    from transformers import HubertConfig, HubertModel

    model = HubertModel(
        HubertConfig(
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=2 * hidden_size,
            conv_dim=(4 * GABOR_BANDS, hidden_size, hidden_size),
            conv_kernel=(400, 3, 3),
            conv_stride=(160, 1, 2),
            num_conv_pos_embeddings=31,
            num_conv_pos_embedding_groups=8,
            feat_extract_norm="layer",
            do_stable_layer_norm=True,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            feat_proj_dropout=0.0,
            layerdrop=0.0,
            apply_spec_augment=False,
            vocab_size=32,
        )
    )
    with torch.no_grad():
        model.feature_extractor.conv_layers[0].conv.weight.copy_(gabor_filters(GABOR_BANDS, 400)[:, None])
    return model


def gabor_filters(bands: int, kernel: int, sample_rate: int = 16_000) -> Tensor:
    """Windowed sinusoids at mel-spaced frequencies, phases 0, 90, 180, 270 degrees: float [4 * bands, kernel].

    Their gain increases with frequency to compensate for the spectral tilt of speech.
    """
    mel = torch.linspace(_mel(80.0), _mel(7600.0), bands)
    frequency = 700 * (10 ** (mel / 2595) - 1)
    time = (torch.arange(kernel) - kernel / 2) / sample_rate
    phase = torch.arange(4) * math.pi / 2
    waves = torch.cos(2 * math.pi * frequency[:, None, None] * time + phase[None, :, None])
    gain = (frequency / 500).clamp(min=0.5)[:, None, None]
    return (waves * gain * torch.hann_window(kernel) * 8 / kernel).flatten(0, 1)


def _mel(frequency: float) -> float:
    return 2595 * math.log10(1 + frequency / 700)


class FrameClassifier(nn.Module):
    """A HuBERT with a linear layer that scores labels per frame, for training with CTC or frame labels."""

    def __init__(self, hubert: "HubertModel", labels: int, normalize: bool = True):
        super().__init__()
        self.hubert, self.normalize = hubert, normalize
        # distributed training waits for every gradient, and what was recorded may be shorter than a mask
        hubert.config.layerdrop, hubert.config.apply_spec_augment = 0.0, False
        if (mask := getattr(hubert, "masked_spec_embed", None)) is not None:
            mask.requires_grad_(False)
        self.head = nn.Linear(hubert.config.hidden_size, labels)
        self.margin = receptive_field(hubert.config) - math.prod(hubert.config.conv_stride)

    def forward(self, waveform: Tensor, lengths: Tensor) -> Tensor:
        """waveform float [B, N], zero after its lengths long [B] in samples -> scores float [B, T, labels]."""
        x = pad_for_frames(waveform, self.margin, self.normalize, lengths)
        seen = frame_count(lengths) * HOP_LENGTH + self.margin  # samples in the receptive fields of the speech frames
        mask = torch.arange(x.shape[1], device=x.device) < seen[:, None]
        return self.head(self.hubert(x, attention_mask=mask.long()).last_hidden_state)


def save_hubert(hubert: "HubertModel", folder: Path, normalize: bool = True) -> None:
    """Write a transformers folder with the preprocessor settings that `SemanticTeacher` reads."""
    from transformers import Wav2Vec2FeatureExtractor

    hubert.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=normalize).save_pretrained(folder)


def save_recognizer(classifier: FrameClassifier, characters: Sequence[str], folder: Path) -> None:
    """Write a HuBERT trained with CTC as a transformers recogniser with preprocessor settings and vocabulary.

    characters: those of labels 1, 2, ...; label 0 is the blank and "|" separates words. `SemanticTeacher` loads its
    HuBERT from the same folder.
    """
    from transformers import AutoModelForCTC, Wav2Vec2CTCTokenizer

    config = copy.deepcopy(classifier.hubert.config)
    config.vocab_size, config.pad_token_id = len(characters) + 1, 0
    model = AutoModelForCTC.from_config(config)
    setattr(model, model.base_model_prefix, classifier.hubert)
    model.lm_head = classifier.head
    save_hubert(model, folder, classifier.normalize)
    vocabulary = folder / "vocab.json"
    vocabulary.write_text(json.dumps({"<pad>": 0} | {character: i for i, character in enumerate(characters, 1)}))
    Wav2Vec2CTCTokenizer(vocabulary, bos_token=None, eos_token=None, unk_token="<pad>").save_pretrained(folder)


def save_ecapa(ecapa: nn.Module, settings: dict[str, object], mels: int, speakers: list[str], folder: Path) -> None:
    """Write a SpeechBrain folder: hyperparams.yaml as in the published one, and the embedding model's checkpoint.

    settings: keyword arguments of the ECAPA_TDNN.
    """
    torch.save(ecapa.state_dict(), folder / "embedding_model.ckpt")
    (folder / "speakers.json").write_text(json.dumps(speakers), encoding="utf-8")
    arguments = yaml.safe_dump({"input_size": mels, **settings}, default_flow_style=None)
    text = f"""\
# ECAPA-TDNN trained by recipes/train_teacher.py; the layout of speechbrain/spkrec-ecapa-voxceleb
pretrained_path: .
compute_features: !new:speechbrain.lobes.features.Fbank
    n_mels: {mels}
mean_var_norm: !new:speechbrain.processing.features.InputNormalization
    norm_type: sentence
    std_norm: False
embedding_model: !new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN
{textwrap.indent(arguments.rstrip(), "    ")}
classifier: !new:torch.nn.Identity
modules:
    compute_features: !ref <compute_features>
    mean_var_norm: !ref <mean_var_norm>
    embedding_model: !ref <embedding_model>
    classifier: !ref <classifier>
label_encoder: !new:speechbrain.dataio.encoder.CategoricalEncoder
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        embedding_model: !ref <embedding_model>
    paths:
        embedding_model: !ref <pretrained_path>/embedding_model.ckpt
"""
    (folder / "hyperparams.yaml").write_text(text, encoding="utf-8")


def random_hubert(folder: Path) -> None:
    """Write a folder like facebook/hubert-base-ls960 with random weights, to measure speed with."""
    from transformers import HubertConfig, HubertModel

    save_hubert(HubertModel(HubertConfig()), folder)


def random_ecapa(folder: Path) -> None:
    """Write a folder like speechbrain/spkrec-ecapa-voxceleb with random weights."""
    from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN

    settings = {
        "channels": [1024, 1024, 1024, 1024, 3072],
        "kernel_sizes": [5, 3, 3, 3, 1],
        "dilations": [1, 2, 3, 4, 1],
        "attention_channels": 128,
        "lin_neurons": 192,
    }
    folder.mkdir()
    save_ecapa(ECAPA_TDNN(80, **settings), settings, 80, [], folder)
