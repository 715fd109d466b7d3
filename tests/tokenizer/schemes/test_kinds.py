"""Speech as continuous features or as a recogniser's text, in every part of the language model."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import speechllm.model
from speechllm import (
    DataError,
    Encoding,
    Example,
    Features,
    LabelledLoss,
    SpeechLLM,
    Transcripts,
    Utterance,
    VocabularyError,
    encode_shards,
    export_model,
    extend_vocabulary,
    load_codes,
    load_language_model,
    load_speech_llm,
    merge,
    prepare_adapter,
    save_audio,
    speech_of,
    transcribe,
    transcription_example,
    transcription_prompt,
)
from speechllm.data.shards import summarize_shards
from speechllm.decoding import recognize
from speechllm.messages import ConversationWriter
from speechllm.prompt import conversation_example, sentence
from speechllm.training.optimization import keep_row_gradients, make_optimizer
from tokenizer.errors import InputError

RATE, HOP, WIDTH, STACK = 16_000, 320, 4, 3


class Loudness(nn.Module):
    """Features: level, mean, largest and smallest sample of every frame."""

    sample_rate, frame_rate, width, device, fingerprint = RATE, RATE / HOP, WIDTH, torch.device("cpu"), "10ad" * 4

    def encode(self, waveform: Tensor, lengths: Tensor | None = None) -> Features:
        frames = nn.functional.pad(waveform, (0, -waveform.shape[1] % HOP)).unfold(1, HOP, HOP)
        values = torch.stack([frames.std(2), frames.mean(2), frames.amax(2), frames.amin(2)], 2)
        return Features(values, torch.full((len(values),), values.shape[1]))

    def save_pretrained(self, folder: str | Path, /) -> None:
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "class").write_text(type(self).__name__)


class Counter(nn.Module):
    """A recogniser whose text contains the number of samples."""

    sample_rate, frame_rate, device, fingerprint = RATE, 0.0, torch.device("cpu"), "c0de" * 4

    def encode(self, waveform: Tensor, lengths: Tensor | None = None) -> Transcripts:
        return Transcripts([f"CALL {waveform.shape[1]} <|audio_start|>"] * len(waveform))

    def save_pretrained(self, folder: str | Path, /) -> None:
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "class").write_text(type(self).__name__)


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the two tokenizers above be loaded from folders, too."""
    classes = {"Loudness": Loudness, "Counter": Counter}
    load = lambda folder: classes[(Path(folder) / "class").read_text()]()  # noqa: E731
    monkeypatch.setattr(speechllm.model, "load_tokenizer", load)


@pytest.fixture
def make(make_qwen2: Callable, make_text_tokenizer: Callable, tmp_path: Path) -> Callable[..., SpeechLLM]:
    """A tiny SpeechLLM of one of the two, whose language model was loaded from a folder."""

    def build(codec: nn.Module, stack: int = STACK, tied: bool = True, **extension: bool) -> SpeechLLM:
        text_tokenizer = make_text_tokenizer()
        make_qwen2(text_tokenizer, tied).save_pretrained(tmp_path / f"base_{tied}")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"base_{tied}").eval()
        torch.manual_seed(0)
        vocabulary = extend_vocabulary(model, text_tokenizer, codec, stack=stack, **extension)
        if vocabulary.encoding.kind == "features":
            nn.init.normal_(model.speech_projector.outer.weight)  # confident scores
        return SpeechLLM(model, text_tokenizer, vocabulary, codec)

    return build


@pytest.fixture
def features(noise: Callable[..., Tensor]) -> list[Tensor]:
    """Of three utterances: 10, 4 and 7 frames."""
    return [Loudness().encode(noise(HOP * count - 5, seed=count)).utterance(0) for count in (10, 4, 7)]


def test_features_take_the_places_of_one_new_word(make: Callable[..., SpeechLLM], features: list[Tensor]) -> None:
    speech_llm = make(Loudness())
    vocabulary = speech_llm.vocabulary
    assert vocabulary.new_ids.tolist() == [vocabulary.offset, vocabulary.start_id, vocabulary.end_id]
    ids = vocabulary.token_ids(features[0]).tolist()
    assert ids == [vocabulary.start_id, *[vocabulary.offset] * 4, vocabulary.end_id]  # 10 frames, three a token
    stacked = vocabulary.features(features[0])
    assert torch.equal(stacked.view(-1, WIDTH)[:10], features[0]) and not stacked.view(-1, WIDTH)[10:].any()


