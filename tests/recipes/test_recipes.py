"""The recipes, from recordings to a word error rate, as commands on a tiny corpus (more in test_train_asr.py)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile
import torch
from sklearn.metrics import mutual_info_score

from speechllm import (
    SpeechCodec,
    load_audio,
    load_codes,
    load_speech_llm,
    read_corpus,
    speech_of,
    transcribe,
    word_error_rate,
)
from speechllm.runs.run import read_log
from tokenizer.files import read_jsonl, write_jsonl
from tokenizer.training.teachers import SemanticTeacher, SpeakerTeacher

if TYPE_CHECKING:
    from tests.recipes.conftest import Work

RATE = 16_000
UTTERANCES, FRAMES = 24, 25  # of half a second
TEACHER = "data=corpus splits=[train] dev_splits=[dev] steps=6 batch_size=4 warmup=2 save_every=100"
TOKENIZER = (
    "data=corpus splits=[train] codec.n_filters=4 codec.dimension=8 codec.num_codebooks=2 codec.codebook_size=16 "
    "codec.lstm=none semantic.teacher=alignment/model semantic.layer=-1 acoustic.teacher=speaker/model batch_size=4 "
    "adversary.stft_filters=2 crop_s=0.4 num_workers=0"
)
# with everything that is drawn at random: crops, decoded windows, quantiser dropout, new places of dead codes; and with
# everything that remembers: optimizers, adversary, balancer, averaged weights, cached features
RANDOM = (
    f"{TOKENIZER} dev_splits=[dev] codec.norm=batch_norm quantizer_dropout=[1,2] decode_s=0.16 steps=12 warmup=2 "
    "adversary.start=2 losses.speech_features=0.5 weight_average=0.9 semantic.cache=features "
    "learning_rate=1e-3 log_every=1 validate_every=6 save_every=3"
)
# with nothing that is drawn for a part of a batch alone, such as decoded windows
DIVISIBLE = f"{TOKENIZER} steps=4 warmup=1 learning_rate=1e-4 log_every=1"
LINEAR = "convnext codec.width=16 codec.depth=1 codec.phases=griffin_lim linear_start=true steps=1"
ASR = (
    "model=null codes=codes codec=tokenizer/model splits=[train] dev_splits=[dev] small.text_tokens=300 "
    "small.text_steps=5 small.hidden_size=16 small.intermediate_size=32 small.num_hidden_layers=2 "
    "small.num_attention_heads=2 small.num_key_value_heads=1 layers=2 steps=80 batch_tokens=560 "
    "learning_rate=1e-3 warmup=5 validate_every=20 log_every=1 save_every=40"
)
EXACT = "precision=no"
ASR_RANDOM = f"{ASR} {EXACT} augmentation.substitute=0.3"


def write_corpus(folder: Path) -> None:
    """Two tones ("words") an utterance, 3 voices with pulses of their own, a level that changes every frame."""
    tones = {"ONE": 400, "TWO": 650, "RED": 1000, "LAMP": 1500}
    draw = np.random.default_rng(0)
    seconds = np.arange(RATE // 2) / RATE
    rows = []
    for i in range(UTTERANCES):
        words = draw.choice(list(tones), 2)
        tone = np.sin(2 * np.pi * np.cumsum(np.repeat([tones[word] for word in words], RATE // 4)) / RATE)
        voice = np.sign(np.sin(2 * np.pi * 110 * (i % 3 + 1.3) * seconds))
        level = np.repeat(draw.uniform(0.02, 1, FRAMES), 320)
        waveform = level * (0.3 * tone + 0.1 * voice + 0.05 * draw.standard_normal(len(tone)))
        split = ("train", "train", "dev", "test")[i // 6]
        path = folder / split / f"u{i:02}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, waveform, RATE)
        row = {"id": path.stem, "path": f"{split}/{path.name}", "duration_s": 0.5, "split": split}
        phones = [[words[0][0], 0.25], [words[1][0], 0.5]]
        rows.append({**row, "text": " ".join(words), "speaker": f"s{i % 3}", "phones": phones})
    write_jsonl(folder / "manifest.jsonl", rows)


@pytest.fixture(scope="session")
def work(make_work: Callable[[], Work]) -> Work:
    """The complete chain, once."""
    work = make_work()
    write_corpus(work.folder / "corpus")
    small = "hidden_size=16 layers=1"
    work.run("train_teacher.py", f"kind=semantic objective=ctc output=ctc {small} {TEACHER}")
    work.run("train_teacher.py", f"kind=semantic objective=alignment output=alignment {small} {TEACHER}")
    work.run("train_teacher.py", f"kind=speaker output=speaker channels=8 {TEACHER} crop_s=0.4")
    work.run("train_tokenizer.py", f"{RANDOM} output=tokenizer")
    work.run("encode_speech.py", "codec=tokenizer/model data=corpus output=codes layers=null")
    splits = "train_splits=[train] test_splits=[test]"
    work.run("eval_tokenizer.py", f"codes=codes data=corpus output=content.json {splits}")
    work.run("train_asr.py", f"{ASR_RANDOM} output=asr")
    work.run("eval_asr.py", "model=asr/model codes=codes output=evaluation splits=[test]")
    return work


# ---- what the chain wrote


def test_the_teachers_are_loaded_like_the_published_ones(work: Work) -> None:
    waveform = torch.randn(1, 8_000, generator=torch.Generator().manual_seed(0))
    for run in ("ctc", "alignment"):
        assert SemanticTeacher.from_pretrained(work.folder / run / "model")(waveform).shape == (1, FRAMES, 16)
        assert work.files(run) >= {"config.yaml", "versions.json", "log.jsonl", "done.json"}
    assert work.files("speaker") >= {"config.yaml", "log.jsonl", "done.json"}
    assert SpeakerTeacher.from_pretrained(work.folder / "speaker" / "model")(waveform).shape == (1, 51, 24)


@pytest.mark.parametrize("run", ["ctc", "alignment", "speaker", "tokenizer", "asr", "evaluation"])
def test_every_training_and_evaluation_has_a_page_that_names_its_configuration(work: Work, run: str) -> None:
    page = (work.folder / run / "report.html").read_text(encoding="utf-8")
    made = page.split("<h2>Configuration</h2>")[1]
    assert ".py " in made and "duration" in made and f'row">output</th><td>{run}<' in made
    assert "Configuration" in (work.folder / "content.html").read_text(encoding="utf-8")


def test_the_teachers_are_scored_on_the_dev_split(work: Work) -> None:
    assert work.done("ctc")["dev_cer"] >= 0
    assert 0 <= work.done("alignment")["dev_frame_accuracy"] <= 1
    assert 0 <= work.done("speaker")["dev_equal_error_rate"] <= 1


def test_the_tokenizer_run_holds_codec_configuration_log_and_samples(work: Work) -> None:
    files = work.files("tokenizer")
    assert files >= {"config.yaml", "versions.json", "log.jsonl", "done.json", "model/model.safetensors"}
    assert not any(name.startswith("checkpoints/") or name.endswith(".part") for name in files)
    samples = {name for name in files if name.endswith(".wav")}
    assert samples == {f"samples/u{i}_{kind}.wav" for i in (12,) for kind in ("original", "1_codebooks", "2_codebooks")}
    for name in samples:
        assert len(load_audio(work.folder / "tokenizer" / name)) == 8_000
    codec = SpeechCodec.from_pretrained(work.folder / "tokenizer" / "model")
    assert work.done("tokenizer")["fingerprint"] == codec.fingerprint
    log = read_log(work.folder / "tokenizer")
    assert [line["step"] for line in log if "mel" in line] == list(range(1, 13))
    assert [line["step"] for line in log if "dev_mel" in line] == [6, 12]
    assert all(np.isfinite(value) for line in log for value in line.values())


@torch.no_grad()
def test_every_utterance_is_encoded_with_the_codec_that_was_trained(work: Work, assert_same_codes: Callable) -> None:
    rows, encoding = load_codes(work.folder / "codes")
    codec = SpeechCodec.from_pretrained(work.folder / "tokenizer" / "model")
    corpus = read_corpus(work.folder / "corpus")
    assert encoding.fingerprint == codec.fingerprint and encoding.layers == 2
    assert rows["id"] == [utterance.id for utterance in corpus]
    for row, utterance in zip(rows, corpus, strict=True):
        waveform = load_audio(utterance.path)[None]
        latents, expected = codec.latents(waveform), codec.encode(waveform).ids
        assert_same_codes(codec.quantizer, latents, speech_of(row, encoding)[None], expected, roundings=64)
    found = work.done("codes")
    assert found["utterances"] == UTTERANCES and found["skipped"] == {}
    assert found["hours"] == pytest.approx(UTTERANCES * 0.5 / 3600)


def test_the_content_of_the_codes_matches_scikit_learn(work: Work) -> None:
    found = work.json("content.json")
    rows, encoding = load_codes(work.folder / "codes", ["test"])
    codes = np.concatenate([speech_of(row, encoding).numpy() for row in rows], 1)
    for layer, usage in zip(codes, found["usage"], strict=True):
        assert usage["counts"] == np.bincount(layer, minlength=16).tolist()
        assert usage["used"] == len(set(layer.tolist())) == 16 - usage["dead"]
    assert found["content"]["label"] == "phone"
    words = [utterance.text.split() for utterance in read_corpus(work.folder / "corpus", ["test"])]
    phones = [pair[0 if (frame + 0.5) / 50 <= 0.25 else 1][0] for pair in words for frame in range(FRAMES)]
    expected = mutual_info_score(phones, codes[0]) / mutual_info_score(phones, phones)
    assert found["content"]["layer_0"]["pnmi"] == pytest.approx(expected)
    assert 0 < found["content"]["log_mel_kmeans"]["pnmi"] <= 1
    assert found["speaker"]["speakers"] == 3 and found["speaker"]["chance"] == pytest.approx(1 / 3)
    assert {name for name in found["speaker"] if name.startswith("layer")} == {"layer_0", "layer_1"}


def test_the_language_model_learns_and_is_saved_with_everything_it_needs(work: Work) -> None:
    log = [line["loss"] for line in read_log(work.folder / "asr") if "loss" in line]
    assert len(log) == 80 and np.mean(log[-10:]) < np.mean(log[5:15]) - 0.5
    assert [line["step"] for line in read_log(work.folder / "asr") if "dev_wer" in line] == [20, 40, 60, 80]
    speech_llm = load_speech_llm(work.folder / "asr" / "model")
    assert speech_llm.vocabulary.encoding.layers == 2
    assert work.done("asr")["codec_fingerprint"] == speech_llm.codec.fingerprint
    assert not any(name.startswith("checkpoints/") for name in work.files("asr"))


def test_the_evaluation_matches_its_predictions(work: Work) -> None:
    found = work.json("evaluation/results.json")
    lines = (work.folder / "evaluation" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    predictions = [json.loads(line) for line in lines]
    corpus = read_corpus(work.folder / "corpus", ["test"])
    assert [(p["id"], p["speaker"], p["reference"]) for p in predictions] == [(u.id, u.speaker, u.text) for u in corpus]
    score = word_error_rate([p["reference"] for p in predictions], [p["hypothesis"] for p in predictions])
    assert found["wer"] == score.wer and tuple(found["ci95"]) == score.ci95 and found["words"] == 12
    assert found["training_normalizer"] == found["normalizer"] == "librispeech"
    assert found["tokens_per_second"] == pytest.approx(100) and found["audio_s"] == pytest.approx(3)
    low, high = found["wer_shuffled_audio_ci95"]
    assert 0 <= low <= found["wer_shuffled_audio"] <= high
    speech_llm = load_speech_llm(work.folder / "asr" / "model")
    assert transcribe([u.path for u in corpus], speech_llm) == [p["hypothesis"] for p in predictions]


# ---- killed and started again


def test_a_killed_tokenizer_training_resumes_bit_for_bit(work: Work) -> None:
    whole, run = "tokenizer", "tokenizer_killed"
    work.kill("train_tokenizer.py", f"{RANDOM} output={run}", run)
    with (work.folder / run / "log.jsonl").open("r+") as file:
        lines = file.read()
        file.seek(0)
        file.write('{"step": 0, "before": "the kill"}\n' + lines + '{"step": 4, "mel')
    work.run("train_tokenizer.py", f"{RANDOM} output={run}")
    log = read_log(work.folder / run)
    assert log[0] == {"step": 0, "before": "the kill"}  # it went on instead of starting over
    assert log[1:] == read_log(work.folder / whole)
    expected, found = work.weights(whole), work.weights(run)
    assert expected.keys() == found.keys()
    assert not [key for key in expected if not torch.equal(expected[key], found[key])]


# ---- cut into processes and parts


@pytest.mark.parametrize(
    "body, weights", [("seanet codec.norm=batch_norm", 50), (LINEAR, 20)], ids=["seanet", "linear"]
)
def test_two_processes_train_the_same_tokenizer_as_one(work: Work, body: str, weights: int) -> None:
    runs = [f"tokenizer_{body[:3]}{processes}" for processes in (1, 2)]
    for processes, run in enumerate(runs, 1):
        work.run("train_tokenizer.py", f"{DIVISIBLE} output={run} codec.body={body}", processes=processes)
    one, two = map(work.weights, runs)
    # Adam moves a weight whose gradient is nothing but rounding as far as any other: so not the largest difference
    # counts but the mean, against the way a weight has gone (the sum of the rates)
    way = 1e-4 * (1 + sum(0.5 * (1 + np.cos(np.pi * step / 3)) for step in range(3)))
    trained = [key for key in one if not key.startswith("quantizer")]
    difference = torch.cat([(one[key] - two[key]).abs().flatten() for key in trained]).mean()
    assert len(trained) > weights and difference < 0.01 * way
    # rounding may send a vector that lies between two codes to the other one, and each that does moves the mean of
    # the few counts by half a percent; a process that counted only its own half of the batches would have half of them
    for key in set(one) - set(trained):
        assert (one[key] - two[key]).abs().mean() < 0.03 * one[key].abs().mean(), key


def test_two_processes_train_the_same_teacher_as_one(work: Work) -> None:
    small = "kind=semantic objective=alignment hidden_size=16 layers=1"
    work.run("train_teacher.py", f"{small} output=alignment_2 {TEACHER}", processes=2)
    one, two = work.weights("alignment"), work.weights("alignment_2")
    assert one.keys() == two.keys()
    way = 2e-3 * 6  # no weight has gone further in its 6 steps
    assert torch.cat([(one[key] - two[key]).abs().flatten() for key in one]).mean() < 0.01 * way


# ---- started in this process: messages at the start


@pytest.mark.parametrize(
    "name, words, run",
    [
        ("train_teacher.py", f"kind=speaker output=speaker channels=8 {TEACHER} crop_s=0.4", "speaker"),
        ("train_tokenizer.py", f"{RANDOM} output=tokenizer", "tokenizer"),
        ("train_asr.py", f"{ASR_RANDOM} output=asr", "asr"),
    ],
)
def test_a_finished_run_is_not_repeated(
    work: Work, here: Callable, capsys: pytest.CaptureFixture, name: str, words: str, run: str
) -> None:
    def stamps() -> dict[Path, int]:
        files = (path for path in (work.folder / run).rglob("*") if path.is_file() and path.name != ".lock")
        return {path: path.stat().st_mtime_ns for path in files}

    before = stamps()
    here(name, words)
    assert f"{run} is finished: {{'steps': " in capsys.readouterr().out
    assert stamps() == before


def test_a_finished_run_is_not_continued_with_other_settings(work: Work, here: Callable) -> None:
    with pytest.raises(SystemExit, match="holds a run with another configuration .*seed: 0 -> 1"):
        here("train_asr.py", f"{ASR_RANDOM} seed=1 output=asr")


RECIPES = {
    "train_teacher.py": ("kind=speaker data=corpus output=new stepps=3", "did you mean steps?"),
    "train_tokenizer.py": (f"{RANDOM} output=new codec.dimensoin=3", "did you mean codec.dimension?"),
    "encode_speech.py": ("codec=tokenizer/model data=corpus output=new layer=1", "did you mean layers?"),
    "eval_tokenizer.py": ("codes=codes data=corpus output=new split=[a]", "did you mean "),
    "train_asr.py": (f"{ASR} {EXACT} output=new small.hiden_size=3", "did you mean small.hidden_size?"),
    "eval_asr.py": ("model=asr/model codes=codes output=new normaliser=none", "did you mean normalizer?"),
    "demo.py": ("output=new fresch=true", "did you mean fresh?"),
    "fit_units.py": ("model=alignment/model data=corpus output=new cluster=3", "did you mean clusters?"),
    "benchmark.py": ("row=lm_step codes=codes output=new repeat=1", "did you mean repeats?"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_wrong_key_exits_with_2_and_a_hint_before_anything_is_written(
    work: Work, here: Callable, capsys: pytest.CaptureFixture, name: str
) -> None:
    words, hint = RECIPES[name]
    with pytest.raises(SystemExit) as end:
        here(name, words)
    assert end.value.code == 2 and hint in capsys.readouterr().err.splitlines()[-1]
    assert not (work.folder / "new").exists()


MISSING = [
    ("train_teacher.py", f"kind=speaker {TEACHER} data=nowhere", "nowhere: no such corpus folder"),
    ("train_tokenizer.py", f"{RANDOM} data=nowhere", "nowhere: no such corpus folder"),
    ("encode_speech.py", "codec=tokenizer/model data=nowhere", "nowhere: no such corpus folder"),
    ("encode_speech.py", "codec=./nowhere data=corpus", "nowhere: no such folder"),
    ("train_asr.py", f"{ASR} {EXACT} codec=./nowhere", "nowhere: no such folder"),
    ("train_asr.py", f"{ASR} {EXACT} codes=nowhere", "nowhere holds no encoded speech"),
    ("eval_asr.py", "model=./nowhere codes=codes", "nowhere: no such folder"),
    ("train_tokenizer.py", f"{RANDOM} semantic.teacher=./nowhere", "nowhere: no such folder"),
]


@pytest.mark.parametrize("name, words, message", MISSING)
def test_missing_input_is_named_in_one_line_without_a_traceback(
    tmp_path: Path, here: Callable, name: str, words: str, message: str
) -> None:
    with pytest.raises(SystemExit, match=message) as error:
        here(name, f"{words} output={tmp_path / 'new'}")
    assert len(str(error.value).splitlines()) == 1


def test_a_mistyped_corpus_does_not_block_the_output_folder(tmp_path: Path, here: Callable) -> None:
    words = f"kind=speaker {TEACHER} steps=1 crop_s=0.4 channels=8 output={tmp_path / 'new'}"
    with pytest.raises(BaseException, match="no such corpus folder"):
        here("train_teacher.py", f"{words} data=nowhere")
    here("train_teacher.py", words)


# ---- parts of recipes with an answer known by hand


def test_the_control_gives_no_utterance_its_own_audio(recipe: Callable[[str], ModuleType]) -> None:
    for count in range(2, 40):
        order = recipe("eval_asr.py").cyclic_shuffle(count, seed=0)
        assert sorted(order) == list(range(count)) and not (order == np.arange(count)).any()
        place, visited = 0, []
        for _ in range(count):
            visited.append(place)
            place = int(order[place])
        assert len(set(visited)) == count and place == 0  # one long cycle


@pytest.mark.parametrize(
    "scores, same, rate",
    [
        ([0.9, 0.8, 0.2, 0.1], [True, True, False, False], 0.0),
        ([0.9, 0.2, 0.8, 0.1], [True, True, False, False], 0.5),
        ([0.9, 0.8, 0.7, 0.3, 0.75, 0.2, 0.1, 0.0], [True] * 4 + [False] * 4, 0.25),
    ],
)
def test_the_equal_error_rate_matches_a_manual_computation(
    recipe: Callable[[str], ModuleType], scores: list[float], same: list[bool], rate: float
) -> None:
    found = recipe("train_teacher.py")._equal_error_rate(torch.tensor(scores), torch.tensor(same))
    assert found == pytest.approx(rate)


# ---- the demo


def test_fresh_deletes_only_what_the_demo_created(tmp_path: Path, here: Callable) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit, match="holds what demo did not write"):
        here("demo.py", f"output={tmp_path} --fresh")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_the_demo_checks_the_configurations_of_its_stages_first(tmp_path: Path, here: Callable) -> None:
    (tmp_path / "a #1.yaml").write_text("steps: 10\ncrop_s: 0.01\n")
    for words, message in (
        ("asr=nowhere.yaml", "nowhere.yaml: no such file"),
        ("scale=1e-3", "small.text_steps must be"),
    ):
        with pytest.raises(SystemExit, match=message):
            here("demo.py", f"output={tmp_path / 'new'} {words}")
    with pytest.raises(SystemExit, match="crop_s must be at least"):
        here("demo.py", f"output={tmp_path / 'new'}", f"speaker_teacher={tmp_path / 'a #1.yaml'}")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "others, tested, unseen",
    [("ab", "c", True), ("ab", "ac", False), (["a", None], "c", False), ("ab", [None], False), ("", "c", True)],
)
def test_speakers_are_unseen_where_all_are_known_and_none_is_in_two_splits(
    recipe: Callable[[str], ModuleType], others: Iterable[str | None], tested: Iterable[str | None], unseen: bool
) -> None:
    rows = [{"split": "train", "speaker": name} for name in others]
    rows += [{"split": "test", "speaker": name} for name in tested]
    assert recipe("demo.py").unseen_speakers(rows) is unseen


def test_the_steps_of_a_stage_of_the_demo_take_scale_and_seed(
    tmp_path: Path, recipe: Callable[[str], ModuleType]
) -> None:
    demo, file = recipe("demo.py"), tmp_path / "a #1.yaml"
    file.write_text("kind: speaker\nsteps: 10\n")
    words = [f"data={tmp_path}/x #2", "output=12:30"]
    for scale, steps in ((1.0, []), (0.26, ["steps=3"]), (1e-9, ["steps=1"])):
        found = demo.training("train_teacher.py", str(file), demo.DemoConfig(scale=scale), *words)
        assert found == ["train_teacher.py", f"--config={file}", *steps, *words]
    found = demo.training("train_teacher.py", str(file), demo.DemoConfig(seed=2), *words)
    assert found == ["train_teacher.py", f"--config={file}", "seed=2", *words]


def test_a_demo_with_a_published_tokenizer_trains_the_language_model_alone(
    work: Work, here: Callable, stages_here: list[list[str]], without_pictures: None, tmp_path: Path
) -> None:
    small = "{text_tokens: 300, text_steps: 1, hidden_size: 16, intermediate_size: 32, num_attention_heads: 2}"
    steps = "steps: 2\nbatch_tokens: 200\nwarmup: 1"
    (tmp_path / "asr.yaml").write_text(f"model: null\n{steps}\nprecision: 'no'\nsmall: {small}\n")
    words = f"output={tmp_path / 'demo'} data=corpus asr={tmp_path / 'asr.yaml'}"
    with pytest.raises(SystemExit, match="x/y is no folder of a model and cannot be fetched: .* with audio_tokenizer="):
        here("demo.py", f"{words} audio_tokenizer=recognizer:x/y")
    with pytest.raises(SystemExit, match="x/y is no folder of a model and cannot be fetched: .* with language_model="):
        here("demo.py", f"{words} audio_tokenizer=tokenizer/model language_model=x/y")
    assert not (tmp_path / "demo").exists()
    here("demo.py", f"{words} audio_tokenizer=tokenizer/model")
    assert [name for name, *_ in stages_here] == ["encode_speech.py", "train_asr.py", "eval_asr.py"]
    results = json.loads((tmp_path / "demo" / "results.json").read_text(encoding="utf-8"))
    assert results["utterances"] == 6 and results["codec_fingerprint"] == work.done("codes")["encoding"]["fingerprint"]
    assert not results["codebooks"] and (tmp_path / "demo" / "report.html").is_file()


def test_the_demo_recognises_splits_by_name(work: Work, tmp_path: Path, recipe: Callable[[str], ModuleType]) -> None:
    names = {"train": "train-clean-100", "dev": "dev-clean", "test": "test-other"}
    rows = read_jsonl(work.folder / "corpus" / "manifest.jsonl")
    named = [{**row, "path": str(work.folder / "corpus" / row["path"]), "split": names[row["split"]]} for row in rows]
    write_jsonl(tmp_path / "manifest.jsonl", named)
    recipe("demo.py").gather(str(tmp_path), tmp_path / "out")
    gathered = read_corpus(tmp_path / "out")
    assert [utterance.split for utterance in gathered] == [row["split"] for row in rows]
    assert [[list(pair) for pair in utterance.phones] for utterance in gathered] == [row["phones"] for row in rows]
    assert all(Path(utterance.path).is_file() for utterance in gathered)


def test_the_demo_splits_a_corpus_by_speaker(work: Work, tmp_path: Path, recipe: Callable[[str], ModuleType]) -> None:
    rows = read_jsonl(work.folder / "corpus" / "manifest.jsonl")
    one = [{**row, "path": str(work.folder / "corpus" / row["path"]), "split": "train"} for row in rows]
    write_jsonl(tmp_path / "manifest.jsonl", one)
    recipe("demo.py").gather(str(tmp_path), tmp_path / "out")
    speakers = {s: {u.speaker for u in read_corpus(tmp_path / "out", [s])} for s in ("train", "dev", "test")}
    assert sum(map(len, speakers.values())) == 3
