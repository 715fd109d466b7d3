"""The loop of all trainings: what is resumed, skipped, saved and said, on a model of one layer."""

import io
import json
import math
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from speechllm import RunError, save_audio
from speechllm.runs.loop import MOST_SKIPPED, Parts, StepGuard, TrainingLoop
from speechllm.runs.recipe import out_of_space, run_recipe
from speechllm.runs.run import MAY_CHANGE, Run, read_log
from speechllm.runs.signals import Interrupted

ROOT = Path(__file__).resolve().parents[3]


@dataclass
class Job:
    steps: int = 12
    save_every: int = 4
    size: int = 4


def train(
    folder: Path,
    job: Job | None = None,
    broken: Callable[[int], bool] = lambda step: False,
    at: Callable[[int], None] = lambda step: None,
) -> dict[str, torch.Tensor]:
    """Train on noise; the weights. broken: whether the gradient of a step is none; at: called in every step."""
    job = job or Job()
    torch.manual_seed(0)
    model = nn.Linear(job.size, job.size)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    run = Run(folder, job, free=MAY_CHANGE)
    parts = Parts(model=model, optimizer=optimizer)
    loop = TrainingLoop(run, parts, "test", steps=job.steps, seed=0, save_every=job.save_every)
    for step in loop:
        optimizer.zero_grad()
        loss = (model(torch.randn(2, job.size)) - 1).square().mean() * (math.nan if broken(step) else 1)
        loss.backward()
        at(step)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if loop.skips(loss, norm, recordings=lambda step=step: [f"{step}.wav"]):
            continue
        optimizer.step()
        if loop.due(1):
            loop.log(loss=loss.item())
    run.finish({"steps": loop.done, **loop.figures})
    return model.state_dict()


def send(number: int, when: int) -> Callable[[int], None]:
    return lambda step: os.kill(os.getpid(), number) if step == when else None


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


# ---- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_the_step_in_progress_and_the_run_ends_as_if_there_had_been_none(
    tmp_path: Path, number: int
) -> None:
    with pytest.raises(Interrupted, match="step 6 is saved, and the same command goes on from there") as interrupt:
        train(tmp_path / "run", at=send(number, 5))
    assert interrupt.value.exit_code == 128 + number
    assert checkpoints(tmp_path / "run") == ["step_00000004.pt", "step_00000006.pt"]
    assert same(train(tmp_path / "run"), train(tmp_path / "whole"))
    assert read_log(tmp_path / "run") == read_log(tmp_path / "whole")


def test_a_signal_without_checkpoints_ends_too(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="no checkpoints"):
        train(tmp_path, Job(save_every=0), at=send(signal.SIGTERM, 5))


def test_a_norm_may_be_a_float_or_none(tmp_path: Path) -> None:
    """As DeepSpeed returns it."""
    guard = StepGuard(Run(tmp_path, Job()), 10)
    assert not guard.skips(1, torch.zeros(()), 1.0, None, recordings=list)
    assert guard.skips(2, torch.zeros(()), float("inf"), recordings=lambda: ["a.wav"]) and guard.skipped == 1


SEVERAL = """
import os, sys, torch
from dataclasses import dataclass
from torch import distributed, nn
from speechllm.runs.loop import Parts, TrainingLoop
from speechllm.runs.machine import make_accelerator
from speechllm.runs.recipe import run_recipe
from speechllm.runs.run import Run

@dataclass
class Job:
    steps: int = 10**6

def main(job):
    accelerator = make_accelerator()
    run, model = Run("run", job, accelerator), nn.Linear(1, 1)
    loop = TrainingLoop(run, model, "test", steps=job.steps, seed=0, save_every=10**6)
    for step in loop:
        loop.skips(torch.zeros(()), recordings=list)
        if step == 5 and accelerator.process_index == 1:
            os.kill(os.getpid(), 15)

run_recipe(main, Job())
"""


def test_a_signal_to_one_process_ends_all_after_the_same_step(tmp_path: Path, start_recipe: Callable) -> None:
    (tmp_path / "job.py").write_text(SEVERAL)
    process = start_recipe(str(tmp_path / "job.py"), "", tmp_path, processes=2)
    _, errors = process.communicate()
    assert set(process.codes.values()) == {143}, errors
    assert checkpoints(tmp_path / "run") == ["step_00000007.pt"]
    assert errors.count("step 7 is saved, and the same command goes on from there") == 1


@pytest.mark.parametrize("fails", [False, True])
def test_processes_leave_their_group_after_main_and_not_after_an_error(tmp_path: Path, fails: bool) -> None:
    def main(folder: Path) -> None:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        if fails:
            raise RunError("a mistake")

    with pytest.raises(SystemExit, match="a mistake") if fails else nullcontext():
        run_recipe(main, tmp_path)
    assert distributed.is_initialized() == fails  # others might be in an exchange
    if fails:
        distributed.destroy_process_group()


