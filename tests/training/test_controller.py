"""The λ rule against recorded trajectories, in a loop of one's own, over ranks; and the watch over collapsed heads."""

import dataclasses
import json
import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from holdfast import HybridConfig, HybridForCausalLM
from holdfast.training import BudgetController, CollapsedHead, ControllerConfig, RetentionWatch

GOLDEN = Path(__file__).parents[1] / "golden" / "lambda_rule.safetensors"
GOLDEN_SETTINGS = {"budget": 32, "initial": 1e-3, "minimum": 1e-4, "interval": 8}
POSITIONS = 122


class Buffers(nn.Module):
    """What the controller needs of a model, and nothing else."""

    def __init__(self, layers: int = 2, heads: int = 3) -> None:
        super().__init__()
        self.register_buffer("l1_lambda", torch.zeros(layers, heads))
        self.register_buffer("num_kept", torch.zeros(layers, heads))


def tiny_model(**options: int) -> HybridForCausalLM:
    torch.manual_seed(0)
    eviction = {"num_heads": 2, "head_dim": 8, "window": 8, "budget": 4, "sinks": 1, "dropout": 0.0, **options}
    return HybridForCausalLM(
        HybridConfig(
            vocab_size=31,
            hidden_size=16,
            num_hidden_layers=2,
            intermediate_size=32,
            mixer_options={"gated_deltanet": {"num_heads": 2, "head_dim": 8}, "learned_eviction": eviction},
            controller={"interval": 4, "tolerance": [0.9, 1.1]},
        )
    )


def keep_everything(model: HybridForCausalLM) -> None:
    """Make every score that of the last bias, which is positive."""
    last = model.model.eviction_layers()[0].router.conv_stack.proj
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, 0.5)


@pytest.mark.parametrize("sharing", ["head", "layer", "all"])
def test_rule_reproduces_the_published_trajectories(sharing):
    golden = {
        name.removeprefix(f"{sharing}."): value
        for name, value in load_file(GOLDEN).items()
        if name.startswith(f"{sharing}.")
    }
    model = Buffers()
    controller = BudgetController(model, config=ControllerConfig(sharing=sharing, **GOLDEN_SETTINGS))
    steps = len(golden["kept_fraction"])
    assert steps == 600
    for step in range(steps):
        controller.step(golden["kept_fraction"][step] * POSITIONS)
        expected = golden["l1_lambda"][step]
        expected = expected.reshape(*expected.shape, *[1] * (2 - expected.dim())).expand(2, 3)
        torch.testing.assert_close(model.l1_lambda, expected, rtol=1e-6, atol=0, msg=lambda m, s=step: f"step {s}: {m}")
        torch.testing.assert_close(model.num_kept, golden["num_kept"][step], rtol=1e-5, atol=1e-5)
    assert golden["l1_lambda"].max() > 1e-3  # the trajectory moves


def test_a_model_cast_to_bf16_keeps_an_exact_lambda():
    golden = load_file(GOLDEN)
    model = Buffers()
    controller = BudgetController(model, config=ControllerConfig(**GOLDEN_SETTINGS))
    model.bfloat16()
    for kept in golden["head.kept_fraction"]:
        controller.step((kept * POSITIONS).double())
    assert model.l1_lambda.dtype == model.num_kept.dtype == torch.float32
    torch.testing.assert_close(model.l1_lambda, golden["head.l1_lambda"][-1], rtol=1e-6, atol=0)


def test_own_loop_in_five_lines():
    model = tiny_model()
    keep_everything(model)
    controller = BudgetController(model)
    assert (controller.budget, controller.config.interval, controller.config.tolerance) == (4, 4, (0.9, 1.1))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    tokens = torch.randint(31, (2, 24), generator=torch.Generator().manual_seed(0))
    for step in range(8):
        optimizer.zero_grad()
        output = model(input_ids=tokens, labels=tokens)
        if step >= 4:
            assert output.retention_loss > 0
        output.loss.backward()
        optimizer.step()
        controller.step(output.retention.kept)
        if step == 3:
            assert model.model.num_kept.min() > 4  # all 18 scored positions are kept, in every step
            torch.testing.assert_close(model.model.l1_lambda, torch.full((1, 2), 1e-9), rtol=1e-5, atol=0)
    torch.testing.assert_close(model.model.l1_lambda, torch.full((1, 2), 1.5e-9), rtol=1e-5, atol=0)
    assert {"model.l1_lambda", "model.num_kept"} <= model.state_dict().keys()


