"""recipes/train_text.py on a handful of sentences: what it learns from, killed, cut into processes, what it leaves."""

import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from speechllm import DataError, InputError, SpeechCodec, extend_vocabulary
from speechllm.runs.run import RunError, read_log
from speechllm.runs.signals import Interrupted
from speechllm.small_model import SmallShape, small_text_tokenizer
from tokenizer.files import write_text
from tokenizer.tables import TableError

pytestmark = pytest.mark.usefixtures("new_accelerator", "without_pictures")
WORDS = "the a red blue lamp door opens closes now never Anna's room is small, dark and cold".split()


@pytest.fixture(scope="module")
def train_text(recipe: Callable[[str], ModuleType]) -> ModuleType:
    return recipe("train_text.py")


@pytest.fixture
def config(train_text: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    draw = random.Random(0)
    sentences = [" ".join(draw.choices(WORDS, k=draw.randint(3, 9))) for _ in range(400)]
    (tmp_path / "text.txt").write_text("\n".join(sentences) + "\n\n", encoding="utf-8")
    shape = SmallShape(16, 32, 2, 2, 1)
    with torch.set_grad_enabled(True):
        yield train_text.TextConfig(
            text=[str(tmp_path / "text.txt")],
            output=str(tmp_path / "run"),
            text_tokens=300,
            shape=shape,
            block=32,
            steps=6,
            batch_size=4,
            learning_rate=1e-2,
            warmup=2,
            validate_every=3,
            save_every=2,
            log_every=1,
        )


def weights(config: object) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output) / "model" / "model.safetensors")


def test_blocks_are_concatenated_sentences(train_text: ModuleType) -> None:
    texts = ["red lamp", "the door opens", "now"] * 5
    text_tokenizer = small_text_tokenizer(texts, 280)
    found = train_text.blocks(Dataset.from_dict({"text": texts}), text_tokenizer, 7)
    stream = [*map(text_tokenizer.convert_tokens_to_ids, text_tokenizer.tokenize("<|im_end|>".join(texts)))]
    assert found["input_ids"][:] == [stream[i : i + 7] for i in range(0, len(stream) - 6, 7)] == found["labels"][:]


@pytest.mark.parametrize("name", ["a*.txt", "a [1] #2.txt", "[x]/a.txt"])
def test_a_file_is_read_by_its_name_which_is_no_pattern(
    train_text: ModuleType, config: object, tmp_path: Path, name: str
) -> None:
    (tmp_path / "ab.txt").write_text("another file\n")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("this file\n")
    files = [str(tmp_path / name)]
    train, held_out = train_text.sentences(replace(config, text=files, held_out=files))
    assert train["text"][:] == held_out["text"][:] == ["this file"]


def test_the_language_model_can_be_extended(train_text: ModuleType, config: object, small_codec: SpeechCodec) -> None:
    train_text.main(config)
    run = Path(config.output)
    losses = [line["loss"] for line in read_log(run) if "loss" in line]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert [line["step"] for line in read_log(run) if "dev_loss" in line] == [3, 6]
    assert not (run / "checkpoints").exists() and (run / "report.html").exists()
    done = json.loads((run / "done.json").read_text(encoding="utf-8"))
    assert done["perplexity"] == pytest.approx(torch.tensor(done["dev_loss"]).exp().item(), rel=1e-6)

    model = AutoModelForCausalLM.from_pretrained(run / "model")
    text_tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert model.config.model_type == "qwen2" and text_tokenizer.eos_token == "<|im_end|>"
    assert len(text_tokenizer.tokenize("anna's room is dark")) < len(text_tokenizer.tokenize("ANNA'S ROOM IS DARK"))
    extend_vocabulary(model, text_tokenizer, small_codec)
    train_text.main(replace(config))  # finished: nothing happens
    assert [line["loss"] for line in read_log(run) if "loss" in line] == losses


def test_the_last_step_is_validated_once(train_text: ModuleType, config: object) -> None:
    for steps, validated in ((3, [3]), (4, [3, 4])):
        run = Path(f"{config.output}_{steps}")
        train_text.main(replace(config, steps=steps, output=str(run)))
        losses = {line["step"]: line["dev_loss"] for line in read_log(run) if "dev_loss" in line}
        assert [line["step"] for line in read_log(run) if "dev_loss" in line] == validated
        assert json.loads((run / "done.json").read_text(encoding="utf-8"))["dev_loss"] == losses[steps]


def test_a_checkpoint_that_was_being_written_is_none(train_text: ModuleType, tmp_path: Path) -> None:
    for step, names in ((2, ["model.safetensors", "trainer_state.json"]), (10, ["model.safetensors"])):
        for name in names:
            write_text(tmp_path / f"checkpoint-{step}" / name, "{}")
    assert train_text.saved_steps(tmp_path) == [tmp_path / "checkpoint-2"]


