"""Writes docs/results.md from results.template.md and the data in benchmarks/results: `python benchmarks/tables.py`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from holdfast.demo.settings import TITLES
from holdfast.evaluation.intervals import wilson_interval

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TEMPLATE = ROOT / "benchmarks" / "results.template.md"
SEED = re.compile(r", seed ([1-9]\d*)$")


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def source(name: str) -> str:
    return f"[benchmarks/results/{name}.json](../benchmarks/results/{name}.json)"


def machine(name: str) -> str:
    data = read(name)
    where = data["environment"] if "environment" in data else data["machine"]
    return f"{where['processor']}, {where['cores']} cores, torch {where['packages']['torch']}, commit {where['commit'][:7]}"


def percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")


def demo() -> str:
    runs = [read(f"demo-seed{seed}") for seed in (0, 1, 2)]
    rows = []
    for name, first in runs[0]["models"].items():
        found = [run["models"][name]["needle"] for run in runs]
        shares = [f"{percent(part['within']['accuracy'])} / {percent(part['beyond']['accuracy'])}" for part in found]
        rows.append([first["title"], *shares, *(f"{size:,} B" for size in first["cache_bytes"].values())])
    return f"""## Recall of 16 pairs in 128 tokens

Accuracy within / beyond a window of 16, three seeds (`make demo`, `holdfast demo --seed 1`, `--seed 2`); 512 samples, chance
{percent(1 / runs[0]["models"]["needle-gdn"]["needle"]["task"]["num_values"])}. One recipe per model, 1,300 steps; laLTE by a rule of
its own ([training-eviction.md](training-eviction.md)). Learning rate 1e-2, for laNSA and full attention 5e-3 (below).

{table(["model", "seed 0", "seed 1", "seed 2", "cache at 128", "cache at 1,280"], rows)}

Pure GDN and GDN + SWA are far below in every seed, but how far depends on the seed: the small state can be taught to hold more
than half of the pairs. laLTE is near full attention in two seeds, and 13 points below in the third. What is learned also depends
on rounding, so other kernels are like other seeds: laLTE of seed 2 had 93.5 % at commit 46d0417. At a learning rate of 1e-2 all
seeds of laNSA and full attention succeeded there; at bb6ddd1 full attention fell back to 39 % with seed 0, where sequences become
longer, and laNSA late in training to 69 and 61 % with seeds 1 and 2, its loss rising steadily: the choice of blocks was lost
again. At 5e-3 all six learn the task, and so did seeds 3, 4 and 5 of full attention; for GDN and GDN + SWA 5e-3 was no better
(the loss at the end was lower in two of five runs; single runs, not kept). {machine("demo-seed0")}. Data: {", ".join(map(source, (f"demo-seed{seed}" for seed in (0, 1, 2))))}.
"""


def scorers(name: str, form: str, trained_apart: str | None = None) -> str:
    """Means over the models by scorer and budget, of accuracies also the least and most; `trained_apart` has models whose
    own scorer reads no neighbours.

    The best accuracies are bold. Perplexities are not: they lie within one percent of each other.
    """
    number = "accuracy" if form == "share" else "perplexity"
    values: dict[str, dict[int, list[float]]] = {}
    for model in read(name)["models"].values():
        for cell in model["cells"]:
            values.setdefault(cell["scorer"], {}).setdefault(cell["budget"], []).append(cell[number])
    if trained_apart is not None:
        runs = read(trained_apart)["values"]["MLP, no context"]
        mlp = {at["budget"]: [run[index]["beyond"]["accuracy"] for run in runs] for index, at in enumerate(runs[0])}
        values = {"trained CNN": values.pop("trained"), "trained MLP, in models of its own": mlp} | values
    budgets = list(next(iter(values.values())))
    best = {
        budget: max(mean(row[budget]) for row in values.values()) if form == "share" else None for budget in budgets
    }
    rows = []
    for scorer, row in values.items():
        found = {budget: mean(row[budget]) for budget in budgets}
        shown = {
            b: f"{percent(v)} ({100 * min(row[b]):.0f}–{100 * max(row[b]):.0f})" if form == "share" else f"{v:.3f}"
            for b, v in found.items()
        }
        rows.append(
            [scorer.replace("_", " "), *(f"**{shown[b]}**" if found[b] == best[b] else shown[b] for b in budgets)]
        )
    return table(["slots per head", *map(str, budgets)], rows)


def books() -> str:
    found = read("books-lalte")
    rows = []
    for part in found["course"]:
        kept = [f"{pairs:.0f}" for layer in part["kept_mean"] for pairs in layer]
        first, last = part["steps"]
        rows.append([f"{first:,} to {last:,}", f"{part['validation_loss']:.3f}", *kept, f"{part['kept_min']:.0f}"])
    perplexity = {length: part["perplexity"] for length, part in found["perplexity"].items()}
    heads = [f"layer {2 * layer + 1}, head {head}" for layer in range(2) for head in range(2)]
    return f"""## Books: the published rule reaches the budget

