"""Teacher features on disk: computed once for whole utterances, then read for every training crop."""

import functools
import json
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.audio import AudioError, hash_recording
from tokenizer.corpus import Utterance, load_utterance
from tokenizer.errors import InputError
from tokenizer.files import atomic_file, read_json, write_text
from tokenizer.frames import frame_count
from tokenizer.interface import DiscreteTokenizer
from tokenizer.prefetch import prefetch
from tokenizer.progress import progress_bar
from tokenizer.reading import reading

if TYPE_CHECKING:
    from accelerate import Accelerator


class UnitIds(nn.Module):
    """The codes of a tokenizer's first layer as features int32 [1, T, 1] of an utterance float [1, N], for a cache."""

    width = 2  # a whole number takes as much of a disk as two features

    def __init__(self, units: DiscreteTokenizer):
        super().__init__()
        self.units, self.hop = units, round(units.sample_rate / units.frame_rate)

    @property
    def fingerprint(self) -> str:
        return self.units.fingerprint

    def forward(self, waveform: Tensor) -> Tensor:
        return self.units.encode(waveform.to(self.units.device), layers=1).ids.transpose(1, 2).int()


class FeatureCache:
    """One teacher's features of whole utterances, one file per utterance: float16 [T, P], T = ceil(N / hop).

    Features that are whole numbers (`UnitIds`) are int32.

    Files are named by the SHA-256 of the recording, in a folder named by the teacher. So a corpus may be moved or
    renamed, but a changed recording or another teacher never finds an old entry. Teachers may share a folder.
    """

    def __init__(self, folder: str | Path, teacher_key: str, hop: int):
        """teacher_key: the `fingerprint` of the teacher; hop: samples per frame."""
        self.folder = Path(folder)
        self.teacher_key = teacher_key
        self.hop = hop

    @torch.no_grad()
    def fill(
        self,
        utterances: Sequence[Utterance],
        teacher: nn.Module,
        sample_rate: int = 16_000,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        """Compute the missing features of one process's share: teacher(float [1, N]) -> float [1, T or more, P].

        An interrupted run continues where it stopped. Recordings that cannot be used are skipped, with a warning that
        counts them. Raises ValueError for too few frames, InputError for values that float16 cannot represent.
        """
        share = utterances[process::processes]
        hashes = _Hashes(self.folder)
        skipped: list[AudioError] = []

        def read(utterance: Utterance) -> tuple[Path, Tensor | None] | AudioError:
            try:
                file = self._file(hashes[utterance.path])
                return file, None if _is_whole(file) else load_utterance(utterance, sample_rate)
            except AudioError as error:
                return error

        bar = progress_bar(share, f"features {self.teacher_key}", unit="utt")
        try:
            for utterance, found in zip(bar, prefetch(read, share), strict=True):
                if isinstance(found, AudioError):
                    skipped.append(found)
                    continue
                file, waveform = found
                if waveform is not None and not _is_whole(file):  # the same recording may occur twice
                    _save_features(file, self._features(utterance, waveform, teacher))
        finally:
            hashes.save(process)
        if skipped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(e.reason for e in skipped).items())
            message = f"{len(skipped)} of {len(share)} recordings have no features ({reasons}), first {skipped[0]}"
            warnings.warn(message, stacklevel=2)

    def crop(self, utterance: Utterance, start_frame: int, frames: int) -> Tensor:
        """Some frames of an utterance, float32 [frames, P], zeros after its end; reads no other frames.

        Raises AudioError (reasons: missing, no features) for a recording that `fill` has not processed as it is now.
        """
        file = self._file(self._hashes[utterance.path])
        if not file.exists():
            detail = f"no features of it in {file.parents[1]}: fill the cache, which skips recordings it cannot use"
            raise AudioError(utterance.path, "no features", detail)
        with reading(file, "teacher features [T, P]", "delete it and fill the cache again"):
            stored = _open_features(file)[start_frame : start_frame + frames]
        return F.pad(torch.from_numpy(stored.astype(np.float32)), (0, 0, 0, frames - len(stored)))

    @functools.cached_property
    def _hashes(self) -> "_Hashes":
        return _Hashes(self.folder)  # read once, for crops, when all processes have filled their share

    def _file(self, content: str) -> Path:
        return self.folder / self.teacher_key / content[:2] / f"{content}.npy"  # a folder of millions would be slow

    def size_gb(self, utterances: Sequence[Utterance], width: int, sample_rate: int = 16_000) -> float:
        """What the features of all these utterances take on the disk, by their stated durations; width: P."""
        frames = sum(frame_count(round(one.duration_s * sample_rate), self.hop) for one in utterances)
        return frames * width * np.dtype(np.float16).itemsize / 1e9

    def _features(self, utterance: Utterance, waveform: Tensor, teacher: nn.Module) -> np.ndarray:
        frames = frame_count(len(waveform), self.hop)
        features = teacher(waveform[None].to(next(teacher.parameters(), waveform).device))[0, :frames]
        if features.is_floating_point():
            features = features.half()
        if len(features) < frames:
            raise ValueError(f"expected {frames} frames for {utterance.path} (hop {self.hop}), got {len(features)}")
        if not torch.isfinite(features).all():
            raise InputError(f"features of {utterance.path} are NaN or beyond float16: this teacher cannot be cached")
        return features.cpu().numpy()


