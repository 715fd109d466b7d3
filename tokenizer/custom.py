"""Audio tokenizers of users: a class in a file of their own, run and checked against the protocols."""

import math
import runpy
import traceback
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.interface import (
    AudioTokenizer,
    Codes,
    DiscreteTokenizer,
    Features,
    FeatureTokenizer,
    Transcripts,
)
from tokenizer.reading import one_line

TRIAL_S = 1.0  # length of the noise that is encoded to see what comes back
SLACK = 0.1  # share by which the number of frames may differ from the frame rate's, and two frames at the borders
EXAMPLE = "tokenizer/README.md has an example"


class TokenizerError(InputError):
    """A name that is no audio tokenizer; the message says what was found and which names are accepted."""


def load_class(file: str, name: str) -> AudioTokenizer:
    """An instance of the class `name` of a Python file, made without arguments. The file is run.

    Raises TokenizerError, with the line of the file, if it cannot be run, and for a class that is not complete: see
    `check_tokenizer`.
    """
    try:
        module = runpy.run_path(file)
        if name not in module:
            raise TokenizerError(f"{file} has no class {name}")
        audio_tokenizer = module[name]()
        check_tokenizer(audio_tokenizer, f"{name} of {file}")
    except (TokenizerError, ImportError, MemoryError):
        raise
    except InputError as error:
        raise TokenizerError(f"{name} of {file}: {error}") from error
    except Exception as error:  # of the user's own code
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        line = f", line {error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else '?'}"
        raise TokenizerError(f"{file}{line}: {name} fails with {type(error).__name__}: {one_line(error)}") from error
    return audio_tokenizer


def check_tokenizer(audio_tokenizer: Any, name: str) -> None:
    """Raise TokenizerError unless an object is a whole tokenizer of one kind and encodes noise as it says it does.

    A discrete tokenizer has num_codebooks, codebook_size and codebooks, and a codec `decode` as well; one of features
    has `width`; what has none of these returns text and has a frame rate of 0.
    """
    if lacking := _lacking(audio_tokenizer):
        raise TokenizerError(f"{name} is no audio tokenizer yet, it lacks {', '.join(lacking)}; {EXAMPLE}")
    discrete = isinstance(audio_tokenizer, DiscreteTokenizer)
    features = not discrete and isinstance(audio_tokenizer, FeatureTokenizer)
    wrong = [
        f"{member} = {_describe(getattr(audio_tokenizer, member))}, expected {expected}"
        for member, expected, holds in _expectations(discrete, features)
        if not holds(getattr(audio_tokenizer, member))
    ]
    if (
        discrete
        and not wrong
        and list(audio_tokenizer.codebooks.shape[:2])
        != [
            audio_tokenizer.num_codebooks,
            audio_tokenizer.codebook_size,
        ]
    ):
        wrong = [
            f"codebooks of shape {list(audio_tokenizer.codebooks.shape)}, expected [num_codebooks, codebook_size, D]"
        ]
    if not wrong:
        wrong = _trial(audio_tokenizer, Codes if discrete else Features if features else Transcripts)
    if wrong:
        raise TokenizerError(f"{name} is no audio tokenizer yet, it has {'; '.join(wrong)}; {EXAMPLE}")


def _lacking(audio_tokenizer: Any) -> list[str]:
    """The members that an object lacks, of the protocols it has a part of."""

    def missing(members: set[str]) -> list[str]:
        return sorted(member for member in members if not hasattr(audio_tokenizer, member))

    own = _members(DiscreteTokenizer) - _members(AudioTokenizer)
    if base := missing(_members(AudioTokenizer)):
        return base
    of_frames = not hasattr(audio_tokenizer, "width") and audio_tokenizer.frame_rate != 0
    return missing(own) if of_frames or len(missing(own)) < len(own) else []


def _describe(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _members(protocol: type) -> set[str]:
    return {member for member in vars(protocol) if not member.startswith("_")}


def _expectations(discrete: bool, features: bool) -> Iterator[tuple[str, str, Callable[[Any], bool]]]:
    """Members, what they should be, and the test of it."""

    def count(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 1

    def rate(value: Any) -> bool:
        return isinstance(value, Real) and 0 <= float(value) < math.inf and (value != 0) == (discrete or features)

    yield "sample_rate", "a whole number of Hz", count
    yield "frame_rate", "a number above 0" if discrete or features else "0 for text", rate
    yield "fingerprint", "a text that changes with the codes", lambda value: isinstance(value, str) and value != ""
    yield "device", "a torch.device", lambda value: isinstance(value, torch.device)
    for method in ("encode", "to", "parameters", "save_pretrained"):
        yield method, "a method", callable
    if discrete:
        yield "num_codebooks", "a whole number", count
        yield "codebook_size", "1 to 65536", lambda value: count(value) and value <= 65_536
        yield (
            "codebooks",
            "a tensor float [Q, K, D]",
            lambda x: isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 3,
        )
    if features:
        yield "width", "a whole number", count


@torch.no_grad()
def _trial(audio_tokenizer: Any, kind: Any) -> list[str]:
    """What is wrong with the encoding of a second of noise."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(1, round(TRIAL_S * audio_tokenizer.sample_rate), generator=generator)
    encoded: Any = audio_tokenizer.encode(noise.to(audio_tokenizer.device))
    if not isinstance(encoded, kind):
        return [f"an `encode` that returns {type(encoded).__name__}, expected {kind.__name__}"]
    if isinstance(encoded, Transcripts):
        return (
            [] if [type(text) for text in encoded.texts] == [str] else [f"texts {encoded.texts!r}, expected one text"]
        )
    if isinstance(encoded, Codes):
        encoded.require(audio_tokenizer.num_codebooks, audio_tokenizer.codebook_size)
        first = audio_tokenizer.encode(noise.to(audio_tokenizer.device), layers=1)
        shapes = [list(codes.ids.shape[:2]) for codes in (encoded, first)]
        if shapes != [[1, audio_tokenizer.num_codebooks], [1, 1]]:
            return [f"codes of shapes {shapes} for all layers and for one, expected [1, num_codebooks] and [1, 1]"]
    elif encoded.values.ndim != 3 or encoded.values.shape[2] != audio_tokenizer.width:
        return [f"features of shape {list(encoded.values.shape)}, expected [1, T, {audio_tokenizer.width}]"]
    frames, expected = int(encoded.lengths[0]), TRIAL_S * audio_tokenizer.frame_rate
    fewest = 0 if getattr(audio_tokenizer, "deduplicate", False) else (1 - SLACK) * expected - 2
    if not fewest <= frames <= (1 + SLACK) * expected + 2:
        return [f"{frames} frames for {TRIAL_S:g} s, expected {expected:g} by its frame_rate"]
    return []
