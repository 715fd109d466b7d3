"""recipes/train_asr.py on a handful of tiny utterances: killed, cut into processes, stopped early, as an adapter."""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType, is_tensorboard_available, is_wandb_available
from peft import PeftModel
from safetensors.torch import load_file

from speechllm import (
    DataError,
    Encoding,
    RunError,
    SpeechCodec,
    Utterance,
    encode_shards,
    load_codes,
    load_speech_llm,
    load_tokenizer,
    speech_of,
    transcribe,
    transcribe_codes,
    word_error_rate,
)
from speechllm.decoding import recognize
from speechllm.evaluation.normalizers import NORMALIZERS
from speechllm.runs.run import read_log
from speechllm.small_model import small_qwen2, small_text_tokenizer
from speechllm.training import validation
from speechllm.training.checkpoints import TrainingState, trained_weights
from speechllm.training.plan import SIZES as SIZES_OF_PRODUCTS
from speechllm.training.validation import dev_rates
from tokenizer.files import read_jsonl, write_jsonl
from tokenizer.settings import SettingsError
from tokenizer.training.small_teachers import FrameClassifier, save_recognizer, small_hubert

if TYPE_CHECKING:
    from tests.recipes.conftest import Work

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "train_asr.py"
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
BASE = (
    "codes=codes codec=codec splits=[train] dev_splits=[dev] layers=2 precision=no batch_tokens=400 steps=12 "
    "learning_rate=1e-3 warmup=2 log_every=1 validate_every=3 save_every=2"
)
SMALL = f"{BASE} model=null small.text_tokens=300 small.text_steps=2 " + " ".join(
    f"small.{name}={size}" for name, size in SIZES.items()
)
# everything that is drawn at random or remembered from step to step
EVERYTHING = (
    f"{SMALL} augmentation.tempo=0.2 augmentation.substitute=0.2 augmentation.mask=0.1 augmentation.spans=2 "
    "speech_loss=0.5 row_learning_rate=4e-3 weight_average=0.8 gradient_checkpointing=true patience=4 "
    "micro_batch_tokens=200"
) + (" trackers=[tensorboard]" if is_tensorboard_available() else "")
LORA = f"{BASE} model=base train=lora lora.rank=4 lora.alpha=8 lora.dropout=0.2 row_learning_rate=4e-3 row_steps=2"
TEXTS = ["ON", "RED LAMP", "TURN ON THE RED LAMP", "LAMP", "THE RED"]


@pytest.fixture(scope="module")
def work(make_work: Callable[[], Work], small_codec: SpeechCodec) -> Work:
    """Codes, their codec and a language model, and a run with everything on."""
    work = make_work()
    folder = work.folder
    draw = np.random.default_rng(0)
    utterances = []
    for i in range(15):
        seconds = float(draw.uniform(0.2, 0.8))
        path = folder / f"u{i:02}.wav"
        level = np.repeat(draw.uniform(0.05, 1, 200), 320)[: int(seconds * 16_000)]
        soundfile.write(path, 0.3 * level * draw.standard_normal(len(level)), 16_000)
        split = "train" if i < 12 else "dev"
        utterances.append(Utterance(path.stem, path, seconds, text=TEXTS[i % 5], speaker="s", split=split))
    list(encode_shards(utterances, small_codec, folder / "codes"))
    small_codec.save_pretrained(folder / "codec")
    text_tokenizer = small_text_tokenizer(TEXTS, 300)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small_qwen2(text_tokenizer, **SIZES, initializer_range=0.5).save_pretrained(folder / "base")
    text_tokenizer.save_pretrained(folder / "base")
    work.run(RECIPE, f"{EVERYTHING} output=whole")
    return work


@pytest.fixture
def here(here: Callable, monkeypatch: pytest.MonkeyPatch, without_pictures: None) -> Callable[..., None]:
    monkeypatch.setitem(SIZES_OF_PRODUCTS, "cpu", 16)  # the plan need not know how fast this machine is
    return functools.partial(here, RECIPE)


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float) -> None:
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], atol=atol, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


# ---- with everything on


