"""What contexts cost: the numbers belong together, an interrupted run goes on, and what cannot be measured is named."""

import dataclasses
import itertools
import json
import operator
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast import HybridCache, HybridConfig, HybridForCausalLM
from holdfast.bench import efficiency
from holdfast.bench.accuracy import Accuracy, read_accuracies
from holdfast.bench.costs import Cost, ModelCosts, held_pairs
from holdfast.bench.efficiency import EfficiencyPlan, Subject, measure_efficiency
from holdfast.bench.efficiency_plots import pareto_front, pareto_points, plot_costs, plot_pareto
from holdfast.bench.memory import peak_bytes
from holdfast.bench.models import SIZES, equal_configs
from holdfast.bench.scorer_share import scorer_share
from holdfast.evaluation.intervals import Share
from holdfast.evaluation.sample_log import SampleLog
from holdfast.info import flops_per_token

CPU = torch.device("cpu")
MIB = 1 << 20
PLAN = EfficiencyPlan(contexts=(40, 70), batch_sizes=(1, 3), steps=25, repeats=2, chunk=32, memory=False)
NAMES = ("GDN", "laLTE", "laNSA", "full attention")


@pytest.fixture(scope="module")
def subjects() -> list[Subject]:
    configs = equal_configs(SIZES["tiny"])
    return [Subject(name, configs[name]) for name in NAMES]


@pytest.fixture(scope="module")
def results(subjects: list[Subject]) -> dict[str, ModelCosts]:
    return measured(subjects, PLAN)


def measured(subjects: Sequence[Subject], plan: EfficiencyPlan, **options: Any) -> dict[str, ModelCosts]:
    return measure_efficiency(subjects, plan, device=CPU, dtype=torch.float32, progress=False, **options)


def test_models_of_all_mixtures_have_equally_many_parameters() -> None:
    for name, parameters in (("30m", 30e6), ("43m", 46.2e6), ("1.4b", None)):
        with torch.device("meta"):
            counts = [HybridForCausalLM(config).num_parameters() for config in equal_configs(SIZES[name]).values()]  # type: ignore[index]
        assert len(counts) == 6
        assert max(counts) < 1.01 * min(counts)
        assert parameters is None or max(abs(count / parameters - 1) for count in counts) < 0.01


def test_what_is_measured_of_each_model(results: dict[str, ModelCosts], subjects: list[Subject]) -> None:
    assert list(results) == list(NAMES)
    for subject in subjects:
        costs = results[subject.name]
        assert [(cost.context, cost.batch) for cost in costs.costs] == [(40, 1), (70, 1), (40, 3), (70, 3)]
        model = HybridForCausalLM(subject.source)  # type: ignore[arg-type]
        assert sum(costs.parameters.values()) == model.num_parameters()
        assert costs.weight_bytes == 4 * model.num_parameters()
        assert costs.flops_per_token == {context: flops_per_token(model, context) for context in (40, 70)}
        assert (costs.scorer_flops_per_token > 0) == (subject.name == "laLTE")
        assert not costs.missing
        for cost in costs.costs:
            assert cost.cache_bytes == HybridCache.bytes_for(subject.source, cost.batch, torch.float32, cost.context)  # type: ignore[arg-type]
            assert len(cost.prefill.samples) == 2
            assert [len(turn) for turn in cost.decode.turns] == [20, 5]
            assert cost.prefill_rate == cost.context * cost.batch / cost.prefill.summary.median
            assert cost.decode_rate == cost.batch / cost.decode.summary.median
            assert (cost.scorer is not None) == (subject.name == "laLTE")
            assert cost.scorer is None or (0 < cost.scorer.prefill < 1 and 0 < cost.scorer.decode < 1)
            assert Cost.from_dict(json.loads(json.dumps(cost.to_dict()))) == cost


