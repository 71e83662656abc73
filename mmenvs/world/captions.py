"""Scenes told in words: a grammar of captions, its parser, and the scene F1 of any sequence of words.

The grammar, over the words of ``mmenvs.world.words``::

    caption   = statement ("and" statement)*
    statement = phrase [relation phrase]
    phrase    = ("a" | "an") [size] [colour] [texture] shape
    relation  = "left" "of" | "right" "of" | "above" | "below"

"an" stands before "orange" only. The canonical caption names every object once in reading order, with all
attributes; the texture is left out at difficulties that have only one texture. Arrays are as in
``mmenvs.world.scene``; captions are int64 word ids padded with 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit, uint64

from mmenvs.text import END, PAD
from mmenvs.world.kernels import inlined, kernel
from mmenvs.world.random import below, hash2
from mmenvs.world.scene import COLOURS, MAX_OBJECTS, SHAPES, SIZES, TEXTURES, Level, Scenes
from mmenvs.world.words import FIRST_COLOUR, FIRST_SHAPE, FIRST_SIZE, FIRST_TEXTURE, VOCABULARY

RELATIONS = ("left", "right", "above", "below")
_A, _AN, _AND, _OF = (VOCABULARY.id(word) for word in ("a", "an", "and", "of"))
_LEFT, _RIGHT, _ABOVE, _BELOW = (VOCABULARY.id(word) for word in RELATIONS)
_ORANGE = VOCABULARY.id("orange")
# First word and number of values of each attribute, in the order of scene.ATTRIBUTES.
_FIRST = (FIRST_SHAPE, FIRST_COLOUR, FIRST_SIZE, FIRST_TEXTURE)
_VALUES = (len(SHAPES), len(COLOURS), len(SIZES), len(TEXTURES))
_NAMES = (SHAPES, COLOURS, SIZES, TEXTURES)
# The order in which a phrase tells the attributes; its article comes first.
_TOLD = (2, 1, 3, 0)
# Scores of a caption, the columns that score_rows writes.
F1, PRECISION, RECALL, HALLUCINATION = range(4)


def caption_limit(level: Level) -> int:
    """Words that tell any scene of the level, relations and the end token included."""
    phrase = 5 if level.textures > 1 else 4
    # "and" or a relation before every object but the first; "left of" takes a word more.
    return level.objects_max * (phrase + 1) + level.objects_max // 2


# ---------------------------------------------------------------------------------------------------------
# Telling
# ---------------------------------------------------------------------------------------------------------


@inlined
def holds(scenes, i, a, relation, b):
    """Whether object ``a`` of scene ``i`` is left of, right of, above or below (0 to 3) object ``b``."""
    if relation == 0:
        return scenes.x[i, a] < scenes.x[i, b]
    if relation == 1:
        return scenes.x[i, a] > scenes.x[i, b]
    if relation == 2:
        return scenes.y[i, a] < scenes.y[i, b]
    return scenes.y[i, a] > scenes.y[i, b]


@inlined
def _tell_object(scenes, i, k, textures, out, at):
    """Write the phrase of one object from ``out[at]`` on; returns where it ends."""
    out[at] = _A
    at += 1
    for a in _TOLD:
        if a != 3 or textures > 1:
            out[at] = _FIRST[a] + scenes.attributes[i, k, a]
            at += 1
    return at


@kernel
def tell_rows(scenes: Scenes, rows, textures: int, out) -> None:
    """Write the canonical captions of scenes ``rows``, with the end token, into ``out[j]``."""
    for j in range(rows.size):
        i = rows[j]
        out[j] = PAD
        at = 0
        for k in range(scenes.count[i]):
            if k:
                out[j, at] = _AND
                at += 1
            at = _tell_object(scenes, i, k, textures, out[j], at)
        out[j, at] = END


@njit(cache=True, nogil=True)
def paraphrase_rows(scenes: Scenes, rows, textures: int, out) -> None:
    """Write several true captions of scenes ``rows``, with end tokens, into ``out[j]``: (m, R, L).

    The first is canonical. The others name the objects in random orders and join half of the pairs by the
    relation along the axis on which they are further apart. They depend on the scene alone.
    """
    order = np.empty(MAX_OBJECTS, np.int64)
    stream = np.empty(1, np.uint64)
    tell_rows(scenes, rows, textures, out[:, 0])
    for j in range(rows.size):
        i = rows[j]
        stream[0] = hash2(scenes.noise_key[i], uint64(0xCA97))
        n = scenes.count[i]
        for r in range(1, out.shape[1]):
            out[j, r] = PAD
            for k in range(n):
                place = below(stream, 0, k + 1)
                order[k] = order[place]
                order[place] = k
            at = 0
            joined = True  # whether the last phrase may take no relation to the next one
            for k in range(n):
                if k and not joined and below(stream, 0, 2):
                    dx = scenes.x[i, order[k - 1]] - scenes.x[i, order[k]]
                    dy = scenes.y[i, order[k - 1]] - scenes.y[i, order[k]]
                    if abs(dx) >= abs(dy):
                        out[j, r, at] = _LEFT if dx < 0 else _RIGHT
                        out[j, r, at + 1] = _OF
                        at += 2
                    else:
                        out[j, r, at] = _ABOVE if dy < 0 else _BELOW
                        at += 1
                    joined = True
                else:
                    if k:
                        out[j, r, at] = _AND
                        at += 1
                    joined = False
                at = _tell_object(scenes, i, order[k], textures, out[j, r], at)
            out[j, r, at] = END


def describe_scene(scenes: Scenes, i: int, textures: int) -> npt.NDArray[np.int64]:
    """The canonical caption of scene ``i``: word ids without the end token."""
    out = np.zeros((1, MAX_OBJECTS * 6 + 1), np.int64)
    tell_rows(scenes, np.array([i]), textures, out)
    return out[0, : int(np.argmax(out[0] == END))]


# ---------------------------------------------------------------------------------------------------------
# Parsing
# ---------------------------------------------------------------------------------------------------------


class Phrase(NamedTuple):
    """An object as a caption tells it: the words of its attributes, None where it doesn't say."""

    shape: str
    colour: str | None
    size: str | None
    texture: str | None