def test_a_text_is_ordinary_text_between_the_markers(make: Callable[..., SpeechLLM]) -> None:
    speech_llm = make(Counter())
    vocabulary, text_tokenizer = speech_llm.vocabulary, speech_llm.text_tokenizer
    assert vocabulary.new_ids.tolist() == [vocabulary.start_id, vocabulary.end_id]
    text = "CALL ANNA <|audio_end|>"  # text that looks like a marker
    ids = vocabulary.token_ids(text, text_tokenizer)
    assert text_tokenizer.decode(ids[1:-1]) == text
    assert vocabulary.end_id not in ids[1:-1].tolist()
    assert transcription_prompt(text, vocabulary, text_tokenizer).features is None


def test_another_kind_of_speech_is_refused(make: Callable[..., SpeechLLM], features: list[Tensor]) -> None:
    soft, texts = make(Loudness()).vocabulary, make(Counter()).vocabulary
    codes = torch.zeros(1, 3, dtype=torch.long)
    for vocabulary, speech in ((soft, codes), (soft, "CALL"), (texts, codes), (texts, features[0]), (texts, "CALL")):
        with pytest.raises(VocabularyError, match=f"needs {vocabulary.encoding.kind}.*, got a "):
            vocabulary.token_ids(speech)
    of_codes = replace(soft, encoding=Encoding("f" * 16, RATE, 50.0, 1, 1))
    with pytest.raises(VocabularyError, match=r"needs codes, got a tensor of torch.float32"):
        of_codes.token_ids(features[0])


def examples_of(speech_llm: SpeechLLM, speech: list) -> list[Example]:
    parts = speech_llm.vocabulary, speech_llm.text_tokenizer
    return [transcription_example(one, text, *parts) for one, text in zip(speech, ["TURN ON", "", "CALL"], strict=True)]


def test_packed_features_lose_what_each_example_loses_alone(
    make: Callable[..., SpeechLLM], features: list[Tensor]
) -> None:
    speech_llm = make(Loudness())
    examples = examples_of(speech_llm, features)
    vocabulary, model = speech_llm.vocabulary, speech_llm.model
    reference = 0.0
    for example in examples:  # by hand: embeddings with the projected features put in, through plain transformers
        vectors = model.get_input_embeddings()(example.input_ids)[None].clone()
        vectors[0, example.input_ids == vocabulary.offset] = model.speech_projector(example.features)
        logits = model(inputs_embeds=vectors).logits[0, :-1]
        reference += nn.functional.cross_entropy(logits, example.labels[1:], ignore_index=-100, reduction="sum")
    loss = LabelledLoss(model, vocabulary)(examples)
    torch.testing.assert_close(loss[0], reference)
    loss[0].backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in model.speech_projector.parameters())


def test_sentences_without_audio_leave_no_parameter_without_a_gradient(make: Callable[..., SpeechLLM]) -> None:
    """Processes that train together wait for every gradient."""
    speech_llm, plain = make(Loudness()), make(Counter())
    writer = ConversationWriter(speech_llm.vocabulary, speech_llm.text_tokenizer)
    text = [conversation_example(sentence("CALL ANNA"), writer)]
    loss = LabelledLoss(speech_llm.model, speech_llm.vocabulary)(text)
    loss[0].backward()
    assert all(p.grad is not None for p in speech_llm.model.parameters())
    as_large = replace(plain.vocabulary, size=speech_llm.vocabulary.size)
    torch.testing.assert_close(loss, LabelledLoss(speech_llm.model, as_large)(text))


@pytest.mark.parametrize("settings", [{"tied": True}, {"tied": False}, {"prefix_attention": True}], ids=str)
def test_features_saved_and_loaded_answer_the_same(
    make: Callable[..., SpeechLLM], features: list[Tensor], tmp_path: Path, settings: dict[str, bool]
) -> None:
    speech_llm = make(Loudness(), **settings)
    expected = recognize(features, speech_llm)
    assert len({found.text for found in expected}) > 1
    assert [recognize([one], speech_llm)[0] for one in features] == expected  # alone as in a batch
    speech_llm.save(tmp_path / "saved")
    loaded = load_speech_llm(tmp_path / "saved")
    assert loaded.vocabulary == speech_llm.vocabulary
    assert recognize(features, loaded) == expected
    by_beams = recognize(features, loaded, beams=2)
    assert by_beams == recognize(features, speech_llm, beams=2)
    assert [recognize([one], speech_llm, beams=2)[0] for one in features] == by_beams


