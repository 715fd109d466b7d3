"""How recipes start: quickly as far as their help and mistakes, as several processes, with one line where it fails."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from speechllm.runs.launch import find_recipe, recipe_command
from speechllm.runs.stages import config_class as read_head

ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

# Every recipe with these words, in one process; then what it has loaded that takes long.
STARTED = """
import contextlib, io, runpy, sys
for name in sys.argv[2:]:
    for words in (["--help"], ["stpes=3"]):
        said = io.StringIO()
        sys.argv = [name, *words]
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                runpy.run_path(name, run_name="__main__")
        except SystemExit as end:
            assert end.code == (0 if words == ["--help"] else 2), (name, end.code, said.getvalue())
        assert len(said.getvalue()) > 50, name
        assert ("None" in said.getvalue()) is False, (name, said.getvalue())
heavy = "torch", "transformers", "numpy", "accelerate", "datasets", "scipy", "sklearn", "speechbrain"
print([name for name in heavy if name in sys.modules])
"""


def python(*words: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)


def test_help_and_mistakes_of_every_recipe_do_not_wait_for_torch() -> None:
    files = [str(ROOT / "recipes" / f"{name}.py") for name in RECIPES if name != "synthesize_speech"]  # numpy, no torch
    assert len(files) > 10
    ended = python("-c", STARTED, "", *files)
    assert ended.stdout == "[]\n", ended.stdout + ended.stderr


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "synthesize_speech"])
def test_a_job_of_several_recipes_knows_what_each_would_read(name: str, config_class: Callable[[str], type]) -> None:
    found, whole = read_head(ROOT / "recipes" / f"{name}.py"), config_class(f"{name}.py")
    assert found.__name__ == whole.__name__ and [f.name for f in fields(found)] == [f.name for f in fields(whole)]


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["run", "--help"], ["run", "train_txt"], ["wre"]])
def test_help_and_mistakes_of_the_command_do_not_wait_for_torch(words: list[str]) -> None:
    code = "import sys; from speechllm.cli.main import main\n"
    code += "try: main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    ended = python("-c", code, *words)
    assert ended.stdout.splitlines()[-1] == "False", ended.stderr


@pytest.mark.parametrize("name", ["train_asr", "train_asr.py", "recipes/train_asr.py"])
def test_a_recipe_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name) == ROOT / "recipes" / "train_asr.py"


def test_a_recipe_that_is_not_there_is_named_with_one_like_it() -> None:
    with pytest.raises(ValueError, match=r"train_txt: did you mean train_text\?"):
        find_recipe("train_txt")
    with pytest.raises(ValueError, match="zzz: there are align_speech, "):
        find_recipe("zzz")


def test_the_command_becomes_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    ended = python("-m", "speechllm.cli.main", "run", "synthesize_speech", ".", "--jobs", "1", folder=tmp_path)
    assert (ended.returncode, ended.stdout) == (1, "") and len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith("error: ") and len(list(tmp_path.iterdir())) == 1


# ---- several processes

JOB = """
import os, sys, time
from speechllm.runs.recipe import run_recipe
from tokenizer.errors import InputError

def main(words):
    if words[0] == "work":
        open(f"{os.environ['RANK']} of {os.environ['WORLD_SIZE']}", "w").close()
    if words[0] == "die" and os.environ["RANK"] == "1":
        os.kill(os.getpid(), 9)
    if words[0] == "die":
        time.sleep(600)
    if words[0] == "fail":
        raise InputError("nowhere: no such folder")

