"""The comparison: its plan, refused settings, a complete one on tiny models, and its page."""

import json
import re
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, wait
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile
import yaml

from speechllm import ConfigError, CorpusError, InputError, RunError, paired_bootstrap, word_error_rate
from speechllm.evaluation.comparison import (
    comparison_tables,
    difference_table,
    emotion_table,
    pool_emotion,
    pool_recognition,
    without_shares,
)
from speechllm.evaluation.error_rates import seeds_error_rate
from speechllm.evaluation.guidance import guidance, overlap
from speechllm.evaluation.tables import markdown
from speechllm.reports.comparison_page import write_comparison
from speechllm.runs import stages as stages_module
from speechllm.runs.config import load_config
from speechllm.runs.machine import available_cpus
from speechllm.runs.stages import Stages
from tokenizer.files import write_jsonl

ROOT = Path(__file__).parents[2]
RATE = 16_000
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
ASR = {
    "model": None,
    "splits": ["train"],
    "steps": 2,
    "batch_tokens": 200,
    "warmup": 1,
    "precision": "no",
    "small": {**SMALL, "text_tokens": 300, "text_steps": 1, "num_key_value_heads": 1},
}


def markdown_of(results: dict) -> str:
    return markdown(comparison_tables(results))


@pytest.fixture
def compare(recipe: Callable[[str], ModuleType]) -> ModuleType:
    return recipe("compare.py")


@pytest.fixture
def config_of(compare: ModuleType, tmp_path: Path) -> Callable[..., object]:
    """A comparison's configuration from keys, checked as that of a command line."""

    def make(**keys: object) -> object:
        file = tmp_path / "compare.yaml"
        file.write_text(yaml.safe_dump({"data": "corpus", "output": str(tmp_path / "run"), **keys}))
        return load_config(compare.CompareConfig, file)

    return make


# ---- configuration


def test_all_problems_of_the_configuration_are_reported_at_once(config_of: Callable[..., object]) -> None:
    systems = [
        {"name": "two", "train": [], "tokenizer": "folder"},
        {"name": "none"},
        {"name": "copy", "like": "nobody"},
        {"name": "text", "tokenizer": "recognizer:{recognizer}", "tasks": ["quality"]},
        {"name": "a/b", "tokenizer": "folder"},
    ]
    with pytest.raises(ConfigError) as error:
        config_of(systems=systems, tasks=["asr", "asr"], seeds=[])
    for part in (
        "a/b",
        "tasks must be without repetitions, got ['asr', 'asr']",
        "seeds must be not empty, got []",
        "missing key asr",
        "missing key codec",
        "missing key recognizer",
        "two: expected one of train, units, tokenizer, like, got ['train', 'tokenizer']",
        "none: expected one of train, units, tokenizer, like, got none",
        "copy: like must name a system",
        "text: does not support quality, only asr",
    ):
        assert part in str(error.value)


def test_commands_are_checked_before_the_first_one_runs(
    compare: ModuleType, config_of: Callable[..., object], tmp_path: Path
) -> None:
    (tmp_path / "asr.yaml").write_text(yaml.safe_dump(ASR))
    systems = [{"name": "a", "tokenizer": "folder", "asr": ["layer=2"]}, {"name": "b", "like": "a", "asr": ["init=no"]}]
    config = config_of(systems=systems, tasks=["asr"], asr=str(tmp_path / "asr.yaml"))
    with pytest.raises(RunError) as error:
        compare.main(config)
    assert "[a: asr 0]" in str(error.value) and "did you mean layers" in str(error.value)
    assert "[b: asr 0]" in str(error.value) and "init must be one of" in str(error.value)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"claim.json", ".lock"}  # nothing was written


def test_a_split_that_a_corpus_lacks_is_reported_before_anything_runs(
    compare: ModuleType, config_of: Callable[..., object], corpus: Path
) -> None:
    keys = {"data": str(corpus), "tasks": ["quality"], "quality_splits": ["nowhere"], "evaluation_speaker": None}
    with pytest.raises(RunError) as error:
        compare.main(config_of(systems=[{"name": "a", "tokenizer": "folder"}], **keys))
    place = '[a: quality] eval_codec.py splits=["nowhere"]'
    assert f"{place}: {corpus} has no split nowhere; it has test, train\n" in str(error.value)
    assert {path.name for path in (corpus / "run").iterdir()} == {"claim.json", ".lock"}  # nothing was written


def test_splits_are_reported_with_stage_key_and_file_and_can_be_changed(
    compare: ModuleType, config_of: Callable[..., object], corpus: Path, tmp_path: Path
) -> None:
    asr, codec, speaker = (str(tmp_path / f"{name}.yaml") for name in ("asr", "codec", "speaker"))
    Path(asr).write_text(yaml.safe_dump({**ASR, "splits": ["train-other-500"]}))
    Path(codec).write_text(yaml.safe_dump({"splits": ["train"], "dev_splits": ["dev-clean"]}))
    Path(speaker).write_text(yaml.safe_dump({"kind": "speaker", "splits": ["train"], "dev_splits": ["dev"]}))
    keys = {"data": [str(corpus)], "tasks": ["asr", "quality"], "asr": asr, "codec": codec}
    keys |= {"evaluation_speaker": speaker, "systems": [{"name": "a", "train": []}, {"name": "b", "train": []}]}

    def check(**changes: list[str]) -> None:
        config = config_of(**keys, changes=changes)
        Stages(tmp_path, compare.RECIPES).check(compare.plan(config, tmp_path / "run"), compare.CHANGES)

    with pytest.raises(RunError) as error:
        check()
    ends = f"{corpus} has no split {{}}; it has test, train"
    assert str(error.value).split("\n") == [
        f"[evaluation speaker] train_teacher.py, dev_splits in {speaker}: {ends.format('dev')}",
        f"[a: tokenizer; b: tokenizer] train_tokenizer.py, dev_splits in {codec}: {ends.format('dev-clean')}",
        f"[a: asr 0; b: asr 0] train_asr.py, splits in {asr}: {ends.format('train-other-500')}",
        compare.CHANGES,
    ]
    changes = {"evaluation_speaker": ["dev_splits=test"], "codec": ["dev_splits=test"], "asr": ["splits=[train]"]}
    check(**changes)
    with pytest.raises(
        RunError, match=r"\[a: asr 0; b: asr 0\] train_asr.py splits=.*: train is not encoded, only test"
    ):
        check(**changes, codes=["splits=test"])
    with pytest.raises(RunError, match=r"(?s)\[a: asr 0; b: asr 0\] train_asr.py: .* in .*asr.yaml:.*key stepz"):
        check(**{**changes, "asr": ["splits=[train]", "stepz=1"]})