def test_a_checkpoint_is_written_beside_the_next_steps_and_is_that_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later, save = threading.Event(), Run.save

    def slow(run: Run, *state: object) -> None:
        assert later.wait(60)
        save(run, *state)

    def at(step: int) -> None:
        if step == 5:
            later.set()
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "save", slow)
    with pytest.raises(Interrupted):
        train(tmp_path / "beside", at=at)
    monkeypatch.undo()
    with pytest.raises(Interrupted):
        train(tmp_path / "alone", at=send(signal.SIGTERM, 3))
    assert checkpoints(tmp_path / "beside") == ["step_00000004.pt", "step_00000006.pt"]
    one, other = (torch.load(tmp_path / run / "checkpoints" / "step_00000004.pt") for run in ("beside", "alone"))
    assert same(one["model"], other["model"]) and one["figures"] == other["figures"]
    for number, moments in other["optimizer"]["state"].items():
        assert same(one["optimizer"]["state"][number], moments)


def test_a_training_that_stops_early_leaves_nothing_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, save = [], Run.save

    def slow(run: Run, step: int, state: object) -> None:
        time.sleep(0.2)
        save(run, step, state)
        written.append(step)

    monkeypatch.setattr(Run, "save", slow)
    run = Run(tmp_path, Job())
    for step in TrainingLoop(run, Parts(), "test", steps=12, seed=0, save_every=4):
        if step == 4:
            break
    assert written == [4]
    run.finish({})
    assert not (tmp_path / "checkpoints").exists()


# ---- numbers that are none


def test_a_step_without_finite_numbers_changes_nothing_and_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    states = []
    original = TrainingLoop.skips

    def skips(loop: TrainingLoop, *numbers: torch.Tensor, recordings: Callable) -> bool:
        states.append(json.dumps(loop.state.state_dict(), default=lambda value: value.tolist()))
        return original(loop, *numbers, recordings=recordings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "skips", skips)
        weights = train(tmp_path / "run", broken=lambda step: step == 5)
    assert states[5] == states[6] and len(set(states)) == 11  # also the moments of the optimizer
    assert all(value.isfinite().all() for value in weights.values())
    assert [line["step"] for line in read_log(tmp_path / "run") if "loss" not in line] == [6]
    assert json.loads((tmp_path / "run" / "done.json").read_text())["non_finite"] == 1
    assert "step 6 is skipped, loss or gradient norm are not finite; its batch: 5.wav\n" in capsys.readouterr().out


def test_many_in_a_row_end_the_training_and_keep_the_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"in 10 steps in a row, up to step 15; .* made from: 14.wav$"):
        train(tmp_path, Job(steps=20), broken=lambda step: step >= 5)
    assert MOST_SKIPPED == 10 and checkpoints(tmp_path) == ["step_00000004.pt"]
    assert not (tmp_path / "done.json").exists()


def test_a_training_does_not_end_on_several_of_them(tmp_path: Path) -> None:
    train(tmp_path / "one", broken=lambda step: step == 11)
    with pytest.raises(RunError, match="in 2 steps in a row, up to step 12"):
        train(tmp_path / "two", broken=lambda step: step >= 10)


# ---- what may change