def test_resuming_between_updates_changes_nothing():
    counts = torch.rand(40, 2, 3, generator=torch.Generator().manual_seed(1)) * POSITIONS
    whole, first = Buffers(), Buffers()
    config = ControllerConfig(**GOLDEN_SETTINGS)
    uninterrupted, before = BudgetController(whole, config=config), BudgetController(first, config=config)
    for kept in counts:
        uninterrupted.step(kept)
    for kept in counts[:13]:
        before.step(kept)
    saved = json.loads(json.dumps(before.state_dict()))
    second = Buffers()
    second.load_state_dict(first.state_dict())
    after = BudgetController(second, config=config)
    after.load_state_dict(saved)
    for kept in counts[13:]:
        after.step(kept)
    assert torch.equal(whole.l1_lambda, second.l1_lambda)
    assert torch.equal(whole.num_kept, second.num_kept)
    # The step count matters: without it the updates come at other steps.
    third = Buffers()
    third.load_state_dict(first.state_dict())
    forgetful = BudgetController(third, config=config)
    for kept in counts[13:]:
        forgetful.step(kept)
    assert not torch.equal(whole.l1_lambda, third.l1_lambda)


def test_the_proportional_rule_remembers_its_sum_over_a_resumption():
    config = ControllerConfig(32, interval=2, proportional=True, damping=3.0, minimum=1e-5, initial=1e-4)
    torch.manual_seed(0)
    counts = 16 + 32 * torch.rand(20, 2, 3)
    whole, first, forgetful = Buffers(), Buffers(), Buffers()
    controller, before = BudgetController(whole, config=config), BudgetController(first, config=config)
    for n, kept in enumerate(counts):
        controller.step(kept)
        if n == 10:
            saved = json.loads(json.dumps(before.state_dict()))
            before = BudgetController(first, config=config)
            before.load_state_dict(saved)
            forgetful.load_state_dict(first.state_dict())
            without = BudgetController(forgetful, config=config)
            without.load_state_dict({"steps": saved["steps"]})
        before.step(kept)
        if n >= 10:
            without.step(kept)
    assert torch.equal(whole.l1_lambda, first.l1_lambda)
    assert not torch.equal(whole.l1_lambda, forgetful.l1_lambda)  # so there is something to remember


def test_a_state_of_another_model_is_refused():
    config = ControllerConfig(32, interval=1, proportional=True, damping=3.0)
    controller = BudgetController(Buffers(2, 3), config=config)
    controller.step(torch.full((2, 3), 40.0))
    other = BudgetController(Buffers(2, 3), config=dataclasses.replace(config, sharing="layer"))
    with pytest.raises(ValueError, match=re.escape("for (2, 3) values of λ, this one has (2, 1)")):
        other.load_state_dict(controller.state_dict())
    assert other.state_dict() == {"steps": 0, "distance": None}
    published = BudgetController(Buffers(2, 3), config=ControllerConfig(32, sharing="layer"))
    published.load_state_dict(controller.state_dict())  # whose rule needs no distance
    assert published.state_dict() == {"steps": 1, "distance": None}


def test_a_trained_model_keeps_its_lambda():
    model = Buffers()
    model.l1_lambda.fill_(0.01)
    controller = BudgetController(model, config=ControllerConfig(**GOLDEN_SETTINGS))
    for _ in range(8):
        controller.step(torch.full((2, 3), 100.0))
    torch.testing.assert_close(model.l1_lambda, torch.full((2, 3), 0.015))