def test_the_run_has_its_logs_and_results(work: Work) -> None:
    assert list(work.log("whole", "loss")) == list(work.log("whole", "speech_loss")) == list(range(1, 13))
    wers = work.log("whole", "dev_wer")
    assert list(wers) == [3, 6, 9, 12]
    done = work.done("whole")
    assert done["steps"] == 12 and done["dev_wer"] == min(wers.values()) == wers[done["best_step"]]
    assert not (work.folder / "whole" / "checkpoints").exists()
    assert bool(list((work.folder / "whole").rglob("events.out.tfevents*"))) == bool(is_tensorboard_available())


@pytest.mark.parametrize("keep_best", [True, False])
def test_the_average_at_the_best_validation_is_exported(
    work: Work, here: Callable, monkeypatch: pytest.MonkeyPatch, keep_best: bool
) -> None:
    rates, averages = iter([0.9, 0.3, 0.6]), []
    follow, record = TrainingState.follow, TrainingState.record_validation

    def following(state: TrainingState) -> None:
        follow(state)
        now, steps = trained_weights(state.model), len(averages)
        last, share = averages[-1] if averages else now, (1 + steps) / (10 + steps)  # below 0.8
        averages.append({name: share * last[name] + (1 - share) * now[name] for name in now})

    def recording(state: TrainingState, step: int, wer: float, keep: bool) -> None:
        record(state, step, next(rates), keep)

    monkeypatch.setattr(TrainingState, "follow", following)
    monkeypatch.setattr(TrainingState, "record_validation", recording)
    output = f"best_{keep_best}"
    words = f"{SMALL} weight_average=0.8 steps=6 validate_every=2 learning_rate=3e-2 keep_best={keep_best}".lower()
    here(f"{words} output={output}")
    assert len(averages) == 6 and work.done(output)["best_step"] == 4
    found, expected = work.weights(output), averages[3 if keep_best else 5]
    assert_close(found, {name: expected[name] for name in found}, atol=1e-6)
    assert any((averages[3][name] - averages[5][name]).abs().max() > 1e-3 for name in found)


def test_the_exported_model_has_the_rate_of_the_best_validation(work: Work) -> None:
    speech_llm = load_speech_llm(work.folder / "whole" / "model")
    dev, encoding = load_codes(work.folder / "codes", ["dev"])
    hypotheses = transcribe_codes([speech_of(row, encoding) for row in dev], speech_llm)
    assert word_error_rate(dev["text"], hypotheses).wer == work.done("whole")["dev_wer"]


def test_a_killed_run_resumes_bit_for_bit(work: Work) -> None:
    words = f"{EVERYTHING} output=killed"
    work.kill(RECIPE, words, "killed", checkpoints=2)  # past the first validation
    with (work.folder / "killed" / "log.jsonl").open("r+") as file:
        lines = file.read()
        file.seek(0)
        file.write('{"step": 0, "before": "the kill"}\n' + lines)
    work.run(RECIPE, words)
    log = read_log(work.folder / "killed")
    assert log[0] == {"step": 0, "before": "the kill"}  # it went on instead of starting over
    assert log[1:] == read_log(work.folder / "whole") and work.done("killed") == work.done("whole")
    assert_close(work.weights("killed"), work.weights("whole"), atol=0)


def test_two_processes_and_other_micro_batches_train_the_same(work: Work) -> None:
    work.run(RECIPE, f"{EVERYTHING} micro_batch_tokens=70 output=two", processes=2)
    assert_close(work.weights("two"), work.weights("whole"), atol=1e-5)
    for key in ("loss", "speech_loss"):
        assert list(work.log("two", key).values()) == pytest.approx(list(work.log("whole", key).values()), abs=1e-4)


# ---- adapters


@pytest.fixture(scope="module")
def lora(work: Work) -> Work:
    work.run(RECIPE, f"{LORA} output=lora")
    return work


def test_only_the_adapter_is_trained_and_saved(lora: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lora.folder)
    found = lora.weights("lora")
    assert any("lora_A" in name for name in found) and any("trainable_tokens" in name for name in found)
    assert all("lora_" in name or "trainable_tokens" in name for name in found)
    assert all(value.any() for name, value in found.items() if "lora_B" in name)  # they begin at zero
    speech_llm = load_speech_llm("lora/model")
    assert isinstance(speech_llm.model, PeftModel)
    dev, encoding = load_codes("codes", ["dev"])
    hypotheses = transcribe_codes([speech_of(row, encoding) for row in dev], speech_llm)
    # 4 of the 8 words: after three steps tokens are nearly as likely as each other, and the last bits of sums decide
    assert word_error_rate(dev["text"], hypotheses).wer == pytest.approx(lora.done("lora")["dev_wer"], abs=0.5)


