"""Questions in words: phrasings with slots, filled in by a compiled kernel."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mmenvs.world import scene as world
from mmenvs.world.kernels import inlined, kernel
from mmenvs.world.random import below
from mmenvs.world.words import FIRST_COLOUR, FIRST_PLURAL, FIRST_SHAPE, FIRST_SIZE, FIRST_TEXTURE, VOCABULARY

LENGTH = 20  # words of the longest question, rounded up
MAX_FILLER = 40
# Words that ask for nothing, wherever they stand.
_FILLER = np.array([VOCABULARY.id(word) for word in "it has have does picture in to of as . ,".split()])
_RELATIONS = ("left of", "right of", "above", "below")
_SUPERLATIVES = ("leftmost", "rightmost", "topmost", "bottommost", "largest", "smallest")
_COMPARISONS = ("more", "fewer", "same")

# Slots of the phrasings: {a 1} "a red circle", {the 1} "red circle", {all 1} "red circles".
_PHRASINGS = {
    "exist": ("is there {a1} ?", "do you see {a1} ?", "is {a1} in the picture ?", "are there any {all1} ?"),
    "count": (
        "how many {all1} are there ?",
        "how many {all1} do you see ?",
        "what is the number of {all1} ?",
    ),
    "query": ("what {attribute} is the {the1} ?", "what is the {attribute} of the {the1} ?"),
    "relation": (
        "is the {the1} {relation} the {the2} ?",
        "do you see the {the1} {relation} the {the2} ?",
        "is there {a1} {relation} the {the2} ?",
    ),
    "compare_attribute": (
        "is the {the1} the same {attribute} as the {the2} ?",
        "do the {the1} and the {the2} have the same {attribute} ?",
    ),
    "more": ("are there {comparison} {all1} than {all2} ?", "do you see {comparison} {all1} than {all2} ?"),
    "same": (
        "are there as many {all1} as {all2} ?",
        "is the number of {all1} the same as the number of {all2} ?",
    ),
    "superlative": (
        "what {attribute} is the {superlative} object ?",
        "what is the {attribute} of the {superlative} thing ?",
    ),
    "and": (
        "is there {a1} and {a2} ?",
        "do you see {a1} and {a2} ?",
        "are there any {all1} and any {all2} ?",
    ),
    "or": ("is there {a1} or {a2} ?", "do you see {a1} or {a2} ?", "are there any {all1} or any {all2} ?"),
}
_SLOTS = ("a1", "a2", "the1", "the2", "all1", "all2", "attribute", "relation", "comparison", "superlative")


def _compile_phrasings() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Templates as rows of word ids, slots as -1 - their index; and how many each phrasing group has."""
    groups = list(_PHRASINGS.values())
    table = np.zeros((len(groups), 4, LENGTH), np.int64)
    sizes = np.array([len(group) for group in groups], np.int64)
    for g, group in enumerate(groups):
        for p, phrasing in enumerate(group):
            for w, word in enumerate(phrasing.split()):
                table[g, p, w] = -1 - _SLOTS.index(word[1:-1]) if word[0] == "{" else VOCABULARY.id(word)
    return table, sizes


def _compile_phrases() -> npt.NDArray[np.int64]:
    """Word ids of the phrases that the last four slots take, ``(4, 6, 2)``; 0 where there is no second word."""
    table = np.zeros((4, 6, 2), np.int64)
    for s, phrases in enumerate((world.ATTRIBUTES, _RELATIONS, _COMPARISONS, _SUPERLATIVES)):
        for p, phrase in enumerate(phrases):
            for w, word in enumerate(phrase.split()):
                table[s, p, w] = VOCABULARY.id(word)
    return table


_TEMPLATES, _TEMPLATE_COUNTS = _compile_phrasings()
# Which phrasing group a type takes; compare_counts takes the next one for "same".
_GROUP = np.array([0, 1, 2, 2, 2, 2, 3, 4, 5, 7, 8, 9], np.int64)
_MORE = list(_PHRASINGS).index("more")
_PHRASES = _compile_phrases()
_FIRST_WORD = np.array([FIRST_SHAPE, FIRST_COLOUR, FIRST_SIZE, FIRST_TEXTURE], np.int64)
_A, _AN, _ORANGE = VOCABULARY.id("a"), VOCABULARY.id("an"), VOCABULARY.id("orange")
_OBJECT, _THING = VOCABULARY.id("object"), VOCABULARY.id("thing")
_OBJECTS, _THINGS = VOCABULARY.id("objects"), VOCABULARY.id("things")


@inlined
def value_of(description, a):
    """The described value of attribute ``a``, -1 if it isn't described.

    A description is one integer with a byte for each attribute, value + 1: slices of arrays would cost
    these kernels more than all they compute.
    """
    return ((description >> (8 * a)) & 255) - 1


@inlined
def _say_object(words, q, w, description, noun, plural):
    """Write size, colour, texture and noun of a description; the place after it."""
    for a in (2, 1, 3):
        if value_of(description, a) >= 0:
            words[q, w] = _FIRST_WORD[a] + value_of(description, a)
            w += 1
    if value_of(description, 0) >= 0:
        words[q, w] = (FIRST_PLURAL if plural else FIRST_SHAPE) + value_of(description, 0)
    elif plural:
        words[q, w] = _OBJECTS if noun == 0 else _THINGS
    else:
        words[q, w] = _OBJECT if noun == 0 else _THING
    return w + 1


@inlined
def say(questions, q, streams, row):
    """Put question ``q`` into words, with a phrasing drawn from the stream."""
    words = questions.words
    group = _GROUP[questions.type[q]]
    if group == _MORE and questions.option[q] == 2:
        group += 1
    phrasing = below(streams, row, _TEMPLATE_COUNTS[group])
    noun = below(streams, row, 2)
    w = 0
    for t in range(LENGTH):
        code = _TEMPLATES[group, phrasing, t]
        slot = -1 - code
        if code > 0:
            words[q, w] = code
            w += 1
        elif code == 0:
            break
        elif slot < 2:
            start = w
            w = _say_object(words, q, w + 1, questions.filters[q, slot % 2], noun, False)
            first = words[q, start + 1]
            words[q, start] = _AN if first == _ORANGE or first == _OBJECT else _A
        elif slot < 6:
            w = _say_object(words, q, w, questions.filters[q, slot % 2], noun, slot >= 4)
        else:
            table = slot - 6
            index = questions.attribute[q] if table == 0 else questions.option[q]
            for p in range(2):
                if _PHRASES[table, index, p] > 0:
                    words[q, w] = _PHRASES[table, index, p]
                    w += 1
    for t in range(w, LENGTH):
        words[q, t] = 0


@kernel
def fill_rows(words: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], streams) -> None:
    """Draw ``words[i]``, words that tell nothing, for each of ``rows``."""
    for j in range(rows.size):
        for k in range(words.shape[1]):
            words[rows[j], k] = _FILLER[below(streams, rows[j], _FILLER.size)]


@kernel
def write_rows(filler, words, rows: npt.NDArray[np.int64], out: npt.NDArray[np.int64]) -> None:
    """Write the filler and the question of each of ``rows`` into ``out[rows]``, ``(n, filler + LENGTH)``, unchecked."""
    for i in rows:
        for k in range(filler.shape[1]):
            out[i, k] = filler[i, k]
        for k in range(LENGTH):
            out[i, filler.shape[1] + k] = words[i, k]
