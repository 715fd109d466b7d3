"""A run folder: one configuration, atomic files, a log that matches the checkpoints."""

import inspect
import json
import platform
import re
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from speechllm import RunError
from speechllm.data.shards import claim_codes
from speechllm.runs.machine import ACCELERATE, command_line, versions
from speechllm.runs.recipe import holds_config
from speechllm.runs.run import Run, read_log
from speechllm.training.schedule import seed_step, set_learning_rate, warmup_cosine
from tokenizer.claims import claim_folder
from tokenizer.errors import InputError
from tokenizer.files import atomic_folder, read_json, read_jsonl, write_json, write_jsonl, write_text


@dataclass
class Codec:
    strides: tuple[int, ...] = (2, 4)
    size: int = 16


@dataclass
class Job:
    data: str = "x"
    steps: int = 3
    codec: Codec = field(default_factory=Codec)


class OtherProcess:
    """What Run sees of an accelerator in a process that is not the main one."""

    is_main_process = False
    waited = 0

    def wait_for_everyone(self) -> None:
        self.waited += 1

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Trackers receive the log of the main process only."""


def files_in(folder: Path) -> set[str]:
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != ".written"}
    return files - {".lock", "claim.json"}


# ---- configuration


def test_a_new_run_writes_its_configuration_and_versions(tmp_path: Path) -> None:
    run = Run(tmp_path / "deep" / "run", Job())
    held = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert held == {"data": "x", "steps": 3, "codec": {"strides": [2, 4], "size": 16}}
    assert json.loads((run.folder / "versions.json").read_text()) == versions()
    assert versions().items() >= {"python": platform.python_version(), "torch": version("torch")}.items()
    assert run.summary is None
    assert files_in(run.folder) == {"config.yaml", "versions.json"}


def test_a_run_is_resumed_with_the_same_configuration(tmp_path: Path) -> None:
    Run(tmp_path, Job()).log(1, loss=2.0)
    Run(tmp_path, Job())
    assert read_log(tmp_path) == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize("data", ["yes", "null", "2e-4", "1e3", "é: \n'\"", "~", "0755", " x "])
def test_a_configuration_is_recognised_whatever_its_words_look_like(tmp_path: Path, data: str) -> None:
    Run(tmp_path, Job(data))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))["data"] == data
    Run(tmp_path, Job(data))


@pytest.mark.parametrize(
    "changed, named",
    [
        (Job(steps=4), r"\(steps: 3 -> 4\)"),
        (Job(data="y", steps=4), r"\(data: x -> y; steps: 3 -> 4\)"),
        (Job(codec=Codec(size=8)), r"\(codec: .*'size': 16.* -> .*'size': 8.*\)"),
        (Job(codec=Codec(strides=(2, 5))), r"\(codec: .*\[2, 4\].* -> .*\[2, 5\].*\)"),
    ],
)
def test_another_configuration_is_refused_and_what_changed_is_named(tmp_path: Path, changed: Job, named: str) -> None:
    (run := Run(tmp_path, Job())).log(1, loss=2.0)
    before = run.folder.joinpath("config.yaml").read_text()
    with pytest.raises(RunError, match=f"another configuration {named}: choose another output folder or delete"):
        Run(tmp_path, changed)
    assert (tmp_path / "config.yaml").read_text() == before


def test_a_run_that_ended_before_it_wrote_anything_takes_another_configuration(tmp_path: Path) -> None:
    """As after a mistake that is only found when models and data have been loaded."""
    Run(tmp_path, Job())
    run = Run(tmp_path, Job(data="y"))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["data"] == "y"
    run.save(1, {})
    with pytest.raises(RunError, match=r"another configuration \(data: y -> x\)"):
        Run(tmp_path, Job())


def test_free_keys_may_change_during_a_run(tmp_path: Path) -> None:
    Run(tmp_path, Job()).log(1, loss=2.0)
    Run(tmp_path, Job(steps=4), free=["steps"])
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["steps"] == 4
    with pytest.raises(RunError, match=r"\(data: x -> y\)"):
        Run(tmp_path, Job("y", steps=5), free=["steps"])


@pytest.mark.parametrize("place", ["taken", "taken/run", "folder/checkpoints"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    for file in ("taken", "folder/checkpoints"):
        (tmp_path / file).write_text("a file")
    folder = tmp_path / place.removesuffix("/checkpoints")
    write_json(tmp_path / "folder" / "claim.json", {"job": "test_run"})
    with pytest.raises(InputError, match=f"cannot write the (run )?folder {re.escape(str(folder))}: "):
        Run(folder, Job())


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    accelerator = OtherProcess()
    run = Run(tmp_path / "run", Job(), accelerator)
    run.log(1, loss=1.0)
    run.save(1, {})
    run.finish({})
    assert accelerator.waited == 1 and not (tmp_path / "run").exists()


def test_trackers_receive_the_log(tmp_path: Path) -> None:
    """A tracker of our own: Accelerate passes everything on to it."""
    received: list[tuple[dict, int | None]] = []

    class Tracker(GeneralTracker):
        name, requires_logging_directory, main_process_only = "tracker", False, True
        tracker = None

        def store_init_configuration(self, values: dict) -> None:
            received.append((values, None))

        def log(self, values: dict, step: int | None = None, **_: object) -> None:
            received.append((values, step))

    accelerator = Accelerator(cpu=True, log_with=Tracker())
    accelerator.init_trackers("run")
    Run(tmp_path, Job(), accelerator).log(3, loss=1.5)
    assert received[-1] == ({"loss": 1.5}, 3)
    assert read_log(tmp_path) == [{"step": 3, "loss": 1.5}]


# ---- claims


@dataclass
class OtherJob(Job):
    """The configuration of another recipe, which is its file."""


@pytest.fixture
def other_job(monkeypatch: pytest.MonkeyPatch) -> OtherJob:
    file = inspect.getfile
    monkeypatch.setattr(inspect, "getfile", lambda cls: "recipes/other.py" if cls is OtherJob else file(cls))
    return OtherJob()


def test_the_run_of_another_recipe_is_refused_also_when_it_is_finished(tmp_path: Path, other_job: OtherJob) -> None:
    Run(tmp_path, Job()).finish({"loss": 0.5})
    before = files_in(tmp_path)
    with pytest.raises(InputError, match="is the output of test_run, not of other: choose another"):
        Run(tmp_path, other_job)
    assert files_in(tmp_path) == before and Run(tmp_path, Job()).summary == {"loss": 0.5}


def test_a_folder_of_codes_is_no_run_and_a_run_no_folder_of_codes(tmp_path: Path) -> None:
    claim_codes(tmp_path / "codes")
    write_json(tmp_path / "codes" / "done.json", {"utterances": 3})
    with pytest.raises(InputError, match="codes is the output of encode_speech, not of test_run"):
        Run(tmp_path / "codes", Job())
    Run(tmp_path / "run", Job()).finish({"loss": 0.5})
    with pytest.raises(InputError, match="run is the output of test_run, not of encode_speech"):
        claim_codes(tmp_path / "run")
    write_json(tmp_path / "pieces" / "request.json", {"utterances": 3})  # as cut_speech leaves it
    with pytest.raises(InputError, match="holds what test_run did not write"):
        Run(tmp_path / "pieces", Job())
    claim_codes(tmp_path / "pieces")


@pytest.mark.parametrize("name", ["model", "checkpoints", "folds"])
def test_a_folder_with_files_of_the_users_is_refused(tmp_path: Path, name: str) -> None:
    write_text(tmp_path / name / "mine.pt", "weights")
    with pytest.raises(InputError, match=rf"holds what test_run did not write \({name}\)"):
        Run(tmp_path, Job())
    assert files_in(tmp_path) == {f"{name}/mine.pt"}


@pytest.mark.parametrize(
    "content, own",
    [
        ('{"wer": 1, "config": {"data": "y"}}', True),
        ('{"wer": 1, "config": {"other": "y"}}', False),
        ('{"data": "y"}', False),
        ("[]", False),
        ('{"wer"', False),
    ],
)
def test_results_are_known_by_their_configuration(tmp_path: Path, content: str, own: bool) -> None:
    write_text(tmp_path / "results.json", content)
    assert holds_config(tmp_path / "results.json", Job()) == own


@dataclass
class MovedJob(Job):
    output: str = ""
    codec: dict = field(default_factory=dict)


@pytest.mark.parametrize("new", ["runs/b", "deep/er/b"])
def test_a_run_that_was_moved_goes_on_also_with_its_inputs(tmp_path: Path, new: str) -> None:
    def job(folder: str, data: str = "/corpus", codec: str = "codec/model") -> MovedJob:
        place = str(tmp_path / folder)
        return MovedJob(
            data, 3, {"path": f"{place}/{codec}", "hub": ["owner/name", place], "none": None}, f"{place}/asr"
        )

    Run(job("runs/a").output, job("runs/a")).save(2, {})
    (tmp_path / new).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "runs" / "a").rename(tmp_path / new)
    for changed in (job(new, data="/other"), job(new, codec="codec2/model")):
        with pytest.raises(RunError, match="another configuration"):
            Run(changed.output, changed)
    assert Run(job(new).output, job(new)).resume() == {"step": 2}


# ---- checkpoints and the log


def test_the_newest_checkpoint_is_found_with_everything_in_it(tmp_path: Path) -> None:
    run = Run(tmp_path, Job())
    assert run.resume() is None
    for step in (2, 10, 100):  # 10 sorts before 2 as a word
        run.save(step, {"weights": torch.full((2,), float(step))})
    state = Run(tmp_path, Job()).resume()
    assert state["step"] == 100 and torch.equal(state["weights"], torch.tensor([100.0, 100.0]))


def test_two_checkpoints_are_kept_and_no_part_of_one(tmp_path: Path) -> None:
    run = Run(tmp_path, Job())
    for step in range(1, 6):
        run.save(step, {})
        kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
        assert kept == [f"step_{n:08d}.pt" for n in range(max(1, step - 1), step + 1)]


def test_a_resumed_run_counts_the_seconds_before_its_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path, Job())
    run._seconds_before = 1000.0
    run.save(2, {})
    again = Run(tmp_path, Job())
    assert set(again.resume()) == {"step"}
    assert 1000 < again.provenance["seconds"] < 2000
    assert again.provenance["config"]["steps"] == 3 and again.provenance["versions"] == versions()


@pytest.mark.parametrize(
    "environment, started",
    [
        ({"WORLD_SIZE": "1"}, "python recipes/a.py"),
        ({"WORLD_SIZE": "2"}, "speechllm run recipes/a.py --processes 2"),
        ({"WORLD_SIZE": "16", ACCELERATE: "two.yaml"}, "speechllm run recipes/a.py --accelerate two.yaml"),
    ],
)
def test_the_command_line_can_be_used_again(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], started: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["recipes/a.py", "data=my corpus", "splits=[a,b]"])
    assert command_line() == f"{started} 'data=my corpus' 'splits=[a,b]'"


def test_a_checkpoint_half_written_when_the_run_was_killed_is_not_read(tmp_path: Path) -> None:
    run = Run(tmp_path, Job())
    run.save(2, {})
    (tmp_path / "checkpoints" / ".step_00000004.pt.1.part").write_bytes(b"PK\x03\x04")
    assert run.resume()["step"] == 2


def test_resuming_cuts_the_log_at_the_checkpoint_and_drops_a_half_written_line(tmp_path: Path) -> None:
    run = Run(tmp_path, Job())
    for step in range(1, 6):
        run.log(step, loss=float(step))
        if step == 3:
            run.log(step, dev_wer=0.5)
            run.save(step, {})
    with run.log_file.open("a") as file:
        file.write('{"step": 2, "lo')
    again = Run(tmp_path, Job())
    assert again.resume()["step"] == 3
    again.log(4, loss=4.5)
    expected = [(1, "loss", 1.0), (2, "loss", 2.0), (3, "loss", 3.0), (3, "dev_wer", 0.5), (4, "loss", 4.5)]
    assert read_log(tmp_path) == [{"step": step, name: value} for step, name, value in expected]


def test_numbers_that_json_does_not_know_are_null(tmp_path: Path) -> None:
    run = Run(tmp_path, Job())
    run.log(1, loss=float("nan"), norm=float("inf"), lr=0.5)
    write_json(tmp_path / "r.json", {"é": [1.0, float("-inf")], "deep": {"x": float("nan")}})
    for text in (run.log_file.read_text(), (tmp_path / "r.json").read_text(encoding="utf-8")):
        assert json.loads(text, parse_constant=pytest.fail)
    assert read_log(tmp_path) == [{"step": 1, "loss": None, "norm": None, "lr": 0.5}]
    assert read_json(tmp_path / "r.json") == {"é": [1.0, None], "deep": {"x": None}}


def test_without_a_checkpoint_the_log_starts_anew(tmp_path: Path) -> None:
    run = Run(tmp_path, Job())
    run.log(1, loss=1.0)
    assert run.resume() is None and read_log(tmp_path) == []


def test_a_folder_without_a_log_has_no_lines(tmp_path: Path) -> None:
    assert read_log(tmp_path) == []


def test_a_finished_run_says_so_and_has_no_checkpoints(tmp_path: Path) -> None:
    run = Run(tmp_path, Job())
    run.save(2, {})
    run.finish({"loss": 0.5})
    assert files_in(tmp_path) == {"config.yaml", "versions.json", "done.json"}
    assert Run(tmp_path, Job()).summary == {"loss": 0.5}


def test_checkpoints_that_a_kill_has_left_in_a_finished_run_go_and_files_of_others_stay(tmp_path: Path) -> None:
    run = Run(tmp_path, Job())
    run.save(2, {})
    write_json(tmp_path / "done.json", {"loss": 0.5})
    assert Run(tmp_path, Job()).summary == {"loss": 0.5} and not (tmp_path / "checkpoints").exists()
    write_text(tmp_path / "checkpoints" / "notes.txt", "mine")
    run.finish({"loss": 0.5})
    assert (tmp_path / "checkpoints" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["config.yaml", "done.json"])
def test_a_broken_file_of_a_run_is_named(tmp_path: Path, name: str) -> None:
    Run(tmp_path, Job())
    (tmp_path / name).write_text("{steps: [1")
    with pytest.raises(InputError, match=rf"{name}.*:"):
        Run(tmp_path, Job())


def test_recordings_that_were_skipped_are_listed_once_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = Run(tmp_path, Job())
    lines = [{"path": name, "reason": "unreadable", "detail": f"{name}: broken"} for name in ("a", "b", "a")]
    run.skipped.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.finish({"loss": 0.5})
    assert capsys.readouterr().out.splitlines() == ["skipped: a: broken", "skipped: b: broken"]
    assert run.summary == {"loss": 0.5, "skipped": 2}
    assert read_jsonl(run.skipped) == lines[:2]


def test_no_step_is_skipped_between_start_and_stop() -> None:
    run = Run.__new__(Run)
    run.main = False
    assert list(run.steps(3, 7, "test")) == [3, 4, 5, 6]


# ---- atomic files


def test_text_and_json_are_read_again_and_leave_no_other_files(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "é\n")
    write_json(tmp_path / "b.json", {"text": "é", "list": [1, None]})
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "é\n"
    assert json.loads((tmp_path / "b.json").read_text(encoding="utf-8")) == {"text": "é", "list": [1, None]}
    assert files_in(tmp_path) == {"a.txt", "b.json"}


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b\x85c\x0cd\n"}, {"text": ""}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    write_json(tmp_path / "b.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "b.json", object())
    assert (tmp_path / "b.json").read_text() == "1\n" and files_in(tmp_path) == {"b.json"}


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    claim_folder(tmp_path, "test")
    for name in ("old.txt", "new.txt"):
        with atomic_folder(tmp_path / "deep" / "model") as folder:
            (folder / name).write_text(name)
            assert folder != tmp_path / "deep" / "model"
    assert files_in(tmp_path) == {"deep/model/new.txt"}


def write_in_vain(target: Path) -> None:
    with atomic_folder(target) as folder:
        (folder / "new.txt").write_text("new")
        raise OSError("disk full")


def test_a_folder_is_not_touched_when_writing_it_fails(tmp_path: Path) -> None:
    claim_folder(tmp_path, "test")
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "old.txt").write_text("old")
    with pytest.raises(OSError, match="disk full"):
        write_in_vain(tmp_path / "model")
    assert files_in(tmp_path / "model") == {"old.txt"}
    with atomic_folder(tmp_path / "model") as folder:  # what the failure left behind is in nobody's way
        assert files_in(folder) == set()
    assert files_in(tmp_path) == set()


# ---- seeds and rates


def test_random_numbers_depend_on_the_step_only() -> None:
    draws = {}
    for seed, step, process in [(0, 5, 0), (0, 6, 0), (0, 5, 1), (1, 5, 0), (0, 0, 0)]:
        seed_step(seed, step, process)
        draws[seed, step, process] = tuple(torch.rand(4).tolist())
    assert len(set(draws.values())) == 5
    seed_step(0, 5)
    assert tuple(torch.rand(4).tolist()) == draws[0, 5, 0]


def test_the_rate_rises_linearly_and_falls_like_half_a_cosine() -> None:
    factors = [warmup_cosine(step, 14, 4) for step in range(15)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[9] == pytest.approx(0.5) and factors[14] == pytest.approx(0.0)
    assert factors[4:] == sorted(factors[4:], reverse=True)


def test_the_warm_up_is_repeated_when_more_weights_join() -> None:
    once, again = ([warmup_cosine(step, 20, 4, joined) for step in range(20)] for joined in (0, 8))
    assert again[:8] == once[:8] and again[11:] == once[11:]
    assert [a / b for a, b in zip(again[8:11], once[8:11], strict=True)] == pytest.approx([0.25, 0.5, 0.75])


@pytest.mark.parametrize("steps, warmup", [(1, 1), (3, 10), (5, 5), (3, 0)])
def test_a_run_shorter_than_its_warm_up_has_a_rate_too(steps: int, warmup: int) -> None:
    assert all(0 < warmup_cosine(step, steps, warmup) <= 1 for step in range(steps))


def test_every_group_keeps_its_own_rate_also_after_resuming() -> None:
    def make() -> torch.optim.Optimizer:
        groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": rate} for rate in (1.0, 0.1)]
        return torch.optim.AdamW(groups)

    first, second = make(), make()
    set_learning_rate(first, 0.5)
    set_learning_rate(first, 0.25)
    second.load_state_dict(first.state_dict())
    set_learning_rate(second, 0.5)
    assert [group["lr"] for group in first.param_groups] == [0.25, 0.025]
    assert [group["lr"] for group in second.param_groups] == [0.5, 0.05]
