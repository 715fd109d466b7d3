"""Swapping layers between the codes of two speakers: the origin of each code, by hand and with a codec."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from speechllm import Codes, InputError, SpeechCodec, convert_voice, load_audio, load_codec, save_audio, swap_layers
from speechllm.cli.main import main
from tokenizer.metrics import conversion

RATE = 16_000
BOOKS = torch.tensor([[0.0], [1.0], [3.0], [10.0]]).expand(3, 4, 1)  # code vectors of one dimension
SOURCE = [[0, 1, 2, 3, 1], [10, 11, 12, 13, 14], [20, 21, 22, 23, 24]]
TARGET = [[2, 0, 3], [50, 51, 52], [60, 61, 62]]
MATCHINGS = pytest.mark.parametrize("matching", ["position", "content"])


def codes(*utterances: list[list[int]]) -> Codes:
    samples = torch.tensor([320 * len(one[0]) - 7 for one in utterances])
    return Codes.from_utterances([torch.tensor(one) for one in utterances], samples)


def swapped(layers: list[int], matching: str, source: list = SOURCE, target: list = TARGET) -> list[list[int]]:
    return swap_layers(codes(source), codes(target), layers, matching, BOOKS).utterance(0).tolist()


def test_by_position_a_short_target_is_repeated_and_a_long_one_cut() -> None:
    assert swapped([1], "position") == [SOURCE[0], [50, 51, 52, 50, 51]]
    assert swapped([1], "position", TARGET, SOURCE) == [TARGET[0], [10, 11, 12]]


def test_by_content_a_frame_takes_from_the_nearest_code_vector() -> None:
    # vectors 0, 1, 3, 10, 1 of the source meet 3, 0, 10 of the target
    assert swapped([1], "content") == [SOURCE[0], [51, 51, 50, 52, 51]]
    assert swapped([0, 1], "content") == [[0, 0, 2, 3, 0], [51, 51, 50, 52, 51]]


def test_among_equal_contents_the_nearest_in_time_is_taken_then_the_earlier() -> None:
    source, target = [[1] * 5, [0] * 5], [[1, 3, 1, 3, 1], [10, 11, 12, 13, 14]]
    assert swapped([1], "content", source, target)[1] == [10, 10, 12, 12, 14]
    between = [[1, 1], [0, 0]], [[2, 0, 0], [10, 11, 12]]  # 1 is nearer to 0 than to 3
    assert swapped([1], "content", *between)[1] == [11, 11]


@pytest.mark.parametrize("layers, depth", [([1], 2), ([2], 3), ([2, 1], 3), ([0], 1)])
def test_layers_behind_the_last_swapped_one_are_skipped(layers: list[int], depth: int) -> None:
    found = swapped(layers, "position")
    assert len(found) == depth
    for layer in range(depth):
        assert found[layer] == ([*TARGET[layer], *TARGET[layer][:2]] if layer in layers else SOURCE[layer])


@MATCHINGS
def test_a_swap_with_itself_changes_nothing(matching: str) -> None:
    found = swap_layers(codes(SOURCE, TARGET), codes(SOURCE, TARGET), [0, 2], matching, BOOKS)
    assert torch.equal(found.ids, codes(SOURCE, TARGET).ids)


@MATCHINGS
def test_every_utterance_of_a_batch_gets_what_it_gets_alone(matching: str) -> None:
    source, target = codes(SOURCE, TARGET), codes(TARGET, SOURCE)
    before = source.ids.clone()
    found = swap_layers(source, target, [1, 2], matching, BOOKS)
    assert found.utterance(0).tolist() == swapped([1, 2], matching)
    assert found.utterance(1).tolist() == swapped([1, 2], matching, TARGET, SOURCE)
    assert not found.ids[1, :, 3:].any() and torch.equal(source.ids, before)
    assert torch.equal(found.lengths, source.lengths) and torch.equal(found.samples, source.samples)


def test_by_mean_a_voice_is_shifted_and_what_is_said_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kinds of content at 0 and 100; the target's layer 1 lies 2 above the source's in the one, 4 in the other."""
    monkeypatch.setattr(conversion, "KINDS", 3)  # with that of the codes that do not occur
    contents = torch.tensor([0.0, 1, 100, 101])[:, None]
    steps = torch.arange(40.0)[:, None]
    books = torch.stack([torch.cat([contents, torch.full((36, 1), 1e4)]), steps])
    source = [[0, 1, 2, 3] * 30, [10, 11, 12, 10] * 30]
    target = [[0, 2] * 50, [12, 16] * 50]
    found = swap_layers(codes(source), codes(target), [1], "mean", books).utterance(0)
    assert found[0].tolist() == source[0]
    # means 10.5 and 11 of the source, 12 and 16 of the target; the shift of 1.5 and 5 counts 1.5 times
    moved = (found[1] - torch.tensor(source[1]))[:4].tolist()
    assert moved[0] in (2, 3) and moved[1] in (2, 3) and moved[2] in (7, 8) and moved[3] in (7, 8)
    assert torch.equal(found[1].view(30, 4), found[1][:4].expand(30, 4))


@pytest.mark.parametrize("matching", ["position", "content", "mean"])
def test_layers_count_once_in_any_order(matching: str) -> None:
    torch.manual_seed(0)
    books = torch.randn(3, 8, 2)
    source, target = (Codes.from_utterances([torch.randint(8, (3, 30))]) for _ in range(2))
    expected = swap_layers(source, target, [1, 2], matching, books).ids
    assert torch.equal(swap_layers(source, target, [2, 1, 2], matching, books).ids, expected)


