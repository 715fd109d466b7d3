"""The codec against the packages whose architecture it has, with copied weights, and its training step."""

import copy
import json
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import EncodecConfig, EncodecModel

from speechllm.benchmarks.timing import Comparison, Measured, Size, Way, compare, measured
from tokenizer.codec.config import SpeechCodecConfig
from tokenizer.codec.converters import convert_encodec, convert_speechtokenizer
from tokenizer.codec.speech_codec import SpeechCodec
from tokenizer.interface import Codes
from tokenizer.training.discriminators import Adversary, adversarial_loss, discriminator_loss, make_discriminators
from tokenizer.training.losses import MultiScaleMelLoss, ReconstructionLoss
from tokenizer.training.step import CodecLoss

Batch = dict[str, Tensor]
Items = Callable[[Tensor], list[Any]]
BANDWIDTH = 4.0  # kbit/s: 8 codebooks of 1024 at 50 frames/s
MIXED_S = [3.6, 4.8, 5.4, 5.8, 6.2, 7.1, 7.9, 9.5]  # ninths of the lengths of 63 recordings of test-clean
CASES_S: dict[str, dict[str, list[float]]] = {
    "EncodecModel": {f"{s:g} s": [s] for s in (2.0, 5.0, 10.0, 20.0, 30.0)} | {"8 mixed": MIXED_S},
    "SpeechTokenizer": {"5 s": [5.0], "3 mixed": MIXED_S[::3]},
}
ENCODEC: dict[Size, dict[str, Any]] = {  # full: encodec_24khz, here at 16 kHz
    "small": {"num_filters": 4, "hidden_size": 16},
    "full": {},
}
SPEECHTOKENIZER: dict[Size, dict[str, Any]] = {
    "small": {"n_filters": 4, "dimension": 16, "semantic_dimension": 16},
    "full": {"n_filters": 64, "dimension": 1024, "semantic_dimension": 768},
}
STEP: dict[Size, dict[str, Any]] = {"small": {"n_filters": 4, "dimension": 16, "codebook_size": 64}, "full": {}}
STFT_FILTERS = {"small": 4, "full": 32}
CROPS = 2, 16_000  # number and samples of a training step
WEIGHTS = {"time": 0.1, "mel": 1.0, "adversarial": 3.0, "feature_matching": 3.0, "commitment": 1.0}