def test_a_killed_adapter_training_resumes_bit_for_bit(lora: Work) -> None:
    lora.kill(RECIPE, f"{LORA} output=lora_killed", "lora_killed", checkpoints=2)
    state = torch.load(sorted((lora.folder / "lora_killed" / "checkpoints").iterdir())[0], weights_only=True)
    assert all("lora_" in name or "trainable_tokens" in name for name in state["model"])  # the rest is not trained
    lora.run(RECIPE, f"{LORA} output=lora_killed")
    assert read_log(lora.folder / "lora_killed") == read_log(lora.folder / "lora")
    assert_close(lora.weights("lora_killed"), lora.weights("lora"), atol=0)


def test_only_the_new_rows_are_trained_in_the_first_steps(work: Work, here: Callable[[str], None]) -> None:
    base = f"{BASE} model=base dev_splits=null"
    here(f"{base} steps=3 row_steps=3 row_learning_rate=1e-2 output=row_steps")
    here(f"{base} steps=3 train=rows learning_rate=1e-2 output=rows")
    before, found = load_file(work.folder / "base" / "model.safetensors"), work.weights("row_steps")
    texts = before["model.embed_tokens.weight"].shape[0]
    for name, value in before.items():
        assert torch.equal(found[name][:texts] if "embed" in name else found[name], value), name
    # and that is just what training the rows alone does
    rows = next(value for name, value in work.weights("rows").items() if "trainable_tokens" in name)
    torch.testing.assert_close(rows, found["model.embed_tokens.weight"][texts:], atol=1e-5, rtol=0)


def test_an_extended_model_is_trained_further_with_its_rows(work: Work, here: Callable[[str], None]) -> None:
    blind = f"{BASE} dev_splits=null"
    here(f"{blind} model=base steps=1 train=full output=first")
    here(f"{blind} model=first/model steps=1 learning_rate=1e-9 warmup=1 output=second")
    first, second = load_speech_llm("first/model"), load_speech_llm("second/model")
    assert second.vocabulary == first.vocabulary and len(second.text_tokenizer) == len(first.text_tokenizer)
    assert_close(work.weights("second"), work.weights("first"), atol=1e-6)
    here(f"{blind} model=first/model steps=1 train=lora lora.rank=2 prefix_attention=true output=third")
    assert load_speech_llm("third/model").vocabulary.prefix_attention  # an adapter on it
    for number, (words, message) in enumerate(
        (
            (
                "layers=1",
                r"first/model reads \(layers, order, stack\) \(2, 'frame', 1\), but \(1, 'frame', 1\) was asked",
            ),
            ("model=third/model", "third/model is an adapter: merge it with `speechllm mer"),
        )
    ):
        with pytest.raises(SystemExit, match=message):
            here(f"{BASE} model=first/model {words} output=refused_{number}")


