"""A user's own class is a whole audio tokenizer of one kind, or refused with what is missing or wrong."""

from pathlib import Path

import pytest

from speechllm import Codec, TokenizerError, load_tokenizer

WHOLE = """
import torch
from speechllm import Codes

class Mine(torch.nn.Module):
    sample_rate, frame_rate = 16_000, 50.0
    num_codebooks, codebook_size = 2, 4
    codebooks = torch.arange(16.0).view(2, 4, 2)
    fingerprint = "mine"
    device = torch.device("cpu")

    def encode(self, waveform, lengths=None, layers=None):
        frames = waveform.shape[1] // 320
        ids = torch.zeros(len(waveform), layers or 2, frames, dtype=torch.long)
        return Codes(ids, torch.tensor([frames] * len(waveform)), torch.tensor([waveform.shape[1]] * len(waveform)))

    def decode(self, codes):
        return torch.zeros(len(codes), int(codes.samples.max()))

    def save_pretrained(self, folder):
        pass
"""
CHANGES = {
    "no codebooks": ("    codebooks =", "    books =", "it lacks codebooks"),
    "no size": ("num_codebooks, codebook_size =", "num_codebooks, size =", "it lacks codebook_size"),
    "none of the three": (
        "num_codebooks, codebook_size = 2, 4\n    codebooks =",
        "books =",
        "it lacks codebook_size, codebooks, num_codebooks",
    ),
    "no fingerprint": ("    fingerprint =", "    print =", "it lacks fingerprint"),
    "a hash": ('"mine"', "17", "fingerprint = 17, expected a text"),
    "no rate": ("16_000, 50.0", "16_000, 0.0", "frame_rate = 0.0, expected a number above 0"),
    "a rate of text": ("16_000, 50.0", "16_000, '50'", "frame_rate = '50', expected a number"),
    "another rate": ("16_000, 50.0", "16_000, 75.0", "50 frames for 1 s, expected 75 by its frame_rate"),
    "another shape": (".view(2, 4, 2)", ".view(4, 2, 2)", r"codebooks of shape \[4, 2, 2\]"),
    "two axes": (".view(2, 4, 2)", ".view(4, 4)", "codebooks = .*, expected a tensor float"),
    "codes too high": ("torch.zeros(len(waveform), layers or 2", "4 + torch.zeros(len(waveform), layers or 2", "0..3"),
    "all layers": ("layers or 2", "2", r"codes of shapes \[\[1, 2\], \[1, 2\]\]"),
    "no layers": (", layers=None):", "):\n        layers = None", "fails with TypeError: .*layers"),
    "text": ("return Codes(", "return str(", "fails with TypeError|an `encode` that returns str"),
    "an error": (
        "frames = waveform.shape[1] // 320",
        "frames = {}['x']",
        r"mine\.py, line 13: Mine fails with KeyError",
    ),
    "no Python": ("class Mine", "klass Mine", r"mine\.py, line 5: Mine fails with SyntaxError"),
    "arguments": ("    sample_rate,", "    def __init__(self, x): pass\n    sample_rate,", "fails with TypeError"),
}


def load(folder: Path, text: str) -> object:
    (folder / "mine.py").write_text(text)
    return load_tokenizer(f"{folder / 'mine.py'}:Mine")


def test_a_whole_class_is_a_codec(tmp_path: Path) -> None:
    assert isinstance(load(tmp_path, WHOLE), Codec)


@pytest.mark.parametrize("kind", CHANGES)
def test_a_class_that_is_not_whole_is_refused(tmp_path: Path, kind: str) -> None:
    old, new, message = CHANGES[kind]
    assert old in WHOLE
    with pytest.raises(TokenizerError, match=message) as caught:
        load(tmp_path, WHOLE.replace(old, new))
    assert "\n" not in str(caught.value)
