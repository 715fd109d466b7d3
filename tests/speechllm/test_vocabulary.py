"""The audio vocabulary: which id means which code, and what the new rows are."""

import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from speechllm import (
    AudioVocabulary,
    Codes,
    DataError,
    Encoding,
    InputError,
    SpeechCodec,
    SpeechCodecConfig,
    VocabularyError,
    describe_rows,
    extend_vocabulary,
    load_language_model,
    load_speech_llm,
    prepare_adapter,
    transcribe_codes,
    transcription_example,
)
from speechllm.decoding import forbidden_ids
from speechllm.extension import CodeLetters
from speechllm.vocabulary import text_token_ids

K = 16  # of small_codec
UNTOUCHED = 777.0  # put into spare rows: whatever still holds it was not initialised
MODELS = [
    pytest.param({"tied": tied, "spare": spare}, id=f"{'tied' if tied else 'untied'}, {spare} spare rows")
    for tied in (True, False)
    for spare in (0, 10, 60)  # 34 tokens are added: no room, some room, enough room
]
models = pytest.mark.parametrize("kind", MODELS)
MakeQwen2 = Callable[..., torch.nn.Module]


def hand_vocabulary(layers: int = 2) -> AudioVocabulary:
    end = 100 + layers * K
    return AudioVocabulary(Encoding("f" * 16, 16_000, 50.0, layers, K), 100, end, end + 1, end + 2)


def matrices(model: torch.nn.Module) -> list[Tensor]:
    return [model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data]