def test_by_mean_only_where_the_vectors_of_layers_add_up(
    make_codec: Callable[..., SpeechCodec], noise: Callable
) -> None:
    codec = make_codec(codebook_dim=3)
    with pytest.raises(InputError, match="matching mean adds up the vectors of layers"):
        convert_voice(codec, noise(3_200)[0], noise(3_200, seed=1)[0], [1], "mean")
    assert len(convert_voice(codec, noise(3_200)[0], noise(3_200, seed=1)[0], [1], "content")) == 3_200
    assert conversion.matchings_of(make_codec()) == ("position", "content", "mean")


def test_by_mean_a_shift_by_nothing_finds_the_codes_again() -> None:
    books = torch.stack([torch.arange(8.0)[:, None], torch.arange(8.0)[:, None], torch.arange(8.0)[:, None] / 16])
    source = codes([[0, 3, 7], [1, 5, 2], [4, 0, 7]], [[1, 1, 2, 5], [0, 7, 3, 3], [1, 2, 3, 4]])
    assert torch.equal(swap_layers(source, source, [1, 2], "mean", books).ids, source.ids)


def test_by_mean_layer_0_may_have_a_space_of_its_own(make_codec: Callable[..., SpeechCodec]) -> None:
    """As in Mimi, where the sum of its vector and those of the other layers means nothing."""
    torch.manual_seed(0)
    books = torch.cat([100 + torch.randn(1, 8, 2), torch.randn(2, 8, 2) * torch.tensor([1.0, 0.01])[:, None, None]])
    source = Codes.from_utterances([torch.randint(8, (3, 30))])
    branches = [range(1), range(1, 3)]
    assert torch.equal(swap_layers(source, source, [0, 1, 2], "mean", books, branches).ids, source.ids)
    assert torch.equal(swap_layers(source, source, [0], "mean", books, branches).ids, source.ids[:, :1])
    assert conversion.branches_of(make_codec(num_codebooks=3, quantizer="split")) == branches
    assert conversion.branches_of(make_codec(num_codebooks=3)) == [range(3)]


def test_by_mean_what_one_layer_leaves_the_next_one_codes() -> None:
    """In a cascade the vectors of all layers together are what is searched for."""
    books = torch.stack([torch.arange(8.0)[:, None], (torch.arange(8.0)[:, None] - 4) / 8])
    found = swap_layers(codes([[0] * 40, [4] * 40]), codes([[1] * 40, [7] * 40]), [0, 1], "mean", books).utterance(0)
    reached = books[0, found[0]] + books[1, found[1]]  # from 0 to 1.375, with emphasis
    torch.testing.assert_close(reached, torch.full_like(reached, conversion.EMPHASIS * 1.375), atol=0.063, rtol=0)


@pytest.mark.parametrize("layers", [[], [3], [-1], [0, 3]])
def test_layers_that_are_not_there_are_refused(layers: list[int]) -> None:
    with pytest.raises(InputError, match="layers must be numbers from 0 to 2"):
        swapped(layers, "position")


def test_other_mistakes_are_named() -> None:
    with pytest.raises(InputError, match="unknown matching 'time': choose one of position, content, mean"):
        swapped([1], "time")
    with pytest.raises(ValueError, match="2 sources but 1 targets"):
        swap_layers(codes(SOURCE, SOURCE), codes(TARGET), [1], "position", BOOKS)


@MATCHINGS
def test_a_converted_voice_is_the_decoded_swap(codec: SpeechCodec, noise: Callable[..., Tensor], matching: str) -> None:
    source, target = noise(6_000)[0], noise(4_000, seed=1)[0]
    found = convert_voice(codec, source, target, [1], matching)
    expected = swap_layers(codec.encode(source[None]), codec.encode(target[None]), [1], matching, codec.codebooks)
    assert torch.equal(found, codec.decode(expected)[0]) and found.shape == source.shape
    own = codec.decode(codec.encode(source[None], layers=2))[0]
    assert torch.equal(convert_voice(codec, source, source, [1], matching), own) and not torch.equal(found, own)


def test_what_cannot_decode_is_no_codec(monkeypatch: pytest.MonkeyPatch, codec_folder: Path) -> None:
    assert isinstance(load_codec(codec_folder), SpeechCodec)
    monkeypatch.setattr("tokenizer.loading.load_tokenizer", lambda name: object())
    with pytest.raises(ValueError, match="units cannot turn its tokens into speech again"):
        load_codec("units")


def test_the_command_writes_the_converted_recording(
    codec: SpeechCodec,
    codec_folder: Path,
    noise: Callable[..., Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = [str(tmp_path / name) for name in ("source.wav", "target.wav", "out/converted.wav")]
    for seed, file in enumerate(files[:2]):
        save_audio(file, noise(6_000 - 1_000 * seed, seed=seed)[0])
    words = ["convert", "--codec", str(codec_folder), *files[:2], "--output", files[2]]
    assert main([*words, "--layers", "1,2", "--matching", "position"]) == 0
    assert capsys.readouterr().out == f"{files[2]}\n"
    source, target, converted = map(load_audio, files)
    expected = convert_voice(codec, source, target, [1, 2], "position").clamp(-1, 1)
    torch.testing.assert_close(converted, expected, atol=2 / 32768, rtol=0)
    assert main([*words[:-1], str(tmp_path / "other.wav"), "--layers", "1,9"]) == 1
    assert "layers must be numbers from 0 to 2" in capsys.readouterr().err
