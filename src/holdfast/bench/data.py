"""How fast text becomes blocks to train on, and whether memory stays flat meanwhile."""

from __future__ import annotations

import dataclasses
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from holdfast.bench.memory import resident_bytes
from holdfast.bench.settings import DataSettings
from holdfast.data.progress import track
from holdfast.data.sources import TextSource, load_text
from holdfast.data.stream import TextStream
from holdfast.data.tokenizers import load_tokenizer, train_tokenizer
from holdfast.machine import describe_machine

__all__ = ["run_data"]

POINTS = 20  # at which resident memory is read
TO_LEARN_FROM = 20_000  # documents
WORDS = 5_000  # different ones in documents that are made up


def run_data(settings: DataSettings) -> dict[str, Any]:
    """Measure tokens per second for each tokenizer and number of workers, and memory over a pass.

    Returns:
        Plain values: `settings`, `machine`, `rates` (of each: `tokenizer`, `workers`, `tokens`, `seconds`,
        `tokens_per_second`; without workers also `tokens_per_cpu_second`, which other work on the machine does not
        change; the time to the first block is `first_block_seconds` and does not count) and `memory`: resident bytes
        of this process while it reads the corpus once without workers, by blocks taken.
    """
    with tempfile.TemporaryDirectory() as folder:
        if settings.source is None:
            made = Path(folder) / "documents.jsonl"
            _make_documents(made, settings.documents, settings.seed)
            source = load_text(made)
        else:
            source = load_text(settings.source)
        rates = []
        for name in settings.tokenizers:
            tokenizer = _tokenizer(name, source)
            rates += [_rate(source, tokenizer, name, workers, settings) for workers in settings.workers]
        memory = _memory(source, tokenizer, settings) if settings.memory else None
    values = {name: value for name, value in dataclasses.asdict(settings).items() if name != "output"}
    return {"settings": values, "machine": describe_machine(), "rates": rates, "memory": memory}


def _tokenizer(name: str, source: TextSource) -> PreTrainedTokenizerFast:
    if name != "bpe":
        return load_tokenizer(name)
    return train_tokenizer(itertools.islice(source, TO_LEARN_FROM), 4096, progress=False)


def _rate(
    source: TextSource, tokenizer: PreTrainedTokenizerFast, name: str, workers: int, settings: DataSettings
) -> dict[str, Any]:
    blocks = TextStream(source, tokenizer, settings.length, shuffle=settings.shuffle, workers=workers)
    started = time.perf_counter()
    iterator = iter(blocks)
    next(iterator)
    first = time.perf_counter() - started
    for _ in track(range(settings.shuffle), f"{name}, {workers} workers"):
        next(iterator)  # until the windows of all lanes are in their rhythm
    count, started, used = 0, time.perf_counter(), time.process_time()
    while (seconds := time.perf_counter() - started) < settings.seconds:
        next(iterator)
        count += 1
    tokens, used = count * settings.length, time.process_time() - used
    return {
        "tokenizer": name,
        "workers": workers,
        "first_block_seconds": first,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "tokens_per_cpu_second": None if workers else tokens / used,
    }


def _memory(source: TextSource, tokenizer: PreTrainedTokenizerFast, settings: DataSettings) -> dict[str, Any]:
    blocks = TextStream(source, tokenizer, settings.length, shuffle=settings.shuffle, repeat=False)
    before = resident_bytes()
    readings = [resident_bytes() for _ in _every(track(blocks, "memory"), settings.shuffle)]
    chosen = np.unique(np.linspace(0, len(readings) - 1, POINTS).round().astype(int))
    return {
        "before_bytes": before,
        "blocks": [int(index + 1) * settings.shuffle for index in chosen],
        "resident_bytes": [readings[index] for index in chosen],
        "peak_bytes": resident_bytes(peak=True),
    }


def _every(items: Iterator[Any], count: int) -> Iterator[Any]:
    """Every `count`-th item."""
    return itertools.islice(items, count - 1, None, count)


def _make_documents(path: Path, count: int, seed: int) -> None:
    """JSON lines of 5 to 30 words each; frequent words are short, as in a language."""
    generator = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwypvbgkqjxz"))
    words = ["".join(generator.choice(letters, 2 + rank % 9)) for rank in range(WORDS)]
    with path.open("w", encoding="utf-8") as file:
        for _ in track(range(count), "documents"):
            ranks = (WORDS ** generator.random(int(generator.integers(5, 31)))).astype(int)
            file.write(json.dumps({"text": " ".join(words[rank - 1] for rank in ranks)}) + "\n")
