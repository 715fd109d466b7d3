"""train_tokenizer and train_teacher where something is wrong: settings, recordings, gradients (see test_recipes.py)."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import soundfile
import torch
from torch import Tensor

from speechllm import CorpusError, RunError, SpeechCodecConfig, Utterance, read_corpus
from speechllm.runs.run import read_log
from tokenizer.corpus import spread

pytestmark = pytest.mark.filterwarnings("ignore:skipped")
RATE = 16_000
DEV = 20


@pytest.fixture(autouse=True)
def _new_accelerator() -> Iterator[None]:
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def corpus(tmp_path: Path, noise: Callable[..., Tensor]) -> Path:
    """Half a second each; of both splits one file holds no sound."""
    folder, rows = tmp_path / "corpus", []
    folder.mkdir()
    for i in range(DEV + 6):
        split = "dev" if i < DEV else "train"
        path = folder / f"u{i:02}.flac"
        soundfile.write(path, noise(RATE // 2, seed=i)[0].numpy(), RATE)
        phones = [["a", 0.2], ["b", 0.5]]
        row = {"id": path.stem, "path": path.name, "duration_s": 0.5, "split": split, "phones": phones}
        rows.append({**row, "text": "A B" if i % 2 else "B A", "speaker": f"s{i % 3}"})
    for i in (0, DEV):
        (folder / f"u{i:02}.flac").write_text("not a sound")
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


# ---- the tokenizer


@pytest.fixture
def tokenizer_recipe(recipe: Callable[[str], ModuleType]) -> ModuleType:
    return recipe("train_tokenizer.py")


@pytest.fixture
def train(tokenizer_recipe: ModuleType, corpus: Path, tmp_path: Path) -> Callable[..., Path]:
    """Train a tiny codec without teachers and adversary; the run's folder."""

    def train(**settings: object) -> Path:
        module, run = tokenizer_recipe, tmp_path / "run"
        losses = module.LossConfig(adversarial=0, feature_matching=0, mel_windows=[256, 512])
        shape = {"n_filters": 4, "dimension": 8, "num_codebooks": 2, "codebook_size": 16, "lstm": "none"}
        words = {"splits": ["train"], "steps": 2, "batch_size": 4, "crop_s": 0.4, "warmup": 1, "num_workers": 0}
        words |= {"codec": SpeechCodecConfig(**shape), "losses": losses, "validate_every": 1, "save_every": 1}
        none = module.SemanticConfig(teacher=None), module.AcousticConfig(teacher=None)
        config = module.TokenizerConfig(str(corpus), str(run), semantic=none[0], acoustic=none[1], **(words | settings))
        module.main(config)
        return run

    return train


SILENT = {"adversarial": 0, "feature_matching": 0}
WRONG = {
    "no discriminator for the adversarial loss": (
        {},
        {"feature_matching": 0},
        {"stft_filters": 0},
        "need adversary.stft_filt",
    ),
    "no discriminator for feature matching": (
        {},
        {"adversarial": 0},
        {"stft_filters": 0},
        "losses need adversary.stft_filters",
    ),
    "no loss before the adversary": ({}, {"time": 0, "mel": 0}, {"start": 5}, "steps have no loss: set losses.time"),
    "no loss at all": ({}, {"time": 0, "mel": 0, **SILENT}, {}, "the first steps have no loss"),
    "another rate": ({"sample_rate": 24_000}, {}, {}, "teachers need codec.sample_rate=16000, got 24000"),
    "another hop": ({"strides": (2, 4, 5, 4)}, {}, {}, "strides with a product of 320, got 160"),
}


@pytest.mark.parametrize("codec, losses, adversary, message", WRONG.values(), ids=WRONG.keys())
def test_impossible_settings_are_refused(
    tokenizer_recipe: ModuleType, codec: dict, losses: dict, adversary: dict, message: str
) -> None:
    module = tokenizer_recipe
    with pytest.raises(ValueError, match=message) as error:
        module.TokenizerConfig(
            "corpus",
            "run",
            codec=SpeechCodecConfig(**codec),
            losses=module.LossConfig(**losses),
            adversary=module.AdversaryConfig(**adversary),
        )
    assert ";" not in str(error.value)