def test_a_run_may_be_prolonged_and_saved_more_often(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(tmp_path / "run", at=send(signal.SIGTERM, 5))
    assert same(train(tmp_path / "run", Job(steps=20, save_every=3)), train(tmp_path / "whole", Job(steps=20)))
    assert [line["step"] for line in read_log(tmp_path / "run")] == list(range(1, 21))


def test_a_run_cannot_end_before_where_it_is(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(tmp_path, at=send(signal.SIGTERM, 5))
    with pytest.raises(RunError, match="has done 6 steps already: set steps to at least that, not 5"):
        train(tmp_path, Job(steps=5))
    train(tmp_path, Job(steps=6))
    assert json.loads((tmp_path / "done.json").read_text())["loss"] == read_log(tmp_path)[-1]["loss"]


def test_a_finished_run_cannot_be_prolonged(tmp_path: Path) -> None:
    train(tmp_path / "run")
    with pytest.raises(RunError, match="is finished with steps=12, and a finished run has no checkpoint to go on from"):
        train(tmp_path / "run", Job(steps=16))
    assert (tmp_path / "run" / "done.json").exists()


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(tmp_path, at=send(signal.SIGTERM, 5))
    file = tmp_path / "checkpoints" / "step_00000006.pt"
    state = torch.load(file)
    torch.save({**state, "model": {}}, file)
    with pytest.raises(RunError, match="the checkpoint of step 6 in .* does not fit this training"):
        train(tmp_path)


# ---- checkpoints that are damaged, a disk that is full


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def spoil(file: Path) -> None:
    content = bytearray(file.read_bytes())
    place = content.index(torch.load(file)["model"]["weight"].numpy().tobytes())
    content[place] ^= 1
    file.write_bytes(content)


def overwrite(file: Path) -> None:
    file.write_bytes(b"\x00" * file.stat().st_size)


@pytest.mark.parametrize("damage", [cut, empty, spoil, overwrite])
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture, damage: Callable[[Path], None]
) -> None:
    with pytest.raises(Interrupted):
        train(tmp_path / "run", at=send(signal.SIGTERM, 9))
    files = sorted((tmp_path / "run" / "checkpoints").iterdir())
    damage(files[1])
    (tmp_path / "run" / "checkpoints" / "step_00000012.pt.77.part").touch()
    seen: list[int] = []
    assert same(train(tmp_path / "run", at=seen.append), train(tmp_path / "whole"))
    assert seen[0] == 8 and read_log(tmp_path / "run") == read_log(tmp_path / "whole")
    said = capsys.readouterr().err
    assert f"{files[1]} cannot be read (" in said and "trying the checkpoint before it" in said


def test_without_any_usable_checkpoint_nothing_starts_anew(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(tmp_path, at=send(signal.SIGTERM, 9))
    for file in (tmp_path / "checkpoints").iterdir():
        cut(file)
    log = read_log(tmp_path)
    with pytest.raises(RunError, match="none of the checkpoints in .* can be read: restore one, or delete"):
        train(tmp_path)
    assert read_log(tmp_path) == log


def fill_disk() -> None:
    """From now on this process can make no file larger; the system names both errors differently."""
    sys.stderr = io.StringIO()  # or the progress bar would fill the file in which pytest catches it
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def apart(work: Callable[[], None]) -> None:
    """Do it in a process of its own."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_full_disk_is_named_and_the_run_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    def main(_: None) -> None:
        train(tmp_path / "run")

    def work() -> None:
        with pytest.raises(Interrupted):
            train(tmp_path / "run", at=send(signal.SIGTERM, 5))
        fill_disk()
        with pytest.raises(SystemExit) as end:
            run_recipe(main, None)
        message = str(end.value)
        assert message.startswith("error: cannot write the checkpoint") and len(message.splitlines()) == 1
        assert "the disk is full: make room, and the same command goes on" in message

    apart(work)
    assert checkpoints(tmp_path / "run") == ["step_00000004.pt", "step_00000006.pt"]
    assert same(train(tmp_path / "run"), train(tmp_path / "whole"))
    assert read_log(tmp_path / "run") == read_log(tmp_path / "whole")


@pytest.mark.parametrize("name", ["a.safetensors", "b.pt", "c.txt", "d.flac", "e.ogg"])
def test_a_full_disk_is_recognised_in_the_words_of_other_libraries(tmp_path: Path, name: str) -> None:
    from safetensors.torch import save_file

    def work() -> None:
        write = {
            "a.safetensors": lambda file: save_file({"a": torch.zeros(10_000)}, file),
            "b.pt": lambda file: torch.save(torch.zeros(10_000), file),
            "c.txt": lambda file: file.write_text("c" * 10_000),
            **dict.fromkeys(("d.flac", "e.ogg"), lambda file: save_audio(file, torch.rand(9_000))),
        }
        fill_disk()
        with pytest.raises(Exception) as error:  # noqa: PT011, as many kinds as libraries
            write[name](tmp_path / name)
        assert out_of_space(error.value), error.value

    apart(work)
    assert not (tmp_path / "d.flac").exists() and not (tmp_path / "e.ogg").exists()
    assert not out_of_space(ValueError("wrong"))


# ---- checkpoints


def test_a_run_whose_labels_the_data_have_changed_is_not_resumed(tmp_path: Path) -> None:
    def loop(*labels: str) -> TrainingLoop:
        settings = {"steps": 4, "seed": 0, "save_every": 2, "labels": [*labels]}
        return TrainingLoop(Run(tmp_path, Job()), Parts(), "test", **settings)

    for _ in loop("anna", "zoe"):
        pass
    assert loop("anna", "zoe").done == 2
    with pytest.raises(RunError, match="began with other labels, made from texts or speakers that have been changed"):
        loop("hannah", "zoe")


@pytest.mark.parametrize("keep_last", [False, True])
def test_the_last_step_is_saved_where_much_follows_it(tmp_path: Path, keep_last: bool) -> None:
    settings = {"steps": 5, "seed": 0, "save_every": 2, "keep_last": keep_last}
    for _ in TrainingLoop(Run(tmp_path, Job()), Parts(), "test", **settings):
        pass
    last = "step_00000005.pt" if keep_last else "step_00000002.pt"
    assert {last, "step_00000004.pt"} == {*checkpoints(tmp_path)}


# ---- trackers


def test_trackers_go_on_where_the_run_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    begun = []
    monkeypatch.setattr("speechllm.runs.run.filter_trackers", lambda names, _: names)
    monkeypatch.setattr(Accelerator, "init_trackers", lambda _, *settings: begun.append(settings))
    for _ in range(2):
        run = Run(tmp_path / "run", Job(), Accelerator(cpu=True), ["wandb", "tensorboard"])
        run.resume()
        run.save(6, {})
    (_, _, first), (_, _, second) = begun
    assert first["wandb"] == second["wandb"] and second["wandb"]["resume"] == "allow"
    assert (first["tensorboard"], second["tensorboard"]) == ({"purge_step": 1}, {"purge_step": 7})
