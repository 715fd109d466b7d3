"""Joint decoding: CTC prefix scores against every alignment one by one, and answers that are what was heard."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from speechllm import DataError, InputError, SpeechCodec, SpeechLLM, decoding, extend_vocabulary, load_speech_llm, merge
from speechllm.decoding import forbidden_ids, heard_letters, recognize
from speechllm.letters import MISSED, HeardLetters, Prefixes, Spellings
from speechllm.serving.engine import Engine
from tokenizer.schemes.compressor import CtcCompressor

LABELS = ["", " ", "a", "b", "c", "d", "e", "x"]
pytestmark = pytest.mark.numeric


def vectors(*letters: str, chance: float = 0.9, width: int = 64) -> Tensor:
    """What a compressor returns that hears these letters with this probability, all others alike."""
    probabilities = torch.full((len(letters), len(LABELS)), (1 - chance) / (len(LABELS) - 1))
    for row, letter in zip(probabilities, letters, strict=True):
        row[LABELS.index(letter)] = chance
    return torch.cat([torch.zeros(len(letters), width), probabilities], 1)


def collapse(path: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(label for label, _ in itertools.groupby(path) if label)


@pytest.fixture
def heard() -> HeardLetters:
    torch.manual_seed(0)
    return HeardLetters(torch.rand(2, 3).softmax(1), 3)  # five frames


def test_prefix_scores_are_sums_over_all_alignments(heard: HeardLetters) -> None:
    frames = heard.frames.exp()
    assert frames.shape == (5, 3)
    chances = {
        path: math.prod(float(frames[t, k]) for t, k in enumerate(path))
        for path in itertools.product(range(3), repeat=5)
    }
    for size in range(4):
        for text in itertools.product((1, 2), repeat=size):
            prefix = heard.prefix(text)
            whole = sum(chance for path, chance in chances.items() if collapse(path) == text)
            if size:
                assert float(prefix.begun) == pytest.approx(math.log(_first(frames, text)), abs=1e-9)
            assert float(heard.end(prefix) + prefix.begun) == pytest.approx(math.log(whole), abs=1e-9)
            for letter, found in enumerate(heard.next_letters(prefix)[0].tolist()):
                if letter:
                    assert found == pytest.approx(float(heard.prefix((*text, letter)).begun))


def _first(frames: Tensor, text: tuple[int, ...]) -> float:
    """Chance that the frames up to the one in which a text's last letter begins spell it."""
    found = 0.0
    for end in range(1, len(frames) + 1):
        for path in itertools.product(range(frames.shape[1]), repeat=end):
            if collapse(path) == text and collapse(path[:-1]) == text[:-1]:
                found += math.prod(float(frames[t, k]) for t, k in enumerate(path))
    return found


def test_the_whole_is_what_ctc_says() -> None:
    heard = HeardLetters(vectors(*"abba x"), len(LABELS))
    for text in ("abba x", "aba", "ab c", "x"):
        letters = tuple(map(LABELS.index, text))
        size = torch.tensor([len(heard.frames)])
        loss = F.ctc_loss(
            heard.frames[:, None], torch.tensor([letters]), size, torch.tensor([len(letters)]), reduction="sum"
        )
        prefix = heard.prefix(letters)
        assert float(heard.end(prefix) + prefix.begun) == pytest.approx(-float(loss), abs=1e-6)


def test_what_was_missed_can_be_put_in_at_a_price() -> None:
    heard = HeardLetters(vectors("a", "c", chance=1.0), len(LABELS))
    prices = [float(heard.end(p) + p.begun) for p in (heard.prefix(tuple(map(LABELS.index, t))) for t in ("ac", "abc"))]
    missed, silent = MISSED / (len(LABELS) - 1), 1 - MISSED
    sides = 2 * math.log(silent + missed)  # blank, or the letter beside it once more
    assert prices == pytest.approx([sides + math.log(silent + 2 * missed), sides + math.log(missed)], abs=1e-3)


