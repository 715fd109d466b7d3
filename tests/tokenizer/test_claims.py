"""Who may write where: claims, locks and what killed processes left."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tokenizer import files
from tokenizer.claims import claim_file, claim_folder, new_folder
from tokenizer.files import WRITTEN, atomic_file, atomic_folder, is_part, write_text
from tokenizer.locks import LOCK, OutputError, lock, locked

CLAIMING = "import sys, time; from tokenizer.claims import claim_folder; {}; print('in', flush=True); time.sleep(60)"


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {LOCK, WRITTEN}


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def claim_elsewhere() -> Iterator[Callable[[Path], subprocess.Popen]]:
    """Another process that has claimed a folder for "train" and holds it until it is ended."""
    started = []

    def start(folder: Path) -> subprocess.Popen:
        code = CLAIMING.format("claim_folder(sys.argv[1], 'train')")
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", code, str(folder)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
        assert started[-1].stdout.readline() == "in\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


# ---- claims


def test_a_new_folder_an_empty_one_and_ones_own_are_claimed(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("deep/new", "empty", "empty"):
        assert claim_folder(tmp_path / name, "train") == tmp_path / name
        assert json.loads((tmp_path / name / "claim.json").read_text()) == {"job": "train"}
        write_text(tmp_path / name / "model", "trained")


@pytest.mark.parametrize("names", [["model"], ["checkpoints", "notes.txt"], [".git"], ["claim.json"], ["x.part"]])
def test_a_folder_that_holds_anything_else_is_refused_and_not_changed(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        write_text(tmp_path / "run" / name, "mine")
    with pytest.raises(OutputError, match=r"run holds what train did not write \(.*\): choose another or an empty"):
        claim_folder(tmp_path / "run", "train")
    assert {name: (tmp_path / "run" / name).read_text() for name in os.listdir(tmp_path / "run")} == dict.fromkeys(
        names, "mine"
    )


def test_the_output_of_another_job_is_refused(tmp_path: Path) -> None:
    write_text(claim_folder(tmp_path, "encode") / "done.json", "{}")
    with pytest.raises(OutputError, match="is the output of encode, not of train: choose another"):
        claim_folder(tmp_path, "train")
    assert files_in(tmp_path) == {"claim.json", "done.json"}


def test_a_job_that_failed_before_it_wrote_anything_leaves_the_folder_free(tmp_path: Path) -> None:
    claim_folder(tmp_path, "encode")
    claim_folder(tmp_path, "train")
    assert json.loads((tmp_path / "claim.json").read_text()) == {"job": "train"}


def test_a_folder_without_a_claim_is_recognised_by_what_it_holds(tmp_path: Path) -> None:
    write_text(tmp_path / "request.json", "{}")
    claim_folder(tmp_path, "encode", own=lambda folder: (folder / "request.json").exists())
    with pytest.raises(OutputError):  # now it has a claim, which decides
        claim_folder(tmp_path, "train", own=lambda folder: True)


def test_a_claim_moves_with_its_folder(tmp_path: Path) -> None:
    write_text(claim_folder(tmp_path / "a", "train") / "log", "")
    (tmp_path / "a").rename(tmp_path / "b")
    claim_folder(tmp_path / "b", "train")
    assert str(tmp_path) not in (tmp_path / "b" / "claim.json").read_text()


@pytest.mark.parametrize("place", ["taken", "taken/run"])
def test_a_file_where_a_folder_should_be_is_named(tmp_path: Path, place: str) -> None:
    write_text(tmp_path / "taken", "a file")
    with pytest.raises(OutputError, match=f"cannot write the folder {tmp_path / place}: "):
        claim_folder(tmp_path / place, "train")
    with pytest.raises(OutputError, match="already exists|no folder in which"):
        new_folder(tmp_path / place)
    with pytest.raises(OutputError, match="already exists|cannot write"):
        claim_file(tmp_path / place)


def test_what_cannot_be_written_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OutputError, match="cannot write the folder .*No space left"):
        claim_folder(tmp_path / "run", "train")
    with pytest.raises(OutputError, match="cannot write .*No space left"):
        claim_file(tmp_path / "results.json")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="no folder in which you may write"):
        new_folder(tmp_path / "codec")


# ---- files and folders written at once


def test_a_file_is_not_overwritten_unless_it_is_ones_own(tmp_path: Path) -> None:
    for name, text in (("full", "mine"), ("empty", "")):
        write_text(tmp_path / name, text)
    assert claim_file(tmp_path / "deep" / "new") == tmp_path / "deep" / "new"
    claim_file(tmp_path / "empty")
    claim_file(tmp_path / "full", own=lambda file: file.read_text() == "mine")
    for name in ("full", ".", os.devnull):
        with pytest.raises(OutputError, match="already exists|is no file"):
            claim_file(tmp_path / name)


def test_a_folder_written_at_once_is_new_or_empty_and_outside_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_text(tmp_path / "source" / "weights", "published")
    for name in ("empty", "deep/new"):
        with atomic_folder(new_folder(tmp_path / name, tmp_path / "source", "owner/name")) as folder:
            write_text(folder / "weights", "ours")
    for name in ("source", "source/inside", ".", "empty"):
        with pytest.raises(OutputError, match="is inside|already exists"):
            new_folder(tmp_path / name, tmp_path / "source")
    assert files_in(tmp_path) == {"source/weights", "empty/weights", "deep/new/weights"}


def test_the_present_folder_cannot_be_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (".", "../" + tmp_path.name):
        with pytest.raises(OutputError, match="is the present folder, which cannot be replaced: name a new one"):
            new_folder(name)


def test_a_folder_is_replaced_only_within_a_claim(tmp_path: Path) -> None:
    write_text(tmp_path / "out" / "thesis", "mine")
    write_text(tmp_path / "out.part" / "thesis", "mine")
    with pytest.raises(OutputError, match="out already exists"), atomic_folder(tmp_path / "out"):
        pass
    assert files_in(tmp_path) == {"out/thesis", "out.part/thesis"}
    claim_folder(tmp_path / "run", "train")
    for name in ("old", "new"):
        with atomic_folder(tmp_path / "run" / "model") as folder:
            write_text(folder / name, name)
        write_text(tmp_path / "run" / "model" / "notes", "mine")
    assert files_in(tmp_path / "run") == {"claim.json", "model/new", "model/notes"}
    assert (tmp_path / "run" / "model" / "notes").read_text() == "mine"


def test_what_ended_processes_left_half_written_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    claim_folder(tmp_path, "train")
    ended, own = ended_process(), files._part(tmp_path / "x").name
    host, random = own.split(".")[2].split(f"-{os.getpid()}-")
    kept = ["model.part", "x.123.part", f".x.{10**20}.part", f".x.{os.getpid()}.part", ".part"]
    kept += [own, f".x.elsewhere-{ended}-{random}.part", f".x.{host}-{os.getppid()}-{random}.part"]
    left = [f".a.json.{ended}.part", f"checkpoints/.b.{host}-{ended}-{random}.part", f".model.{ended}.part/weights"]
    left += [f".x.{host}-{os.getpid()}-{'0' * 8}.part"]  # of a container that was killed and began anew
    for name in (*left, *kept):
        write_text(tmp_path / name, "")
    assert all(map(is_part, kept[-3:]))
    claim_folder(tmp_path, "train")
    assert files_in(tmp_path) == {"claim.json", *kept}


@pytest.mark.parametrize("other_host", [True, False])
def test_the_parts_of_two_processes_have_different_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_host: bool
) -> None:
    """Also of one number, as in two containers."""
    with atomic_file(tmp_path / "a") as one:
        if other_host:
            monkeypatch.setattr("socket.gethostname", lambda: "node-7.cluster")
        else:
            files._random.cache_clear()  # as a process that has just started
        with atomic_file(tmp_path / "a") as other:
            assert one != other and {one.parent, other.parent} == {tmp_path} and is_part(other.name)
            one.write_text("one")
            other.write_text("other")
    assert (tmp_path / "a").read_text() == "one" and files_in(tmp_path) == {"a"}


# ---- locks


def test_a_folder_in_use_is_refused_until_its_process_has_ended(
    tmp_path: Path, claim_elsewhere: Callable[[Path], subprocess.Popen]
) -> None:
    other = claim_elsewhere(tmp_path / "run")
    with pytest.raises(OutputError, match=rf"run is being written by process {other.pid} on .* since .*: wait for it"):
        claim_folder(tmp_path / "run", "train")
    assert not locked(tmp_path / "run")
    claim_folder(tmp_path / "run" / "stage", "test")  # a part of it has its own lock
    other.kill()
    other.wait()
    claim_folder(tmp_path / "run", "train")  # the number in the file is that of a killed process
    claim_folder(tmp_path / "run", "train")
    assert (
        locked(tmp_path / "run" / "model")
        and json.loads((tmp_path / "run" / LOCK).read_text())["process"] == os.getpid()
    )


def test_a_lock_vanishes_with_its_process_and_the_claim_if_nothing_was_written(tmp_path: Path) -> None:
    code = "import sys; from tokenizer.claims import claim_folder; folder = claim_folder(sys.argv[1], 'train')"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for name, end in (("in_vain", ""), ("empty", ""), ("written", "; (folder / 'log').touch()")):
        if name == "empty":
            (tmp_path / name).mkdir()
        subprocess.run([sys.executable, "-c", code + end, str(tmp_path / name)], env=environment, check=True)
    assert sorted(os.listdir(tmp_path)) == ["empty", "written"]  # without a trace of the one that wrote nothing
    assert sorted(os.listdir(tmp_path / "written")) == ["claim.json", "log"] and not os.listdir(tmp_path / "empty")


def test_a_claim_is_given_up_in_silence_where_a_disk_keeps_what_is_open(tmp_path: Path) -> None:
    """As NFS keeps a lock that is deleted, by another name."""
    code = (
        "import os, sys; from pathlib import Path; from tokenizer.claims import claim_folder; delete = Path.unlink\n"
        "claim_folder(sys.argv[1], 'train')\n"
        "Path.unlink = lambda path, **_: path.rename(path.with_name('.nfs1')) if path.name == '.lock' else delete(path)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    ended = subprocess.run(command, env=environment, check=True, stderr=subprocess.PIPE, text=True)
    assert ended.stderr == "" and os.listdir(tmp_path / "run") == [".nfs1"]


def test_a_forked_process_does_not_hold_the_lock_of_its_parent(tmp_path: Path) -> None:
    claim_folder(tmp_path, "train")
    child = os.fork()
    if not child:
        try:
            claim_folder(tmp_path, "train")
        except OutputError:
            os._exit(3)
        os._exit(locked(tmp_path))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert locked(tmp_path)


@pytest.mark.parametrize(
    "owner, free",
    [
        ({"host": "elsewhere", "process": 1, "since": "yesterday"}, False),
        ({"process": os.getppid(), "since": "yesterday"}, False),
        ({"process": "ended", "since": "yesterday"}, True),
        (None, True),
    ],
)
def test_on_a_disk_without_locks_the_file_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: dict | None, free: bool
) -> None:
    def unknown(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.lockf", unknown)
    if owner:
        owner = {"host": os.uname().nodename, **owner}
        owner["process"] = ended_process() if owner["process"] == "ended" else owner["process"]
    (tmp_path / LOCK).write_text(json.dumps(owner) if owner else "")
    if free:
        lock(tmp_path / LOCK, tmp_path)
        assert locked(tmp_path)
    else:
        with pytest.raises(OutputError, match=f"if it has ended, delete {tmp_path / LOCK}"):
            lock(tmp_path / LOCK, tmp_path)


def test_what_could_not_be_deleted_last_time_is_no_obstacle(tmp_path: Path) -> None:
    run = claim_folder(tmp_path / "run", "train")
    for _ in range(2):  # a new model, and one in the place of another
        for name in ("model", "model.before"):
            files._part(run / name).mkdir()
            (files._part(run / name) / "half").touch()
        with atomic_folder(run / "model") as folder:
            (folder / "weights").touch()
        assert [path.name for path in (run / "model").iterdir()] == ["weights"] and not [*run.glob(".model*")]
