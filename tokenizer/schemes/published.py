"""Published codecs of transformers with the interface of ours: EnCodec, Mimi and DAC."""

from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.audio import fit_length, pad_waveforms
from tokenizer.errors import InputError
from tokenizer.frames import split_utterances
from tokenizer.interface import Codes, require_layers
from tokenizer.pretrained import check_folder, load_config, load_frozen, module_fingerprint

PUBLISHED = ("encodec", "mimi", "dac")  # model types of transformers


class PublishedCodec(nn.Module):
    """A transformers EncodecModel, MimiModel or DacModel as a `Codec`, with all of its codebooks.

    Every utterance is encoded separately, because Mimi's codes depend on padding. DAC's input is zero-padded to whole
    frames, as by its feature extractor. EnCodec uses its largest bandwidth.
    """

    codebooks: Tensor  # float [Q, K, D]; for DAC in the space of its search, before the projection to the latents

    def __init__(self, model: Any):
        """Raises InputError for another model, or an EnCodec that is stereo or stores loudness besides its codes."""
        super().__init__()
        config = model.config
        if config.model_type not in PUBLISHED:
            raise InputError(f"expected a model of {', '.join(PUBLISHED)}, got {config.model_type}")
        if config.model_type == "encodec" and (config.audio_channels > 1 or config.normalize or config.chunk_length_s):
            raise InputError("this EnCodec is stereo or stores loudness besides its codes: use one like encodec_24khz")
        self.model = model.eval().requires_grad_(False)
        self.hop_length = config.frame_size if config.model_type == "mimi" else config.hop_length
        self.register_buffer("codebooks", torch.stack(self._codebooks()), persistent=False)

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "PublishedCodec":
        """Load a transformers folder or hub name, e.g. kyutai/mimi. Raises InputError for another kind of model."""
        from transformers import AutoModel

        expected = "an EnCodec, Mimi or DAC of transformers"
        name = check_folder(name, ["config.json"], expected)
        if (found := load_config(name, expected).model_type) not in PUBLISHED:
            raise InputError(f"{name} is a {found} model: expected {expected}")
        return cls(load_frozen(AutoModel, name, expected))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the transformers folder."""
        self.model.save_pretrained(folder)

    @property
    def sample_rate(self) -> int:
        return self.model.config.sampling_rate

    @property
    def frame_rate(self) -> float:
        return self.sample_rate / self.hop_length

    @property
    def num_codebooks(self) -> int:
        return len(self.codebooks)

    @property
    def codebook_size(self) -> int:
        return self.model.config.codebook_size

    @property
    def additive(self) -> bool:
        """Whether the vectors in `codebooks` of successive layers add up."""
        return self.model.config.model_type != "dac"

    @property
    def branches(self) -> list[range]:
        """The layers of each cascade: Mimi has its first one beside the others."""
        split = self.model.config.model_type == "mimi"
        return [range(1), range(1, self.num_codebooks)] if split else [range(self.num_codebooks)]

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def fingerprint(self) -> str:
        return module_fingerprint(self.model, {"model": self.model.config.model_type, "sample_rate": self.sample_rate})

    @torch.no_grad()
    def encode(self, waveform: Tensor, lengths: Tensor | None = None, layers: int | None = None) -> Codes:
        """Waveforms float [B, N] -> codes, T = ceil(n / hop) frames for an utterance of n samples."""
        require_layers(layers, self.num_codebooks)
        utterances = split_utterances(waveform, lengths)
        codes = [self._encode(samples[None, None])[0, :layers] for samples in utterances]
        return Codes.from_utterances(codes, samples=torch.tensor([len(samples) for samples in utterances]))

    @torch.no_grad()
    def decode(self, codes: Codes) -> Tensor:
        """Codes with Q' <= Q layers -> waveforms float [B, N]; shorter ones are zero-padded.

        Returns as many samples as were encoded; DAC decodes slightly fewer, followed by zeros. Raises InputError for
        codes that this codec cannot have made.
        """
        codes.require(self.num_codebooks, self.codebook_size, self.hop_length)
        sizes = enumerate(codes.sizes(self.hop_length).tolist())
        sounds = ((self._decode(codes.utterance(index)[None].to(self.device)).flatten(), size) for index, size in sizes)
        return pad_waveforms([fit_length(*sound) for sound in sounds])[0]

    def _apply(self, *arguments: Any, **options: Any) -> Self:
        """Move the weights. Mimi keeps the vectors that it has computed of them, which would stay where they are."""
        for module in self.model.modules():
            if hasattr(module, "_embed"):
                module._embed = None
        return super()._apply(*arguments, **options)

    def _codebooks(self) -> list[Tensor]:
        quantizer = self.model.quantizer
        match self.model.config.model_type:
            case "encodec":
                return [layer.codebook.embed for layer in quantizer.layers[: self.model.config.num_quantizers]]
            case "mimi":
                parts = (quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer)
                return [layer.codebook.embed for part in parts for layer in part.layers]
            case _:
                return [layer.codebook.weight for layer in quantizer.quantizers]

    def _encode(self, x: Tensor) -> Tensor:
        """One utterance float [1, 1, N] -> codes long [1, Q, T]."""
        match self.model.config.model_type:
            case "encodec":
                return self.model.encode(x, bandwidth=max(self.model.config.target_bandwidths)).audio_codes[0]
            case "mimi":
                return self.model.encode(x).audio_codes
            case _:
                return self.model.encode(F.pad(x, (0, -x.shape[2] % self.hop_length))).audio_codes

    def _decode(self, ids: Tensor) -> Tensor:
        """The codes of one utterance long [1, Q', T] -> speech float [1, ..., N]."""
        if self.model.config.model_type == "encodec":
            return self.model.decode(ids[None], [None]).audio_values
        return self.model.decode(audio_codes=ids).audio_values
