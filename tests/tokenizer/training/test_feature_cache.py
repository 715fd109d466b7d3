"""Teacher features on disk: equal to the teacher's, found by content, and never computed twice."""

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from speechllm import AudioError, CorpusError, InputError, Utterance, load_audio
from tokenizer.training import feature_cache
from tokenizer.training.crops import Crops
from tokenizer.training.feature_cache import FeatureCache
from tokenizer.training.small_teachers import save_ecapa, small_hubert
from tokenizer.training.teachers import SemanticTeacher, SpeakerTeacher

RATE, HOP = 16_000, 320
SECONDS = (0.9, 0.4, 0.33, 0.9)
ECAPA = {
    "channels": [8, 8, 8, 8, 24],
    "kernel_sizes": [5, 3, 3, 3, 1],
    "dilations": [1, 2, 3, 4, 1],
    "attention_channels": 8,
    "lin_neurons": 6,
    "se_channels": 8,
    "res2net_scale": 4,
}


class CountingTeacher(nn.Module):
    """A teacher that counts its calls; features of a frame: its number, counted from 1, and its loudness."""

    def __init__(self, hop: int = HOP, extra: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.hop, self.extra, self.calls = hop, extra, 0

    def forward(self, waveform: Tensor) -> Tensor:
        self.calls += 1
        frames = math.ceil(waveform.shape[1] / self.hop)
        padded = nn.functional.pad(waveform, (0, frames * self.hop - waveform.shape[1]))
        loudness = padded.view(1, frames, self.hop).square().mean(2)
        features = torch.stack([torch.arange(frames).expand(1, -1) + 1, 100 * loudness], 2)
        return nn.functional.pad(features, (0, 0, 0, self.extra), value=-1)


@pytest.fixture
def utterances(tmp_path: Path, noise: Callable[..., Tensor]) -> list[Utterance]:
    (tmp_path / "corpus").mkdir()
    found = []
    for index, seconds in enumerate(SECONDS):
        path = tmp_path / "corpus" / f"{index}.flac"
        soundfile.write(path, noise(round(seconds * RATE), seed=index)[0].numpy(), RATE)
        found.append(Utterance(path.stem, str(path), seconds, "train"))
    return found


def filled(folder: Path, utterances: list[Utterance], teacher: nn.Module, key: str = "key") -> FeatureCache:
    cache = FeatureCache(folder, key, teacher.hop)
    cache.fill(utterances, teacher)
    return cache


def whole(utterance: Utterance) -> int:
    return math.ceil(round(utterance.duration_s * RATE) / HOP)


# ---- what is stored


def test_features_read_back_are_the_teachers_in_half_precision(tmp_path: Path, utterances: list[Utterance]) -> None:
    torch.manual_seed(0)
    teacher = SemanticTeacher(small_hubert(hidden_size=16, layers=1))
    cache = FeatureCache(tmp_path / "cache", teacher.fingerprint, teacher.hop)
    cache.fill(utterances, teacher)
    for utterance in utterances:
        expected = teacher(load_audio(utterance.path)[None])[0]
        found = cache.crop(utterance, 0, len(expected))
        assert found.dtype == torch.float32
        assert torch.equal(found, expected.half().float())


def test_the_last_frame_of_a_speaker_teacher_is_dropped(tmp_path: Path, utterances: list[Utterance]) -> None:
    from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN

    torch.manual_seed(0)
    (tmp_path / "ecapa").mkdir()
    save_ecapa(ECAPA_TDNN(20, **ECAPA), ECAPA, 20, ["a"], tmp_path / "ecapa")
    teacher = SpeakerTeacher.from_pretrained(tmp_path / "ecapa")
    cache = FeatureCache(tmp_path / "cache", teacher.fingerprint, teacher.hop)
    cache.fill(utterances[1:2], teacher)
    expected = teacher(load_audio(utterances[1].path)[None])[0]
    assert len(expected) == 41
    assert torch.equal(cache.crop(utterances[1], 0, 40), expected[:40].half().float())
    assert not cache.crop(utterances[1], 40, 2).any()


def test_a_part_is_the_slice_of_the_whole_and_zero_beyond_the_end(tmp_path: Path, utterances: list[Utterance]) -> None:
    cache = filled(tmp_path / "cache", utterances, CountingTeacher(extra=1))
    assert cache.crop(utterances[2], 3, 5)[:, 0].tolist() == [4, 5, 6, 7, 8]
    assert cache.crop(utterances[2], 14, 5)[:, 0].tolist() == [15, 16, 17, 0, 0]  # 0.33 s: 17 frames
    assert torch.equal(cache.crop(utterances[2], 17, 2), torch.zeros(2, 2))
    assert torch.equal(cache.crop(utterances[2], 40, 2), torch.zeros(2, 2))


# ---- how an entry is found


def test_nothing_is_computed_twice(tmp_path: Path, utterances: list[Utterance]) -> None:
    teacher = CountingTeacher()
    filled(tmp_path / "cache", utterances, teacher)
    assert teacher.calls == len(utterances)
    filled(tmp_path / "cache", utterances, teacher)
    assert teacher.calls == len(utterances)


def test_a_killed_run_continues_where_it_stopped(tmp_path: Path, utterances: list[Utterance]) -> None:
    class Killed(CountingTeacher):
        def forward(self, waveform: Tensor) -> Tensor:
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().forward(waveform)

    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path / "cache", utterances, Killed())
    assert not list(tmp_path.rglob("*.part"))
    teacher = CountingTeacher()
    cache = filled(tmp_path / "cache", utterances, teacher)
    assert teacher.calls == len(utterances) - 2
    assert all(cache.crop(u, 0, whole(u))[-1, 0] == whole(u) for u in utterances)


