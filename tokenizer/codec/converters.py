"""Converts EnCodec and SpeechTokenizer checkpoints to our codec, with the same codes and the same audio.

Both consist of the SEANet and the residual quantiser of this package under other names, so a conversion only renames
parameters. Settings that our modules do not support are refused. The weights keep their licence.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizer.codec.config import SpeechCodecConfig
from tokenizer.codec.speech_codec import SpeechCodec
from tokenizer.errors import InputError
from tokenizer.pretrained import (
    check_folder,
    fill_weights,
    find_file,
    load_config,
    load_frozen,
    read_pretrained_json,
    read_weights,
)
from tokenizer.reading import reading

# The values of each original setting that our modules support.
ENCODEC_SETTINGS: dict[str, tuple[Any, ...]] = {
    "model_type": ("encodec",),
    "audio_channels": (1,),
    "normalize": (False,),
    "chunk_length_s": (None,),
    "norm_type": ("weight_norm",),
    "pad_mode": ("reflect", "constant"),
    "kernel_size": (7,),
    "last_kernel_size": (7,),
    "residual_kernel_size": (3,),
    "num_residual_layers": (1,),
    "use_conv_shortcut": (True,),
    "compress": (2,),
    "num_lstm_layers": (2,),
    "trim_right_ratio": (1.0,),
}
SPEECHTOKENIZER_SETTINGS: dict[str, tuple[Any, ...]] = {
    "activation": ("ELU",),
    "residual_kernel_size": (3,),
    "n_residual_layers": (1,),
    "lstm_layers": (2,),
    "bidirectional": (True, False),
}
# Original parameter names to ours, applied one after the other.
RENAMES = {
    r"^(encoder|decoder)\.model\.": r"\1.layers.",
    r"\.(conv|convtr)\.\1\.": ".conv.",  # SpeechTokenizer wraps every convolution twice
    r"\.weight_g$": ".parametrizations.weight.original0",  # weight normalisation before torch 2.0
    r"\.weight_v$": ".parametrizations.weight.original1",
    r"^quantizer\.(?:vq\.)?layers\.(\d+)\._?codebook\.embed$": r"quantizer.codebooks.\1",
}
# Running averages of the original codebooks, and SpeechTokenizer's projection to its teacher.
TRAINING_ONLY = re.compile(r"\._?codebook\.(inited|cluster_size|embed_avg)$|^transform\.")


def convert_encodec(name: str | Path) -> SpeechCodec:
    """Convert a transformers EncodecModel, folder or hub name, to a codec in eval mode.

    It has the codebooks of the highest bandwidth; `codec.encode(waveform, layers=...)` gives the lower ones.
    Raises InputError listing all settings our modules do not support, or the parameters that do not fit.
    """
    from transformers import EncodecModel  # imported here because using a codec needs no transformers

    name = check_folder(name, ["config.json"], "an EnCodec model")
    config = load_config(name, "an EnCodec model")
    _check_settings(name, config.to_dict(), ENCODEC_SETTINGS)
    encodec = load_frozen(EncodecModel, name, "an EnCodec model")
    ours = SpeechCodecConfig(
        sample_rate=config.sampling_rate,
        dimension=config.hidden_size,
        n_filters=config.num_filters,
        strides=tuple(reversed(config.upsampling_ratios)),
        causal=config.use_causal_conv,
        pad_mode=config.pad_mode,
        num_codebooks=config.num_quantizers,
        codebook_size=config.codebook_size,
    )
    return _codec(name, ours, encodec.state_dict())


def convert_speechtokenizer(name: str | Path) -> SpeechCodec:
    """Convert SpeechTokenizer's config.json and SpeechTokenizer.pt, folder or hub name, to a codec in eval mode.

    The published models are in subfolders of one hub repository: download one of these.
    Raises FileNotFoundError if a file is missing, InputError listing all settings our modules do not support, or
    the parameters that do not fit.
    """
    name = check_folder(name, ["config.json", "SpeechTokenizer.pt"], "SpeechTokenizer")
    config, checkpoint = read_pretrained_json(name, "config.json"), find_file(name, "SpeechTokenizer.pt")
    if not config or checkpoint is None:
        raise FileNotFoundError(f"{name} lacks config.json or SpeechTokenizer.pt: expected SpeechTokenizer's folder")
    _check_settings(name, config, SPEECHTOKENIZER_SETTINGS)
    with reading(Path(name) / "config.json", "the configuration of SpeechTokenizer"):
        ours = SpeechCodecConfig(
            sample_rate=config["sample_rate"],
            dimension=config["dimension"],
            n_filters=config["n_filters"],
            strides=tuple(reversed(config["strides"])),
            lstm="bidirectional" if config["bidirectional"] else "forward",
            num_codebooks=config["n_q"],
            codebook_size=config["codebook_size"],
        )
    return _codec(checkpoint, ours, read_weights(checkpoint, "the weights of SpeechTokenizer"))


def _check_settings(source: str | Path, config: Mapping[str, Any], settings: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise InputError listing all settings of the original which our modules do not support."""
    differences = [
        f"{name} is {config.get(name)!r}, not {' or '.join(map(repr, ours))}"
        for name, ours in settings.items()
        if config.get(name) not in ours
    ]
    if differences:
        raise InputError(f"{source} cannot be converted, it is another architecture: {'; '.join(differences)}")


def _codec(source: str | Path, config: SpeechCodecConfig, parameters: Mapping[str, Tensor]) -> SpeechCodec:
    """A codec with the original's parameters, which must match ours one to one."""
    codec = SpeechCodec(config)
    with reading(source, "a checkpoint of its configuration"):
        state = {_renamed(name): value for name, value in parameters.items() if not TRAINING_ONLY.search(name)}
    try:
        codebooks = torch.stack([state.pop(f"quantizer.codebooks.{layer}") for layer in range(config.num_codebooks)])
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{source}: the parameters are not those of its configuration: {error}") from error
    # training sets codebooks = sums / usage: with these values no code is dead and none moves without data
    state |= {"quantizer.codebooks": codebooks, "quantizer.sums": codebooks.clone()}
    state["quantizer.usage"] = torch.ones(codebooks.shape[:2])
    fill_weights(codec, state, source)
    return codec.eval()


def _renamed(name: str) -> str:
    for pattern, replacement in RENAMES.items():
        name = re.sub(pattern, replacement, name)
    return name
