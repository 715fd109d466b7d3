"""Streams: the codes and samples of the whole utterance from any chunks of it, in bounded memory.

Codes are compared except in frames that lie between two of them, because other chunks change the rounding.
"""

import functools
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from speechllm import InputError, SpeechCodec, StreamingDecoder, StreamingEncoder
from tokenizer.codec.convnext import LogMelSpectra
from tokenizer.codec.streaming import ChunkedDecoder, ChunkedEncoder, in_chunks

pytestmark = pytest.mark.numeric

MakeCodec = Callable[..., SpeechCodec]
Noise = Callable[..., Tensor]
Same = Callable[..., None]
CONVNEXT = {"body": "convnext", "width": 16, "depth": 3, "pad_mode": "constant"}
STYLES = [  # every pair of SEANet's settings is in one of them
    {"pad_mode": "reflect", "lstm": "forward", "norm": "weight_norm"},
    {"pad_mode": "reflect", "lstm": "none", "norm": "batch_norm"},
    {"pad_mode": "constant", "lstm": "forward", "norm": "batch_norm"},
    {"pad_mode": "constant", "lstm": "none", "norm": "weight_norm"},
    {**CONVNEXT, "norm": "batch_norm"},
]
# frames that the mirrored beginning of SEANet's last convolution needs: its kernel of 7
FIRST_FRAMES = {"reflect": 7, "constant": 1}


@pytest.fixture(scope="module")
def noise(noise: Noise) -> Noise:
    """In float64, for `make_causal`."""
    return lambda *args, **kwargs: noise(*args, **kwargs).double()


@pytest.fixture(scope="module")
def make_causal(make_codec: MakeCodec, noise: Noise) -> MakeCodec:
    """Tiny causal codecs whose encoder computes in float64, one for each choice of settings: tests only look at them.

    In float32 the length of a chunk changes the last bits; so the latents can be compared closely. The codes are
    searched for in float32 all the same.
    """

    @functools.cache
    @torch.no_grad()
    def make(**settings: object) -> SpeechCodec:
        codec = make_codec(causal=True, **settings)
        for part in (codec.encoder, codec.latent_norm or nn.Identity()):
            part.double()
        codec.train()  # batch normalisation gets statistics other than 0 and 1
        for seed in range(3):
            codec.decoder(codec.latents(noise(codec.hop_length * 20, batch=4, seed=seed)).float())
        codec.eval()
        codec.quantizer.initialize(codec.latents(noise(codec.hop_length * 20 * codec.codebook_size))[0].T)
        return codec

    return make


@pytest.fixture(scope="module", params=STYLES, ids=lambda style: "-".join(map(str, style.values())))
def causal(request: pytest.FixtureRequest, make_causal: MakeCodec) -> SpeechCodec:
    """A codec of every style; for tests that only look at it."""
    return make_causal(**request.param)


