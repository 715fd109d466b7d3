"""Examples in one row against the same examples alone, and how a batch is cut into parts."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from speechllm import Example, LabelledLoss, SpeechCodec, SpeechLLM, extend_vocabulary, transcription_example
from speechllm.data import packing
from speechllm.data.packing import PACKED, micro_batches, pack, pad, unlabelled
from speechllm.messages import ConversationWriter
from speechllm.prompt import conversation_example, sentence

pytestmark = pytest.mark.numeric

MakeSpeechLLM = Callable[..., SpeechLLM]


def some_examples(speech_llm: SpeechLLM, *frames: int, learn_speech: bool = False) -> list[Example]:
    """Transcription examples of so many frames, and a sentence alone."""
    generator = torch.Generator().manual_seed(1)
    parts = speech_llm.vocabulary, speech_llm.text_tokenizer
    texts = ["TURN ON", "", "OPEN THE BLUE DOOR", "CALL ANNA"]
    examples = [
        transcription_example(
            torch.randint(16, (2, count), generator=generator), texts[i % 4], *parts, learn_speech=learn_speech
        )
        for i, count in enumerate(frames)
    ]
    return [*examples, conversation_example(sentence("ON MONDAY"), ConversationWriter(*parts))]


def examples_of(*lengths: int) -> list[Example]:
    return [Example(torch.arange(length), torch.arange(length)) for length in lengths]


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


# ---- one row


def test_examples_are_concatenated_without_labels_across_borders() -> None:
    first = Example(torch.tensor([5, 6, 7]), torch.tensor([-100, 6, 7]))
    second = Example(torch.tensor([8, 9]), torch.tensor([8, 9]))  # its first label must not be the last one's target
    packed = pack([first, second])
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert packed.targets.tolist() == [6, 7, -100, 9, -100]
    assert packed.arguments["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert packed.arguments["cu_seq_lens_q"].tolist() == packed.arguments["cu_seq_lens_k"].tolist() == [0, 3, 5]
    assert packed.arguments["max_length_q"] == packed.arguments["max_length_k"] == 3


def test_padded_examples_are_rows_without_labels_beyond_their_ends() -> None:
    padded = pad([Example(torch.tensor([5, 6, 7]), torch.tensor([-100, 6, 7])), Example(*torch.tensor([[8, 9]] * 2))])
    assert padded.input_ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert padded.targets.tolist() == [6, 7, -100, 9, -100, -100]
    assert padded.arguments["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_are_sums_over_single_examples(
    make_speech_llm: MakeSpeechLLM, tied: bool, checkpointing: bool
) -> None:
    speech_llm = make_speech_llm(layers=2, tied=tied)
    examples = some_examples(speech_llm, 9, 2, 30, 5, learn_speech=True)
    model = speech_llm.model.train()
    # the reference is transformers' own loss and attention, one unpadded example at a time
    reference = torch.zeros(())
    for example in examples:
        labels = torch.where(example.labels < speech_llm.vocabulary.offset, example.labels, -100)
        count = int((labels[1:] >= 0).sum())
        reference = reference + model(input_ids=example.input_ids[None], labels=labels[None]).loss * count
    reference.backward()
    expected = gradients(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = LabelledLoss(model, speech_llm.vocabulary)(examples)[0]
    loss.backward()
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=0)
    for name, found in gradients(model).items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-5 * scale, msg=name)
        assert scale > 0


def test_examples_do_not_attend_to_each_other(make_speech_llm: MakeSpeechLLM) -> None:
    speech_llm = make_speech_llm(layers=2)
    first, second, third = some_examples(speech_llm, 9, 12)
    loss_of = LabelledLoss(speech_llm.model, speech_llm.vocabulary)
    silent = Example(second.input_ids, torch.full_like(second.labels, -100))
    others = Example(silent.input_ids.flip(0), silent.labels)
    with torch.no_grad():
        alone = loss_of([first, third])
        for between in (silent, others):
            torch.testing.assert_close(loss_of([first, between, third]), alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize("window", [None, 4, 9])
def test_one_attention_call_equals_one_per_example(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    """On a GPU. Here in the place of its kernel stands what that is documented to compute."""

    def varlen(q, k, v, starts, ends, longest, longest_key, *, scale, window_size) -> Tensor:
        assert (
            window_size == (3 if window == 4 else -1, 0) and longest == longest_key == 9 and torch.equal(starts, ends)
        )
        parts = []
        for first, last in zip(starts[:-1], starts[1:], strict=True):
            weights = torch.einsum("shd,thd->hst", q[first:last], k[first:last]) * scale
            future = ~torch.ones_like(weights).bool().tril().triu(-window_size[0] if window_size[0] >= 0 else -99)
            parts.append(
                torch.einsum("hst,thd->shd", weights.masked_fill(future, -torch.inf).softmax(-1), v[first:last])
            )
        return torch.cat(parts)

    borders = torch.tensor([0, 4, 13, 14], dtype=torch.int32)
    query, key, value = (torch.randn(1, heads, 14, 8) for heads in (6, 2, 2))
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True, training=False)
    settings = {"scaling": 0.3, "sliding_window": window}
    expected, _ = packing.packed_attention(module, query, key, value, None, borders, 9, **settings)
    monkeypatch.setattr(packing, "varlen_attn", varlen)
    found = packing._attend_at_once(query, key, value, 9, borders, 0.3, torch.float32, window or 9)
    torch.testing.assert_close(found, expected)


def test_the_variable_length_kernel_gets_its_arguments() -> None:
    with FakeTensorMode():
        query, key, value = (torch.empty(1, heads, 14, 8, device="cuda") for heads in (6, 2, 2))
        borders = torch.tensor([0, 4, 13, 14], dtype=torch.int32, device="cuda")
        attended = packing._attend_at_once(query, key, value, 9, borders, 0.3, torch.bfloat16, 4)
        assert attended.shape == (1, 14, 6, 8) and attended.dtype == torch.bfloat16


def test_transformers_own_mask_gives_the_same_result(make_speech_llm: MakeSpeechLLM) -> None:
    """It is exact as well, without a cache; a cache, which is transformers' default, silently switches it off."""
    speech_llm = make_speech_llm(layers=2)
    examples = some_examples(speech_llm, 9, 2, 30)
    packed, model = pack(examples), speech_llm.model
    with torch.no_grad():
        ours = LabelledLoss(model, speech_llm.vocabulary)(examples)[0]
        model.set_attn_implementation("sdpa")
        positions = packed.arguments["position_ids"]
        hidden = model.model(packed.input_ids, position_ids=positions, use_cache=False).last_hidden_state[0]
        learnt = packed.targets >= 0
        logits = model.lm_head(hidden[learnt])
        theirs = torch.nn.functional.cross_entropy(logits, packed.targets[learnt], reduction="sum")
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=0)


