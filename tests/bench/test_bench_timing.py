"""The harness: who runs when, what is counted, and what is made of the samples."""

import gc

import pytest
import torch

from holdfast.bench import timing as timing_module
from holdfast.bench.timing import Summary, Timing, Variant, measure, speed_ratio, turn_order

CPU = torch.device("cpu")


class FakeClock:
    """Time that passes only when a variant says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr(timing_module, "time", clock)
    return clock


def takes(clock: FakeClock, name: str, seconds: list[float] | float, log: list[str], **options: float) -> Variant:
    """A variant that takes `seconds`, call by call, and writes down what is called."""
    calls = iter(seconds) if isinstance(seconds, list) else None

    def run() -> None:
        log.append(name)
        clock.now += next(calls) if calls else seconds

    def prepare() -> None:
        log.append(f"prepare {name}")
        clock.now += 100.0

    return Variant(name, run, prepare, **options)


def test_variants_take_turns_in_an_order_that_rotates(clock: FakeClock) -> None:
    log: list[str] = []
    variants = [takes(clock, name, 1.0, log) for name in "abc"]
    measure(variants, turns=4, limit=1e9, device=CPU)
    assert [name for name in log if not name.startswith("prepare")] == [*"abc", *"abc", *"bca", *"cab", *"abc"]
    assert log[:6] == ["prepare a", "a", "prepare b", "b", "prepare c", "c"]
    firsts = [turn_order(5, turn)[0] for turn in range(10)]
    assert firsts == [0, 1, 2, 3, 4] * 2
    assert all(sorted(turn_order(5, turn)) == [0, 1, 2, 3, 4] for turn in range(10))


def test_warm_up_and_preparation_are_not_counted(clock: FakeClock) -> None:
    log: list[str] = []
    timings = measure([takes(clock, "a", [50.0, 2.0, 3.0], log)], turns=2, limit=1e9, device=CPU)
    assert timings["a"].turns == [[2.0], [3.0]]
    assert timings["a"].warmed_up


def test_a_turn_of_several_samples_begins_with_one_that_is_not_counted(clock: FakeClock) -> None:
    log: list[str] = []
    seconds = [90.0, 80.0, 1.0, 2.0, 3.0, 70.0, 4.0, 5.0, 6.0]
    timings = measure([takes(clock, "a", seconds, log, samples_per_turn=3)], turns=2, limit=1e9, device=CPU)
    assert timings["a"].turns == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    assert timings["a"].samples == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert log.count("prepare a") == 3


def test_the_last_turn_takes_the_samples_that_are_left(clock: FakeClock) -> None:
    log: list[str] = []
    variant = takes(clock, "a", 1.0, log, samples_per_turn=3, samples=7)
    timings = measure([variant], turns=4, limit=1e9, device=CPU)
    assert [len(turn) for turn in timings["a"].turns] == [3, 3, 1]


def test_short_work_is_repeated_until_a_sample_lasts(clock: FakeClock) -> None:
    """A call of 9 seconds, cold, and 3 after it: to fill 10 seconds takes 4 of them."""
    log: list[str] = []
    seconds = [90.0, 9.0, 3.0, 2.0, 2.0, 2.0, 4.0, 9.0, 3.0, 1.0, 1.0, 1.0, 1.0]
    timings = measure([takes(clock, "a", seconds, log, shortest_sample=10.0)], turns=2, limit=1e9, device=CPU)
    assert timings["a"].turns == [[2.5], [1.0]]
    assert log.count("prepare a") == 3
    long = takes(clock, "long", [90.0, 11.0, 12.0], log, shortest_sample=10.0)
    assert measure([long], turns=2, limit=1e9, device=CPU)["long"].turns == [[11.0], [12.0]]
    assert log.count("long") == 3  # no call of long work is thrown away


def test_a_slow_variant_stops_at_the_limit_and_the_others_go_on(clock: FakeClock) -> None:
    log: list[str] = []
    slow = Variant("slow", takes(clock, "slow", 4.0, log).run)
    slowest = Variant("slowest", takes(clock, "slowest", 11.0, log).run)
    fast = Variant("fast", takes(clock, "fast", 1.0, log).run)
    timings = measure([slow, slowest, fast], turns=6, limit=10.0, device=CPU)
    assert {name: len(timing.turns) for name, timing in timings.items()} == {"slow": 3, "slowest": 1, "fast": 6}
    assert timings["slowest"].samples == [11.0]
    assert not timings["slowest"].warmed_up
    assert log.count("slowest") == 1


def test_the_garbage_collector_rests_and_comes_back() -> None:
    states: list[bool] = []
    measure([Variant("a", lambda: states.append(gc.isenabled()))], turns=2, limit=9.0, device=CPU)
    assert states == [False] * 3
    assert gc.isenabled()

    def fails() -> None:
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        measure([Variant("a", fails)], turns=1, limit=9.0, device=CPU)
    assert gc.isenabled()


def test_summary_by_hand() -> None:
    summary = Summary.of([float(number) for number in reversed(range(101))])
    assert (summary.count, summary.minimum, summary.low, summary.median) == (101, 0.0, 25.0, 50.0)
    assert (summary.high, summary.p90, summary.p99, summary.maximum) == (75.0, 90.0, 99.0, 100.0)
    assert Summary.of([3.0]).p99 == 3.0
    with pytest.raises(ValueError, match="no samples"):
        Summary.of([])


def test_ratios_are_taken_turn_by_turn() -> None:
    """On a machine that slows down by ten in the middle the medians would say 5.5 and the pairs say 2."""
    slow = Timing([[2.0], [2.0], [20.0], [20.0]])
    fast = Timing([[1.0], [1.0], [10.0], [10.0]])
    assert speed_ratio(slow, fast) == Summary(4, *[2.0] * 7)
    several = Timing([[1.0, 100.0, 2.0], [6.0]])
    assert speed_ratio(several, Timing([[1.0, 1.0, 9.0], [2.0], [7.0]])).median == 2.5
