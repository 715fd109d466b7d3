"""Where recipes write: only into what is new, empty or their own, and that is found out before the work."""

import inspect
import os
import types
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from speechllm.runs.stages import Stages
from tokenizer.errors import InputError
from tokenizer.files import read_jsonl, write_json, write_jsonl, write_text

Recipe = Callable[[str], types.ModuleType]
CHECKED_FIRST = (
    *("align_speech", "benchmark", "benchmark_serve", "compare", "cut_speech", "demo"),
    *("encode_speech", "eval_asr", "eval_codec", "eval_conversion", "eval_rows", "fit_units", "make_rows", "rehearse"),
)
FILES = ("draw_pipeline", "draw_scaling", "eval_tokenizer")  # their output is a file


def config_of(module: types.ModuleType, output: Path, **values: Any) -> Any:
    """A configuration whose inputs do not exist."""
    cls = inspect.signature(module.main).parameters["config"].annotation
    required = {field.name for field in fields(cls) if field.default is field.default_factory is MISSING}
    given = dict.fromkeys(required, "nowhere") | {"kind": "semantic"} if "kind" in required else {}
    if "systems" in required:
        given |= {"systems": [module.SystemConfig("a", tokenizer="x")], "tasks": ["content"]}
    if "curves" in required:
        given |= {"curves": [module.CurveConfig("a", [1.0], ["nowhere"])]}
    return cls(**{**dict.fromkeys(required, "nowhere"), **given, **values, "output": str(output)})


@pytest.mark.parametrize("name", CHECKED_FIRST)
def test_a_folder_with_other_files_is_refused_before_the_work(tmp_path: Path, recipe: Recipe, name: str) -> None:
    write_text(tmp_path / "model" / "mine", "")
    module = recipe(f"{name}.py")
    with pytest.raises(InputError, match=rf"holds what {name} did not write \(model\): choose another or an empty"):
        module.main(config_of(module, tmp_path))
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "mine"]


@pytest.mark.parametrize("name", [*CHECKED_FIRST, *FILES])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path, recipe: Recipe, name: str) -> None:
    write_text(tmp_path / "taken", "a file")
    module = recipe(f"{name}.py")
    with pytest.raises(InputError, match="cannot write .*taken/out"):
        module.main(config_of(module, tmp_path / "taken" / "out"))


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_there_is_refused_before_the_work(tmp_path: Path, recipe: Recipe, name: str) -> None:
    write_json(tmp_path / "out", {"config": {"mine": 1}})
    module = recipe(f"{name}.py")
    with pytest.raises(InputError, match="out already exists: choose another name"):
        module.main(config_of(module, tmp_path / "out"))


def test_an_evaluation_in_a_file_replaces_its_own_results(tmp_path: Path, recipe: Recipe) -> None:
    module = recipe("eval_tokenizer.py")
    config = config_of(module, tmp_path / "results.json")
    write_text(tmp_path / "results.html", "a page")
    with pytest.raises(InputError, match="results.html already exists"):
        module.main(config)
    write_json(tmp_path / "results.json", {"config": {"codes": "c", "data": "d", "output": "o"}})
    with pytest.raises(InputError, match="nowhere"):  # only that the codes are missing
        module.main(config)
    with pytest.raises(ValueError, match="the page beside it ends in .html"):
        config_of(module, tmp_path / "results.html")


def test_the_corpus_that_is_aligned_is_not_overwritten(tmp_path: Path, recipe: Recipe) -> None:
    rows = [{"path": "a.flac", "duration_s": 1.0, "mine": 1}, {"path": "b.flac", "duration_s": 1.0, "split": "dev"}]
    write_jsonl(tmp_path / "manifest.jsonl", rows)
    module = recipe("align_speech.py")
    with pytest.raises(InputError, match="holds what align_speech did not write"):
        module.main(config_of(module, tmp_path, data=str(tmp_path), splits=["train"]))
    assert read_jsonl(tmp_path / "manifest.jsonl") == rows


def test_a_corpus_is_not_imported_into_the_data_set_that_is_read(tmp_path: Path, recipe: Recipe) -> None:
    write_text(tmp_path / "data" / "a.parquet", "")
    module = recipe("import_speech.py")
    for output in ("data", "data/corpus"):
        with pytest.raises(InputError, match="is inside .*data, which is read: choose a folder outside"):
            module.main(config_of(module, tmp_path / output, data=str(tmp_path / "data")))
    assert os.listdir(tmp_path / "data") == ["a.parquet"]


# ---- demo, compare and their stages


def test_a_fresh_demo_deletes_only_what_a_demo_wrote(tmp_path: Path, recipe: Recipe) -> None:
    for name in ("notes.txt", "asr/model/weights", "report.html", "corpus_of_mine/a.flac"):
        write_text(tmp_path / name, "")
    recipe("demo.py").delete(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["corpus_of_mine", "notes.txt"]


def test_a_demo_is_not_made_around_the_speech_it_reads(tmp_path: Path, recipe: Recipe) -> None:
    module = recipe("demo.py")
    write_text(tmp_path / "corpus" / "manifest.jsonl", "")
    with pytest.raises(InputError, match="is in the run folder"):
        module.main(config_of(module, tmp_path, data=str(tmp_path / "corpus"), fresh=True))
    assert (tmp_path / "corpus" / "manifest.jsonl").exists()


def test_the_settings_of_a_demo_move_with_its_folder(tmp_path: Path, recipe: Recipe) -> None:
    module = recipe("demo.py")
    for place in ("old", "new"):
        module.record_settings(tmp_path, config_of(module, Path(place)))
    with pytest.raises(SystemExit, match="holds a demo with other settings"):
        module.record_settings(tmp_path, config_of(module, tmp_path, scale=2.0))


def test_finished_stages_are_known_where_the_folder_was_moved(tmp_path: Path) -> None:
    def words(run: Path, data: str) -> list[str]:
        return ["eval.py", f"model={run}/asr/model", f"codec=features:{run}/x", f"output={run}", f"data={data}"]

    old, new = tmp_path / "a", tmp_path / "b"
    old.mkdir()
    Stages(old, tmp_path).call("evaluate", lambda: None, [words(old, f"{old}2/corpus")])
    old.rename(new)
    Stages(new, tmp_path).call("evaluate", lambda: pytest.fail("done before"), [words(new, f"{old}2/corpus")])
    with pytest.raises(InputError, match="was done with other settings"):
        Stages(new, tmp_path).call("evaluate", lambda: None, [words(new, f"{new}2/corpus")])


def test_stages_of_an_earlier_version_are_known_in_their_place(tmp_path: Path) -> None:
    words = ["eval.py", f"output={tmp_path}/x"]
    write_json(tmp_path / "stages.json", {"evaluate": {"seconds": 1.0, "finished": True, "words": words}})
    Stages(tmp_path, tmp_path).call("evaluate", lambda: pytest.fail("done before"), [words])


# ---- the synthetic corpus


def test_a_synthetic_corpus_is_made_by_one_process(tmp_path: Path, recipe: Recipe) -> None:
    module = recipe("synthesize_speech.py")
    assert module.prepare_folder(tmp_path / "corpus", {"seed": 0})
    child = os.fork()
    if not child:
        try:
            module.prepare_folder(tmp_path / "corpus", {"seed": 0})
        except InputError as error:
            os._exit(3 if "is being written by" in str(error) else 4)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
