"""The compressor: runs of letters by an independent computation, save/load, and what a language model begins with."""

import json
from collections.abc import Callable
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from speechllm import Encoding, InputError, SpeechCodec, extend_vocabulary, load_tokenizer, transcription_example
from speechllm.vocabulary import text_token_ids
from tokenizer.interface import Features, FeatureTokenizer
from tokenizer.schemes.compressor import CtcCompressor, CtcNetwork, LettersTeacher, compress
from tokenizer.schemes.features import FeatureEncoder, load_semantic_teacher
from tokenizer.schemes.units import UnitTokenizer
from tokenizer.training.small_teachers import save_hubert, small_hubert
from tokenizer.training.teachers import SemanticTeacher

LABELS = ["", " ", "A", "B"]
Noise = Callable[..., Tensor]


@pytest.fixture(scope="module")
def compressor(small_codec: SpeechCodec) -> CtcCompressor:
    torch.manual_seed(0)
    made = CtcCompressor(small_codec, LABELS, width=64, depth=1, dropout=0.5).eval()
    nn.init.normal_(made.network.output.weight, std=4.0)  # so that labels change
    return made


def test_a_vector_is_the_mean_of_a_run_of_a_letter() -> None:
    labels = [0, 2, 2, 0, 2, 1, 1, 1, 3, 0]
    probabilities = torch.full((len(labels), 4), 0.1)
    probabilities[range(len(labels)), labels] = 0.7
    states = torch.randn(len(labels), 5)
    runs = [[place for place, _ in group] for _, group in groupby(enumerate(labels), key=lambda item: item[1])]
    rows = torch.cat([states, probabilities], 1)
    expected = torch.stack([rows[run].mean(0) for run in runs if labels[run[0]] != 0])
    torch.testing.assert_close(compress(states, probabilities.log()), expected)
    assert len(expected) == 4


def test_speech_without_letters_is_one_vector() -> None:
    states, scores = torch.randn(6, 5), torch.tensor([[0.0, -9, -9, -9]] * 6)
    torch.testing.assert_close(compress(states, scores), torch.cat([states, scores.exp()], 1).mean(0, keepdim=True))


def test_it_is_a_tokenizer_of_features_that_have_no_time(compressor: CtcCompressor, noise: Noise) -> None:
    assert isinstance(compressor, FeatureTokenizer)
    encoding = Encoding.of(compressor)
    assert (encoding.kind, encoding.width, encoding.deduplicated) == ("features", 68, True)
    assert encoding.labels == tuple(LABELS) and Encoding(**json.loads(json.dumps(asdict(encoding)))) == encoding
    vectors = encoding.encode(compressor, noise(16_000)[0])
    assert vectors.shape[1] == 68 and 1 < len(vectors) <= 50
    torch.testing.assert_close(vectors[:, -4:].sum(1), torch.ones(len(vectors)))
    letters = vectors[:, -4:].argmax(1)
    _, scores = compressor.label_speech(compressor.base.encode(noise(16_000)).utterance(0))
    assert "".join(LABELS[letter] for letter in letters) == "".join(
        LABELS[label] for label, _ in groupby(scores.argmax(1).tolist())
    )
    assert compressor.text(scores) == "".join(LABELS[letter] for letter in letters)


def test_an_utterance_is_the_same_in_every_batch(compressor: CtcCompressor, noise: Noise) -> None:
    long, short = noise(16_000)[0], noise(9_000, seed=1)[0]
    both = compressor.encode(torch.stack([long, torch.cat([short, long[:7_000]])]), torch.tensor([16_000, 9_000]))
    for index, waveform in enumerate((long, short)):
        assert torch.equal(both.utterance(index), compressor.encode(waveform[None]).utterance(0))


def test_what_stands_in_the_padding_is_never_seen(compressor: CtcCompressor) -> None:
    frames, lengths = torch.randn(2, 60, 16), torch.tensor([60, 30])
    network = compressor.network
    with torch.no_grad():
        scores = network(frames, lengths)[1]
        frames[1, 30:] = 7.0
        assert torch.equal(scores, network(frames, lengths)[1])
    assert scores.shape == (2, 60, 4)
    torch.testing.assert_close(scores.exp().sum(2), torch.ones(2, 60))


def test_codes_are_their_vectors_side_by_side(compressor: CtcCompressor, small_codec: SpeechCodec) -> None:
    codes = torch.tensor([[3, 1], [2, 5]])
    first, second = small_codec.codebooks
    expected = torch.stack([torch.cat([first[3], second[2]]), torch.cat([first[1], second[5]])])
    assert torch.equal(compressor.frames(codes), expected) and compressor.layers == 2


