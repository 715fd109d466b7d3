"""The demo's corpus: a plan that the seed alone decides, phone times that fit the sound, a folder never half-made."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile

from tokenizer.errors import InputError

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "synthesize_speech.py"
COUNTS = {"train": 300, "dev": 40, "test": 40}


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("synthesize_speech", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object, engine: bool = True) -> list:
    """Run the command with silence for an engine; returns the plans it was given to speak."""
    plans = []

    def speak(out: Path, plan: list, jobs: int) -> list[dict]:
        plans.append(plan)
        for utterance in plan:
            (out / utterance.path).parent.mkdir(parents=True, exist_ok=True)
            (out / utterance.path).touch()
        return [{"id": utterance.id, "duration_s": 1.0} for utterance in plan]

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "synthesize_all", speak)
        patch.setattr(recipe.importlib.util, "find_spec", lambda name: object() if engine else None)
        patch.setattr(sys, "argv", [str(RECIPE), *map(str, arguments), "--dev=2", "--test=2"])
        recipe.main()
    return plans


def test_splits_share_no_text_and_no_voice(recipe: ModuleType) -> None:
    plan = recipe.make_plan(seed=0, **COUNTS)
    by_split = {split: [u for u in plan if u.split == split] for split in COUNTS}
    assert {split: len(members) for split, members in by_split.items()} == COUNTS
    for of in ("text", "speaker", "id"):
        sets = [{getattr(u, of) for u in members} for members in by_split.values()]
        assert len(set.union(*sets)) == sum(map(len, sets)), of
    for split in ("dev", "test"):
        assert len({u.text for u in by_split[split]}) == COUNTS[split]  # only train may say a sentence twice


def test_the_plan_depends_on_the_seed(recipe: ModuleType) -> None:
    plan = recipe.make_plan(seed=3, **COUNTS)
    assert plan == recipe.make_plan(seed=3, **COUNTS)
    assert plan != recipe.make_plan(seed=4, **COUNTS)


def test_too_many_held_out_utterances_are_refused(recipe: ModuleType) -> None:
    with pytest.raises(SystemExit, match="grammar is too small"):
        recipe.make_plan(seed=0, train=1, dev=10**6, test=1)


def test_own_sentences_are_all_spoken_before_one_is_again(recipe: ModuleType) -> None:
    own = [f"SENTENCE NUMBER {i}" for i in range(100)]
    plan, default = recipe.make_plan(seed=0, own=own, **COUNTS), recipe.make_plan(seed=0, **COUNTS)
    spoken = [u.text for u in plan if u.split == "train"]
    assert sorted(spoken) == sorted(own * 3)
    held_out = [sorted(u.text for u in one if u.split != "train") for one in (plan, default)]
    assert held_out[0] == held_out[1]


def test_own_sentences_are_part_of_what_a_folder_holds(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file := tmp_path / "own.txt").write_text("ONE DAY\n\n  TWO DAYS \n")
    [plan] = call(recipe, monkeypatch, tmp_path / "out", "--train=2", f"--texts={file}")
    assert sorted(u.text for u in plan if u.split == "train") == ["ONE DAY", "TWO DAYS"]
    assert not call(recipe, monkeypatch, tmp_path / "out", "--train=2", f"--texts={file}")  # it is there
    with pytest.raises(InputError, match="choose another folder or delete"):
        call(recipe, monkeypatch, tmp_path / "out", "--train=2")
    file.write_text("\n \n")
    with pytest.raises(InputError, match=r"own\.txt holds no sentences"):
        call(recipe, monkeypatch, tmp_path / "other", "--train=2", f"--texts={file}")
    utterance = plan[0]
    with pytest.raises(InputError, match="finds nothing to say in"):
        recipe.frame_speech(np.zeros(100), [("_", 0)], utterance)


def test_jobs_do_not_change_the_plan(recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [call(recipe, monkeypatch, tmp_path / str(n), "--train=9", f"--jobs={n}") for n in (1, 3)]
    assert plans[0] == plans[1]
    assert len(plans[0][0]) == 13


def test_phone_times_move_with_the_trimmed_silence(recipe: ModuleType) -> None:
    rate = recipe.ENGINE_RATE
    utterance = recipe.Utterance("u", "dev", "A", "m3", 1.0, (0.0,) * 6, 150, 50, 50, lead_s=0.1, tail_s=0.05)
    wave = np.concatenate([np.zeros(4000), np.ones(3000), np.zeros(1000), np.ones(2000), np.zeros(500)])
    phones = [("_", 0), ("a", 4000), ("b", 5000), ("x", 7000), ("_", 7000), ("c", 8000), ("_", 10_000)]
    framed, ends = recipe.frame_speech(wave, phones, utterance)
    lead, tail = round(0.1 * rate), round(0.05 * rate)  # tail is more than the 500 samples the engine left
    np.testing.assert_array_equal(framed, np.pad(wave[4000:10_000], (lead, tail)))
    spoken = [("a", lead + 1000), ("b", lead + 3000), ("_", lead + 4000), ("c", lead + 6000)]
    assert ends == [("_", lead), *spoken, ("_", lead + 6000 + tail)]  # "x" has no length


def test_a_complete_corpus_is_kept_and_an_interrupted_one_is_made_again(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = tmp_path / "manifest.jsonl"
    assert len(call(recipe, monkeypatch, tmp_path, "--train=4")) == 1
    assert len(manifest.read_text().splitlines()) == 8
    assert call(recipe, monkeypatch, tmp_path, "--train=4") == []
    manifest.unlink()
    assert len(call(recipe, monkeypatch, tmp_path, "--train=4")) == 1
    names = {path.name for path in tmp_path.iterdir()} - {".lock"}
    assert names == {"audio", "claim.json", "corpus.json", "manifest.jsonl"}


def test_folder_of_other_arguments_is_refused(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(recipe, monkeypatch, tmp_path, "--train=8")
    with pytest.raises(InputError, match="holds a corpus made with .*'train': 8"):
        call(recipe, monkeypatch, tmp_path, "--train=4")
    assert len((tmp_path / "manifest.jsonl").read_text().splitlines()) == 12


def test_foreign_folder_is_refused(recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(InputError, match=r"holds what synthesize_speech did not write \(mine.txt\)"):
        call(recipe, monkeypatch, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_folder_is_no_key(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        call(recipe, monkeypatch, "output=corpus")
    assert "give the folder alone, corpus" in capsys.readouterr().err and not [*tmp_path.iterdir()]


def test_a_missing_engine_is_reported_with_the_remedy(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ImportError, match=r"pip install \"speechllm\[demo\]\""):
        call(recipe, monkeypatch, tmp_path / "corpus", engine=False)
    assert not (tmp_path / "corpus").exists()


def test_spoken_corpus(recipe: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader", reason="needs the demo extra")
    counts = ["--train=4", "--dev=2", "--test=2"]
    command = [sys.executable, str(RECIPE), str(tmp_path), *counts, "--seed=5", "--jobs=2"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    plan = recipe.make_plan(seed=5, train=4, dev=2, test=2)
    for key in ("id", "path", "text", "speaker", "split"):
        assert [line[key] for line in lines] == [getattr(u, key) for u in plan]
    for line in lines:
        wave, rate = soundfile.read(tmp_path / line["path"])
        symbols, ends = zip(*line["phones"], strict=True)
        assert rate == 16_000
        assert ends[-1] == line["duration_s"] == len(wave) / rate
        assert list(ends) == sorted(set(ends))
        assert symbols[0] == symbols[-1] == "_" and len(symbols) > 10
        assert np.abs(wave).max() == pytest.approx(0.7, abs=1e-3)
        quiet = wave[: int(ends[0] * rate) - 80], wave[int(ends[-2] * rate) + 80 :]  # 5 ms from the speech
        assert max(np.sqrt(np.mean(part**2)) for part in quiet) < 0.02  # the last phone dies away, so not zero
