"""What the laptop recipes learn from books, beside each other; writes benchmarks/results/books.json and its picture.

    holdfast train laptop-gdn --data.source BOOKS --output.directory runs     # and the other four
    python benchmarks/books_study.py runs/laptop-* --data BOOKS --squad dev-v2.0.json
    holdfast train laptop-lalte --model.mixer-options.learned-eviction.budget 16 --output.directory other ...
    python benchmarks/books_study.py other/laptop-lalte --name "laptop-lalte, b = 16" --add --data BOOKS
    holdfast train laptop-gdn --training.seed 1 --output.directory seed1 ...
    python benchmarks/books_study.py seed1/laptop-gdn --name "laptop-gdn, seed 1" --add --data BOOKS

Perplexity on the validation split by position, at the length of training and at four times that; the course of
training; pairs that each head kept at its end; SQuAD completion.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.cli.common import quieten_transformers, read_model
from holdfast.data.recall import load_recall
from holdfast.data.text import PackedText, load_text, load_tokenizer
from holdfast.evaluation.perplexity import evaluate_perplexity
from holdfast.evaluation.recall import evaluate_recall
from holdfast.files import write_json
from holdfast.machine import describe_machine
from holdfast.training.history import RunHistory, read_history

BENCHMARKS = Path(__file__).resolve().parent
RESULTS = BENCHMARKS / "results" / "books.json"
PICTURE = RESULTS.with_suffix(".png")
KNOWN = ("laptop-gdn", "laptop-gdn-swa", "laptop-lalte", "laptop-lansa", "laptop-gdn-full")
LENGTHS = (512, 2048)
TOKENS = 65_536  # of the validation split, at each length
END = 300  # steps whose counts are averaged


def course(run: RunHistory) -> dict[str, Any]:
    """Validation losses by step, speed, and what heads kept in the last steps; a record is a mean over some."""
    steps, losses = run.series("eval_loss")
    _, speeds = run.series("tokens_per_second")
    found: dict[str, Any] = {
        "validation": [[int(step), round(loss, 4)] for step, loss in zip(steps, losses, strict=True)],
        "tokens_per_second": round(float(np.nanmedian(speeds))),
    }
    for name in ("kept", "stored"):
        steps, counts = run.by_head(name)
        if len(steps):
            late = counts[steps > run.last_step - END]
            found[name] = {"mean": late.mean(axis=0).round(2).tolist(), "lowest": late.min(axis=0).round(1).tolist()}
    if "kept" in found:
        found |= {"budget": run.budget, "layers": run.layers, "lambda": run.by_head("lambda")[1][-1].tolist()}
        steps, counts = run.by_head("kept")
        groups = np.array_split(np.arange(len(steps)), min(60, len(steps)))
        found["kept"]["course"] = [[int(steps[g[-1]]), *counts[g].mean(axis=0).round(1).flatten()] for g in groups]
    return found


def measure(run: Path, data: str, squad: str | None, samples: int) -> dict[str, Any]:
    """Everything that is known and measured of one run."""
    model, tokenizer = read_model(run), load_tokenizer(run)
    found = json.loads((run / "summary.json").read_text(encoding="utf-8")) | course(read_history(run))
    if found["resumed_from"] is not None:
        found["resumed_from"] = Path(found["resumed_from"]).name  # which checkpoint, not where it lay
    found["commit"] = describe_machine()["commit"]  # others may have been measured before: --add
    found["perplexity"] = {}
    for length in LENGTHS:
        texts = load_text(data, split="validation")
        blocks = PackedText.from_texts(texts, tokenizer, length, max_tokens=TOKENS + length)
        found["perplexity"][length] = evaluate_perplexity(
            model, blocks, batch_size=2, max_blocks=TOKENS // length, position_bins=16 if length > 512 else 8
        ).to_dict()
    if squad is not None:
        asked = load_recall("squad", squad, limit=samples)
        found["squad"] = evaluate_recall(model, tokenizer, asked, beyond=True).to_dict()
    return found


def draw(found: dict[str, Any], path: Path) -> None:
    """Perplexity by position of every model, and the pairs that the heads of laLTE kept by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 3.6), layout="constrained")
    by_position, by_step = figure.subplots(1, 2)
    recipes = {name: model for name, model in found["models"].items() if "," not in name}
    for name, model in recipes.items():
        bins = model["perplexity"][str(LENGTHS[-1])]["bins"]
        by_position.plot([(b["start"] + b["stop"]) / 2 for b in bins], [b["perplexity"] for b in bins], label=name)
    by_position.axvline(LENGTHS[0], color="0.6", linestyle=":", label="length of training")
    by_position.set(xlabel="position", ylabel="perplexity of a token")
    by_position.legend(fontsize="x-small")
    model = next((model for model in recipes.values() if "kept" in model), None)
    if model is None:
        figure.savefig(path, dpi=110)
        return
    counts = np.array(model["kept"]["course"])
    heads = range(len(model["kept"]["mean"][0]))
    names = [f"layer {layer}, head {head}" for layer in model["layers"] for head in heads]
    for column, name in enumerate(names, start=1):
        by_step.plot(counts[:, 0], np.maximum(counts[:, column], 0.1), label=name)
    by_step.axhline(model["budget"], color="0.6", linestyle=":", label="budget")
    by_step.set(xlabel="step", ylabel="pairs kept", yscale="log")
    by_step.legend(fontsize="x-small")
    figure.savefig(path, dpi=110)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="directories of trained models")
    parser.add_argument("--data", required=True, help="the books: a directory with a validation split")
    parser.add_argument("--squad", help="SQuAD's published JSON; left out: not measured")
    parser.add_argument("--what", default="laptop recipes on books", help="how they were trained, for the record")
    parser.add_argument("--name", help="of one run; left out: of its directory. RECIPE, SETTING or RECIPE, seed N")
    parser.add_argument("--add", action="store_true", help="to the models that are in the results already")
    parser.add_argument("--samples", type=int, default=200, help="questions of SQuAD, drawn at random")
    chosen = parser.parse_args(given)
    if chosen.name is not None and (len(chosen.runs) > 1 or chosen.name.partition(", ")[0] not in KNOWN):
        parser.error(f"--name is for one run, and RECIPE or 'RECIPE, SETTING' with a recipe of {', '.join(KNOWN)}")
    quieten_transformers()
    models = json.loads(RESULTS.read_text(encoding="utf-8"))["models"] if chosen.add else {}
    for run in chosen.runs:
        print(run, flush=True)
        models[chosen.name or run.name] = measure(run, chosen.data, chosen.squad, chosen.samples)
        write_json(RESULTS, {"what": chosen.what, "environment": describe_machine(), "models": models})
    draw(json.loads(RESULTS.read_text(encoding="utf-8")), PICTURE)


if __name__ == "__main__":
    main()
