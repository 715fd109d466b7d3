"""FreeVC, the voice conversion of the paper's Table 2, from its published files and for inference only.

FreeVC (Li, Tu, Xiao 2022, "FreeVC: Towards high-quality text-free one-shot voice conversion", repository
OlaWod/FreeVC) passes WavLM features of the source through a bottleneck and decodes them conditioned on a speaker
embedding of the target. Module and parameter names are those of the published checkpoints.

Not run with the published weights, which were not available. With random weights every part has been compared with
another implementation of FreeVC, and the audio agrees to 1e-6; the quality of the published model is unmeasured.
"""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.functional import melscale_fbanks

from tokenizer.errors import InputError
from tokenizer.pretrained import check_folder, fill_weights, load_config, load_frozen, read_weights
from tokenizer.rates import HOP_LENGTH, SAMPLE_RATE
from tokenizer.reading import read_json_object, reading

SHORTEST = 1_600  # samples, 0.1 s
SPEAKER_WIDTH = 256  # G, width of the speaker encoder and its embeddings
FILES = {  # file: its folder in the repository
    "freevc.json": "configs/",
    "freevc.pth": "checkpoints/",
    "pretrained_bak_5805000.pt": "speaker_encoder/ckpt/",
}
TRAINING_ONLY = (
    "enc_q.",  # the posterior encoder, which receives the spectrogram of the source
    "similarity_weight",  # scale and offset in the speaker encoder's loss
    "similarity_bias",
)


class GatedConvolutions(nn.Module):
    """WaveNet's gated layers without dilation: hidden float [B, H, T], speaker float [B, G, 1] -> float [B, H, T]."""

    def __init__(self, width: int, layers: int, speaker_width: int = 0):
        """speaker_width: G, or 0 for no conditioning."""
        super().__init__()
        outputs = [2 * width] * (layers - 1) + [width]  # the last layer has no residual output
        self.in_layers = nn.ModuleList(nn.Conv1d(width, 2 * width, 5, padding=2) for _ in outputs)
        self.res_skip_layers = nn.ModuleList(nn.Conv1d(width, output, 1) for output in outputs)
        self.cond_layer = nn.Conv1d(speaker_width, 2 * width * layers, 1) if speaker_width else None

    def forward(self, hidden: Tensor, speaker: Tensor | None = None) -> Tensor:
        width, skipped = hidden.shape[1], torch.zeros_like(hidden)
        layers = len(self.in_layers)
        biases = [0.0] * layers if self.cond_layer is None else self.cond_layer(speaker).chunk(layers, 1)
        for convolve, mix, bias in zip(self.in_layers, self.res_skip_layers, biases, strict=True):
            signal, gate = (convolve(hidden) + bias).chunk(2, 1)
            mixed = mix(signal.tanh() * gate.sigmoid())
            hidden, skipped = hidden + mixed[:, :width], skipped + mixed[:, -width:]
        return skipped


