"""The needle task: key-value pairs scattered in noise, asked for at the end. Generated, seeded, needs no file.

One sample of `length` tokens, as `NeedleTask.describe` writes them (`·` noise, `?` query marker):

    bos · · k7 v3 · k2 v9 · · · k5 v1 · · ?  k2 v9 k7 v3 k5 v1
        └─────────── context ───────────┘   └── questions ───┘

Keys are distinct within a sample and each is asked at most once, so an answer stands in the context and nowhere else
before it is due. A model that forgets the context can only guess: chance is 1 / `num_values`.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

__all__ = ["NeedleStream", "NeedleTask"]

IGNORED = -100  # the label that transformers' losses leave out


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleTask:
    """Associative recall in noise; the settings say everything, samples follow from a seed.

    Token ids, in this order: pad (0), bos (1), query marker (2), `num_noise` noise tokens, `num_keys` keys,
    `num_values` values; `vocab_size` of them.

    Args:
        length: tokens per sample, bos and answers included.
        num_pairs: key-value pairs in the context.
        num_queries: how many of the pairs are asked for; None asks for all.
        num_keys: different keys to draw from, without replacement; at least `num_pairs`.
        num_values: different values to draw from, with replacement.
        num_noise: different noise tokens to draw from, with replacement.
        window: attention window w that results are labelled with. It does not change the samples. An answer lies
            beyond the window when its distance is greater than w: then no attention with i − j ≤ w that starts at the
            question reaches the value.

    Raises:
        ValueError: a count is out of range, or the pairs and the questions do not fit in `length`.
    """

    length: int = 128
    num_pairs: int = 16
    num_queries: int | None = None
    num_keys: int = 32
    num_values: int = 32
    num_noise: int = 16
    window: int = 16

    def __post_init__(self) -> None:
        for name in ("num_pairs", "num_keys", "num_values", "num_noise"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1.")
        if self.window < 0:
            raise ValueError(f"window is {self.window}; give 0 or more.")
        if self.num_keys < self.num_pairs:
            raise ValueError(
                f"num_keys is {self.num_keys}; {self.num_pairs} pairs have distinct keys, give that many or more."
            )
        if not 1 <= self.answers <= self.num_pairs:
            raise ValueError(f"num_queries is {self.num_queries}; give 1 to num_pairs ({self.num_pairs}), or None.")
        shortest = 2 + 2 * self.num_pairs + 2 * self.answers
        if self.length < shortest:
            raise ValueError(
                f"length is {self.length}; {self.num_pairs} pairs and {self.answers} questions need {shortest} or more."
            )

    def sample(self, seed: int | np.random.Generator, batch_size: int) -> dict[str, torch.Tensor]:
        """Draw `batch_size` samples, on the CPU.

        A generator is advanced, and the samples do not depend on how they are cut into batches: two batches of 4 are
        one batch of 8. Time and memory O(batch_size · length).

        Args:
            seed: an integer, or a NumPy generator to draw from.
            batch_size: number of samples B.

        Returns:
            `input_ids`, `labels` and `distance`, int64 [B, length]. Labels equal `input_ids` at the answers and are
            −100 elsewhere (aligned with `input_ids`, as transformers expects). `distance` is i − j at the answers, 0
            elsewhere, with i the position that predicts the answer (the asked key) and j that of the value in the
            context.
        """
        return self._compose(np.random.default_rng(seed).random((batch_size, self.draws)))

    def describe(self, token_ids: Iterable[int]) -> str:
        """Readable form of a token sequence, such as `k7 v3 · · ? k7 v3`.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        words = ["_", "bos", "?", *["·"] * self.num_noise]
        words += [f"k{key}" for key in range(self.num_keys)] + [f"v{value}" for value in range(self.num_values)]
        ids = [int(token) for token in token_ids]
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is out of range; this task has ids 0 to {self.vocab_size - 1}.")
        return " ".join(words[token] for token in ids)

    def at_stage(self, num_pairs: int, length: int) -> "NeedleTask":
        """The same task with other numbers of pairs and tokens; no more is asked for than there is.

        Raises:
            ValueError: the pairs do not fit, or the stage is longer than the task.
        """
        if length > self.length:
            raise ValueError(f"a stage of {length} tokens is longer than the task ({self.length}).")
        num_queries = None if self.num_queries is None else min(self.num_queries, num_pairs)
        return dataclasses.replace(self, num_pairs=num_pairs, num_queries=num_queries, length=length)

    @property
    def answers(self) -> int:
        """Answers per sample."""
        return self.num_pairs if self.num_queries is None else self.num_queries

    @property
    def context_length(self) -> int:
        """Tokens between bos and the query marker."""
        return self.length - 2 - 2 * self.answers

    @property
    def pad_token_id(self) -> int:
        """0; samples have equal lengths and hold no pads."""
        return 0

    @property
    def bos_token_id(self) -> int:
        """First token of every sample."""
        return 1

    @property
    def query_token_id(self) -> int:
        """The marker after which questions begin."""
        return 2

    @property
    def first_noise_id(self) -> int:
        """Id of the first noise token."""
        return 3

    @property
    def first_key_id(self) -> int:
        """Id of key 0."""
        return self.first_noise_id + self.num_noise

    @property
    def first_value_id(self) -> int:
        """Id of value 0."""
        return self.first_key_id + self.num_keys

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.first_value_id + self.num_values

    @property
    def draws(self) -> int:
        """Uniform random numbers that make one sample."""
        return sum(self._draw_sizes())

    def _draw_sizes(self) -> list[int]:
        free_slots = self.context_length - self.num_pairs  # a pair takes one slot, and so does a noise token
        return [self.context_length, free_slots, self.num_keys, self.num_pairs, self.num_pairs]

    def _compose(self, uniforms: np.ndarray) -> dict[str, torch.Tensor]:
        """The samples that rows of [0, 1) numbers, float64 [B, draws], stand for."""
        noise, slots, keys, values, order = np.split(uniforms, np.cumsum(self._draw_sizes())[:-1], axis=1)
        pairs, answers = self.num_pairs, self.answers
        # Choosing slots, then widening those chosen to two tokens, makes every placement equally likely.
        chosen = np.sort(_choose(slots, pairs), axis=1)
        key_at = 1 + chosen + np.arange(pairs)
        key = self.first_key_id + _choose(keys, pairs)
        value = self.first_value_id + (values * self.num_values).astype(np.int64)
        asked = _choose(order, answers)
        ask_at = 2 + self.context_length + 2 * np.arange(answers)

        ids = np.empty((len(uniforms), self.length), dtype=np.int64)
        ids[:, 0] = self.bos_token_id
        ids[:, 1 : 1 + self.context_length] = self.first_noise_id + (noise * self.num_noise).astype(np.int64)
        ids[:, 1 + self.context_length] = self.query_token_id
        np.put_along_axis(ids, key_at, key, axis=1)
        np.put_along_axis(ids, key_at + 1, value, axis=1)
        ids[:, ask_at] = np.take_along_axis(key, asked, axis=1)
        ids[:, ask_at + 1] = np.take_along_axis(value, asked, axis=1)

        labels = np.full_like(ids, IGNORED)
        labels[:, ask_at + 1] = ids[:, ask_at + 1]
        distance = np.zeros_like(ids)
        distance[:, ask_at + 1] = ask_at - (np.take_along_axis(key_at, asked, axis=1) + 1)
        return {
            name: torch.from_numpy(a) for name, a in (("input_ids", ids), ("labels", labels), ("distance", distance))
        }


