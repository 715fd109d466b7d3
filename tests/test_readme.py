"""What the documents promise is there: targets, files, commands, names, and pictures."""

import ast
import importlib
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import torch

from speechllm import (
    DiscreteTokenizer,
    SpeechLLM,
    TokenizerError,
    Utterance,
    encode_shards,
    extend_vocabulary,
    load_codes,
    load_speech_llm,
    load_tokenizer,
    save_audio,
    transcribe,
)
from speechllm.cli.main import main as command_line
from speechllm.data.encoded import codes_of
from speechllm.runs.config import load_config

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("recipes", "configs", "tokenizer", "speechllm", "tests")
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "recipes/RESULTS.md", *(f"{folder}/README.md" for folder in FOLDERS)]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
documents = pytest.mark.parametrize("document", DOCUMENTS)


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, *languages: str) -> list[str]:
    return [text for language, text in BLOCK.findall(read(document)) if language in languages]


def commands(document: str) -> list[str]:
    """Lines of the shell blocks, continued ones joined, and what stands in `single quotes` in the text."""
    lines = "\n".join(blocks(document, "sh", "bash", "shell", "console")).replace("\\\n", " ").splitlines()
    return lines + re.findall(r"`([^`\n]+)`", BLOCK.sub("", read(document)))


def words(line: str) -> list[str]:
    return shlex.split(
        re.sub(r"\s#.*", "", line)
    )  # shlex takes every # for a comment, the shell only one behind a space


def recipe_commands() -> list[str]:
    starts = re.compile(r"^\$? ?(accelerate launch|python)\b.* ?recipes/\w+\.py\b")
    return [line for document in DOCUMENTS for line in commands(document) if starts.search(line)]


def speechllm_commands() -> list[str]:
    return [line for document in DOCUMENTS for line in commands(document) if re.match(r"\$? ?speechllm \w", line)]


@documents
def test_there_are_commands(document: str) -> None:
    assert len(commands(document)) > 5


def test_the_readme_can_be_read_in_minutes() -> None:
    assert len(read("README.md")) <= 12_000


@documents
def test_no_data_set_is_a_folder_of_somebodys_machine(document: str) -> None:
    assert "shared/" not in read(document)


@documents
def test_every_make_target_exists(document: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    named = {name for line in commands(document) for name in re.findall(r"(?:^|[;&] *|\s)make ([a-z][\w-]*)", line)}
    assert named <= targets


@documents
def test_every_file_of_the_project_that_is_named_exists(document: str) -> None:
    pattern = r"(?<![\w./-])((?:recipes|configs|tests|speechllm|tokenizer|\.ci)/[\w./-]*\w)"
    named = set(re.findall(pattern, read(document)))
    missing = {path for path in named if not (ROOT / path).exists()}
    assert named and not missing


@documents
def test_every_link_to_a_file_leads_somewhere(document: str) -> None:
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", read(document))
    assert not [link for link in links if not (ROOT / document).parent.joinpath(link).exists()]


@documents
def test_every_link_to_a_section_finds_it(document: str) -> None:
    def sections(name: str) -> set[str]:
        titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", read(name)), re.MULTILINE)
        return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}

    links = re.findall(r"\]\((?!https?://)([^)#\s]*)#([^)\s]+)\)", read(document))
    here = (ROOT / document).parent
    names = [(here / link).resolve().relative_to(ROOT).as_posix() if link else document for link, _ in links]
    assert not [link for link, name in zip(links, names, strict=True) if link[1] not in sections(name)]