def test_lambda_waits_for_the_initial_steps():
    model = Buffers()
    controller = BudgetController(model, config=ControllerConfig(initial_steps=5, **GOLDEN_SETTINGS))
    for step in range(1, 14):
        controller.step(torch.full((2, 3), 100.0))
        assert model.l1_lambda.max().item() == pytest.approx(0 if step < 13 else 1e-3)
    assert model.num_kept.min() > 90  # counted from the start


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from(["head", "layer", "all"]),
    st.integers(1, 5),
    st.sampled_from([{}, {"proportional": True, "damping": 4.0}]),
)
def test_lambda_stays_in_range_and_is_shared(seed, sharing, interval, rule):
    generator = torch.Generator().manual_seed(seed)
    config = ControllerConfig(10, initial=1e-3, minimum=1e-4, maximum=0.01, interval=interval, sharing=sharing, **rule)
    model = Buffers()
    controller = BudgetController(model, config=config)
    level = torch.rand(2, 3, generator=generator) * 20
    for _ in range(60):
        controller.step((level + torch.randn(2, 3, generator=generator)).clamp(min=0))
        penalty = model.l1_lambda
        least = 0.0 if rule else 1e-4 * 0.999  # the published rule jumps to `minimum`
        assert ((penalty == 0) | ((penalty >= least) & (penalty <= 0.01 * 1.001))).all()
        if sharing == "all":
            assert (penalty == penalty[0, 0]).all()
        elif sharing == "layer":
            assert (penalty == penalty[:, :1]).all()


def test_a_head_that_answers_to_lambda_settles_at_the_budget():
    model = Buffers(1, 1)
    controller = BudgetController(model, config=ControllerConfig(**(GOLDEN_SETTINGS | {"interval": 32})))
    kept = torch.tensor([[120.0]])
    for _ in range(4000):
        # A scorer under penalty λ drifts towards what λ leaves it with, about 100 pairs less per decade above 1e-4.
        target = 120 - 60 * torch.log10(1 + model.l1_lambda / 1e-3)
        kept = kept + 0.01 * (target - kept)
        controller.step(kept)
    assert 0.85 * 32 < kept.item() < 1.15 * 32


@pytest.mark.parametrize("two_sided", [False, True])
def test_only_a_two_sided_lambda_lifts_a_head_that_keeps_too_few(two_sided):
    model = Buffers(1, 1)
    settings = GOLDEN_SETTINGS | {"interval": 8, "two_sided": two_sided}
    controller = BudgetController(model, config=ControllerConfig(**settings))
    kept = torch.tensor([[2.0]])
    for _ in range(3000):
        # By itself the head keeps 2 pairs; |λ| moves that by up to 100, in either direction.
        size = model.l1_lambda.abs()
        target = 2 - 100 * model.l1_lambda.sign() * size / (size + 1e-2)
        kept = (kept + 0.02 * (target - kept)).clamp(0, POSITIONS)
        controller.step(kept)
    if two_sided:
        assert kept.item() == pytest.approx(32, rel=0.2)
    else:
        assert kept.item() < 3
    assert (model.l1_lambda < 0) == two_sided


@pytest.mark.parametrize("sign", [1, -1])
def test_the_proportional_rule_takes_powers_of_the_factor(sign):
    """Far above `minimum`: whole factors at twice and half the budget, smaller between; the reverse where λ lifts."""
    model = Buffers(1, 6)
    model.l1_lambda.fill_(sign * 1e-3)
    config = ControllerConfig(32, interval=1, increase=1.5, proportional=True, two_sided=True)
    controller = BudgetController(model, config=config)
    kept = torch.tensor([[0.0, 16.0, 32 * 2**-0.5, 32.0, 40.0, 100.0]])
    powers = torch.tensor([-1.0, -1.0, -0.5, 0.0, math.log2(40 / 32), 1.0])
    for update in (1, 2):
        controller.step(kept)
        torch.testing.assert_close(model.l1_lambda[0], sign * 1e-3 * 1.5 ** (sign * update * powers))


