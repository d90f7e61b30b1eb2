"""What the demonstration says: the table and the claim."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.table import Table

from holdfast.demo.measure import Measurement
from holdfast.demo.settings import TITLES
from holdfast.evaluation.needle import Tally

__all__ = ["Claim", "check_claim", "comparison_table"]

NEAR = 0.05
"""laLTE counts as near full attention when its accuracy is at most this much lower."""
CLEAR = 0.10
"""A model counts as below laLTE when its accuracy is at least this much lower."""
SOLVED = 0.9
"""Full attention must recall this much, or the models have not been trained far enough to compare."""


@dataclass(frozen=True)
class Claim:
    """Whether the measurements show what the library claims, and the sentence that says so."""

    shown: bool
    sentence: str


def check_claim(results: Mapping[str, Measurement]) -> Claim:
    """Compare accuracy beyond the window: laLTE should be near full attention, and the other two clearly below it.

    Args:
        results: measurements by recipe name, all of `TITLES`; laNSA takes no part in the claim.

    Raises:
        ValueError: if no answer lies beyond the window.
    """
    beyond = {name: result.needle.beyond.accuracy for name, result in results.items()}
    if None in beyond.values():
        raise ValueError("no answer lies beyond the window, so there is nothing to compare; take more samples.")
    accuracy = {name: share for name, share in beyond.items() if share is not None}
    kept, full = accuracy["needle-lalte"], accuracy["needle-gdn-full"]
    near = kept >= full - NEAR
    above = all(accuracy[name] <= kept - CLEAR for name in ("needle-gdn", "needle-gdn-swa"))
    grown = {name: max(result.cache_bytes.values()) for name, result in results.items()}
    numbers = (
        f"beyond the window laLTE recalls {kept:.1%}, full attention {full:.1%}, "
        f"GDN {accuracy['needle-gdn']:.1%} and GDN + SWA {accuracy['needle-gdn-swa']:.1%}"
    )
    trained = full >= SOLVED
    if near and above and trained:
        ratio = grown["needle-gdn-full"] / grown["needle-lalte"]
        tokens = max(results["needle-lalte"].cache_bytes)
        return Claim(
            True,
            f"The claim shows: {numbers}; after {tokens:,} tokens the memory of full attention is "
            f"{ratio:.1f} times that of laLTE, which does not grow.",
        )
    missing = [] if trained else ["full attention itself has not learned the task yet"]
    missing += [] if near else ["laLTE is not near full attention"]
    missing += [] if above else ["laLTE is not clearly above the models without a store"]
    return Claim(False, f"The claim does not show in this run ({' and '.join(missing)}): {numbers}.")


def comparison_table(results: Mapping[str, Measurement], shortened: bool) -> Table:
    """One row per model, in the order of `TITLES`."""
    first = next(iter(results.values()))
    window = first.needle.task.window
    title = f"Recall of {first.needle.task.num_pairs} pairs in {first.needle.task.length} tokens"
    table = Table(title=f"{title} (shortened run)" if shortened else title)
    table.add_column("model", no_wrap=True)
    for heading in (f"within {window} tokens", "beyond", "perplexity"):
        table.add_column(heading, justify="right", no_wrap=True)
    for tokens in first.cache_bytes:
        table.add_column(f"cache at {tokens:,}", justify="right", no_wrap=True)
    table.add_column("tokens/s", justify="right")
    for name in TITLES:
        result = results[name]
        perplexity = result.needle.total.perplexity
        table.add_row(
            TITLES[name],
            _share(result.needle.within),
            _share(result.needle.beyond),
            "–" if perplexity is None else f"{perplexity:.2f}",
            *(f"{count:,} B" for count in result.cache_bytes.values()),
            f"{result.tokens_per_second:,.0f}",
        )
    return table


def _share(tally: Tally) -> str:
    if tally.accuracy is None or tally.interval is None:
        return "–"
    low, high = tally.interval
    return f"{tally.accuracy:.1%} ({100 * low:.1f}–{100 * high:.1f})"