def test_generation_with_padding_works_after_packed_training(make_speech_llm: MakeSpeechLLM) -> None:
    speech_llm = make_speech_llm()
    prompts = torch.tensor([[0, 0, 5, 6, 7], [9, 8, 7, 6, 5]])
    inputs = {"input_ids": prompts, "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1] * 5])}
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    before = speech_llm.model.generate(**inputs, **settings)
    LabelledLoss(speech_llm.model, speech_llm.vocabulary)
    assert speech_llm.model.config._attn_implementation == PACKED
    assert torch.equal(speech_llm.model.generate(**inputs, **settings), before)


@pytest.mark.parametrize("packing", [True, False])
def test_a_window_shorter_than_an_example_is_that_of_the_plain_model(
    make_language_model: Callable, text_tokenizer: object, small_codec: SpeechCodec, packing: bool
) -> None:
    model = make_language_model("Mistral", text_tokenizer, sliding_window=20)
    speech_llm = SpeechLLM(model, text_tokenizer, extend_vocabulary(model, text_tokenizer, small_codec, 2))
    examples = some_examples(speech_llm, 9, 2, 30, learn_speech=True)
    loss_of = LabelledLoss(model, speech_llm.vocabulary, packing)
    assert loss_of.packing is packing and max(map(len, examples)) > 60
    with torch.no_grad():
        expected = sum(loss_of.alone(example) for example in examples)
        torch.testing.assert_close(loss_of(examples), expected, rtol=1e-5, atol=0)
        model.config.sliding_window = None
        unlimited = LabelledLoss(type(model)(model.config).eval(), speech_llm.vocabulary)
        unlimited.model.load_state_dict(model.state_dict())
        assert (unlimited(examples) - expected).abs().min() > 1e-2


# ---- parts of a batch


@pytest.mark.parametrize("tokens, processes", [(1000, 1), (100, 1), (30, 1), (1, 1), (100, 2), (30, 3), (1, 2)])
def test_micro_batches_of_all_processes_form_the_batch_and_are_balanced(tokens: int, processes: int) -> None:
    batch = [40, 10, 25, 30, 5, 20, 35, 15, 10, 10]
    shares = [micro_batches(batch, tokens, process, processes) for process in range(processes)]
    parts = [part for share in shares for part in share]
    assert sorted(sum(parts, [])) == [*range(len(batch))]
    assert len({len(share) for share in shares}) == 1
    assert len(parts) == processes * -(-200 // (processes * tokens))
    # the longest example first, each to the smallest part: at most a third above what is possible (Graham 1969)
    assert max(sum(batch[i] for i in part) for part in parts) <= 4 / 3 * max(40, 200 / len(parts))


def test_a_process_without_an_example_gets_one_without_labels(make_speech_llm: MakeSpeechLLM) -> None:
    speech_llm = make_speech_llm()
    assert [micro_batches([9], 1000, process, 2) for process in (0, 1)] == [[[0]], [[]]]
    loss_of = LabelledLoss(speech_llm.model, speech_llm.vocabulary)
    loss = loss_of([unlabelled(some_examples(speech_llm, 9)[0])]).sum()
    loss.backward()
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(speech_llm.model).values())  # but each has one
