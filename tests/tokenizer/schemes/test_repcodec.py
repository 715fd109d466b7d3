"""RepCodec: it begins as k-means, sees no padding, learns to lose less, and what is saved encodes the same."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from speechllm import Encoding, InputError, SpeechCodec, load_tokenizer
from tokenizer.interface import DiscreteTokenizer
from tokenizer.schemes.features import FeatureEncoder
from tokenizer.schemes.repcodec import FrameAutoencoder, RepCodec
from tokenizer.training.small_teachers import small_hubert
from tokenizer.training.teachers import SemanticTeacher

WIDTH, CODES = 6, 5


def spoken(count: int, seed: int = 0) -> Tensor:
    """Frames float [count, WIDTH] that follow each other slowly, far from zero."""
    steps = torch.randn(count + 8, WIDTH, generator=torch.Generator().manual_seed(seed))
    return 3 + steps.unfold(0, 9, 1).mean(2)


@pytest.fixture
def network() -> FrameAutoencoder:
    torch.manual_seed(0)
    made = FrameAutoencoder(WIDTH, depth=2, num_codebooks=2, codebook_size=CODES)
    made.begin(spoken(400))
    return made.eval()


@pytest.fixture(scope="module")
def repcodec() -> RepCodec:
    torch.manual_seed(0)
    base = FeatureEncoder(SemanticTeacher(small_hubert(hidden_size=16, layers=1), layer=1))
    made = RepCodec(base, depth=1, num_codebooks=2, codebook_size=CODES)
    made.network.begin(torch.randn(300, 16))
    return made.eval()


def test_without_its_blocks_it_is_k_means(network: FrameAutoencoder) -> None:
    for block in [*network.before, *network.behind]:
        block.gain.data.zero_()
    frames = spoken(50, seed=1)
    centroids = network.quantizer.codebooks[0] * network.scale + network.mean
    nearest = torch.cdist(frames, centroids).argmin(1)
    lengths = torch.tensor([len(frames)])
    latents = network.latents(frames[None], lengths)
    codes = network.quantizer.encode(latents, 1)
    assert torch.equal(codes[0, 0], nearest) and len(nearest.unique()) > 2
    found = network.frames(network.quantizer.decode(codes), lengths)[0]
    torch.testing.assert_close(found, centroids[nearest])


@torch.no_grad()
def test_the_loss_is_the_share_of_the_variance(network: FrameAutoencoder) -> None:
    frames = spoken(400)
    lost, _ = network(frames[None], torch.tensor([400]))
    codes = network.quantizer.encode(network.latents(frames[None], torch.tensor([400])))
    found = network.frames(network.quantizer.decode(codes), torch.tensor([400]))[0]
    assert float(lost) == pytest.approx(float((found - frames).square().mean() / frames.var(0, correction=0).mean()))
    assert 0 < lost < 1
    assert [float(x) for x in network(torch.zeros(1, 4, WIDTH), torch.tensor([0]))] == [0.0, 0.0]


def test_what_follows_an_utterance_is_not_seen(network: FrameAutoencoder) -> None:
    short, long = spoken(9, seed=2), spoken(20, seed=3)
    padded = torch.stack([torch.cat([short, torch.full((11, WIDTH), 50.0)]), long])
    lengths = torch.tensor([9, 20])
    both, alone = network.latents(padded, lengths), network.latents(short[None], lengths[:1])
    torch.testing.assert_close(both[0, :, :9], alone[0])
    assert both[0, :, 9:].abs().max() == 0
    expected = sum(network(one[None], torch.tensor([len(one)]))[0] * len(one) for one in (short, long)) / 29
    torch.testing.assert_close(network(padded, lengths)[0], expected)


def test_training_loses_less_and_moves_the_codes(network: FrameAutoencoder) -> None:
    frames, lengths = spoken(600).view(6, 100, WIDTH), torch.full((6,), 100)
    before, codebooks = network(frames, lengths)[0].item(), network.quantizer.codebooks.clone()
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    network.quantizer.decay = 0.9
    network.train()
    for _ in range(60):
        lost, commitment = network(frames, lengths)
        optimizer.zero_grad()
        (lost + commitment).backward()
        optimizer.step()
    after = network.eval()(frames, lengths)[0].item()
    assert after < 0.8 * before and not torch.equal(network.quantizer.codebooks, codebooks)


def test_speech_is_encoded_as_its_stored_frames_are(
    repcodec: RepCodec, noise: Callable[..., Tensor], tmp_path: Path
) -> None:
    assert isinstance(repcodec, DiscreteTokenizer)
    encoding = Encoding.of(repcodec)
    assert (encoding.kind, encoding.layers, encoding.codebook_size, encoding.deduplicated) == ("codes", 2, CODES, False)
    waveform = torch.cat([noise(16_000, seed=1), noise(16_000, seed=2)])
    codes = repcodec.encode(waveform, torch.tensor([16_000, 8_000]))
    assert codes.lengths.tolist() == [50, 25]
    for index, samples in enumerate((16_000, 8_000)):
        frames = repcodec.base.encode(waveform[index : index + 1, :samples]).utterance(0)
        assert torch.equal(codes.utterance(index), repcodec.recode(frames))
    assert torch.equal(repcodec.encode(waveform[:1], layers=1).utterance(0), codes.utterance(0)[:1])
    with pytest.raises(InputError, match=r"layers must be 1\.\.2, got 3"):
        repcodec.encode(waveform, layers=3)

    repcodec.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, RepCodec) and loaded.fingerprint == repcodec.fingerprint
    assert torch.equal(loaded.encode(waveform).ids, repcodec.encode(waveform).ids)
    assert torch.equal(loaded.reconstruct(codes.utterance(0)), repcodec.reconstruct(codes.utterance(0)))
    assert loaded.reconstruct(codes.utterance(0)[:1]).shape == (50, 16)
    (tmp_path / "repcodec.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"repcodec\.safetensors"):
        load_tokenizer(tmp_path)


def test_codes_are_no_frames(small_codec: SpeechCodec) -> None:
    with pytest.raises(InputError, match="codes frames, which SpeechCodec does not return: give features:NAME"):
        RepCodec(small_codec)