def test_possible_settings_are_accepted(tokenizer_recipe: ModuleType) -> None:
    module = tokenizer_recipe
    none = {"semantic": module.SemanticConfig(teacher=None), "acoustic": module.AcousticConfig(teacher=None)}
    for settings in (
        {"codec": SpeechCodecConfig(sample_rate=24_000, strides=(2, 4, 5, 4)), **none},
        {"codec": SpeechCodecConfig(strides=(2, 4, 5, 4)), "semantic": none["semantic"]},
        {"losses": module.LossConfig(time=0, mel=0)},
        {"losses": module.LossConfig(time=0, mel=0, speech_features=1), "adversary": module.AdversaryConfig(start=5)},
        {"losses": module.LossConfig(**SILENT), "adversary": module.AdversaryConfig(stft_filters=0)},
    ):
        module.TokenizerConfig("corpus", "run", **settings)


@pytest.mark.parametrize("clip", [1.0, None])
def test_a_non_finite_gradient_stops_the_run_and_keeps_the_checkpoint(
    train: Callable[..., Path], tmp_path: Path, clip: float | None
) -> None:
    with pytest.raises(RunError, match=r"gradient norm of step 2 is \w+; the last checkpoint is kept: try a lower"):
        train(learning_rate=1e30, clip=clip, steps=9)
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [file.name for file in kept] == ["step_00000001.pt"]
    assert all(torch.isfinite(value).all() for value in torch.load(kept[0])["codec"].values())
    assert not (tmp_path / "run" / "done.json").exists()


def test_dev_recordings_are_evenly_chosen_read_once_and_skipped_if_unusable(
    train: Callable[..., Path], tokenizer_recipe: ModuleType, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    original = tokenizer_recipe.load_usable

    def load_usable(utterances: list[Utterance], *settings: object) -> list[tuple[Utterance, Tensor]]:
        asked.append([utterance.id for utterance in utterances])
        found = list(original(utterances, *settings))
        for utterance in utterances:
            Path(utterance.path).unlink()
        return found

    monkeypatch.setattr(tokenizer_recipe, "load_usable", load_usable)
    dev = read_corpus(corpus, ["dev"])
    run = train(dev_splits=["dev"])
    assert asked == [[utterance.id for utterance in spread(dev, 16)]]
    assert [line["step"] for line in read_log(run) if "dev_mel" in line] == [1, 2]
    assert (run / "samples" / "u01_original.wav").is_file()
    assert json.loads((run / "done.json").read_text())["skipped"] == 2
    skipped = {json.loads(line)["path"] for line in (run / "skipped.jsonl").read_text().splitlines()}
    assert skipped == {str(corpus / "u00.flac"), str(corpus / f"u{DEV}.flac")}


# ---- the teachers


KINDS = {
    "ctc": {"kind": "semantic", "objective": "ctc", "hidden_size": 16, "layers": 1},
    "alignment": {"kind": "semantic", "objective": "alignment", "hidden_size": 16, "layers": 1},
    "speaker": {"kind": "speaker", "channels": 8, "crop_s": 0.4},
}
SCORES = {"ctc": "dev_cer", "alignment": "dev_frame_accuracy", "speaker": "dev_equal_error_rate"}


@pytest.mark.parametrize("name", KINDS)
def test_a_teacher_skips_unusable_recordings_and_lists_them(
    recipe: Callable[[str], ModuleType], corpus: Path, tmp_path: Path, name: str
) -> None:
    module, run = recipe("train_teacher.py"), tmp_path / "run"
    words = {"splits": ["train"], "dev_splits": ["dev"], "steps": 4, "batch_size": 4, "warmup": 1}
    config = module.TeacherConfig(data=str(corpus), output=str(run), **words, **KINDS[name])
    module.main(config)
    summary = json.loads((run / "done.json").read_text())
    assert summary["skipped"] == 2 and SCORES[name] in summary
    skipped = {json.loads(line)["path"] for line in (run / "skipped.jsonl").read_text().splitlines()}
    assert skipped == {str(corpus / "u00.flac"), str(corpus / f"u{DEV}.flac")}

    dev = read_corpus(corpus, ["dev"])
    torch.manual_seed(0)
    student = (module.SpeakerStudent if name == "speaker" else module.SemanticStudent)(config, dev).eval()
    assert student.score(dev) == student.score(dev[1:]) != {}
    assert student.score(dev[:1]) == {}


@pytest.mark.parametrize("name", KINDS)
def test_a_teachers_mistyped_dev_split_is_reported_before_training(
    recipe: Callable[[str], ModuleType], corpus: Path, tmp_path: Path, name: str
) -> None:
    module = recipe("train_teacher.py")
    words = {"splits": ["train"], "dev_splits": ["devv"], "steps": 1, "batch_size": 2}
    with pytest.raises(CorpusError, match="no split devv; it has dev, train"):
        module.main(module.TeacherConfig(data=str(corpus), output=str(tmp_path / "run"), **words, **KINDS[name]))
    assert not (tmp_path / "run").exists()