@pytest.fixture
def spellings(make_speech_llm: Callable[..., SpeechLLM]) -> Spellings:
    speech_llm = make_speech_llm()
    return Spellings(speech_llm.text_tokenizer, LABELS, forbidden_ids(speech_llm.text_tokenizer, speech_llm.vocabulary))


def test_every_token_gets_the_scores_of_its_letters(spellings: Spellings) -> None:
    heard = HeardLetters(vectors(*"ab xa", chance=0.6), len(LABELS))
    texts = [(), (2,), (2, 3)]
    prefixes = Prefixes(*map(torch.cat, zip(*map(heard.prefix, texts), strict=True)))
    found = spellings.scores(heard, prefixes)
    assert found.shape == (3, len(spellings.tokens)) and len(spellings.tokens) > 5
    for row, text in zip(found, texts, strict=True):
        for token, score in zip(spellings.tokens.tolist(), row.tolist(), strict=True):
            added = spellings.letters[token]
            added = added[1:] if not text and added[0] == spellings.space else added  # unspoken
            if not added:
                continue
            expected = float(heard.prefix((*text, *added)).begun - heard.prefix(text).begun)
            assert score == pytest.approx(expected, abs=1e-6) if expected > -9.9 else score < -9.8
    assert spellings.of([]) == ()


def test_a_space_belongs_to_its_token_in_families_that_write_it_another_way() -> None:
    """As Llama's: "▁" stands for a space, which is dropped where a text begins."""
    words = ["<unk>", "</s>", "▁", "a", "b", "▁a", "▁ab", "B"]
    inner = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [("▁", "a"), ("▁a", "b")], unk_token="<unk>")
    )
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    family = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
    spellings = Spellings(family, LABELS, torch.tensor([True, True, *[False] * 6]))
    found = {words[token]: "".join(LABELS[i] for i in letters) for token, letters in spellings.letters.items()}
    assert found == {"▁": " ", "a": "a", "b": "b", "▁a": " a", "▁ab": " ab"}
    assert spellings.of([6, 5]) == tuple(map(LABELS.index, "ab a"))
    with pytest.raises(InputError, match="no token of this language model"):
        Spellings(family, ["", "z"], torch.tensor([True, True, *[False] * 6]))


@pytest.fixture
def speech_llm(small_codec: SpeechCodec, make_qwen2: Callable[..., nn.Module], text_tokenizer: object) -> SpeechLLM:
    """Reads a compressor; its language model finds all tokens equally likely."""
    compressor = CtcCompressor(small_codec, LABELS, width=64, depth=1).eval()
    model = make_qwen2(text_tokenizer)
    vocabulary = extend_vocabulary(model, text_tokenizer, compressor)
    nn.init.zeros_(model.lm_head.weight)
    return SpeechLLM(model.eval(), text_tokenizer, vocabulary, compressor)


@pytest.mark.parametrize("beams", [1, 3])
def test_without_an_opinion_of_its_own_the_model_writes_what_was_heard(speech_llm: SpeechLLM, beams: int) -> None:
    speech = [vectors(*"abxe"), vectors(*"d"), vectors(*"aab cde")]
    options = {"beams": beams, "letters_weight": 5.0, "durations_s": [1.0, 1.0, 1.0]}
    found = [one.text for one in recognize(speech, speech_llm, **options)]
    assert found == ["abxe", "d", "aab cde"]
    for one, text in zip(speech, found, strict=True):  # in a batch as alone
        assert recognize([one], speech_llm, **options | {"durations_s": [1.0]})[0].text == text


def test_a_runaway_is_decoded_again_with_its_own_letters(speech_llm: SpeechLLM) -> None:
    speech = [vectors(*"abxe"), vectors(*"ab" * 30)]
    found = recognize(speech, speech_llm, fallback=True, letters_weight=5.0, durations_s=[1.0, 5.0])
    assert found[0].text == "abxe" and found[1].repaired and found[1].text.startswith("ababab")


def test_beams_are_compared_by_the_sum_of_log_probabilities(speech_llm: SpeechLLM) -> None:
    """Their mean would prefer the longer answer: the model finds each token as unlikely as the end."""
    (found,) = recognize([vectors(*"ab")], speech_llm, beams=12, letters_weight=1.0, durations_s=[1.0])
    assert found.text == ""


