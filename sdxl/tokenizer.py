"""CLIP byte-pair encoding: prompts to the 77 token ids that the text encoders read.

Design:

- The text is cleaned as the original CLIP does (ftfy, HTML entities twice, white space,
  lower case) before it is split; 1 % of real prompts change ids without it.
- The byte-pair merges run in Rust (`tokenizers`); vocabulary and pattern are the
  original's, so that ids are equal to its ids for any text, special tokens inside the
  text included.
- One encoder is shared by every `Tokenizer`: they differ by the padding id only.
- Nothing is cut in silence: the count before the cut is returned beside the ids.

Sources: Radford et al. 2021 (CLIP), its released tokenizer; Sennrich et al. 2016 (BPE).
"""

from __future__ import annotations

import gzip
import html
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from importlib import resources
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import tokenizers

CONTEXT_LENGTH = 77
START_ID = 49_406
END_ID = 49_407
SPECIALS = {"<|startoftext|>": START_ID, "<|endoftext|>": END_ID}

_MERGES_FILE = "clip_bpe_merges.txt.gz"
_MERGES = 48_894
# The original ignores case after lower-casing, and that shows twice: ſ (long s) matches
# 's, and U+0345, whose upper case is a letter, is no letter and no symbol: it vanishes.
_PATTERN = (
    r"(?i:<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d)"
    r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"
)
# The same pattern for lower-case printable ASCII, where it needs no tables.
_PLAIN_PIECES = re.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[a-z]+|[0-9]|[^ a-z0-9]+"
)
_CHUNK = 1024


class Tokenizer:
    """Turn prompts into rows of 77 ids, padded with `pad_id` (49407 or 0 in SDXL)."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode `texts` to ids (N, 77) int32 and counts (N,) int32.

        A count includes the start and the end token and is taken before the cut: above
        77 it says that the prompt was truncated. A row that is cut still ends with the
        end token.
        """
        ids = np.full((len(texts), CONTEXT_LENGTH), self.pad_id, dtype=np.int32)
        counts = np.zeros(len(texts), dtype=np.int32)

        for row, tokens in enumerate(encode(texts)):
            kept = tokens[: CONTEXT_LENGTH - 2]
            ids[row, : len(kept) + 2] = [START_ID, *kept, END_ID]
            counts[row] = len(tokens) + 2
        return ids, counts


def encode(texts: Iterable[str]) -> Iterator[list[int]]:
    """Yield the ids of each text, without start, end, padding or cut.

    Raises TypeError when given a single string, which would be read letter by letter.
    """
    if isinstance(texts, str):
        raise TypeError("expected a sequence of strings, got one string")
    model = _model()
    stream = iter(texts)
    while chunk := list(islice(stream, _CHUNK)):
        cleaned = [clean(text) for text in chunk]
        encodings = model.encode_batch_fast(cleaned, add_special_tokens=False)
        for text, encoding in zip(cleaned, encodings, strict=True):
            yield _with_specials(text) if "text|>" in text else encoding.ids


def count_tokens(texts: Iterable[str]) -> np.ndarray:
    """Count each text's tokens, start and end included, before any cut: (N,) int32.

    Made for millions of prompts: words of plain text are counted once and remembered.
    """
    if isinstance(texts, str):
        raise TypeError("expected strings, got one string")
    return np.fromiter(map(_count, texts), dtype=np.int32)


def _count(text: str) -> int:
    if _is_plain(text):
        pieces = _PLAIN_PIECES.findall(text.lower())
        return 2 + sum(map(_piece_lengths.__getitem__, pieces))
    return 2 + len(next(encode([text])))


class _PieceLengths(dict[str, int]):
    """Tokens in a piece of plain text, asked of the encoder when first seen."""

    def __missing__(self, piece: str) -> int:
        if len(self) >= 100_000:
            self.clear()
        length = 1 if piece in SPECIALS else len(_model().encode(piece).ids)
        if len(piece) <= 32:  # longer ones hardly return and would fill the memory
            self[piece] = length
        return length


_piece_lengths = _PieceLengths()


def clean(text: str) -> str:
    """Repair, unescape, collapse white space and lower-case, as CLIP was trained.

    Lone surrogates become U+FFFD. Printable ASCII without `&` has nothing to repair, so
    it takes a path a hundred times shorter to the same result.
    """
    if not _is_plain(text):
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable() and "&" not in text


@lru_cache(maxsize=1)
def _model() -> tokenizers.Tokenizer:
    """Build the shared byte-pair encoder."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    merges = read_merges()
    vocabulary = vocabulary_of(merges)
    model = Tokenizer(
        models.BPE(vocabulary, merges, end_of_word_suffix="</w>", fuse_unk=False)
    )
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return model


def _with_specials(text: str) -> list[int]:
    """Encode cleaned text in which special tokens may stand as words of their own."""
    model = _model()
    ids: list[int] = []
    begin = 0
    for piece, (first, last) in model.pre_tokenizer.pre_tokenize_str(text):
        if (special := SPECIALS.get(piece)) is not None:
            ids += model.encode(text[begin:first], add_special_tokens=False).ids
            ids.append(special)
            begin = last
    return ids + model.encode(text[begin:], add_special_tokens=False).ids


def read_merges() -> list[tuple[str, str]]:
    packed = resources.files(__package__).joinpath(_MERGES_FILE).read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").split("\n", _MERGES + 1)
    pairs = (line.split() for line in lines[1 : _MERGES + 1])
    return [(left, right) for left, right in pairs]


def vocabulary_of(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Number the tokens: 256 bytes, the same at a word's end, merges, two specials."""
    symbols = _byte_symbols()
    tokens = symbols + [symbol + "</w>" for symbol in symbols]
    tokens += [left + right for left, right in merges]
    return {token: index for index, token in enumerate([*tokens, *SPECIALS])}


def _byte_symbols() -> list[str]:
    """Name each byte by a visible character: its own, else one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = 256 - len(visible)
    return [chr(code) for code in (*visible, *range(0x100, 0x100 + hidden))]
