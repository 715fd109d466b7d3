"""An utterance before and after a codec: as sounds, as files, and as spectrograms and players in a report."""

import base64
import os
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from speechllm.reports.html import grid
from speechllm.reports.plots import spectrograms
from tokenizer.audio import audio_content, save_audio
from tokenizer.codec.speech_codec import SpeechCodec
from tokenizer.metrics.quality import layer_counts, reconstruct

AUDIO_BUDGET_BYTES = 640_000  # 16-bit audio of all players together; base64 adds a third
NAME_BYTES = 200  # of a file name, which most file systems limit to 255, with room for what is added
MAX_RECONSTRUCTIONS = 4  # in a report


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """One utterance before and after the codec: float [N] at `sample_rate` Hz, keyed by the number of codebooks."""

    name: str
    sample_rate: int
    original: np.ndarray
    reconstructions: dict[int, np.ndarray]

    @staticmethod
    def of(codec: SpeechCodec, name: str, waveform: Tensor) -> "Reconstruction":
        """A waveform float [N] decoded from 1, 2, 4, ... and all codebooks; the codec's mode is restored."""
        training = codec.training
        sounds = reconstruct(codec.eval(), waveform, layer_counts(codec))
        codec.train(training)
        decoded = {count: sound.numpy() for count, sound in sounds.items()}
        return Reconstruction(name, codec.sample_rate, waveform.cpu().numpy(), decoded)


def save_sounds(folder: str | Path, reconstruction: Reconstruction) -> None:
    """Write NAME_original.wav and NAME_<n>_codebooks.wav, 16-bit; a slash in the name becomes an underscore.

    NAME is cut to the length of a file name, and bytes that are not UTF-8 are left out.
    """
    sounds = {"original": reconstruction.original}
    sounds |= {f"{count}_codebooks": wave for count, wave in reconstruction.reconstructions.items()}
    name = os.fsencode(reconstruction.name.replace("/", "_"))[:NAME_BYTES].decode("utf-8", "ignore")
    for kind, waveform in sounds.items():
        save_audio(Path(folder) / f"{name}_{kind}.wav", torch.from_numpy(waveform), reconstruction.sample_rate)


def read_sounds(folder: str | Path) -> Reconstruction:
    """The first utterance, by name, that `save_sounds` wrote into a folder. Raises FileNotFoundError without any."""
    originals = sorted(Path(folder).glob("*_original.wav"))
    if not originals:
        raise FileNotFoundError(f"{folder} holds no NAME_original.wav: expected a folder that save_sounds wrote")
    name = originals[0].stem.removesuffix("_original")
    original, rate = soundfile.read(originals[0], dtype="float32")
    reconstructions = {}
    for file in Path(folder).glob("*_codebooks.wav"):
        if match := re.fullmatch(re.escape(name) + r"_(\d+)_codebooks", file.stem):
            reconstructions[int(match[1])] = soundfile.read(file, dtype="float32")[0]
    return Reconstruction(name, rate, original, dict(sorted(reconstructions.items())))


def spectrograms_and_players(reconstruction: Reconstruction) -> str:
    """HTML: spectrograms with a common colour scale, and a player for each sound."""
    if np.size(reconstruction.original) == 0:
        return ""
    sounds, rate = _shown(reconstruction), reconstruction.sample_rate
    shown, total = (np.size(wave) / rate for wave in (sounds["original"], reconstruction.original))
    caption = f"Utterance {escape(reconstruction.name)}, {shown:.2f} of {total:.2f} s, {rate:,} Hz."
    players = "".join(_player(name, wave, rate) for name, wave in sounds.items())
    return spectrograms(sounds, rate, caption) + grid(players, 280)


def _shown(reconstruction: Reconstruction) -> dict[str, np.ndarray]:
    """The original, then reconstructions from most to fewest codebooks, float [N], cut to limit the page's size."""
    counts = sorted((c for c, wave in reconstruction.reconstructions.items() if np.size(wave)), reverse=True)
    if len(counts) > MAX_RECONSTRUCTIONS:
        counts = [counts[i] for i in np.linspace(0, len(counts) - 1, MAX_RECONSTRUCTIONS).round().astype(int)]
    named = {"original": reconstruction.original}
    named |= {"1 codebook" if c == 1 else f"{c} codebooks": reconstruction.reconstructions[c] for c in counts}
    limit = min(AUDIO_BUDGET_BYTES // (2 * len(named)), np.size(reconstruction.original))
    return {name: np.nan_to_num(np.asarray(w, dtype=np.float32).ravel()[:limit]) for name, w in named.items()}


def _player(name: str, waveform: np.ndarray, sample_rate: int) -> str:
    data = base64.b64encode(audio_content(torch.from_numpy(waveform), sample_rate)).decode()
    return f'<div>{escape(name)}<audio controls src="data:audio/wav;base64,{data}"></audio></div>'
