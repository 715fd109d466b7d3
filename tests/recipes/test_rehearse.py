"""recipes/rehearse.py: every stage at a tiny size, and stages that cannot run."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from safetensors.torch import load_file

from speechllm.runs.config import load_config
from speechllm.runs.rehearsal import count_flops, measure_steps, noise_corpus, size_gb, try_stage
from speechllm.runs.run import Run
from speechllm.training import plan
from tokenizer.files import write_jsonl

TOKENIZER = {
    "codec": {"sample_rate": 2000, "n_filters": 4, "dimension": 8, "num_codebooks": 2, "codebook_size": 8},
    "semantic": {"teacher": None},
    "acoustic": {"teacher": None},
    "losses": {"mel_windows": [256], "mel_bands": [16]},
    "adversary": {"stft_filters": 2},
    "weight_average": 0.9,
    **{"steps": 1000, "batch_size": 2, "crop_s": 1.0, "num_workers": 0},
}
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ASR = {
    "model": None,
    "small": {**SHAPE, "num_key_value_heads": 1, "text_tokens": 300},
    **{"steps": 5000, "batch_tokens": 1500, "micro_batch_tokens": 800, "precision": "no", "layers": 2},
}
CPU = torch.device("cpu")


@pytest.fixture
def rehearse(recipe: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Rehearse with changes to the two configurations, and return the results."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setitem(plan.SIZES, "cpu", 64)
    module = recipe("rehearse.py")

    def run(codec: dict | None, asr: dict | None, **settings: object) -> dict:
        files = {}
        for name, base, changes in (("tokenizer", TOKENIZER, codec), ("asr", ASR, asr)):
            files[name] = None if changes is None else str(tmp_path / f"{name}.yaml")
            if changes is not None:
                Path(files[name]).write_text(yaml.safe_dump(base | changes))
        output = str(tmp_path / "out")
        settings = {"recordings": 2, "minutes": 1e-4} | settings
        with torch.set_grad_enabled(True):
            module.main(module.RehearsalConfig(output, **files, **settings))
        return json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))

    return run


def test_every_stage_is_measured(rehearse: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    results = rehearse({}, {})
    stages = results["stages"]
    assert list(stages) == ["codec training", "encoding", "fine-tuning", "decoding"]
    for found in stages.values():
        assert found["fits"] is True and found["bound"] in ("loader", "device") and found["busy"] is None
        assert found["measured_steps"] == 2 and 0 <= found["wait_s"] < found["step_s"]
        assert found["flops"] > 1e5 and found["mfu"] > 0 and found["peak_memory_gb"] > 0.1
        assert found["hours"] == pytest.approx(found["steps"] * found["step_s"] / 3600)
    assert (stages["codec training"]["steps"], stages["fine-tuning"]["steps"]) == (1000, 5000)
    assert stages["encoding"]["steps"] / stages["decoding"]["steps"] == pytest.approx(500 / 10.5)
    assert results["hours"] == pytest.approx(sum(found["hours"] for found in stages.values()))
    assert 0.001 < stages["encoding"]["disk_gb"] < 1 and results["disk_gb"] > stages["fine-tuning"]["disk_gb"] > 0
    printed = capsys.readouterr().out
    assert "| fine-tuning | yes |" in printed and "| all |" in printed
    assert "Rehearsal" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("without_pictures")
def test_disk_of_the_codec_is_that_of_its_checkpoints(
    rehearse: Callable, recipe: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk_gb = rehearse({"splits": ["train"], "dev_splits": ["train"]}, None)["stages"]["codec training"]["disk_gb"]
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    rows = [
        {"id": one.id, "path": one.path, "duration_s": one.duration_s, "split": "train"}
        for one in noise_corpus(corpus, 2, 2000)
    ]
    write_jsonl(corpus / "manifest.jsonl", rows)
    monkeypatch.setattr(Run, "_delete_checkpoints", lambda self: None)
    training = recipe("train_tokenizer.py")
    words = f"data={corpus} output={tmp_path / 'run'} steps=3 save_every=1 validate_every=1"
    with torch.enable_grad():
        training.main(load_config(training.TokenizerConfig, tmp_path / "tokenizer.yaml", words.split()))
    checkpoints = [*(tmp_path / "run" / "checkpoints").iterdir()]
    parts = ("loss", "optimizer", "averaged", "adversary", "best")
    kept = sum(size_gb([torch.load(file)[part] for part in parts]) for file in checkpoints)
    model_gb = size_gb(load_file(tmp_path / "run" / "model" / "model.safetensors"))
    assert len(checkpoints) == 2 and disk_gb == pytest.approx(kept + model_gb)


def test_a_stage_that_cannot_run_leaves_the_others(rehearse: Callable, capsys: pytest.CaptureFixture) -> None:
    stages = rehearse(None, {"train": "lora", "model": "nowhere"})["stages"]
    assert list(stages) == ["fine-tuning", "decoding"]
    assert all(found["fits"] is None and "nowhere" in found["problem"] for found in stages.values())
    assert "| decoding | failed |" in capsys.readouterr().out


def test_published_models_have_their_shapes_and_random_weights(
    rehearse: Callable, monkeypatch: pytest.MonkeyPatch, recipe: Callable[[str], ModuleType]
) -> None:
    module, written = recipe("rehearse.py"), []
    monkeypatch.setitem(module.QWEN2_SHAPES, "1.5b", {**SHAPE, "num_key_value_heads": 1, "vocab_size": 500})
    for name in ("random_hubert", "random_ecapa"):
        monkeypatch.setattr(module, name, lambda folder, name=name: written.append(name) or folder.mkdir())
        getattr(module, name).__name__ = name
    published = {"semantic": {}, "acoustic": {}, "codec": TOKENIZER["codec"] | {"sample_rate": 16_000}}
    stages = rehearse(published, {"model": "Qwen/Qwen2-1.5B", "train": "lora"})["stages"]
    assert written == ["random_hubert", "random_ecapa"] and "config.json" in stages["codec training"]["problem"]
    assert stages["fine-tuning"]["fits"] and stages["decoding"]["fits"]


def test_what_does_not_fit_is_told_from_what_fails() -> None:
    def too_large() -> dict:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate")

    found = try_stage(too_large, CPU)
    assert found["fits"] is False and found["problem"] == "CUDA out of memory. Tried to" and found["seconds"] >= 0
    assert try_stage(dict, CPU)["problem"] == "KeyError: 'precision'"


def test_operations_are_counted_also_of_gradients_within_a_loss() -> None:
    weights, x = torch.ones(3, 5, requires_grad=True), torch.ones(2, 3)

    def step() -> None:
        y = x @ weights
        (inner,) = torch.autograd.grad(y.sum(), weights, create_graph=True)
        (y.sum() + inner.sum()).backward()

    with torch.enable_grad():
        assert count_flops(step) == 3 * 2 * 2 * 3 * 5  # forward, and twice the gradient of the weights


def test_a_step_that_waits_for_its_batch_is_bound_by_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("speechllm.runs.rehearsal.time.perf_counter", lambda: float(next(clock)))
    found = measure_steps(lambda: "batch", lambda batch: None, CPU, 0)
    assert (found["step_s"], found["wait_s"], found["bound"]) == (2.0, 1.0, "loader")
    monkeypatch.setattr("speechllm.runs.rehearsal.WAITING", 0.6)
    assert measure_steps(lambda: "batch", lambda batch: None, CPU, 0)["bound"] == "device"


def test_noise_has_the_lengths_of_librispeech(tmp_path: Path) -> None:
    lengths = [one.duration_s for one in noise_corpus(tmp_path, 40, 2000)]
    assert 11 < sum(lengths) / 40 < 14 and min(lengths) >= 1.5 and max(lengths) <= 17
