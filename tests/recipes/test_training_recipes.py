"""train_tokenizer and train_teacher where something is wrong: settings, recordings, gradients (see test_recipes.py)."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor

from speechllm import CorpusError, RunError, SpeechCodecConfig, Utterance, load_audio, read_corpus
from speechllm.runs.run import Run, read_log
from tokenizer.corpus import spread
from tokenizer.files import write_jsonl
from tokenizer.training.small_teachers import save_hubert, small_hubert
from tokenizer.training.step import CodecLoss

pytestmark = [pytest.mark.filterwarnings("ignore:skipped"), pytest.mark.usefixtures("new_accelerator")]
RATE = 16_000
DEV = 20


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
    write_jsonl(folder / "manifest.jsonl", rows)
    return folder


def kill_at(module: ModuleType, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt a recipe where it, or `Run`, uses this name."""

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    if place == "write_json":
        monkeypatch.setattr(Run, "finish", lambda run, _: die())
    else:
        monkeypatch.setattr(module, place, die)


def assert_ended_alike(run: Path, whole: Path) -> None:
    assert read_log(run) == read_log(whole)
    assert (run / "done.json").read_text() == (whole / "done.json").read_text()
    for file in (whole / "model").iterdir():
        assert (run / "model" / file.name).read_bytes() == file.read_bytes(), file.name


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
    with pytest.raises(
        RunError, match=r"in 10 steps in a row, up to step 11; the last checkpoint is kept: .*u\d\d.flac"
    ):
        train(learning_rate=1e30, clip=clip, steps=20, crop_s=0.1, validate_every=99)
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [file.name for file in kept] == ["step_00000001.pt"]
    assert all(torch.isfinite(value).all() for value in torch.load(kept[0])["loss"].values())
    assert not (tmp_path / "run" / "done.json").exists()