class ContentEncoder(nn.Module):
    """The bottleneck: WavLM features float [B, C, T] -> mean and log standard deviation of z, each float [B, D, T]."""

    def __init__(self, features: int, width: int, dimension: int):
        super().__init__()
        self.pre = nn.Conv1d(features, width, 1)
        self.enc = GatedConvolutions(width, layers=16)
        self.proj = nn.Conv1d(width, 2 * dimension, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        return self.proj(self.enc(self.pre(features))).chunk(2, 1)


class InverseCoupling(nn.Module):
    """Inverse coupling layer of the flow: shifts the second half of z float [B, D, T] depending on the first."""

    def __init__(self, dimension: int, width: int):
        super().__init__()
        self.pre = nn.Conv1d(dimension // 2, width, 1)
        self.enc = GatedConvolutions(width, layers=4, speaker_width=SPEAKER_WIDTH)
        self.post = nn.Conv1d(width, dimension // 2, 1)

    def forward(self, z: Tensor, speaker: Tensor) -> Tensor:
        kept, shifted = z.chunk(2, 1)
        return torch.cat([kept, shifted - self.post(self.enc(self.pre(kept), speaker))], 1)


class InverseFlow(nn.Module):
    """Maps the content's z to a speaker's z, float [B, D, T]: four couplings with reversed channels in between."""

    def __init__(self, dimension: int, width: int):
        super().__init__()
        # the odd indices of the published list are channel reversals without parameters
        self.flows = nn.ModuleDict({str(index): InverseCoupling(dimension, width) for index in (0, 2, 4, 6)})

    def forward(self, z: Tensor, speaker: Tensor) -> Tensor:
        for coupling in reversed(list(self.flows.values())):
            z = coupling(z.flip(1), speaker)
        return z


class ResidualBlock(nn.Module):
    """HiFi-GAN's residual block of type 1: float [B, H, N] -> the same."""

    def __init__(self, width: int, kernel: int, dilations: list[int]):
        super().__init__()
        self.convs1 = nn.ModuleList(nn.Conv1d(width, width, kernel, dilation=d, padding="same") for d in dilations)
        self.convs2 = nn.ModuleList(nn.Conv1d(width, width, kernel, padding="same") for _ in dilations)

    def forward(self, hidden: Tensor) -> Tensor:
        for dilated, plain in zip(self.convs1, self.convs2, strict=True):
            hidden = hidden + plain(F.leaky_relu(dilated(F.leaky_relu(hidden, 0.1)), 0.1))
        return hidden


class Generator(nn.Module):
    """HiFi-GAN (Kong et al. 2020): z float [B, D, T], speaker float [B, G, 1] -> waveform float [B, 1, 320 T]."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        width, rates = config["upsample_initial_channel"], config["upsample_rates"]
        blocks = list(zip(config["resblock_kernel_sizes"], config["resblock_dilation_sizes"], strict=True))
        widths = [width // 2**step for step in range(len(rates) + 1)]
        steps = zip(pairwise(widths), config["upsample_kernel_sizes"], rates, strict=True)
        self.conv_pre = nn.Conv1d(config["inter_channels"], width, 7, padding=3)
        self.cond = nn.Conv1d(SPEAKER_WIDTH, width, 1)
        self.ups = nn.ModuleList(
            nn.ConvTranspose1d(wide, narrow, kernel, rate, padding=(kernel - rate) // 2)
            for (wide, narrow), kernel, rate in steps
        )
        self.resblocks = nn.ModuleList(
            ResidualBlock(width, kernel, dilations) for width in widths[1:] for kernel, dilations in blocks
        )
        self.conv_post = nn.Conv1d(widths[-1], 1, 7, padding=3, bias=False)
        self.parallel = len(blocks)

    def forward(self, z: Tensor, speaker: Tensor) -> Tensor:
        hidden = self.conv_pre(z) + self.cond(speaker)
        for step, up in enumerate(self.ups):
            hidden = up(F.leaky_relu(hidden, 0.1))
            blocks = self.resblocks[step * self.parallel : (step + 1) * self.parallel]
            hidden = torch.stack([block(hidden) for block in blocks]).mean(0)
        return self.conv_post(F.leaky_relu(hidden)).tanh()  # slope 0.01 here, as in the original


class Synthesizer(nn.Module):
    """The network in `freevc.pth`: content float [B, C, T], speaker float [B, G] -> waveform float [B, 320 T]."""

    def __init__(self, config: dict[str, Any]):
        """config: the "model" entry of freevc.json."""
        super().__init__()
        dimension, width = config["inter_channels"], config["hidden_channels"]
        self.enc_p = ContentEncoder(config["ssl_dim"], width, dimension)
        self.flow = InverseFlow(dimension, width)
        self.dec = Generator(config)

    def forward(self, content: Tensor, speaker: Tensor, generator: torch.Generator) -> Tensor:
        mean, log_std = self.enc_p(content)
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        speaker = speaker[..., None]
        return self.dec(self.flow(mean + noise * log_std.exp(), speaker), speaker)[:, 0]


class SpeakerEncoder(nn.Module):
    """Speaker embedding of a waveform float [N] -> unit vector float [1, G] (GE2E, Wan et al. 2018).

    The mean over windows of 1.6 s, one every 0.77 s; at least three quarters of the last one lie within the waveform.
    """

    filters: Tensor
    window: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, SPEAKER_WIDTH, num_layers=3, batch_first=True)
        self.linear = nn.Linear(SPEAKER_WIDTH, SPEAKER_WIDTH)
        filters = melscale_fbanks(201, 0.0, SAMPLE_RATE / 2, 40, SAMPLE_RATE, norm="slaney", mel_scale="slaney")
        self.register_buffer("filters", filters.T, persistent=False)
        self.register_buffer("window", torch.hann_window(400), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        frames, step, hop = 160, 77, 160  # frames per window, frames between windows, samples per frame
        last = max(0, len(waveform) // hop - frames * 3 // 4) // step
        waveform = F.pad(waveform, (0, max(0, (last * step + frames) * hop - len(waveform))))
        spectrum = torch.stft(waveform, 400, hop, window=self.window, return_complex=True)
        mel = self.filters @ spectrum.abs().square()
        _, (hidden, _) = self.lstm(mel.unfold(1, frames, step).permute(1, 2, 0))
        partial = F.normalize(self.linear(hidden[-1]).relu())
        return F.normalize(partial.mean(0, keepdim=True))


class FreeVC(nn.Module):
    """One-shot voice conversion from any speaker to any other, at 16 kHz.

    >>> freevc = FreeVC.from_pretrained("FOLDER")
    >>> converted = freevc.convert(source, target)
    """

    sample_rate = SAMPLE_RATE

    def __init__(self, synthesizer: Synthesizer, speaker_encoder: SpeakerEncoder, wavlm: Any):
        super().__init__()
        self.synthesizer = synthesizer
        self.speaker_encoder = speaker_encoder
        self.wavlm = wavlm
        self.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, folder: str | Path, wavlm: str | Path = "microsoft/wavlm-large") -> "FreeVC":
        """Load the published freevc.json, freevc.pth and pretrained_bak_5805000.pt from one folder.

        wavlm: hub name or transformers folder of WavLM-Large.
        Raises FileNotFoundError listing missing files, InputError if a file belongs to another model.
        """
        from transformers import AutoModel

        folder = Path(folder)
        _check_files(folder)
        wavlm = check_folder(wavlm, ["config.json"], "a WavLM model")
        settings = load_config(wavlm, "a WavLM model")
        config = read_json_object(folder / "freevc.json", "the configuration of FreeVC").get("model", {})
        with reading(folder / "freevc.json", "the configuration of FreeVC"):
            _check_config(folder, config)
            synthesizer, speaker_encoder = Synthesizer(config), SpeakerEncoder()
        _load(synthesizer, folder / "freevc.pth", "model")
        _load(speaker_encoder, folder / "pretrained_bak_5805000.pt", "model_state")
        kind, width = settings.model_type, getattr(settings, "hidden_size", None)
        if (kind, width) != ("wavlm", config["ssl_dim"]):
            raise InputError(
                f"{wavlm} is a {kind} model of width {width}: {folder} needs WavLM of width {config['ssl_dim']} "
                "(microsoft/wavlm-large for the published FreeVC)"
            )
        return cls(synthesizer, speaker_encoder, load_frozen(AutoModel, wavlm, "a WavLM model"))

    @torch.no_grad()
    def convert(self, source: Tensor, target: Tensor, seed: int = 0) -> Tensor:
        """Convert `source` to the voice of `target`, both float [N] at 16 kHz, at least 0.1 s, on the model's device.

        Returns float [320 T], T = (N - 80) // 320 frames of WavLM. seed: of the noise in z; fixes the result.
        Raises InputError if a waveform is too short, silent or not finite, ValueError if its shape is not [N].
        """
        _check_waveform("source", source)
        _check_waveform("target", target)
        content = self.wavlm(source[None]).last_hidden_state.mT  # not normalised, as in the training of FreeVC
        speaker = self.speaker_encoder(_trimmed(target))
        return self.synthesizer(content, speaker, torch.Generator().manual_seed(seed))[0]


def _check_waveform(name: str, waveform: Tensor) -> None:
    """Raise ValueError for a wrong shape, InputError for a waveform that cannot be converted."""
    if waveform.dim() != 1:
        raise ValueError(f"the {name} has shape {list(waveform.shape)}: expected one waveform float [N] at 16 kHz")
    if len(waveform) < SHORTEST:
        raise InputError(f"the {name} has {len(waveform)} samples: expected at least {SHORTEST} (0.1 s) at 16 kHz")
    if not 0 < waveform.abs().max() < math.inf:
        raise InputError(f"the {name} is silent or not finite: expected speech")


def _trimmed(waveform: Tensor) -> Tensor:
    """Remove ends more than 20 dB below the loudest window of 2048 samples, in steps of 512 (as librosa's trim)."""
    step = 512
    windows = F.pad(waveform[None], (1024, 1024), "reflect")[0].unfold(0, 2048, step)
    power = windows.square().mean(1)
    loud = torch.nonzero(power > power.max() / 100)[:, 0]
    return waveform[int(loud[0]) * step : (int(loud[-1]) + 1) * step]


def _check_files(folder: Path) -> None:
    """Raise FileNotFoundError listing the missing published files and the contents of the folder."""
    found = sorted(path.name for path in folder.glob("*"))
    if missing := [f"{name} (from {subfolder})" for name, subfolder in FILES.items() if name not in found]:
        raise FileNotFoundError(
            f"{folder} is not the folder of FreeVC: it lacks {', '.join(missing)} of OlaWod/FreeVC, "
            f"and holds {', '.join(found) or 'nothing'}"
        )


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    """Raise InputError for variants of FreeVC with another architecture: freevc-s, freevc-24."""
    expected = {"use_spk": True, "resblock": "1", "gin_channels": SPEAKER_WIDTH}
    differences = {name: config.get(name) for name, value in expected.items() if config.get(name) != value}
    problems = [f"{name} is {value!r}, not {expected[name]!r}" for name, value in differences.items()]
    if math.prod(rates := config.get("upsample_rates", [])) != HOP_LENGTH:
        problems.append(f"upsample_rates is {rates}, not of product {HOP_LENGTH}")
    if problems:
        raise InputError(f"{folder / 'freevc.json'} is not the configuration of FreeVC: {'; '.join(problems)}")


def _load(module: nn.Module, file: Path, key: str) -> None:
    """Load the parameters of a checkpoint, which must match those of the module one to one."""
    expected = "the published one for this freevc.json"
    with reading(file, expected):
        weights = _inference_weights(read_weights(file, expected)[key])
    fill_weights(module, weights, file)


def _inference_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published parameters with weight normalisation applied, w = g v / |v|, without those used in training only."""
    plain = {}
    for name, value in weights.items():
        if name.startswith(TRAINING_ONLY) or name.endswith(".weight_g"):
            continue
        if name.endswith(".weight_v"):
            name = name.removesuffix("_v")
            value = weights[f"{name}_g"] * value / value.norm(dim=(1, 2), keepdim=True)
        plain[name] = value
    return plain
