"""Discriminators: sizes and shapes, the losses of both sides, and one training step."""

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tokenizer.errors import InputError
from tokenizer.training.discriminators import (
    Adversary,
    DiscriminatorOutput,
    MultiPeriodDiscriminator,
    MultiScaleDiscriminator,
    MultiScaleSTFTDiscriminator,
    adversarial_loss,
    discriminator_loss,
    feature_matching_loss,
)

B, N = 2, 1_001
WINDOWS = (128, 64)
KINDS = ["hinge", "least_squares"]


def tiny() -> list[nn.Module]:
    """One discriminator of each class, small."""
    return [
        MultiScaleSTFTDiscriminator(2, WINDOWS),
        MultiPeriodDiscriminator(2, (2, 3)),
        MultiScaleDiscriminator(16, 2),
    ]


@pytest.fixture
def adversary() -> Adversary:
    torch.manual_seed(0)
    return Adversary(tiny(), "least_squares", 1e-3)


def batches(noise: Callable[..., Tensor], samples: int) -> tuple[Tensor, Tensor]:
    """A real and a fake batch, different all over."""
    return noise(samples, B), noise(samples, B, seed=1).cumsum(1) / 10


@pytest.fixture
def pair(noise: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    return batches(noise, 401)  # few, because most tests train on them


@pytest.mark.parametrize(
    "make, published",
    [(MultiScaleSTFTDiscriminator, 0.47e6), (MultiPeriodDiscriminator, 41.1e6), (MultiScaleDiscriminator, 29.6e6)],
)
def test_the_default_sizes_are_the_published_ones(make: Callable[[], nn.Module], published: float) -> None:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in make().parameters())
    assert parameters == pytest.approx(published, rel=0.01)


def shapes(outputs: list[DiscriminatorOutput]) -> list[tuple[tuple[int, ...], list[tuple[int, ...]]]]:
    return [(tuple(j.scores.shape), [tuple(f.shape) for f in j.features]) for j in outputs]


def test_shapes_of_the_stft_discriminator(noise: Callable[..., Tensor]) -> None:
    """A frame every quarter window, halving frequencies; time is never shortened."""
    assert shapes(MultiScaleSTFTDiscriminator(2, WINDOWS)(noise(N, B))) == [
        ((B, 32, 9), [(B, 2, 32, n) for n in (65, 33, 17, 9, 9)]),
        ((B, 63, 5), [(B, 2, 63, n) for n in (33, 17, 9, 5, 5)]),
    ]


def test_shapes_of_the_period_discriminator(noise: Callable[..., Tensor]) -> None:
    """The period is the last axis and stays; every third step in between."""
    assert shapes(MultiPeriodDiscriminator(2, (2, 3))(noise(N, B))) == [
        ((B, 7, 2), [(B, c, n, 2) for c, n in zip((2, 8, 32, 64, 64), (167, 56, 19, 7, 7), strict=True)]),
        ((B, 5, 3), [(B, c, n, 3) for c, n in zip((2, 8, 32, 64, 64), (112, 38, 13, 5, 5), strict=True)]),
    ]


def test_shapes_of_the_scale_discriminator(noise: Callable[..., Tensor]) -> None:
    """A 64th of the rate after the strides, from the whole and from half the samples."""
    widths = (16, 16, 32, 64, 128, 128, 128)
    assert shapes(MultiScaleDiscriminator(16, 2)(noise(N, B))) == [
        ((B, 16), [(B, c, n) for c, n in zip(widths, (1001, 501, 251, 63, 16, 16, 16), strict=True)]),
        ((B, 8), [(B, c, n) for c, n in zip(widths, (501, 251, 126, 32, 8, 8, 8), strict=True)]),
    ]


@pytest.mark.parametrize("index", range(3))
def test_an_output_does_not_depend_on_the_rest_of_the_batch(index: int, noise: Callable[..., Tensor]) -> None:
    discriminator, waveform = tiny()[index], noise(N, 3)
    for together, alone in zip(discriminator(waveform), discriminator(waveform[1:2]), strict=True):
        torch.testing.assert_close(together.scores[1:2], alone.scores)
        for a, b in zip(together.features, alone.features, strict=True):
            torch.testing.assert_close(a[1:2], b)


def test_a_network_of_period_p_sees_every_pth_sample_only(noise: Callable[..., Tensor]) -> None:
    discriminator, waveform = MultiPeriodDiscriminator(2, (5,)), noise(1_000, 1)
    changed = waveform.clone()
    changed[:, 3::5] += 1
    moved = (discriminator(changed)[0].scores - discriminator(waveform)[0].scores)[0].abs().amax(0)
    assert [bool(x) for x in moved] == [False, False, False, True, False]