def test_damping_is_taken_back_as_a_head_comes_near():
    model = Buffers(1, 3)
    model.l1_lambda.fill_(1e-3)
    config = ControllerConfig(32, interval=1, increase=1.5, proportional=True, damping=4.0)
    controller = BudgetController(model, config=config)
    total, first = torch.zeros(3), torch.tensor([48.0, 40.0, 20.0]).div(32).log2()
    # Falling to the budget, standing still, rising to it; the counts as they are, for smoothing is 1 here.
    for kept in ([48.0, 40.0, 20.0], [44.0, 40.0, 21.0], [36.0, 40.0, 30.0], [32.0, 40.0, 32.0]):
        controller.step(torch.tensor([kept]))
        distance = torch.tensor(kept).div(32).log2()
        total += distance
        # λ that was there before the first update stays as it is: only what changes after that counts.
        torch.testing.assert_close(model.l1_lambda[0], 1e-3 * 1.5 ** (total + 4 * (distance - first)))


def test_a_proportional_lambda_begins_with_initial_and_stays_within_the_maximum():
    model = Buffers(1, 2)
    settings = {"minimum": 1e-6, "initial": 1e-4, "maximum": 1e-2, "interval": 1, "two_sided": True}
    controller = BudgetController(model, config=ControllerConfig(32, **settings, proportional=True))
    controller.step(torch.tensor([[100.0, 5.0]]))
    torch.testing.assert_close(model.l1_lambda, torch.tensor([[1e-4, -1e-4]]))
    damped = Buffers(1, 2)
    BudgetController(damped, config=ControllerConfig(32, **settings, proportional=True, damping=3.0)).step(
        torch.tensor([[100.0, 5.0]])
    )
    torch.testing.assert_close(damped.l1_lambda, 1.5**3 * model.l1_lambda)
    for _ in range(40):
        controller.step(torch.tensor([[100.0, 5.0]]))
    torch.testing.assert_close(model.l1_lambda, torch.tensor([[1e-2, -1e-2]]))
    for _ in range(30):  # nothing more was added up meanwhile: 0 is asinh(1e4) / log(1.5) = 24.4 updates away
        controller.step(torch.tensor([[5.0, 100.0]]))
    assert model.l1_lambda[0, 0] < 0 < model.l1_lambda[0, 1]


def test_a_proportional_lambda_lifts_no_head_that_cannot_keep_more():
    model = Buffers(1, 1)
    settings = {"minimum": 1e-4, "initial": 1e-4, "interval": 1, "two_sided": True, "damping": 2.0}
    controller = BudgetController(model, config=ControllerConfig(32, **settings, proportional=True))
    for _ in range(5):
        controller.step(torch.tensor([[8.0]]), positions=20)
    assert model.l1_lambda.item() == 0
    controller.step(torch.tensor([[8.0]]), positions=100)
    lifted = model.l1_lambda.item()
    assert lifted < 0
    for kept in (8.0, 2.0):
        controller.step(torch.tensor([[kept]]), positions=20)
        assert model.l1_lambda.item() == pytest.approx(lifted, rel=1e-5)
    controller.step(torch.tensor([[60.0]]), positions=20)
    assert model.l1_lambda.item() > 0


@pytest.mark.parametrize(("damping", "settles"), [(0.0, False), (6.0, True)])
def test_heads_that_drift_at_a_pace_settle_only_with_damping(damping, settles):
    # Adam moves a scorer at a pace of its own, whatever the size of λ: where λ outweighs what a pair is worth, down.
    model = Buffers(1, 1)
    settings = {"initial": 3e-4, "minimum": 1e-4, "interval": 8, "increase": 1.3, "two_sided": True}
    config = ControllerConfig(32, **settings, proportional=True, damping=damping)
    controller = BudgetController(model, config=config)
    log_odds, pace, course = 3.0, 0.0, []
    for _ in range(1500):
        kept = torch.sigmoid(torch.tensor([[log_odds]])) * POSITIONS
        controller.step(kept)
        course.append(kept.item())
        worth, penalty = 6e-4 * math.exp(-log_odds / 4), model.l1_lambda.item()
        pace += ((worth - penalty) / (worth + abs(penalty)) - pace) / 10
        log_odds += 0.05 * pace
    furthest = max(abs(kept / 32 - 1) for kept in course[-500:])
    assert (furthest < 0.1) == settles