def test_the_weight_decides_between_model_and_letters(speech_llm: SpeechLLM) -> None:
    head = speech_llm.model.lm_head
    speech_llm.model.lm_head = nn.Linear(head.in_features, head.out_features)
    with torch.no_grad():
        speech_llm.model.lm_head.weight.zero_()
        speech_llm.model.lm_head.bias.zero_()
        speech_llm.model.lm_head.bias[speech_llm.text_tokenizer.convert_tokens_to_ids("x")] = 6.0
    heard = vectors(*"abe", chance=0.5)
    texts = [
        recognize([heard], speech_llm, beams=2, letters_weight=weight, durations_s=[1.0])[0].text
        for weight in (10.0, 0.01)
    ]
    assert texts[0] == "abe" and "x" in texts[1]


def test_speech_without_letters_is_refused(make_speech_llm: Callable[..., SpeechLLM]) -> None:
    without, message = make_speech_llm(), "letters_weight needs a language model that reads the vectors of a compressor"
    with pytest.raises(InputError, match=message):
        recognize([torch.zeros(1, 4, dtype=torch.long)], without, letters_weight=0.5)
    with pytest.raises(InputError, match=message):
        Engine(without, letters_weight=0.5)


def test_codes_are_decoded_with_the_letters_that_a_compressor_finds_in_them(
    make_speech_llm: Callable[..., SpeechLLM], small_codec: SpeechCodec, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    compressor = CtcCompressor(small_codec, LABELS, width=64, depth=1, layers=1).eval()
    with torch.no_grad():
        compressor.network.output.weight.mul_(40)  # hears something
    words = make_speech_llm(tied=False)
    nn.init.zeros_(words.model.lm_head.weight)  # has no opinion of its own
    words.save(tmp_path / "words")
    compressor.save_pretrained(tmp_path / "letters")
    words = load_speech_llm(tmp_path / "words", letters=tmp_path / "letters")
    codes = [torch.randint(16, (1, frames), generator=torch.Generator().manual_seed(frames)) for frames in (30, 12)]
    heard = heard_letters(codes, words, 5.0)
    assert [*heard.labels] == LABELS
    for one, vectors_of_it in zip(codes, heard.heard, strict=True):
        assert torch.equal(vectors_of_it, compressor.recode(one))
    options = {"beams": 2, "letters_weight": 5.0}
    found = [recognize([one], words, durations_s=[1.0], **options)[0].text for one in codes]
    spelled = [compressor.text(compressor.label_speech(one)[1]).strip() for one in codes]
    assert found == spelled and all(spelled)
    assert [one.text for one in recognize(codes, words, durations_s=[1.0, 1.0], **options)] == found
    assert merge(words).letters is words.letters
    CtcCompressor(small_codec, LABELS, width=64, depth=1).save_pretrained(tmp_path / "two")
    with pytest.raises(DataError, match=r"reads 2 layers of codes, not 1: train a compressor with layers=1"):
        load_speech_llm(tmp_path / "words", letters=tmp_path / "two")
    CtcCompressor(compressor, LABELS, width=64, depth=1).save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match="codes of different codecs mean different sounds"):
        load_speech_llm(tmp_path / "words", letters=tmp_path / "other")


def test_what_answers_many_callers_decodes_as_it_is_told(speech_llm: SpeechLLM) -> None:
    speech = [vectors(*"abxe"), vectors(*"aab cde")]
    engine = Engine(speech_llm, beams=3, letters_weight=5.0)
    found = [engine.recognize(one, 1.0).result(60).text for one in speech]
    engine.close()
    assert found == ["abxe", "aab cde"]


def test_the_spellings_of_a_model_are_looked_up_once(speech_llm: SpeechLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"letters_weight": 5.0, "durations_s": [1.0]}
    first = recognize([vectors(*"abxe")], speech_llm, **options)
    monkeypatch.setattr(decoding, "Spellings", None)
    assert recognize([vectors(*"abxe")], speech_llm, **options) == first
