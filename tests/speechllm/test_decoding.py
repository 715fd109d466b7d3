"""Transcription: batches, order, beams, allowed tokens, maximum lengths, and runaway answers."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from speechllm import (
    AudioError,
    DataError,
    SpeechCodec,
    SpeechLLM,
    Utterance,
    encode_shards,
    load_audio,
    load_language_model,
    load_speech_llm,
    save_audio,
    transcribe,
    transcribe_codes,
    word_error_rate,
)
from speechllm.decoding import (
    Transcription,
    _NoRepeats,
    answer_batches,
    answer_bound,
    count_runaways,
    forbidden_ids,
    recognize,
    runaway_reason,
    with_room,
)
from speechllm.greedy import greedy_answers, reads_packed
from speechllm.pieces import pieces
from speechllm.prompt import transcription_prompt

pytestmark = pytest.mark.numeric

MakeSpeechLLM = Callable[..., SpeechLLM]
LENGTHS = (30, 4, 55, 0, 11, 30, 1)


def random_codes(*frames: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(16, (2, count), generator=generator) for count in frames]


def with_opinions(speech_llm: SpeechLLM, opinions: dict[int, float]) -> SpeechLLM:
    """The model with constant logits, independent of its input: those of `opinions`, 0 for other ids."""
    head = speech_llm.model.lm_head
    answer = nn.Linear(head.in_features, head.out_features)
    with torch.no_grad():
        answer.weight.zero_()
        answer.bias.zero_()
        for token, value in opinions.items():
            answer.bias[token] = value
    speech_llm.model.lm_head = answer
    return speech_llm


def with_chances(speech_llm: SpeechLLM, chances: dict[str, dict[str, float]]) -> SpeechLLM:
    """The model as a Markov chain: the chance of each next letter after a letter; "<" is the start, ">" the end."""
    model, text_tokenizer = speech_llm.model, speech_llm.text_tokenizer
    ids = {"<": speech_llm.vocabulary.end_id, ">": text_tokenizer.eos_token_id}
    ids |= {letter: text_tokenizer.convert_tokens_to_ids(letter) for letter in "abcdex"}
    with torch.no_grad():
        for layer in model.model.layers:  # only the last token counts
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        rows, head = model.get_input_embeddings().weight, model.lm_head.weight
        rows.zero_()
        head.fill_(-100)
        scale = math.sqrt(rows.shape[1])  # of a single one after the norm
        for state, (letter, following) in enumerate(chances.items()):
            rows[ids[letter], state] = 1
            for after, chance in following.items():
                head[ids[after], state] = math.log(chance) / scale
    return speech_llm


def letter(speech_llm: SpeechLLM) -> int:
    return speech_llm.text_tokenizer.convert_tokens_to_ids("x")


# ---- batches


@pytest.mark.parametrize("layers, beams, budgets", [(1, 1, (200, 9000)), (2, 1, (400, 9000)), (1, 3, (9000,))])
def test_transcriptions_do_not_depend_on_the_batch_and_keep_the_order(
    make_speech_llm: MakeSpeechLLM, layers: int, beams: int, budgets: tuple[int, ...]
) -> None:
    speech_llm = make_speech_llm(layers=layers)
    codes = random_codes(*LENGTHS)
    alone = [transcribe_codes([item], speech_llm, beams=beams)[0] for item in codes]
    assert len(set(alone)) == len(LENGTHS)  # this model answers differently to everything
    for tokens in budgets:
        assert transcribe_codes(codes, speech_llm, tokens, beams=beams) == alone
        assert transcribe_codes(codes[::-1], speech_llm, tokens, beams=beams) == alone[::-1]


def test_more_beams_make_the_batches_smaller(make_speech_llm: MakeSpeechLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    speech_llm, sizes = make_speech_llm(), []
    generate = speech_llm.model.generate
    monkeypatch.setattr(
        speech_llm.model, "generate", lambda **given: sizes.append(len(given["input_ids"])) or generate(**given)
    )
    size = len(transcription_prompt(random_codes(1)[0], speech_llm.vocabulary, speech_llm.text_tokenizer)) + 16
    transcribe_codes(random_codes(1, 1, 1, 1, 1), speech_llm, batch_tokens=4 * size, beams=2, fallback=False)
    transcribe_codes(random_codes(1, 1), speech_llm, batch_tokens=1, beams=2, fallback=False)
    assert sizes == [2, 2, 1, 1, 1]


def test_a_batch_holds_as_many_prompts_with_their_answers_as_fit() -> None:
    batches = answer_batches([5, 30, 4, 20, 30], [2, 10, 2, 8, 10], 100)
    assert batches == [[1, 4], [3, 0, 2]]  # 2 x 40 tokens; 3 x 28
    assert answer_batches([50, 1], [9, 1], 3) == [[0], [1]] and answer_batches([], [], 3) == []


@torch.no_grad()
def test_an_answer_that_has_ended_is_not_computed_further(
    make_speech_llm: MakeSpeechLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    speech_llm, sizes = make_speech_llm(), []
    prompts = [
        transcription_prompt(c, speech_llm.vocabulary, speech_llm.text_tokenizer) for c in random_codes(*LENGTHS)
    ]
    assert reads_packed(speech_llm.model)
    forward = speech_llm.model.forward
    monkeypatch.setattr(
        speech_llm.model, "forward", lambda **given: sizes.append(given["input_ids"].shape) or forward(**given)
    )
    text_tokenizer, vocabulary = speech_llm.text_tokenizer, speech_llm.vocabulary
    words = speech_llm.model, vocabulary, forbidden_ids(text_tokenizer, vocabulary), text_tokenizer.eos_token_id
    bounds = [3, 20, 9, 20, 14, 20, 70]
    answers = greedy_answers(prompts, bounds, *words)
    assert sizes[0] == (1, sum(map(len, prompts)))
    steps = [min(len(answer), bound - 1) for answer, bound in zip(answers, bounds, strict=True)]
    rows = [sum(count > step for count in steps) for step in range(max(steps))]
    assert sizes[1:] == [(count, 1) for count in rows] and len(set(rows)) > 3
    assert [greedy_answers([one], [bound], *words)[0] for one, bound in zip(prompts, bounds, strict=True)] == answers


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


# ---- beams

# after a, four continuations; b is the less likely beginning of the more likely answer
GARDEN_PATH = {
    "<": {"a": 0.6, "b": 0.4},
    "a": {"b": 0.22, "c": 0.26, "d": 0.26, "e": 0.26},
    **dict.fromkeys("bcde", {">": 1.0}),
}


def test_beam_search_finds_a_likelier_answer_with_a_less_likely_beginning(make_speech_llm: MakeSpeechLLM) -> None:
    speech_llm = with_chances(make_speech_llm(tied=False), GARDEN_PATH)
    codes = random_codes(3, 8)
    assert all(text in ("ac", "ad", "ae") for text in transcribe_codes(codes, speech_llm))
    assert transcribe_codes(codes, speech_llm, beams=2) == ["b", "b"]


@pytest.mark.parametrize("beams", [0, -1])
def test_less_than_one_beam_is_refused(make_speech_llm: MakeSpeechLLM, beams: int) -> None:
    with pytest.raises(ValueError, match=f"beams must be at least 1, got {beams}"):
        transcribe_codes(random_codes(3), make_speech_llm(), beams=beams)


# ---- what may be answered


def test_the_models_own_repetition_penalty_is_ignored(make_speech_llm: MakeSpeechLLM) -> None:
    speech_llm = with_chances(make_speech_llm(tied=False), {"<": {"x": 1.0}, "x": {"x": 0.8, "a": 0.2}})
    speech_llm.model.generation_config.repetition_penalty = 50.0
    assert transcribe_codes(random_codes(0), speech_llm) == ["x" * 16]


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


@pytest.mark.parametrize("beams", [1, 2])
def test_a_runaway_model_stops_at_12_tokens_per_second_plus_16(make_speech_llm: MakeSpeechLLM, beams: int) -> None:
    speech_llm = make_speech_llm(tied=False)
    speech_llm = with_opinions(speech_llm, {letter(speech_llm): 50.0})
    codes = [torch.zeros(1, frames, dtype=torch.long) for frames in (100, 0, 50, 25)]
    texts = transcribe_codes(codes, speech_llm, beams=beams)
    assert texts == ["x" * count for count in (16 + 24, 16, 16 + 12, 16 + 6)]


def test_answers_have_room_for_transcripts_like_those_of_the_training(make_speech_llm: MakeSpeechLLM) -> None:
    speech_llm = make_speech_llm(tied=False)
    english = with_room(speech_llm.vocabulary, np.array([60, 30, 5]), [10.0, 6.0, 0.4])
    assert english == speech_llm.vocabulary and answer_bound(2.5, english) == 16 + 30
    thai = with_room(english, np.array([250] * 100), [10.0] * 100)
    assert answer_bound(10.0, thai) == 1.5 * 250
    assert with_room(thai, np.array([]), []) == thai
    speech_llm = with_opinions(replace(speech_llm, vocabulary=thai), {letter(speech_llm): 50.0})
    codes = [torch.zeros(1, 50, dtype=torch.long)]
    assert transcribe_codes(codes, speech_llm, fallback=False) == ["x" * answer_bound(1.0, thai)]


# ---- runaway answers

# half a minute of speech each, in scripts of three bytes a letter
HINDI = (
    "सुबह की हल्की धूप में गाँव के लोग अपने खेतों की ओर निकल पड़े और रास्ते में नदी के किनारे रुककर उन्होंने ठंडा पानी पिया। "
    "बूढ़े किसान ने कहा कि इस साल बारिश अच्छी हुई है, इसलिए फसल भी बढ़िया होगी और बच्चों के लिए नए कपड़े खरीदे जा सकेंगे। "
    "शाम को मेले में मिठाई, खिलौने और झूले देखकर सब खुश हो गए, फिर देर रात तक गीत गाते हुए घर लौट आए।"
)
THAI = (
    "เช้าวันนี้อากาศเย็นสบาย ชาวบ้านพากันออกไปทำนาและแวะดื่มน้ำริมคลองก่อนเริ่มงาน "
    "คุณตาบอกว่าปีนี้ฝนตกดี ข้าวคงจะงาม เด็กๆ จะได้เสื้อผ้าใหม่ใส่ไปโรงเรียน "
    "ตกเย็นทุกคนไปเที่ยวงานวัด กินขนม นั่งชิงช้า ฟังเพลงลูกทุ่ง แล้วเดินกลับบ้านใต้แสงจันทร์อย่างมีความสุข"
)


@pytest.mark.parametrize(
    "text, at_bound, reason",
    [
        ("turn on the red lamp", False, None),
        ("no no no no", False, None),  # may be correct
        ("one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen", False, None),
        ("turn on the red lamp", True, "bound"),
        ("", False, "empty"),
        ("", True, "empty"),
        ("x" * 40, True, "looped"),
        ("and then the lamp " * 8, False, "looped"),
        (HINDI, False, None),
        (THAI, False, None),
        ("लाल बत्ती जलाओ " * 12, False, "looped"),
        ("As an AI, I can not listen.", False, "refused"),
        ("i'm an ai language model", True, "refused"),
        ("as an aim in itself", False, None),
    ],
)
def test_runaway_answers_are_recognised(text: str, at_bound: bool, reason: str | None) -> None:
    assert runaway_reason(text, at_bound) == reason


def test_a_loop_is_decoded_again_without_repetitions(make_speech_llm: MakeSpeechLLM) -> None:
    chances = {"<": {"x": 1.0}, "x": {"x": 0.9, ">": 0.1}}
    speech_llm = with_chances(make_speech_llm(tied=False), chances)
    codes = random_codes(50, 0)
    assert recognize(codes, speech_llm) == [Transcription("x" * 28, "looped"), Transcription("x" * 16, "bound")]
    # six would be "xxxxx" twice
    repaired = [Transcription("xxxxx", "looped", True), Transcription("xxxxx", "bound", True)]
    assert recognize(codes, speech_llm, fallback=True) == repaired
    assert transcribe_codes(codes, speech_llm) == ["xxxxx"] * 2


def test_the_second_answer_may_repeat_the_prompt() -> None:
    rule = _NoRepeats(3, prompt_size=4)
    ids = torch.tensor([[1, 2, 3, 4, 1, 2], [5, 6, 7, 8, 1, 2]])
    assert torch.equal(rule(ids, torch.zeros(2, 9)), torch.zeros(2, 9))
    ids = torch.tensor([[9, 9, 9, 9, 1, 2, 3, 1, 2]])
    assert rule(ids, torch.zeros(1, 9)).isinf().nonzero().tolist() == [[0, 3]]


def test_a_text_tokenizer_without_a_padding_token_is_supported(make_speech_llm: MakeSpeechLLM) -> None:
    speech_llm = make_speech_llm()
    codes = random_codes(9, 2, 5)
    texts = transcribe_codes(codes, speech_llm)
    speech_llm.text_tokenizer.pad_token = None
    assert transcribe_codes(codes, speech_llm) == texts


def test_only_runaways_are_decoded_again(make_speech_llm: MakeSpeechLLM) -> None:
    speech_llm = with_chances(make_speech_llm(tied=False), GARDEN_PATH)  # beams would find "b"
    found = recognize(random_codes(3, 8), speech_llm, fallback=True)
    assert all(len(each.text) == 2 and each.runaway is None and not each.repaired for each in found)


def test_the_first_answer_is_kept_if_the_second_is_a_runaway(make_speech_llm: MakeSpeechLLM) -> None:
    endless = {"<": {"x": 1.0}, "x": {"x": 0.8, "a": 0.2}, "a": {"x": 0.5, "b": 0.5}, "b": {"x": 0.5, "a": 0.5}}
    speech_llm = with_chances(make_speech_llm(tied=False), endless)
    assert recognize(random_codes(50), speech_llm, fallback=True) == [Transcription("x" * 28, "looped")]


def test_an_answer_that_stays_empty_is_counted_and_not_repaired(make_speech_llm: MakeSpeechLLM) -> None:
    speech_llm = with_chances(make_speech_llm(tied=False), {"<": {">": 1.0}})
    found = recognize(random_codes(3, 9), speech_llm, fallback=True)
    assert found == [Transcription("", "empty")] * 2
    found += [Transcription("a"), Transcription("b", "looped", True), Transcription("c", "bound")]
    assert count_runaways(found) == {"empty": 2, "looped": 1, "refused": 0, "bound": 1, "repaired": 1}


def test_eval_asr_counts_runaways_and_scores_the_final_answers(
    tmp_path: Path, recipe: Callable[[str], ModuleType], make_speech_llm: MakeSpeechLLM, noise: Callable[..., Tensor]
) -> None:
    utterances = []
    for i, speaker in enumerate(("anna", "bert", "anna")):
        save_audio(tmp_path / f"{i}.wav", noise(4_000, seed=i)[0])
        utterances.append(Utterance(f"u{i}", str(tmp_path / f"{i}.wav"), 0.25, "test", "XXXXX X", speaker))
    speech_llm = with_chances(make_speech_llm(tied=False), {"<": {"x": 1.0}, "x": {"x": 0.9, ">": 0.1}})
    assert sum(encode_shards(utterances, speech_llm.codec, tmp_path / "codes")) == 3
    speech_llm.save(tmp_path / "model")

    eval_asr = recipe("eval_asr.py")

    def evaluate(**settings: object) -> tuple[dict, list[dict]]:
        places = (str(tmp_path / name) for name in ("model", "codes", "out"))
        eval_asr.main(eval_asr.EvalAsrConfig(*places, **settings))
        lines = (tmp_path / "out" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        return json.loads((tmp_path / "out" / "results.json").read_text()), list(map(json.loads, lines))

    results, predictions = evaluate(shuffled_utterances=2)
    assert [(p["hypothesis"], p["fallback"]) for p in predictions] == [("xxxxx", "bound")] * 3
    assert results["fallback"] == {"empty": 0, "looped": 0, "refused": 0, "bound": 3, "repaired": 3}
    assert results["wer"] == word_error_rate(["xxxxx x"] * 3, ["xxxxx"] * 3).wer == 0.5
    assert results["cer"] == pytest.approx(2 / 7) and results["beams"] == 1 and results["wer_shuffled_audio"] == 0.5
    assert results["utterances_shuffled_audio"] == 2
    for speaker, utterances in {"anna": 2, "bert": 1}.items():
        expected = {"wer": 0.5, "words": 2 * utterances, "utterances": utterances}
        assert results["speakers"][speaker].items() >= expected.items()
    assert results["normalizer"] == "librispeech" and results["real_time_factor"] > 0

    results, predictions = evaluate(fallback=False, normalizer="none", shuffled_audio=False, static_cache=True)
    assert [p["hypothesis"] for p in predictions] == ["x" * 19] * 3
    assert results["fallback"]["bound"] == 3 and results["fallback"]["repaired"] == 0
    assert results["wer"] == 1 and results["normalizer"] == "none"


def test_eval_asr_scores_the_texts_as_they_were_given_split_by_split(
    tmp_path: Path,
    recipe: Callable[[str], ModuleType],
    make_speech_llm: MakeSpeechLLM,
    noise: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("whisper_normalizer", reason="needs the eval extra")
    texts = ["It's 3.5 percent, isn\u2019t it?", "...", "Turn ON"]
    utterances = []
    for i, (text, split) in enumerate(zip(texts, ("dev", "dev", "test"), strict=True)):
        save_audio(tmp_path / f"{i}.wav", noise(4_000, seed=i)[0])
        utterances.append(Utterance(f"u{i}", str(tmp_path / f"{i}.wav"), 0.25, split, text, "s"))
    speech_llm = make_speech_llm(tied=False)
    assert sum(encode_shards(utterances, speech_llm.codec, tmp_path / "codes")) == 3
    speech_llm.save(tmp_path / "run" / "model")
    (tmp_path / "run" / "done.json").write_text('{"normalizer": "none"}')
    eval_asr = recipe("eval_asr.py")
    places = [str(tmp_path / name) for name in ("run/model", "codes", "out")]
    monkeypatch.setattr(eval_asr, "recognize", lambda speech, **_: [Transcription(text) for text in texts])
    eval_asr.main(eval_asr.EvalAsrConfig(*places, normalizer="whisper_english", shuffled_audio=False))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["wer"] == results["cer"] == 0 and results["primary"] == "wer"
    assert (results["normalizer"], results["training_normalizer"]) == ("whisper_english", "none")
    assert results["empty_references"] == 1 and results["without_transcript"] == 0
    assert {split: found["utterances"] for split, found in results["splits"].items()} == {"dev": 2, "test": 1}
    printed = capsys.readouterr().out
    assert "Pooled over the splits dev, test:" in printed and "test: WER 0.00%, CER 0.00% (2 words of 1" in printed
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert (
        "2 splits pooled" in page and "<h2>Error rates by split</h2>" in page and "1 with a reference without" in page
    )

    monkeypatch.setattr(eval_asr, "summarize_shards", lambda folder: {})
    monkeypatch.setattr("speechllm.data.encoded.stored_normalizers", lambda files: ["librispeech"])
    with pytest.raises(DataError, match="of which whisper_english cannot be made: choose normalizer=librispeech"):
        eval_asr.main(eval_asr.EvalAsrConfig("nowhere", *places[1:], normalizer="whisper_english"))


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
    settings = {"beams": 2, "fallback": True}
    assert transcribe(files, speech_llm, **settings) == transcribe_codes(codes, speech_llm, **settings) != texts


def test_a_long_file_is_transcribed_in_pieces(
    tmp_path: Path, make_speech_llm: MakeSpeechLLM, noise: Callable[..., Tensor]
) -> None:
    speech_llm = make_speech_llm(layers=2)
    save_audio(tmp_path / "long.flac", noise(32 * 16_000, seed=0)[0])
    save_audio(tmp_path / "short.flac", noise(9_000, seed=1)[0])
    cut = [piece.waveform for piece in pieces(tmp_path / "long.flac", 16_000)]
    assert len(cut) == 2
    short, *texts = transcribe([tmp_path / "short.flac", *cut], speech_llm)
    assert transcribe([tmp_path / "long.flac", tmp_path / "short.flac"], speech_llm) == [" ".join(texts), short]


def test_a_recording_that_cannot_be_used_is_named(tmp_path: Path, make_speech_llm: MakeSpeechLLM) -> None:
    with pytest.raises(AudioError, match="nowhere.wav: no such audio file"):
        transcribe([tmp_path / "nowhere.wav"], make_speech_llm())


def test_without_a_codec_recordings_cannot_be_transcribed(make_speech_llm: MakeSpeechLLM) -> None:
    speech_llm = make_speech_llm()
    speech_llm.codec = None
    with pytest.raises(ValueError, match="has no codec: load it with load_speech_llm, or use transcribe_codes"):
        transcribe([torch.zeros(1000)], speech_llm)


CHATTY = {
    "bad_words_ids": [[40], [41], [42], [43], [44], [45]],
    "suppress_tokens": [*range(3, 60)],
    "guidance_scale": 3.0,
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "max_length": 3,
    "forced_eos_token_id": 5,
    "do_sample": True,
    "temperature": 9.0,
    "num_beams": 3,
}


def test_the_generation_settings_of_a_base_model_change_nothing(
    make_qwen2: Callable, make_text_tokenizer: Callable, small_codec: SpeechCodec, tmp_path: Path
) -> None:
    """Neither the answers nor what is saved with the model."""
    for name in ("plain", "chatty"):
        text_tokenizer = make_text_tokenizer()
        make_qwen2(text_tokenizer).save_pretrained(tmp_path / name)
        text_tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "chatty" / "generation_config.json").write_text(json.dumps(CHATTY))
    answers = []
    for name in ("plain", "chatty"):
        speech_llm = load_language_model(tmp_path / name, small_codec)
        answers.append(transcribe_codes(random_codes(30, 11), speech_llm))
        speech_llm.save(tmp_path / "saved" / name)
        answers.append(transcribe_codes(random_codes(30, 11), load_speech_llm(tmp_path / "saved" / name)))
        saved = json.loads((tmp_path / "saved" / name / "generation_config.json").read_text())
        assert not set(saved) & set(CHATTY)
    assert any(answers[0]) and all(answer == answers[0] for answer in answers)


def test_the_output_layer_gets_contiguous_states_while_answers_are_generated(
    make_speech_llm: Callable[..., SpeechLLM],
) -> None:
    """Of a slice torch copies the layer once a row on a CPU."""
    speech_llm, seen = make_speech_llm(), []
    head = speech_llm.model.get_output_embeddings()
    before = transcribe_codes(random_codes(9, 5), speech_llm, beams=2)
    forward = head.forward
    head.forward = lambda states: seen.append(states.is_contiguous()) or forward(states)
    assert transcribe_codes(random_codes(9, 5), speech_llm, beams=2) == before
    assert seen and all(seen) and not head._forward_pre_hooks