def test_changes_come_after_a_shared_configuration_and_before_those_of_a_system(
    compare: ModuleType, config_of: Callable[..., object]
) -> None:
    stages = (
        "codec units codes asr_codes emotion_codes content quality conversion emotion asr asr_test recognizer".split()
    )
    stages += ["semantic_teacher", "speaker_teacher", "evaluation_speaker"]
    own = {"asr": ["x=own"], "emotion": ["x=own"], "conversion": ["x=own"]}
    systems = [{"name": "a", "train": ["x=own"], **own}, {"name": "u", "units": ["x=own"]}]
    systems += [{"name": "d", "tokenizer": "recognizer:{recognizer}"}]
    teachers = {name: f"{name}.yaml" for name in ("semantic_teacher", "speaker_teacher", "recognizer")}
    keys = {"codec": "c.yaml", "emotion": "e.yaml", "asr": "r.yaml", "asr_data": "w", "emotion_data": ["r", "s"]}
    keys |= {"systems": systems, "tasks": list(compare.TASKS), "evaluation_speaker": "j.yaml", **teachers}
    before = compare.plan(config_of(**keys), Path("run"))
    after = compare.plan(config_of(**keys, changes={stage: [f"of={stage}"] for stage in stages}), Path("run"))
    added = {stage: [word for word in words if word.startswith("of=")] for stage, words in after.items()}
    assert {stage: [word for word in words if word[:3] != "of="] for stage, words in after.items()} == before
    expected = {"a: tokenizer": "codec", "u: tokenizer": "units", "a: codes": "codes", "u: codes": "codes"}
    expected |= {f"{name}: asr_codes": "asr_codes" for name in "aud"}
    expected |= {f"{name}: emotion_codes": "emotion_codes" for name in "au"}
    expected |= {f"{name}: content": "content" for name in "au"}
    expected |= {"a: quality": "quality", "a: conversion": "conversion"}
    expected |= {f"{name}: emotion 0": "emotion" for name in "au"} | {f"{name}: asr 0": "asr" for name in "aud"}
    expected |= {f"{name}: asr 0, test": "asr_test" for name in "aud"}
    expected |= {name.replace("_", " "): name for name in (*teachers, "evaluation_speaker")}
    assert added == {stage: [f"of={name}"] for stage, name in expected.items()}
    last = [words[-2:] for words in after.values() if words[-1] == "x=own"]
    assert len(last) == 5 and all(word.startswith("of=") for word, _ in last)
    assert 'data=["r", "s"]' in after["a: emotion_codes"]


