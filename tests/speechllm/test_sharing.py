"""A codec handed on: its card, the files it is uploaded as, and a process that loads it without training code."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from torch import Tensor

import speechllm
from speechllm import SpeechCodec, SpeechCodecConfig, save_audio

ROOT = Path(__file__).resolve().parents[2]
Noise = Callable[..., Tensor]
# large packages that using a codec never needs
FOREIGN = "speechbrain sklearn transformers datasets accelerate peft matplotlib jiwer pandas".split()


def run(program: str, *arguments: object) -> str:
    """What a Python program of its own process prints."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def hub(codec: SpeechCodec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `push_to_hub` uploads, in place of a hub: <hub>/owner/codec/<file>."""
    folder = tmp_path_factory.mktemp("hub")

    def create_repo(self: HfApi, repo_id: str, **_: object) -> SimpleNamespace:
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self: HfApi, repo_id: str, folder_path: Path, **_: object) -> str:
        shutil.copytree(folder_path, folder / repo_id)
        return f"https://example.org/{repo_id}"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HfApi, "create_repo", create_repo)
        patch.setattr(HfApi, "upload_folder", upload_folder)
        codec.push_to_hub("owner/codec")
    return folder


def test_the_hub_gets_configuration_weights_and_card(hub: Path) -> None:
    assert {path.name for path in (hub / "owner/codec").iterdir()} == {"config.json", "model.safetensors", "README.md"}


def test_a_codec_of_the_hub_is_the_one_that_was_pushed(
    hub: Path, codec: SpeechCodec, noise: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(repo_id: str, filename: str, **_: object) -> str:
        return str(hub / repo_id / filename)

    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", download)
    loaded = SpeechCodec.from_pretrained("owner/codec")
    assert loaded.fingerprint == codec.fingerprint
    assert torch.equal(loaded.encode(noise(2_000)).ids, codec.encode(noise(2_000)).ids)


def test_the_card_says_what_the_codec_is(hub: Path, codec: SpeechCodec) -> None:
    card = ModelCard.load(hub / "owner/codec/README.md")
    assert card.data.library_name == "speechllm"
    assert {"audio", "speech", "codec"} <= set(card.data.tags)
    assert card.data.license is None  # the licence of weights is not ours to give
    for fact in (
        "| 16000 Hz, mono |",
        "| 50 frames/s (hop of 320 samples) |",
        "| 3 of 8 vectors, dimension 8 |",
        "| 450 bit/s, 150 bit/s with the first codebook alone |",  # 50 frames/s of 3 bits
        f"| {sum(value.numel() for value in codec.parameters()):,}, and 192 in the codebooks |",
        "| causal | no |",
        f"| fingerprint | `{codec.fingerprint}` |",
        "depends on its training",
    ):
        assert fact in card.text


def test_the_card_writes_large_numbers_in_full() -> None:
    codec = SpeechCodec(SpeechCodecConfig(n_filters=4, dimension=8, sample_rate=24_000, num_codebooks=32))
    assert "| 24000 bit/s, 750 bit/s with the first codebook alone |" in codec.generate_model_card().text


def test_the_program_on_the_card_runs(hub: Path, noise: Noise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (hub / "owner/codec/README.md").read_text(encoding="utf-8")
    program = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    save_audio(tmp_path / "speech.flac", noise(2_000)[0], 16_000)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(program.replace("this/repository", str(hub / "owner/codec")), names)
    assert names["codes"].ids.shape == (1, 3, 7)
    assert names["speech"].shape == (1, 2_000)


def test_a_process_that_uses_a_codec_never_imports_training_code(
    codec: SpeechCodec, codec_folder: Path, noise: Noise, tmp_path: Path
) -> None:
    torch.save(noise(2_000), tmp_path / "waveform.pt")
    program = (
        "import json, sys, torch\n"
        "from speechllm import SpeechCodec\n"
        "codec = SpeechCodec.from_pretrained(sys.argv[1])\n"
        "codes = codec.encode(torch.load(sys.argv[2]))\n"
        "codec.decode(codes)\n"
        "print(json.dumps([codec.fingerprint, codes.ids.tolist(), sorted(sys.modules)]))\n"
    )
    fingerprint, ids, modules = json.loads(run(program, codec_folder, tmp_path / "waveform.pt"))
    assert fingerprint == codec.fingerprint
    assert ids == codec.encode(noise(2_000)).ids.tolist()
    assert "tokenizer.codec.speech_codec" in modules
    assert not set(FOREIGN) & set(modules)
    assert {name for name in modules if name.startswith("speechllm.")} == {"speechllm._guard", "speechllm.speech"}


def test_importing_the_package_alone_imports_nothing_heavy() -> None:
    assert run("import sys, speechllm; print({'torch', 'numpy'} & set(sys.modules))") == "set()\n"


def test_every_public_name_exists_and_there_are_at_most_60() -> None:
    assert 40 < len(speechllm.__all__) <= 60
    for name in speechllm.__all__:
        assert getattr(speechllm, name).__name__ == name
    assert set(speechllm.__all__) <= set(dir(speechllm))


def test_a_name_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(AttributeError, match="No speechllm attribute transcribble"):
        _ = speechllm.transcribble
    with pytest.raises(ImportError, match="cannot import name 'transcribble'"):
        exec("from speechllm import transcribble")
