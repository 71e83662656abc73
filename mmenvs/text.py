"""Closed vocabularies and their tokenizer: a sentence is a row of int64 word ids, 0 is padding."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

PAD, UNKNOWN, START, END = 0, 1, 2, 3
SPECIAL = ("<pad>", "<unk>", "<start>", "<end>")
_WORD = re.compile(r"<[a-z]+>|[a-z0-9]+(?:'[a-z]+)?|[?.,]")


def tokenize(sentence: str) -> list[str]:
    """The words of a sentence in lower case; ``?``, ``.`` and ``,`` are words, other signs fall away."""
    return _WORD.findall(sentence.lower())


class Vocabulary:
    """A closed list of words; the id of a word is its place in the list.

    Args:
        words: distinct words in the order of their ids, without the four special ones, which take 0 to 3.

    Raises:
        ValueError: if a word occurs twice.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self.words: tuple[str, ...] = (*SPECIAL, *words)
        self._ids = {word: i for i, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            twice = sorted({word for word in self.words if self.words.count(word) > 1})
            raise ValueError(f"words must be distinct, these occur twice: {twice}")

    def __len__(self) -> int:
        return len(self.words)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.words == other.words

    def __hash__(self) -> int:
        return hash(self.words)

    def __contains__(self, word: str) -> bool:
        return word in self._ids

    def id(self, word: str) -> int:
        """The id of ``word``; ``KeyError`` if the vocabulary lacks it."""
        return self._ids[word]

    def encode(self, sentence: str, length: int) -> npt.NDArray[np.int64]:
        """Tokenize a sentence.

        Args:
            sentence: any text; case is ignored, unknown words become ``<unk>``.
            length: number of ids returned; shorter sentences are padded with 0, longer ones cut.

        Returns:
            Array of shape ``(length,)`` and dtype int64.
        """
        ids = [self._ids.get(word, UNKNOWN) for word in tokenize(sentence)][:length]
        out = np.zeros(length, np.int64)
        out[: len(ids)] = ids
        return out

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """The words of ``ids`` joined by blanks; padding, start and end are left out."""
        return " ".join(self.words[int(i)] for i in ids if int(i) not in (PAD, START, END))
