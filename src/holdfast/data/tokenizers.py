"""Tokenizers that lose nothing: bytes, or byte-level BPE trained on one's own text; and encoding with them."""

import copy
import hashlib
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from holdfast.data.progress import track
from holdfast.data.sources import count_bad_rows
from holdfast.files import UnreadableError, read_json
from holdfast.published import PUBLISHED_TYPES

__all__ = ["bare", "byte_tokenizer", "encode_documents", "fingerprint", "load_tokenizer", "train_tokenizer"]

SPECIAL_TOKENS = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
CHARACTERS_AT_ONCE = 1 << 18  # tokenized per call: enough to keep every core busy, little memory

T = TypeVar("T")


def load_tokenizer(name_or_directory: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer called `byte`, one saved in a directory, or one of the hub.

    Raises:
        UnreadableError: naming the file that is damaged.
        ValueError: there is none of this name, or it is not of the fast kind.
    """
    name = str(name_or_directory)
    if name == "byte":
        return byte_tokenizer()
    import holdfast.configuration  # noqa: F401  # registers what AutoTokenizer finds beside the tokenizer of a model

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, config=_published_config(name))
    except Exception as error:  # of transformers, the hub, or tokenizers, which raises bare ones
        raise _why_not(Path(name), error) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"tokenizer {name} is not a fast tokenizer; give one that has a tokenizer.json.")
    return tokenizer


def _published_config(name: str) -> PreTrainedConfig | None:
    """What a published config.json says, whose type no Auto class knows: it would be read as one of no type at all.

    None where `AutoTokenizer` reads the configuration beside the tokenizer itself, or there is none in a directory; the
    hub is not asked twice.
    """
    if not Path(name).is_dir():
        return None
    try:
        values, _ = PreTrainedConfig.get_config_dict(name)
    except (OSError, ValueError):
        return None
    return PreTrainedConfig.from_dict(values) if values.get("model_type") in PUBLISHED_TYPES else None


def _why_not(directory: Path, error: Exception) -> ValueError:
    """What to say of a tokenizer that could not be loaded; the errors of the libraries name no file."""
    what = f"cannot load tokenizer {directory}"
    if not directory.exists():
        return ValueError(f"{what}: there is no such directory, and as a name on the hub: {error}")
    if directory.is_dir() and not (directory / "tokenizer.json").is_file():
        return ValueError(f"{what}: it holds no tokenizer.json.")
    for path in sorted(directory.glob("*.json")):
        try:
            read_json(path)
        except UnreadableError as fault:
            return fault
    try:
        Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception as fault:
        return UnreadableError(f"{directory / 'tokenizer.json'} cannot be read as a tokenizer ({fault}).")
    return UnreadableError(f"{what}: {error}")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte, its id the byte; 256 pad, 257 bos, 258 eos. Needs no download and loses nothing."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _finish(tokenizer)


def train_tokenizer(
    texts: Iterable[Any], vocab_size: int, *, characters: int | None = None, progress: bool = True
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; save it with `save_pretrained`. Rows that are no text are skipped.

    Ids: 0 pad, 1 bos, 2 eos, then the 256 bytes, then the merges. Loses nothing, whatever the text.

    Args:
        texts: documents to learn from.
        vocab_size: number of ids, special tokens included; fewer when the texts have no more to merge.
        characters: read the first documents, until they have so many; None: all.
        progress: show a progress bar when standard error is a terminal.

    Raises:
        ValueError: `vocab_size` has no room for the bytes and the special tokens, or there is no text.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}; the bytes and special tokens need {smallest} or more.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress and sys.stderr.isatty(),
    )
    rows = track(_first(count_bad_rows(texts), characters), "reading", progress=progress)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{getattr(texts, 'name', 'the corpus')} holds no text to train a tokenizer on.")
    tokenizer.train_from_iterator(itertools.chain([first], rows), trainer)
    return _finish(tokenizer)


def encode_documents(
    texts: Iterable[tuple[T, str]], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[T, np.ndarray]]:
    """The token ids of each text, int32 [n + 1], the last of them the end token; what stands beside a text stays there.

    A text never yields special tokens: one that contains `<|eos|>` is encoded character by character there. Texts are
    taken a quarter of a million characters ahead.

    Raises:
        ValueError: the tokenizer has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token; set tokenizer.eos_token.")
    backend = bare(tokenizer)
    backend.encode_special_tokens = True  # as text, that is: data must not be able to write control tokens
    end = [tokenizer.eos_token_id]
    for batch in _batches(texts):
        encodings = backend.encode_batch_fast([text for _, text in batch], add_special_tokens=False)
        for (beside, _), encoding in zip(batch, encodings, strict=True):
            if encoding.ids:
                yield beside, np.array(encoding.ids + end, dtype=np.int32)


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of everything that decides which tokens a text becomes."""
    return hashlib.sha256(bare(tokenizer).to_str().encode()).hexdigest()


def _first(texts: Iterable[str], characters: int | None) -> Iterator[str]:
    """Texts until there are about as many characters."""
    read = 0
    for text in texts:
        yield text
        read += len(text)
        if characters is not None and read >= characters:
            return


def bare(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy without what the last call of the tokenizer has set, such as padding."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    return backend


def _batches(texts: Iterable[tuple[T, str]]) -> Iterator[list[tuple[T, str]]]:
    batch: list[tuple[T, str]] = []
    size = 0
    for beside, text in texts:
        batch.append((beside, text))
        size += len(text)
        if size >= CHARACTERS_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _finish(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))  # here, so that their ids follow this order
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        padding_side="left",  # a batch of prompts must end in tokens, not in pads, to be continued
        **SPECIAL_TOKENS,
    )


def _byte_characters() -> list[str]:
    """The character that byte-level tokenizers write for each byte: itself if visible, else one from 256 on."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    return [chr(byte if byte in visible else next(hidden)) for byte in range(256)]