def test_pairs_held_per_head(results: dict[str, ModelCosts], small_model: Callable[..., HybridForCausalLM]) -> None:
    held = {name: [cost.held for cost in costs.costs[:2]] for name, costs in results.items()}
    assert held["GDN"] == [None, None]
    assert [(h.mean, h.least, h.most, h.stored) for h in held["full attention"] if h] == [
        (40, 40, 40, None),
        (70, 70, 70, None),
    ]
    assert [h.mean for h in held["laNSA"] if h] == [40, 70]
    # Untrained scorers keep all: 33 in the window of 32, the rest up to 16 in the store.
    assert [(h.mean, h.stored) for h in held["laLTE"] if h] == [(40, 7), (49, 16)]

    model = small_model("gated_deltanet", "learned_eviction")  # its scorers keep some
    cache = HybridCache(model.config)
    with torch.no_grad():
        model(input_ids=torch.randint(model.config.vocab_size, (2, 30)), past_key_values=cache, use_cache=True)
    found, positions = held_pairs(cache), cache.layers[1].positions
    assert found is not None
    stored = (positions >= 0).sum(-1).double()
    assert found.stored == stored.mean()
    assert (found.least, found.most) == (7 + stored.min(), 7 + stored.max())


def test_an_interrupted_run_goes_on(subjects: list[Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two, plan = subjects[:2], dataclasses.replace(PLAN, contexts=(8, 16, 24), batch_sizes=(1,), steps=1, repeats=1)
    measure, done = efficiency._Group.measure, []

    def logs() -> dict[str, SampleLog]:
        return {subject.name: SampleLog(tmp_path / "log.jsonl", {"model": subject.name}) for subject in two}

    def interrupted(group: Any, ready: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(group.name)
        return measure(group, ready)

    monkeypatch.setattr(efficiency._Group, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measured(two, plan, logs=logs())
    kept = {name: dict(log.records) for name, log in logs().items()}
    assert [len(records) for records in kept.values()] == [2] * 2
    rest: list[int] = []
    monkeypatch.setattr(efficiency._Group, "measure", lambda self, new: rest.append(len(new)) or measure(self, new))
    found = measured(two, plan, logs=logs())
    assert rest == [0, 0, 2]
    for name, costs in found.items():
        assert costs.resumed == 2
        assert [cost.to_dict() for cost in costs.costs][:2] == list(kept[name].values())
    measured(two, dataclasses.replace(plan, contexts=(8, 30)), logs=logs())
    assert rest[3:] == [0, 2]  # what was measured before counts whatever else is asked for now


def test_speeds_are_kept_before_peaks_are_measured_and_peaks_one_by_one(
    subjects: list[Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = subjects[:2]
    plan = dataclasses.replace(PLAN, contexts=(8,), batch_sizes=(1,), steps=1, repeats=1, memory=True)

    def logs() -> dict[str, SampleLog]:
        return {subject.name: SampleLog(tmp_path / "log.jsonl", {"model": subject.name}) for subject in two}

    peaks = iter([7 * MIB])

    def killed(*_: Any, **__: Any) -> int:
        try:
            return next(peaks)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(efficiency, "peak_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        measured(two, plan, logs=logs())
    kept = {name: log.records["8/1"] for name, log in logs().items()}
    assert [record["peak_bytes"] for record in kept.values()] == [7 * MIB, None]
    monkeypatch.setattr(efficiency, "peak_bytes", lambda *_, **__: 9 * MIB)
    monkeypatch.setattr(efficiency._Group, "measure", lambda self, models: dict.fromkeys(models))  # nothing is left
    found = measured(two, plan, logs=logs())
    assert [costs.costs[0].peak_bytes for costs in found.values()] == [7 * MIB, 9 * MIB]
    for name, costs in found.items():
        assert costs.costs[0].to_dict() | {"peak_bytes": 0} == kept[name] | {"peak_bytes": 0}
        assert logs()[name].records["8/1"]["peak_bytes"] is not None


def test_what_was_cut_short_is_measured_again_with_more_time(subjects: list[Subject], tmp_path: Path) -> None:
    plan = dataclasses.replace(PLAN, contexts=(8, 16), batch_sizes=(1,), repeats=2)

    def measure(**changes: Any) -> ModelCosts:
        log = SampleLog(tmp_path / "log.jsonl", {})
        return measured(subjects[:1], dataclasses.replace(plan, **changes), logs={"GDN": log})["GDN"]

    short = measure(limit=1e-9, longest=60.0)
    assert [cost.prefill.warmed_up for cost in short.costs] == [False, False]
    assert measure(limit=1e-9, longest=60.0).resumed == 2
    kept = measure(limit=60.0, longest=1e-9)  # it would take too long now: better one reading than none
    assert (kept.resumed, dict(kept.missing), kept.costs) == (2, {}, short.costs)
    again = measure(limit=60.0)
    assert again.resumed == 0
    assert all(cost.is_whole(2, 25) and cost.limit == 60 for cost in again.costs)
    assert measure(limit=90.0).resumed == measure(limit=1e-9).resumed == 2
    old = {name: value for name, value in short.costs[0].to_dict().items() if name != "limit"}
    assert Cost.from_dict(old).limit == 0


def test_what_cannot_be_measured_is_named(subjects: list[Subject], monkeypatch: pytest.MonkeyPatch) -> None:
    slow = measured(subjects[:1], dataclasses.replace(PLAN, longest=1e-9))["GDN"]
    assert not slow.costs
    assert list(slow.missing) == [(40, 1), (70, 1), (40, 3), (70, 3)]
    assert "more than the 1e-09 s allowed" in slow.missing[40, 1]
    free = 3 * HybridCache.bytes_for(subjects[3].source, 1, torch.float32, 70)  # type: ignore[arg-type]
    monkeypatch.setattr(efficiency, "available_bytes", lambda device: free)
    tight = measured(subjects[3:], dataclasses.replace(PLAN, contexts=(40, 70, 1000)))["full attention"]
    assert {(1000, 1), (1000, 3)} <= tight.missing.keys()
    assert "memory" in tight.missing[1000, 1]
    assert tight.at(70, 1) is not None
    with pytest.raises(ValueError, match="nothing was measured"):
        plot_costs({"GDN": slow}, "never.png")


def test_a_text_that_is_too_short_is_refused_before_anything_is_measured(subjects: list[Subject]) -> None:
    for shape in ((2, 70), (3, 69)):
        short = dataclasses.replace(subjects[0], text=torch.zeros(shape, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"the text for GDN is .* too little for 3 x 70"):
            measured([short], PLAN)


def test_peak_memory_holds_the_cache(subjects: list[Subject]) -> None:
    plan = EfficiencyPlan(contexts=(1500,), batch_sizes=(16,), steps=1, repeats=1, chunk=512)
    (cost,) = measured(subjects[3:], plan)["full attention"].costs
    assert cost.peak_bytes is not None
    assert cost.cache_bytes > 10 * MIB
    assert cost.cache_bytes < cost.peak_bytes < 8 * cost.cache_bytes


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system keeps the peak")
def test_what_compiles_the_store_does_not_count() -> None:
    """A warm-up of 64 tokens does not compile it here: the first pair leaves the window while the peak is measured."""
    options = {"num_heads": 4, "num_kv_heads": 2, "window": 64, "budget": 64, "sinks": 1}
    mixers = {"gated_deltanet": {"num_heads": 2, "head_dim": 8}, "learned_eviction": options}
    config = HybridConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, mixers=list(mixers), mixer_options=mixers)
    subject = Subject("laLTE", config)
    plan = EfficiencyPlan(contexts=(300,), steps=1, repeats=1)
    peak = measured([subject], plan)["laLTE"].at(300, 1).peak_bytes  # type: ignore[union-attr]
    assert peak is not None
    assert peak < 40 * MIB


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system keeps the peak")
def test_the_peak_of_the_warm_up_does_not_count() -> None:
    assert peak_bytes(operator.mul, (b"x", 20 * MIB), warm_up=(b"x", 200 * MIB), device=CPU) < 60 * MIB


def test_the_share_of_the_scorers(small_model: Callable[..., HybridForCausalLM]) -> None:
    assert scorer_share(small_model("gated_deltanet"), list, list, steps=1, device=CPU) is None
    model = small_model("gated_deltanet", "learned_eviction")
    router = model.model.layers[1].attn.router
    forward = router.forward

    def slow(*args: Any) -> Any:
        time.sleep(0.1)
        return forward(*args)

    router.forward = slow

    def read() -> None:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 20, dtype=torch.long), use_cache=False)

    share = scorer_share(model, read, lambda: (read(), time.sleep(0.3)), steps=3, device=CPU)
    assert share is not None
    assert share.prefill > 0.6
    assert 0.1 < share.decode < 0.26  # of 0.4 s or more
    assert not router._forward_hooks
    assert not router._forward_pre_hooks


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=8))
def test_the_front_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    front = pareto_front([cost for cost, _ in points], [accuracy for _, accuracy in points])
    best = {
        (cost, accuracy)
        for cost, accuracy in points
        if not any(c <= cost and a >= accuracy and (c, a) != (cost, accuracy) for c, a in points)
    }
    chosen = [points[index] for index in front]
    assert set(chosen) == best
    assert len(chosen) == len(best)
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(chosen))


def test_accuracy_and_costs_meet_at_a_context_that_all_have(results: dict[str, ModelCosts], tmp_path: Path) -> None:
    both = [Accuracy(40, Share(10, 4), "x"), Accuracy(70, Share(10, 5), "x"), Accuracy(900, Share(10, 6), "x")]
    points = pareto_points(results, {"GDN": both, "laLTE": both[:1], "unknown": both})
    assert [(p.name, p.cost.context, p.cost.batch, p.accuracy.length) for p in points] == [
        ("GDN", 40, 1, 40),
        ("laLTE", 40, 1, 40),
    ]
    points = pareto_points(results, {"GDN": both[2:], "laNSA": both[2:]})
    assert [(p.cost.context, p.accuracy.length) for p in points] == [(70, 900)] * 2
    assert plot_pareto(points, tmp_path / "p.png").stat().st_size > 5_000
    assert plot_costs(results, tmp_path / "c.png").stat().st_size > 20_000
    with pytest.raises(ValueError, match="names in the file"):
        pareto_points(results, {"unknown": both})


def test_accuracies_of_all_kinds_of_files(tmp_path: Path) -> None:
    own = {"task": {"length": 128}, "beyond": Share(8, 4).to_dict()}
    cells = [{"length": n, "match_all": Share(5, n // 100).to_dict()} for n in (200, 200, 400)]
    share = Share(8, 4)
    for content, expected in (
        ({"runs/a": own, "runs/b": own}, {"a": [(128, share)], "b": [(128, share)]}),
        ({"x/m": own, "y/m": own}, {"x/m": [(128, share)], "y/m": [(128, share)]}),
        ({"models": {"a": {"title": "A", "needle": own}}}, {"a": [(128, share)]}),
        ({"evaluation": "needle", "models": {"t": {"cells": cells}}}, {"t": [(200, Share(10, 4)), (400, Share(5, 4))]}),
        ({"a": {**own, "beyond": Share(0, 0).to_dict()}}, {}),
    ):
        (tmp_path / "file.json").write_text(json.dumps(content))
        found = read_accuracies(tmp_path / "file.json")
        assert {name: [(one.length, one.share) for one in each] for name, each in found.items()} == expected
    for wrong in ("[]", "{", '{"a": 1}', '{"a": {}}'):
        (tmp_path / "file.json").write_text(wrong)
        with pytest.raises(ValueError, match="holds no accuracies"):
            read_accuracies(tmp_path / "file.json")
