"""What is refused at once: contexts that a model was not told of, tokens that it does not know, unfit tokenizers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["check_length", "check_prompts", "check_texts", "check_tokenizer", "check_tokens"]


def check_length(config: Any, tokens: int, *, beyond: bool = False, name: str = "the model") -> None:
    """Refuse more tokens than the model was trained on at a time, unless that is what is to be measured.

    Args:
        config: of the model; `max_position_embeddings` says its length.
        tokens: the longest context, answers included.
        beyond: allow it.
        name: of the model, for the error.

    Raises:
        ValueError: naming both lengths.
    """
    told = config.max_position_embeddings
    if tokens > told and not beyond:
        raise ValueError(
            f"{tokens:,} tokens are more than the {told:,} that {name} was trained on (max_position_embeddings); "
            "give less, or --beyond to measure what it does beyond."
        )


def check_tokenizer(tokenizer: Any, config: Any, *, name: str = "the model") -> None:
    """Refuse a tokenizer that cannot write plain English text in tokens that the model knows, or that puts a token
    behind every text: a prompt would end in it, and the model continue what has ended.

    For evaluations that ask in English. One with more tokens than the model may do: see `check_texts`.

    Args:
        tokenizer: of the model.
        config: of the model.
        name: of the model, for the error.

    Raises:
        ValueError: saying what does not fit.
    """
    written = tokenizer("The key is 7.").input_ids
    if not written or (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in written):
        raise ValueError(f"the tokenizer of {name} cannot write 'The key is 7.'; give one that knows English text.")
    check_tokens(written, tokenizer, config, name=name)
    check_prompts(tokenizer, name=name)


def check_tokens(ids: Sequence[int], tokenizer: Any, config: Any, *, name: str = "the model") -> None:
    """Refuse a text with a token that the model has no embedding for. A tokenizer with more tokens than the model is
    no harm to texts that have none of them.

    Args:
        ids: of the text.
        tokenizer: that made them.
        config: of the model.
        name: of the model, for the error.

    Raises:
        ValueError: naming the first such token.
    """
    unknown = next((token for token in ids if token >= config.vocab_size), None)
    if unknown is not None:
        raise ValueError(
            f"{tokenizer.decode([unknown])!r} is token {unknown:,} of the tokenizer, and {name} knows tokens up to "
            f"{config.vocab_size - 1:,}; give the model its own tokenizer."
        )


def check_texts(texts: Iterable[Sequence[int]], tokenizer: Any, config: Any, *, name: str | None = None) -> None:
    """`check_tokens` of all texts, before the first is read: what comes later would be lost after hours.

    Args:
        texts: ids; made only where the tokenizer has tokens that the model does not know.
        tokenizer: that made them.
        config: of the model.
        name: of the model, for the error; None: where it was loaded from.

    Raises:
        ValueError: naming the first such token.
    """
    if len(tokenizer) > config.vocab_size:
        for ids in texts:
            check_tokens(ids, tokenizer, config, name=name or config.name_or_path or "the model")


def check_prompts(tokenizer: Any, *, name: str = "the model") -> None:
    """Refuse a tokenizer that puts a token behind every text: a prompt would end in it, and the model continue what has
    ended. One before the text, such as that of its beginning, is welcome.

    Args:
        tokenizer: of the model.
        name: of the model, for the error.

    Raises:
        ValueError: naming the token.
    """
    written = tokenizer("The key is 7.").input_ids
    plain = tokenizer("The key is 7.", add_special_tokens=False).input_ids
    if written[len(written) - len(plain) :] != plain:
        raise ValueError(
            f"the tokenizer of {name} puts {tokenizer.decode(written[-1:])!r} behind every text, so that no prompt "
            "could be continued; give one whose post-processor (in tokenizer.json) puts nothing there."
        )
