"""One training step: gradients cut at the waveform and at the latents add up to those of one loss."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechllm import SpeechCodec, SpeechCodecConfig
from tokenizer.training.discriminators import Adversary, MultiScaleSTFTDiscriminator
from tokenizer.training.losses import Balancer, MultiScaleMelLoss, ReconstructionLoss
from tokenizer.training.step import DistillationLoss, codec_backward

B, N, D, P = 3, 6_400, 8, 6
LENGTHS = torch.tensor([6_400, 5_000, 6_400])


class Teacher(nn.Module):
    """Features float [B, N / 320, P]: a fixed projection of the frames."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.weight = torch.randn(320, P, generator=torch.Generator().manual_seed(seed))

    def features(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        return waveform[:, : waveform.shape[1] // 320 * 320].unflatten(1, (-1, 320)) @ self.weight

    forward = features


class Student(nn.Module):
    """Mean squared distance of a projection of the layer to the teacher's features."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(D, P)

    def forward(self, layer: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        distance = (self.projection(layer.transpose(1, 2)) - target).square().mean(-1)
        return (distance * mask).sum() / mask.sum()


@pytest.fixture
def waveform() -> Tensor:
    waveform = 0.1 * torch.randn(B, N, generator=torch.Generator().manual_seed(0))
    return waveform * (torch.arange(N) < LENGTHS[:, None])


@pytest.fixture
def codec() -> SpeechCodec:
    torch.manual_seed(0)
    config = SpeechCodecConfig(dimension=D, n_filters=4, lstm="none", num_codebooks=3, codebook_size=16)
    return SpeechCodec(config).eval()  # the codebooks stay where they are


@pytest.fixture
def mel() -> MultiScaleMelLoss:
    return MultiScaleMelLoss(16_000, windows=(256, 512))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], factor: float = 1.0) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], factor * gradient, rtol=1e-4, atol=1e-7, msg=name)


def step(
    codec: SpeechCodec, waveform: Tensor, criterion: ReconstructionLoss, *distillations: DistillationLoss, **options
) -> dict:
    codec.zero_grad()
    targets = options.pop("targets", {})
    return codec_backward(
        codec, {"waveform": waveform, "length": LENGTHS, **targets}, criterion, distillations, **options
    )


def test_the_gradients_are_those_of_the_sum_of_all_losses(
    codec: SpeechCodec, mel: MultiScaleMelLoss, waveform: Tensor
) -> None:
    """Independent reference: autograd through everything at once (eq. 7 with the paper's constant weights)."""
    torch.manual_seed(1)
    students = Student(), Student()
    distillations = [
        DistillationLoss("content", 0, Teacher(0), students[0], weight=0.5),
        DistillationLoss("speaker", 1, Teacher(1), students[1], weight=0.7),
    ]
    criterion = ReconstructionLoss({"time": 2.0, "mel": 3.0, "commitment": 0.25}, mel)
    metrics = step(codec, waveform, criterion, *distillations)
    found = gradients(codec)
    student_gradients = [gradients(student) for student in students]

    nn.ModuleList([codec, *students]).zero_grad()
    z = codec.latents(waveform)
    mask = torch.arange(z.shape[2]) * codec.hop_length < LENGTHS[:, None]
    quantized = codec.quantizer(z, mask)
    reconstruction = codec.decoder(quantized.output)[:, 0]
    parts = {
        "time": F.l1_loss(reconstruction, waveform),
        "mel": mel(reconstruction, waveform),
        "commitment": quantized.commitment,
        "content": students[0](quantized.layers[0], Teacher(0)(waveform), mask),
        "speaker": students[1](quantized.layers[1], Teacher(1)(waveform), mask),
    }
    weights = {"time": 2.0, "mel": 3.0, "commitment": 0.25, "content": 0.5, "speaker": 0.7}
    sum(weights[name] * loss for name, loss in parts.items()).backward()
    assert_equal(found, gradients(codec))
    for name, loss in parts.items():
        assert float(metrics[name]) == pytest.approx(loss.item(), rel=1e-5)
    for student, own in zip(students, student_gradients, strict=True):
        assert_equal(gradients(student), own)


@pytest.mark.parametrize("ratio", [0.2, 3.0])
def test_a_distillation_has_the_configured_share_of_the_gradient_at_the_latents(
    codec: SpeechCodec, mel: MultiScaleMelLoss, waveform: Tensor, ratio: float
) -> None:
    seen: dict[str, Tensor] = {}
    latents = codec.latents

    def watched(name: str) -> Callable[[Tensor], Tensor]:
        def run(waveform: Tensor) -> Tensor:
            z = latents(waveform)
            z.register_hook(lambda gradient: seen.__setitem__(name, gradient.clone()))
            return z

        return run

    criterion = ReconstructionLoss({"mel": 1.0}, mel)
    codec.latents = watched("alone")
    step(codec, waveform, criterion)
    codec.latents = watched("distilled")
    student = Student()
    metrics = step(
        codec, waveform, criterion, DistillationLoss("speaker", 1, Teacher(), student, gradient_ratio=ratio, weight=9.0)
    )
    added = seen["distilled"] - seen["alone"]
    assert float(added.norm() / seen["alone"].norm()) == pytest.approx(ratio, rel=1e-3)
    assert float(metrics["speaker_gradient"]) == pytest.approx(ratio, rel=1e-4)
    # the student itself learns from its loss as it is
    found = gradients(student)
    student.zero_grad()
    z = latents(waveform)
    mask = torch.arange(z.shape[2]) * codec.hop_length < LENGTHS[:, None]
    student(codec.quantizer(z, mask).layers[1], Teacher()(waveform), mask).backward()
    assert_equal(found, gradients(student))


def test_known_targets_replace_the_teacher(codec: SpeechCodec, mel: MultiScaleMelLoss, waveform: Tensor) -> None:
    class Unused(nn.Module):
        def forward(self, *arguments: Tensor) -> Tensor:
            raise AssertionError("called, although its features were given")

    torch.manual_seed(1)
    student, criterion = Student(), ReconstructionLoss({"mel": 1.0}, mel)
    step(codec, waveform, criterion, DistillationLoss("content", 0, Teacher(), student, 1.0))
    expected = gradients(codec)
    targets = {"content": Teacher()(waveform)}
    step(codec, waveform, criterion, DistillationLoss("content", 0, Unused(), student, 1.0), targets=targets)
    assert_equal(gradients(codec), expected)


def test_losses_without_a_weight_do_not_count(mel: MultiScaleMelLoss, waveform: Tensor) -> None:
    losses = ReconstructionLoss({"time": 0.0, "mel": 1.0}, mel).losses(waveform.flip(1), waveform)
    assert list(losses) == ["mel"]


def test_speech_features_of_the_reconstruction_are_matched(mel: MultiScaleMelLoss, waveform: Tensor) -> None:
    criterion = ReconstructionLoss({"speech_features": 2.0}, mel, perceptual_model=Teacher())
    reconstruction = waveform.flip(1)
    gradient, losses = criterion.gradient(reconstruction, waveform)
    leaf = reconstruction.clone().requires_grad_()
    loss = (Teacher()(leaf) - Teacher()(waveform)).abs().mean()
    (2 * loss).backward()
    torch.testing.assert_close(gradient, leaf.grad)
    assert float(losses["speech_features"]) == pytest.approx(float(loss))


def test_the_adversary_learns_and_is_applied_in_the_same_step(
    codec: SpeechCodec, mel: MultiScaleMelLoss, waveform: Tensor
) -> None:
    torch.manual_seed(1)
    adversary = Adversary([MultiScaleSTFTDiscriminator(2, (256,))], "hinge", 1e-3)
    before = [p.detach().clone() for p in adversary.parameters()]
    weights = {"mel": 1.0, "adversarial": 1.0, "feature_matching": 1.0}
    step(codec, waveform, ReconstructionLoss(weights, mel))
    alone = gradients(codec)
    metrics = step(codec, waveform, ReconstructionLoss(weights, mel, adversary))
    assert {"discriminator", "adversarial", "feature_matching"} <= metrics.keys()
    assert any(not torch.equal(p, q) for p, q in zip(before, adversary.parameters(), strict=True))
    assert any(not torch.equal(g, alone[name]) for name, g in gradients(codec).items())


def test_only_the_chosen_window_is_decoded(codec: SpeechCodec, mel: MultiScaleMelLoss, waveform: Tensor) -> None:
    sizes = []
    codec.decoder.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape))
    step(codec, waveform, ReconstructionLoss({"mel": 1.0}, mel), window=5)
    assert sizes == [(B, 1, 5 * codec.hop_length)]


def test_balanced_weights_are_shares_whatever_the_scale_of_a_loss() -> None:
    """With a forgetful average each gradient has the norm weight / total / B per utterance."""
    draw = torch.Generator().manual_seed(0)
    small, large = torch.randn(B, 50, generator=draw), 1e4 * torch.randn(B, 50, generator=draw)
    combined = Balancer({"a": 1.0, "b": 3.0}, decay=0.0).combine({"a": small, "b": large})
    expected = sum(
        share / B * gradient / gradient.norm(dim=1).mean() for share, gradient in ((0.25, small), (0.75, large))
    )
    torch.testing.assert_close(combined, expected)


def test_the_balancers_average_has_no_bias_and_survives_a_restart() -> None:
    """The first average is the first norm itself; a restored balancer continues like the original."""
    gradient = torch.ones(1, 4)
    balancer = Balancer({"a": 1.0})
    torch.testing.assert_close(balancer.combine({"a": gradient}), gradient / 2)
    restored = Balancer({"a": 1.0})
    restored.load_state_dict(balancer.state_dict())
    assert torch.equal(restored.combine({"a": 3 * gradient}), balancer.combine({"a": 3 * gradient}))


def test_a_balanced_criterion_weighs_each_loss_by_its_own_gradient(mel: MultiScaleMelLoss, waveform: Tensor) -> None:
    weights = {"time": 1.0, "mel": 1.0}
    reconstruction = waveform.flip(1)
    plain, _ = ReconstructionLoss({"time": 1.0}, mel).gradient(reconstruction, waveform)
    other, _ = ReconstructionLoss({"mel": 1.0}, mel).gradient(reconstruction, waveform)
    balanced, _ = ReconstructionLoss(weights, mel, balancer=Balancer(weights)).gradient(reconstruction, waveform)
    expected = sum(0.5 / B * gradient / gradient.norm(dim=1).mean() for gradient in (plain, other))
    torch.testing.assert_close(balanced, expected)


@pytest.mark.parametrize("bands, weights", [(None, None), ([10, 20], [45.0, 1.0])])
def test_mel_scales_are_added_with_their_weights(
    waveform: Tensor, bands: list[int] | None, weights: list[float] | None
) -> None:
    windows = [256, 512]
    both = MultiScaleMelLoss(16_000, windows, bands, weights, squared=False)
    single = [
        MultiScaleMelLoss(16_000, [window], [bands[i]] if bands else None, [1.0], squared=False)
        for i, window in enumerate(windows)
    ]
    a, b = weights or (0.5, 0.5)
    other = waveform.flip(1)
    expected = a * single[0](other, waveform) + b * single[1](other, waveform)
    torch.testing.assert_close(both(other, waveform), expected)
