"""Teacher features on disk: computed once for whole utterances, read again for every crop of training."""

import functools
import hashlib
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from tokenizer.audio import AudioError, load_audio
from tokenizer.corpus import Utterance
from tokenizer.files import atomic_file
from tokenizer.frames import frame_count


class FeatureCache:
    """Features of whole utterances by one teacher, one file an utterance: float16 [T, P], T = ceil(N / hop).

    Files are named by the recording's bytes (SHA-256) in a folder named by the teacher. So a corpus may be moved or
    renamed, while a changed recording or another teacher never meets an old entry. Teachers may share a folder.
    """

    def __init__(self, folder: str | Path, teacher_key: str, hop: int):
        """teacher_key: identity of the teacher, its `fingerprint`; hop: samples per frame."""
        self.folder, self.teacher_key, self.hop = Path(folder), teacher_key, hop

    @torch.no_grad()
    def fill(
        self,
        utterances: Sequence[Utterance],
        teacher: nn.Module,
        sample_rate: int = 16_000,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        """Compute what is missing of one process's share: teacher(waveform float [1, N]) -> float [1, T or more, P].

        A killed run goes on where it stopped. Recordings that cannot be used are skipped, with a warning that counts
        them. Raises ValueError for a teacher with too few frames, or values that float16 cannot hold.
        """
        share = utterances[process::processes]
        hashes = _Hashes(self.folder)
        skipped: list[AudioError] = []
        bar = tqdm(
            share,
            f"features {self.teacher_key}",
            unit="utt",
            disable=process > 0,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10,  # a log file needs no animation
        )
        try:
            for utterance in bar:
                try:
                    file = self._file(hashes[utterance.path])
                    if not file.exists():
                        _save_features(file, self._features(utterance, teacher, sample_rate))
                except AudioError as error:
                    skipped.append(error)
        finally:
            hashes.save(process)
        if skipped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(e.reason for e in skipped).items())
            message = f"{len(skipped)} of {len(share)} recordings have no features ({reasons}), first {skipped[0]}"
            warnings.warn(message, stacklevel=2)

    def crop(self, utterance: Utterance, start_frame: int, frames: int) -> Tensor:
        """Some frames of an utterance, float32 [frames, P], zeros beyond its end; no other frame is read.

        Raises AudioError (reasons: missing, no features) for a recording that `fill` has not seen as it is now.
        """
        file = self._file(self._hashes[utterance.path])
        if not file.exists():
            detail = f"no features of it in {file.parents[1]}: fill the cache, which skips recordings it cannot use"
            raise AudioError(utterance.path, "no features", detail)
        stored = np.load(file, mmap_mode="r")[start_frame : start_frame + frames]
        return F.pad(torch.from_numpy(stored.astype(np.float32)), (0, 0, 0, frames - len(stored)))

    @functools.cached_property
    def _hashes(self) -> "_Hashes":
        return _Hashes(self.folder)  # for crops, which come after all processes have filled their share

    def _file(self, content: str) -> Path:
        return self.folder / self.teacher_key / content[:2] / f"{content}.npy"  # folders of thousands, not of millions

    def _features(self, utterance: Utterance, teacher: nn.Module, sample_rate: int) -> np.ndarray:
        waveform = load_audio(utterance.path, sample_rate)
        frames = frame_count(len(waveform), self.hop)
        features = teacher(waveform[None].to(next(teacher.parameters()).device))[0, :frames].half()
        if len(features) < frames:
            raise ValueError(f"expected {frames} frames for {utterance.path} (hop {self.hop}), got {len(features)}")
        if not torch.isfinite(features).all():
            raise ValueError(f"features of {utterance.path} are NaN or beyond float16: this teacher cannot be cached")
        return features.cpu().numpy()


class _Hashes:
    """SHA-256 of files by path, remembered on disk while size and time of change stay: reading a corpus takes minutes.

    Every process writes a file of its own and reads those of all.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.known: dict[str, list] = {}
        for file in folder.glob("hashes_*.json"):
            self.known |= _read_json(file)
        self.new: dict[str, list] = {}

    def __getitem__(self, path: str) -> str:
        name, *state = _state(path)
        *known, content = self.known.get(name, [None])
        if known != state:
            content = _hash_content(name, *state)
            self.new[name] = [*state, content]
        return content

    def save(self, process: int) -> None:
        if self.new:
            file = self.folder / f"hashes_{process}.json"
            with atomic_file(file) as part:
                part.write_text(json.dumps(_read_json(file) | self.new), encoding="utf-8")


def _state(path: str) -> tuple[str, int, int]:
    """Path, size and time of change of a file: all that can be told without reading it."""
    try:
        state = os.stat(path)
    except OSError as error:
        raise AudioError(path, "missing", f"no such audio file ({error.strerror})") from error
    return os.path.abspath(path), state.st_size, state.st_mtime_ns


@functools.cache
def _hash_content(path: str, size: int, changed_ns: int) -> str:
    """SHA-256 of a file, read once a process unless it changes."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise AudioError(path, "unreadable", f"cannot be read ({error.strerror})") from error


def _save_features(file: Path, features: np.ndarray) -> None:
    with atomic_file(file) as part, part.open("wb") as stream:
        np.save(stream, features)


def _read_json(file: Path) -> dict[str, list]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