class Caption(NamedTuple):
    """What a caption says: objects in the order told, and relations between them by their places."""

    phrases: tuple[Phrase, ...]
    relations: tuple[tuple[int, str, int], ...]


def parse(ids: Sequence[int] | npt.NDArray[np.integer]) -> Caption:
    """Read a caption strictly.

    Args:
        ids: word ids; the end token and padding after it may follow.

    Raises:
        ValueError: if the words don't follow the grammar; says which word and what could stand there.
    """
    words: list[int] = []
    for i in ids:
        if int(i) in (END, PAD):
            break
        if not 0 <= int(i) < len(VOCABULARY):
            raise ValueError(f"word {len(words) + 1} of the caption: {int(i)} is no id of the vocabulary")
        words.append(int(i))
    phrases: list[Phrase] = []
    relations: list[tuple[int, str, int]] = []
    at = _parse_phrase(words, 0, phrases)
    related = False
    while at < len(words):
        if words[at] == _AND:
            at = _parse_phrase(words, at + 1, phrases)
            related = False
            continue
        name = VOCABULARY.words[words[at]]
        if related or name not in RELATIONS:
            raise _expected(words, at, "'and'" if related else "'and', a relation")
        at += 1
        if name in ("left", "right"):
            if at == len(words) or words[at] != _OF:
                raise _expected(words, at, "'of'", end=False)
            at += 1
        at = _parse_phrase(words, at, phrases)
        relations.append((len(phrases) - 2, name, len(phrases) - 1))
        related = True
    return Caption(tuple(phrases), tuple(relations))


def _parse_phrase(words: list[int], at: int, phrases: list[Phrase]) -> int:
    """Read the phrase that begins at ``words[at]``; returns where it ends."""
    if at == len(words) or words[at] not in (_A, _AN):
        raise _expected(words, at, "'a' or 'an'", end=False)
    article, at = at, at + 1
    told: list[str | None] = [None] * 4
    for a in _TOLD:
        value = words[at] - _FIRST[a] if at < len(words) else -1
        if 0 <= value < _VALUES[a]:
            told[a] = _NAMES[a][value]
            at += 1
    if told[0] is None:
        raise _expected(
            words, at, "the size, colour, texture or shape of an object, in this order", end=False
        )
    if (words[article + 1] == _ORANGE) != (words[article] == _AN):
        raise _expected(words, article, "'an' before 'orange' and 'a' elsewhere", end=False)
    phrases.append(Phrase(told[0], told[1], told[2], told[3]))
    return at


def _expected(words: list[int], at: int, what: str, end: bool = True) -> ValueError:
    found = repr(VOCABULARY.words[words[at]]) if at < len(words) else "the end"
    return ValueError(
        f"word {at + 1} of the caption: expected {what}{' or the end' if end else ''}, got {found}; "
        f"the caption is {VOCABULARY.decode(words)!r}"
    )


# ---------------------------------------------------------------------------------------------------------
# Scoring
# ---------------------------------------------------------------------------------------------------------


@kernel
def scan(ids, mentions, relations):
    """Read any sequence of words leniently.

    Words of attributes gather until a shape word completes a mention; of two words for one attribute the
    later one holds. A relation word connects the mention before it with the one after it. All other words
    are passed over. Reading stops at the end token or the padding.

    Args:
        ids: a caption (L,).
        mentions: gets the values (shape, colour, size, texture) of each mention, -1 where untold; (L, 4).
        relations: gets the relation (0 to 3) of each mention to the next one, -1 for none; (L,).

    Returns:
        Number of mentions, and number of facts told: every attribute word and every relation word is one.
    """
    n = 0
    told = 0
    mentions[:] = -1
    relations[:] = -1
    for at in range(ids.size):
        word = ids[at]
        if word == END or word == PAD:
            break
        for a in range(4):
            value = word - _FIRST[a]
            if 0 <= value < _VALUES[a]:
                mentions[n, a] = value
                told += 1
                if a == 0:
                    n += 1
        for r, relation in enumerate((_LEFT, _RIGHT, _ABOVE, _BELOW)):
            if word == relation:
                told += 1
                if n:
                    relations[n - 1] = r
    return n, told


