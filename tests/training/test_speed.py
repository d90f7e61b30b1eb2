"""Tokens per second and utilisation, by a clock that the test moves."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from holdfast import HybridForCausalLM
from holdfast.bench.ceilings import measure_matmul
from holdfast.info import flops_per_token
from holdfast.training import speed
from holdfast.training.speed import SpeedMeter

ModelFactory = Callable[..., HybridForCausalLM]


class Clock:
    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(speed, "time", clock)
    return clock


def begin(meter: SpeedMeter, model: torch.nn.Module, devices: int = 1) -> None:
    args = SimpleNamespace(device=torch.device("cpu"), bf16=False, world_size=devices)
    meter.on_train_begin(args, None, None, model=model)


def tell(meter: SpeedMeter, event: str) -> None:
    getattr(meter, event)(None, None, None)


def test_speed_is_of_training_alone(small_model: ModelFactory, clock: Clock) -> None:
    model = small_model().train()
    meter = SpeedMeter(peak_flops=1e9)
    begin(meter, model, devices=2)
    assert meter.drain() == {}
    ids = torch.randint(100, (3, 20))
    for _ in range(2):
        model(input_ids=ids)
        clock.now += 0.5
        tell(meter, "on_step_end")
    for event in ("on_evaluate", "on_save"):
        clock.now += 7  # neither is training
        tell(meter, event)
    model.eval()
    model(input_ids=ids)  # nor is this
    clock.now += 0.5
    expected = 2 * 60 * 2 / 1.5
    forward = flops_per_token(model, 10)
    assert meter.drain() == {
        "tokens_per_second": pytest.approx(expected),
        "utilisation": pytest.approx(3 * 60 * 2 * forward / 1.5 / 1e9),  # of each device
    }
    assert meter.drain() == {}
    tell(meter, "on_train_end")
    model.train()
    model(input_ids=ids)
    clock.now += 1
    assert meter.drain() == {}


def test_a_model_of_another_kind_has_no_utilisation(clock: Clock) -> None:
    model = torch.nn.Embedding(5, 3)
    meter = SpeedMeter()
    begin(meter, model)
    assert meter.peak_flops is None  # nothing was measured for nothing
    model(torch.zeros(2, 4, dtype=torch.long))
    clock.now += 2
    assert meter.drain() == {"tokens_per_second": 4.0}


def test_the_peak_is_measured_and_moves_no_random_state(small_model: ModelFactory) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    meter = SpeedMeter()
    begin(meter, small_model().train())
    assert meter.peak_flops is not None
    assert 1e8 < meter.peak_flops < 1e14
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), state)
    measure_matmul(torch.device("cpu"), torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_given_goes_before_what_is_measured(small_model: ModelFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> float:
        raise AssertionError("measured")

    monkeypatch.setattr(speed, "measure_matmul", refuse)
    meter = SpeedMeter(peak_flops=5.0)
    begin(meter, small_model().train())
    assert meter.peak_flops == 5.0
