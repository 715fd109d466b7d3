"""All kinds of audio tokenizers by name: one interface, the same result in any batch and after saving and loading."""

import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    DacConfig,
    DacModel,
    GenerationConfig,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from speechllm import (
    AudioTokenizer,
    Codec,
    Codes,
    DiscreteTokenizer,
    Features,
    FeatureTokenizer,
    TokenizerError,
    Transcripts,
    load_tokenizer,
)
from tokenizer.schemes.features import FeatureEncoder
from tokenizer.schemes.recognizer import Recognizer
from tokenizer.schemes.units import UnitTokenizer
from tokenizer.training.small_teachers import FrameClassifier, save_hubert, save_recognizer, small_hubert
from tokenizer.training.teachers import SemanticTeacher

pytestmark = pytest.mark.numeric

Noise = Callable[..., Tensor]
Answer = Codes | Features | Transcripts
LENGTHS = torch.tensor([21_000, 400, 8_123])
SCHEMES = {
    "codec": Codec,
    "dac": Codec,
    "units": DiscreteTokenizer,
    "whisper_units": DiscreteTokenizer,
    "features:hubert": FeatureTokenizer,
    "features:hubert#1": FeatureTokenizer,
    "features:wav2vec2#avg": FeatureTokenizer,
    "features:whisper": FeatureTokenizer,
    "features:whisper#0": FeatureTokenizer,
    "features:ctc#-1": FeatureTokenizer,
    "recognizer:ctc": AudioTokenizer,
    "recognizer:whisper": AudioTokenizer,
}