def test_a_moved_and_renamed_corpus_keeps_its_features(tmp_path: Path, utterances: list[Utterance]) -> None:
    teacher = CountingTeacher()
    cache = filled(tmp_path / "cache", utterances, teacher)
    (tmp_path / "corpus").rename(tmp_path / "elsewhere")
    Path(tmp_path / "elsewhere" / "1.flac").rename(tmp_path / "elsewhere" / "renamed.flac")
    moved = replace(utterances[1], path=str(tmp_path / "elsewhere" / "renamed.flac"))
    assert cache.crop(moved, 0, 20)[-1, 0] == 20
    cache.fill([moved], teacher)
    assert teacher.calls == len(utterances)


def test_a_changed_recording_does_not_meet_its_old_features(tmp_path: Path, utterances: list[Utterance]) -> None:
    teacher = CountingTeacher()
    cache = filled(tmp_path / "cache", utterances, teacher)
    before = cache.crop(utterances[0], 0, 45)
    shutil.copy(utterances[3].path, utterances[0].path)  # of the same length
    assert torch.equal(cache.crop(utterances[0], 0, 45), cache.crop(utterances[3], 0, 45))
    waveform = load_audio(utterances[0].path)
    soundfile.write(utterances[0].path, 0.5 * waveform.numpy(), RATE)
    with pytest.raises(AudioError, match=r"0\.flac: no features of it in .*cache.key: fill the cache"):
        cache.crop(utterances[0], 0, 45)
    cache.fill(utterances, teacher)
    assert teacher.calls == len(utterances) + 1
    assert not torch.equal(cache.crop(utterances[0], 0, 45), before)


def test_two_teachers_share_a_folder_and_not_their_features(tmp_path: Path, utterances: list[Utterance]) -> None:
    one, other = CountingTeacher(), CountingTeacher(hop=160)
    first = filled(tmp_path / "cache", utterances, one, "one")
    second = FeatureCache(tmp_path / "cache", "other", 160)
    with pytest.raises(AudioError, match="no features"):
        second.crop(utterances[0], 0, 1)
    second.fill(utterances, other)
    assert one.calls == other.calls == len(utterances)
    assert first.crop(utterances[1], 0, 40)[:, 0].count_nonzero() == 20
    assert second.crop(utterances[1], 0, 40)[:, 0].count_nonzero() == 40