@pytest.mark.parametrize("line", recipe_commands())
def test_every_recipe_command_would_be_accepted(
    line: str, config_class: Callable[[str], type], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    parts = words(line.lstrip("$ "))
    position = next(i for i, word in enumerate(parts) if word.startswith("recipes/"))
    recipe, rest = parts[position].removeprefix("recipes/"), parts[position + 1 :]
    if not rest or recipe == "synthesize_speech.py":
        return  # only mentioned, or without a configuration
    config = rest[rest.index("--config") + 1] if "--config" in rest else None
    load_config(config_class(recipe), config, [word for word in rest if "=" in word])


@pytest.mark.parametrize("line", speechllm_commands())
def test_every_speechllm_command_exists_with_its_options(line: str, capsys: pytest.CaptureFixture) -> None:
    _, command, *rest = words(line.lstrip("$ "))
    with pytest.raises(SystemExit) as end:
        command_line([command, "--help"])
    assert end.value.code == 0
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= known


def test_the_demo_ends_with_the_figures_of_the_readme(recipe: Callable[[str], ModuleType]) -> None:
    results = {
        **{"wer": 0.051, "wer_ci95": (0.035, 0.068), "utterances": 200, "tokens_per_second": 50.3},
        **{
            "unseen_speakers": True,
            "wer_shuffled_audio": 0.943,
            "wer_shuffled_audio_ci95": (0.9, 0.98),
            "seconds": 237,
        },
        "content": {"label": "phone", "layer_0": {"pnmi": 0.67}, "log_mel_kmeans": {"pnmi": 0.59}},
        "speaker": {"layer_0": 0.25, "layer_1": 0.33, "chance": 0.01},
    }
    lines = recipe("demo.py").summary(Path("runs/demo"), results).splitlines()
    figures = re.compile(r"\d[\d.]*")
    (shown,) = [text.splitlines() for text in blocks("README.md", "text") if text.startswith("WER")]
    assert len(shown) == 3
    assert {tuple(figures.findall(line)) for line in shown} <= {tuple(figures.findall(line)) for line in lines}


@documents
def test_python_blocks_compile_and_import_names_that_exist(document: str) -> None:
    for block in blocks(document, "python", "py"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "speechllm":
                module = importlib.import_module(node.module)  # what users need comes from speechllm itself
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_the_tokenizer_of_ones_own_works_everywhere(
    tmp_path: Path, noise: Callable, make_qwen2: Callable, text_tokenizer: object, capsys: pytest.CaptureFixture
) -> None:
    (block,) = [text for name in DOCUMENTS for text in blocks(name, "python") if "class Loudness" in text]
    assert len(block.splitlines()) < 60
    (tmp_path / "loudness.py").write_text(block, encoding="utf-8")
    name = f"{tmp_path / 'loudness.py'}:Loudness"
    codec = load_tokenizer(name)
    assert isinstance(codec, DiscreteTokenizer)
    waveform, lengths = noise(2000, batch=2), torch.tensor([2000, 700])
    codes = codec.encode(waveform, lengths)
    assert codes.ids.shape == (2, 1, 7) and codes.lengths.tolist() == [7, 3] and len(codes.ids.unique()) > 3
    assert torch.equal(codec.encode(waveform[1:, :700]).utterance(0), codes.utterance(1))  # alone as in the batch
    save_audio(tmp_path / "a.wav", waveform[0], 16_000)
    utterances = [Utterance("a", str(tmp_path / "a.wav"), 0.125, "train", "ON")]
    list(encode_shards(utterances, codec, tmp_path / "codes"))
    rows, encoding = load_codes(tmp_path / "codes")
    model = make_qwen2(text_tokenizer)
    vocabulary = extend_vocabulary(model, text_tokenizer, codec)
    vocabulary.require(encoding)
    assert codes_of(rows[0], encoding).shape == (1, 7)
    speech_llm = SpeechLLM(model, text_tokenizer, vocabulary, codec)
    speech_llm.save(tmp_path / "model")
    loaded = load_speech_llm(tmp_path / "model", codec=name)
    assert transcribe([tmp_path / "a.wav"], loaded) == transcribe([tmp_path / "a.wav"], speech_llm)
    capsys.readouterr()
    assert command_line(["encode", str(tmp_path / "a.wav"), "--codec", name]) == 0
    assert json.loads(capsys.readouterr().out)["codes"] == codec.encode(waveform[:1]).ids[0].tolist()
    assert command_line(["reconstruct", str(tmp_path / "a.wav"), "--codec", name, "--output", str(tmp_path)]) == 1
    assert "cannot turn its tokens into speech again" in capsys.readouterr().err


def test_the_picture_is_one_that_its_command_draws(
    tmp_path: Path, noise: Callable, make_speech_llm: Callable, recipe: Callable[[str], ModuleType]
) -> None:
    make_speech_llm().save(tmp_path / "model")
    save_audio(tmp_path / "a.wav", noise(16_000)[0], 16_000)
    module = recipe("draw_pipeline.py")
    module.main(module.DrawConfig(*(str(tmp_path / name) for name in ("model", "a.wav", "drawn/a.svg"))))
    drawn, shown = tmp_path / "drawn" / "a.svg", ROOT / "recipes" / "pipeline.svg"
    assert "(recipes/pipeline.svg)" in read("README.md") and shown.stat().st_size < 40_000
    for file in (drawn, shown):
        texts = [element.text for element in ElementTree.parse(file).iter() if element.tag.endswith("}text")]
        assert {"speech", "codes", "prompt", "text", "Transcribe this speech", "<|audio_start|>"} < set(texts)


def test_a_file_without_such_a_tokenizer_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("class Half:\n    sample_rate = 16_000\n")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_tokenizer(f"{tmp_path / 'other.py'}:Half")
    with pytest.raises(TokenizerError, match="has no class Whole"):
        load_tokenizer(f"{file}:Whole")
    with pytest.raises(TokenizerError, match="no audio tokenizer yet, it lacks device, encode, fingerprint"):
        load_tokenizer(f"{file}:Half")
