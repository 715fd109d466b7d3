"""Residual vector quantisation: gradients, ids, and codebooks that follow the data."""

import copy
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tokenizer.codec.quantizer import ResidualVectorQuantizer

pytestmark = pytest.mark.numeric

D, Q, K = 8, 4, 16


@pytest.fixture
def quantizer() -> ResidualVectorQuantizer:
    torch.manual_seed(0)
    return ResidualVectorQuantizer(D, Q, K)


def latents(batch: int = 2, frames: int = 30, seed: int = 1) -> Tensor:
    return torch.randn(batch, D, frames, generator=torch.Generator().manual_seed(seed))


def summed(quantizer: ResidualVectorQuantizer, ids: Tensor) -> Tensor:
    """The sum of code vectors [B, D, T], taken one by one."""
    out = torch.zeros(ids.shape[0], D, ids.shape[2])
    for b, q, t in torch.cartesian_prod(*(torch.arange(n) for n in ids.shape)).tolist():
        out[b, :, t] += quantizer.codebooks[q, ids[b, q, t]]
    return out


def quantized_by_hand(quantizer: ResidualVectorQuantizer, z: Tensor) -> tuple[Tensor, Tensor]:
    """Ids [B, Q, T] and squared distances [B, Q, T] by full distance matrices in float64."""
    residual, ids, distances = z.double().transpose(1, 2), [], []
    for codebook in quantizer.codebooks.double():
        distance, nearest = torch.cdist(residual, codebook.expand(len(z), -1, -1)).square().min(-1)
        residual = residual - codebook[nearest]
        ids.append(nearest)
        distances.append(distance)
    return torch.stack(ids, 1), torch.stack(distances, 1)


def state(quantizer: ResidualVectorQuantizer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}


def assert_same_state(a: dict[str, Tensor], b: dict[str, Tensor], atol: float = 0.0) -> None:
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("layer", range(Q))
@pytest.mark.parametrize("training", [False, True])
def test_a_loss_on_any_layer_reaches_the_latents_unchanged(
    quantizer: ResidualVectorQuantizer, layer: int, training: bool
) -> None:
    z = latents().requires_grad_()
    weights = latents(seed=2)
    (quantizer.train(training)(z).layers[layer] * weights).sum().backward()
    torch.testing.assert_close(z.grad, weights, atol=0, rtol=0)


@pytest.mark.parametrize("training", [False, True])
def test_the_gradient_of_the_output_reaches_the_latents_once(
    quantizer: ResidualVectorQuantizer, training: bool
) -> None:
    z = latents().requires_grad_()
    weights = latents(seed=2)
    (quantizer.train(training)(z).output * weights).sum().backward()
    torch.testing.assert_close(z.grad, weights, atol=0, rtol=0)


def test_the_gradient_of_the_commitment_pulls_the_latents_to_their_codes(quantizer: ResidualVectorQuantizer) -> None:
    z = latents().requires_grad_()
    quantized = quantizer.eval()(z)
    quantized.commitment.backward()
    pull = torch.zeros_like(z)
    for layers in range(1, Q + 1):  # d/dz of |z - (sum of the first layers)|^2, code vectors constant
        pull += 2 * (z.detach() - summed(quantizer, quantized.ids[:, :layers]))
    torch.testing.assert_close(z.grad, pull / (z.numel() * Q))


def test_codebooks_take_no_gradient(quantizer: ResidualVectorQuantizer) -> None:
    assert list(quantizer.parameters()) == []
    assert set(quantizer.state_dict()) == {"codebooks", "usage", "sums"}


def test_every_layer_takes_the_nearest_code_of_what_is_left(
    quantizer: ResidualVectorQuantizer, assert_same_codes: Callable[..., None]
) -> None:
    z = latents()
    quantized = quantizer.eval()(z)
    ids, distances = quantized_by_hand(quantizer, z)
    assert_same_codes(quantizer, z, quantized.ids, ids)
    assert float(quantized.commitment) == pytest.approx(float(distances.mean()) / D, rel=1e-5)


def test_layers_and_output_hold_the_code_vectors(quantizer: ResidualVectorQuantizer) -> None:
    quantized = quantizer.eval()(latents())
    assert len(quantized.layers) == Q
    for layer, values in enumerate(quantized.layers):
        vectors = quantizer.codebooks[layer][quantized.ids[:, layer]].transpose(1, 2)
        torch.testing.assert_close(values, vectors, atol=1e-5, rtol=0)
    torch.testing.assert_close(quantized.output, summed(quantizer, quantized.ids), atol=1e-5, rtol=0)


