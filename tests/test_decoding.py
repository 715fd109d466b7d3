"""Transcribing: batches, order, what may be answered, and how long."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from speechllm import AudioError, SpeechLLM, load_audio, save_audio, transcribe, transcribe_codes

MakeSpeechLLM = Callable[..., SpeechLLM]
LENGTHS = (30, 4, 55, 0, 11, 30, 1)


def random_codes(*frames: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(16, (2, count), generator=generator) for count in frames]


def with_opinions(speech_llm: SpeechLLM, opinions: dict[int, float]) -> SpeechLLM:
    """The model whose logit of an id is what `opinions` says (0 for the others), whatever it hears."""
    head = speech_llm.model.lm_head
    answer = nn.Linear(head.in_features, head.out_features)
    with torch.no_grad():
        answer.weight.zero_()
        answer.bias.zero_()
        for token, value in opinions.items():
            answer.bias[token] = value
    speech_llm.model.lm_head = answer
    return speech_llm


def letter(speech_llm: SpeechLLM) -> int:
    return speech_llm.text_tokenizer.convert_tokens_to_ids("x")


# ---- batches


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("batch_size", [2, 3, 16])
def test_a_batch_is_transcribed_like_each_alone_in_the_order_given(
    make_speech_llm: MakeSpeechLLM, layers: int, batch_size: int
) -> None:
    speech_llm = make_speech_llm(layers=layers)
    codes = random_codes(*LENGTHS)
    alone = [transcribe_codes([item], speech_llm)[0] for item in codes]
    assert len(set(alone)) == len(LENGTHS)  # this model answers differently to everything
    assert transcribe_codes(codes, speech_llm, batch_size) == alone
    assert transcribe_codes(codes[::-1], speech_llm, batch_size) == alone[::-1]


def test_nothing_is_transcribed_to_nothing(make_speech_llm: MakeSpeechLLM) -> None:
    speech_llm = make_speech_llm()
    assert transcribe_codes([], speech_llm) == transcribe([], speech_llm) == []


@pytest.mark.parametrize("training", [True, False])
def test_the_model_keeps_its_mode_and_gets_no_gradients(make_speech_llm: MakeSpeechLLM, training: bool) -> None:
    speech_llm = make_speech_llm()
    speech_llm.model.train(training)
    transcribe_codes(random_codes(5), speech_llm)
    assert speech_llm.model.training is training
    assert all(parameter.grad is None for parameter in speech_llm.model.parameters())


# ---- what may be answered


def test_only_text_is_answered_however_much_the_model_prefers_something_else(make_speech_llm: MakeSpeechLLM) -> None:
    speech_llm = make_speech_llm(layers=2, tied=False, spare=60)
    words, vocabulary = speech_llm.text_tokenizer, speech_llm.vocabulary
    spare = range(len(words), vocabulary.size)
    assert len(spare) == 26
    opinions = {int(token): 100.0 for token in vocabulary.new_ids} | {token: 90.0 for token in spare}
    opinions |= {words.pad_token_id: 80.0, letter(speech_llm): 50.0}
    speech_llm = with_opinions(speech_llm, opinions)
    codes = torch.zeros(2, 50, dtype=torch.long)
    free = speech_llm.model.generate(torch.tensor([[5]]), max_new_tokens=1, do_sample=False, pad_token_id=0)[0, -1]
    assert free in vocabulary.new_ids  # so it would speak in audio tokens
    assert transcribe_codes([codes], speech_llm) == ["x" * 28]


def test_no_special_token_is_answered(make_speech_llm: MakeSpeechLLM) -> None:
    speech_llm = make_speech_llm(tied=False)
    special = {i for i, token in speech_llm.text_tokenizer.added_tokens_decoder.items() if token.special}
    special.remove(speech_llm.text_tokenizer.eos_token_id)
    opinions = dict.fromkeys(special, 100.0) | {letter(speech_llm): 50.0}
    codes = torch.zeros(1, 0, dtype=torch.long)
    assert transcribe_codes([codes], with_opinions(speech_llm, opinions)) == ["x" * 16]


def test_an_answer_ends_with_the_end_token(make_speech_llm: MakeSpeechLLM) -> None:
    speech_llm = make_speech_llm(tied=False)
    opinions = {speech_llm.text_tokenizer.eos_token_id: 60.0, letter(speech_llm): 50.0}
    assert transcribe_codes(random_codes(9, 40), with_opinions(speech_llm, opinions)) == ["", ""]


def test_a_model_that_runs_away_stops_at_12_tokens_a_second_and_16_more(make_speech_llm: MakeSpeechLLM) -> None:
    speech_llm = make_speech_llm(tied=False)
    speech_llm = with_opinions(speech_llm, {letter(speech_llm): 50.0})
    texts = transcribe_codes([torch.zeros(1, frames, dtype=torch.long) for frames in (100, 0, 50, 25)], speech_llm)
    assert texts == ["x" * count for count in (16 + 24, 16, 16 + 12, 16 + 6)]


# ---- recordings


def test_a_waveform_its_file_and_its_codes_give_the_same_text(
    tmp_path: Path, make_speech_llm: MakeSpeechLLM, noise: Callable[..., Tensor]
) -> None:
    speech_llm = make_speech_llm(layers=2)
    files = [tmp_path / "a.flac", tmp_path / "b.wav"]
    for seed, file in enumerate(files):
        save_audio(file, noise(9_000 + 4_000 * seed, seed=seed)[0])
    waveforms = [load_audio(file) for file in files]
    codes = [speech_llm.codec.encode(waveform[None]).ids[0] for waveform in waveforms]
    texts = transcribe_codes(codes, speech_llm)
    assert texts[0] != texts[1]
    assert transcribe([files[0], waveforms[0], str(files[1]), waveforms[1]], speech_llm) == [
        texts[0],
        texts[0],
        texts[1],
        texts[1],
    ]


def test_a_recording_that_cannot_be_used_is_named(tmp_path: Path, make_speech_llm: MakeSpeechLLM) -> None:
    with pytest.raises(AudioError, match="nowhere.wav: no such audio file"):
        transcribe([tmp_path / "nowhere.wav"], make_speech_llm())


def test_without_a_codec_recordings_cannot_be_transcribed(make_speech_llm: MakeSpeechLLM) -> None:
    speech_llm = make_speech_llm()
    speech_llm.codec = None
    with pytest.raises(ValueError, match="has no codec: load it with load_speech_llm, or use transcribe_codes"):
        transcribe([torch.zeros(1000)], speech_llm)