def test_the_comparison_at_the_papers_size_would_be_accepted(
    compare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libri, ravdess = tmp_path / "libri", tmp_path / "ravdess"
    for folder, splits in ((libri, ("train-other-500", "dev-clean", "test-clean")), (ravdess, ("train",))):
        rows = [{"path": f"{split}.wav", "duration_s": 1, "split": split} for split in splits]
        write_jsonl(folder / "manifest.jsonl", rows)
        for row in rows:
            (folder / row["path"]).touch()
    words = [f"data={libri}", f"emotion_data={ravdess}", f"conversion_data={ravdess}", f"output={tmp_path / 'run'}"]
    config = load_config(compare.CompareConfig, compare.RECIPES.parent / "configs/compare/paper.yaml", words)
    plan = compare.plan(config, tmp_path / "run")
    Stages(tmp_path, compare.RECIPES).check(plan)
    assert len([stage for stage in plan if stage.endswith("asr 0, test")]) == 3
    changed = load_config(
        compare.CompareConfig,
        compare.RECIPES.parent / "configs/compare/paper.yaml",
        [*words, "changes.codec=splits=train-clean-100,steps=35700"],
    )
    with pytest.raises(RunError, match=r"; ours: tokenizer\] train_tokenizer.py splits=train-clean-100: .* no split"):
        Stages(tmp_path, compare.RECIPES).check(compare.plan(changed, tmp_path / "run"))


def test_a_corpus_without_emotions_is_refused_before_anything_is_trained(
    compare: ModuleType, config_of: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stages, "check", lambda *_: None)
    monkeypatch.setattr(Stages, "run", lambda *_: pytest.fail("began"))
    (tmp_path / "a.wav").touch()
    (tmp_path / "manifest.jsonl").write_text('{"path": "a.wav", "duration_s": 1, "id": "03-01-05-01-02-02-16"}\n')
    compare.require_emotions([str(tmp_path)])
    (tmp_path / "manifest.jsonl").write_text('{"path": "a.wav", "duration_s": 1}\n')
    keys = {"tasks": ["emotion"], "emotion": "e.yaml", "data": str(tmp_path), "output": str(tmp_path / "run")}
    with pytest.raises(CorpusError, match="no name of RAVDESS, which the task emotion needs: set emotion_data"):
        compare.main(config_of(systems=[{"name": "a", "tokenizer": "x"}], **keys))


@pytest.mark.parametrize("name", ["exp #2", "12:30", "a, b", "it's", 'a "b"', "a=b", "a\nb", "[x]", "caf\udce9"])
def test_paths_reach_the_recipes_as_they_are(
    compare: ModuleType,
    config_of: Callable[..., object],
    config_class: Callable[[str], type],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / name
    file.write_text("model: null\n")
    monkeypatch.chdir(tmp_path)  # where the corpus is: what is there is no list, whatever its name looks like
    systems = [{"name": name, "tokenizer": f"features:{name}#1"}, {"name": "units", "units": []}]
    keys = {"tasks": ["asr", "content"], "asr": str(file), "data": name, "train_splits": [name, "b"]}
    config = config_of(systems=systems, semantic_teacher=f"/{name}", output=f"run/{name}", **keys)
    loaded = {}
    for stage, (recipe, *words) in compare.plan(config, Path(config.output)).items():
        file = words.pop(0).removeprefix("--config=") if words[0].startswith("--config=") else None
        loaded[stage] = load_config(config_class(recipe), file, words)
    run = f"run/{name}"
    encoded, units, trained = (loaded[f"{stage}"] for stage in (f"{name}: codes", "units: tokenizer", f"{name}: asr 0"))
    assert (encoded.codec, encoded.data, encoded.output) == (f"features:{name}#1", name, f"{run}/{name}/codes")
    assert (units.model, units.splits, units.output) == (f"/{name}", [name, "b"], f"{run}/units/tokenizer")
    assert (trained.model, trained.codes, trained.output) == (None, encoded.output, f"{run}/{name}/asr_0")


def test_the_baseline_stays_with_the_system_it_was_measured_with(
    compare: ModuleType, config_of: Callable[..., object], tmp_path: Path
) -> None:
    def hosts(*names: str) -> list[str]:
        systems = [{"name": name, "tokenizer": "folder"} for name in names]
        plan = compare.plan(config_of(systems=systems, tasks=["content"]), tmp_path)
        return [stage for stage, words in plan.items() if "baseline=true" in words]

    assert hosts("a", "b") == ["a: content"]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "content.json").write_text(json.dumps({"config": {"baseline": True}}))
    assert hosts("new", "a", "b") == ["a: content"]


def test_the_speaker_evaluator_and_the_settings_of_systems_are_used(
    compare: ModuleType, config_of: Callable[..., object]
) -> None:
    systems = [{"name": "a", "train": [], "conversion": ["layers=[[1]]"]}]
    systems += [{"name": "b", "like": "a", "emotion": ["layers=[1]"]}, {"name": "c", "like": "a"}]
    keys = {"codec": "c.yaml", "emotion": "e.yaml", "tasks": ["quality", "conversion", "emotion"]}
    plan = compare.plan(config_of(systems=systems, speaker_teacher="v.yaml", **keys), Path("run"))
    assert "speaker=run/speaker_teacher/model" in plan["a: quality"] and "layers=[[1]]" in plan["a: conversion"]
    assert "layers=[1]" in plan["b: emotion 0"] and "c: emotion 0" not in plan
    evaluated = config_of(systems=systems, speaker_teacher="v.yaml", evaluation_speaker="j.yaml", **keys)
    plan = compare.plan(evaluated, Path("run"))
    assert (
        "speaker=run/evaluation_speaker/model" in plan["a: quality"]
        and "speaker=run/evaluation_speaker/model" in plan["a: conversion"]
    )
    assert "acoustic.teacher=run/speaker_teacher/model" in plan["a: tokenizer"]
    assert {"--config=j.yaml", "data=corpus"} <= set(plan["evaluation speaker"])


def test_only_required_teachers_are_trained(compare: ModuleType, config_of: Callable[..., object]) -> None:
    keys = {"tasks": ["asr"], "asr": "asr.yaml", "semantic_teacher": "s.yaml", "speaker_teacher": "v.yaml"}
    keys |= {"recognizer": "r.yaml", "asr_data": "words"}
    plan = compare.plan(config_of(systems=[{"name": "a", "tokenizer": "folder"}], **keys), Path("run"))
    assert list(plan) == ["a: asr_codes", "a: asr 0", "a: asr 0, test"]

    cascade = [{"name": "d", "tokenizer": "recognizer:{recognizer}"}]
    plan = compare.plan(config_of(systems=cascade, **keys), Path("run"))
    assert list(plan)[:2] == ["semantic teacher", "recognizer"]
    assert {"data=words", "init=run/semantic_teacher/model"} <= set(plan["recognizer"])
    assert "codec=recognizer:run/recognizer/model" in plan["d: asr_codes"]

    codec = [{"name": "c", "train": ["steps=1"]}, {"name": "u", "units": ["clusters=8"]}]
    plan = compare.plan(config_of(systems=codec, codec="codec.yaml", **keys), Path("run"))
    assert list(plan)[:4] == ["semantic teacher", "speaker teacher", "c: tokenizer", "u: tokenizer"]
    assert plan["c: tokenizer"][-2:] == ["acoustic.teacher=run/speaker_teacher/model", "steps=1"]
    assert "model=run/semantic_teacher/model" in plan["u: tokenizer"]


def test_encoded_speech_is_shared_by_like_systems_and_by_tasks_on_one_corpus(
    compare: ModuleType, config_of: Callable[..., object]
) -> None:
    systems = [{"name": "a", "tokenizer": "{tokenizer}"}, {"name": "b", "like": "a", "asr": ["layers=2"]}]
    keys = {"asr": "asr.yaml", "emotion": "e.yaml", "emotion_data": "actors", "tokenizer": "folder", "seeds": [0, 1]}
    tasks = ["content", "emotion", "asr"]
    plan = compare.plan(config_of(systems=systems, tasks=tasks, **keys), Path("run"))
    assert [stage for stage, words in plan.items() if words[0] == "encode_speech.py"] == [
        "a: codes",
        "a: emotion_codes",
    ]
    assert {"codes=run/a/codes", "codec=folder", "layers=2", "seed=1"} <= set(plan["b: asr 1"])
    assert "codes=run/a/codes" in plan["b: asr 1, test"]
    assert [stage for stage in plan if "emotion " in stage] == ["a: emotion 0", "a: emotion 1"]


# ---- a complete comparison


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Twelve tones of a third of a second, two voices."""
    draw, rows = np.random.default_rng(0), []
    for i in range(12):
        tone = np.sin(2 * np.pi * (400 + 300 * (i % 3)) * np.arange(5_000) / RATE)
        soundfile.write(tmp_path / f"u{i}.wav", 0.2 * tone + 0.05 * draw.standard_normal(5_000), RATE)
        row = {"id": f"u{i}", "path": f"u{i}.wav", "duration_s": 5_000 / RATE, "split": ("train", "test")[i // 8]}
        rows.append({**row, "text": ("ONE", "TWO", "RED")[i % 3], "speaker": f"s{i % 2}"})
    write_jsonl(tmp_path / "manifest.jsonl", rows)
    return tmp_path


def test_a_comparison_runs_only_what_is_missing(
    compare: ModuleType,
    config_of: Callable[..., object],
    codec_folder: Path,
    corpus: Path,
    stages_here: list[list[str]],
) -> None:
    def ran() -> list[str]:
        """The recipes since it was last asked."""
        found = [name for name, *_ in stages_here]
        stages_here.clear()
        return found

    (corpus / "asr.yaml").write_text(yaml.safe_dump(ASR))
    systems = [{"name": "one", "tokenizer": str(codec_folder)}, {"name": "two", "like": "one", "asr": ["layers=2"]}]
    keys = {"data": str(corpus), "tasks": ["content", "asr"], "asr": str(corpus / "asr.yaml"), "probe_steps": 1}

    compare.main(config_of(systems=systems[:1], seeds=[0, 1], **keys))
    assert ran() == ["encode_speech.py", "eval_tokenizer.py", *["train_asr.py"] * 2, *["eval_asr.py"] * 2]
    compare.main(config_of(systems=systems[:1], seeds=[0, 1], **keys))
    assert ran() == []
    compare.main(config_of(systems=systems, seeds=[0, 1], **keys))
    assert ran() == [*["train_asr.py"] * 2, *["eval_asr.py"] * 2]

    results = json.loads((corpus / "run" / "results.json").read_text())["systems"]
    assert results.keys() == {"one", "two"} and results["two"]["like"] == "one"
    assert results["one"]["asr"]["seeds"].keys() == {"0", "1"} and "minutes" in results["one"]
    assert results["two"]["asr"]["tokens_per_second"] > 1.5 * results["one"]["asr"]["tokens_per_second"]
    assert results["one"]["parameters"] == results["two"]["parameters"] > 0
    table = (corpus / "run" / "table.md").read_text(encoding="utf-8")
    assert "## Table 4" in table and "## Table 1" not in table and "| log-mel k-means |" in table
    assert "<svg" not in (page := (corpus / "run" / "report.html").read_text(encoding="utf-8")) and "data:image" in page


def test_a_failure_affects_only_its_own_parallel_stage(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text("import sys; open(sys.argv[1], 'a').write('x'); sys.exit(sys.argv[1][-1] == 'b')")
    jobs = {name: ["job.py", str(tmp_path / name)] for name in "abc"}
    for _ in range(2):
        with pytest.raises(SystemExit):
            Stages(tmp_path, tmp_path).side_by_side(jobs)
    assert [(tmp_path / name).read_text() for name in "abc"] == ["x", "xx", "x"]
    assert Stages(tmp_path, tmp_path).seconds.keys() == {"a", "c"}


def test_a_number_of_threads_that_the_user_has_set_is_that_of_every_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "job.py").write_text("import os, sys; open(sys.argv[1], 'w').write(os.environ['OMP_NUM_THREADS'])")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    Stages(tmp_path, tmp_path).side_by_side({"a": ["job.py", str(tmp_path / "a")]})
    monkeypatch.delenv("OMP_NUM_THREADS")
    Stages(tmp_path, tmp_path).side_by_side({"b": ["job.py", str(tmp_path / "b")]})
    assert (tmp_path / "a").read_text() == "5" and (tmp_path / "b").read_text() == str(available_cpus())


def test_changes_to_a_finished_stage_are_refused(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text("")
    Stages(tmp_path, tmp_path).stage("a", ["job.py", "steps=1", "data=here"])
    Stages(tmp_path, tmp_path).stage("a", ["job.py", "steps=1", "data=here"])
    with pytest.raises(RunError, match=r"\[a\] was done with other settings \(steps=1, steps=2\)"):
        Stages(tmp_path, tmp_path).stage("a", ["job.py", "steps=2", "data=here"])
    (tmp_path / "job.yaml").write_text("steps: 1\n")
    command = ["job.py", f"--config={tmp_path / 'job.yaml'}"]
    Stages(tmp_path, tmp_path).stage("b", command)
    (tmp_path / "job.yaml").write_text("# the same\nsteps: 1\n")
    Stages(tmp_path, tmp_path).stage("b", command)
    (tmp_path / "job.yaml").write_text("steps: 2\n")
    with pytest.raises(RunError, match=r"\[b\] was done with other settings \(steps=1, steps=2\)"):
        Stages(tmp_path, tmp_path).stage("b", command)


def test_changes_to_finished_stages_are_refused_before_any_other_runs(tmp_path: Path) -> None:
    command = ["train_text.py", "text=[a.txt]", f"output={tmp_path / 'text'}"]
    done = {"a": {"seconds": 1.0, "finished": True, "words": ["train_text.py", "text=[b.txt]", "output=RUN/text"]}}
    (tmp_path / "stages.json").write_text(json.dumps(done))
    stages = Stages(tmp_path, ROOT / "recipes")
    with pytest.raises(RunError, match=r"\[a\] was done with other settings \(text=\[a.txt\], text=\[b.txt\]\)"):
        stages.check({"b": command, "a": command})
    for number, content in enumerate(("a: [1", "- steps", None)):  # no YAML, no keys, no file
        if content:
            (tmp_path / f"{number}.yaml").write_text(content)
        broken = ["train_text.py", f"--config={tmp_path / f'{number}.yaml'}"]
        with pytest.raises(RunError, match=rf"(?s)\[c\] .*{number}\.yaml.*\[a\] was done with other settings"):
            stages.check({"c": broken, "b": command, "a": command})
    done["a"]["words"][1] = "text=[a.txt]"
    (tmp_path / "stages.json").write_text(json.dumps(done))
    Stages(tmp_path, ROOT / "recipes").check({"b": command, "a": command})


def test_an_interrupt_after_a_failure_ends_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = "import sys, time; open(sys.argv[1], 'w').close(); sys.exit(1) if sys.argv[1][-1] == 'a' else time.sleep(99)"
    (tmp_path / "job.py").write_text(job)
    monkeypatch.setattr(stages_module, "available_cpus", lambda: 2)

    def interrupted(jobs: list) -> None:
        wait(jobs, return_when=FIRST_EXCEPTION)
        while not (tmp_path / "b").exists():
            assert time.monotonic() - started < 60
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(stages_module, "wait", interrupted)
    stages, started = Stages(tmp_path, tmp_path), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        stages.side_by_side({name: ["job.py", str(tmp_path / name)] for name in "abcd"})
    assert time.monotonic() - started < 60 and not (tmp_path / "d").exists()


@pytest.mark.parametrize("batch_size, processes, shared", [(8, 4, 4), (6, 4, 3), (7, 4, 1)])
def test_a_training_gets_as_many_processes_as_can_share_its_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int, processes: int, shared: int
) -> None:
    monkeypatch.setattr(stages_module.torch.cuda, "device_count", lambda: 0)
    stages, asked = Stages(tmp_path, ROOT / "recipes"), []
    monkeypatch.setattr(stages, "_run", lambda commands, several: asked.append(several))
    words = ["--config=tokenizer/small.yaml", "data=x", "output=y", f"batch_size={batch_size}"]
    stages.launch("codec", ["train_tokenizer.py", *words], processes)
    assert asked == [shared]


def test_a_failure_affects_only_its_own_stage(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text("import sys; open(sys.argv[1], 'a').write('x'); sys.exit(sys.argv[1][-1] == 'b')")
    jobs = {name: ["job.py", str(tmp_path / name)] for name in "abc"}
    for _ in range(2):
        with pytest.raises(SystemExit, match="some stages failed"):
            Stages(tmp_path, tmp_path).run(jobs, shared=(), single=())
    assert [(tmp_path / name).read_text() for name in "abc"] == ["x", "xx", "x"]


# ---- seeds


def test_one_seed_keeps_its_interval_and_several_are_averaged() -> None:
    references, first = ["one two", "three four", "five"], ["one two", "three", "four"]
    alone, pooled = word_error_rate(references, first), seeds_error_rate(references, [first])
    assert pooled == {"mean": alone.wer, "ci95": list(alone.ci95)}
    second = ["one", "one", "one"]
    both = seeds_error_rate(references, [first, second])
    assert both["mean"] == pytest.approx((alone.wer + word_error_rate(references, second).wer) / 2)
    assert both["ci95"][0] <= both["mean"] <= both["ci95"][1]


def test_the_interval_of_seeds_that_differ_is_wider_than_that_of_the_utterances() -> None:
    references = ["one"] * 200
    good, bad = ["one"] * 200, ["two"] * 200
    assert seeds_error_rate(references, [good, bad])["ci95"] == [0, 1]


def test_seeds_without_a_result_are_ignored() -> None:
    rows = [{"reference": "one two", "hypothesis": "one"}]
    found = {"wer": 0.5, "tokens_per_second": 50.0, "words": 2, "utterances": 1, "normalizer": "none", "cer": 0.5}
    pooled = pool_recognition({0: found, 1: {}}, {0: rows, 1: []})
    assert pooled["seeds"] == {"0": 0.5} and pooled["mean"] == 0.5 and "wer_shuffled_audio" not in pooled
    assert pool_recognition({0: {}}, {0: []}) == {} == pool_emotion({0: {}})
    emotion = pool_emotion(
        {s: {"accuracy": a, "ci95_actors": [a - 0.1, a + 0.1], "chance": 0.25} for s, a in {0: 0.5, 1: 0.6}.items()}
    )
    assert emotion["mean"] == pytest.approx(0.55) and emotion["ci95"] == pytest.approx([0.4, 0.7])
    assert emotion["chance"] == 0.25


def test_seeds_on_other_utterances_or_by_another_normalizer_are_not_pooled() -> None:
    rows = [{"id": "u", "reference": "one two", "hypothesis": "one"}]
    found = {"wer": 0.5, "tokens_per_second": 50.0, "words": 2, "utterances": 1, "normalizer": "none"}
    other = [{**rows[0], "id": "v"}]
    for results, predictions in (
        ({0: found, 1: found}, {0: rows, 1: other}),
        ({0: found, 1: found}, {0: rows, 1: []}),
        ({0: found, 1: {**found, "normalizer": "librispeech"}}, {0: rows, 1: rows}),
    ):
        with pytest.raises(InputError, match="seed 1 cannot be pooled with seed 0"):
            pool_recognition(results, predictions)


def test_the_cer_leads_in_tables_where_texts_have_no_spaces() -> None:
    def pooled(heard: str) -> dict[str, object]:
        rows = [{"id": f"u{i}", "reference": "今天天气很好", "hypothesis": heard} for i in range(3)]
        found = {"wer": 1.0, "cer": 0.5, "tokens_per_second": 50.0, "words": 1, "utterances": 3, "normalizer": "none"}
        rates = {"wer": 1.0, "cer": 0.5, "words": 1}
        return pool_recognition({0: {**found, "splits": {"a": rates, "b": rates}}}, {0: rows})

    one = pooled("今天天")
    assert one["primary"] == "cer" and one["mean"] == 1 and one["cer_ci95"] == [0.5, 0.5]
    systems = {"one": {"asr": one}, "two": {"asr": {**pooled("今天天气很"), "cer": 1 / 6}}}
    table = markdown_of(systems)
    assert "50.0% (50.0% to 50.0%), the rate to go by" in table and "a: WER 100.0%, CER 50.0%; b: WER" in table
    assert guidance(systems).rows[0][2] == "two, in a single training"  # their WER is the same


# ---- pairs on the same utterances


def heard(wrong: int, seeds: int = 1) -> dict[str, object]:
    """40 utterances of five words, of which the first `wrong` and every third have an error in the last word."""
    said = [f"a{i} b c d e" for i in range(40)]
    texts = [text[:-1] + "x" if i < wrong or i % 3 == 0 else text for i, text in enumerate(said)]
    rows = [{"id": f"u{i}", "reference": r, "hypothesis": h} for i, (r, h) in enumerate(zip(said, texts, strict=True))]
    rate = word_error_rate(said, texts).wer
    found = {"wer": rate, "cer": rate, "tokens_per_second": 50.0, "words": 200, "utterances": 40}
    numbers = range(seeds)
    return pool_recognition(
        dict.fromkeys(numbers, {**found, "normalizer": "librispeech"}), dict.fromkeys(numbers, rows)
    )


def test_systems_whose_intervals_overlap_are_told_apart_on_the_same_utterances() -> None:
    systems = {"better": {"asr": heard(0)}, "worse": {"asr": heard(15)}}
    assert overlap(systems["better"]["asr"], systems["worse"]["asr"])
    (row,) = guidance(systems).rows
    assert row[2] == "better, in a single training" and "worse" not in row[3]
    (row,) = difference_table(systems).rows
    said = [f"a{i} b c d e" for i in range(40)]
    texts = {n: [t[:-1] + "x" if i < n or i % 3 == 0 else t for i, t in enumerate(said)] for n in (0, 15)}
    expected = paired_bootstrap(said, texts[15], texts[0])
    low, high = expected.ci95
    values = [f"{expected.difference:+.1%}", f"{low:+.1%} to {high:+.1%}", f"{expected.p_value:.3f}"]
    assert row == ["better", "worse", "WER", *values, "40"]
    page = markdown_of(systems)
    assert "## Differences on the same utterances" in page and expected.ci95[1] < 0
    apart = {name: {"asr": without_shares(result["asr"])} for name, result in systems.items()}
    assert guidance(apart).rows[0][2] == "no clear winner" and not difference_table(apart).rows


def test_every_table_of_the_paper_is_compared_in_pairs() -> None:
    def measure(*values: float) -> dict[str, object]:
        each = {f"u{i}": (value, 1) for i, value in enumerate(values)}
        return {"mean": sum(values) / len(values), "each": each}

    def system(more: float) -> dict[str, dict]:
        methods = {"source": {"mcd": measure(9, 9)}, "swap 1, by position": {"mcd": measure(8 + more, 6 + more)}}
        methods |= {"swap 1-7, by position": {"mcd": measure(7, 7)}}
        quality = {"2": {"pesq_wb": measure(1.25, 1.5)}, "8": {"pesq_wb": measure(2 + more, 2 - more, 2 + more)}}
        emotion = {"mean": 0.5, "each": {"1": (2 + 4 * more, 4), "2": (2, 4)}}
        return {"quality": {"codebooks": quality}, "conversion": {"methods": methods}, "emotion": emotion}

    table = difference_table({"a": system(0.5), "b": system(0.0), "c": {}})
    assert all(row[:2] == ["a", "b"] for row in table.rows)
    assert [(row[2], row[3], row[-1]) for row in table.rows] == [
        ("PESQ-WB, codebooks: 2", "+0.000", "2"),
        ("PESQ-WB, codebooks: 8", "+0.167", "3"),
        ("MCD (dB), swap 1, by position", "+0.50", "2"),
        ("accuracy of emotions", "+25.0%", "2"),
    ]
    assert table.rows[2][4] == "+0.50 to +0.50" and table.rows[1][4] == "-0.500 to +0.500"


def test_the_errors_of_several_seeds_of_an_utterance_stay_together() -> None:
    # three times the same is not three times as sure
    assert difference_table({"a": {"asr": heard(0, 3)}, "b": {"asr": heard(15, 2)}}).rows == (
        difference_table({"a": {"asr": heard(0)}, "b": {"asr": heard(15)}}).rows
    )


def test_seeds_that_differ_make_a_difference_uncertain() -> None:
    """One system twice, whose first seed failed once: of all seeds together it is no better than itself."""

    def verdict(seeds: int) -> str:
        systems = {
            name: {
                "asr": {
                    "mean": sum(errors[:seeds]) / seeds,
                    "ci95": [0, 1],
                    "each": {f"u{i}": (errors[:seeds], 1) for i in range(20)},
                    "seeds": dict(zip("012", errors[:seeds], strict=False)),
                }
            }
            for name, errors in (("a", [1, 0, 0]), ("b", [0, 0, 0]))
        }
        return guidance(systems).rows[0][2]

    assert verdict(seeds=1) == "b, in a single training"
    assert verdict(seeds=3) == "no clear winner"  # the one that failed may not be drawn


def test_systems_tested_on_other_utterances_are_not_paired() -> None:
    one, other = heard(0), heard(15)
    other["each"] = {f"v{name}": shares for name, shares in other["each"].items()}
    assert not difference_table({"a": {"asr": one}, "b": {"asr": other}}).rows
    assert guidance({"a": {"asr": one}, "b": {"asr": other}}).rows[0][2] == "no clear winner"


def test_emotions_are_paired_by_actor_over_all_seeds() -> None:
    rows = [{"actor": n % 2, "emotion": "calm", "answer": "calm" if n < 3 else "sad"} for n in range(4)]
    found = {"accuracy": 0.75, "ci95_actors": [0.5, 1.0]}
    assert pool_emotion({0: found, 1: found}, {0: rows, 1: rows})["each"] == {"0": ([2, 2], 2), "1": ([1, 1], 2)}


def test_the_control_of_emotions_is_pooled_with_its_interval() -> None:
    measured = {"accuracy": 0.5, "ci95_actors": [0.4, 0.6]}
    controls = [
        {"accuracy_shuffled_labels": control, "accuracy_shuffled_labels_ci95": [control - 0.1, 0.5]}
        for control in (0.2, 0.4)
    ]
    pooled = pool_emotion({seed: measured | control for seed, control in enumerate(controls)})
    assert pooled["control"] == {"mean": pytest.approx(0.3), "ci95": [pytest.approx(0.1), 0.5]}
    assert emotion_table({"a": {"emotion": pooled}}).rows[0][3] == "30.0% (10.0% to 50.0%)"


def test_only_what_is_asked_for_is_shown_and_of_one_tokenizer(
    compare: ModuleType,
    config_of: Callable,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quality = {"codebooks": {}, "codec_fingerprint": "a" * 16}
    content = {"layer": 1, "codec_fingerprint": "b" * 16}
    (tmp_path / "codec" / "quality").mkdir(parents=True)
    (tmp_path / "codec" / "quality" / "results.json").write_text(json.dumps(quality))
    (tmp_path / "codec" / "content.json").write_text(json.dumps(content))
    systems = [{"name": "codec", "tokenizer": "somewhere"}]
    for task in ("quality", "content"):
        config = config_of(systems=systems, tasks=[task])
        found = compare.collect(config.systems[0], config, tmp_path, {})
        assert {name for name in compare.TASKS if found[name]} == {task}
    config = config_of(systems=systems, tasks=["quality", "content"], output=str(tmp_path), data=str(tmp_path))
    found = compare.collect(config.systems[0], config, tmp_path, {})
    message = r"results of several tokenizers \(.*aaaaaaaa.*\): compare in a new output"
    assert not any(found[task] for task in compare.TASKS) and re.search(message, capsys.readouterr().out)
    monkeypatch.setattr(compare.Stages, "check", lambda *_: None)
    (tmp_path / "claim.json").write_text('{"job": "compare"}')
    with pytest.raises(RunError, match=message):
        compare.main(config)


def test_scores_of_an_evaluation_are_found_again_by_utterance(compare: ModuleType, tmp_path: Path) -> None:
    mean = {"mean": 1.5, "ci95": [1, 2]}
    words = {"mean": 0.25, "ci95": [0, 1], "normalizer": "librispeech", "words": 4}
    results = {"codebooks": {"1": {"kbps": 0.5, "utterances": 2, "pesq_wb": mean, "wer": words}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    rows = [
        {"id": "u", "scores": {"1": {"pesq_wb": 1.0}}, "recognized": {"1": "one two"}, "text": "ONE TWO"},
        {"id": "v", "scores": {"1": {"pesq_wb": 2.0}}, "recognized": {"1": "one"}, "text": "ONE TWO"},
        {"id": "w", "scores": {}, "recognized": {}, "text": "ONE"},
    ]
    write_jsonl(tmp_path / "utterances.jsonl", rows)
    found = compare.scored(tmp_path / "results.json", "codebooks", "utterances.jsonl", ("id",))
    assert without_shares(found) == results
    row = found["codebooks"]["1"]
    assert row["pesq_wb"]["each"] == {'["u"]': (1.0, 1), '["v"]': (2.0, 1)}
    assert row["wer"]["each"] == {'["u"]': ([0], 2), '["v"]': ([1], 2)}
    assert compare.scored(tmp_path / "nowhere.json", "codebooks", "utterances.jsonl", ("id",)) == {}


# ---- the page


def measured(mean: float, low: float, high: float) -> dict[str, object]:
    return {"mean": mean, "ci95": [low, high]}


def quality_of(*rows: tuple[int, float, float, float]) -> dict[str, object]:
    books = {}
    for count, *pesq in rows:
        rates = {"tokens_per_second": 50 * count, "kbps": 0.5 * count, "utterances": 9}
        books[str(count)] = {**rates, "pesq_wb": measured(*pesq)}
    return {"codebooks": books, "original": {"pesq_wb": measured(4.64, 4.64, 4.64), "utterances": 9}, "failed": [{}]}


def asr_of(mean: float, low: float, high: float, rate: float = 50.0) -> dict[str, object]:
    return {**measured(mean, low, high), "tokens_per_second": rate, "seeds": {"0": mean}, "words": 100}


CODES = {"kind": "codes", "frame_rate": 50.0, "layers": 1, "codebook_size": 1024}
RESULTS = {
    "codec": {
        "encoding": CODES,
        "parameters": 2_000_000,
        "quality": quality_of((1, 1.2, 1.1, 1.3), (2, 1.5, 1.4, 1.6), (4, 1.55, 1.45, 1.65)),
        "asr": asr_of(0.30, 0.28, 0.32),
    },
    "four": {"like": "codec", "encoding": CODES, "parameters": 2_000_000, "asr": asr_of(0.20, 0.18, 0.22, 200.0)},
    "weak": {"encoding": CODES, "parameters": 1_000_000, "quality": quality_of((1, 1.0, 1.0, 1.1))},
    "soft": {"encoding": {"kind": "features", "frame_rate": 50.0, "layers": 1}, "asr": asr_of(0.21, 0.19, 0.23, 25.0)},
}


MADE = {"command": "python compare.py", "seconds": 90.0, "config": {"data": "corpus"}, "versions": {"torch": "2"}}


def shown(results: dict) -> dict[str, object]:
    tables = comparison_tables(results)
    return {"title": "A & B", "results": results, "tables": tables, "provenance": MADE}


def cells(name: str, table: str) -> list[list[str]]:
    """Rows of the Markdown table under a title that begin with a name."""
    part = markdown_of(RESULTS).split(f"## {table}")[1].split("## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]
    return [row for row in rows if row[0] == name]


def test_missing_values_are_dashes_and_empty_columns_are_dropped() -> None:
    (weak,) = cells("weak", "Table 4")
    assert set(weak[1:]) == {"–"}
    (soft,) = cells("soft", "Table 4")
    assert soft[1:4] == ["25.0", "–", "21.0% (19.0% to 23.0%)"]
    (four,) = cells("four", "Table 4")
    assert four[1:3] == ["200.0", "2.00"]
    assert [row[1] for row in cells("codec", "Table 1")] == ["1", "2", "4"] and not cells("four", "Table 1")
    assert set(cells("soft", "Table 1")[0][1:]) == {"–"}
    page = markdown_of(RESULTS)
    assert "STOI" not in page and "Table 2" not in page and "Table 3" not in page and "Content" not in page
    assert "Not scored: 1 of codec, 1 of weak." in page


def test_a_purpose_has_a_winner_only_if_the_intervals_do_not_overlap() -> None:
    title = "Best system by purpose"
    (words,) = cells("speech recognition", title)
    assert words[2] == "no clear winner"
    assert "four 20.0%" in words[3] and "soft 21.0%" in words[3] and "codec" not in words[3]
    assert words[4] == "soft, 25 tokens/s"
    (speech,) = cells("speech quality", title)
    assert speech[2] == "codec" and "4 codebooks" in speech[3]
    assert speech[4] == "codec, 2 codebooks, 1 kbps"  # half the bits, and not distinguishable
    (small,) = cells("small tokenizer", title)
    assert small[2] == "weak"
    assert not cells("emotion recognition", title) and not cells("fast encoding", title)


def converted(**methods: tuple[float, float, float]) -> dict[str, object]:
    named = {name.replace("_", " ").replace("swap 1", "swap 1, by position"): mcd for name, mcd in methods.items()}
    rows = {name.replace("source 2", "source, 2"): {"mcd": measured(*mcd), "pairs": 9} for name, mcd in named.items()}
    return {"conversion": {"methods": rows}}


def test_a_swap_must_beat_the_unchanged_codes() -> None:
    blurred = converted(source_2_codebooks=(7.0, 6.9, 7.1), swap_1=(7.2, 7.1, 7.3))
    unsure = converted(source_2_codebooks=(8.0, 7.9, 8.1), swap_1=(7.9, 7.8, 8.0))
    real = converted(source_2_codebooks=(8.9, 8.8, 9.0), swap_1=(8.0, 7.9, 8.1))

    def verdict(**systems: dict[str, object]) -> list[str]:
        (row,) = guidance(systems).rows
        return row

    assert verdict(blurred=blurred, unsure=unsure)[2:4] == ["none", "no swap beats the unchanged codes"]
    assert verdict(blurred=blurred, real=real)[2:4] == ["real", "real 8.00 (7.90 to 8.10), swap 1, by position"]


def test_the_page_shows_tables_and_plots(tmp_path: Path) -> None:
    write_comparison(tmp_path / "page.html", **shown(RESULTS))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "A &amp; B" in page and "PESQ-WB by bitrate" in page
    assert "WER (%) by system" in page and "WER (%) by bitrate" in page
    assert "python compare.py" in page and "1.5 min" in page and "corpus" in page
    alike = {"one": RESULTS["codec"], "other": {**RESULTS["codec"], "like": "one"}}
    write_comparison(tmp_path / "page.html", **shown(alike))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "WER (%) by system" in page and "WER (%) by bitrate" not in page  # one bitrate is no axis
    assert page.index("Best system by purpose") < page.index("Table 1") < page.index("Table 4")
