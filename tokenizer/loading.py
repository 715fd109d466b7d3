"""Loading any audio tokenizer by its name; the files of a folder or hub model determine its kind."""

import os
from pathlib import Path

from tokenizer.codec.converters import convert_speechtokenizer
from tokenizer.codec.speech_codec import UNITS, SpeechCodec
from tokenizer.custom import TokenizerError, load_class
from tokenizer.errors import InputError
from tokenizer.interface import AudioTokenizer, Codec, DiscreteTokenizer
from tokenizer.pretrained import SETTINGS_FILE, check_folder, read_pretrained_json
from tokenizer.schemes.compressor import CtcCompressor
from tokenizer.schemes.features import FeatureEncoder
from tokenizer.schemes.published import PUBLISHED, PublishedCodec
from tokenizer.schemes.recoder import BASE
from tokenizer.schemes.recognizer import Recognizer
from tokenizer.schemes.repcodec import RepCodec
from tokenizer.schemes.soundstream import ENCODER, SoundStream
from tokenizer.schemes.units import UnitTokenizer

SPELLINGS = (
    "an audio tokenizer is FOLDER_OR_HUB_NAME (a codec of this package, EnCodec, Mimi or DAC of transformers, "
    "a downloaded SpeechTokenizer or SoundStream, units of recipes/fit_units.py), features:FOLDER_OR_HUB_NAME#LAYER "
    "(HuBERT, WavLM, wav2vec 2.0, Whisper or a compressor), recognizer:FOLDER_OR_HUB_NAME (a speech recogniser of "
    "transformers) or FILE.py:CLASS (your own)"
)


def load_tokenizer(name: str | Path) -> AudioTokenizer:
    """Load an audio tokenizer of any kind, in eval mode, from a folder or a hub name.

    FOLDER_OR_HUB_NAME                  a codec or units, or whatever `save_pretrained` wrote
    features:FOLDER_OR_HUB_NAME#LAYER   hidden states; without #LAYER see `load_semantic_teacher`
    recognizer:FOLDER_OR_HUB_NAME       the text that a speech recogniser returns
    FILE.py:CLASS                       your own, an instance of the class made without arguments
    Raises FileNotFoundError for a missing folder, TokenizerError for a folder or model of another kind.
    """
    name = os.path.expanduser(name)
    prefix, colon, rest = name.partition(":")
    found = os.path.exists(name)  # then it is no other spelling, whatever it looks like
    if ".py:" in name and not found and prefix not in ("features", "recognizer"):
        return _from_file(*name.rsplit(":", 1))
    try:
        if found or not colon:
            return _by_files(name)
        if prefix == "features":
            return FeatureEncoder.from_pretrained(*_folder_and_layer(os.path.expanduser(rest)))
        if prefix == "recognizer":
            return Recognizer.from_pretrained(rest)
        raise ValueError(f"no such folder, and an unknown kind {prefix!r}; {SPELLINGS}")
    except ValueError as error:
        raise TokenizerError(f"{name}: {error}") from error


def load_codec(name: str | Path) -> Codec:
    """As `load_tokenizer`, but raises TokenizerError for a tokenizer that cannot decode its codes to speech."""
    codec = load_tokenizer(name)
    if not isinstance(codec, Codec):
        raise TokenizerError(f"{name} cannot turn its tokens into speech again: choose a codec")
    return codec


def load_discrete(name: str | Path) -> DiscreteTokenizer:
    """As `load_tokenizer`, but raises TokenizerError for a tokenizer without codes."""
    discrete = load_tokenizer(name)
    if not isinstance(discrete, DiscreteTokenizer):
        raise TokenizerError(f"{name} gives no codes: choose a codec or units")
    return discrete


def _from_file(file: str, name: str) -> AudioTokenizer:
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such file; {SPELLINGS}")
    return load_class(file, name)


def _folder_and_layer(name: str) -> tuple[str, int | str | None]:
    """FOLDER_OR_HUB_NAME#LAYER; the folder may have a # of its own."""
    folder, mark, layer = name.rpartition("#")
    if not mark or os.path.exists(name):
        return name, None
    if layer in ("", "avg"):
        return folder, layer or None
    try:
        return folder, int(layer)
    except ValueError:
        raise ValueError(f"expected a number or avg after #, got {layer!r}") from None


def _by_files(name: str) -> AudioTokenizer:
    name = check_folder(name, [], "an audio tokenizer")
    settings = read_pretrained_json(name, SETTINGS_FILE)
    match settings.get("kind"):
        case "units":
            return UnitTokenizer.from_pretrained(name)
        case "features":
            if "layer" not in settings:
                raise ValueError(f"its {SETTINGS_FILE} names no layer: expected what `save_pretrained` wrote")
            return FeatureEncoder.from_pretrained(name, settings["layer"])
        case "recognizer":
            return Recognizer.from_pretrained(name)
        case "compressor":
            return CtcCompressor.from_pretrained(name, load_tokenizer(Path(name) / BASE))
        case "repcodec":
            return RepCodec.from_pretrained(name, load_tokenizer(Path(name) / BASE))
    if (Path(name) / ENCODER).is_file():
        return SoundStream.from_pretrained(name)
    config = read_pretrained_json(name, "config.json")
    if not config and not Path(name).is_dir():
        raise FileNotFoundError(f"{name}: no such folder, and no hub model that can be reached; {SPELLINGS}")
    model_type = config.get("model_type")
    if model_type in PUBLISHED:
        return PublishedCodec.from_pretrained(name)
    if model_type == "whisper" or "conv_stride" in config:
        raise InputError(
            f"it is a {model_type} model: write features:{name} for its features, recognizer:{name} for text"
        )
    if "num_codebooks" in config and not model_type:
        units = load_discrete(Path(name) / UNITS) if (Path(name) / UNITS).is_dir() else None
        return SpeechCodec.from_pretrained(name, units=units)
    if "n_q" in config:
        return convert_speechtokenizer(name)
    found = f"a {model_type} model" if model_type else f"no audio tokenizer in {', '.join(config) or 'it'}"
    raise InputError(f"found {found}; {SPELLINGS}")


def load_recognizer(name: str) -> AudioTokenizer:
    """As `load_tokenizer`, but raises TokenizerError for a tokenizer that does not return text."""
    recognizer = load_tokenizer(name)
    if recognizer.frame_rate:
        raise TokenizerError(f"{name} gives no text: choose a speech recogniser, recognizer:FOLDER_OR_HUB_NAME")
    return recognizer