@dataclass(frozen=True)
class Peer:
    """A codec of another package with the weights of ours.

    encode: waveforms float [B, N], padded, and which samples are theirs, bool [B, N], to codes long [B, Q, T]; decode:
    codes back to waveforms float [B, N].
    """

    name: str
    ours: SpeechCodec
    encode: Callable[[Tensor, Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


@torch.no_grad()
def coding(row: Literal["encode", "decode"], size: Size, repeats: int, device: torch.device) -> Measured:
    """Encoding or decoding recordings of noise, alone and in a batch, by ours and by EncodecModel and SpeechTokenizer.

    Their lengths are whole frames, so that padding at the end of a causal codec changes no code.
    """
    found: dict[str, Comparison] = {}
    for peer in peers(size, device):
        hop = peer.ours.hop_length
        for case, lengths_s in CASES_S[peer.name].items():
            frames = [round(s * peer.ours.frame_rate) for s in lengths_s]
            if row == "encode":
                ways, items = encoding_ways(peer, [0.1 * torch.randn(n * hop) for n in frames], device)
            else:
                ids = [torch.randint(1024, (peer.ours.num_codebooks, n)) for n in frames]
                ways, items = decoding_ways(peer, ids, device)
            found[f"{peer.name}, {case}"] = compare(ways, repeats, device, items)
    note = (
        "Random weights, the same in both. A codec that looks ahead, as SpeechTokenizer does, sees the padding of a "
        "batch; ours encodes and decodes each recording as if alone."
    )
    return measured({"encode": "Encoding", "decode": "Decoding to speech"}[row], found, note)


def encoding_ways(peer: Peer, waveforms: Sequence[Tensor], device: torch.device) -> tuple[dict[str, Way], Items]:
    """Both ways to encode these waveforms, and the frames of what they return."""
    lengths = torch.tensor([*map(len, waveforms)])
    padded = pad_sequence(list(waveforms), batch_first=True).to(device)
    mask = (torch.arange(padded.shape[1]) < lengths[:, None]).to(device)
    frames = (lengths // peer.ours.hop_length).tolist()
    layers = peer.ours.num_codebooks

    def items(ids: Tensor) -> list[list[int]]:
        return [frame for row, n in zip(ids.transpose(1, 2), frames, strict=True) for frame in row[:n].tolist()]

    ways = {
        "ours": lambda _: peer.ours.encode(padded, lengths, layers).ids,
        peer.name: lambda _: peer.encode(padded, mask),
    }
    return ways, items


def decoding_ways(peer: Peer, ids: Sequence[Tensor], device: torch.device) -> tuple[dict[str, Way], Items]:
    """Both ways to decode these codes long [Q, T], and the recordings in what they return."""
    lengths = torch.tensor([part.shape[1] for part in ids])
    padded = pad_sequence([part.T for part in ids], batch_first=True).transpose(1, 2).contiguous().to(device)
    samples = (lengths * peer.ours.hop_length).tolist()
    ways = {
        "ours": lambda _: peer.ours.decode(Codes(padded, lengths)),
        peer.name: lambda _: peer.decode(padded),
    }
    return ways, lambda speech: [row[:n] for row, n in zip(speech, samples, strict=True)]


def peers(size: Size, device: torch.device) -> Iterator[Peer]:
    """The other codecs that are installed, with random weights."""
    with TemporaryDirectory() as folder:
        encodec = random_encodec(folder, size).to(device)

        def encode(waveforms: Tensor, mask: Tensor) -> Tensor:
            return encodec.encode(waveforms[:, None], mask, bandwidth=BANDWIDTH).audio_codes[0]

        def decode(ids: Tensor) -> Tensor:
            return encodec.decode(ids[None], [None]).audio_values[:, 0]

        yield Peer("EncodecModel", convert_encodec(folder).to(device), encode, decode)
    if find_spec("speechtokenizer") is None:
        return
    with TemporaryDirectory() as folder:
        other = random_speechtokenizer(folder, size).to(device)
        yield Peer(
            "SpeechTokenizer",
            convert_speechtokenizer(folder).to(device),
            lambda waveforms, _: other.encode(waveforms[:, None]).transpose(0, 1),
            lambda ids: other.decode(ids.transpose(0, 1))[:, 0],
        )


def random_encodec(folder: str | Path, size: Size) -> EncodecModel:
    """transformers' EnCodec at 16 kHz and 50 frames/s with random weights, also saved in the folder."""
    bandwidths = [0.5, 1.0, 2.0, BANDWIDTH]
    model = EncodecModel(EncodecConfig(sampling_rate=16_000, target_bandwidths=bandwidths, **ENCODEC[size])).eval()
    _standardize(model, model.encoder)
    model.save_pretrained(folder)
    return model


def random_speechtokenizer(folder: str | Path, size: Size) -> Any:
    """SpeechTokenizer of the package of that name with random weights, also saved in the folder."""
    # the package imports its trainer, which needs packages that it does not declare
    sys.modules.setdefault("speechtokenizer.trainer", types.SimpleNamespace(SpeechTokenizerTrainer=None))  # type: ignore[arg-type]
    from speechtokenizer.model import SpeechTokenizer

    settings = {
        **{"strides": [8, 5, 4, 2], "lstm_layers": 2, "bidirectional": True, "dilation_base": 2, "activation": "ELU"},
        **{"residual_kernel_size": 3, "n_residual_layers": 1, "sample_rate": 16_000, "n_q": 8, "codebook_size": 1024},
        **SPEECHTOKENIZER[size],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of its weight normalisation
        model = SpeechTokenizer(settings).eval()
    _standardize(model, model.encoder)
    (Path(folder) / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    torch.save(model.state_dict(), Path(folder) / "SpeechTokenizer.pt")
    return model


@torch.no_grad()
def _standardize(model: nn.Module, encoder: nn.Module) -> None:
    """Give latents of noise a mean of 0 and a deviation of 1, and the codes as well, which both packages start at 0.

    Untrained latents are a constant plus a little, next to which rounding decides between codes.
    """
    deviation, mean = torch.std_mean(encoder(0.1 * torch.randn(1, 1, 16_000))[0], 1)
    parameters = list(encoder.named_parameters())  # the last ones are those of the last convolution
    gain = [value for name, value in parameters if name.endswith(("original0", "weight_g"))][-1]
    bias = [value for name, value in parameters if name.endswith("bias")][-1]
    gain.div_(deviation[:, None, None])
    bias.copy_((bias - mean) / deviation)
    for name, buffer in model.named_buffers():
        if name.endswith("embed"):
            buffer.normal_()


def codec_step(size: Size, repeats: int, device: torch.device) -> Measured:
    """A training step with discriminators, and the same one in the order of the trainers of the peers.

    Both start with the same weights and random numbers; all rates are 0, so that every step does all the work on the
    same weights. What is compared are the losses and the norm of the codec's gradient.
    """
    codec = SpeechCodec(SpeechCodecConfig(**STEP[size])).to(device)
    adversary = Adversary(make_discriminators(STFT_FILTERS[size]).to(device), "hinge", 0.0, relative_features=False)
    mel = MultiScaleMelLoss(codec.sample_rate).to(device)
    loss_of = CodecLoss(codec, ReconstructionLoss(WEIGHTS, mel, adversary)).train()
    count, samples = CROPS
    batch = {"waveform": 0.1 * torch.randn(count, samples, device=device)}
    batch["length"] = torch.full((count,), samples, device=device)

    def way(losses_of: Callable[[CodecLoss, Batch], dict[str, Tensor]]) -> Way:
        own = copy.deepcopy(loss_of)
        optimizer = torch.optim.AdamW(own.codec.parameters(), 0.0, fused=True)

        def step(repeat: int) -> list[Tensor]:
            torch.manual_seed(repeat)  # for the codes that are revived
            optimizer.zero_grad()
            losses = losses_of(own, batch)
            optimizer.step()
            gradient = nn.utils.get_total_norm([p.grad for p in own.codec.parameters() if p.grad is not None])
            return [loss.detach() for _, loss in sorted(losses.items())] + [gradient]

        return step

    ways = {"ours": way(our_losses), "reference order": way(reference_losses)}
    return measured("Training step of the codec", {"": compare(ways, repeats, device)})


def our_losses(loss_of: CodecLoss, batch: Batch) -> dict[str, Tensor]:
    """A step of the discriminators and the gradients of the codec, as in train_tokenizer; the losses by name."""
    loss, losses = loss_of(batch)
    loss.backward()
    return losses


def reference_losses(loss_of: CodecLoss, batch: Batch) -> dict[str, Tensor]:
    """The same as in SpeechTokenizer's trainer, where the generator's loss is one ordinary backward pass.

    The discriminators run on speech and reconstruction apart, and in the generator's turn they gather gradients of
    their own and for the real speech, which nobody uses.
    """
    codec, criterion = loss_of.codec, loss_of.criterion
    adversary, waveform = criterion.adversary, batch["waveform"]
    assert adversary is not None
    quantized = codec.quantizer(codec.latents(waveform))
    reconstruction = codec.decoder(quantized.output)[:, 0]

    adversary.optimizer.zero_grad()
    real, fake = adversary.discriminate(waveform), adversary.discriminate(reconstruction.detach())
    losses = {"discriminator": discriminator_loss(real, fake, "hinge")}
    losses["discriminator"].backward()
    adversary.optimizer.step()

    real, fake = adversary.discriminate(waveform), adversary.discriminate(reconstruction)
    pairs = [(r, f) for a, b in zip(real, fake, strict=True) for r, f in zip(a.features, b.features, strict=True)]
    losses |= {
        "time": F.l1_loss(reconstruction, waveform),
        "mel": criterion.mel(reconstruction, waveform),
        "adversarial": adversarial_loss(fake, "hinge"),
        "feature_matching": torch.stack([F.l1_loss(f, r) for r, f in pairs]).sum(),
        "commitment": quantized.commitment,
    }
    torch.stack([weight * losses[name] for name, weight in WEIGHTS.items()]).sum().backward()
    return losses