def test_a_step_with_a_non_finite_gradient_leaves_codec_and_balancer_as_they_were(
    train: Callable[..., Path], tokenizer_recipe: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, before = CodecLoss.forward, []

    def broken(loss_of: CodecLoss, *arguments: object, **settings: object) -> tuple[Tensor, dict[str, Tensor]]:
        state = {**loss_of.codec.state_dict(), **loss_of.criterion.balancer.norms}
        before.append({name: value.clone() for name, value in state.items()})
        loss, metrics = usual(loss_of, *arguments, **settings)
        return loss * (torch.nan if len(before) == 2 else 1), metrics

    monkeypatch.setattr(CodecLoss, "forward", broken)
    run = train(steps=4, log_every=1, dev_splits=["dev"], dev_utterances=2, validate_every=2)
    changed = [
        {name for name, value in after.items() if not torch.equal(value, then[name])}
        for then, after in zip(before[1:], before[2:], strict=False)
    ]
    assert changed[0] == set() and {"quantizer.codebooks", "quantizer.usage", "mel"} < changed[1]
    assert json.loads((run / "done.json").read_text())["non_finite"] == 1
    assert [line["step"] for line in read_log(run) if "mel" in line] == [1, 3, 4]
    assert [line["step"] for line in read_log(run) if "dev_mel" in line] == [2, 4]


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("place", ["atomic_folder", "write_json"])
def test_a_tokenizer_killed_while_it_ends_ends_the_same(
    train: Callable[..., Path],
    tokenizer_recipe: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    whole = train()
    whole.rename(tmp_path / "whole")
    kill_at(tokenizer_recipe, place, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train()
    monkeypatch.undo()
    assert_ended_alike(train(), tmp_path / "whole")


@pytest.mark.usefixtures("without_pictures")
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


@pytest.mark.parametrize("processes", [1, 3, 6, 9])
@pytest.mark.parametrize("name", KINDS)
def test_every_process_has_a_recording_in_every_batch(
    recipe: Callable[[str], ModuleType], corpus: Path, name: str, processes: int
) -> None:
    """One of six is unusable, and nine processes are more than a batch has."""
    module = recipe("train_teacher.py")
    config = module.TeacherConfig(data=str(corpus), output="", splits=["train"], steps=3, batch_size=6, **KINDS[name])
    student = (module.SpeakerStudent if name == "speaker" else module.SemanticStudent)(
        config, read_corpus(corpus, ["train"])
    )
    read = [list(itertools.islice(student.batches(0, process, processes), 3)) for process in range(processes)]
    for batches in zip(*read, strict=True):
        chosen = [utterance.id for utterances, _ in batches for utterance in utterances]
        assert all(len(batch[0]) == len(utterances) >= 1 for utterances, batch in batches)
        assert len(chosen) >= 5 and (name == "speaker" or f"u{DEV:02}" not in chosen)
        if name == "speaker":  # whose batch normalisation tells them apart
            assert all(len(batch[0].flatten(1).unique(dim=0)) == len(batch[0]) >= 2 for _, batch in batches)
            assert student.train()(*batches[-1][1]).isfinite()


def test_a_disk_that_fails_does_not_end_the_training_of_a_teacher(
    recipe: Callable[[str], ModuleType], corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = recipe("train_teacher.py")
    settings = {"splits": ["train"], "steps": 3, "batch_size": 6, **KINDS["ctc"]}
    student = module.SemanticStudent(
        module.TeacherConfig(data=str(corpus), output="", **settings), read_corpus(corpus, ["train"])
    )
    load = module.try_load

    def fail(utterance: Utterance) -> object:
        if utterance.id == f"u{DEV + 1}":
            raise OSError(5, "Input/output error")
        return load(utterance)

    monkeypatch.setattr(module, "try_load", fail)
    with pytest.warns(UserWarning, match="Input/output error"):
        heard = [u.id for utterances, _ in itertools.islice(student.batches(0, 0, 1), 3) for u in utterances]
    assert len(heard) >= 9 and f"u{DEV + 1}" not in heard


def test_a_speaker_teacher_does_not_hear_padding(recipe: Callable[[str], ModuleType], corpus: Path) -> None:
    module = recipe("train_teacher.py")
    config = module.TeacherConfig(data=str(corpus), output="", splits=["train"], **KINDS["speaker"])
    student = module.SpeakerStudent(config, read_corpus(corpus, ["train"])).eval()
    waveform = torch.stack([load_audio(corpus / f"u{DEV + i:02}.flac") for i in (1, 2)])
    alone = student._embed(waveform, torch.tensor([RATE // 2] * 2))
    padded = student._embed(F.pad(waveform, (0, RATE)), torch.tensor([RATE // 2] * 2))
    heard = student._embed(F.pad(waveform, (0, RATE)), torch.tensor([3 * RATE // 2] * 2))
    near, far = (F.cosine_similarity(other, alone, dim=-1).min() for other in (padded, heard))
    assert near > 0.98 > far


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("place", ["atomic_folder", "finish_training"])
@pytest.mark.parametrize("name", ["alignment", "speaker"])
def test_a_teacher_killed_while_it_ends_ends_the_same(
    recipe: Callable[[str], ModuleType],
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    place: str,
) -> None:
    module, words = recipe("train_teacher.py"), {"splits": ["train"], "steps": 4, "batch_size": 4, "save_every": 2}

    def train(run: str) -> Path:
        module.main(module.TeacherConfig(data=str(corpus), output=str(tmp_path / run), **words, **KINDS[name]))
        return tmp_path / run

    whole = train("whole")
    kill_at(module, place, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train("run")
    monkeypatch.undo()
    assert_ended_alike(train("run"), whole)


def test_a_published_teacher_trains_with_its_dropout_and_whole_speech(
    recipe: Callable[[str], ModuleType], corpus: Path, tmp_path: Path
) -> None:
    hubert = small_hubert(16, 1)
    hubert.config.hidden_dropout, hubert.config.layerdrop, hubert.config.apply_spec_augment = 0.5, 0.5, True
    save_hubert(hubert, tmp_path / "hubert")
    module = recipe("train_teacher.py")
    config = module.TeacherConfig(data=str(corpus), output="run", init=str(tmp_path / "hubert"), **KINDS["ctc"])
    found = module.SemanticStudent(config, read_corpus(corpus)).classifier.hubert
    assert [module.p for module in found.modules() if isinstance(module, torch.nn.Dropout)].count(0.5) > 1
    assert all(module.training for module in found.modules())
    assert (found.config.layerdrop, found.config.apply_spec_augment) == (0, False)


@pytest.mark.parametrize("name", KINDS)
def test_a_teacher_skips_a_step_with_a_non_finite_gradient(
    recipe: Callable[[str], ModuleType],
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    module, words = recipe("train_teacher.py"), {"splits": ["train"], "steps": 3, "batch_size": 4}
    student = module.SpeakerStudent if name == "speaker" else module.SemanticStudent
    forward, calls = student.forward, []

    def broken(self: torch.nn.Module, waveform: Tensor, *rest: Tensor) -> Tensor:
        calls.append({key: value.clone() for key, value in self.state_dict().items()})
        return forward(self, waveform * (torch.inf if len(calls) == 2 else 1), *rest)

    monkeypatch.setattr(student, "forward", broken)
    module.main(module.TeacherConfig(data=str(corpus), output=str(tmp_path / "run"), **words, **KINDS[name]))
    assert json.loads((tmp_path / "run" / "done.json").read_text())["non_finite"] == 1
    assert all(torch.equal(value, calls[1][key]) for key, value in calls[2].items())  # batch statistics, too
    assert not all(torch.equal(value, calls[0][key]) for key, value in calls[1].items())


@pytest.mark.parametrize("name", KINDS)
def test_a_teachers_mistyped_dev_split_is_reported_before_training(
    recipe: Callable[[str], ModuleType], corpus: Path, tmp_path: Path, name: str
) -> None:
    module = recipe("train_teacher.py")
    words = {"splits": ["train"], "dev_splits": ["devv"], "steps": 1, "batch_size": 2}
    with pytest.raises(CorpusError, match="no split devv; it has dev, train"):
        module.main(module.TeacherConfig(data=str(corpus), output=str(tmp_path / "run"), **words, **KINDS[name]))
    assert not (tmp_path / "run").exists()