def save_wav2vec2(folder: Path) -> None:
    """The published kernels, and normalisation over time in the first layer: every frame depends on every sample."""
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    small = {"conv_dim": (8,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    Wav2Vec2Model(Wav2Vec2Config(**shape, **small, feat_extract_norm="group")).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder)


def save_whisper(folder: Path) -> None:
    """A whole Whisper with windows of one second instead of 30, and a vocabulary of bytes."""
    times = [f"<|{0.02 * i:.2f}|>" for i in range(51)]
    words = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>", *times]
    text_tokenizer = WhisperTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    end, start, no_times = (text_tokenizer.convert_tokens_to_ids(word) for word in words[256:259])
    tokens = {"pad_token_id": end, "bos_token_id": end, "eos_token_id": end, "decoder_start_token_id": start}
    shape = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "init_std": 0.5}
    sizes = {"max_source_positions": 50, "max_target_positions": 24, "vocab_size": len(words)}
    model = WhisperForConditionalGeneration(WhisperConfig(**shape, **heads, **sizes, **tokens))
    model.generation_config = GenerationConfig(**tokens, no_timestamps_token_id=no_times, is_multilingual=False)
    model.save_pretrained(folder)
    WhisperFeatureExtractor(chunk_length=1).save_pretrained(folder)
    text_tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def home(codec_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one model of every kind, named as in SCHEMES."""
    home = tmp_path_factory.mktemp("home")
    (home / "codec").symlink_to(codec_folder)
    torch.manual_seed(0)
    ratios = {"downsampling_ratios": [2, 4, 5, 8], "upsampling_ratios": [8, 5, 4, 2], "codebook_size": 16}
    shape = {"encoder_hidden_size": 4, "decoder_hidden_size": 32, "n_codebooks": 3, "codebook_dim": 4}
    DacModel(DacConfig(**ratios, **shape)).save_pretrained(home / "dac")
    save_hubert(small_hubert(hidden_size=16, layers=2), home / "hubert")
    save_wav2vec2(home / "wav2vec2")
    save_whisper(home / "whisper")
    (home / "ctc").mkdir()
    classifier = FrameClassifier(small_hubert(hidden_size=16, layers=1), labels=5)
    nn.init.normal_(classifier.head.weight)  # confident scores: several letters
    save_recognizer(classifier, ["A", "B", "C", "|"], home / "ctc")
    for name, source, layer in (("units", "hubert", 1), ("whisper_units", "whisper", "avg")):
        encoder = FeatureEncoder.from_pretrained(home / source, layer)
        frames = encoder.encode(torch.randn(1, 30_000)).utterance(0)
        UnitTokenizer(encoder, frames[::8].clone(), deduplicate=name == "units").save_pretrained(home / name)
    return home


@functools.cache
def load(home: Path, name: str) -> AudioTokenizer:
    """The same one every time, at which tests only look."""
    prefix, colon, folder = name.rpartition(":")
    return load_tokenizer(f"{prefix}{colon}{home / folder}")


@pytest.fixture(scope="module", params=SCHEMES)
def scheme(request: pytest.FixtureRequest, home: Path) -> tuple[str, AudioTokenizer]:
    return request.param, load(home, request.param)


def assert_equal(found: object, expected: object) -> None:
    assert found == expected if isinstance(expected, str) else torch.equal(found, expected)


def assert_close(found: Tensor, expected: Tensor) -> None:
    if found.is_floating_point():
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    else:
        assert found.shape == expected.shape and (found == expected).float().mean() > 0.9  # but those between two codes


def test_every_scheme_satisfies_its_protocol(scheme: tuple[str, AudioTokenizer], noise: Noise) -> None:
    name, made = scheme
    protocol = SCHEMES[name]
    assert isinstance(made, protocol) and isinstance(made, AudioTokenizer)
    others = {Codec, DiscreteTokenizer, FeatureTokenizer} - set(protocol.__mro__)
    assert not any(isinstance(made, other) for other in others)
    assert made.sample_rate == 16_000 and made.device == torch.device("cpu")
    assert re.fullmatch("[0-9a-f]{16}", made.fingerprint)
    encoded = made.encode(noise(8_000, batch=2))
    if isinstance(made, DiscreteTokenizer):
        assert isinstance(encoded, Codes)
        assert encoded.ids.dtype == torch.long and 0 <= encoded.ids.min() <= encoded.ids.max() < made.codebook_size
        assert made.codebooks.shape[:2] == (made.num_codebooks, made.codebook_size)
        assert encoded.ids.shape[1] == made.num_codebooks and made.encode(noise(800), layers=1).ids.shape[1] == 1
        assert len(encoded.ids.unique()) > 3
    elif isinstance(made, FeatureTokenizer):
        assert isinstance(encoded, Features)
        assert encoded.values.dtype == torch.float32 and encoded.values.shape == (2, 25, made.width)
    else:
        assert isinstance(encoded, Transcripts) and made.frame_rate == 0
        assert len(encoded.texts) == 2 and all(encoded.texts)


def test_the_batch_does_not_change_the_result_for_an_utterance(
    scheme: tuple[str, AudioTokenizer], noise: Noise
) -> None:
    """To the last bit where each is encoded by itself, elsewhere up to rounding, whatever follows the utterance."""
    name, made = scheme
    assert_same = assert_close if getattr(made, "batched", False) else assert_equal
    waveform = noise(21_000, batch=3)
    together = made.encode(waveform, LENGTHS)
    backwards = made.encode(waveform.flip(0), LENGTHS.flip(0))
    for index, length in enumerate(LENGTHS.tolist()):
        alone = made.encode(waveform[index : index + 1, :length]).utterance(0)
        assert_same(together.utterance(index), alone)
        assert_same(backwards.utterance(2 - index), alone)
        if name != "units" and not isinstance(alone, str):  # merged repeats have no rate
            frames = alone.shape[0 if isinstance(together, Features) else 1]
            assert frames == math.ceil(length / made.sample_rate * made.frame_rate)


def test_beyond_an_utterance_there_is_nothing(scheme: tuple[str, AudioTokenizer], noise: Noise) -> None:
    encoded = scheme[1].encode(noise(21_000, batch=3), LENGTHS)
    if isinstance(encoded, Codes):
        assert not any(row[:, size:].any() for row, size in zip(encoded.ids, encoded.lengths, strict=True))
    if isinstance(encoded, Features):
        assert not any(row[size:].any() for row, size in zip(encoded.values, encoded.lengths, strict=True))


def test_a_saved_tokenizer_is_the_same(scheme: tuple[str, AudioTokenizer], noise: Noise, tmp_path: Path) -> None:
    _, made = scheme
    made.save_pretrained(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert type(loaded) is type(made) and loaded.fingerprint == made.fingerprint
    waveform = noise(8_123)
    assert_equal(loaded.encode(waveform).utterance(0), made.encode(waveform).utterance(0))


def test_no_two_tokenizers_have_one_fingerprint(home: Path) -> None:
    assert len({load(home, name).fingerprint for name in SCHEMES}) == len(SCHEMES)
    units = load(home, "units")
    others = [
        UnitTokenizer(units.encoder, units.centroids, deduplicate=False),
        UnitTokenizer(units.encoder, units.centroids + 1e-3, deduplicate=True),
        UnitTokenizer(FeatureEncoder.from_pretrained(home / "hubert", 2), units.centroids, deduplicate=True),
    ]
    assert len({units.fingerprint, *(other.fingerprint for other in others)}) == 4


@pytest.mark.parametrize(
    "waveform, lengths, message",
    [
        (torch.zeros(800), None, "expected waveforms float"),
        (torch.zeros(1, 0), None, "expected waveforms float"),
        (torch.full((1, 800), math.nan), None, "NaN or infinite"),
        (torch.zeros(2, 800), torch.tensor([800]), r"lengths must be 1\.\.800 for 2 waveforms"),
        (torch.zeros(1, 800), torch.tensor([801]), r"lengths must be 1\.\.800"),
        (torch.zeros(1, 800), torch.tensor([0]), r"lengths must be 1\.\.800"),
    ],
)
def test_invalid_waveforms_and_lengths_are_refused(
    scheme: tuple[str, AudioTokenizer], waveform: Tensor, lengths: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        scheme[1].encode(waveform, lengths)


# ---- features


def test_the_layer_is_the_one_after_the_number_sign(home: Path, noise: Noise) -> None:
    waveform = noise(6_400)
    layers = {"features:hubert": "avg", "features:hubert#1": 1, "features:ctc#-1": -1}
    layers |= {"features:whisper": -1, "features:whisper#0": 0, "features:whisper#avg": "avg"}
    for name, layer in layers.items():
        teacher = SemanticTeacher.from_pretrained(home / name.split(":")[1].split("#")[0], layer)
        assert torch.equal(load(home, name).encode(waveform).values, teacher(waveform))


def test_only_the_encoder_of_whisper_is_kept(home: Path, tmp_path: Path) -> None:
    load(home, "features:whisper").save_pretrained(tmp_path)
    whole, encoder = (folder / "model.safetensors" for folder in (home / "whisper", tmp_path))
    assert encoder.stat().st_size < 0.7 * whole.stat().st_size


@torch.no_grad()
def test_a_recogniser_that_is_told_another_language_is_another(home: Path) -> None:
    model, processor = (found := Recognizer.from_pretrained(home / "whisper")).model, found.processor
    prints = [found.fingerprint]
    for language, task in (("de", "transcribe"), ("en", "translate")):
        model.generation_config.language, model.generation_config.task = language, task
        prints.append(Recognizer(model, processor).fingerprint)
    assert len(set(prints)) == 3


def test_a_recogniser_of_long_speech_returns_whispers_text_with_timestamps(home: Path, noise: Noise) -> None:
    whisper = WhisperForConditionalGeneration.from_pretrained(home / "whisper").eval()
    extractor = WhisperFeatureExtractor.from_pretrained(home / "whisper")
    text_tokenizer = WhisperTokenizer.from_pretrained(home / "whisper")
    made = load(home, "recognizer:whisper")
    for samples, options in ((16_000, {}), (40_000, {"truncation": False, "padding": "longest"})):
        waveform = noise(samples)
        mel = extractor(waveform[0].numpy(), sampling_rate=16_000, return_tensors="pt", **options).input_features
        assert mel.shape[2] == samples / 160
        mask = torch.ones(mel.shape[::2], dtype=torch.long)
        ids = whisper.generate(mel, attention_mask=mask, do_sample=False, return_timestamps=bool(options))
        text = text_tokenizer.decode(ids[0], skip_special_tokens=True).strip()
        assert made.encode(waveform).texts == [text]


def test_an_answer_that_does_not_end_is_decoded_again_without_repetitions(
    home: Path, noise: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = load(home, "recognizer:whisper")
    made.model.generation_config.max_length = 448  # as Whisper has it, of which four tokens are its prompt
    letter = made.processor.tokenizer.convert_tokens_to_ids("a")
    for length, letters in ((443, 443), (444, 5)):
        first = torch.full((1, length), letter)

        def generate(no_repeat_ngram_size: int | None = None, first: Tensor = first, **inputs: object) -> Tensor:
            return first[:, :no_repeat_ngram_size]

        monkeypatch.setattr(made.model, "generate", generate)
        assert made.encode(noise(16_000)).texts == [letters * "a"]


# ---- names


def save_bert(folder: Path) -> None:
    tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    BertModel(tiny).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")


def save_odd(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"colour": "red"}))


WRONG = [
    ("units:hubert", "unknown kind 'units'; an audio tokenizer is FOLDER_OR_HUB_NAME"),
    ("features:hubert#last", "expected a number or avg after #, got 'last'"),
    ("features:hubert#3", 'layer must be "avg" or an index up to 2'),
    ("features:whisper#2", 'layer must be "avg" or an index up to 1'),
    ("features:bert", "is a bert model: expected HuBERT, WavLM or wav2vec 2.0"),
    ("recognizer:bert", "a model of type bert is no speech recogniser"),
    ("recognizer:hubert", "not trained to recognise speech: .* lacks 2 weights of a HubertForCTC, lm_head.bias first"),
    ("hubert", "it is a hubert model: write features:.*hubert for its features, recognizer:.*hubert for text"),
    ("wav2vec2", "it is a wav2vec2 model: write features:"),
    ("whisper", "it is a whisper model: write features:"),
    ("bert", "found a bert model; an audio tokenizer is"),
    ("odd", "found no audio tokenizer in colour; an audio tokenizer is"),
]


@pytest.mark.parametrize("name, message", WRONG)
def test_a_name_that_is_no_tokenizer_is_refused_and_identified(home: Path, name: str, message: str) -> None:
    if not (home / "bert").exists():
        save_bert(home / "bert")
        save_odd(home / "odd")
    with pytest.raises(TokenizerError, match=message):
        load(home, name)


ODD = ["2026-11-28_12:30:00", "C:\\codec", "C:codec", "features:mine", "model #2", "mine.py:Codec", "a\nb"]


@pytest.mark.parametrize("name", ODD)
def test_a_folder_that_exists_is_a_folder_whatever_its_name(
    codec_folder: Path, codec: AudioTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).symlink_to(codec_folder)
    monkeypatch.chdir(tmp_path)
    for spelt in (name, str(tmp_path / name)):
        assert load_tokenizer(spelt).fingerprint == codec.fingerprint


@pytest.mark.parametrize("name", ["h #1", "h#1", "12:30", "features:h", "h.py:h"])
def test_the_layer_is_behind_the_last_number_sign_of_a_name_that_is_no_folder(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).symlink_to(home / "hubert")
    monkeypatch.chdir(tmp_path)
    for suffix, layer in (("#1", 1), ("#avg", "avg"), ("", "avg")):
        assert load_tokenizer(f"features:{name}{suffix}").layer == layer


@pytest.mark.parametrize("name", ["runs/2026-11-28_12:30:00/model", "C:\\codec", "units:hubert"])
def test_a_name_with_a_colon_that_is_no_folder_is_said_to_be_none(name: str) -> None:
    with pytest.raises(TokenizerError, match="no such folder, and an unknown kind"):
        load_tokenizer(name)


@pytest.mark.parametrize("name, kind", [("features:RUN#1", "features:hubert#1"), ("RUN", "units")])
def test_a_run_is_taken_for_the_tokenizer_in_it(home: Path, tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / "model").symlink_to(home / kind.removeprefix("features:").removesuffix("#1"))
    assert load_tokenizer(name.replace("RUN", str(tmp_path))).fingerprint == load(home, kind).fingerprint


@pytest.mark.parametrize("prefix", ["", "features:", "recognizer:"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(prefix: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        load_tokenizer(f"{prefix}{tmp_path / 'nowhere'}")


def test_a_name_that_the_hub_does_not_have_is_reported(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nobody/nothing: no such folder, and no hub model"):
        load_tokenizer("nobody/nothing")


# in a process that has imported them all: those are forgotten, with what imports them
LOADING = """
import sys
large = "transformers", "sklearn", "accelerate", "datasets", "speechbrain"
forgotten = {"tokenizer", "speechllm", "peft", *large}
for name in [name for name in sys.modules if name.partition(".")[0] in forgotten]:
    del sys.modules[name]
from tokenizer.loading import load_tokenizer
load_tokenizer(sys.argv[1])
print([name for name in large if name in sys.modules])
"""


def test_loading_a_codec_imports_no_large_package_it_does_not_need(
    codec_folder: Path, tmp_path: Path, start_recipe: Callable
) -> None:
    (tmp_path / "loading.py").write_text(LOADING)
    process = start_recipe(str(tmp_path / "loading.py"), str(codec_folder), tmp_path)
    output, errors = process.communicate()
    assert process.returncode == 0 and output == "[]\n", errors