def test_a_recording_is_read_for_its_hash_only_when_it_is_new_or_has_changed(
    tmp_path: Path, utterances: list[Utterance], monkeypatch: pytest.MonkeyPatch
) -> None:

    filled(tmp_path / "cache", utterances, CountingTeacher())
    read: list[str] = []
    original = feature_cache._hash_content.__wrapped__

    def counting(path: str, size: int, changed_ns: int) -> str:
        read.append(Path(path).name)
        return original(path, size, changed_ns)

    monkeypatch.setattr(feature_cache, "_hash_content", counting)  # as in a new process: nothing in memory
    os.utime(utterances[1].path, ns=(0, 0))  # only looks changed
    teacher = CountingTeacher()
    filled(tmp_path / "cache", utterances, teacher)
    assert read == ["1.flac"] and teacher.calls == 0
    filled(tmp_path / "cache", utterances, teacher)
    assert read == ["1.flac"]


def test_a_hash_is_computed_once_a_process(tmp_path: Path, utterances: list[Utterance]) -> None:

    cache = filled(tmp_path / "cache", utterances, CountingTeacher())
    cache.crop(utterances[0], 0, 1)
    misses = feature_cache._hash_content.cache_info().misses
    cache.crop(utterances[0], 5, 1)
    filled(tmp_path / "other", utterances, CountingTeacher())
    assert feature_cache._hash_content.cache_info().misses == misses


def test_crops_know_the_hashes_all_processes_wrote(
    tmp_path: Path, utterances: list[Utterance], monkeypatch: pytest.MonkeyPatch
) -> None:

    for process in range(2):
        FeatureCache(tmp_path / "cache", "key", HOP).fill(utterances, CountingTeacher(), process=process, processes=2)
    read: list[str] = []
    monkeypatch.setattr(feature_cache, "_hash_content", lambda path, *state: read.append(path) or "unknown")
    cache = FeatureCache(tmp_path / "cache", "key", HOP)  # as in a new process: nothing in memory
    assert all(cache.crop(u, 0, whole(u))[-1, 0] == whole(u) for u in utterances)
    assert not read
    os.utime(utterances[1].path, ns=(0, 0))
    with pytest.raises(AudioError, match="no features"):
        cache.crop(utterances[1], 0, 1)
    assert read == [utterances[1].path]


# ---- several processes, and recordings that cannot be used


def test_processes_share_the_work(tmp_path: Path, utterances: list[Utterance]) -> None:
    teachers = [CountingTeacher(), CountingTeacher()]
    cache = FeatureCache(tmp_path / "cache", "key", HOP)
    for process, teacher in enumerate(teachers):
        cache.fill(utterances, teacher, process=process, processes=2)
    assert [teacher.calls for teacher in teachers] == [2, 2]
    alone = CountingTeacher()
    cache.fill(utterances, alone)
    assert alone.calls == 0
    assert all(cache.crop(u, 0, whole(u))[-1, 0] == whole(u) for u in utterances)


def test_unusable_recordings_are_skipped_and_counted(tmp_path: Path, utterances: list[Utterance]) -> None:
    (tmp_path / "broken.wav").write_text("not a sound")
    soundfile.write(tmp_path / "silent.wav", np.zeros(RATE), RATE)
    bad = [Utterance(n, str(tmp_path / f"{n}.wav"), 1.0, "train") for n in ("gone", "broken", "silent", "lost")]
    expected = r"4 of 8 recordings have no features \(2 missing, 1 unreadable, 1 silent\), first .*gone\.wav: no such"
    with pytest.warns(UserWarning, match=expected):
        cache = filled(tmp_path / "cache", [*bad, *utterances], CountingTeacher())
    assert cache.crop(utterances[0], 0, 1)[0, 0] == 1
    for utterance in bad:
        with pytest.raises(AudioError, match=f"{utterance.id}.wav: no (such audio file|features)"):
            cache.crop(utterance, 0, 1)


def test_a_teacher_with_too_few_frames_or_too_large_values_is_refused(
    tmp_path: Path, utterances: list[Utterance]
) -> None:
    with pytest.raises(ValueError, match=r"expected 90 frames for .*0\.flac \(hop 160\), got 45"):
        FeatureCache(tmp_path, "a", 160).fill(utterances, CountingTeacher(hop=320))

    class Loud(CountingTeacher):
        def forward(self, waveform: Tensor) -> Tensor:
            return 1e5 * super().forward(waveform)

    with pytest.raises(InputError, match="beyond float16"):
        FeatureCache(tmp_path, "b", HOP).fill(utterances, Loud())
    assert not list(tmp_path.rglob("*.npy"))


