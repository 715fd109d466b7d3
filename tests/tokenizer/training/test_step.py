"""The training loss: its gradients are those of the sum of all losses, limited and balanced as configured."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechllm import SpeechCodec, SpeechCodecConfig
from tokenizer.training import step as step_module
from tokenizer.training.averaging import average_weights, decay_at
from tokenizer.training.discriminators import Adversary, MultiScaleSTFTDiscriminator
from tokenizer.training.gradients import GradientCaps
from tokenizer.training.losses import Balancer, MultiScaleMelLoss, ReconstructionLoss
from tokenizer.training.step import CodecLoss, DistillationLoss, draw_starts, parameter_groups, repeat_speech

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
    targets, lengths = options.pop("targets", {}), options.pop("lengths", LENGTHS)
    loss_of = CodecLoss(codec, criterion, distillations)
    loss, metrics = loss_of({"waveform": waveform, "length": lengths, **targets}, **options)
    loss.backward()
    return metrics | loss_of.caps.update()


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
    heard, original = (
        torch.stack([torch.cat([row[:n], row[: N - n]]) for row, n in zip(x, LENGTHS, strict=True)])
        for x in (reconstruction, waveform)
    )
    parts = {
        "time": F.l1_loss(heard, original),
        "mel": mel(heard, original),
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


def test_padding_has_no_gradient(codec: SpeechCodec, mel: MultiScaleMelLoss, waveform: Tensor) -> None:
    seen = []
    criterion = ReconstructionLoss({"time": 1.0, "mel": 1.0}, mel)
    codec.decoder.register_forward_hook(lambda module, inputs, output: output.register_hook(seen.append) and None)
    step(codec, waveform, criterion)
    padding = torch.arange(N) >= LENGTHS[:, None]
    assert padding.any() and not seen[0][:, 0][padding].any()
    assert (seen[0][:, 0][~padding] != 0).float().mean() > 0.99
    for size in (1, 3, 8):
        repeated = repeat_speech(torch.arange(8.0)[None], torch.tensor([size]))
        assert repeated[0].tolist() == [i % size for i in range(8)]


def test_windows_start_within_the_speech() -> None:
    frames = torch.tensor([20, 7, 5, 3])
    starts = torch.stack([draw_starts(frames, 5) for _ in range(300)])
    assert starts.min(0).values.tolist() == [0, 0, 0, 0] and starts.max(0).values.tolist() == [15, 2, 0, 0]


@pytest.mark.parametrize("ratio", [0.2, 3.0])
def test_a_distillation_has_at_most_the_configured_share_of_the_gradient_at_the_latents(
    codec: SpeechCodec, mel: MultiScaleMelLoss, waveform: Tensor, ratio: float
) -> None:
    seen: list[Tensor] = []
    latents = codec.latents

    def watched(waveform: Tensor) -> Tensor:
        z = latents(waveform)
        z.register_hook(lambda gradient: seen.append(gradient.clone()))
        return z

    codec.latents = watched
    criterion = ReconstructionLoss({"mel": 1.0, "commitment": 0.0}, mel)
    step(codec, waveform, criterion)
    student = Student()
    limited = DistillationLoss("speaker", 1, Teacher(), student, gradient_ratio=ratio, weight=1e6)
    loss_of = CodecLoss(codec, criterion, [limited])
    found = []
    for _ in range(3):
        codec.zero_grad(), student.zero_grad()
        loss_of({"waveform": waveform, "length": LENGTHS})[0].backward()
        found.append(loss_of.caps.update())
    alone, first, *others = seen
    torch.testing.assert_close(first, alone)  # in the first step nothing is known of the norms
    for gradient, figures in zip(others, found[1:], strict=True):
        assert float((gradient - alone).norm() / alone.norm()) == pytest.approx(ratio, rel=1e-3)
        assert float(figures["speaker_gradient"]) == pytest.approx(ratio, rel=1e-3)
    # the student itself learns from its loss, whatever the limit
    own = gradients(student)
    student.zero_grad()
    z = latents(waveform)
    mask = torch.arange(z.shape[2]) * codec.hop_length < LENGTHS[:, None]
    (1e6 * student(codec.quantizer(z, mask).layers[1], Teacher()(waveform), mask)).backward()
    assert_equal(own, gradients(student))


def test_a_gradient_below_the_limit_is_left_as_it_is() -> None:
    caps = GradientCaps({"weak": 2.0, "strong": 0.5, "free": None})
    x = torch.ones(1, 3, requires_grad=True)
    for _ in range(2):
        x.grad = None
        (
            caps.reference(x) + caps.limit("weak", x) + 4 * caps.limit("strong", x) + 9 * caps.limit("free", x)
        ).sum().backward()
        found = caps.update()
    assert [float(found[f"{name}_factor"]) for name in caps.names] == pytest.approx([1, 0.125, 1])
    assert [float(found[f"{name}_gradient"]) for name in caps.names] == pytest.approx([1, 0.5, 9])
    torch.testing.assert_close(x.grad, torch.full((1, 3), 1 + 1 + 0.5 + 9.0))


def test_gains_and_biases_do_not_decay(codec: SpeechCodec, mel: MultiScaleMelLoss) -> None:
    loss_of = CodecLoss(codec, ReconstructionLoss({"mel": 1.0}, mel), [DistillationLoss("a", 0, Teacher(), Student())])
    decayed, plain = parameter_groups(loss_of, 0.1)
    names = {id(p): name for name, p in loss_of.named_parameters()}
    assert all(names[id(p)].endswith(("weight", "weight.original1")) for p in decayed["params"])
    assert all(names[id(p)].endswith(("bias", "weight.original0")) for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names) - 1  # all but what was measured
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0


def test_weights_are_averaged_and_codebooks_are_those_of_the_last_step(codec: SpeechCodec) -> None:
    averaged = average_weights(codec, 0.75)
    assert average_weights(codec, None) is None
    averaged.update_parameters(codec)  # the first step is taken as it is
    weights = [parameter.detach().clone() for parameter in codec.parameters()]
    with torch.no_grad():
        for tensor in [*codec.parameters(), codec.quantizer.codebooks]:
            tensor.add_(1.0)
    averaged.update_parameters(codec)
    for found, weight in zip(averaged.module.parameters(), weights, strict=True):
        torch.testing.assert_close(found, weight + 9 / 11)
    assert [decay_at(0.75, updates) for updates in (1, 26, 27, 10**6)] == [2 / 11, 0.75, 0.75, 0.75]
    assert torch.equal(averaged.module.quantizer.codebooks, codec.quantizer.codebooks)


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


def gradient_of(criterion: ReconstructionLoss, reconstruction: Tensor, original: Tensor, **options: object) -> Tensor:
    leaf = reconstruction.clone().requires_grad_()
    loss, _ = criterion(leaf, original, **options)
    return torch.autograd.grad(loss, leaf)[0]


def test_speech_features_of_the_reconstruction_are_matched(mel: MultiScaleMelLoss, waveform: Tensor) -> None:
    criterion = ReconstructionLoss({"speech_features": 2.0}, mel, perceptual_model=Teacher())
    reconstruction = waveform.flip(1)
    leaf = reconstruction.clone().requires_grad_()
    loss = (Teacher()(leaf) - Teacher()(waveform)).abs().mean()
    (2 * loss).backward()
    torch.testing.assert_close(gradient_of(criterion, reconstruction, waveform), leaf.grad)
    assert float(criterion(reconstruction, waveform)[1]["speech_features"]) == pytest.approx(float(loss))


def test_a_teacher_of_both_semantic_losses_runs_once_on_the_original(
    codec: SpeechCodec, mel: MultiScaleMelLoss, waveform: Tensor
) -> None:
    calls = []

    class Counting(Teacher):
        def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
            calls.append(waveform)
            return self.features(waveform)

    teacher = Counting()
    criterion = ReconstructionLoss({"speech_features": 1.0}, mel, perceptual_model=teacher)
    full = torch.full((B,), N)
    step(codec, waveform, criterion, DistillationLoss("content", 0, teacher, Student()), lengths=full)
    assert len(calls) == 1
    step(codec, waveform, criterion, DistillationLoss("content", 0, teacher, Student()), window=5)
    assert [len(call[0]) for call in calls[1:]] == [5 * 320, N]


def test_the_target_of_a_short_crop_is_what_the_teacher_hears_in_the_recording(
    codec: SpeechCodec, mel: MultiScaleMelLoss, waveform: Tensor
) -> None:
    """The loss of speech features fills padding by repeating the speech, which the teacher must not hear."""
    heard = []

    class Listening(Teacher):
        def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
            heard.append((waveform.detach(), lengths))
            return self.features(waveform)

    teacher, lengths = Listening(), torch.tensor([N, N // 2])
    padded = waveform[:2] * (torch.arange(N) < lengths[:, None])
    criterion = ReconstructionLoss({"speech_features": 1.0}, mel, perceptual_model=teacher)
    step(codec, padded, criterion, DistillationLoss("content", 0, teacher, Student()), lengths=lengths)
    ((recording, given),) = [one for one in heard if one[1] is not None]
    assert torch.equal(recording, padded) and torch.equal(given, lengths)


@pytest.mark.parametrize("balanced", [True, False])
def test_the_shares_are_those_of_the_weighted_gradients_and_change_nothing(
    mel: MultiScaleMelLoss, waveform: Tensor, balanced: bool
) -> None:
    weights, other = {"time": 1.0, "mel": 3.0}, waveform.flip(1)

    def criterion() -> ReconstructionLoss:
        return ReconstructionLoss(weights, mel, balancer=Balancer(weights) if balanced else None)

    _, found = criterion()(other, waveform, shares=True)
    if balanced:
        expected = [0.25, 0.75]
    else:
        each = [gradient_of(ReconstructionLoss({name: w}, mel), other, waveform) for name, w in weights.items()]
        norms = [gradient.norm(dim=1).mean() for gradient in each]
        expected = [float(norm / sum(norms)) for norm in norms]
    assert [float(found[f"{name}_share"]) for name in weights] == pytest.approx(expected, rel=1e-4)
    plain, shared = (gradient_of(criterion(), other, waveform, shares=shares) for shares in (False, True))
    assert torch.equal(plain, shared)


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


def test_a_window_is_compared_with_its_own_part_of_the_recording(
    codec: SpeechCodec, mel: MultiScaleMelLoss, waveform: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts, seen = (3, 0, 7), {}
    monkeypatch.setattr(step_module, "draw_starts", lambda frames, window: torch.tensor(starts))
    monkeypatch.setattr(
        codec, "reconstruct", lambda z, original: seen.update(z=z, original=original) or codec.decoder(z)[:, 0]
    )
    batch = {"waveform": waveform, "length": torch.full((B,), N)}
    CodecLoss(codec.eval(), ReconstructionLoss({"mel": 1.0}, mel))(batch, window=5)
    output, hop = codec.quantizer(codec.latents(waveform)).output, codec.hop_length
    for row, start in enumerate(starts):
        assert torch.equal(seen["original"][row], waveform[row, hop * start : hop * (start + 5)])
        torch.testing.assert_close(seen["z"][row], output[row, :, start : start + 5])


def test_each_utterance_is_decoded_from_as_many_codebooks_as_were_drawn_for_it(
    codec: SpeechCodec, mel: MultiScaleMelLoss, waveform: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(codec, "reconstruct", lambda z, original: seen.append(z) or codec.decoder(z)[:, 0])
    counts = torch.tensor([1, codec.num_codebooks, 2])
    batch = {"waveform": waveform, "length": torch.full((B,), N)}
    CodecLoss(codec.eval(), ReconstructionLoss({"mel": 1.0}, mel))(batch, counts)
    ids = codec.quantizer.encode(codec.latents(waveform))
    for row, count in enumerate(counts.tolist()):
        expected = codec.quantizer.decode(ids[row : row + 1, :count])[0]
        torch.testing.assert_close(seen[0][row], expected, rtol=1e-4, atol=1e-5)
    drawn = step_module.draw_layers([1, 3], 600, torch.device("cpu"))
    assert sorted(drawn.unique().tolist()) == [1, 3] and 200 < int((drawn == 1).sum()) < 400
    assert step_module.draw_layers(None, 4, torch.device("cpu")) is None


def test_balanced_weights_are_shares_whatever_the_scale_of_a_loss() -> None:
    """As EnCodec has it: with a forgetful average the mean norm of an utterance's gradient is weight / total."""
    draw = torch.Generator().manual_seed(0)
    small, large = torch.randn(B, 50, generator=draw), 1e4 * torch.randn(B, 50, generator=draw)
    weighed = Balancer({"a": 1.0, "b": 3.0}, decay=0.0).weigh({"a": small, "b": large})
    for share, gradient, found in ((0.25, small, weighed["a"]), (0.75, large, weighed["b"])):
        torch.testing.assert_close(found, share * gradient / gradient.norm(dim=1).mean())


def test_the_balancers_average_has_no_bias_and_survives_a_restart() -> None:
    """The first average is the first norm itself; a restored balancer continues like the original."""
    gradient = torch.ones(1, 4)
    balancer = Balancer({"a": 1.0})
    torch.testing.assert_close(balancer.weigh({"a": gradient})["a"], gradient / 2)
    restored = Balancer({"a": 1.0})
    restored.load_state_dict(balancer.state_dict())
    assert torch.equal(restored.weigh({"a": 3 * gradient})["a"], balancer.weigh({"a": 3 * gradient})["a"])


def test_a_balanced_criterion_weighs_each_loss_by_its_own_gradient(mel: MultiScaleMelLoss, waveform: Tensor) -> None:
    weights, other = {"time": 1.0, "mel": 1.0}, waveform.flip(1)
    each = [gradient_of(ReconstructionLoss({name: 1.0}, mel), other, waveform) for name in weights]
    balanced = gradient_of(ReconstructionLoss(weights, mel, balancer=Balancer(weights)), other, waveform)
    torch.testing.assert_close(balanced, sum(0.5 * gradient / gradient.norm(dim=1).mean() for gradient in each))


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