def test_the_stft_discriminator_sees_phase(noise: Callable[..., Tensor]) -> None:
    """A sign change changes the scores, but no magnitude."""
    discriminator, waveform = MultiScaleSTFTDiscriminator(2, WINDOWS), noise(N)
    assert not torch.allclose(discriminator(waveform)[0].scores, discriminator(-waveform)[0].scores)


def test_waveforms_too_short_for_the_largest_window_are_refused(noise: Callable[..., Tensor]) -> None:
    discriminator = MultiScaleSTFTDiscriminator(2, WINDOWS)
    assert len(discriminator(noise(65))) == 2
    with pytest.raises(InputError, match="64 samples are too short .* at least 65"):
        discriminator(noise(64))


@pytest.mark.parametrize("index", range(3))
def test_outputs_under_autocast_are_close_to_those_in_full_precision(index: int, noise: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    discriminator, waveform = tiny()[index], noise(N, B)
    expected = discriminator(waveform)
    with torch.autocast("cpu", torch.bfloat16):
        found = discriminator(waveform)
    for a, b in zip(found, expected, strict=True):
        assert a.features[0].dtype == torch.bfloat16
        torch.testing.assert_close(a.scores, b.scores, atol=0.02, rtol=0.1)


REAL = [DiscriminatorOutput(torch.tensor([[2.0, 0.5]]), []), DiscriminatorOutput(torch.tensor([[-1.0]]), [])]
FAKE = [DiscriminatorOutput(torch.tensor([[-2.0, 0.0]]), []), DiscriminatorOutput(torch.tensor([[0.5]]), [])]


@pytest.mark.parametrize(
    "kind, expected",
    [
        # of the first discriminator real 0 and 0.5, fake 0 and 1, of the second 2 and 1.5
        ("hinge", 0.25 + 0.5 + 2 + 1.5),
        # of the first real 1 and 0.25, fake 4 and 0, of the second 4 and 0.25
        ("least_squares", 0.625 + 2 + 4 + 0.25),
    ],
)
def test_the_discriminators_loss(kind: str, expected: float) -> None:
    assert discriminator_loss(REAL, FAKE, kind).item() == pytest.approx(expected)


@pytest.mark.parametrize("kind, expected", [("hinge", 1 - 0.5), ("least_squares", (9 + 1) / 2 + 0.25)])
def test_the_generators_loss(kind: str, expected: float) -> None:
    assert adversarial_loss(FAKE, kind).item() == pytest.approx(expected)


def with_features(*features: list[float]) -> DiscriminatorOutput:
    return DiscriminatorOutput(torch.zeros(1), [torch.tensor(feature) for feature in features])


@pytest.mark.parametrize(
    "relative, expected",
    [(False, 1.5 + 2 + 0.5), (True, 1.5 / 3 + 2 / 4 + 0.5 / 0.5)],
)
def test_feature_matching_is_the_sum_over_layers_of_l1(relative: bool, expected: float) -> None:
    real = [with_features([2.0, -4.0], [4.0]), with_features([0.5])]
    fake = [with_features([1.0, -2.0], [2.0]), with_features([1.0])]
    assert feature_matching_loss(real, fake, relative).item() == pytest.approx(expected)
    assert feature_matching_loss(real, real, relative).item() == 0


def test_relative_feature_matching_does_not_depend_on_a_layers_scale() -> None:
    real, fake = [with_features([2.0, -4.0], [4.0])], [with_features([1.0, -2.0], [2.0])]
    louder = [[DiscriminatorOutput(j.scores, [j.features[0] * 100, j.features[1]]) for j in js] for js in (real, fake)]
    for relative, same in ((True, True), (False, False)):
        values = [feature_matching_loss(*outputs, relative).item() for outputs in ((real, fake), louder)]
        assert (values[0] == pytest.approx(values[1])) is same


def test_feature_matching_sends_no_gradient_to_real_speech_and_survives_silent_layers() -> None:
    real, fake = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    feature_matching_loss([DiscriminatorOutput(real, [real])], [DiscriminatorOutput(fake, [fake])]).backward()
    assert real.grad is None
    assert torch.isfinite(fake.grad).all() and fake.grad.all()


def test_a_step_of_the_discriminators_leaves_no_gradient_on_the_reconstruction(
    adversary: Adversary, pair: tuple[Tensor, Tensor]
) -> None:
    generator = nn.Parameter(torch.ones(1))
    fake = pair[1] * generator
    fake.retain_grad()
    before = [p.clone() for p in adversary.parameters()]
    adversary.train_step(pair[0], fake)
    assert generator.grad is None and fake.grad is None
    assert all(not torch.equal(old, new) for old, new in zip(before, adversary.parameters(), strict=True))


def test_a_step_of_the_discriminators_follows_the_mean_gradient_of_all_processes(
    adversary: Adversary, pair: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients that cancel between processes change no parameter."""
    monkeypatch.setattr(
        "tokenizer.training.discriminators.average_gradients", lambda own: [p.grad.zero_() for p in own]
    )
    before = [p.clone() for p in adversary.parameters()]
    adversary.train_step(*pair)
    assert all(torch.equal(old, new) for old, new in zip(before, adversary.parameters(), strict=True))


def test_the_generators_losses_leave_no_gradient_on_the_discriminators(
    adversary: Adversary, pair: tuple[Tensor, Tensor]
) -> None:
    real, fake = pair[0].requires_grad_(), pair[1].requires_grad_()
    losses = adversary.losses(real, fake)
    for name in ("adversarial", "feature_matching"):
        (gradient,) = torch.autograd.grad(losses[name], fake, retain_graph=True)
        assert torch.isfinite(gradient).all() and (gradient != 0).float().mean() > 0.99
    sum(losses.values()).backward()
    assert real.grad is None
    assert all(p.grad is None and p.requires_grad for p in adversary.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("relative", [True, False])
def test_the_adversary_uses_the_configured_losses(kind: str, relative: bool, pair: tuple[Tensor, Tensor]) -> None:
    adversary = Adversary(tiny(), kind, 1e-3, relative_features=relative)
    real, fake = adversary.discriminate(pair[0]), adversary.discriminate(pair[1])
    assert len(real) == len(fake) == 6
    losses = adversary.losses(*pair)
    assert losses["adversarial"].item() == adversarial_loss(fake, kind).item()
    assert losses["feature_matching"].item() == feature_matching_loss(real, fake, relative).item()
    assert adversary.train_step(*pair).item() == discriminator_loss(real, fake, kind).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", range(3))
def test_each_discriminator_learns_to_distinguish_a_fixed_pair(
    kind: str, index: int, pair: tuple[Tensor, Tensor]
) -> None:
    torch.manual_seed(0)
    adversary = Adversary(tiny()[index : index + 1], kind, 8e-3)
    losses = [adversary.train_step(*pair).item() for _ in range(25)]
    assert losses[-1] < 0.6 * losses[0]


def test_the_generators_losses_lead_to_real_speech(adversary: Adversary, noise: Callable[..., Tensor]) -> None:
    """Steps down the gradient make the reconstruction score higher and its features more like those of real speech."""
    real, fake = batches(noise, N)
    fake.requires_grad_()
    for _ in range(10):
        adversary.train_step(real, fake)
    optimizer = torch.optim.Adam([fake], 1e-2)
    history = []
    for _ in range(10):
        losses = adversary.losses(real, fake)
        history.append([loss.item() for loss in losses.values()])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert all(last < first for first, last in zip(history[0], history[-1], strict=True))


def test_a_batch_without_finite_gradients_teaches_nothing(adversary: Adversary, pair: tuple[Tensor, Tensor]) -> None:
    real, fake = pair
    adversary.train_step(real, fake)
    before = [parameter.detach().clone() for parameter in adversary.parameters()]
    adversary.train_step(real, fake * torch.inf)
    assert all(torch.equal(p, q) for p, q in zip(before, adversary.parameters(), strict=True))
    assert adversary.train_step(real, fake).isfinite()


def test_both_sides_can_share_one_autocast(adversary: Adversary, pair: tuple[Tensor, Tensor]) -> None:
    """autocast caches bf16 copies of trainable parameters, which are outdated after a step and must not be used."""
    real, fake = pair[0], pair[1].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        adversary.train_step(real, fake)
        found = adversary.losses(real, fake)
    with torch.autocast("cpu", torch.bfloat16):
        expected = adversary.losses(real, fake)
    assert found == expected
    assert all(p.grad is not None and p.grad.any() for p in adversary.parameters())


def test_a_resumed_adversary_continues_bit_by_bit(adversary: Adversary, pair: tuple[Tensor, Tensor]) -> None:
    for _ in range(3):
        adversary.train_step(*pair)
    adversary.optimizer.param_groups[0]["lr"] = 5e-4
    file = io.BytesIO()
    torch.save(adversary.state_dict(), file)
    expected = [adversary.train_step(*pair) for _ in range(3)]

    torch.manual_seed(1)
    other = Adversary(tiny(), "least_squares", 1e-3)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert [other.train_step(*pair) for _ in range(3)] == expected
    for a, b in zip(adversary.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