def test_encode_gives_the_ids_of_forward(
    quantizer: ResidualVectorQuantizer, assert_same_codes: Callable[..., None]
) -> None:
    z = latents()
    assert_same_codes(quantizer, z, quantizer.eval().encode(z), quantizer(z).ids)
    assert len(quantizer.encode(z).unique()) > K // 2


def test_codes_count_as_the_same_where_rounding_decides_only(
    quantizer: ResidualVectorQuantizer, assert_same_codes: Callable[..., None]
) -> None:
    z = latents()
    border = quantizer.codebooks[0, :2].mean(0)
    z[0, :, 3] = border
    quantizer.codebooks[0, 2:] += 5  # no other code is near the boundary
    ids = quantizer.encode(z)
    tied = ids.clone()
    tied[0, 0, 3] = 1 - ids[0, 0, 3]
    tied[0, 1:, 3] = (ids[0, 1:, 3] + 1) % K  # what the other of the two leaves over is something else
    assert_same_codes(quantizer, z, tied, ids)
    for layer in range(Q):
        wrong = ids.clone()
        wrong[1, layer, 5] = (wrong[1, layer, 5] + 1) % K
        for pair in ((wrong, ids), (ids, wrong), (wrong, wrong)):
            with pytest.raises(AssertionError, match=f"layer {layer}: "):
                assert_same_codes(quantizer, z, *pair)
    with pytest.raises(AssertionError, match="60 frames too close"):
        assert_same_codes(quantizer, border[None, :, None].expand(2, D, 30), ids, ids)


@pytest.mark.parametrize("layers", range(1, Q + 1))
def test_fewer_layers_are_the_first_of_all(quantizer: ResidualVectorQuantizer, layers: int) -> None:
    z = latents()
    assert torch.equal(quantizer.encode(z, layers), quantizer.encode(z)[:, :layers])


@pytest.mark.parametrize("layers", [1, 2, Q])
def test_decode_is_the_sum_of_code_vectors(quantizer: ResidualVectorQuantizer, layers: int) -> None:
    ids = quantizer.encode(latents(), layers)
    torch.testing.assert_close(quantizer.decode(ids), summed(quantizer, ids))


