"""Recall from real text: FDA and SWDE (information extraction) and SQuAD, as prompts that the answer continues.

The tasks and their prompts are those of Arora et al. (arXiv 2402.18668, section 6): a document, then the beginning of a
sentence or the name of an attribute, which the model is to complete. Every prompt and answer is stripped of blanks
around it: a trailing blank makes tokens that the model has never seen before a word.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from holdfast.data.text import load_text
from holdfast.files import UnreadableError

__all__ = ["RECALL_TASKS", "RecallSample", "is_published_squad", "load_recall"]

RECALL_TASKS = {
    "fda": "hazyresearch/based-fda",
    "swde": "hazyresearch/based-swde-v2",
    "squad": "hazyresearch/based-squad",
}
"""Where each task lies on the Hugging Face hub; its split is `validation`, with columns `text` and `value`."""

QUESTION = "Title: {title}\n\nBackground: {context}\n\nQuestion: {question}\n\nAnswer:"

_START_OF_SQUAD = re.compile(r'\s*\{\s*"(version|data)"\s*:')


@dataclasses.dataclass(frozen=True)
class RecallSample:
    """A prompt, and the answers of which one should stand in what follows.

    Attributes:
        passage: a number that the questions of one passage have in common; None where it is not known, as in rows of
            columns.
    """

    prompt: str
    answers: tuple[str, ...]
    passage: int | None = None


def load_recall(
    task: str, source: str | Path | None = None, *, limit: int | None = None, seed: int = 0
) -> list[RecallSample]:
    """The samples of a task, in order.

    Args:
        task: "fda", "swde" or "squad".
        source: a parquet, jsonl or json file with columns `text` and `value`; for squad also SQuAD's published JSON,
            version 1 or 2, whose unanswerable questions are left out and whose prompts are title, paragraph and
            question (the hub's squad has sentences to complete instead); or the name of another data set on the hub.
            None: the task's own on the hub.
        limit: so many samples at the most, drawn at random: the first ones of SQuAD are all of one article.
        seed: of what is drawn.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the task is unknown, the source cannot be read, or it holds no sample.
    """
    if task not in RECALL_TASKS:
        raise ValueError(f"there is no recall task {task}; give one of {', '.join(RECALL_TASKS)}.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; give at least 1.")
    source = str(RECALL_TASKS[task] if source is None else source)
    published = _published_squad(Path(source).expanduser()) if task == "squad" else None
    samples = list(_rows(source) if published is None else published)
    if not samples:
        raise ValueError(f"{source} holds no sample with an answer; give a file of the task {task}.")
    if limit is None or limit >= len(samples):
        return samples
    return [samples[place] for place in sorted(random.Random(seed).sample(range(len(samples)), limit))]


def is_published_squad(source: str | Path) -> bool:
    """Whether this is a file of questions as SQuAD publishes them: articles of paragraphs with questions and answers.

    Reads all of a .json file, and nothing of others.
    """
    articles = _articles(Path(source).expanduser())
    return bool(articles) and all(isinstance(each, dict) and "paragraphs" in each for each in articles or ())


def _rows(source: str) -> Iterator[RecallSample]:
    """Samples from columns `text` and `value`; rows in which one of them is empty are left out."""
    texts, values = (load_text(source, split="validation", text_column=column) for column in ("text", "value"))
    for text, value in zip(texts, values, strict=True):
        if not isinstance(text, str) or not isinstance(value, str):
            raise ValueError(f"{source} has a row without a text or a value; both columns must hold text.")
        if text.strip() and value.strip():
            yield RecallSample(text.strip(), (value.strip(),))


def _published_squad(path: Path) -> Iterator[RecallSample] | None:
    """Samples of a file as SQuAD publishes it; None where it is something else."""
    articles = _articles(path)
    return None if articles is None else _questions(articles, path)


def _articles(path: Path) -> list[Any] | None:
    """What a JSON file has under `data`, where SQuAD's have articles; None of any other."""
    if path.suffix != ".json" or not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        content = json.loads(text)
    except ValueError as error:
        if _START_OF_SQUAD.match(text):
            raise UnreadableError(
                f"cannot read {path}: it begins as SQuAD's questions and is no JSON ({error})."
            ) from error
        return None  # lines of JSON, or no JSON at all: the reader of columns says which
    articles = content.get("data") if isinstance(content, dict) else None
    return articles if isinstance(articles, list) else None


def _questions(articles: Iterable[Mapping[str, Any]], path: Path) -> Iterator[RecallSample]:
    passages = itertools.count()
    try:
        for article in articles:
            title = article["title"].replace("_", " ")
            for paragraph in article["paragraphs"]:
                passage = next(passages)
                for question in paragraph["qas"]:
                    answers = tuple(dict.fromkeys(answer["text"].strip() for answer in question["answers"]))
                    answers = tuple(filter(None, answers))  # every text contains an empty one
                    if answers:
                        parts = {"title": title, "context": paragraph["context"], "question": question["question"]}
                        yield RecallSample(
                            QUESTION.format(**{k: v.strip() for k, v in parts.items()}), answers, passage
                        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UnreadableError(f"{path} is not as SQuAD publishes its questions ({error}); give such a file.") from error