`books-lalte`: {found["parameters"] / 1e6:.1f} M parameters, bytes, 512 tokens, window 64, budget {found["budget"]}; λ steered by counts, no
cap in training. Pairs kept per head, averaged over 500 steps, and the fewest that a head kept over 20 steps. One seed.

{table(["steps", "validation loss", *heads, "fewest"], rows)}

Perplexity per byte with the store held to its budget: {perplexity["512"]:.3f} at the training length, {perplexity["2048"]:.3f} at four
times that. {machine("books-lalte")}. Data: {source("books-lalte")}.
"""


def seeds(shares: Iterable[Mapping[str, Any]]) -> str:
    """One accuracy per seed, in whole percent."""
    return " / ".join(f"{100 * share['accuracy']:.0f}" for share in shares) + " %"


def lengths() -> str:
    values = read("needle-lengths")["values"]
    count = range(len(next(iter(values.values()))[0]))
    rows = [
        [TITLES[name], *(seeds(run[index]["beyond"] for run in runs) for index in count)]
        for name, runs in values.items()
    ]
    sizes = [f"{part['length']:,} tokens" for part in next(iter(values.values()))[0]]
    return table(["beyond the window", *sizes], rows)


def turns() -> str:
    values = read("turns")["values"]
    rows = []
    for name, runs in values.items():
        back = [[part for part in run["aside"]["by_back"] if part["back"] >= 4] for run in runs]
        far = [{"accuracy": sum(p["correct"] for p in run) / sum(p["count"] for p in run)} for run in back]
        rows.append(
            [
                TITLES[name],
                seeds(run["aside"]["total"] for run in runs),
                seeds(far),
                seeds(run["in the stream"]["total"] for run in runs),
            ]
        )
    return table(["model", "asked aside", "of these, told 4 to 7 turns ago", "asked in the stream"], rows)


def variants() -> str:
    """Accuracy by budget, the seeds of each scorer side by side; or that it is not measured."""
    if not (RESULTS / "scorer-variants.json").is_file():
        return "**Not measured yet**: `benchmarks/needle_study.py --parts variants` trains and measures them."
    values = read("scorer-variants")["values"]
    budgets = [str(part["budget"]) for part in next(iter(values.values()))[0]]
    rows = [
        [name, *(seeds(run[index]["beyond"] for run in runs) for index in range(len(budgets)))]
        for name, runs in values.items()
    ]
    shown = table(["slots per head", *budgets], rows)
    return f"{shown}\n\n{machine('scorer-variants')}. Data: {source('scorer-variants')}."


def steered(name: str = "needle-steered") -> str:
    """Pairs kept at the end by the heads of steered models, the seeds of each variant side by side."""
    if not (RESULTS / f"{name}.json").is_file():
        return "**Not measured yet**: `benchmarks/needle_study.py` trains and measures them."
    rows = []
    for variant, runs in read(name)["values"].items():
        kept = [run["kept"]["mean"][0] for run in runs]
        lowest = min(min(run["kept"]["lowest"][0]) for run in runs)
        since = min(count for run in runs for step, *counts in run["kept"]["course"] if step > 600 for count in counts)
        heads = " / ".join(", ".join(f"{count:.0f}" for count in heads) for heads in kept)
        near = sum(abs(count / runs[0]["budget"] - 1) <= 0.1 for heads in kept for count in heads)
        near_all = f"{near} of {sum(map(len, kept))}"
        rows.append([variant, heads, near_all, f"{lowest:.0f}, {since:.0f}", seeds(r["beyond"] for r in runs)])
    head = ["", "kept by the two heads", "within 10 %", "fewest, since step 600", "accuracy beyond the window"]
    return f"{table(head, rows)}\n\n{machine(name)}. Data: {source(name)}."


def laptop_title(name: str) -> str:
    """Of a recipe, or of RECIPE, SETTING."""
    recipe, *setting = name.split(", ")
    return ", ".join([TITLES[recipe.replace("laptop", "needle")], *setting])


def needle_books() -> str:
    """RULER's needles by length, for the models of the laptop recipes; or that it is not measured."""
    if not (RESULTS / "needle-books.json").is_file():
        return "Needles in haystacks: **not measured yet**."
    found = read("needle-books")
    places = [(task, length) for task in found["settings"]["tasks"] for length in found["settings"]["lengths"]]
    rows = []
    for name, runs in by_seed(found["models"]).items():
        cells = [{(cell["task"], cell["length"]): cell["match_all"] for cell in run["cells"]} for run in runs]
        rows.append([laptop_title(name), *(seeds(cell[at] for cell in cells) for at in places)])
    first = next(iter(found["models"].values()))["cells"][0]["match_all"]
    shown = table(["needles found", *(f"{task.removeprefix('niah_')}, {length:,}" for task, length in places)], rows)
    return f"""RULER's needles (`holdfast evaluate needle`; {first["count"]} samples each, with each seed). Of models that have read 3 M
tokens little can be expected; 0 of {first["count"]} leaves up to {100 * wilson_interval(0, first["count"])[1]:.0f} %.

{shown}

{machine("needle-books")}. Data: {source("needle-books")}."""