def test_a_killed_run_resumes_bit_for_bit(
    train_text: ModuleType, config: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_text.main(config)
    killed, usual = replace(config, output=str(tmp_path / "killed")), Trainer.training_step

    def dying(trainer: Trainer, *args: object, **kwargs: object) -> torch.Tensor:
        if trainer.state.global_step == 5:
            raise KeyboardInterrupt
        return usual(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", dying)
        with pytest.raises(KeyboardInterrupt):
            train_text.main(killed)
    assert not (tmp_path / "killed" / "model").exists()
    train_text.main(killed)
    expected = weights(config)
    assert all(torch.equal(value, expected[name]) for name, value in weights(killed).items())
    assert read_log(killed.output) == read_log(config.output)


def run_folder(config: object, name: str) -> Path:
    return Path(config.output).with_name(name)


@pytest.mark.parametrize("place", ["finish_training"])
def test_a_run_killed_while_it_ends_ends_the_same(
    train_text: ModuleType, config: object, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    train_text.main(config)
    killed = replace(config, output=str(run_folder(config, "killed")))

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_text, place, die)
        with pytest.raises(KeyboardInterrupt):
            train_text.main(killed)
    train_text.main(killed)
    assert all(torch.equal(value, weights(config)[name]) for name, value in weights(killed).items())
    assert read_log(killed.output) == read_log(config.output)


@pytest.mark.parametrize("log_every", [1, 4])
def test_a_signal_saves_a_checkpoint_and_a_damaged_one_is_passed_over(
    train_text: ModuleType,
    config: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    log_every: int,
) -> None:
    config = replace(config, log_every=log_every, steps=9)
    train_text.main(config)
    ended, usual = replace(config, output=str(run_folder(config, "ended"))), Trainer.training_step

    def signalled(trainer: Trainer, *args: object, **kwargs: object) -> torch.Tensor:
        if trainer.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return usual(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", signalled)
        with pytest.raises(Interrupted, match="step 5 is saved, and the same command goes on from there"):
            train_text.main(ended)
    checkpoints = run_folder(config, "ended") / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-4", "checkpoint-5"]
    if log_every == 1:
        (checkpoints / "checkpoint-5" / "optimizer.pt").write_bytes(b"")
    train_text.main(ended)
    said = capsys.readouterr().err
    assert ("checkpoint-5 cannot be read" in said) == (log_every == 1)
    assert all(torch.equal(value, weights(config)[name]) for name, value in weights(ended).items())
    assert read_log(ended.output) == read_log(config.output)


def test_a_run_may_be_prolonged(train_text: ModuleType, config: object, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(train_text, "finish_training", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_text.main(config)
    train_text.main(replace(config, steps=8, save_every=99, log_every=2, validate_every=4))
    log = read_log(config.output)
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4, 5, 6, 8]
    assert json.loads((Path(config.output) / "done.json").read_text())["steps"] == 8


def test_a_text_that_was_changed_does_not_change_what_rows_stand_for(
    train_text: ModuleType, config: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(train_text, "finish_training", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_text.main(config)
    file = Path(config.text[0])
    file.write_text(file.read_text(encoding="utf-8").replace("lamp", "candle"), encoding="utf-8")
    with pytest.raises(RunError, match="began with other labels"):
        train_text.main(config)


def test_a_step_with_a_non_finite_gradient_changes_no_weight_and_no_moment(
    train_text: ModuleType, config: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, before = Trainer.training_step, []

    def broken(trainer: Trainer, model: torch.nn.Module, *args: object, **kwargs: object) -> torch.Tensor:
        moments = [value for held in trainer.optimizer.state.values() for value in held.values()]
        before.append([value.clone() for value in (*model.parameters(), *moments)])
        loss = usual(trainer, model, *args, **kwargs)
        if len(before) == 3:
            next(model.parameters()).grad.view(-1)[0] = torch.nan
        return loss

    monkeypatch.setattr(Trainer, "training_step", broken)
    train_text.main(config)
    assert all(map(torch.equal, before[2], before[3])) and not all(map(torch.equal, before[3], before[4]))
    assert json.loads((Path(config.output) / "done.json").read_text())["non_finite"] == 1
    assert [line["step"] for line in read_log(config.output) if "loss" in line] == [1, 2, 4, 5, 6]


def test_impossible_settings_are_reported(
    train_text: ModuleType, config: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train_text.main(replace(config, text=["nowhere.txt"], output=f"{config.output}_1"))
    with pytest.raises(DataError, match="shorter than a block of 5000 tokens"):
        train_text.main(replace(config, block=5000, output=f"{config.output}_2"))
    monkeypatch.setattr(train_text, "make_accelerator", lambda _: SimpleNamespace(num_processes=3))
    with pytest.raises(InputError, match="batch_size 4 must be a multiple of the number of processes, 3"):
        train_text.main(config)


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_a_text_in_another_encoding_is_named(train_text: ModuleType, config: object, encoding: str) -> None:
    file = Path(config.text[0])
    file.write_text("first\nhé\n", encoding=encoding)
    with pytest.raises(TableError, match=rf"text\.txt, line {1 if encoding == 'utf-16' else 2}: byte .* is not UTF-8"):
        train_text.sentences(config)