def fill_caches(
    folders: Mapping[str, str | None],
    teachers: Mapping[str, Any],
    utterances: Sequence[Utterance],
    sample_rate: int,
    accelerator: "Accelerator",
) -> dict[str, FeatureCache]:
    """The caches of those teachers that have a folder, by name; each process computes its share of what is missing."""
    caches, place = {}, {"process": accelerator.process_index, "processes": accelerator.num_processes}
    for name, teacher in teachers.items():
        if folder := folders[name]:
            caches[name] = FeatureCache(folder, teacher.fingerprint, teacher.hop)
            size_gb = caches[name].size_gb(utterances, teacher.width, sample_rate)
            accelerator.print(f"{name} features of {len(utterances)} utterances take {size_gb:.3g} GB in {folder}")
            caches[name].fill(utterances, teacher, sample_rate, **place)
    accelerator.wait_for_everyone()
    return caches


class _Hashes:
    """SHA-256 of files by path, stored on disk and valid until a file's size or modification time changes.

    Hashing a whole corpus takes minutes. Every process writes its own file and reads those of all processes.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.known: dict[str, list] = {}  # path: [size, modification time in ns, SHA-256]
        for file in folder.glob("hashes_*.json"):
            self.known |= read_json(file)
        self.new: dict[str, list] = {}

    def __getitem__(self, path: str) -> str:
        name, size, changed_ns = _stat(path)
        known = self.known.get(name)
        if known is not None and known[:2] == [size, changed_ns]:
            return known[2]
        content = _hash_content(name, size, changed_ns)
        self.new[name] = [size, changed_ns, content]
        return content

    def save(self, process: int) -> None:
        if self.new:
            file = self.folder / f"hashes_{process}.json"
            write_text(file, json.dumps(read_json(file) | self.new))


def _stat(path: str) -> tuple[str, int, int]:
    """Absolute path, size in bytes and modification time in ns of a file."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise AudioError(path, "missing", f"no such audio file ({error.strerror})") from error
    return os.path.abspath(path), stat.st_size, stat.st_mtime_ns


@functools.cache
def _hash_content(path: str, size: int, changed_ns: int) -> str:
    """SHA-256 of a file; each process reads it once unless it changes."""
    return hash_recording(path)


def _open_features(file: Path) -> np.ndarray:
    """The features [T, P] in a file, memory-mapped; ValueError for another array."""
    features = np.load(file, mmap_mode="r", allow_pickle=False)
    if features.ndim != 2 or features.dtype not in (np.float16, np.int32):
        raise ValueError(f"{features.dtype} {list(features.shape)}")
    return features


def _is_whole(file: Path) -> bool:
    """Whether there is a file of features that was not cut short, as by a full disk and a power cut."""
    try:
        return len(_open_features(file)) > 0
    except (OSError, ValueError, EOFError):
        return False


def _save_features(file: Path, features: np.ndarray) -> None:
    with atomic_file(file) as part, part.open("wb") as stream:
        np.save(stream, features)
