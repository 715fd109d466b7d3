"""The distillation losses of layers 0 and 1 (eqs. 4 and 5), and the mel reconstruction loss."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from tokenizer.codec.quantizer import ResidualVectorQuantizer
from tokenizer.training.distillation import AcousticDistillation, SemanticDistillation
from tokenizer.training.losses import MultiScaleMelLoss

B, D, T, C = 2, 8, 12, 6


def identity(center: bool = True, axis: str = "D") -> SemanticDistillation:
    loss = SemanticDistillation(D, D, center, axis)
    with torch.no_grad():
        loss.projection.weight.copy_(torch.eye(D))
        loss.projection.bias.zero_()
    return loss


def frames(width: int = D, length: int = T, seed: int = 0) -> Tensor:
    return torch.randn(B, length, width, generator=torch.Generator().manual_seed(seed))


def everything() -> Tensor:
    return torch.ones(B, T, dtype=torch.bool)


def some() -> Tensor:
    return torch.arange(T) < torch.tensor([[T], [5]])


def wave(phase: float) -> Tensor:
    """Sinusoids over time [B, T, D]: two of them a quarter period apart are orthogonal, and free of a mean."""
    return torch.sin(torch.arange(T) * 2 * math.pi / T + phase)[None, :, None].expand(B, T, D).contiguous()


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize(
    "student, loss",
    [(wave(0), 0.3133), (3 * wave(0), 0.3133), (wave(math.pi / 2), 0.6931), (-wave(0), 1.3133)],
    ids=["cosine 1", "cosine 1, louder", "cosine 0", "cosine -1"],
)
def test_eq_4_has_the_values_of_its_cosine(center: bool, student: Tensor, loss: float) -> None:
    value = identity(center)(student.transpose(1, 2), wave(0), everything())
    assert value.item() == pytest.approx(loss, abs=1e-4)


def semantic_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Layer 0, target and mask of utterances of different lengths."""
    return frames().transpose(1, 2), frames(C, seed=1) + 0.5, some()


