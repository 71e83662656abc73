"""Scorers of one answer or one caption. A reward is the metric that is reported.

Answers are strings. Captions are rows of word ids, int64 ``(m, L)``, padded with 0; the references of a
batch of captions are ``(m, R, L)``, references that a caption lacks are rows of zeros at the end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mmenvs import ngrams
from mmenvs.text import END
from mmenvs.world import captions as world_captions
from mmenvs.world.scene import Scenes

# ---------------------------------------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------------------------------------

_DIGITS = {
    word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_FINAL_PERIOD = re.compile(r"\.(?!\d)")
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
    why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
""".split()


def _misspellings() -> dict[str, str]:
    """Every contraction with one apostrophe left out -> the contraction."""
    table = {
        word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS for i, mark in enumerate(word) if mark == "'"
    }
    # The official table has this one pair the wrong way round; scores only compare when it is kept.
    return table | {"somebody'd": "somebodyd"}


_SPELLING = _misspellings()


def normalize_answer(answer: str) -> str:
    """An answer as the official VQA v2 evaluation compares it.

    Lower case; punctuation removed, or made a blank where it joins two words; periods kept within numbers
    only; number words up to ten as digits; articles left out; apostrophes of contractions put back.

    References:
        Antol et al. 2015, "VQA: Visual Question Answering"; Goyal et al. 2017 for v2; rules at
        https://visualqa.org/evaluation.html.
    """
    text = re.sub(r"[\n\t]", " ", answer).strip()
    number = _DIGIT_COMMA_DIGIT.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        loose = number or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if loose else " ")
    out = _FINAL_PERIOD.sub("", out)
    words = (_DIGITS.get(word, word) for word in out.lower().split())
    return " ".join(_SPELLING.get(word, word) for word in words if word not in _ARTICLES)


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1.0 if the normalised answer is one of the normalised references, else 0.0."""
    _check_references(references)
    return float(normalize_answer(answer) in map(normalize_answer, references))


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """The official soft accuracy of VQA v2.

    Each person's answer is left out in turn (10 subsets of 9), the score against the others is
    min(agreeing / 3, 1), and the subsets are averaged. Answers are always compared normalised; the official
    script compares them as written where all references are the same, which can only score lower.

    Args:
        answer: the answer given.
        references: the answers of people, ten in VQA v2, at least two.
    """
    _check_references(references, least=2)
    given = normalize_answer(answer)
    agreeing = sum(normalize_answer(reference) == given for reference in references)
    return float(soft_accuracy(np.array([agreeing]), len(references))[0])


def soft_accuracy(agreeing: npt.NDArray[np.integer], people: int = 10) -> npt.NDArray[np.float64]:
    """The soft accuracy of VQA v2 where ``agreeing`` out of ``people`` gave the same answer.

    Args:
        agreeing: any shape, from 0 to ``people``.
        people: number of references, at least 2.

    Returns:
        float64 of the same shape, in [0, 1].
    """
    n = np.asarray(agreeing, np.float64)
    if people < 2 or (n.size and (n.min() < 0 or n.max() > people)):
        raise ValueError(
            f"agreeing must be from 0 to people, and people at least 2; got people={people}, {agreeing}"
        )
    # A subset that leaves out an agreeing person has one agreeing answer fewer.
    without_one = np.minimum((n - 1) / 3, 1) * n
    return (without_one + np.minimum(n / 3, 1) * (people - n)) / people


def _check_references(references: Sequence[str], least: int = 1) -> None:
    if isinstance(references, str):
        raise TypeError(f"references must be a sequence of strings, got the string {references!r}")
    if len(references) < least:
        raise ValueError(f"references must hold at least {least} answers, got {len(references)}")


# ---------------------------------------------------------------------------------------------------------
# Captions against reference captions
# ---------------------------------------------------------------------------------------------------------


class DocumentFrequencies(NamedTuple):
    """In how many documents each n-gram occurs; a document is all reference captions of one picture."""

    keys: npt.NDArray[np.uint64]  # (N,) n-grams, ascending
    counts: npt.NDArray[np.int64]  # (N,) documents that contain them
    documents: int

    @classmethod
    def from_references(cls, references: npt.NDArray[np.integer]) -> DocumentFrequencies:
        """Count over a corpus ``(documents, R, L)`` of packed references (see :func:`pack_references`)."""
        packed = _captions("references", references, 3)
        room = ngrams.ORDER * int(np.count_nonzero(packed))
        found = np.empty(room, np.uint64)
        keys, counts = np.unique(found[: ngrams.document_ngrams(packed, found)], return_counts=True)
        return cls(keys, counts.astype(np.int64), len(packed))


def _captions(name: str, value: npt.NDArray[np.integer], ndim: int) -> npt.NDArray[np.int64]:
    array = np.asarray(value)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integer word ids, got dtype {array.dtype}")
    if array.ndim != ndim or 0 in array.shape:
        raise ValueError(f"{name} must be a non-empty array of {ndim} axes, got shape {array.shape}")
    if array.min() < 0 or array.max() >= 1 << ngrams.ID_BITS:
        raise ValueError(f"{name} must hold word ids from 0 to {(1 << ngrams.ID_BITS) - 1}")
    return np.ascontiguousarray(array, np.int64)


def _pair(
    captions: npt.NDArray[np.integer], references: npt.NDArray[np.integer]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Captions and references, checked, and room for the scores."""
    said, told = _captions("captions", captions, 2), _captions("references", references, 3)
    if len(said) != len(told):
        raise ValueError(f"captions and references must be as many, got {len(said)} and {len(told)}")
    if not told[:, 0, 0].all():
        raise ValueError(f"every caption needs a reference, row {int(np.argmin(told[:, 0, 0]))} has none")
    return said, told, np.empty(len(said), np.float64)


