"""Recognisers trained with CTC by train_teacher: their texts equal an independent greedy decoding."""

import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCTC,
    AutoProcessor,
    GenerationConfig,
    HubertForCTC,
    WhisperConfig,
    WhisperFeatureExtractor,
    pipeline,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from speechllm import InputError, load_tokenizer
from tokenizer.schemes.recognizer import Recognizer, own_generation_config
from tokenizer.training.small_teachers import FrameClassifier, save_recognizer, small_hubert
from tokenizer.training.teachers import SemanticTeacher, WhisperTeacher

Noise = Callable[..., Tensor]
CHARACTERS = ["'", "A", "B", "L", "O", "|"]


@pytest.fixture(scope="module")
def classifier() -> FrameClassifier:
    torch.manual_seed(0)
    classifier = FrameClassifier(small_hubert(hidden_size=16, layers=1), len(CHARACTERS) + 1).eval()
    nn.init.normal_(classifier.head.weight)
    return classifier


@pytest.fixture(scope="module")
def folder(classifier: FrameClassifier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recognizer")
    save_recognizer(classifier, CHARACTERS, folder)
    return folder


def collapse(labels: list[int]) -> str:
    """Greedy CTC by its definition (Graves et al., 2006): merge repeats, then drop blanks; "|" ends a word."""
    text = "".join(CHARACTERS[label - 1] for label, _ in groupby(labels) if label)
    return " ".join(text.replace("|", " ").split())


def greedy_text(folder: Path, waveform: Tensor) -> str:
    """Greedy decoding of a waveform float [N] with transformers' model alone, normalised by hand."""
    x = (waveform - waveform.mean()) / (waveform.var(correction=0) + 1e-7).sqrt()
    with torch.no_grad():
        return collapse(HubertForCTC.from_pretrained(folder).eval()(x[None]).logits[0].argmax(-1).tolist())


def test_the_text_is_the_collapse_of_the_best_labels(folder: Path, noise: Noise) -> None:
    waveform = noise(48_000, batch=2)
    texts = Recognizer.from_pretrained(folder).encode(waveform).texts
    assert [" ".join(text.split()) for text in texts] == [greedy_text(folder, row).lower() for row in waveform]
    assert all(len(text) > 10 and " " in text for text in texts)


def test_a_double_letter_is_distinguished_from_a_long_one(folder: Path) -> None:
    made = Recognizer.from_pretrained(folder)
    labels = [2, 4, 4, 0, 4, 6, 6, 3, 0, 0, 5, 5, 1]
    assert made.processor.batch_decode(torch.tensor([labels]))[0] == collapse(labels) == "ALL BO'"


def test_the_pipeline_of_transformers_returns_the_same_text(folder: Path, noise: Noise) -> None:
    waveform = noise(32_000)
    ours = Recognizer.from_pretrained(folder).encode(waveform).texts[0]
    assert (
        pipeline("automatic-speech-recognition", model=str(folder))(waveform[0].numpy())["text"].strip().lower() == ours
    )


def test_the_scores_are_those_of_the_training(folder: Path, classifier: FrameClassifier, noise: Noise) -> None:
    """Transformers does not pad, so its frames equal those of training except at the edges."""
    waveform = noise(32_000)
    with torch.no_grad():
        trained = classifier(waveform, torch.tensor([32_000]))[0]
        x = (waveform - waveform.mean()) / (waveform.var(correction=0) + 1e-7).sqrt()
        saved = HubertForCTC.from_pretrained(folder).eval()(nn.functional.pad(x, (360, 360))).logits[0]
    torch.testing.assert_close(saved, trained, atol=1e-4, rtol=1e-4)


def test_the_folder_is_still_a_semantic_teacher(folder: Path, classifier: FrameClassifier, noise: Noise) -> None:
    waveform = noise(6_400)
    expected = SemanticTeacher(classifier.hubert)(waveform)
    torch.testing.assert_close(SemanticTeacher.from_pretrained(folder)(waveform), expected)


def test_no_recording_is_too_short(folder: Path) -> None:
    assert isinstance(Recognizer.from_pretrained(folder).encode(torch.zeros(1, 1)).texts[0], str)


# ---- the recipe


TONES = {"A": 400, "B": 900}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tones that spell "A", "B", "A B" and so on."""
    folder, draw, rows = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0), []
    for index in range(24):
        text = " ".join(draw.choice(list(TONES), draw.integers(1, 4)))
        parts = [np.zeros(1_600)]
        for word in text.split():
            parts += [np.sin(2 * np.pi * TONES[word] * np.arange(3_200) / 16_000), np.zeros(1_600)]
        sound = 0.3 * np.concatenate(parts) + 0.01 * draw.standard_normal(sum(map(len, parts)))
        soundfile.write(folder / f"{index}.wav", sound, 16_000)
        row = {"path": f"{index}.wav", "duration_s": len(sound) / 16_000, "text": text}
        rows.append({**row, "split": "dev" if index < 4 else "train"})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture
def train(recipe: Callable, corpus: Path, tmp_path: Path) -> Callable[..., Path]:
    module = recipe("train_teacher.py")

    def train(output: str, **settings: object) -> Path:
        words = {"kind": "semantic", "data": str(corpus), "splits": ["train"], "dev_splits": ["dev"]}
        words |= {"steps": 3, "batch_size": 4, "warmup": 1, "hidden_size": 16, "layers": 1}
        module.main(module.TeacherConfig(**(words | settings), output=str(tmp_path / output)))
        return tmp_path / output

    return train


def test_the_recipe_saves_the_whole_recogniser(train: Callable[..., Path], corpus: Path) -> None:
    run = train("run")
    made = load_tokenizer(f"recognizer:{run / 'model'}")
    vocabulary = json.loads((run / "model" / "vocab.json").read_text(encoding="utf-8"))
    assert vocabulary == {"<pad>": 0, "A": 1, "B": 2, "|": 3}
    assert isinstance(made, Recognizer) and made.model.config.vocab_size == 4
    report = AutoModelForCTC.from_pretrained(run / "model", output_loading_info=True)[1]
    assert not any(report.values())  # no weight is missing, none is there for nothing
    assert AutoProcessor.from_pretrained(run / "model").feature_extractor.do_normalize is True
    assert SemanticTeacher.from_pretrained(run / "model").width == 16
    assert json.loads((run / "done.json").read_text(encoding="utf-8"))["dev_cer"] >= 0


def test_training_continues_from_another_teacher(train: Callable[..., Path], noise: Noise) -> None:
    """After one step with no learning rate to speak of, the features are those of the teacher it began with."""
    first = train("first", layers=2)
    second = train("second", init=str(first / "model"), steps=1, learning_rate=1e-12, hidden_size=64)
    waveform = noise(6_400)
    before, after = (SemanticTeacher.from_pretrained(run / "model")(waveform) for run in (first, second))
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    third = SemanticTeacher.from_pretrained(train("third", init=str(first / "model")) / "model")
    assert not torch.allclose(third(waveform), before, atol=1e-3)


def test_a_whisper_is_no_teacher_to_train(train: Callable[..., Path], tmp_path: Path) -> None:
    shape = {"d_model": 8, "encoder_layers": 1, "encoder_ffn_dim": 8, "encoder_attention_heads": 2}
    encoder = WhisperEncoder(WhisperConfig(**shape, max_source_positions=50))
    WhisperTeacher(encoder, WhisperFeatureExtractor()).save_pretrained(tmp_path / "whisper")
    with pytest.raises(InputError, match="whisper is a Whisper model: init must be HuBERT, WavLM or wav2vec 2.0"):
        train("run", init=str(tmp_path / "whisper"))


def test_what_the_first_teacher_does_not_normalise_the_second_does_not_either(train: Callable[..., Path]) -> None:
    first = train("first")
    settings = first / "model" / "preprocessor_config.json"
    settings.write_text(settings.read_text(encoding="utf-8").replace("true", "false"), encoding="utf-8")
    second = train("second", init=str(first / "model"))
    assert SemanticTeacher.from_pretrained(second / "model").normalize is False


def test_a_new_head_learns_faster_than_the_body_it_stands_on(train: Callable[..., Path], recipe: Callable) -> None:
    module, first = recipe("train_teacher.py"), train("first")
    config = module.TeacherConfig("semantic", "corpus", "run", init=str(first / "model"), learning_rate=1e-4)
    utterance = module.Utterance("u", "u.wav", 1.0, "train", "A B")
    student = module.SemanticStudent(config, [utterance])
    body, head = student.groups()
    assert head["lr"] > 5 * 1e-4 and "lr" not in body
    both = [*list(body["params"]), *list(head["params"])]
    assert {id(parameter) for parameter in both} == {id(parameter) for parameter in student.parameters()}
    frozen = [name for name, parameter in student.named_parameters() if not parameter.requires_grad]
    assert frozen == ["classifier.hubert.masked_spec_embed"]  # nothing is masked


def test_a_speaker_teacher_starts_anew(recipe: Callable) -> None:
    with pytest.raises(ValueError, match="init is for kind: semantic"):
        recipe("train_teacher.py").TeacherConfig("speaker", "corpus", "run", init="teacher")


def test_of_the_generation_settings_only_the_own_ids_and_prompts_are_kept() -> None:
    """Whisper needs its own forced and suppressed tokens; penalties and sampling of a folder would change the text."""
    own = {"suppress_tokens": [1, 2], "begin_suppress_tokens": [3], "forced_decoder_ids": [[1, 4]], "max_length": 448}
    own |= {"lang_to_id": {"<|en|>": 5}, "task_to_id": {"transcribe": 6}, "is_multilingual": True, "eos_token_id": 7}
    foreign = {"repetition_penalty": 9.0, "bad_words_ids": [[8]], "do_sample": True, "temperature": 3.0, "num_beams": 4}
    kept = own_generation_config(GenerationConfig(**own, **foreign))
    assert {name: getattr(kept, name) for name in own} == own
    assert not set(foreign) & set(kept.to_diff_dict())