def test_of_a_codec_it_reads_as_many_layers_as_it_was_made_for(
    compressor: CtcCompressor, small_codec: SpeechCodec, noise: Noise, tmp_path: Path
) -> None:
    one = CtcCompressor(small_codec, LABELS, width=64, depth=1, layers=1).eval()
    nn.init.normal_(one.network.output.weight, std=4.0)
    codes, waveform = small_codec.encode(noise(16_000)).utterance(0), noise(16_000)
    assert torch.equal(one.frames(codes), small_codec.codebooks[0][codes[0]])
    assert torch.equal(one.recode(codes), one.recode(codes[:1]))
    assert torch.equal(one.encode(waveform).utterance(0), one.recode(codes))
    one.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.layers == 1 and loaded.fingerprint == one.fingerprint != compressor.fingerprint
    assert torch.equal(loaded.encode(waveform).values, one.encode(waveform).values)
    with pytest.raises(InputError, match=r"reads 2 layers of codes, not 1: encode the speech with layers=2"):
        compressor.label_speech(codes[:1])
    with pytest.raises(InputError, match=r"layers must be 1\.\.2, got 3"):
        CtcCompressor(small_codec, LABELS, width=64, depth=1, layers=3)


def test_saved_and_loaded_it_is_the_same(compressor: CtcCompressor, noise: Noise, tmp_path: Path) -> None:
    compressor.save_pretrained(folder := tmp_path / "new" / "codec")
    loaded = load_tokenizer(folder)
    assert isinstance(loaded, CtcCompressor) and not loaded.training
    assert loaded.fingerprint == compressor.fingerprint and loaded.labels == tuple(LABELS)
    assert torch.equal(loaded.encode(noise(16_000)).values, compressor.encode(noise(16_000)).values)
    (folder / "compressor.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match="compressor.safetensors"):
        load_tokenizer(folder)


class Own(nn.Module):
    """A tokenizer of somebody's own, that returns text unless it has a width."""

    sample_rate, frame_rate, fingerprint, device = 16_000, 50.0, "f" * 16, torch.device("cpu")

    def encode(self, waveform: Tensor, lengths: Tensor | None = None) -> Features:
        frames = waveform[:, : waveform.shape[1] // 320 * 320].view(1, -1, 320)[:, :, :16]
        return Features(frames, torch.tensor([frames.shape[1]]))

    def save_pretrained(self, folder: Path) -> None: ...


class OwnFeatures(Own):
    width = 16


def test_frames_of_any_kind_will_do_but_text(noise: Noise) -> None:
    made = CtcCompressor(OwnFeatures(), LABELS, width=64, depth=1).eval()
    assert made.encode(noise(16_000)).values.shape[2] == 68
    with pytest.raises(InputError, match="needs frames or codes, but Own returns text"):
        CtcCompressor(Own(), LABELS, width=64, depth=1)


@pytest.fixture
def letters_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_hubert(small_hubert(hidden_size=16, layers=2), tmp_path / "hubert")
    encoder = FeatureEncoder.from_pretrained(tmp_path / "hubert", 1)
    CtcCompressor(encoder, LABELS, width=64, depth=2, dropout=0.5).save_pretrained(tmp_path / "letters")
    return tmp_path / "letters"


def test_as_a_teacher_it_gives_the_states_of_its_letters(letters_folder: Path, noise: Noise) -> None:
    teacher, compressor = load_semantic_teacher(letters_folder, -1).train(), load_tokenizer(letters_folder)
    assert isinstance(teacher, LettersTeacher) and teacher.width == 64
    layers = {layer: load_semantic_teacher(letters_folder, layer) for layer in (1, 2, -2, "avg", None)}
    assert len({one.fingerprint for one in [*layers.values(), teacher]}) == 5  # 1 is the default
    waveform = noise(9_001)
    states, _ = compressor.label(compressor.base.encode(waveform).utterance(0))
    torch.testing.assert_close(teacher(waveform)[0], states)  # without dropout
    assert teacher(waveform).shape == (1, 29, 64) and not any(x.requires_grad for x in teacher.parameters())
    first, second, other, mean, default = (one(waveform)[0] for one in layers.values())
    torch.testing.assert_close(second, states)
    assert torch.equal(first, other) and torch.equal(first, default) and not torch.allclose(first, second)
    torch.testing.assert_close(mean, (first + second) / 2)
    for wrong in (0, 3, -3):
        with pytest.raises(InputError, match='"avg", or of this compressor a number from 1 to 2'):
            load_semantic_teacher(letters_folder, wrong)
    waveform.requires_grad_()
    teacher.features(waveform).sum().backward()
    assert waveform.grad.abs().sum() > 0


def test_other_teachers_are_loaded_as_they_were(
    letters_folder: Path, compressor: CtcCompressor, tmp_path: Path
) -> None:
    loaded = load_semantic_teacher(letters_folder.parent / "hubert", 1)
    assert isinstance(loaded, SemanticTeacher) and loaded.layer == 1
    compressor.save_pretrained(tmp_path / "codes")
    with pytest.raises(InputError, match="compresses no encoder's frames, which a teacher needs, but codes"):
        load_semantic_teacher(tmp_path / "codes")


def test_its_states_are_features_and_make_units(letters_folder: Path, noise: Noise, tmp_path: Path) -> None:
    features = load_tokenizer(f"features:{letters_folder}#2")
    teacher, both = load_semantic_teacher(letters_folder, 2), torch.cat([noise(9_001), noise(9_001)])
    encoded = features.encode(both, torch.tensor([9_001, 4_000]))
    torch.testing.assert_close(encoded.utterance(0), teacher(both[:1])[0])
    torch.testing.assert_close(encoded.utterance(1), teacher(both[1:, :4_000])[0])
    units = UnitTokenizer(features, encoded.utterance(0)[::3].clone())
    for name, one in {"features": features, "units": units}.items():
        (tmp_path / name).mkdir()
        one.save_pretrained(tmp_path / name)
        loaded = load_tokenizer(tmp_path / name)
        assert loaded.fingerprint == one.fingerprint and str(loaded.device) == "cpu"
        assert torch.equal(*(x.encode(both[:1]).utterance(0) for x in (one, loaded)))


def test_a_language_model_first_reads_the_letters_themselves(
    compressor: CtcCompressor, make_qwen2: Callable, text_tokenizer: object
) -> None:
    model = make_qwen2(text_tokenizer)
    rows = model.get_input_embeddings().weight.detach().clone()
    vocabulary = extend_vocabulary(model, text_tokenizer, compressor)
    features = torch.randn(3, 68)
    features[:, -4:] = torch.tensor([[0.0, 0, 1, 0], [0, 0.5, 0, 0.5], [1, 0, 0, 0]])
    space, a, b = (rows[text_tokenizer(text, add_special_tokens=False)["input_ids"]].mean(0) for text in LABELS[1:])
    with torch.no_grad():
        found = model.speech_projector(features)
    torch.testing.assert_close(found, torch.stack([a, (space + b) / 2, torch.zeros_like(a)]))

    features[1, -3] = 0.6  # the space is the likeliest now
    spelled = text_token_ids(text_tokenizer, ["A"])[0]  # the blank spells nothing, and the space at the end is cut
    placeholders = [vocabulary.offset] * 3
    expected = [vocabulary.start_id, *placeholders, vocabulary.end_id, *spelled]
    assert vocabulary.token_ids(features, text_tokenizer).tolist() == expected
    example = transcription_example(features, "a b", vocabulary, text_tokenizer)
    answer = [*text_token_ids(text_tokenizer, ["a b"])[0], text_tokenizer.eos_token_id]
    assert example.labels[example.labels != -100].tolist() == answer  # what is spelled is no label
    assert example.input_ids[-len(answer) - len(expected) : -len(answer)].tolist() == expected


@torch.no_grad()
@pytest.mark.parametrize("family", ["Gemma", "Gemma2", "Gemma3Text", "Granite"])  # which multiply embeddings
def test_what_is_projected_is_as_large_as_what_the_language_model_looks_up(
    family: str, compressor: CtcCompressor, make_language_model: Callable, make_text_tokenizer: Callable
) -> None:
    text_tokenizer = make_text_tokenizer()
    model = make_language_model(family, text_tokenizer)
    extend_vocabulary(model, text_tokenizer, compressor)
    certain = torch.cat([torch.randn(3, 64), torch.eye(4)[1:]], 1)
    embedding = model.get_input_embeddings()
    ids = [torch.tensor(text_token_ids(text_tokenizer, [label])[0]) for label in LABELS[1:]]
    expected = torch.stack([embedding(one).mean(0) for one in ids])
    torch.testing.assert_close(model.speech_projector(certain), expected)

    text_tokenizer = make_text_tokenizer()
    model = make_language_model(family, text_tokenizer)
    texts = model.get_input_embeddings()(torch.arange(len(text_tokenizer)))
    extend_vocabulary(model, text_tokenizer, compressor, stack=2)
    found = model.speech_projector(torch.randn(200, 136))
    assert 0.3 < float(found.std() / texts.std()) < 2


def test_the_network_counts_its_outputs() -> None:
    network = CtcNetwork(16, 4, 64, 1, 0.0).eval()
    for frames in (1, 2, 7):
        assert network(torch.randn(1, frames, 16), torch.tensor([frames]))[1].shape == (1, frames, 4)
