"""Readers of real data sets, which take the world's place: ``gym.make(id, source=reader)``."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mmenvs.datasets.coco import CocoCaptions
from mmenvs.datasets.images import ImageStore
from mmenvs.datasets.reader import PARTS
from mmenvs.datasets.vqav2 import VQAv2
from mmenvs.rewards import DocumentFrequencies
from mmenvs.text import Vocabulary

__all__ = ["CaptionSource", "CocoCaptions", "ImageStore", "QuestionSource", "VQAv2", "open_source"]

Indices = npt.NDArray[np.int64]


class PictureSource(Protocol):
    """What every source offers. Items are known by their index, 0 to N - 1."""

    def prepare(self, image_size: int) -> None:
        """Get ready to give pictures of this size; called when an environment is made."""
        ...

    def select(self, split: str) -> Indices:
        """Indices of the items of a split, int64, at least one; called after ``prepare``."""
        ...

    def pictures(self, indices: Indices, size: int, out: npt.NDArray[np.uint8], rows: Indices) -> None:
        """Copy the pictures of ``indices`` (m,) to ``out[rows]``, uint8 ``(n, size, size, 3)``."""
        ...

    def text(self, index: int) -> dict[str, Any]:
        """The item in words, for people: at least ``image``, and ``question`` and ``answer`` of a question."""
        ...


class QuestionSource(PictureSource, Protocol):
    """What ``MMRL/VQA-v0`` takes as its ``source``: N questions."""

    answers: tuple[str, ...]  # what each action says
    vocabulary: Vocabulary
    question_length: int
    types: tuple[str, ...]  # of questions
    questions: npt.NDArray[np.int64]  # (N, question_length) word ids
    type_ids: npt.NDArray[np.int64]  # (N,) index into types
    references: npt.NDArray[np.int64]  # (N,) the answer that scores best, -1 if none scores

    def score(self, indices: Indices, actions: Indices) -> npt.NDArray[np.float64]:
        """The reward in [0, 1] of each of m actions for its question, ``(m,)``."""
        ...


class CaptionSource(PictureSource, Protocol):
    """What ``MMRL/Captioning-v0`` takes as its ``source``: N pictures."""

    vocabulary: Vocabulary
    caption_length: int  # most words of a caption, its end token included
    references: npt.NDArray[np.integer]  # (N, R, L) word ids, see mmenvs.rewards.pack_references
    document_frequencies: DocumentFrequencies


_READERS: dict[str, tuple[str, type[VQAv2] | type[CocoCaptions]]] = {
    "vqav2": ("MMRL/VQA-v0", VQAv2),
    "coco": ("MMRL/Captioning-v0", CocoCaptions),
}


def open_source(text: str, id: str) -> VQAv2 | CocoCaptions:
    """The reader that a text such as ``"vqav2:/data/vqa"`` or ``"coco:/data/coco:val2014"`` names.

    Args:
        text: ``NAME:FOLDER`` or ``NAME:FOLDER:PART``; NAME is ``vqav2`` or ``coco``, FOLDER holds the
            official files, PART is ``train2014`` (default) or ``val2014``.
        id: the environment it is for.

    Raises:
        ValueError: if the text is of another form, or names a reader for another environment.
        FileNotFoundError: that lists the official files that FOLDER lacks.
    """
    name, _, place = text.partition(":")
    if name not in _READERS or not place:
        raise ValueError(f"source must be vqav2:FOLDER or coco:FOLDER, got {text!r}")
    wanted, reader = _READERS[name]
    if id.partition(":")[2] != wanted and id != wanted:
        raise ValueError(f"source {name!r} is for {wanted}, not for {id}")
    folder, colon, part = place.rpartition(":")
    if colon and part in PARTS:
        return reader.from_root(folder, part)
    return reader.from_root(place)