# ---- crops


def test_a_crop_comes_with_the_features_of_its_place(tmp_path: Path, utterances: list[Utterance]) -> None:
    """Number and loudness of a frame identify its samples."""
    fine, coarse = (
        filled(tmp_path, utterances, CountingTeacher(160), "a"),
        filled(tmp_path, utterances, CountingTeacher(320), "b"),
    )
    crops = Crops(utterances, 0.4, seed=1, caches={"fine": fine, "coarse": coarse})
    starts = set()
    for index in range(20):
        item = crops[index]
        assert item["coarse"].shape == (20, 2) and item["fine"].shape == (40, 2)
        for name, hop in (("coarse", 320), ("fine", 160)):
            loudness = 100 * item["waveform"].view(-1, hop).square().mean(1)
            torch.testing.assert_close(item[name][:, 1], loudness, atol=1e-5, rtol=1e-3)
        first = int(item["coarse"][0, 0]) - 1
        assert item["fine"][0, 0] == 2 * first + 1
        starts.add(first)
    assert 0 in starts and len(starts) > 5


def test_an_utterance_of_one_crop_has_the_features_a_teacher_gives_for_the_crop(
    tmp_path: Path, utterances: list[Utterance]
) -> None:
    torch.manual_seed(0)
    teacher = SemanticTeacher(small_hubert(hidden_size=16, layers=1))
    crops = Crops(utterances[1:2], 0.4, caches={"semantic": filled(tmp_path, utterances, teacher)})
    for index in range(3):
        item = crops[index]
        assert torch.equal(item["semantic"], teacher(item["waveform"][None])[0].half().float())


def test_features_come_in_batches_from_other_processes_with_crops_on_whole_frames(
    tmp_path: Path, utterances: list[Utterance]
) -> None:
    caches = {"semantic": filled(tmp_path, utterances, CountingTeacher())}
    crops = Crops(utterances, 0.4, caches=caches)
    loader = DataLoader(crops, batch_sampler=[[0, 1, 2], [3, 4, 5]], num_workers=1)
    for first, batch in zip((0, 3), loader, strict=True):
        assert batch["semantic"].shape == (3, 20, 2)
        for i in range(3):
            assert torch.equal(batch["waveform"][i], crops[first + i]["waveform"])
            assert torch.equal(batch["semantic"][i], crops[first + i]["semantic"])


def test_a_recording_without_features_is_skipped_in_training(tmp_path: Path, utterances: list[Utterance]) -> None:
    crops = Crops(utterances, 0.2, caches={"semantic": filled(tmp_path, utterances[:3], CountingTeacher())})
    with pytest.warns(UserWarning, match=r"skipped: .*3\.flac: no features"):
        assert {crops[index]["utterance"] for index in range(4)} == {0, 1, 2}


@pytest.mark.filterwarnings("ignore:skipped")
def test_an_empty_cache_says_what_to_do(tmp_path: Path, utterances: list[Utterance]) -> None:
    with pytest.raises(CorpusError, match=r"recordings in a row .* no features of it in .*: fill the cache"):
        Crops(utterances, 0.2, caches={"semantic": FeatureCache(tmp_path, "key", HOP)})[0]


@pytest.mark.parametrize("kind", ["cut", "empty", "objects"])
def test_features_that_are_broken_are_named_and_computed_again(
    tmp_path: Path, utterances: list[Utterance], kind: str
) -> None:
    cache = filled(tmp_path / "cache", utterances[:1], CountingTeacher())
    expected = cache.crop(utterances[0], 0, 9)
    (file,) = (tmp_path / "cache").rglob("*.npy")
    if kind == "objects":
        np.save(file, np.array([{}], object), allow_pickle=True)
    else:
        file.write_bytes(file.read_bytes()[: 100 if kind == "cut" else 0])
    with pytest.raises(InputError, match=f"{file.name} is .*delete it and fill the cache again"):
        cache.crop(utterances[0], 0, 9)
    assert torch.equal(
        filled(tmp_path / "cache", utterances[:1], CountingTeacher()).crop(utterances[0], 0, 9), expected
    )