def efficiency() -> str:
    """What a context costs the mixtures, untrained; or that it is not measured."""
    if not (RESULTS / "efficiency-cpu.json").is_file():
        return "**Not measured yet**: `holdfast evaluate efficiency` does."
    found = read("efficiency-cpu")
    contexts, models = found["settings"]["contexts"], found["models"]

    def by_context(title: str, shown: Callable[[Any], str], only: Callable[[Any], bool] = lambda model: True) -> str:
        rows = []
        for name, model in models.items():
            if not only(model):
                continue
            costs = {cost["context"]: cost for cost in model["costs"]}
            rows.append([name, *(shown(costs[at]) if at in costs else "–" for at in contexts)])
        return table([title, *(f"{context:,}" for context in contexts)], rows)

    def latency(cost: Any) -> str:
        p50, p99 = (1e3 * cost["latency_seconds"][part] for part in ("p50", "p99"))
        return f"{p50:,.0f} ({p99:,.0f})"

    def memory(cost: Any) -> str:
        peak = "not measured" if cost["peak_bytes"] is None else f"{cost['peak_bytes'] / 2**20:,.0f}"
        return f"{cost['cache_bytes'] / 2**20:,.1f} / {peak}"

    def held(cost: Any) -> str:
        return "none" if cost["held"] is None else f"{cost['held']['mean']:,.0f}"

    def share(cost: Any) -> str:
        return "–" if cost["scorer"] is None else f"{cost['scorer']['prefill']:.0%} / {cost['scorer']['decode']:.0%}"

    sizes = [f"{name} {model['total_parameters'] / 1e6:.1f} M" for name, model in models.items()]
    longest = found["settings"]["longest"]
    dash = (
        f" A dash: reading would take more than {longest:g} s."
        if any(m["not_measured"] for m in models.values())
        else ""
    )
    if max(contexts) < 131_072:
        dash += " Longer contexts: not measured yet."
    parts = [
        by_context("tokens/s read, context", lambda cost: f"{cost['prefill_tokens_per_second']:,.0f}"),
        by_context("ms per generated token, p50 (p99)", latency),
        by_context("MiB of cache / peak beyond the weights", memory),
        by_context("pairs that a head holds", held),
        by_context(
            "scorers' share of the time, reading / generating",
            share,
            lambda model: any(cost["scorer"] for cost in model["costs"]),
        ),
    ]
    parts.append(
        table(
            ["million operations per token", *(f"{context:,}" for context in contexts)],
            [
                [name, *(f"{model['flops_per_token'][str(at)] / 1e6:,.0f}" for at in contexts)]
                for name, model in models.items()
            ],
        )
    )
    readings = found["settings"]["repeats"]
    return f"""Untrained models of equal size ({", ".join(sizes)}) on random tokens, batch {found["settings"]["batch_sizes"][0]}, fp32, {found["machine"]["threads"]} threads; models take turns, {"one reading" if readings == 1 else f"{readings} readings"} and {found["settings"]["steps"]} generated tokens each.{dash}
The peaks of laLTE were measured again, alone, at commit {found["measured_again"]["commit"][:7]}: before, they contained the compiler of its store,
96 MiB. What laLTE holds is its capacity: an untrained scorer finds every pair worth keeping. laNSA shares one key/value head among 16 query
heads, as it is published; the other attention layers have 4 key/value heads, with which its cache would be four times as large. It holds
all pairs, and reads 16 blocks of 64 and a window of them.

![Costs by context](../benchmarks/results/efficiency.png)

{(chr(10) * 2).join(parts)}

{machine("efficiency-cpu")}. Data: {source("efficiency-cpu")}."""


COUNTS = (("kept", "mean"), ("kept", "lowest"), ("stored", "mean"))


