"""Real text: read it, make tokens of it, pack the tokens into blocks of one length.

Three ways to the same blocks. Small text is held in memory:

    texts = load_text("books/", split="train")
    tokenizer = load_tokenizer("byte")
    blocks = PackedText.from_texts(texts, tokenizer, length=512)
    blocks[0]["input_ids"]  # int64 [512]

Text of any size is streamed (`TextStream`), or tokenized once into files that are then mapped (`prepare`,
`open_prepared`).
"""

from holdfast.data.packing import PackedText, collate_isolated, pack
from holdfast.data.prepared import is_prepared, open_prepared, prepare
from holdfast.data.sources import TextSource, load_text
from holdfast.data.stream import TextStream
from holdfast.data.tokenizers import byte_tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "PackedText",
    "TextSource",
    "TextStream",
    "byte_tokenizer",
    "collate_isolated",
    "is_prepared",
    "load_text",
    "load_tokenizer",
    "open_prepared",
    "pack",
    "prepare",
    "train_tokenizer",
]