def pack_references(
    references: Sequence[Sequence[Sequence[int]]], *, end: bool = True
) -> npt.NDArray[np.int32]:
    """Reference captions as one array.

    Args:
        references: for each picture the word ids of its captions, at least one, without the end token.
        end: close every caption with the end token, so that CIDEr-D counts it as a word.

    Returns:
        int32 ``(pictures, most captions, longest caption)``, padded with 0.
    """
    if not references or not all(references):
        raise ValueError("references must hold at least one picture, and every picture at least one caption")
    most = max(map(len, references))
    longest = max(len(ids) for captions in references for ids in captions) + end
    packed = np.zeros((len(references), most, longest), np.int32)
    for i, captions in enumerate(references):
        for r, ids in enumerate(captions):
            packed[i, r, : len(ids)] = ids
            if end:
                packed[i, r, len(ids)] = END
    return packed


def bleu(captions: npt.NDArray[np.integer], references: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """BLEU-4 of each caption, with the brevity penalty against the reference of the closest length.

    The end token and what follows it don't count. Equals ``pycocoevalcap``'s sentence scores.

    Args:
        captions: word ids ``(m, L)``.
        references: word ids ``(m, R, L)``.

    Returns:
        float64 ``(m,)`` in [0, 1].

    References:
        Papineni et al. 2002, "BLEU: a method for automatic evaluation of machine translation".
    """
    said, told, out = _pair(captions, references)
    ngrams.bleu_rows(said, told, out)
    return out


def rouge_l(
    captions: npt.NDArray[np.integer], references: npt.NDArray[np.integer]
) -> npt.NDArray[np.float64]:
    """ROUGE-L of each caption: F-measure (beta 1.2) of the longest common subsequence.

    Precision and recall are the best over the references. The end token doesn't count. Arguments and
    result as for :func:`bleu`.

    References:
        Lin 2004, "ROUGE: a package for automatic evaluation of summaries".
    """
    said, told, out = _pair(captions, references)
    ngrams.rouge_rows(said, told, out)
    return out


def repetition_rate(captions: npt.NDArray[np.integer], order: int = 4) -> npt.NDArray[np.float64]:
    """Share of each caption's n-grams that occurred before in it (seq-rep-n); 0 for shorter captions.

    Args:
        captions: word ids ``(m, L)``; the end token doesn't count.
        order: n, from 1 to 4.

    Returns:
        float64 ``(m,)`` in [0, 1).

    References:
        Welleck et al. 2020, "Neural text generation with unlikelihood training".
    """
    if order not in range(1, ngrams.ORDER + 1):
        raise ValueError(f"order must be from 1 to {ngrams.ORDER}, got {order!r}")
    said = _captions("captions", captions, 2)
    out = np.empty(len(said), np.float64)
    ngrams.repetition_rows(said, order, out)
    return out


class CiderD:
    """CIDEr-D, the consensus of a caption with its references, weighted by how telling each n-gram is.

    Every id that isn't padding counts as a word, the end token too where captions and references have it.
    Rewards should have it: a reward that leaves it out is raised, by captions that stop in the middle of
    a phrase (the literature has up to 4.1 points on the scale of 100). Equals ``pycocoevalcap``'s ``Cider`` with the same document frequencies.

    Args:
        document_frequencies: from a corpus of references.
        sigma: width of the penalty on the difference in length, in words.

    References:
        Vedantam et al. 2015, "CIDEr: consensus-based image description evaluation"; Hu et al. 2023,
        "A request for clarity over the end of sequence token in the self-critical sequence training",
        arXiv 2305.12254.
    """

    def __init__(self, document_frequencies: DocumentFrequencies, sigma: float = 6.0) -> None:
        if not sigma > 0:
            raise ValueError(f"sigma must be positive, got {sigma!r}")
        self.document_frequencies = document_frequencies
        self.sigma = float(sigma)

    def __call__(
        self, captions: npt.NDArray[np.integer], references: npt.NDArray[np.integer]
    ) -> npt.NDArray[np.float64]:
        """Score ``(m, L)`` captions against ``(m, R, L)`` references: float64 ``(m,)`` in [0, 10]."""
        said, told, out = _pair(captions, references)
        keys, counts, documents = self.document_frequencies
        ngrams.cider_rows(said, told, keys, counts, math.log(documents), self.sigma, out)
        return out


# ---------------------------------------------------------------------------------------------------------
# Captions against the scene itself
# ---------------------------------------------------------------------------------------------------------


def scene_f1(captions: npt.NDArray[np.integer], scenes: Scenes, textures: int) -> npt.NDArray[np.float64]:
    """Scene F1 of caption j against scene j of the procedural world, as ``world.captions.score_rows`` has it.

    Args:
        captions: word ids ``(m, L)`` of the world's vocabulary.
        scenes: m scenes.
        textures: how many textures the scenes' level has.

    Returns:
        float64 ``(m,)`` in [0, 1].

    References:
        After the F-measure over facts of SPICE: Anderson et al. 2016, "SPICE: semantic propositional image
        caption evaluation".
    """
    return world_captions.score(captions, scenes, textures)[:, world_captions.F1]


def hallucination_rate(captions: npt.NDArray[np.integer], scenes: Scenes) -> npt.NDArray[np.float64]:
    """Share of the objects that caption j mentions and scene j lacks, float64 ``(m,)`` in [0, 1].

    An object that is mentioned twice is lacking the second time. A caption that mentions none has 0.

    References:
        After CHAIR: Rohrbach et al. 2018, "Object hallucination in image captioning".
    """
    return world_captions.score(captions, scenes)[:, world_captions.HALLUCINATION]