class NeedleStream(Dataset):
    """`size` samples of a needle task as a map-style dataset: sample n depends on (seed, n) and on nothing else.

    So workers, batch sizes and resuming in the middle do not change the data. A curriculum goes by index: read it with
    a sequential sampler (`TrainingArguments(train_sampling_strategy="sequential")`), or the stages are mixed.

    A stage of a curriculum may be shorter than the task. Its samples then hold several sequences, so that a sample
    has about the same number of tokens at every stage and a batch of short sequences is not wasteful: models learn
    to recall several times faster if they begin with few pairs in short sequences.

    Args:
        task: the task at its full difficulty.
        curriculum: stages `(first index, num_pairs, length)`, the first at index 0; None is the task as it is
            throughout.
        seed: 0 or more.
        size: number of samples.

    Raises:
        ValueError: the stages do not start at 0 or do not rise, or a stage does not fit the task.
    """

    def __init__(
        self,
        task: NeedleTask,
        curriculum: Sequence[tuple[int, int, int]] | None = None,
        seed: int = 0,
        *,
        size: int = 1_000_000,
    ) -> None:
        stages = [(0, task.num_pairs, task.length)] if curriculum is None else list(curriculum)
        starts = [start for start, _, _ in stages]
        if starts[:1] != [0] or any(a >= b for a, b in itertools.pairwise(starts)):
            raise ValueError(f"curriculum starts at {starts}; give first indices that begin at 0 and rise.")
        if size < 0 or seed < 0:
            raise ValueError(f"size is {size} and seed is {seed}; give 0 or more for both.")
        self.task = task
        self.seed = seed
        self.size = size
        self._starts = np.array(starts)
        self._stages = [task.at_stage(num_pairs, length) for _, num_pairs, length in stages]

    def task_at(self, index: int) -> NeedleTask:
        """The task of the stage that sample `index` belongs to."""
        return self._stages[int(np.searchsorted(self._starts, index, side="right")) - 1]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`input_ids`, `labels` and `distance` of one sample, int64 [sequences, length] (see `collate`)."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """Several samples at once; a DataLoader calls this for each batch."""
        samples: list[dict[str, torch.Tensor]] = []
        for task, group in itertools.groupby(map(self._checked, indices), key=self.task_at):
            # A spawn key sets these apart from `task.sample` with the same seed.
            sequences = self.task.length // task.length
            seeds = [np.random.SeedSequence(self.seed, spawn_key=(index,)) for index in group]
            drawn = [np.random.default_rng(seed).random((sequences, task.draws)) for seed in seeds]
            batch = {name: rows.split(sequences) for name, rows in task._compose(np.concatenate(drawn)).items()}
            samples += [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
        return samples

    @staticmethod
    def collate(samples: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """One batch of all sequences of the samples, int64 [B, length]; the `data_collator` for the Trainer.

        Raises:
            RuntimeError: the samples belong to stages of different lengths. Let stages begin at a batch's first index.
        """
        return {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}

    def _checked(self, index: int) -> int:
        if not -self.size <= index < self.size:
            raise IndexError(f"sample {index} is out of range; this stream has {self.size} samples.")
        return index % self.size


def _choose(uniforms: np.ndarray, count: int) -> np.ndarray:
    """The first `count` entries of the random permutation that each row of numbers stands for, int64 [B, count]."""
    return np.argsort(uniforms, axis=1)[:, :count]
