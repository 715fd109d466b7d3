"""Every command of the README's "Reproduce the paper" in miniature: real splits' names, real models' formats."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from string import Template
from types import ModuleType

import numpy as np
import pytest
import soundfile
import torch

from speechllm.runs.config import load_config
from tokenizer.training.small_teachers import save_ecapa, save_hubert, small_hubert

pytest.importorskip("pesq")
pytest.importorskip("pyworld")
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).resolve().parents[2]
SECTION = re.search(r"^## Reproduce the paper\n(.*?)^## ", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)[1]
BLOCKS = re.findall(r"^```sh\n(.*?)^```", SECTION, re.M | re.S)
SPLITS = {"train-other-500": 3, "train-clean-100": 3, "dev-clean": 1, "test-clean": 2}  # utterances of each speaker
VARIABLES = {"LIBRI", "RAVDESS", "HUBERT", "ECAPA", "QWEN", "BERT"}
WORDS = "HE HOPED THERE WOULD BE STEW FOR DINNER".split()
ECAPA = {"channels": [8, 8, 8, 8, 16], "attention_channels": 8, "se_channels": 8, "res2net_scale": 2, "lin_neurons": 6}
SIZES = {  # what makes a recipe small, appended to its command
    "train_tokenizer.py": (
        "codec.n_filters=2 codec.dimension=16 codec.codebook_size=16 adversary.stft_filters=2 losses.mel_windows=[256] "
        "losses.mel_bands=[16] steps=2 batch_size=2 crop_s=0.5 warmup=1 num_workers=0 precision=no"
    ),
    "train_asr.py": (
        "steps=2 batch_tokens=400 micro_batch_tokens=200 warmup=1 validate_every=2 dev_utterances=1 precision=no "
        "gradient_checkpointing=false"
    ),
    "eval_conversion.py": "pairs=2",
    "train_emotion.py": "epochs=1 folds=2",
}
WRITTEN = {  # in the folder behind output=
    "train_tokenizer.py": "model/config.json model/model.safetensors done.json log.jsonl report.html",
    "encode_speech.py": "codes_00000.arrow done.json",
    "train_asr.py": "model/tokenizer.json model/audio_vocabulary.json model/codec/config.json done.json report.html",
    "eval_codec.py": "results.json utterances.jsonl",
    "eval_conversion.py": "results.json pairs.jsonl",
    "train_emotion.py": "results.json predictions.jsonl report.html",
    "eval_asr.py": "results.json predictions.jsonl report.html",
}


def voice(pitch: float, seconds: float, rate: int, seed: int) -> np.ndarray:
    """Syllables of a hum, float [N]."""
    time = np.arange(round(seconds * rate)) / rate
    draw = np.random.default_rng(seed)
    phase = 2 * np.pi * np.cumsum(pitch * (1 + 0.1 * np.sin(2 * np.pi * time + draw.uniform(0, 6)))) / rate
    hum = sum(0.7**k * np.sin(k * phase) for k in range(1, 15))
    loudness = np.repeat(draw.uniform(0.1, 1, len(time) // 1600 + 1), 1600)[: len(time)]
    return 0.08 * loudness * hum + 0.003 * draw.standard_normal(len(time))


def write_librispeech(folder: Path) -> None:
    """Two speakers a split, <split>/<speaker>/<chapter>/<speaker>-<chapter>-<n>.flac beside one file of transcripts."""
    for number, (split, utterances) in enumerate(SPLITS.items()):
        for speaker in (f"{number + 1}1", f"{number + 1}2"):
            chapter = folder / split / speaker / "9"
            chapter.mkdir(parents=True)
            lines = []
            for i in range(utterances):
                name = f"{speaker}-9-{i:04}"
                sound = voice(100 + 2 * int(speaker), 0.8, 16_000, int(speaker) + i)
                soundfile.write(chapter / f"{name}.flac", sound, 16_000)
                lines.append(f"{name} {' '.join(WORDS[i : i + 3])}\n")
            (chapter / f"{speaker}-9.trans.txt").write_text("".join(lines))


def write_ravdess(folder: Path) -> None:
    """Four actors, four emotions and two sentences, at RAVDESS's 48 kHz."""
    for actor in range(1, 5):
        place = folder / f"Actor_{actor:02}"
        place.mkdir(parents=True)
        for emotion in (1, 3, 4, 5):
            for sentence in (1, 2):
                sound = voice(80 + 30 * actor, 0.5 + 0.02 * emotion, 48_000, 10 * actor + sentence)
                name = f"03-01-{emotion:02}-01-{sentence:02}-01-{actor:02}.wav"
                soundfile.write(place / name, sound, 48_000, "PCM_16")