@pytest.mark.parametrize("form", ["lora", "rows"])
def test_an_adapter_trains_and_keeps_the_projector(
    make: Callable[..., SpeechLLM], features: list[Tensor], tmp_path: Path, form: str
) -> None:
    speech_llm = make(Loudness())
    speech_llm.model = prepare_adapter(speech_llm.model, speech_llm.vocabulary, form, rank=2, alpha=4)
    frozen = speech_llm.model.get_base_model().model.layers[0].mlp.gate_proj.weight.clone()
    optimizer = make_optimizer(speech_llm.model, speech_llm.vocabulary, 0.1)
    before = {name: p.detach().clone() for name, p in speech_llm.model.named_parameters() if p.requires_grad}
    assert any("speech_projector" in name for name in before) and not any(
        "layers" in n and "lora" not in n for n in before
    )
    LabelledLoss(speech_llm.model, speech_llm.vocabulary)(examples_of(speech_llm, features)).sum().backward()
    optimizer.step()
    moved = {
        name for name, p in speech_llm.model.named_parameters() if name in before and not torch.equal(p, before[name])
    }
    assert sum("speech_projector" in name for name in moved) == 6
    expected = recognize(features, speech_llm)
    speech_llm.save(tmp_path / "adapter")
    loaded = load_speech_llm(tmp_path / "adapter")
    assert recognize(features, loaded) == expected
    merged = merge(loaded)
    assert recognize(features, merged) == expected
    merged.save(tmp_path / "merged")  # as `speechllm merge` does
    further = load_language_model(tmp_path / "merged", Loudness(), stack=speech_llm.vocabulary.stack)
    assert recognize(features, further) == expected
    if form == "rows":
        assert torch.equal(merged.model.model.layers[0].mlp.gate_proj.weight, frozen)


def test_a_projector_learns_with_the_new_rows_before_the_rest(
    make: Callable[..., SpeechLLM], features: list[Tensor]
) -> None:
    speech_llm = make(Loudness())
    model, vocabulary = speech_llm.model, speech_llm.vocabulary
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, vocabulary, 1e-3, row_learning_rate=0.1)
    LabelledLoss(model, vocabulary)(examples_of(speech_llm, features)).sum().backward()
    keep_row_gradients(model, vocabulary)
    optimizer.step()
    moved = {name: float((p - before[name]).abs().max()) for name, p in model.named_parameters()}
    assert {name for name, most in moved.items() if most} == {
        name for name in moved if "speech_projector" in name or name == "model.embed_tokens.weight"
    }
    assert all(most == pytest.approx(0.1, rel=0.01) for name, most in moved.items() if "outer" in name)  # a first step


def test_texts_are_recognised_by_their_durations(
    make: Callable[..., SpeechLLM], noise: Callable, tmp_path: Path
) -> None:
    speech_llm = make(Counter())
    waveforms = [noise(samples, seed=samples)[0] for samples in (4000, 16_000)]
    texts = transcribe(waveforms, speech_llm)
    transcripts = [f"CALL {len(waveform)} <|audio_start|>" for waveform in waveforms]
    assert [found.text for found in recognize(transcripts, speech_llm, durations_s=[0.25, 1.0])] == texts
    with pytest.raises(ValueError, match="pass durations_s"):
        recognize(transcripts, speech_llm)
    speech_llm.save(tmp_path / "saved")
    assert transcribe(waveforms, load_speech_llm(tmp_path / "saved")) == texts


@pytest.mark.parametrize("codec", [Loudness(), Counter()], ids=["features", "text"])
def test_encoded_speech_comes_back_from_disk(codec: nn.Module, tmp_path: Path, noise: Callable[..., Tensor]) -> None:
    utterances = []
    for number, samples in enumerate((4000, 16_000)):
        path = tmp_path / f"{number}.wav"
        save_audio(path, noise(samples, seed=number)[0], RATE)
        utterances.append(Utterance(str(number), str(path), samples / RATE, "train", "ON", "ann"))
    assert sum(encode_shards(utterances, codec, tmp_path / "codes")) == 2
    rows, encoding = load_codes(tmp_path / "codes")
    assert encoding == Encoding.of(codec)
    assert encoding.kind == ("features" if isinstance(codec, Loudness) else "text")
    for row, utterance in zip(rows, utterances, strict=True):
        direct = encoding.encode(codec, speechllm.load_audio(utterance.path))
        found = speech_of(row, encoding)
        if isinstance(found, str):
            assert found == direct
        else:
            assert torch.equal(found, direct.half())  # stored in half precision, and left so until a model reads them
    summary = summarize_shards(tmp_path / "codes")
    assert summary["encoding"]["kind"] == encoding.kind and summary["real_time_factor"] > 0
    json.dumps(summary)


def test_only_codes_have_layers() -> None:
    with pytest.raises(DataError, match="only codes have layers"):
        Encoding.of(Loudness(), 2)
    assert Encoding.of(Counter(), 1) == Encoding.of(Counter())


def test_a_model_of_features_cannot_be_exported(make: Callable[..., SpeechLLM], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="through a projector"):
        export_model(make(Loudness()), tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