def test_a_proportional_lambda_changes_sign_without_a_jump():
    model = Buffers(1, 1)
    settings = {"interval": 1, "initial": 1e-3, "minimum": 1e-3, "two_sided": True, "proportional": True}
    controller = BudgetController(model, config=ControllerConfig(32, **settings))
    seen = []
    for kept in [100.0] * 8 + [8.0] * 16:
        controller.step(torch.tensor([[kept]]))
        seen.append(model.l1_lambda.item())
    assert max(seen) > 5e-3
    assert min(seen) < -5e-3
    near = [abs(after - before) for before, after in pairwise(seen) if abs(before) < 1e-3]
    assert len(near) >= 4
    assert max(near) < 1e-3


TWO_SIDED = {"initial": 1e-3, "minimum": 1e-4, "maximum": 0.01, "interval": 1, "two_sided": True}


@pytest.mark.parametrize("sharing", ["head", "layer", "all"])
def test_a_two_sided_lambda_crosses_zero_and_stays_in_range(sharing):
    model = Buffers(2, 3)
    controller = BudgetController(model, config=ControllerConfig(32, sharing=sharing, **TWO_SIDED))
    seen = []
    for step, kept in enumerate([0.0] * 40 + [100.0] * 60 + [0.0] * 60):
        if step == 70:  # a resumed run goes on as if it had not stopped
            controller = BudgetController(model, config=controller.config, budget=32)
            controller.load_state_dict({"steps": step})
        controller.step(torch.full((2, 3), kept))
        assert (model.l1_lambda == model.l1_lambda[0, 0]).all()
        seen.append(model.l1_lambda[0, 0].item())
    assert seen[39] == pytest.approx(-0.01)
    assert seen[99] == pytest.approx(0.01)
    assert seen[-1] == pytest.approx(-0.01)
    assert all(1e-4 * 0.999 <= abs(value) <= 0.01 * 1.001 for value in seen)


def test_heads_that_share_go_on_from_the_strongest_lambda():
    model = Buffers(1, 3)
    model.l1_lambda.copy_(torch.tensor([[-0.008, 1e-4, 0.0]]))
    controller = BudgetController(model, config=ControllerConfig(32, sharing="layer", **TWO_SIDED))
    controller.step(torch.zeros(1, 3))
    torch.testing.assert_close(model.l1_lambda, torch.full((1, 3), -0.01))


def test_no_head_is_lifted_that_could_not_keep_more():
    model = Buffers(1, 2)
    controller = BudgetController(model, config=ControllerConfig(32, **TWO_SIDED))
    for _ in range(20):
        controller.step(torch.full((1, 2), 20.0), positions=torch.tensor(32.0))
    assert (model.l1_lambda == 0).all()
    for _ in range(20):
        controller.step(torch.full((1, 2), 20.0), positions=33)
    assert (model.l1_lambda < 0).all()
    before = model.l1_lambda.clone()
    controller.step(torch.full((1, 2), 20.0), positions=20.0)
    assert torch.equal(model.l1_lambda, before)