def spoken(
    semantic: SemanticDistillation, layer0: Tensor, target: Tensor, mask: Tensor
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What is compared of each utterance, [frames, C] of student and teacher, without its padding."""
    for student, teacher, own in zip(semantic.projection(layer0.transpose(1, 2)), target, mask, strict=True):
        pair = student[own].detach().double().numpy(), teacher[own].double().numpy()
        yield tuple(x - x.mean(0) for x in pair) if semantic.center else pair


def loss_of_cosine(s: np.ndarray, t: np.ndarray) -> float:
    return np.log1p(np.exp(-(s @ t) / np.linalg.norm(s) / np.linalg.norm(t)))


@pytest.mark.parametrize("center", [True, False])
def test_eq_4_is_the_mean_over_utterances_and_dimensions_of_cosines_over_time(center: bool) -> None:
    semantic, batch = SemanticDistillation(D, C, center), semantic_batch()
    expected = [
        loss for student, teacher in spoken(semantic, *batch) for loss in map(loss_of_cosine, student.T, teacher.T)
    ]
    assert len(expected) == B * C
    assert semantic(*batch).item() == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("center", [True, False])
def test_on_the_time_axis_eq_4_is_the_mean_over_frames_of_cosines_over_dimensions(center: bool) -> None:
    semantic, batch = SemanticDistillation(D, C, center, "T"), semantic_batch()
    expected = [loss for student, teacher in spoken(semantic, *batch) for loss in map(loss_of_cosine, student, teacher)]
    assert len(expected) == T + 5
    assert semantic(*batch).item() == pytest.approx(np.mean(expected), rel=1e-5)


def test_the_axes_compare_different_things() -> None:
    """A teacher's frames in other sizes are the same directions; its dimensions in other sizes, the same courses."""
    teacher = frames(seed=1)
    sizes = 1 + torch.arange(T)[None, :, None] / 2
    scales = 1 + torch.arange(D) / 2
    agreement = {}
    for axis in ("D", "T"):
        loss = identity(False, axis)
        agreement[axis] = [loss(x.transpose(1, 2), teacher, everything()) for x in (sizes * teacher, scales * teacher)]
    one = pytest.approx(math.log(1 + math.exp(-1)), abs=1e-5)
    assert agreement["T"][0].item() == one and agreement["D"][1].item() == one
    assert agreement["D"][0].item() != one and agreement["T"][1].item() != one


def test_centring_removes_constant_offsets() -> None:
    draw = torch.Generator().manual_seed(0)
    offset_of_student, offset_of_teacher = (50 * torch.randn(B, 1, D, generator=draw) for _ in range(2))
    plain = [frames(seed=0), frames(seed=1)]
    shifted = [plain[0] + offset_of_student, plain[1] + offset_of_teacher]
    values = {
        center: [identity(center)(s.transpose(1, 2), t, some()).item() for s, t in (plain, shifted)]
        for center in (True, False)
    }
    assert values[True][0] == pytest.approx(values[True][1], abs=1e-4)
    assert abs(values[False][0] - values[False][1]) > 0.01


def test_a_constant_student_has_the_loss_of_cosine_zero_when_centred() -> None:
    """The literal form rewards it, because offsets dominate the teacher's values."""
    teacher = 5 + frames()
    constant = torch.full((B, D, T), 5.0)
    assert identity(center=True)(constant, teacher, everything()).item() == pytest.approx(math.log(2), abs=1e-3)
    assert identity(center=False)(constant, teacher, everything()).item() < 0.33


@pytest.mark.parametrize("axis", ["D", "T"])
@pytest.mark.parametrize("center", [True, False])
def test_masked_frames_have_no_influence_on_eq_4(center: bool, axis: str) -> None:
    semantic, mask = SemanticDistillation(D, C, center, axis), some()
    layer0, target = frames().transpose(1, 2).requires_grad_(), frames(C, seed=1)
    value = semantic(layer0, target, mask)
    with torch.no_grad():
        other = semantic(layer0.masked_fill(~mask[:, None], 77.0), target.masked_fill(~mask[..., None], -55.0), mask)
    assert value.item() == other.item()
    value.backward()
    assert not layer0.grad[1, :, 5:].any()
    assert (layer0.grad[1, :, :5].abs().sum(0) > 0).all()


def test_minimising_eq_4_trains_the_projection_and_layer_0_but_not_the_teacher() -> None:
    torch.manual_seed(0)
    semantic, target = SemanticDistillation(D, C), frames(C, seed=1)
    layer0 = torch.nn.Parameter(frames().transpose(1, 2))
    optimizer = torch.optim.Adam([layer0, *semantic.parameters()], 0.05)
    for _ in range(150):
        optimizer.zero_grad()
        value = semantic(layer0, target, everything())
        value.backward()
        optimizer.step()
    assert value.item() == pytest.approx(0.3133, abs=0.005)


def agreeing(acoustic: AcousticDistillation, speaker: Tensor) -> Tensor:
    """A layer 1 [B, D, T] with the align layer's distribution; a constant added to all logits does not change it."""
    return (acoustic.align(speaker, everything()).detach() + 3.0).transpose(1, 2)


@pytest.fixture
def acoustic() -> AcousticDistillation:
    torch.manual_seed(0)
    return AcousticDistillation(D, C, width=16, heads=8).eval()


def test_eq_5_is_zero_when_the_distributions_agree_and_positive_otherwise(acoustic: AcousticDistillation) -> None:
    speaker = frames(C, 2 * T + 1)
    layer1 = agreeing(acoustic, speaker)
    assert acoustic(layer1, speaker, everything()).item() == pytest.approx(0, abs=1e-6)
    assert acoustic(layer1.flip(1), speaker, everything()).item() > 1e-3


def test_eq_5_equals_the_divergence_computed_by_hand(acoustic: AcousticDistillation) -> None:
    speaker, layer1, mask = frames(C, 2 * T + 1), 2 * frames(seed=1).transpose(1, 2), some()

    def softmax(x: np.ndarray) -> np.ndarray:
        x = np.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    p = softmax(layer1.transpose(1, 2).double().numpy())
    q = softmax(acoustic.align(speaker, mask).detach().double().numpy())
    divergence = (p * np.log(p / q)).sum(-1)
    expected = divergence[mask.numpy()].mean()
    assert expected > 0.1
    assert acoustic(layer1, speaker, mask).item() == pytest.approx(expected, rel=1e-5)


def test_masked_frames_of_layer_1_have_no_influence_on_eq_5(acoustic: AcousticDistillation) -> None:
    speaker, layer1, mask = frames(C, 2 * T + 1), frames(seed=1).transpose(1, 2), some()
    garbage = torch.where(mask[:, None], layer1, 9 * frames(seed=5).transpose(1, 2))
    assert acoustic(layer1, speaker, mask).item() == acoustic(garbage, speaker, mask).item()


@pytest.mark.parametrize("extra", [0, 1], ids=["cached features", "features of the crop"])
def test_an_utterance_in_a_padded_batch_has_the_eq_5_it_has_alone(acoustic: AcousticDistillation, extra: int) -> None:
    """No frame of the speech attends to the teacher's output for the padding."""
    speaker, layer1 = frames(C, 2 * T + extra), frames(seed=1).transpose(1, 2)
    speaker[1, 2 * 5 + extra :] = 50 * frames(C, 2 * T + extra, seed=2)[1, 2 * 5 + extra :]
    alone = [
        acoustic(
            layer1[b : b + 1, :, :n], speaker[b : b + 1, : 2 * n + extra], torch.ones(1, n, dtype=torch.bool)
        ).item()
        for b, n in enumerate((T, 5))
    ]
    expected = (T * alone[0] + 5 * alone[1]) / (T + 5)
    assert acoustic(layer1, speaker, some()).item() == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_frames_has_no_loss(acoustic: AcousticDistillation) -> None:
    speaker, layer1 = frames(C, 2 * T + 1), frames().transpose(1, 2)
    assert acoustic(layer1, speaker, torch.zeros(B, T, dtype=torch.bool)).item() == 0


def test_the_gradient_of_eq_5_reaches_layer_1_the_align_layer_and_the_latents(acoustic: AcousticDistillation) -> None:
    torch.manual_seed(0)
    z = torch.randn(B, D, T, requires_grad=True)
    layer1 = ResidualVectorQuantizer(D, 3, 16)(z).layers[1]
    layer1.retain_grad()
    acoustic(layer1, frames(C, 2 * T + 1), some()).backward()
    assert (layer1.grad[0].abs().sum(0) > 0).all()
    assert not layer1.grad[1, :, 5:].any()
    assert torch.equal(z.grad, layer1.grad)
    for name, parameter in acoustic.named_parameters():
        # a bias of the keys shifts all scores alike, which does not change the softmax
        checked = parameter.grad[:16] if name == "attention.in_proj_bias" else parameter.grad
        assert checked.abs().max() > 0, name


@pytest.mark.parametrize("teacher_frames, length", [(25, 12), (101, 50), (12, 12), (7, 12)])
def test_the_align_layer_gives_the_codecs_frame_rate(
    acoustic: AcousticDistillation, teacher_frames: int, length: int
) -> None:
    aligned = acoustic.align(frames(C, teacher_frames), torch.ones(B, length, dtype=torch.bool))
    assert aligned.shape == (B, length, D)
    assert aligned.std(1).min() > 1e-4  # frames differ


def test_the_align_layer_knows_positions(acoustic: AcousticDistillation) -> None:
    """The same teacher frame all along still gives different outputs."""
    constant = frames(C, 1).expand(B, 24, C)
    assert acoustic.align(constant, everything()).std(1).min() > 1e-3


def test_the_align_layer_keeps_the_order_in_time(acoustic: AcousticDistillation) -> None:
    quiet = torch.zeros(B, 24, C)
    event = quiet.clone()
    event[:, 12:14] = 5 * frames(C, 2)
    moved = (acoustic.align(event, everything()) - acoustic.align(quiet, everything())).norm(dim=-1)
    assert moved.argmax(1).tolist() == [6, 6]


def test_equal_waveforms_have_no_reconstruction_loss() -> None:
    waveform = 0.1 * torch.randn(2, 3_000)
    assert float(MultiScaleMelLoss(16_000)(waveform, waveform)) == 0


def test_a_gain_costs_twice_its_logarithm() -> None:
    """|log g| by L1 and |log g| by L2, in every band at every scale."""
    original = torch.randn(2, 3_000, generator=torch.Generator().manual_seed(0))
    loss = MultiScaleMelLoss(16_000)
    for gain in (0.5, 1.5):
        assert float(loss(gain * original, original)) == pytest.approx(2 * abs(math.log(gain)), rel=1e-4)


def test_with_a_power_what_is_louder_counts_more_and_with_none_all_the_same() -> None:
    """Magnitudes k times as large are k^p as large to the power p, and k times away in logarithm."""
    draw = torch.Generator().manual_seed(0)
    original, other = torch.randn(2, 3_000, generator=draw), torch.randn(2, 3_000, generator=draw)
    for power in (0.0, 0.3, 1.0):
        loss = MultiScaleMelLoss(16_000, power=power)
        assert float(loss(8 * other, 8 * original) / loss(other, original)) == pytest.approx(8**power, rel=1e-4)
    nearly, log = (float(MultiScaleMelLoss(16_000, power=power)(other, original)) for power in (1e-3, 0.0))
    assert nearly == pytest.approx(log, rel=1e-2)


def test_the_reconstruction_loss_has_a_gradient_everywhere() -> None:
    original = torch.randn(1, 3_000, generator=torch.Generator().manual_seed(0))
    guess = torch.randn(1, 3_000, generator=torch.Generator().manual_seed(1)).requires_grad_()
    MultiScaleMelLoss(16_000)(guess, original).backward()
    assert torch.isfinite(guess.grad).all()
    assert (guess.grad != 0).float().mean() > 0.99
