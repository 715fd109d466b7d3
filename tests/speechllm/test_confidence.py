"""The probability of a word: that of its tokens, one after the other."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from speechllm import SpeechLLM, transcribe_codes
from speechllm.confidence import word_confidences
from speechllm.prompt import transcription_prompt
from speechllm.vocabulary import text_token_ids

pytestmark = pytest.mark.numeric


@pytest.fixture
def codes() -> Tensor:
    return torch.randint(16, (1, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_word_has_the_product_of_its_tokens_probabilities(
    make_speech_llm: Callable[..., SpeechLLM], codes: Tensor
) -> None:
    speech_llm, text = make_speech_llm(), "TURN ON  THE lamp"
    ids = transcription_prompt(codes, speech_llm.vocabulary, speech_llm.text_tokenizer).input_ids
    answer = text_token_ids(speech_llm.text_tokenizer, [text])[0]
    pieces = [speech_llm.text_tokenizer.decode([token]) for token in answer]
    assert "".join(pieces) == text and len(pieces) > 5
    expected, word = [], -1
    before = " "
    for token, piece in zip(answer, pieces, strict=True):  # one step at a time
        share = speech_llm.model(input_ids=ids[None]).logits[0, -1].softmax(-1)[token]
        if before.isspace() and not piece.isspace() or piece[0].isspace() and piece.strip():
            word += 1
            expected.append(1.0)
        expected[word] *= float(share)
        ids, before = torch.cat([ids, torch.tensor([token])]), piece[-1]
    found = word_confidences(codes, text, speech_llm)
    assert [word for word, _ in found] == text.split()
    within = {"TURN": 0, "lamp": 3}  # whose borders are those of tokens, whatever becomes of the double space
    for word, place in within.items():
        assert dict(found)[word] == pytest.approx(expected[place], rel=1e-3)


def test_shares_are_shares_and_no_text_has_none(make_speech_llm: Callable[..., SpeechLLM], codes: Tensor) -> None:
    speech_llm = make_speech_llm()
    (text,) = transcribe_codes([codes], speech_llm)
    found = word_confidences(codes, text, speech_llm)
    assert [word for word, _ in found] == text.split() and all(0 <= share <= 1 for _, share in found)
    assert word_confidences(codes, "", speech_llm) == []