def centred_cosines(rows: Tensor) -> Tensor:
    """Cosine of every pair of rows after their mean was taken away, float [pairs]."""
    unit = torch.nn.functional.normalize(rows - rows.mean(0), dim=1)
    return (unit @ unit.T)[torch.ones(len(rows), len(rows)).triu(1).bool()]


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def words_with_gaps(end: int, last: int) -> PreTrainedTokenizerFast:
    """Tokens 0, 1, ... 9, the end token and one more, with these two ids."""
    words = {"<unk>": 0, **{f"{i}": i for i in range(1, 10)}, "</s>": end, "last": last}
    made = Tokenizer(WordLevel(words, "<unk>"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")


def test_ids_that_a_text_tokenizer_leaves_out_stay_free(make_qwen2: MakeQwen2, small_codec: SpeechCodec) -> None:
    text_tokenizer = words_with_gaps(end=40, last=20)
    assert len(text_tokenizer) == 12
    model = make_qwen2(text_tokenizer, spare=29)
    before = model.get_input_embeddings().weight.detach().clone()
    vocabulary = extend_vocabulary(model, text_tokenizer, small_codec, 2)
    assert (vocabulary.offset, vocabulary.size) == (41, 41 + 34)
    assert torch.equal(model.get_input_embeddings().weight[:41], before)
    assert text_tokenizer.convert_tokens_to_ids(["last", "</s>", "<|audio_0|>"]) == [20, 40, 41]
    forbidden = forbidden_ids(text_tokenizer, vocabulary)
    assert (~forbidden).nonzero().flatten().tolist() == [*range(1, 10), 20, 40]


def test_a_text_tokenizer_that_would_give_a_code_the_id_of_a_word_is_refused(
    make_qwen2: MakeQwen2, small_codec: SpeechCodec
) -> None:
    text_tokenizer = words_with_gaps(end=10, last=20)
    with pytest.raises(VocabularyError, match="leaves out some of its 21 ids.*renumber"):
        extend_vocabulary(make_qwen2(text_tokenizer, spare=29), text_tokenizer, small_codec, 2)


@pytest.mark.parametrize("form", ["full", "lora"])
def test_a_special_token_that_the_language_model_has_no_row_for_is_never_read(
    form: str, make_language_model: Callable, text_tokenizer, small_codec: SpeechCodec, tmp_path: Path
) -> None:
    """As Gemma-3's for images in its models without eyes."""
    base, texts = make_language_model("Gemma3Text", text_tokenizer), len(text_tokenizer)
    base.save_pretrained(tmp_path / "base")
    text_tokenizer.add_special_tokens({"extra_special_tokens": ["<image_soft_token>"]})
    text_tokenizer.save_pretrained(tmp_path / "base")
    speech_llm = load_language_model(tmp_path / "base", small_codec, layers=2)
    vocabulary, rows = speech_llm.vocabulary, speech_llm.model.get_input_embeddings().weight.detach()
    before = base.get_input_embeddings().weight.detach()
    assert (vocabulary.offset, vocabulary.size) == (texts + 1, texts + 1 + 34)
    tokens = speech_llm.text_tokenizer
    assert tokens.convert_tokens_to_ids(["<image_soft_token>", "<|audio_0|>", "<|audio_end|>"]) == [
        *(texts, texts + 1, vocabulary.end_id),
    ]
    assert torch.equal(rows[:texts], before) and torch.equal(rows[texts], before[-1])
    torch.testing.assert_close(rows[vocabulary.new_ids[:-2]].mean(0), before.mean(0), atol=1e-5, rtol=0)
    assert texts not in text_token_ids(tokens, ["<image_soft_token>"])[0] and forbidden_ids(tokens, vocabulary)[texts]
    if form == "lora":
        speech_llm.model = prepare_adapter(speech_llm.model, vocabulary, rank=2, alpha=4)
    generator = torch.Generator().manual_seed(0)
    for parameter in speech_llm.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    codes = torch.randint(K, (2, 9), generator=generator)
    prompt = transcription_example(codes, "TURN ON", vocabulary, tokens).input_ids[None]
    speech_llm.save(tmp_path / "saved")
    loaded = load_speech_llm(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(loaded.model(prompt).logits, speech_llm.model.eval()(prompt).logits)
    assert transcribe_codes([codes], loaded) == transcribe_codes([codes], speech_llm) != [""]


def test_a_word_that_the_language_model_has_no_row_for_is_refused(
    make_qwen2: MakeQwen2, text_tokenizer, small_codec: SpeechCodec
) -> None:
    model, texts = make_qwen2(text_tokenizer), len(text_tokenizer)
    text_tokenizer.add_tokens(["lamplight"])
    with pytest.raises(VocabularyError, match=f"has {texts + 1} tokens, the language model {texts} rows: take the"):
        extend_vocabulary(model, text_tokenizer, small_codec)


# ---- ids


# codes of layer q and frame t are written "qt"; by hand, three layers and three frames
ORDERS = {
    "frame": "00 10 20 01 11 21 02 12 22",
    "layer": "00 01 02 10 11 12 20 21 22",
    "delay": "00 01 10 02 11 20 12 21 22",
    "semantic": "00 01 02 10 20 11 21 12 22",
}


@pytest.mark.parametrize("order", ORDERS)
def test_codes_of_several_layers_are_in_the_requested_order(order: str) -> None:
    vocabulary = replace(hand_vocabulary(layers=3), order=order)
    codes = torch.tensor([[0, 1, 2], [0, 1, 2], [0, 1, 2]])  # code t in frame t
    expected = [100 + K * int(q) + int(t) for q, t in ORDERS[order].split()]
    assert vocabulary.token_ids(codes)[1:-1].tolist() == expected
    assert vocabulary.token_ids(codes[:, :0]).tolist() == [vocabulary.start_id, vocabulary.end_id]


@pytest.mark.parametrize("order", ORDERS)
def test_one_layer_has_one_order(order: str) -> None:
    vocabulary, codes = hand_vocabulary(layers=1), torch.tensor([[3, 0, 15]])
    assert torch.equal(replace(vocabulary, order=order).token_ids(codes), vocabulary.token_ids(codes))


def test_ids_are_offset_plus_layer_times_size_plus_code_frame_after_frame() -> None:
    ids = hand_vocabulary().token_ids(torch.tensor([[3, 0, 15], [1, 2, 0]]))
    #                    start  3 of 0   1 of 1   0 of 0  2 of 1   15 of 0  0 of 1   end
    assert ids.tolist() == [132, 103, 117, 100, 118, 115, 116, 133]
    assert ids.dtype == torch.long


def test_a_single_layer_is_the_first_one() -> None:
    assert hand_vocabulary(1).token_ids(torch.tensor([[3, 0, 15], [1, 2, 0]])).tolist() == [116, 103, 100, 115, 117]


def test_no_frames_leave_the_markers_only() -> None:
    assert hand_vocabulary().token_ids(torch.zeros(2, 0, dtype=torch.long)).tolist() == [132, 133]


def test_codes_of_one_utterance_are_read_without_their_padding() -> None:
    codes = Codes(torch.tensor([[[1, 2, 0]]]), lengths=torch.tensor([2]))
    assert hand_vocabulary(1).token_ids(codes).tolist() == [116, 101, 102, 117]


def test_codes_of_several_utterances_are_refused() -> None:
    with pytest.raises(VocabularyError, match="expected one utterance, got 2"):
        hand_vocabulary(1).token_ids(Codes(torch.zeros(2, 1, 3, dtype=torch.long), lengths=torch.tensor([3, 1])))


@pytest.mark.parametrize("codes", [[[0, 16], [0, 0]], [[0, 0], [0, 16]], [[-1, 0], [0, 0]]])
def test_codes_outside_the_codebook_are_refused(codes: list[list[int]]) -> None:
    with pytest.raises(VocabularyError, match=r"codes must be 0\.\.15, got"):
        hand_vocabulary().token_ids(torch.tensor(codes))


@pytest.mark.parametrize("shape", [(1, 4), (4,), (1, 2, 4)])
def test_codes_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(VocabularyError, match=r"expected codes \[2, T\], got"):
        hand_vocabulary().token_ids(torch.zeros(shape, dtype=torch.long))


@models
@pytest.mark.parametrize("layers", [1, 2])
def test_ids_by_arithmetic_are_those_of_the_token_strings(
    make_qwen2: MakeQwen2, text_tokenizer, small_codec: SpeechCodec, kind: dict, layers: int
) -> None:
    texts = len(text_tokenizer)
    vocabulary = extend_vocabulary(make_qwen2(text_tokenizer, **kind), text_tokenizer, small_codec, layers)
    codes = torch.randint(K, (2, 7), generator=torch.Generator().manual_seed(0))
    numbers = [layer * K + int(codes[layer, frame]) for frame in range(7) for layer in range(layers)]
    words = ["<|audio_start|>", *(f"<|audio_{number}|>" for number in numbers), "<|audio_end|>"]
    expected = text_tokenizer.convert_tokens_to_ids(words)
    assert vocabulary.token_ids(codes).tolist() == expected
    assert text_tokenizer("".join(words), add_special_tokens=False)["input_ids"] == expected
    assert vocabulary.offset == texts
    assert vocabulary.new_ids.tolist() == list(range(texts, texts + layers * K + 2))


@pytest.mark.parametrize("place", ["", "Transcribe this speech", "TURN ON ", "e\u0301", "日本語", "\n"])
def test_an_audio_token_is_one_id_in_any_context(
    make_qwen2: MakeQwen2, text_tokenizer, small_codec: SpeechCodec, place: str
) -> None:
    vocabulary = extend_vocabulary(make_qwen2(text_tokenizer), text_tokenizer, small_codec, 2)
    text = text_tokenizer(place, add_special_tokens=False)["input_ids"]
    found = text_tokenizer(f"{place}<|audio_17|>{place}", add_special_tokens=False)["input_ids"]
    assert found == [*text, vocabulary.offset + 17, *text]


# ---- rows


@models
@pytest.mark.parametrize("init", ["codebook", "random", "mean"])
def test_every_new_row_is_initialised_and_text_rows_are_bit_identical(
    make_qwen2: MakeQwen2, text_tokenizer, small_codec: SpeechCodec, kind: dict, init: str
) -> None:
    model, texts = make_qwen2(text_tokenizer, **kind), len(text_tokenizer)
    for matrix in matrices(model):
        matrix[texts:] = UNTOUCHED
    before = [matrix.clone() for matrix in matrices(model)]
    vocabulary = extend_vocabulary(model, text_tokenizer, small_codec, 2, init)
    assert vocabulary.size == len(matrices(model)[0]) == max(texts + kind["spare"], texts + 34)
    assert model.config.vocab_size == vocabulary.size
    for old, new in zip(before, matrices(model), strict=True):
        assert torch.equal(new[:texts], old[:texts])
        rows = new[vocabulary.new_ids]
        assert (rows.abs() < 10).all() and (rows != 0).any(1).all()
        assert len(rows.unique(dim=0)) == (1 if init == "mean" else 34)
        if init == "mean":
            torch.testing.assert_close(rows[0], old[:texts].mean(0))


@models
def test_tied_matrices_stay_tied_and_untied_ones_untied(
    make_qwen2: MakeQwen2, text_tokenizer, small_codec: SpeechCodec, kind: dict
) -> None:
    model = make_qwen2(text_tokenizer, **kind)
    extend_vocabulary(model, text_tokenizer, small_codec)
    first, second = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (first is second) is kind["tied"]
    assert first.shape == second.shape


@models
def test_the_logits_of_text_are_bit_identical(
    make_qwen2: MakeQwen2, text_tokenizer, small_codec: SpeechCodec, kind: dict
) -> None:
    model, texts = make_qwen2(text_tokenizer, **kind), len(text_tokenizer)
    ids = torch.tensor([text_tokenizer("TURN ON THE BLUE LAMP")["input_ids"]])

    def text_logits() -> tuple[Tensor, Tensor]:
        """Of the model, and of its head cut to the text: a larger product may be summed in another order."""
        hidden = model.get_decoder()(ids).last_hidden_state
        return model(ids).logits[..., :texts], hidden @ matrices(model)[1][:texts].T

    with torch.no_grad():
        logits, exact = text_logits()
        extend_vocabulary(model, text_tokenizer, small_codec, 2)
        logits_after, exact_after = text_logits()
    assert torch.equal(exact_after, exact)
    torch.testing.assert_close(logits_after, logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_codebook_rows_have_the_mean_and_spread_of_the_text_rows(
    make_qwen2: MakeQwen2, text_tokenizer, small_codec: SpeechCodec, tied: bool
) -> None:
    model, texts = make_qwen2(text_tokenizer, tied=tied), len(text_tokenizer)
    vocabulary = extend_vocabulary(model, text_tokenizer, small_codec, 2, "codebook")
    for matrix in matrices(model):
        codes = matrix[vocabulary.new_ids[:-2]]
        torch.testing.assert_close(codes.mean(0), matrix[:texts].mean(0), atol=1e-5, rtol=0)
        torch.testing.assert_close(codes.std(0), matrix[:texts].std(0), atol=1e-5, rtol=1e-5)


def test_random_rows_have_about_the_mean_and_spread_of_the_text_rows(
    make_qwen2: MakeQwen2, text_tokenizer, small_codec: SpeechCodec
) -> None:
    model, texts = make_qwen2(text_tokenizer), len(text_tokenizer)
    matrix = model.get_input_embeddings().weight.data
    matrix *= torch.linspace(0.1, 3, 16)
    matrix += torch.arange(16.0)
    vocabulary = extend_vocabulary(model, text_tokenizer, small_codec, 2, "random")
    matrix = model.get_input_embeddings().weight.data
    standard = (matrix[vocabulary.new_ids] - matrix[:texts].mean(0)) / matrix[:texts].std(0)
    assert abs(float(standard.mean())) < 0.2 and abs(float(standard.std()) - 1) < 0.2  # 544 draws: 4 standard errors


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dimension, likeness", [(8, 0.95), (24, 0.6)], ids=["narrower", "wider"])
def test_similar_codes_start_similar_with_codebook_rows_and_only_with_those(
    make_qwen2: MakeQwen2, make_text_tokenizer: Callable, dimension: int, likeness: float, tied: bool
) -> None:
    torch.manual_seed(0)  # code vectors narrower and wider than the model, which is 16 wide
    codec = SpeechCodec(SpeechCodecConfig(n_filters=4, dimension=dimension, num_codebooks=1, codebook_size=64))
    sounds = centred_cosines(codec.codebooks[0])
    for init, low, high in (("codebook", likeness, 1.0), ("random", -0.1, 0.1)):
        text_tokenizer = make_text_tokenizer()
        model = make_qwen2(text_tokenizer, tied=tied)
        vocabulary = extend_vocabulary(model, text_tokenizer, codec, init=init)
        for matrix in matrices(model):
            text_spread = matrix[: vocabulary.offset].std(0)
            assert low < correlation(sounds, centred_cosines(matrix[vocabulary.new_ids[:-2]] / text_spread)) < high


@pytest.mark.parametrize("tied", [True, False])
def test_codes_begin_as_the_letters_that_they_stand_for(
    make_qwen2: MakeQwen2, make_text_tokenizer: Callable, small_codec: SpeechCodec, tied: bool
) -> None:
    shares = torch.softmax(torch.randn(K, 3, generator=torch.Generator().manual_seed(0)), 1)
    shares[5] = 0  # nothing is known of this code
    before, after = [], []
    for letters in (None, CodeLetters(["A", "THE", "LAMP"], shares)):
        text_tokenizer = make_text_tokenizer()
        model = make_qwen2(text_tokenizer, tied=tied)
        before.append([matrix.clone() for matrix in matrices(model)])
        vocabulary = extend_vocabulary(model, text_tokenizer, small_codec, 2, code_letters=letters)
        after.append(matrices(model))
    for old, plain, new in zip(before[1], *after, strict=True):
        assert torch.equal(new[: vocabulary.offset], old)
        labels = [old[text_token_ids(text_tokenizer, [label])[0]].mean(0) for label in ("A", "THE", "LAMP")]
        for code, share in enumerate(shares):
            row = new[vocabulary.offset + code]
            if code != 5:
                expected = sum(part * label for part, label in zip(share, labels, strict=True))
                torch.testing.assert_close(row, expected, rtol=0, atol=1e-5)
        same = [vocabulary.offset + 5, *range(vocabulary.offset + K, vocabulary.end_id + 1)]  # layer 1 and markers, too
        assert torch.equal(new[same], plain[same])


def test_letters_of_other_codes_than_the_codecs_are_refused(
    make_qwen2: MakeQwen2, text_tokenizer, small_codec: SpeechCodec
) -> None:
    letters = CodeLetters(["A"], torch.ones(K + 1, 1))
    with pytest.raises(VocabularyError, match="letters of 17 codes do not fit the codec's 16"):
        extend_vocabulary(make_qwen2(text_tokenizer), text_tokenizer, small_codec, 1, code_letters=letters)


@pytest.mark.parametrize("init", ["codebook", "random"])
def test_rows_are_a_function_of_the_seed(
    make_qwen2: MakeQwen2, make_text_tokenizer: Callable, small_codec: SpeechCodec, init: str
) -> None:
    rows = []
    for seed in (0, 0, 1):
        text_tokenizer = make_text_tokenizer()
        model = make_qwen2(text_tokenizer)
        vocabulary = extend_vocabulary(model, text_tokenizer, small_codec, init=init, seed=seed)
        rows.append(matrices(model)[0][vocabulary.new_ids])
    assert torch.equal(rows[0], rows[1])
    assert not torch.isclose(rows[0], rows[2]).all(1).any()


def test_described_rows_match_a_direct_computation(
    make_qwen2: MakeQwen2, text_tokenizer, small_codec: SpeechCodec
) -> None:
    model, texts = make_qwen2(text_tokenizer, spare=60), len(text_tokenizer)
    vocabulary = extend_vocabulary(model, text_tokenizer, small_codec)
    matrix = matrices(model)[0]
    new = matrix[texts : texts + K + 2]
    pairs = [torch.cosine_similarity(a, b, 0) for i, a in enumerate(new) for j, b in enumerate(new) if i != j]
    found = describe_rows(model, vocabulary)
    assert found["text_row_norm"] == pytest.approx(float(torch.stack([r.norm() for r in matrix[:texts]]).mean()))
    assert found["new_row_norm"] == pytest.approx(float(torch.stack([r.norm() for r in new]).mean()))
    assert found["new_row_cosine"] == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-5)
    assert found["distinct_new_rows"] == K + 2
    matrix[texts + 3] = matrix[texts + 9]
    assert describe_rows(model, vocabulary)["distinct_new_rows"] == K + 1
    matrix[:texts] = matrix[0]  # rows of text do not count
    assert describe_rows(model, vocabulary)["distinct_new_rows"] == K + 1


def test_identical_rows_are_described_as_such(make_qwen2: MakeQwen2, text_tokenizer, small_codec: SpeechCodec) -> None:
    model = make_qwen2(text_tokenizer)
    found = describe_rows(model, extend_vocabulary(model, text_tokenizer, small_codec, init="mean"))
    assert found["distinct_new_rows"] == 1
    assert found["new_row_cosine"] == pytest.approx(1, abs=1e-5)


# ---- what is refused


def test_a_vocabulary_is_extended_once_only(
    make_qwen2: MakeQwen2, text_tokenizer, make_text_tokenizer: Callable, small_codec: SpeechCodec, tmp_path: Path
) -> None:
    model = make_qwen2(text_tokenizer)
    extend_vocabulary(model, text_tokenizer, small_codec)
    before, words = matrices(model)[0].clone(), len(text_tokenizer)
    with pytest.raises(VocabularyError, match="extended only once"):
        extend_vocabulary(model, text_tokenizer, small_codec)
    assert torch.equal(matrices(model)[0], before) and len(text_tokenizer) == words
    model.save_pretrained(tmp_path)  # nor with the text tokenizer of before
    for extended in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        with pytest.raises(VocabularyError, match=f"already reads codes of codec {small_codec.fingerprint}"):
            extend_vocabulary(extended, make_text_tokenizer(), small_codec)
        assert torch.equal(matrices(extended)[0], before)


@pytest.mark.parametrize("taken", [["<|audio_start|>", "<|audio_end|>", "<|audio_pad|>"], ["<|audio_3|>"]])
def test_beside_audio_tokens_of_the_text_tokenizer_ours_have_other_names(
    make_qwen2: MakeQwen2, text_tokenizer, small_codec: SpeechCodec, taken: list[str], tmp_path: Path
) -> None:
    text_tokenizer.add_tokens(taken, special_tokens=True)  # the first three: as Qwen3.5's has them
    model, texts = make_qwen2(text_tokenizer), len(text_tokenizer)
    before = matrices(model)[0].clone()
    vocabulary = extend_vocabulary(model, text_tokenizer, small_codec, 2)
    assert vocabulary.names == "speech" and torch.equal(matrices(model)[0][:texts], before)
    names = [*(f"<|speech_{code}|>" for code in range(32)), "<|speech_start|>", "<|speech_end|>"]
    assert text_tokenizer.convert_tokens_to_ids(names) == vocabulary.new_ids.tolist() == [*range(texts, texts + 34)]
    assert text_tokenizer.convert_tokens_to_ids(taken) == [*range(texts - len(taken), texts)]
    forbidden = forbidden_ids(text_tokenizer, vocabulary)
    assert forbidden[text_tokenizer.convert_tokens_to_ids(taken)].all() and forbidden[vocabulary.new_ids].all()
    vocabulary.save(tmp_path)
    assert AudioVocabulary.load(tmp_path) == vocabulary
    vocabulary.check(model, text_tokenizer, tmp_path)
    with pytest.raises(VocabularyError, match=r"ids of <\|audio_start\|> and"):
        replace(vocabulary, names="audio").check(model, text_tokenizer, tmp_path)
    with pytest.raises(VocabularyError, match=r"ends with <\|speech_end\|>: a vocabulary can be extended only once"):
        extend_vocabulary(make_qwen2(text_tokenizer), text_tokenizer, small_codec)


def test_a_text_tokenizer_that_knows_audio_tokens_of_all_names_is_refused(
    make_qwen2: MakeQwen2, text_tokenizer, small_codec: SpeechCodec
) -> None:
    text_tokenizer.add_tokens(["<|audio_3|>", "<|speech_start|>"], special_tokens=True)
    with pytest.raises(VocabularyError, match="already has some of the audio tokens"):
        extend_vocabulary(make_qwen2(text_tokenizer), text_tokenizer, small_codec)


def test_a_vocabulary_of_an_earlier_version_has_the_first_names(tmp_path: Path) -> None:
    hand_vocabulary().save(tmp_path)
    file = tmp_path / "audio_vocabulary.json"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(',\n  "names": "audio"', ""), encoding="utf-8")
    assert "names" not in file.read_text(encoding="utf-8")
    assert AudioVocabulary.load(tmp_path) == hand_vocabulary()
    file.write_text(text.replace('"names": "audio"', '"names": "song"'), encoding="utf-8")
    with pytest.raises(VocabularyError, match="contradicts itself"):
        AudioVocabulary.load(tmp_path)


@pytest.mark.parametrize("layers", [0, 3, -1])
def test_more_layers_than_the_codec_has_are_refused(
    make_qwen2: MakeQwen2, text_tokenizer, small_codec: SpeechCodec, layers: int
) -> None:
    with pytest.raises(InputError, match=rf"layers must be 1\.\.2, got {layers}"):
        extend_vocabulary(make_qwen2(text_tokenizer), text_tokenizer, small_codec, layers)


def test_an_unknown_init_is_refused(make_qwen2: MakeQwen2, text_tokenizer, small_codec: SpeechCodec) -> None:
    with pytest.raises(VocabularyError, match="init must be .*, got 'mena'"):
        extend_vocabulary(make_qwen2(text_tokenizer), text_tokenizer, small_codec, init="mena")


def test_after_a_refused_init_the_right_one_still_works(
    make_qwen2: MakeQwen2, text_tokenizer, small_codec: SpeechCodec
) -> None:
    model, texts = make_qwen2(text_tokenizer), len(text_tokenizer)
    with pytest.raises(VocabularyError):
        extend_vocabulary(model, text_tokenizer, small_codec, init="mena")
    assert extend_vocabulary(model, text_tokenizer, small_codec, init="mean").offset == texts


def test_codes_of_another_codec_or_too_few_layers_do_not_fit(
    make_qwen2: MakeQwen2, text_tokenizer, small_codec: SpeechCodec, other_codec: SpeechCodec
) -> None:
    vocabulary = extend_vocabulary(make_qwen2(text_tokenizer), text_tokenizer, small_codec, 2)
    vocabulary.require(Encoding.of(small_codec))
    with pytest.raises(DataError, match=f"{other_codec.fingerprint}.*{small_codec.fingerprint}"):
        vocabulary.require(Encoding.of(other_codec))
    with pytest.raises(DataError, match="have 1 layer.*needs 2"):
        vocabulary.require(Encoding.of(small_codec, 1))


def test_a_saved_vocabulary_is_loaded_equal(
    tmp_path, make_qwen2: MakeQwen2, text_tokenizer, small_codec: SpeechCodec
) -> None:
    vocabulary = extend_vocabulary(make_qwen2(text_tokenizer, spare=60), text_tokenizer, small_codec, 2)
    vocabulary.save(tmp_path)
    assert AudioVocabulary.load(tmp_path) == vocabulary
    with pytest.raises(VocabularyError, match="has no audio_vocabulary.json"):
        AudioVocabulary.load(tmp_path / "elsewhere")


# ---- neighbours


def test_neighbours_are_the_closest_other_codes_of_the_same_layer(small_codec: SpeechCodec) -> None:
    vocabulary = hand_vocabulary()
    found = vocabulary.neighbours(small_codec.codebooks, count=3)
    assert found.shape == (vocabulary.size, 3)
    for layer in range(2):
        vectors = small_codec.codebooks[layer]
        for code in range(K):
            others = sorted((float((vectors[code] - vectors[i]).norm()), i) for i in range(K) if i != code)
            assert found[100 + layer * K + code].tolist() == [100 + layer * K + i for _, i in others[:3]]


def test_other_tokens_are_their_own_neighbours(small_codec: SpeechCodec) -> None:
    vocabulary = hand_vocabulary()
    found = vocabulary.neighbours(small_codec.codebooks)
    for token in (*range(100), vocabulary.start_id, vocabulary.end_id):
        assert set(found[token].tolist()) == {token}


@pytest.mark.parametrize("size", [2, 8])
def test_small_codebooks_have_neighbours_too(size: int) -> None:
    vocabulary = AudioVocabulary(Encoding("f" * 16, 16_000, 50.0, 1, size), 100, 100 + size, 101 + size, 102 + size)
    found = vocabulary.neighbours(torch.randn(1, size, 4, generator=torch.Generator().manual_seed(0)))
    for code in range(size):
        assert 100 + code not in found[100 + code]
        assert set(found[100 + code].tolist()) <= set(range(100, 100 + size))


# ---- text stays text


@pytest.mark.parametrize(
    "text",
    ["<|audio_5|>", "<|im_end|>", "<|im_start|>", "a <|audio_start|><|audio_5|><|audio_end|> b", "<|endoftext|>"],
)
def test_text_never_becomes_special_tokens(
    make_qwen2: MakeQwen2, text_tokenizer, small_codec: SpeechCodec, text: str
) -> None:
    vocabulary = extend_vocabulary(make_qwen2(text_tokenizer), text_tokenizer, small_codec)
    ids = text_token_ids(text_tokenizer, [text])[0]
    special = {i for i, token in text_tokenizer.added_tokens_decoder.items() if token.special}
    assert max(ids) < vocabulary.offset and not special & set(ids)
    assert text_tokenizer.decode(ids, skip_special_tokens=True) == text


TEXTS = [
    "TURN ON",
    "",
    " ",
    "\n",
    "😀 👩‍👩‍👧",
    "مرحبا بالعالم",
    "e\u0301 o\u0308\u0304",
    "日本語",
    "\u200b",
    "a\tb  c",
    "\x00",
    "a\x00b",
    "'s 12345",
    "\r\n",
    "\u0301",
    "\ufeffa\u00ad",
    "\u202eabc\u202c עברית",
    "हिन्दी क्षत्रिय ไทย",
    "🏳️‍🌈 🇩🇪 \U0010ffff",
    "ﬁ Å ①",
]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_restored_from_their_ids(
    make_qwen2: MakeQwen2, text_tokenizer, small_codec: SpeechCodec, text: str
) -> None:
    vocabulary = extend_vocabulary(make_qwen2(text_tokenizer), text_tokenizer, small_codec)
    ids = text_token_ids(text_tokenizer, [text, "x"])
    assert text_tokenizer.decode(ids[0]) == unicodedata.normalize("NFC", text)  # as Qwen2 reads it
    assert ids[1] == text_token_ids(text_tokenizer, ["x"])[0]
    example = transcription_example(torch.zeros(1, 3, dtype=torch.long), text, vocabulary, text_tokenizer)
    learnt = example.labels[example.labels >= 0].tolist()
    assert learnt == [*ids[0], text_tokenizer.eos_token_id]


def test_no_texts_have_no_ids(text_tokenizer) -> None:
    assert text_token_ids(text_tokenizer, []) == []