@inlined
def _agrees(mention, scenes, i, k):
    """Whether nothing that the mention tells is wrong of object ``k``."""
    fits = True
    for a in range(4):
        fits &= (mention[a] < 0) | (mention[a] == scenes.attributes[i, k, a])
    return fits


@kernel
def _relation_right(scenes, i, first, relation, second):
    """Whether two different objects that fit the two mentions stand in the relation."""
    for a in range(scenes.count[i]):
        if _agrees(first, scenes, i, a):
            for b in range(scenes.count[i]):
                if a != b and _agrees(second, scenes, i, b) and holds(scenes, i, a, relation, b):
                    return True
    return False


@njit(cache=True, nogil=True)
def _match(mentions, n, scenes, i, facts, best):
    """Pair mentions with objects one to one so that the most facts are right.

    A mention stands for an object of its shape only. Returns the number of right facts, of those among the
    first ``facts`` attributes, and of paired mentions, all maximised in this order.
    """
    count = scenes.count[i]
    full = (1 << count) - 1
    # best[set] is the best total of pairing the mentions so far with objects of the set. The three numbers
    # of a total lie side by side in one integer, the most important one highest.
    best[: full + 1] = 0
    gains = np.empty(MAX_OBJECTS, np.int64)
    for m in range(n):
        for k in range(count):
            gains[k] = 0
            if mentions[m, 0] == scenes.attributes[i, k, 0]:
                gains[k] = 1
                for a in range(4):
                    if mentions[m, a] == scenes.attributes[i, k, a]:
                        gains[k] += (1 << 16) + ((1 << 8) if a < facts else 0)
        for objects in range(full, 0, -1):
            for k in range(count):
                if gains[k] and (objects >> k) & 1:
                    total = best[objects & ~(1 << k)] + gains[k]
                    if total > best[objects]:
                        best[objects] = total
    return best[full] >> 16, (best[full] >> 8) & 255, best[full] & 255


@njit(cache=True, nogil=True)
def score_rows(scenes: Scenes, rows, captions, textures: int, out) -> None:
    """Score captions against scenes.

    A fact is an attribute of an object, or a relation of two. Mentions are paired with objects of their
    shape one to one, so that the most told facts are right; what is told of an object that isn't there, or
    told twice, is wrong. A relation is right if it holds between two objects that fit its mentions.

    Precision is the right facts over the facts told. Recall is the right attributes over the attributes in
    the scene: a relation or, where there is only one texture, a texture needn't be told. A caption without
    a mention has F1 0 and no hallucination.

    Args:
        scenes, rows: scene ``rows[j]`` is what caption ``j`` is about.
        captions: int64 (m, L).
        textures: how many textures the level has.
        out: gets F1, precision, recall and the share of mentions that stand for no object; float64 (m, 4).
    """
    length = captions.shape[1]
    mentions = np.empty((length + 1, 4), np.int64)
    relations = np.empty(length + 1, np.int64)
    best = np.empty(1 << MAX_OBJECTS, np.int64)
    facts = 4 if textures > 1 else 3
    for j in range(rows.size):
        i = rows[j]
        out[j] = 0.0
        n, told = scan(captions[j], mentions, relations)
        if n == 0:
            continue
        right, attributes, paired = _match(mentions, n, scenes, i, facts, best)
        for m in range(n - 1):
            if relations[m] >= 0 and _relation_right(scenes, i, mentions[m], relations[m], mentions[m + 1]):
                right += 1
        precision = right / told
        recall = attributes / (facts * scenes.count[i])
        out[j, 1] = precision
        out[j, 2] = recall
        if attributes:
            out[j, 0] = 2.0 * precision * recall / (precision + recall)
        out[j, 3] = (n - paired) / n


def score(
    captions: npt.NDArray[np.integer], scenes: Scenes, textures: int = len(TEXTURES)
) -> npt.NDArray[np.float64]:
    """Scores of caption j against scene j; see :func:`score_rows`.

    Args:
        captions: word ids ``(m, L)``, padded with 0.
        scenes: m scenes.
        textures: how many textures the scenes' level has; with 1 the texture needn't be told.

    Returns:
        float64 ``(m, 4)`` in [0, 1]: scene F1, precision, recall, hallucination rate.
    """
    said = np.ascontiguousarray(captions, np.int64)
    if said.ndim != 2 or len(said) != len(scenes.count):
        raise ValueError(
            f"captions must have shape ({len(scenes.count)}, L) for as many scenes, got {said.shape}"
        )
    out = np.empty((len(said), 4))
    score_rows(scenes, np.arange(len(said)), said, textures, out)
    return out