def by_seed(models: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Models by what they are, seeds in their order: RECIPE[, SETTING] is seed 0, and RECIPE[, SETTING], seed N another."""

    def number(name: str) -> int:
        seed = SEED.search(name)
        return 0 if seed is None else int(seed[1])

    found: dict[str, list[Any]] = {SEED.sub("", name): [] for name in models}
    for name in sorted(models, key=number):
        found[SEED.sub("", name)].append(models[name])
    return found


def laptops() -> str:
    """What the laptop recipes reach on books, the seeds of each side by side."""
    models = by_seed(read("books")["models"])
    rows = []
    for name, runs in models.items():
        trained, longer = ([run["perplexity"][length] for run in runs] for length in ("512", "2048"))
        squad = [percent(run["squad"]["contains"]["accuracy"]) if "squad" in run else "not measured" for run in runs]
        rows.append(
            [
                laptop_title(name),
                ", ".join(dict.fromkeys(run.get("commit", "not recorded")[:7] for run in runs)),
                f"{runs[0]['parameters'] / 1e6:.2f} M",
                side_by_side("{:.1f}", (part["perplexity"] for part in trained)),
                side_by_side("{:.1f}", (part["perplexity"] for part in longer)),
                side_by_side("{:.1f}", (part["bins"][-1]["perplexity"] for part in longer)),
                side_by_side("{:.0f}", (run["seconds"] / 60 for run in runs)),
                side_by_side("{:,}", (run["tokens_per_second"] for run in runs)),
                side_by_side("{}", squad),
            ]
        )
    columns = "model|commit|parameters|perplexity, 512|2,048|last 128 of these|minutes|tokens/s|SQuAD"
    missing = [title for name, title in TITLES.items() if name.replace("needle", "laptop") not in models]
    return table(columns.split("|"), rows) + (f"\n\nNot trained yet: {', '.join(missing)}." if missing else "")


def laptop_differences() -> str:
    """How much greater the perplexities of the laptop recipes are than GDN's, seed by seed, on the same blocks."""
    lengths, seeds = ("512", "2048"), (0, 1, 2)
    found = {(n, seed): read(f"perplexity-books-{n}-seed{seed}")["models"] for n in lengths for seed in seeds}

    def told(difference: Mapping[str, Any]) -> str:
        low, value, high = (
            math.expm1(x) for x in (difference["interval"][0], difference["value"], difference["interval"][1])
        )
        return f"{value:+.1%} ({low:+.1%} to {high:+.1%})".replace("%", " %")

    names = [name for name, result in found[lengths[0], 0].items() if result["difference"] is not None]
    rows = [[laptop_title(name), *(told(models[name]["difference"]) for models in found.values())] for name in names]
    return table(["model", *(f"{int(n):,}, seed {seed}" for n, seed in found)], rows)


def side_by_side(form: str, values: Iterable[Any]) -> str:
    return " / ".join(form.format(value) for value in values)


def laptop_heads() -> str:
    """Pairs that each head of the laptop's laLTE kept at the end, for every setting it was trained with."""
    by_name = {name: found for name, found in read("books")["models"].items() if "kept" in found}
    names = sorted(by_name, key=lambda name: by_name[name]["budget"])
    models = [by_name[name] for name in names]
    settings = [setting(name, by_name[name]["budget"]) for name in names]
    rows = []
    for row, layer in enumerate(models[0]["layers"]):
        for head in range(len(models[0]["kept"]["mean"][row])):
            counts = [[found[a][b][row][head] for a, b in COUNTS] for found in models]
            rows.append([f"{layer}, {head}", *("{:.0f} ({:.0f}), {:.0f}".format(*count) for count in counts)])
    means = [[count for layer in found["kept"]["mean"] for count in layer] for found in models]
    near = [
        sum(abs(count / found["budget"] - 1) <= 0.1 for count in counts)
        for found, counts in zip(models, means, strict=True)
    ]
    rows.append(["within 10 % of b", *(f"{n} of {len(counts)}" for n, counts in zip(near, means, strict=True))])
    return table(["layer, head", *settings], rows)


def setting(name: str, budget: int) -> str:
    """What of RECIPE[, SETTING][, seed N] is not the recipe's, with the budget."""
    told = name.partition(", ")[2]
    return told if told.startswith("b = ") else f"b = {budget}, {told or 'as in the recipe'}"


def what(name: str) -> str:
    return str(read(name)["what"])


PARTS: dict[str, Callable[..., str]] = {
    part.__name__: part
    for part in (
        *(machine, source, what, demo, lengths, turns, scorers, variants, steered),
        *(laptops, laptop_differences, laptop_heads, needle_books, books, efficiency),
    )
}


def page() -> str:
    """The template with a function's answer in place of each {{function argument …}}."""

    def fill(slot: re.Match[str]) -> str:
        name, *arguments = slot[1].split()
        return PARTS[name](*arguments).rstrip()

    return re.sub(r"\{\{(.+?)\}\}", fill, TEMPLATE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    (ROOT / "docs" / "results.md").write_text(page(), encoding="utf-8")