def test_steps_with_a_non_finite_gradient_are_skipped_and_many_end_the_training(
    work: Work, here: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = torch.Tensor.backward

    def broken(loss: torch.Tensor, *args: object, **kwargs: object) -> None:
        usual(loss * (math.nan if broken.steps in skipped else 1), *args, **kwargs)
        broken.steps += 1

    monkeypatch.setattr(torch.Tensor, "backward", broken)
    broken.steps, skipped = 0, [4]
    here(f"{BASE} model=base dev_splits=null output=skipped")
    assert work.done("skipped")["non_finite"] == 1 and list(work.log("skipped", "non_finite")) == [5]
    assert all(math.isfinite(loss) for loss in work.log("skipped", "loss").values())
    assert all(value.isfinite().all() for value in work.weights("skipped").values())
    broken.steps, skipped = 0, range(4, 12)
    with pytest.raises(SystemExit, match=r"in 8 steps in a row, up to step 12; the last checkpoint is kept: .* u\d\d"):
        here(f"{BASE} model=base dev_splits=null output=broken")
    (*_, last) = sorted((work.folder / "broken" / "checkpoints").glob("step_*.pt"))
    state = torch.load(last)
    assert state["step"] == 4 and all(value.isfinite().all() for value in state["model"].values())


# ---- speech that is no codes


@pytest.fixture(scope="module")
def other_speech(work: Work) -> Work:
    """The same recordings as features, and as texts, of one small HuBERT with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = FrameClassifier(small_hubert(8, 1), 6)
        torch.nn.init.normal_(classifier.head.weight)  # so that texts are not empty
    save_recognizer(classifier, list("|ENOT"), work.folder / "hubert")
    utterances = [
        Utterance(row["id"], work.folder / f"{row['id']}.wav", row["duration_s"], row["split"], row["text"], "s")
        for row in load_codes(work.folder / "codes")[0]
    ]
    for kind in ("features", "recognizer"):
        list(encode_shards(utterances, load_tokenizer(f"{kind}:{work.folder / 'hubert'}"), work.folder / kind))
    return work


@pytest.mark.parametrize("train", ["model=null small.text_tokens=300 small.text_steps=2", "model=base train=lora"])
@pytest.mark.parametrize("kind", ["features", "recognizer"])
def test_the_recipe_supports_features_and_texts(
    other_speech: Work, here: Callable, recipe: Callable, kind: str, train: str
) -> None:
    output = f"{kind}_{train.split('=')[-1]}"
    words = f"{BASE} {train} layers=1 codes={kind} codec={kind}:hubert lora.rank=2 steps=3 output={output}"
    here(words)
    done = other_speech.done(output)
    speech_llm = load_speech_llm(f"{output}/model")
    dev, encoding = load_codes(kind, ["dev"])
    speech = [speech_of(row, encoding) for row in dev]
    found = recognize(speech, speech_llm, durations_s=dev["duration_s"])
    assert word_error_rate(dev["text"], [each.text for each in found]).wer == done["dev_wer"]
    texts = transcribe([other_speech.folder / f"{name}.wav" for name in dev["id"]], speech_llm)
    assert len(texts) == len(found)

    eval_asr = recipe("eval_asr.py")
    config = eval_asr.EvalAsrConfig(f"{output}/model", kind, f"{output}/test", splits=["dev"], fallback=False)
    assert eval_asr.load(replace(config, precision="bf16")).model.dtype == torch.bfloat16
    eval_asr.main(config)
    results = json.loads(Path(f"{output}/test/results.json").read_text(encoding="utf-8"))
    assert results["wer"] == done["dev_wer"] and results["config"]["splits"] == ["dev"]
    assert {row["split"] for row in read_jsonl(f"{output}/test/predictions.jsonl")} == {"dev"}
    alone = word_error_rate(dev["text"], dev["recognized"]).wer if kind == "recognizer" else None
    assert results.get("wer_recognizer") == alone

    without = eval_asr.EvalAsrConfig(None, kind, f"{output}/alone", splits=["dev"])
    with pytest.raises(SettingsError, match="model is null"):
        eval_asr.EvalAsrConfig(None, kind, "x", beams=2)
    if kind == "features":
        with pytest.raises(DataError, match="features say nothing without a language model"):
            eval_asr.main(without)
        return
    eval_asr.main(without)
    results = json.loads(Path(f"{output}/alone/results.json").read_text(encoding="utf-8"))
    assert results["wer"] == alone and "wer_shuffled_audio" in results and "tokens_per_second" not in results


def test_a_killed_training_on_features_resumes_bit_for_bit(other_speech: Work) -> None:
    words = (
        f"{SMALL} layers=1 codes=features codec=features:hubert weight_average=0.8 augmentation.tempo=0.2 "
        "augmentation.mask=0.1 augmentation.spans=1"
    )
    other_speech.run(RECIPE, f"{words} output=features_whole")
    other_speech.kill(RECIPE, f"{words} output=features_killed", "features_killed", checkpoints=2)
    other_speech.run(RECIPE, f"{words} output=features_killed")
    assert read_log(other_speech.folder / "features_killed") == read_log(other_speech.folder / "features_whole")
    assert_close(other_speech.weights("features_killed"), other_speech.weights("features_whole"), atol=0)
    projectors = [
        load_file(other_speech.folder / run / "model" / "speech_projector.safetensors")
        for run in ("features_killed", "features_whole")
    ]
    assert_close(*projectors, atol=0)


# ---- rows of messages


@pytest.fixture(scope="module")
def rows(work: Work) -> Work:
    """Files with a question about each training utterance, and with text alone."""
    names = load_codes(work.folder / "codes", ["train"])[0]["id"]
    ask = [{"type": "text", "text": "HOW MANY "}, {"type": "audio", "id": names[0]}]
    asked = [
        {"messages": [{"role": "user", "content": [*ask, {"type": "audio", "id": name}]}, said(name)], "task": "count"}
        for name in names
    ]
    write_jsonl(work.folder / "count.jsonl", asked)
    write_jsonl(work.folder / "text.jsonl", [{"messages": [{"role": "user", "content": "LAMP"}, said("RED")]}])
    write_jsonl(work.folder / "open.jsonl", [{"messages": asked[0]["messages"][:1], "task": "count"}])
    write_jsonl(work.folder / "bad.jsonl", [asked[0], {"messages": [{"role": "user", "content": ask}]}])
    (work.folder / "held_out.txt").write_text("TURN ON\n\nTHE LAMP IS RED\n", encoding="utf-8")
    return work


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_other_tasks_are_learnt_beside_transcription_and_answers_counted(
    rows: Work, here: Callable, recipe: Callable, capsys: pytest.CaptureFixture
) -> None:
    words = f"{BASE} model=base dev_text=held_out.txt output=tasks"
    here(words, "rows=[{file: count.jsonl, weight: 0.5}, {file: text.jsonl}]")
    assert "asr: 25 rows, " in capsys.readouterr().out  # 12 utterances, 12 questions and a text
    done = rows.done("tasks")
    assert list(rows.log("tasks", "text_perplexity")) == [0]
    assert rows.log("tasks", "text_perplexity")[0] == done["text_perplexity_before"] != done["text_perplexity"]
    count = [len(ids) - 1 for ids in small_text_tokenizer(TEXTS, 300)(["TURN ON", "THE LAMP IS RED"])["input_ids"]]
    assert (done["text_words"], done["text_tokens"]) == (6, sum(count))  # each line's first token is not predicted
    eval_rows = recipe("eval_rows.py")
    files = ["open.jsonl", "count.jsonl", "text.jsonl"]
    eval_rows.main(eval_rows.EvalRowsConfig("tasks/model", "codes", files, "answers", answer_tokens=5))
    results = json.loads(Path("answers/results.json").read_text(encoding="utf-8"))
    asked, *found = read_jsonl("answers/predictions.jsonl")
    assert {task: one["rows"] for task, one in results["tasks"].items()} == {"count": 12, "untitled": 1}
    assert [row["reference"] for row in found[-2:]] == ["u11", "RED"] and found[0]["row"] == "count.jsonl, row 1"
    assert results["tasks"]["count"]["correct"] == sum(row["correct"] for row in found[:12]) / 12
    cut_off = [row for row in (asked, *found) if row.get("runaway") == "bound"]
    assert results["unanswered"] == 1 and results["cut_off"] == len(cut_off) > 0
    assert asked == {
        "row": "open.jsonl, row 1",
        "task": "count",
        "hypothesis": found[0]["hypothesis"],  # to the same question about the same recording
        **{key: found[0][key] for key in ("runaway",) if key in found[0]},
    }
    said_last = capsys.readouterr().out
    assert f"{len(cut_off)} of 14 answers were cut off at answer_tokens=5: try more" in said_last
    assert "| count | 12 | " in said_last
    with pytest.raises(SystemExit, match=r"bad\.jsonl, row 2: no message by the assistant"):
        here(f"{BASE} model=base output=never", "rows=[{file: bad.jsonl}]")
    assert not (rows.folder / "never").exists()


def test_only_other_tasks_need_no_transcripts(rows: Work, here: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"{BASE} model=base transcription_weight=0 dev_splits=null steps=2 output=only"
    here(words, "rows=[{file: count.jsonl}]")
    assert rows.done("only")["steps"] == 2
    with pytest.raises(SystemExit):  # the best checkpoint would be that of a task that is not learnt
        here(f"{BASE} model=base transcription_weight=0 output=never", "rows=[{file: count.jsonl}]")
    assert "transcription_weight=0 trains no transcription, which dev_splits measure" in capsys.readouterr().err


# ---- started in this process


def test_training_stops_early_without_improvement(work: Work, here: Callable, capsys: pytest.CaptureFixture) -> None:
    here(f"{SMALL} learning_rate=1e-12 small.text_steps=1 validate_every=1 patience=2 output=patience")
    assert "no better WER in 2 validations: training stops after 3 steps" in capsys.readouterr().out
    assert list(work.log("patience", "dev_wer")) == [1, 2, 3]
    assert work.done("patience")["steps"] == 3 and work.done("patience")["best_step"] == 1


def test_the_last_weights_are_exported_without_keep_best(work: Work, here: Callable) -> None:
    words = f"{SMALL} learning_rate=3e-2 validate_every=2 steps=6"
    here(f"{words} output=best")
    here(f"{words} keep_best=false output=last")
    here(f"{words} dev_splits=null output=blind")
    assert work.done("best")["best_step"] < 6  # or the test shows nothing
    assert_close(work.weights("last"), work.weights("blind"), atol=0)
    assert any(not torch.equal(value, work.weights("last")[name]) for name, value in work.weights("best").items())


def test_the_plan_is_printed_first(work: Work, here: Callable, capsys: pytest.CaptureFixture) -> None:
    here(f"{SMALL} steps=2 small.text_steps=1 max_utterances=5 precision=bf16 output=plan")
    lines = capsys.readouterr().out.splitlines()
    assert all(math.isfinite(loss) for loss in work.log("plan", "loss").values())
    assert lines[0].startswith("asr: 5 rows, ") and "2 steps of up to 400 tokens" in lines[0]
    assert [line.split(":")[0] for line in lines[1:3]] == ["model", "memory"] and "new rows" in lines[3]


@pytest.mark.parametrize(
    "words, message",
    [
        (
            "model=null train=lora",
            "row_steps need a pretrained language model, but model is null",
        ),
        ("splits=null", "splits=null trains on all splits, dev_splits among them: set splits, or dev_splits=null"),
        ("dev_splits=null patience=3", "patience needs dev_splits for measuring the WER"),
        (
            "batch_tokens=0 max_utterances=-1",
            "max_utterances must be at least 1, got -1\n  batch_tokens must be at least 1, got 0",
        ),
        ("augmentation.mask=2", "augmentation.mask must be at least 0 and below 1, got 2.0"),
        ("clip=0 lora.rank=0", "lora.rank must be at least 1, got 0\n  clip must be above 0, got 0.0"),
        ("learning_rate=.nan", "learning_rate must be float, got .nan"),
        (
            "row_learning_rate=-1e-3 speech_loss=-1",
            "speech_loss must be at least 0, got -1.0\n  row_learning_rate must be at least 0, got -0.001",
        ),
        ("row_steps=13", "row_steps must be at most steps = 12, got 13"),
        ("model=null row_steps=1", "row_steps need a pretrained language model, but model is null"),
        ("prefix_attention=true speech_loss=1", "speech_loss predicts codes that prefix_attention shows"),
    ],
)
def test_impossible_settings_are_reported_together(
    work: Work, here: Callable, capsys: pytest.CaptureFixture, words: str, message: str
) -> None:
    with pytest.raises(SystemExit) as end:
        here(f"{BASE} {words} output=never")
    assert end.value.code == 2 and message in capsys.readouterr().err
    assert not (work.folder / "never").exists()


@pytest.mark.skipif(is_wandb_available(), reason="nothing is missing")
def test_a_tracker_that_is_not_installed_is_named(here: Callable) -> None:
    with pytest.raises(SystemExit, match="trackers: wandb is not installed: run pip install wandb"):
        here(f"{SMALL} trackers=[wandb] output=tracked")


def test_splits_without_transcripts_are_named(work: Work, here: Callable, small_codec: SpeechCodec) -> None:
    silent = [Utterance("u00", str(work.folder / "u00.wav"), 0.5, split=split) for split in ("train", "dev")]
    speaking = Utterance("u01", str(work.folder / "u01.wav"), 0.5, text="ON", split="train")
    list(encode_shards([silent[0]], small_codec, work.folder / "silent"))
    list(encode_shards([speaking, silent[1]], small_codec, work.folder / "half"))
    with pytest.raises(SystemExit, match="silent: no utterance for training has a transcript"):
        here(f"{SMALL} codes=silent dev_splits=null output=never")
    with pytest.raises(SystemExit, match="half: no utterance for validation has a transcript"):
        here(f"{SMALL} codes=half output=never")
    assert not (work.folder / "never").exists()


# ---- more than one GPU


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
@pytest.mark.parametrize(
    "settings", [{"weight_average": 0.9}, {"row_learning_rate": 1e-3}, {"row_steps": 3}, {"train": "lora"}]
)
def test_settings_that_need_full_weights_are_refused_with_sharding(recipe: Callable, kind: str, settings: dict) -> None:
    module = recipe("train_asr.py")
    config = module.AsrConfig(codes="", codec="", output="", **settings)
    unsharded, sharded = (SimpleNamespace(distributed_type=DistributedType(name)) for name in ("MULTI_GPU", kind))
    module.refuse_sharding(unsharded, config)
    if settings == {"train": "lora"}:
        config.row_learning_rate = 1e-3
        with pytest.raises(RunError, match="cannot shard an adapter's rows") if kind == "FSDP" else nullcontext():
            module.refuse_sharding(sharded, config)
        config.row_steps = 3  # DeepSpeed steps by itself, before the other gradients can be dropped
        with pytest.raises(RunError, match="adapter" if kind == "FSDP" else "row_steps"):
            module.refuse_sharding(sharded, config)
    else:
        with pytest.raises(RunError, match="FSDP and DeepSpeed shard them"):
            module.refuse_sharding(sharded, config)


# Accelerate has FSDP for GPUs only: these processes it takes for such, on gloo
FSDP_ON_CPU = """
import runpy, sys
from accelerate import PartialState
from accelerate.utils import DistributedType

PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_two_processes_with_sharded_weights_train_the_same(work: Work) -> None:
    words = f"{BASE} model=base steps=6 weight_decay=0.1 micro_batch_tokens=200"
    work.run(RECIPE, f"{words} output=undivided")
    (work.folder / "fsdp.py").write_text(FSDP_ON_CPU)
    settings = yaml.safe_load((ROOT / "configs" / "accelerate" / "fsdp2.yaml").read_text(encoding="utf-8"))
    renamed = {name.upper().replace("LAYER_CLS", "CLS"): f"{value}" for name, value in settings["fsdp_config"].items()}
    environment = {**renamed, "ACCELERATE_USE_FSDP": "true"}
    command = f"{ROOT / 'recipes' / RECIPE} {words} output=divided"
    work.run(str(work.folder / "fsdp.py"), command, processes=2, environment=environment)
    assert work.log("divided", "loss") == pytest.approx(work.log("undivided", "loss"), abs=1e-5)
    assert work.log("divided", "dev_wer") == work.log("undivided", "dev_wer")
    assert_close(work.weights("divided"), work.weights("undivided"), atol=1e-4)


def test_two_processes_train_the_same_adapter_as_one(work: Work) -> None:
    words = LORA.replace("lora.dropout=0.2", "lora.dropout=0 steps=6")
    work.run(RECIPE, f"{words} output=adapter_1")
    work.run(RECIPE, f"{words} output=adapter_2", processes=2)
    assert_close(work.weights("adapter_2"), work.weights("adapter_1"), atol=1e-4)


@pytest.mark.parametrize(
    "text, heard, normalizer, rates",
    [
        ("3.5 percent", "three point five percent", "whisper_english", {"dev_wer": 0}),
        ("It's 3.5!", "it's 3 5", "librispeech", {"dev_wer": 0}),
        ("It's", "it's", "none", {"dev_wer": 1}),
        ("今天天气很好", "今天 天汽很好", "librispeech", {"dev_wer": 2, "dev_cer": pytest.approx(1 / 6)}),
    ],
)
def test_the_dev_rates_are_by_the_normalizer_of_the_training(
    text: str, heard: str, normalizer: str, rates: dict
) -> None:
    if normalizer == "whisper_english":
        pytest.importorskip("whisper_normalizer", reason="needs the eval extra")
    assert dev_rates([NORMALIZERS[normalizer](text)], [heard], normalizer) == rates


def test_processes_share_the_validation_in_the_precision_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    precisions, gathered = [], []
    encoding = Encoding("f" * 16, 16_000, 50.0, 1, 4)

    def recognize(speech: list[torch.Tensor], *_: object, durations_s: list[float]) -> list[SimpleNamespace]:
        precisions.append(torch.is_autocast_enabled("cpu"))
        return [SimpleNamespace(text=f"{len(codes[0])} {s:g}") for codes, s in zip(speech, durations_s, strict=True)]

    monkeypatch.setattr(validation, "recognize", recognize)
    monkeypatch.setattr(validation, "gather_object", lambda texts: gathered.extend(texts) or gathered)
    dev = [{"codes": [1] * count, "duration_s": count / 50} for count in range(1, 6)]
    for place in (1, 0, 2):
        autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
        process = SimpleNamespace(process_index=place, autocast=autocast)
        texts = validation.recognize_together(dev, encoding, None, process, 2)  # of three
    assert texts == ["1 0.02", "2 0.04", "3 0.06", "4 0.08", "5 0.1"] and precisions == [True] * 3


@pytest.mark.parametrize(
    "name, kind", [("fsdp2", "FSDP"), ("deepspeed_zero2", "DEEPSPEED"), ("two_machines", "MULTI_GPU")]
)
def test_accelerate_accepts_the_multi_gpu_configurations(name: str, kind: str) -> None:
    file = ROOT / "configs" / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(file))
    assert config.distributed_type == kind and config.num_processes > 1
    assert f"--accelerate accelerate/{name}.yaml" in file.read_text(encoding="utf-8")