def test_the_published_rule_takes_a_negative_lambda_for_none():
    model = Buffers(1, 1)
    model.l1_lambda.fill_(-0.5)
    controller = BudgetController(model, config=ControllerConfig(32, **(TWO_SIDED | {"two_sided": False})))
    controller.step(torch.zeros(1, 1))
    assert model.l1_lambda.item() == 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BudgetController(nn.Linear(2, 2), budget=4), "no l1_lambda and num_kept buffers"),
        (lambda: BudgetController(Buffers()), "names no budget"),
        (lambda: BudgetController(Buffers(), budget=4).step(torch.ones(3)), r"kept must have shape \(2, 3\)"),
        (lambda: ControllerConfig(budget=0), "budget must be at least 1"),
        (lambda: ControllerConfig(interval=0), "interval must be at least 1"),
        (lambda: ControllerConfig(minimum=1e-3, initial=1e-4), "minimum <= initial"),
        (lambda: ControllerConfig(increase=0.5), "factors above 1"),
        (lambda: ControllerConfig(tolerance=(1.0, 0.9)), "lo <= hi"),
        (lambda: ControllerConfig(sharing="heads"), '"head", "layer" or "all"'),
        (lambda: ControllerConfig(damping=1.0), "0 without proportional"),
        (lambda: ControllerConfig(proportional=True, damping=-1.0), "damping must be 0 or more"),
        (lambda: ControllerConfig(proportional=True, decrease=1.5), "decrease and tolerance mean nothing"),
        (lambda: ControllerConfig(initial_steps=-1), "initial_steps must be 0 or more"),
        (lambda: RetentionWatch([1], 4, patience=0), "at least 1 step"),
    ],
)
def test_errors_name_the_culprit(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def run_rank(rank: int, rendezvous: str, results: "torch.multiprocessing.SimpleQueue") -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    model = Buffers(1, 2)
    controller = BudgetController(model, config=ControllerConfig(budget=32, interval=4))
    for _ in range(6):
        # By itself head 0 keeps too many on rank 0 only, head 1 on no rank. Together: 50 and 16.
        controller.step(torch.tensor([[100.0, 0.0]] if rank == 0 else [[0.0, 32.0]]))
    results.put((model.num_kept.tolist(), model.l1_lambda.tolist()))
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not built in")
def test_ranks_agree_on_the_mean(tmp_path):
    context = torch.multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    ranks = [context.Process(target=run_rank, args=(rank, str(tmp_path / "meet"), results)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    first, second = results.get(), results.get()
    assert first == second
    alone = Buffers(1, 2)
    controller = BudgetController(alone, config=ControllerConfig(budget=32, interval=4))
    for _ in range(6):
        controller.step(torch.tensor([[50.0, 16.0]]))
    assert first == (alone.num_kept.tolist(), alone.l1_lambda.tolist())
    assert alone.l1_lambda.tolist()[0][0] > 0 == alone.l1_lambda.tolist()[0][1]


def test_watch_names_collapsed_heads_once_per_patience():
    watch = RetentionWatch([1, 3], budget=20, patience=10, check_every=5)
    kept = torch.tensor([[0.0, 30.0, 0.0], [50.0, 12.0, 7.0]])  # heads 1.0 and 1.2 keep nothing, 3.0 everything
    named = [watch.step(kept, 50) for _ in range(30)]
    expected = [CollapsedHead(1, 0, "nothing"), CollapsedHead(1, 2, "nothing"), CollapsedHead(3, 0, "everything")]
    assert [step for step, found in enumerate(named, 1) if found] == [10, 20, 30]
    assert named[9] == named[29] == expected


def test_watch_writes_one_line_per_layer(monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr("holdfast.training.controller.logger.warning", lines.append)
    watch = RetentionWatch([1, 3], budget=20, patience=2, check_every=2)
    for _ in range(2):
        watch.step(torch.tensor([[0.0, 30.0, 0.0], [50.0, 12.0, 7.0]]), torch.tensor(50.0))
    assert len(lines) == 2
    assert lines[0].startswith("Layer 1, head 0, 2: kept nothing for 2 steps")
    assert lines[1].startswith("Layer 3, head 0: kept everything for 2 steps")


def test_watch_is_silent_when_nothing_is_wrong():
    watch = RetentionWatch([1], budget=60, patience=4, check_every=1)
    for step in range(40):
        # Everything kept, but the sequence is shorter than the budget; and a head that is empty every other step.
        assert watch.step(torch.tensor([[50.0, 50.0 * (step % 2)]]), 50) == []