run_recipe(main, sys.argv[1:])
"""


@pytest.mark.parametrize(
    "word, code, said",
    [
        ("work", 0, ""),
        ("fail", 1, "error: nowhere: no such folder\n"),
        ("die", signal.SIGKILL, "process 1 was ended by SIGKILL\n"),
    ],
)
def test_two_processes_find_each_other_and_say_one_line_when_they_fail(
    tmp_path: Path, start_recipe: Callable, word: str, code: int, said: str
) -> None:
    (tmp_path / "job.py").write_text(JOB)
    as_module, launcher, *words = recipe_command("job.py", [word], 2)
    assert as_module == "-m"
    started = start_recipe(str(ROOT / f"{launcher.replace('.', '/')}.py"), " ".join(words), tmp_path)
    assert (*started.communicate(), started.returncode) == ("", said, code)
    assert {path.name for path in tmp_path.iterdir()} == {"job.py", *(("0 of 2", "1 of 2") if word == "work" else ())}


def test_a_mistake_is_told_before_several_processes_start(tmp_path: Path) -> None:
    words = ["run", "--processes=2", "train_text", "text=[a]", "output=x", "stpes=3"]
    for moved in (words, [words[0], *words[2:], words[1]]):
        ended = python("-m", "speechllm.cli.main", *moved, folder=tmp_path)
        assert ended.returncode == 2
        assert ended.stderr == "1 problem(s) in the configuration:\n  unknown key stpes: did you mean steps?\n"


def test_several_processes_of_a_recipe_that_would_all_do_the_same_are_refused(tmp_path: Path) -> None:
    words = ["run", "--processes=2", "eval_asr", "model=a", "codes=b", "output=c"]
    ended = python("-m", "speechllm.cli.main", *words, folder=tmp_path)
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith("eval_asr.py does not share its work")


def test_on_gpus_accelerate_starts_them_and_each_needs_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from speechllm.runs import launch

    asked = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("accelerate.commands.launch.launch_command", asked.append)
    monkeypatch.setattr("logging.disable", lambda level: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert launch.launch(2, "job.py", ["--config", "x.yaml", "steps=1"]) == 0
    (arguments,) = asked
    assert arguments.multi_gpu and arguments.num_processes == 2 and arguments.training_script == "job.py"
    assert arguments.training_script_args == ["--config", "x.yaml", "steps=1"]
    with pytest.raises(ValueError, match="3 processes need one GPU each, but there are 2"):
        launch.launch(3, "job.py", [])
    for name, start in (("fsdp2", "8 processes need one GPU each, but there are 2: copy"), ("two_machines", "8 proc")):
        with pytest.raises(ValueError, match=start):
            launch.launch(ROOT / "configs" / "accelerate" / f"{name}.yaml", "job.py", [])
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match=r"bad\.yaml is not a configuration of Accelerate"):
        launch.launch(tmp_path / "bad.yaml", "job.py", [])


def test_a_configuration_of_accelerate_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    from speechllm.runs import launch

    asked, before = [], dict(os.environ)
    monkeypatch.setattr(
        "accelerate.commands.launch.launch_command", lambda words: asked.append((words, os.environ["SPEECHLLM_PARENT"]))
    )
    monkeypatch.setattr("logging.disable", lambda level: None)
    assert launch.launch(Path("fsdp2.yaml"), "job.py", ["steps=1"]) == 0
    ((arguments, parent),) = asked
    assert parent == str(os.getpid())
    assert dict(os.environ) == before  # a process that goes on is not taken for one that was started
    assert arguments.config_file == "fsdp2.yaml" and arguments.num_processes is None
    assert arguments.training_script == "job.py" and arguments.training_script_args == ["steps=1"]


def test_processes_have_time_for_a_checkpoint_after_a_signal_and_not_after_a_failure() -> None:
    """Asked of torch's own agent: what it calls when a signal arrives, and when a process fails."""
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.api import PContext, SignalException

    from speechllm.runs.launch import patience

    waits: list[int] = []
    again: list[signal.Signals] = []

    class Context(PContext):
        def __init__(self) -> None:
            self._tail_logs, self.filtered_stdout, self.filtered_stderr = [], None, None

        def _start(self) -> None: ...

        def _poll(self) -> None: ...

        def pids(self) -> dict: ...

        def _close(self, death_sig: signal.Signals, timeout: int = 30) -> None:
            waits.append(timeout)
            if again and death_sig == signal.SIGTERM:
                raise SignalException("again", again.pop())

    class Agent(LocalElasticAgent):
        def __init__(self, error: Exception) -> None:
            self._worker_watchdog = self._health_check_server = None
            self._pcontext, self.error = Context(), error

        def _invoke_run(self, role: str = "default") -> None:
            raise self.error

    for error in (SignalException("asked", signal.SIGTERM), RuntimeError("failed")):
        with patience(), pytest.raises(type(error)):
            Agent(error).run()
    with pytest.raises(SignalException):
        Agent(SignalException("asked", signal.SIGTERM)).run()  # torch's own, afterwards
    again.append(signal.SIGINT)
    with patience(), pytest.raises(SignalException, match="again"):
        Agent(SignalException("asked", signal.SIGTERM)).run()
    assert waits == [600, 30, 30, 600, 1, 30]


def test_a_mistake_under_a_configuration_of_accelerate_is_one_line(tmp_path: Path) -> None:
    words = ["run", "train_asr", "--accelerate=accelerate/fsdp2.yaml", "codes=a", "codec=c", "output=b", "stpes=2"]
    ended = python("-m", "speechllm.cli.main", *words, folder=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr == "1 problem(s) in the configuration:\n  unknown key stpes: did you mean steps?\n"
    ended = python("-m", "speechllm.cli.main", "run", "train_asr", "--accelerate=fsdp2.yml", folder=tmp_path)
    assert ended.returncode == 1 and len(ended.stderr.splitlines()) == 1


def test_an_error_of_a_process_under_a_configuration_of_accelerate_is_one_line(
    tmp_path: Path, start_recipe: Callable
) -> None:
    (tmp_path / "job.py").write_text(JOB)
    (tmp_path / "two.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_machines: 1\nnum_processes: 2\n"
        "machine_rank: 0\nmixed_precision: 'no'\nuse_cpu: true\ndynamo_config: {dynamo_backend: 'NO'}\n"
    )
    _, launcher, *words = recipe_command("job.py", ["fail"], Path("two.yaml"))
    started = start_recipe(str(ROOT / f"{launcher.replace('.', '/')}.py"), " ".join(words), tmp_path)
    assert (*started.communicate(), started.returncode) == ("", "error: nowhere: no such folder\n", 1)
