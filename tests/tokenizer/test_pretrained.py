"""Names of models: which are folders, which are runs, and which may be on the hub."""

from pathlib import Path

import pytest

from tokenizer.pretrained import check_folder

FILES = ["config.json", "model.safetensors"]


def make(folder: Path, *files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        (folder / file).touch()
    return folder


def test_a_run_is_taken_for_its_model(tmp_path: Path) -> None:
    model = make(tmp_path / "run 12:30 #1" / "model", *FILES)
    make(model.parent, "done.json", "config.yaml")
    for files in (FILES, []):
        assert check_folder(model.parent, files, "a model") == str(model)
        assert check_folder(str(model), files, "a model") == str(model)


def test_a_model_with_a_folder_named_model_is_itself(tmp_path: Path) -> None:
    make(tmp_path / "model", *FILES)
    make(tmp_path, *FILES)
    assert check_folder(tmp_path, FILES, "a model") == str(tmp_path)
    assert check_folder(tmp_path, [], "a model") == str(tmp_path)


@pytest.mark.parametrize(
    "path, files, message",
    [
        ("run", ("config.yaml",), "it lacks config.json, model.safetensors; it holds a run that has not finished"),
        ("run", ("config.json",), r"it lacks model.safetensors$"),
        ("run/model", ("config.json",), r"run/model is not the folder of a model: it lacks model.safetensors$"),
    ],
)
def test_a_folder_without_the_files_is_named(tmp_path: Path, path: str, files: tuple[str, ...], message: str) -> None:
    make(tmp_path / path, *files)
    with pytest.raises(FileNotFoundError, match=message):
        check_folder(tmp_path / "run", FILES, "a model")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    make(tmp_path, "model.safetensors")
    with pytest.raises(NotADirectoryError, match=r"model.safetensors is a file \(expected a model, which is a folder"):
        check_folder(tmp_path / "model.safetensors", FILES, "a model")


@pytest.mark.parametrize("name", ["owner/model", "gpt2", "Qwen/Qwen2-1.5B", "a_b.c/d-e"])
def test_a_hub_name_is_left_to_the_hub(name: str) -> None:
    assert check_folder(name, FILES, "a model") == name


@pytest.mark.parametrize(
    "name",
    ["./run", "/no/run", "~/no such run", "a/b/c", "12:30", "C:\\codec", "a b", "a/b #1", "été", "x" * 5000 + "/ "],
)
def test_what_can_only_be_a_path_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such folder \(expected a model, or a hub name like owner/model\)"):
        check_folder(name, FILES, "a model")


def test_the_home_folder_can_be_written_as_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make(tmp_path / "run", *FILES)
    assert check_folder("~/run", FILES, "a model") == str(tmp_path / "run")
