"""The state of a training is restored exactly: weights, moments, average and best checkpoint; also if sharded."""

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor

from speechllm.training.checkpoints import TrainingState, load_weights, trained_weights


def accelerator(kind: DistributedType = DistributedType.NO, main: bool = True) -> SimpleNamespace:
    return SimpleNamespace(is_main_process=main, distributed_type=kind, num_processes=2, device=torch.device("cpu"))


def small_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    return model


def train(training: TrainingState, first: int, last: int) -> None:
    for step in range(first, last):
        torch.manual_seed(step)
        training.optimizer.zero_grad()
        training.model(torch.randn(5, 3)).square().sum().backward()
        training.optimizer.step()
        training.follow()


def make_training(**settings: object) -> TrainingState:
    model = small_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1)
    return TrainingState(settings.pop("accelerator", accelerator()), model, optimizer, **settings)


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("decay", [None, 0.9])
def test_a_resumed_training_ends_like_an_uninterrupted_one(tmp_path: Path, decay: float | None) -> None:
    uninterrupted, first, second = (make_training(decay=decay) for _ in range(3))
    train(uninterrupted, 0, 7)
    train(first, 0, 4)
    with first.evaluation_weights():
        first.record_validation(4, 0.5, keep=True)
        first.record_validation(4, 0.7, keep=True)
    torch.save({"step": 4, **first.state_dict()}, tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.best.error_rate == 0.5 and second.best.step == 4 and second.best.validations_without_improvement == 1
    with first.evaluation_weights():
        assert same(second.best.weights, trained_weights(first.evaluated))
    train(second, 4, 7)
    found, expected = second.state_dict(), uninterrupted.state_dict()
    assert found.pop("best") != expected.pop("best") and same(found, expected)


def test_only_trained_weights_are_saved_and_later_steps_do_not_change_them() -> None:
    training = make_training()
    train(training, 0, 1)
    state = training.state_dict()
    assert state["model"].keys() == {"0.bias", "1.weight", "1.bias"} and state["average"] == {}
    copies = {name: value.clone() for name, value in state["model"].items()}
    moments = state["optimizer"]["state"][0]["exp_avg"].clone()
    train(training, 1, 3)
    assert same(state["model"], copies) and torch.equal(state["optimizer"]["state"][0]["exp_avg"], moments)


def test_the_exponential_moving_average_is_evaluated() -> None:
    training = make_training(decay=0.75)  # of more steps: it rises
    expected = None
    for step in range(5):
        train(training, step, step + 1)
        now, share = trained_weights(training.model), (1 + step) / (10 + step)
        expected = now if expected is None else {n: share * expected[n] + (1 - share) * now[n] for n in now}
    last = trained_weights(training.model)
    with training.evaluation_weights():
        for name, value in trained_weights(training.evaluated).items():
            torch.testing.assert_close(value, expected[name])
        assert torch.equal(training.evaluated[0].weight, small_model()[0].weight)  # frozen: there is no average of it
    assert same(trained_weights(training.model), last)


def test_the_best_checkpoint_is_kept_and_validations_without_improvement_are_counted() -> None:
    training = make_training()
    assert training.best.error_rate == math.inf
    history = []
    for step, wer in enumerate([0.9, 0.5, 0.5, 0.7, 0.4, 0.6]):
        train(training, step, step + 1)
        training.record_validation(step, wer, keep=True)
        history.append((training.best.step, training.best.validations_without_improvement))
        if step == 4:
            best = trained_weights(training.model)
    assert history == [(0, 0), (1, 0), (1, 1), (1, 2), (4, 0), (4, 1)]
    assert not same(trained_weights(training.model), best)
    training.load_best()
    assert same(trained_weights(training.model), best)


def test_without_keep_the_last_weights_remain() -> None:
    training = make_training()
    training.record_validation(0, 0.5, keep=False)
    train(training, 0, 1)
    last = trained_weights(training.model)
    training.load_best()
    assert same(trained_weights(training.model), last)


def test_every_process_has_the_average_and_only_the_main_one_keeps_the_state() -> None:
    main, other = (make_training(accelerator=accelerator(main=main), decay=0.9) for main in (True, False))
    train(main, 0, 2)
    train(other, 0, 2)
    assert main.average and same(main.average, other.average) and other.evaluators == 2
    state = other.state_dict()
    assert set(state["model"].values()) == set(state["average"].values()) == {None}


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_sharded_weights_are_saved_and_loaded_as_full_tensors(tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    def sharded() -> TrainingState:
        training = make_training(accelerator=accelerator(DistributedType.FSDP))
        fully_shard(training.model)
        trained = [p for p in training.model.parameters() if p.requires_grad]
        training.optimizer.param_groups[0]["params"] = trained  # as Accelerate does
        return training

    plain, first, second = make_training(), sharded(), sharded()
    train(plain, 0, 5)
    train(first, 0, 3)
    torch.save({"step": 3, **first.state_dict()}, tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(second, 3, 5)
    assert all(isinstance(p, DTensor) for p in second.model.parameters())
    found, expected = second.state_dict(), plain.state_dict()
    assert same(found["model"], expected["model"]) and same(found["optimizer"]["state"], expected["optimizer"]["state"])
    with second.evaluation_weights():
        assert not any(isinstance(p, DTensor) for p in second.evaluated.parameters())
        assert same(trained_weights(second.evaluated), expected["model"])
    load_weights(second.model, trained_weights(first.model))
    assert same(trained_weights(second.model), trained_weights(first.model))