@pytest.fixture
def paper(tmp_path: Path, make_qwen2: Callable, make_text_tokenizer: Callable, monkeypatch: pytest.MonkeyPatch) -> dict:
    """The README's variables, naming stand-ins in the current folder, which has the configurations as a clone has."""
    from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    folders = {name: tmp_path / "given" / name.lower() for name in VARIABLES}
    write_librispeech(folders["LIBRI"])
    write_ravdess(folders["RAVDESS"])
    folders["ECAPA"].mkdir()
    save_hubert(small_hubert(16, 2), folders["HUBERT"])
    save_ecapa(ECAPA_TDNN(8, **ECAPA), ECAPA, 8, ["a", "b"], folders["ECAPA"])
    text_tokenizer = make_text_tokenizer()
    make_qwen2(text_tokenizer, spare=200).save_pretrained(folders["QWEN"])  # rows to spare, as Qwen2-1.5B has
    text_tokenizer.save_pretrained(folders["QWEN"])
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(vocab_size=50, **shape)).save_pretrained(folders["BERT"])
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return {name: folder.relative_to(tmp_path).as_posix() for name, folder in folders.items()}


@pytest.fixture
def run(
    recipe: Callable[[str], ModuleType],
    config_class: Callable[[str], type],
    new_accelerator: Callable[[], None],
    without_pictures: None,
) -> Callable[[str, list[str]], None]:
    def run(name: str, words: list[str]) -> None:
        config = words[words.index("--config") + 1] if "--config" in words else None
        changes = [word for word in words if "=" in word] + SIZES.get(name, "").split()
        recipe(name).main(load_config(config_class(name), config, changes))
        new_accelerator()

    return run


def commands(variables: dict[str, str]) -> list[tuple[str, list[str]]]:
    """Recipe and words of each command, as the shell reads them; assignments end in `variables` instead."""
    found = []
    for line in "\n".join(BLOCKS).replace("\\\n", " ").splitlines():
        if assignment := re.match(r"([A-Z]+)=\S", line):
            assert assignment[1] in VARIABLES
        elif words := shlex.split(Template(re.sub(r"(^|\s)#.*", "", line)).substitute(variables)):
            assert words[0] == "python" and words[1].startswith("recipes/")
            found.append((words[1].removeprefix("recipes/"), words[2:]))
    return found


def test_every_variable_of_the_section_is_set_there() -> None:
    assert set(re.findall(r"^([A-Z]+)=\S", BLOCKS[0], re.M)) == VARIABLES
    assert set(re.findall(r"\$(\w+)", SECTION)) == VARIABLES


def test_the_paper_is_reproduced_in_miniature(paper: dict[str, str], run: Callable, tmp_path: Path) -> None:
    lines = commands(paper)
    assert {name for name, _ in lines} == set(WRITTEN) and len(lines) == 8
    lora = "configs/asr/qwen2-1.5b_lora.yaml"  # which the text names, with other values of the same commands
    assert lora in SECTION and "steps=35700" in SECTION and '"splits=[train-clean-100]"' in SECTION
    for changed in ("train_tokenizer.py", "train_asr.py"):
        words = next(words for name, words in lines if name == changed)
        words = [re.sub("output=runs/(.*)", r"output=runs/\g<1>100", word) for word in words]
        lines.append((changed, [*words, "splits=[train-clean-100]"]))
    lines.insert(
        -1, ("encode_speech.py", ["codec=runs/codec100/model", f"data={paper['LIBRI']}", "output=runs/codes100"])
    )
    swapped = {"configs/asr/qwen2-1.5b.yaml": lora, "codes=runs/codes": "codes=runs/codes100"}
    swapped |= {"codec=runs/codec/model": "codec=runs/codec100/model"}
    lines[-1] = ("train_asr.py", [swapped.get(word, word) for word in lines[-1][1]])
    for name, words in lines:
        (output,) = [word.removeprefix("output=") for word in words if word.startswith("output=")]
        assert not (tmp_path / output).exists()
        run(name, words)
        missing = [file for file in WRITTEN[name].split() if not (tmp_path / output / file).is_file()]
        assert not missing, f"{name} {words}"
        adapter = (tmp_path / output / "model" / "adapter_config.json").is_file()
        assert adapter == ("configs/asr/qwen2-1.5b_lora.yaml" in words)

    def read(file: str) -> dict:
        return json.loads((tmp_path / "runs" / file).read_text(encoding="utf-8"))

    assert set(read("table1/results.json")["codebooks"]) == {"4", "8"}
    assert read("table1/results.json")["codebooks"]["8"]["pesq_wb"]["mean"] > 1
    assert {"swap 1, by position"} < set(read("table2/results.json")["methods"])
    assert read("table2/results.json")["methods"]["swap 1, by position"]["mcd"]["pairs"] == 2
    assert read("table3/results.json")["utterances"] == 32
    assert read("table4/results.json")["words"] > 0 and read("codes100/done.json")["utterances"] > 0