def offline(codec: SpeechCodec, samples: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and speech of samples float [n] without any chunks, as the layers give them."""
    with torch.no_grad():
        ids = codec.quantizer.encode(codec.latents(samples[None]))
        return ids[0], codec.decoder(codec.quantizer.decode(ids))[0, 0]


def through(stream: StreamingEncoder | StreamingDecoder, chunks: Iterable[Tensor]) -> Tensor:
    return torch.cat([*map(stream.push, chunks), stream.finish()], -1)


def streamed(codec: SpeechCodec, chunks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """The latents float [1, D, T], which may differ even where the codes do not, and the codes long [Q, T]."""
    encoder, parts = StreamingEncoder(codec), []
    run = encoder._run

    def noting(x: Tensor, last: bool) -> Tensor:
        parts.append(run(x, last))
        return parts[-1]

    encoder._run = noting
    ids = through(encoder, chunks)
    return torch.cat(parts, -1), ids


def random_chunks(x: Tensor, number: int, seed: int) -> list[Tensor]:
    """x in so many pieces, some of them likely empty."""
    cuts = torch.randint(x.shape[-1] + 1, (number - 1,), generator=torch.Generator().manual_seed(seed))
    return list(torch.tensor_split(x, cuts.sort().values, -1))


@pytest.fixture(scope="session")
def assert_streams_equal(assert_same_codes: Same) -> Same:
    @parametrize.cached()  # normalised weights are not computed again for every chunk
    def check(codec: SpeechCodec, samples: Tensor, pieces: Callable[[Tensor], list[Tensor]]) -> None:
        ids, speech = offline(codec, samples)
        expected, (latents, found) = codec.latents(samples[None]), streamed(codec, pieces(samples))
        torch.testing.assert_close(latents, expected, atol=1e-12, rtol=0)
        assert_same_codes(codec.quantizer, expected, found[None], ids[None])
        torch.testing.assert_close(through(StreamingDecoder(codec), pieces(ids)), speech, atol=1e-5, rtol=0)

    return check


@pytest.mark.parametrize("number, seed", [(2, 0), (5, 1), (40, 2)])
def test_any_chunks_give_what_the_whole_gives(
    causal: SpeechCodec, noise: Noise, assert_streams_equal: Same, number: int, seed: int
) -> None:
    samples = noise(320 * 15 + 17, seed=seed)[0]
    assert len(offline(causal, samples)[0].unique()) > 4
    assert_streams_equal(causal, samples, lambda x: random_chunks(x, number, seed))


# around one hop, around the seven frames that are mirrored, and with every layer's stride left unfilled
@pytest.mark.parametrize("samples", [1, 2, 7, 319, 320, 321, 1_921, 2_239, 2_240, 2_241])
def test_an_utterance_of_any_length(
    causal: SpeechCodec, noise: Noise, assert_streams_equal: Same, samples: int
) -> None:
    assert_streams_equal(causal, noise(samples)[0], lambda x: random_chunks(x, 4, samples))


def test_sample_by_sample(causal: SpeechCodec, noise: Noise, assert_streams_equal: Same) -> None:
    # around the first sample and the first whole frame; between them a few at a time
    def pieces(x: Tensor) -> list[Tensor]:
        return [*x[..., :20].split(1, -1), *x[..., 20:310].split(29, -1), *x[..., 310:].split(1, -1)]

    assert_streams_equal(causal, noise(330)[0], pieces)


def test_samples_go_to_where_the_codec_is(make_codec: MakeCodec) -> None:
    codec = make_codec(causal=True).to("meta")
    codec.quantizer.encode = lambda z, layers, first: z  # autocast does not support this device
    z = StreamingEncoder(codec).push(torch.zeros(3_200))
    assert z.device.type == "meta" and z.shape == (8, 10)


def test_a_buffer_may_be_filled_again_after_its_push(make_causal: MakeCodec, noise: Noise) -> None:
    codec, samples, buffer = make_causal(), noise(330)[0], torch.zeros(3).double()
    latents, _ = streamed(codec, (buffer.copy_(chunk) for chunk in samples.split(3)))
    torch.testing.assert_close(latents, codec.latents(samples[None]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("strides", [(1, 2), (3, 1, 2), (40,)])
@pytest.mark.parametrize("pad_mode", FIRST_FRAMES)
def test_other_strides(
    make_causal: MakeCodec, noise: Noise, assert_streams_equal: Same, strides: tuple[int, ...], pad_mode: str
) -> None:
    codec = make_causal(strides=strides, pad_mode=pad_mode)
    for samples in (1, 2, 3, 5, 6, 7, 12, 19, 333):
        assert_streams_equal(codec, noise(samples)[0], lambda x, seed=samples: random_chunks(x, 6, seed))


def test_a_frame_comes_with_its_last_sample_and_its_speech_with_the_frame(causal: SpeechCodec, noise: Noise) -> None:
    first = FIRST_FRAMES[causal.config.pad_mode]
    encoder, decoder = StreamingEncoder(causal), StreamingDecoder(causal)
    pushed = frames = decoded = 0
    for chunk in noise(320 * 12)[0].split(160):
        ids = encoder.push(chunk)
        pushed, frames = pushed + len(chunk), frames + ids.shape[1]
        decoded += len(decoder.push(ids))
        assert frames == (pushed // 320 if pushed >= 320 * first else 0)
        assert decoded == 320 * frames
    assert encoder.finish().shape == (3, 0)
    assert decoder.finish().shape == (0,)


def test_nothing_in_is_nothing_out(causal: SpeechCodec) -> None:
    encoder, decoder = StreamingEncoder(causal), StreamingDecoder(causal)
    assert encoder.push(torch.zeros(0).double()).shape == encoder.finish().shape == (3, 0)
    assert decoder.push(torch.zeros(3, 0, dtype=torch.long)).shape == decoder.finish().shape == (0,)


@pytest.mark.parametrize("layers", [1, 2])
def test_fewer_layers(make_causal: MakeCodec, noise: Noise, assert_same_codes: Same, layers: int) -> None:
    codec, samples = make_causal(), noise(5_000)[0]
    ids = through(StreamingEncoder(codec, layers), list(samples.split(700)))
    codes = codec.encode(samples[None])
    latents = codec.latents(samples[None])
    assert_same_codes(codec.quantizer, latents, ids[None], codec.encode(samples[None], layers=layers).ids)
    speech = through(StreamingDecoder(codec), list(codes.ids[0, :layers].split(3, -1)))
    torch.testing.assert_close(speech[:5_000], codec.decode(codes.first(layers))[0], atol=1e-5, rtol=0)


def test_two_streams_of_a_codec_are_independent(make_causal: MakeCodec, noise: Noise, assert_same_codes: Same) -> None:
    codec = make_causal()
    weights = {name: value.clone() for name, value in codec.state_dict().items()}
    utterances = noise(6_400, batch=2)
    encoders, decoders = ([kind(codec) for _ in utterances] for kind in (StreamingEncoder, StreamingDecoder))
    ids: list[list[Tensor]] = [[], []]
    speech: list[list[Tensor]] = [[], []]
    for chunks in zip(*(row.split(900) for row in utterances), strict=True):
        for index, chunk in enumerate(chunks):
            ids[index].append(encoders[index].push(chunk))
            speech[index].append(decoders[index].push(ids[index][-1]))
    for index, samples in enumerate(utterances):
        ids[index].append(encoders[index].finish())
        speech[index] += [decoders[index].push(ids[index][-1]), decoders[index].finish()]
        expected, streamed = offline(codec, samples)[0], torch.cat(ids[index], -1)
        assert_same_codes(codec.quantizer, codec.latents(samples[None]), streamed[None], expected[None])
        decoded = codec.decoder(codec.quantizer.decode(streamed[None]))[0, 0]
        torch.testing.assert_close(torch.cat(speech[index]), decoded, atol=1e-5, rtol=0)
    assert all(torch.equal(value, weights[name]) for name, value in codec.state_dict().items())


def longest_input(codec: SpeechCodec, use: Callable[[], object]) -> int:
    """Frames or samples of the longest tensor that any convolution, LSTM or spectrum saw."""
    seen = []
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args: seen.append(args[0].shape[0 if isinstance(module, nn.LSTM) else -1])
        )
        for module in codec.modules()
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d | nn.LSTM | LogMelSpectra)
    ]
    use()
    for hook in hooks:
        hook.remove()
    return max(seen)


@pytest.mark.parametrize("pad_mode", FIRST_FRAMES)
def test_long_utterances_are_encoded_and_decoded_in_chunks(
    make_causal: MakeCodec, noise: Noise, assert_same_codes: Same, pad_mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = make_causal(pad_mode=pad_mode)
    lengths = torch.tensor([15_000, 10_000, 3_200, 3_201, 1])
    waveform = noise(15_000, batch=5)
    expected = codec.encode(waveform, lengths)
    speech = codec.decode(expected)
    monkeypatch.setattr("tokenizer.codec.speech_codec.CHUNK_S", 0.2)  # 3200 samples
    codes = codec.encode(waveform, lengths)
    for index, samples in enumerate(lengths.tolist()):
        latents = codec.latents(waveform[index : index + 1, :samples])
        found, known = codes.utterance(index)[None], expected.utterance(index)[None]
        assert_same_codes(codec.quantizer, latents, found, known)
        assert not codes.ids[index, :, latents.shape[2] :].any()
    assert torch.equal(codes.lengths, expected.lengths)
    assert torch.equal(codes.samples, expected.samples)
    torch.testing.assert_close(codec.decode(expected), speech, atol=1e-5, rtol=0)
    assert torch.equal(codec.encode(waveform, lengths, layers=1).ids, codes.ids[:, :1])


LOOKING_AHEAD = [
    *({"lstm": lstm} for lstm in ("none", "forward", "bidirectional")),
    {"pad_mode": "constant"},
    {"norm": "batch_norm", "lstm": "none"},
    {"strides": (40,)},
    {"strides": (3, 1, 2), "lstm": "none"},
    {"front_end": "log_mel", "norm": "batch_norm"},
    CONVNEXT,
    {**CONVNEXT, "norm": "batch_norm", "strides": (4, 5)},
    {**CONVNEXT, "phases": "griffin_lim"},
]


@pytest.mark.parametrize("settings", LOOKING_AHEAD, ids=str)
def test_a_codec_that_looks_ahead_is_encoded_and_decoded_in_chunks(
    make_codec: MakeCodec, noise: Noise, settings: dict[str, object]
) -> None:
    """In float64, so that only a wrong receptive field could make a difference."""
    codec = make_codec(**settings).train()
    codec.decoder(codec.latents(noise(codec.hop_length * 20).float()))  # batch normalisation gets statistics
    codec.eval()
    exact = codec.config.front_end == "seanet"  # the other one computes its spectrogram in float32
    if exact:
        codec.double()
    close = {"atol": 1e-9 if exact else 1e-4, "rtol": 0}
    codec.quantizer.encode = lambda latents, layers, first: (
        latents
    )  # compared without the search, and decoded as they are
    codec.quantizer.decode = lambda latents: latents
    hop = codec.hop_length
    reach = {"convnext": 20, "seanet": 12}[codec.config.body] + 40 * (codec.config.phases == "griffin_lim")
    long = reach * hop  # more than an output depends on
    with parametrize.cached():
        for samples in (7 * hop, long + 1, long + hop - 1):
            waveform = noise(samples, seed=samples)[0].to(codec.codebooks)
            latents = codec.latents(waveform[None])
            for frames in (1, 6):
                chunked = in_chunks(ChunkedEncoder(codec), waveform, frames, hop)
                torch.testing.assert_close(chunked, latents[0], **close)
                speech = in_chunks(ChunkedDecoder(codec), latents[0], frames)
                torch.testing.assert_close(speech, codec.decoder(latents)[0, 0], **close)


@pytest.mark.parametrize("settings", [{}, {"lstm": "bidirectional"}, {"front_end": "log_mel"}, CONVNEXT], ids=str)
def test_memory_of_a_codec_that_looks_ahead_does_not_grow_with_the_utterance(
    make_codec: MakeCodec, noise: Noise, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]
) -> None:
    codec, long = make_codec(**settings), noise(24_000).float()
    codes = codec.encode(long)
    monkeypatch.setattr("tokenizer.codec.speech_codec.CHUNK_S", 0.2)
    assert codec.bounded is (settings.get("lstm") != "bidirectional")
    # 3200 and what waited for them: few samples of the first layers, few frames of the first ones of the decoder
    waiting = 5 * 320 if settings == CONVNEXT else 24  # its windows are longer than frames
    assert longest_input(codec, lambda: codec.encode(long)) <= 3_200 + waiting
    assert longest_input(codec, lambda: codec.decode(codes)) <= 3_200 + 5 * 320


def test_memory_does_not_grow_with_the_utterance(
    make_causal: MakeCodec, noise: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec, short, long = make_causal(), noise(6_400), noise(16_000)
    codes = codec.encode(short), codec.encode(long)
    assert longest_input(codec, lambda: codec.encode(long)) > 16_000
    assert longest_input(codec, lambda: codec.decode(codes[1])) > 16_000
    monkeypatch.setattr("tokenizer.codec.speech_codec.CHUNK_S", 0.2)
    allowed = 3_200 + 12  # and the past that the first convolution's kernel of 7 sees, and its padding before that
    assert longest_input(codec, lambda: codec.encode(short)) == longest_input(codec, lambda: codec.encode(long))
    assert longest_input(codec, lambda: codec.encode(long)) <= allowed
    assert longest_input(codec, lambda: codec.decode(codes[0])) == longest_input(codec, lambda: codec.decode(codes[1]))
    assert longest_input(codec, lambda: codec.decode(codes[1])) <= allowed


@pytest.mark.parametrize("settings, most", [({}, 15), (CONVNEXT, 3 * 320 + 100)])  # a window of 64 ms, and new samples
def test_a_stream_keeps_only_a_few_inputs_per_layer(
    make_causal: MakeCodec, noise: Noise, settings: dict[str, object], most: int
) -> None:
    codec = make_causal(**settings)
    encoder, decoder = StreamingEncoder(codec), StreamingDecoder(codec)
    for chunk in noise(320 * 60)[0].split(320 * 30 + 1):
        decoder.push(encoder.push(chunk))
    for stage in [*encoder._stages, *decoder._stages]:
        inputs = getattr(stage, "inputs", None)
        if inputs is not None:
            assert inputs.untyped_storage().nbytes() == inputs.nbytes  # no view of the chunk
            assert inputs.shape[-1] <= most


@pytest.mark.parametrize("kind", [StreamingEncoder, StreamingDecoder])
@pytest.mark.parametrize("settings", [{}, {"front_end": "log_mel", "norm": "batch_norm"}, CONVNEXT])
def test_a_codec_that_looks_ahead_is_refused(make_codec: MakeCodec, settings: dict[str, str], kind: type) -> None:
    with pytest.raises(InputError, match=r"looks ahead.*use codec\.encode and codec\.decode.*causal: true"):
        kind(make_codec(**settings))


@pytest.mark.parametrize("kind", [StreamingEncoder, StreamingDecoder])
def test_a_codec_in_training_mode_is_refused(make_codec: MakeCodec, kind: type) -> None:
    with pytest.raises(ValueError, match=r"training mode: call codec\.eval\(\)"):
        kind(make_codec(causal=True).train())


@pytest.mark.parametrize("kind", [StreamingEncoder, StreamingDecoder])
def test_a_finished_stream_cannot_be_used_again(make_codec: MakeCodec, kind: type) -> None:
    stream = kind(make_codec(causal=True))
    x = torch.zeros(640) if kind is StreamingEncoder else torch.zeros(3, 2, dtype=torch.long)
    stream.push(x)
    stream.finish()
    for use in (lambda: stream.push(x), lambda: stream.push(x[..., :0]), stream.finish):
        with pytest.raises(ValueError, match=rf"finished: make a new {kind.__name__}\(codec\)"):
            use()


def test_bad_input_is_refused_and_leaves_the_stream_as_it_was(
    make_causal: MakeCodec, noise: Noise, assert_same_codes: Same
) -> None:
    codec, samples = make_causal(), noise(3_000)[0]
    ids, speech = offline(codec, samples)
    encoder, decoder = StreamingEncoder(codec), StreamingDecoder(codec)
    received, decoded = [encoder.push(samples[:2_000])], [decoder.push(ids[:, :5])]
    with pytest.raises(ValueError, match=r"expected samples float \[n\].*got shape \(1, 1000\)"):
        encoder.push(samples[None, 2_000:])
    with pytest.raises(ValueError, match="NaN or infinite"):
        encoder.push(samples[2_000:] / 0)
    for wrong in (ids[None], ids[0], torch.zeros(4, 1, dtype=torch.long), ids[:0]):
        with pytest.raises(ValueError, match=r"expected ids long \[1\.\.3, t\].*got shape"):
            decoder.push(wrong)
    received += [encoder.push(samples[2_000:]), encoder.finish()]
    decoded += [decoder.push(ids[:, 5:]), decoder.finish()]
    assert_same_codes(codec.quantizer, codec.latents(samples[None]), torch.cat(received, -1)[None], ids[None])
    torch.testing.assert_close(torch.cat(decoded), speech, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layers", [0, 4])
def test_layers_out_of_range_are_refused(make_codec: MakeCodec, layers: int) -> None:
    with pytest.raises(InputError, match=rf"layers must be 1\.\.3, got {layers}"):
        StreamingEncoder(make_codec(causal=True), layers)