@pytest.mark.skipif(not all(map(shutil.which, ("bash", "sha256sum", "split", "timeout", "xz"))), reason="no GNU tools")
def test_a_training_is_carried_to_another_machine_in_parts(work: Work, tmp_path: Path) -> None:
    def script(*words: str, **variables: str) -> subprocess.CompletedProcess:
        small = {"STEPS": "2", "BATCH": "400", "SPLITS": "[dev]", "DECODING": "fallback=false"}
        small |= {
            "PYTHON": sys.executable,
            "ARGS": "precision=no lora.rank=2 save_every=1",
            "ACCELERATE_USE_CPU": "true",
        }
        command = ["bash", str(ROOT / "recipes" / "ten_minutes.sh"), *words]
        settings = {"cwd": tmp_path, "env": {**os.environ, **small, **variables}, "timeout": 300}
        return subprocess.run(command, capture_output=True, text=True, **settings)

    sources = [str(work.folder / name) for name in ("base", "codec", "codes")]
    packed = script("pack", "my parts", *sources)
    assert packed.returncode == 0, packed.stderr
    again = script("pack", "my parts", *sources)
    assert again.returncode == 1 and "my parts is not empty" in again.stderr
    refused = script("run", "my parts", "none", ARGS="stepz=1")
    assert refused.returncode == 2 and "did you mean steps?" in refused.stderr  # its own message and status
    for _ in range(2):  # and a finished one is tested again
        ran = script("run", "my parts", "results")
        assert ran.returncode == 0, ran.stderr[-3000:]
    assert {row["split"] for row in read_jsonl(tmp_path / "results" / "test" / "predictions.jsonl")} == {"dev"}
    assert "loss" in read_jsonl(tmp_path / "results" / "train_log.jsonl")[0]

    shutil.rmtree(tmp_path / "my parts")
    assert script("pack", "my parts", *sources).returncode == 0
    with (tmp_path / "my parts" / "part.aa").open("r+b") as part:
        part.truncate(1000)
    damaged = script("run", "my parts", "other")
    assert damaged.returncode == 1 and "part.aa: FAILED" in damaged.stdout and "and sums, again" in damaged.stderr
    assert not (tmp_path / "other").exists() and not (tmp_path / "my parts" / "work").exists()
    assert script("run", "my parts").returncode == 2
