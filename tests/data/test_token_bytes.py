"""Bytes of tokens: their sums are those of the text, wherever it is cut."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from holdfast.data.text import byte_tokenizer, pack, train_tokenizer
from holdfast.data.token_bytes import TokenBytes
from holdfast.data.tokenizers import encode_documents

LETTERS = "abc ABC.,\n\té½ﬁ東京🙂\u00a0"


def texts(seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["a" + "".join(rng.choice(list(LETTERS), size)) for size in rng.integers(0, 60, 40)]


def metaspaces() -> PreTrainedTokenizerFast:
    """As Llama 2's: a blank before each document, ▁ for blanks, bytes for what is rare."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcABCTheky", "▁a", "é", "東"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    if kind == "bytes":
        return byte_tokenizer()
    return metaspaces() if kind == "metaspaces" else train_tokenizer(texts(1), 300, progress=False)


@pytest.mark.parametrize("kind", ["bytes", "trained", "metaspaces"])
def test_sums_are_the_bytes_of_the_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    sizes = TokenBytes.of(tokenizer)
    assert sizes is not None
    read = [*texts(), "an <|eos|> that is text"]
    documents = [ids for _, ids in encode_documents(((None, text) for text in read), tokenizer)]
    stream = torch.from_numpy(np.concatenate([[tokenizer.eos_token_id], *documents])).long()
    expected = sum(len(text.encode()) for text in read)
    assert int(sizes(stream).sum()) == expected
    assert sizes(stream)[stream == tokenizer.eos_token_id].sum() == 0
    batch = stream[: len(stream) // 3 * 3].view(3, -1)
    assert torch.equal(sizes(batch)[1], sizes(batch[1]))


def test_a_cut_inside_a_character_counts_its_bytes_on_either_side() -> None:
    tokenizer = train_tokenizer(["a key, a key"], 262, progress=False)  # which knows no character of several bytes
    sizes = TokenBytes.of(tokenizer)
    assert sizes is not None
    text = "".join(texts())
    ids = torch.tensor(tokenizer(text).input_ids)
    ends = sizes(ids).cumsum(0).tolist()
    whole, inside = text.encode(), 0
    alphabet = {character: byte for byte, character in enumerate(_alphabet())}
    for index, end in enumerate(ends):
        pieces = "".join(tokenizer.convert_ids_to_tokens(ids[: index + 1].tolist()))
        assert bytes(alphabet[character] for character in pieces) == whole[:end]
        inside += end < len(whole) and whole[end] & 0xC0 == 0x80
    assert inside > 10  # the text has such cuts


def _alphabet() -> list[str]:
    vocabulary = byte_tokenizer().get_vocab()
    return sorted((piece for piece, number in vocabulary.items() if number < 256), key=vocabulary.__getitem__)


def test_of_tokenizers_that_lose_text_nothing_is_known() -> None:
    words = {word: number for number, word in enumerate(["[UNK]", "[EOS]", "The", "key", "is"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert TokenBytes.of(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[EOS]")) is None
    lower = byte_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert TokenBytes.of(lower) is None
    composed = byte_tokenizer()
    composed.backend_tokenizer.normalizer = normalizers.NFC()
    assert TokenBytes.of(composed) is not None


def test_a_document_behind_another_has_no_blank_of_its_own() -> None:
    tokenizer = metaspaces()
    sizes = TokenBytes.of(tokenizer)
    assert sizes is not None
    assert sizes.prefix == 1
    documents = [tokenizer(text, add_special_tokens=False).input_ids for text in ("abc", "a b", "cc")]
    block = pack(documents, sum(map(len, documents)) + 3, eos_token_id=tokenizer.eos_token_id)[0]["input_ids"]
    assert int(sizes(block)[1:].sum()) == len("bc" + "a b" + "cc")