def test_more_layers_come_closer(quantizer: ResidualVectorQuantizer) -> None:
    z = torch.randn(1, D, 20 * K)
    quantizer.initialize(z[0].T)
    errors = [float((quantizer.decode(quantizer.encode(z, n)) - z).square().mean()) for n in range(1, Q + 1)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


def test_evaluation_moves_nothing(quantizer: ResidualVectorQuantizer) -> None:
    before = state(quantizer)
    quantizer.eval()(latents())
    quantizer.train().encode(latents())
    assert_same_state(before, quantizer.state_dict())


@pytest.mark.parametrize("decay", [0.99, 0.8])
def test_a_training_step_moves_codebooks_by_the_moving_averages(
    quantizer: ResidualVectorQuantizer, decay: float
) -> None:
    assert quantizer.decay == 0.99
    quantizer.decay = decay
    z = latents(frames=200)
    before = copy.deepcopy(quantizer)
    quantized = quantizer.train()(z)
    assert torch.equal(quantized.ids, before.eval()(z).ids)  # the step quantises with the codebooks it found
    residual = z.transpose(1, 2).flatten(0, 1).double()
    for layer in range(Q):
        ids = quantized.ids[:, layer].flatten()
        member = torch.nn.functional.one_hot(ids, K).double()
        mean = member.sum(0).mean()
        usage = decay * before.usage[layer].double() + (1 - decay) * member.sum(0) / mean
        sums = decay * before.sums[layer].double() + (1 - decay) * (member.T @ residual) / mean
        torch.testing.assert_close(quantizer.usage[layer], usage.float(), atol=1e-6, rtol=0)
        torch.testing.assert_close(quantizer.codebooks[layer], (sums / usage[:, None]).float(), atol=1e-5, rtol=0)
        residual = residual - before.codebooks[layer].double()[ids]


def test_training_brings_codebooks_to_the_data(quantizer: ResidualVectorQuantizer) -> None:
    torch.manual_seed(0)
    z = 5 + 0.5 * latents(frames=200)
    quantizer.decay = 0.9
    first = float(quantizer.train()(z).commitment)
    for _ in range(40):
        last = float(quantizer(z).commitment)
    assert first > 1
    assert last < 0.05 * first
    assert float((quantizer.eval()(z).output - z).square().mean()) < 0.1


@pytest.mark.parametrize("layer", [0, Q - 1])
def test_a_dead_code_is_revived_and_stays(quantizer: ResidualVectorQuantizer, layer: int) -> None:
    torch.manual_seed(0)
    z, dead = latents(), 3
    quantizer.codebooks[layer, dead] = 1_000.0  # no vector comes near
    quantizer.sums[layer, dead] = 10.0
    quantizer.usage[layer, dead] = 0.01
    residual = z if layer == 0 else z - quantizer.decode(quantizer.encode(z, layer))
    residual = residual.transpose(1, 2).flatten(0, 1)
    quantizer.train()(z)
    place = quantizer.codebooks[layer, dead].clone()
    assert (residual - place).abs().amax(1).min() < 1e-5  # it lies on a vector of the batch
    assert dead in quantizer.encode(z)[:, layer]  # and so it is in use
    elsewhere = quantizer(300 * torch.sign(-place)[None, :, None].expand(1, D, 4))  # nothing near that place
    assert dead not in elsewhere.ids[:, layer]
    torch.testing.assert_close(quantizer.codebooks[layer, dead], place, atol=1e-5, rtol=0)


def test_codes_in_use_are_left_where_they_are(quantizer: ResidualVectorQuantizer) -> None:
    """The only dead code of one layer is replaced; no other code changes."""
    z, other = latents(frames=200), copy.deepcopy(quantizer)
    for changed in (quantizer, other):
        changed.codebooks[0, 3] = 1_000.0
    quantizer.usage[0, 3] = 0.01
    quantizer.train()(z)
    other.train()(z)
    rest = torch.arange(K) != 3
    assert torch.equal(quantizer.codebooks[0, rest], other.codebooks[0, rest])
    assert torch.equal(quantizer.codebooks[1:], other.codebooks[1:])
    assert quantizer.codebooks[0, 3].abs().max() < 10


def test_unused_codes_come_into_use(quantizer: ResidualVectorQuantizer) -> None:
    torch.manual_seed(0)
    quantizer.codebooks[0, 1:] = 1_000.0
    quantizer.sums[0, 1:] = 1_000.0
    z = latents(frames=200)
    quantizer.decay = 0.9
    assert len(quantizer.train()(z).ids[:, 0].unique()) == 1
    for _ in range(50):
        quantized = quantizer(z)
    assert len(quantized.ids[:, 0].unique()) > 0.8 * K


def test_k_means_gives_a_low_error_at_once(quantizer: ResidualVectorQuantizer) -> None:
    centres = 5 * torch.randn(K, D)
    z = (centres[torch.randint(K, (40 * K,))] + 0.01 * torch.randn(40 * K, D)).T[None]
    before = float(quantizer.eval()(z).commitment)
    quantizer.initialize(z[0].T)
    first = quantizer.decode(quantizer.encode(z, 1))
    assert before > 1
    assert float((first - z).square().mean()) < 0.5  # k-means may miss a centre or two of sixteen
    assert float((quantizer(z).output - z).square().mean()) < 0.01


def test_k_means_sets_averages_that_agree_with_the_codebooks(quantizer: ResidualVectorQuantizer) -> None:
    """Otherwise the first training step would move the codes away."""
    z = torch.randn(1, D, 40 * K)
    quantizer.initialize(z[0].T)
    torch.testing.assert_close(quantizer.sums / quantizer.usage[..., None], quantizer.codebooks)
    counts = torch.stack([torch.bincount(ids, minlength=K) for ids in quantizer.encode(z)[0]]).float()
    torch.testing.assert_close(quantizer.usage, counts / counts.mean(1, keepdim=True), atol=0.05, rtol=0.05)
    before = quantizer.codebooks.clone()
    quantizer.train()(z)
    assert (quantizer.codebooks - before).abs().max() < 0.1


def test_k_means_is_seeded(quantizer: ResidualVectorQuantizer) -> None:
    z, other = torch.randn(20 * K, D), copy.deepcopy(quantizer)
    quantizer.initialize(z, seed=3)
    torch.manual_seed(99)
    other.initialize(z, seed=3)
    assert_same_state(quantizer.state_dict(), other.state_dict())


def test_k_means_runs_beside_codebooks_on_another_device() -> None:
    quantizer = ResidualVectorQuantizer(D, Q, K).to("meta")
    quantizer.initialize(torch.randn(20 * K, D))
    assert {buffer.device.type for buffer in quantizer.buffers()} == {"meta"}


def test_k_means_refuses_too_few_vectors_and_changes_nothing(quantizer: ResidualVectorQuantizer) -> None:
    before = state(quantizer)
    with pytest.raises(ValueError, match=f"16 codes needs at least 320 latent vectors, got {20 * K - 1}"):
        quantizer.initialize(torch.randn(20 * K - 1, D))
    assert_same_state(before, quantizer.state_dict())


def test_masked_frames_have_no_influence(quantizer: ResidualVectorQuantizer) -> None:
    z, other = latents(), copy.deepcopy(quantizer)
    mask = torch.arange(z.shape[2]) < torch.tensor([[30], [11]])
    garbage = torch.where(mask[:, None], z, 50 * latents(seed=9))
    a = quantizer.train()(z, mask)
    b = other.train()(garbage, mask)
    assert_same_state(quantizer.state_dict(), other.state_dict())
    assert float(a.commitment) == float(b.commitment)
    assert not torch.equal(a.output, b.output)


def test_masked_frames_count_as_if_they_were_not_there(quantizer: ResidualVectorQuantizer) -> None:
    z, other = latents(batch=1), copy.deepcopy(quantizer)
    masked = quantizer.train()(z, torch.arange(z.shape[2])[None] < 11)
    alone = other.train()(z[:, :, :11])
    assert float(masked.commitment) == pytest.approx(float(alone.commitment), rel=1e-5)
    assert_same_state(quantizer.state_dict(), other.state_dict(), atol=1e-6)


def test_a_batch_without_a_single_frame_moves_no_code(quantizer: ResidualVectorQuantizer) -> None:
    before = quantizer.codebooks.clone()
    quantized = quantizer.train()(latents(), torch.zeros(2, 30, dtype=torch.bool))
    torch.testing.assert_close(quantizer.codebooks, before, atol=1e-5, rtol=0)
    assert float(quantized.commitment) == 0


def test_each_utterance_sums_its_own_number_of_layers(quantizer: ResidualVectorQuantizer) -> None:
    z, layers = latents(batch=3), torch.tensor([1, Q, 2])
    quantized = quantizer.eval()(z, num_layers=layers)
    assert torch.equal(quantized.ids, quantizer(z).ids)  # all layers have ids all the same
    for b, n in enumerate(layers.tolist()):
        torch.testing.assert_close(
            quantized.output[b : b + 1], summed(quantizer, quantized.ids[b : b + 1, :n]), atol=1e-5, rtol=0
        )
    _, distances = quantized_by_hand(quantizer, z)
    expected = sum(float(distances[b, :n].sum()) for b, n in enumerate(layers.tolist())) / (30 * D * int(layers.sum()))
    assert float(quantized.commitment) == pytest.approx(expected, rel=1e-5)


def test_the_gradient_reaches_the_latents_once_for_any_number_of_layers(quantizer: ResidualVectorQuantizer) -> None:
    z = latents().requires_grad_()
    weights = latents(seed=2)
    (quantizer(z, num_layers=torch.tensor([1, 3])).output * weights).sum().backward()
    assert torch.equal(z.grad, weights)


def close_codes() -> tuple[ResidualVectorQuantizer, Tensor]:
    """Codes too close to each other for bfloat16."""
    torch.manual_seed(0)
    quantizer = ResidualVectorQuantizer(D, 2, K).eval()
    quantizer.codebooks[:] = 10 + 0.02 * torch.randn(2, K, D)
    return quantizer, 10 + 0.02 * latents(frames=100)


def test_forward_gives_the_same_under_bfloat16_autocast() -> None:
    quantizer, z = close_codes()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = quantizer(z)
    outside = quantizer(z)
    assert torch.equal(inside.ids, outside.ids)
    assert inside.output.dtype == torch.float32
    assert torch.equal(inside.output, outside.output)


def test_encode_gives_the_same_under_bfloat16_autocast() -> None:
    quantizer, z = close_codes()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = quantizer.encode(z)
    assert torch.equal(inside, quantizer.encode(z))


def _share(folder: Path) -> None:
    """One process of two: trains on its half of the batch, then revives a code."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=100))
    process = dist.get_rank()
    try:
        torch.save(_steps_of(process, torch.load(folder / "start.pt")), folder / f"{process}.pt")
    finally:
        dist.destroy_process_group()


def _steps_of(process: int, start: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    quantizer = ResidualVectorQuantizer(D, Q, K).train()
    quantizer.load_state_dict(start)
    for step in range(3):
        commitment = quantizer(latents(batch=4, seed=step)[2 * process : 2 * process + 2]).commitment
    after = state(quantizer) | {"commitment": commitment}
    quantizer.usage[0, 5] = 0.001
    torch.manual_seed(process)  # the processes would draw different places
    quantizer(latents(batch=4, seed=9)[2 * process : 2 * process + 2])
    revived = state(quantizer)
    quantizer.initialize(latents(frames=10 * K, seed=process).transpose(1, 2).flatten(0, 1))
    return {"after": after, "revived": revived, "placed": state(quantizer)}


@pytest.fixture(scope="module")
def two_processes(
    tmp_path_factory: pytest.TempPathFactory, start_recipe: Callable
) -> tuple[ResidualVectorQuantizer, list[dict]]:
    folder = tmp_path_factory.mktemp("gloo")
    torch.manual_seed(0)
    start = ResidualVectorQuantizer(D, Q, K).train()
    torch.save(start.state_dict(), folder / "start.pt")
    both = start_recipe(__file__, str(folder), folder, processes=2)
    _, errors = both.communicate()
    assert both.returncode == 0, errors
    return start, [torch.load(folder / f"{process}.pt") for process in range(2)]


def test_two_processes_learn_what_one_learns_from_the_joined_batch(
    two_processes: tuple[ResidualVectorQuantizer, list[dict]],
) -> None:
    start, results = two_processes
    one = copy.deepcopy(start)
    for step in range(3):
        commitment = one(latents(batch=4, seed=step)).commitment
    moved = (one.codebooks - start.codebooks).abs().max()
    assert moved > 1e-2
    for result in results:
        assert_same_state({name: result["after"][name] for name in one.state_dict()}, one.state_dict(), atol=1e-6)
    mean = sum(float(result["after"]["commitment"]) for result in results) / 2
    assert mean == pytest.approx(float(commitment), rel=1e-5)


def test_two_processes_begin_with_the_same_codebooks(
    two_processes: tuple[ResidualVectorQuantizer, list[dict]],
) -> None:
    """Their latents may differ in the last bits on GPUs, which k-means amplifies."""
    start, (first, second) = two_processes
    alone = copy.deepcopy(start)
    alone.initialize(latents(frames=10 * K, seed=0).transpose(1, 2).flatten(0, 1))
    assert_same_state(first["placed"], alone.state_dict())
    assert_same_state(second["placed"], alone.state_dict())


def test_two_processes_revive_a_code_at_the_same_place(
    two_processes: tuple[ResidualVectorQuantizer, list[dict]],
) -> None:
    _, (first, second) = two_processes
    assert_same_state(first["revived"], second["revived"])
    place = first["revived"]["codebooks"][0, 5]
    seen = latents(batch=4, seed=9)[:2].transpose(1, 2).flatten(0, 1)
    assert (seen - place).abs().amax(1).min() < 1e-6


# ---- two branches


@pytest.fixture
def split() -> ResidualVectorQuantizer:
    torch.manual_seed(0)
    quantizer = ResidualVectorQuantizer(D, Q, K, split=True).eval()
    for projection in (*quantizer.inward, *quantizer.outward):
        torch.nn.init.orthogonal_(projection.weight)
    return quantizer


def test_both_branches_quantise_the_latents_and_are_added(split: ResidualVectorQuantizer) -> None:
    z = torch.randn(2, D, 9)
    found = split(z)
    assert torch.equal(split.encode(z), found.ids)
    torch.testing.assert_close(split.decode(found.ids), found.output)
    expected = torch.zeros(2, D, 9)
    for number, layers in enumerate((range(1), range(1, Q))):
        left, chosen = split.inward[number](z.transpose(1, 2)), torch.zeros(2, 9, D // 2)
        for layer in layers:
            ids = torch.cdist(left, split.codebooks[layer].expand(2, -1, -1)).argmin(-1)
            assert torch.equal(ids, found.ids[:, layer])
            chosen, left = chosen + split.codebooks[layer][ids], left - split.codebooks[layer][ids]
        expected += split.outward[number](chosen).transpose(1, 2)
    torch.testing.assert_close(found.output, expected)
    for count in range(1, Q):
        fewer = split(z, num_layers=torch.tensor([count, Q]))
        torch.testing.assert_close(fewer.output[0], split.decode(found.ids[:, :count])[0])
        torch.testing.assert_close(fewer.output[1], found.output[1])


def test_branches_begin_with_a_half_of_the_latents_each() -> None:
    quantizer = ResidualVectorQuantizer(D, Q, K, split=True).eval()
    z = latents()
    for layer, half in enumerate(z.split(D // 2, 1)):
        ids = torch.cdist(half.transpose(1, 2), quantizer.codebooks[layer].expand(2, -1, -1)).argmin(-1)
        assert torch.equal(quantizer.encode(z)[:, layer], ids)
    one = quantizer.decode(quantizer.encode(z, 1))
    assert one[:, : D // 2].any() and not one[:, D // 2 :].any()


def test_a_loss_on_one_branch_leaves_the_projection_of_the_other(split: ResidualVectorQuantizer) -> None:
    found = split(torch.randn(2, D, 9))
    found.layers[0].square().sum().backward(retain_graph=True)
    assert split.inward[0].weight.grad.any() and split.inward[1].weight.grad is None
    split.zero_grad()
    found.layers[1].square().sum().backward()
    assert split.inward[1].weight.grad.any() and split.inward[0].weight.grad is None


def test_k_means_begins_each_branch_at_its_projection(split: ResidualVectorQuantizer) -> None:
    latents = torch.randn(40 * K, D)
    split.initialize(latents)
    for number, layer in enumerate((0, 1)):
        seen = split.inward[number](latents)
        distances = torch.cdist(seen, split.codebooks[layer]).min(1).values
        assert distances.square().mean() < 0.8 * seen.var(0).sum()


# ---- codes of few dimensions

d = 3


@pytest.fixture(params=[False, True], ids=["residual", "split"])
def low(request: pytest.FixtureRequest) -> ResidualVectorQuantizer:
    torch.manual_seed(0)
    quantizer = ResidualVectorQuantizer(D, Q, K, split=request.param, codebook_dim=d).eval()
    for parameter in quantizer.parameters():  # all projections are something, biases too
        torch.nn.init.normal_(parameter, std=0.5)
    return quantizer


def branches(quantizer: ResidualVectorQuantizer) -> list[range]:
    return [range(Q)] if len(quantizer.branches) == 1 else [range(1), range(1, Q)]


@torch.no_grad()
def searched_by_hand(quantizer: ResidualVectorQuantizer, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [B, Q, T] by cosines, what each stands for [Q, B, T, D], and the residuals [Q, B, T, D], in float64."""
    exact = copy.deepcopy(quantizer).double()
    ids, values, residuals = [], [], []
    for inward, layers in zip(exact.inward, branches(quantizer), strict=True):
        left = inward(z.double().transpose(1, 2))
        for layer in layers:
            projection, restore, codes = exact.reduce[layer][0], exact.restore[layer], exact.codebooks[layer]
            point = left @ projection.weight.T + projection.bias
            cosines = torch.nn.functional.cosine_similarity(point[:, :, None], codes[None, None], dim=-1)
            residuals.append(left)
            ids.append(cosines.argmax(-1))
            values.append(codes[ids[-1]] @ restore.weight.T + restore.bias)
            left = left - values[-1]
    return torch.stack(ids, 1), torch.stack(values), torch.stack(residuals)


def test_codes_are_found_by_their_angle_and_projected_back(low: ResidualVectorQuantizer) -> None:
    z = latents()
    found = low(z)
    ids, values, residuals = searched_by_hand(low, z)
    assert torch.equal(found.ids, ids) and torch.equal(low.encode(z), ids) and len(ids.unique()) > K // 2
    assert torch.equal(low.encode(z, 2), ids[:, :2])
    for layer in range(Q):
        torch.testing.assert_close(found.layers[layer], values[layer].transpose(1, 2).float())
    assert float(found.commitment.detach()) == pytest.approx(float((residuals - values).square().mean()), rel=1e-5)
    for count in (1, 2, Q):
        expected = torch.zeros(2, 30, D)
        for outward, layers in zip(low.outward, branches(low), strict=True):
            if kept := [values[layer] for layer in layers if layer < count]:
                expected = expected + outward(sum(kept).float())
        torch.testing.assert_close(low.decode(ids[:, :count]), expected.transpose(1, 2))
        torch.testing.assert_close(low(z, num_layers=torch.tensor([count, count])).output, expected.transpose(1, 2))


@pytest.mark.parametrize("training", [False, True])
def test_losses_reach_latents_once_and_projections_straight_through_the_code(
    low: ResidualVectorQuantizer, training: bool
) -> None:
    z, weights = latents().requires_grad_(), latents(seed=2)
    before, (_, _, residuals) = copy.deepcopy(low), searched_by_hand(low, z)
    found = low.train(training)(z)
    at_start = {layer: number for number, layers in enumerate(branches(low)) for layer in layers}
    part = weights[:, : low.dimension]
    for layer in range(Q):
        low.zero_grad()
        (gradient,) = torch.autograd.grad((found.layers[layer] * part).sum(), z, retain_graph=True)
        inward = low.inward[at_start[layer]]
        back = part if isinstance(inward, torch.nn.Identity) else (part.transpose(1, 2) @ inward.weight).mT
        torch.testing.assert_close(gradient, back)
        (found.layers[layer] * part).sum().backward(retain_graph=True)
        # of the projections as if the code were the point that it stands for
        through = before.restore[layer](before.reduce[layer](residuals[layer].float())).transpose(1, 2)
        own = [*before.reduce[layer].parameters()]
        expected = torch.autograd.grad((through * part).sum(), own)
        for parameter, value in zip(low.reduce[layer].parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, value)
        assert low.restore[layer].weight.grad.any()
        others = [
            p.grad for side in (low.reduce, low.restore) for k in range(Q) if k != layer for p in side[k].parameters()
        ]
        assert all(grad is None or not grad.any() for grad in others)
    low.zero_grad()
    (gradient,) = torch.autograd.grad((found.output * weights).sum(), z, retain_graph=True)
    back = weights.transpose(1, 2)
    if len(low.branches) == 2:
        back = sum(back @ after.weight @ first.weight for first, after in zip(low.inward, low.outward, strict=True))
    torch.testing.assert_close(gradient, back.mT)
    (found.output * weights).sum().backward()
    assert all(parameter.grad.any() for part in (low.reduce, low.restore) for parameter in part.parameters())


def test_codes_of_few_dimensions_have_length_1_wherever_they_come_from(low: ResidualVectorQuantizer) -> None:
    def assert_normalized() -> None:
        torch.testing.assert_close(low.codebooks.norm(dim=2), torch.ones(Q, K))

    assert low.codebooks.shape == (Q, K, d)
    z = torch.randn(1, D, 40 * K)
    low.initialize(z[0].T)
    assert_normalized()
    counts = torch.stack([torch.bincount(ids, minlength=K) for ids in low.encode(z)[0]])
    assert (counts > 0).float().mean() > 0.95
    low.usage[0, 3] = 0.01
    before = low.codebooks.clone()
    low.train()(z)
    assert_normalized()
    assert not torch.equal(low.codebooks[0, 3], before[0, 3])


def test_projections_and_codes_of_few_dimensions_learn_the_latents(low: ResidualVectorQuantizer) -> None:
    torch.manual_seed(0)
    z, low.decay = 3 + latents(frames=200), 0.9
    low.initialize(z.transpose(1, 2).flatten(0, 1))
    optimizer = torch.optim.Adam(low.parameters(), 3e-2)
    for _ in range(100):
        found = low.train()(z)
        loss = found.commitment + (found.output - z).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    low.eval()
    with torch.no_grad():
        errors = [float((low.decode(low.encode(z, n)) - z).square().mean()) for n in range(1, Q + 1)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < (0.5 if len(low.branches) == 1 else 0.7)
    assert all(len(ids.unique()) > 0.9 * K for ids in low.encode(z).transpose(0, 1))


if __name__ == "__main__":  # in `two_processes`
    _share(Path(sys.argv[1]))
