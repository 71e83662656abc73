"""Questions as programs over a scene: drawn with their scene, answered and put into words in compiled kernels.

The type, then the answer, then the arguments are drawn; a scene is made to fit them. So answers are
uniform within each type and the words of a question tell nothing of its answer.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from mmenvs.world import scene as world
from mmenvs.world.random import below
from mmenvs.world.scene import N_VALUES, Level, Scenes, held_out
from mmenvs.world.words import (
    FIRST_COLOUR,
    FIRST_NUMBER,
    FIRST_PLURAL,
    FIRST_SHAPE,
    FIRST_SIZE,
    FIRST_TEXTURE,
    NUMBERS,
    VOCABULARY,
)

# A level asks the first ``Level.question_types`` of these.
TYPES = (
    "exist",
    "count",
    "query_shape",
    "query_colour",
    "query_size",
    "query_texture",
    "relation",
    "compare_attribute",
    "compare_counts",
    "superlative",
    "and",
    "or",
)
_EXIST, _COUNT, _QUERY, _RELATION, _COMPARE, _COUNTS, _SUPERLATIVE, _AND, _OR = 0, 1, 2, 6, 7, 8, 9, 10, 11
ANSWERS = ("yes", "no", *NUMBERS, *world.SHAPES, *world.COLOURS, *world.SIZES, *world.TEXTURES)
_YES, _NO, _NUMBER = 0, 1, 2
# The answer "value v of attribute a" is _FIRST_ANSWER[a] + v.
_FIRST_ANSWER = (13, 21, 29, 31)
_N_VALUES = N_VALUES
MAX_COUNT = 5  # questions never have a higher count as their answer
LENGTH = 20  # words of the longest question, rounded up
_RELATIONS = ("left of", "right of", "above", "below")
_SUPERLATIVES = ("leftmost", "rightmost", "topmost", "bottommost", "largest", "smallest")
_COMPARISONS = ("more", "fewer", "same")

# Slots of the phrasings: {a 1} "a red circle", {the 1} "red circle", {all 1} "red circles".
_PHRASINGS = {
    "exist": ("is there {a1} ?", "do you see {a1} ?", "is {a1} in the picture ?", "are there any {all1} ?"),
    "count": ("how many {all1} are there ?", "how many {all1} do you see ?", "what is the number of {all1} ?"),
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
    "same": ("are there as many {all1} as {all2} ?", "is the number of {all1} the same as the number of {all2} ?"),
    "superlative": ("what {attribute} is the {superlative} object ?", "what is the {attribute} of the {superlative} thing ?"),
    "and": ("is there {a1} and {a2} ?", "do you see {a1} and {a2} ?", "are there any {all1} and any {all2} ?"),
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


def _ids(phrases: tuple[str, ...]) -> npt.NDArray[np.int64]:
    """Word ids of phrases of one or two words, ``(n, 2)``, 0 where there is no second word."""
    return np.array([([VOCABULARY.id(word) for word in phrase.split()] + [0])[:2] for phrase in phrases], np.int64)


_TEMPLATES, _TEMPLATE_COUNTS = _compile_phrasings()
# Which phrasing group a type takes; compare_counts takes the next one for "same".
_GROUP = np.array([0, 1, 2, 2, 2, 2, 3, 4, 5, 7, 8, 9], np.int64)
_RELATION_IDS, _SUPERLATIVE_IDS, _COMPARISON_IDS = _ids(_RELATIONS), _ids(_SUPERLATIVES), _ids(_COMPARISONS)
_ATTRIBUTE_IDS = _ids(world.ATTRIBUTES)
_FIRST_WORD = np.array([FIRST_SHAPE, FIRST_COLOUR, FIRST_SIZE, FIRST_TEXTURE], np.int64)
_A, _AN, _ORANGE = VOCABULARY.id("a"), VOCABULARY.id("an"), VOCABULARY.id("orange")
_OBJECT, _THING = VOCABULARY.id("object"), VOCABULARY.id("thing")
_OBJECTS, _THINGS = VOCABULARY.id("objects"), VOCABULARY.id("things")


class Questions(NamedTuple):
    """A batch of n questions: programs, their answers, and their words."""

    type: npt.NDArray[np.int64]  # (n,) index into TYPES
    filters: npt.NDArray[np.int64]  # (n, 2, 4) two descriptions: a value of each attribute or -1
    attribute: npt.NDArray[np.int64]  # (n,) the attribute asked for or compared
    option: npt.NDArray[np.int64]  # (n,) relation, superlative or comparison
    answer: npt.NDArray[np.int64]  # (n,) index into ANSWERS
    words: npt.NDArray[np.int64]  # (n, LENGTH)


def empty(n: int) -> Questions:
    """Room for ``n`` questions."""
    zeros = np.zeros(n, np.int64)
    return Questions(
        zeros, np.full((n, 2, 4), -1, np.int64), zeros.copy(), zeros.copy(), zeros.copy(), np.zeros((n, LENGTH), np.int64)
    )


@njit(cache=True, nogil=True)
def _matches(scenes, i, k, description):
    for a in range(4):
        if description[a] >= 0 and scenes.attributes[i, k, a] != description[a]:
            return False
    return True


@njit(cache=True, nogil=True)
def _find(scenes, i, description):
    """Number of objects that match, and the last of them."""
    count, last = 0, -1
    for k in range(scenes.count[i]):
        if _matches(scenes, i, k, description):
            count += 1
            last = k
    return count, last


@njit(cache=True, nogil=True)
def _set(scenes, i, k, description):
    for a in range(4):
        if description[a] >= 0:
            scenes.attributes[i, k, a] = description[a]


@njit(cache=True, nogil=True)
def _avoid(scenes, i, k, description, streams, row):
    """Change one described attribute of object ``k`` so that it no longer matches."""
    while _matches(scenes, i, k, description):
        a = below(streams, row, 4)
        if description[a] >= 0:
            # Textures fewer than three only occur at levels that never describe by texture.
            scenes.attributes[i, k, a] = below(streams, row, _N_VALUES[a])


@njit(cache=True, nogil=True)
def _avoid_all(scenes, i, description, keep, streams, row):
    for k in range(scenes.count[i]):
        if k != keep:
            _avoid(scenes, i, k, description, streams, row)


@njit(cache=True, nogil=True)
def _describe(description, most, without, streams, row, level, split):
    """Draw a description by one to ``most`` attributes other than ``without``; held-out pairs stay unsaid."""
    while True:
        description[:] = -1
        left = 1 + below(streams, row, most)
        while left > 0:
            a = below(streams, row, 4)
            if a == without or description[a] >= 0 or (a == 3 and level.textures == 1):
                continue
            description[a] = below(streams, row, level.textures if a == 3 else _N_VALUES[a])
            left -= 1
        if split == 3 or description[0] < 0 or description[1] < 0 or not held_out(description[0], description[1]):
            return


@njit(cache=True, nogil=True)
def _describe_two(filters, attribute, streams, row):
    """Two descriptions by different values of one attribute."""
    filters[:] = -1
    first = below(streams, row, _N_VALUES[attribute])
    second = (first + 1 + below(streams, row, _N_VALUES[attribute] - 1)) % _N_VALUES[attribute]
    filters[0, attribute] = first
    filters[1, attribute] = second


@njit(cache=True, nogil=True)
def _related(scenes, i, j, k, relation, grid):
    """1 if object j stands in the relation to k, 0 if in the opposite one, -1 if in neither."""
    if relation < 2:
        d = np.int64(scenes.cell[i, k] % grid) - np.int64(scenes.cell[i, j] % grid)
    else:
        d = np.int64(scenes.cell[i, k] // grid) - np.int64(scenes.cell[i, j] // grid)
    if relation % 2 == 1:
        d = -d
    return 1 if d > 0 else (0 if d < 0 else -1)


@njit(cache=True, nogil=True)
def _extreme(scenes, i, option, grid):
    """The one object at the extreme, -1 if several share it."""
    best, which = -100, -1
    for k in range(scenes.count[i]):
        if option < 2:
            value = np.int64(scenes.cell[i, k] % grid)
        elif option < 4:
            value = np.int64(scenes.cell[i, k] // grid)
        else:
            value = -np.int64(scenes.attributes[i, k, 2])
        if option % 2 == 0:
            value = -value
        if value > best:
            best, which = value, k
        elif value == best:
            which = -1
    return which


@njit(cache=True, nogil=True)
def answer(scenes: Scenes, i: int, questions: Questions, q: int, grid: int) -> int:
    """The answer of question ``q`` about scene ``i`` as an index into ANSWERS, -1 if it has none."""
    kind, attribute, option = questions.type[q], questions.attribute[q], questions.option[q]
    filters = questions.filters[q]
    n1, j = _find(scenes, i, filters[0])
    n2, k = _find(scenes, i, filters[1])
    if kind == _EXIST:
        return _YES if n1 > 0 else _NO
    if kind == _COUNT:
        return _NUMBER + n1
    if kind < _RELATION:
        return _FIRST_ANSWER[attribute] + scenes.attributes[i, j, attribute] if n1 == 1 else -1
    if kind == _RELATION or kind == _COMPARE:
        if n1 != 1 or n2 != 1 or j == k:
            return -1
        if kind == _COMPARE:
            return _YES if scenes.attributes[i, j, attribute] == scenes.attributes[i, k, attribute] else _NO
        truth = _related(scenes, i, j, k, option, grid)
        return -1 if truth < 0 else (_YES if truth == 1 else _NO)
    if kind == _COUNTS:
        if option == 0:
            return _YES if n1 > n2 else _NO
        if option == 1:
            return _YES if n1 < n2 else _NO
        return _YES if n1 == n2 else _NO
    if kind == _SUPERLATIVE:
        which = _extreme(scenes, i, option, grid)
        return _FIRST_ANSWER[attribute] + scenes.attributes[i, which, attribute] if which >= 0 else -1
    if kind == _AND:
        return _YES if n1 > 0 and n2 > 0 else _NO
    return _YES if n1 > 0 or n2 > 0 else _NO


@njit(cache=True, nogil=True)
def _draw_answer(kind, streams, row, level):
    if kind == _COUNT:
        return _NUMBER + below(streams, row, min(level.objects_max, MAX_COUNT) + 1)
    if _QUERY <= kind < _RELATION:
        a = kind - _QUERY
        return _FIRST_ANSWER[a] + below(streams, row, level.textures if a == 3 else _N_VALUES[a])
    if kind == _SUPERLATIVE:
        return _FIRST_ANSWER[0] + below(streams, row, _N_VALUES[0] + _N_VALUES[1])
    return below(streams, row, 2)


@njit(cache=True, nogil=True)
def _place_counts(scenes, i, filters, first, second, streams, row):
    """Make ``first`` random objects match the first description, ``second`` others the second, the rest none."""
    left = scenes.count[i]
    for k in range(scenes.count[i]):
        u = below(streams, row, left)
        left -= 1
        if u < first:
            _set(scenes, i, k, filters[0])
            first -= 1
        elif u < first + second:
            _set(scenes, i, k, filters[1])
            second -= 1
        else:
            while _matches(scenes, i, k, filters[0]) or (filters[1].max() >= 0 and _matches(scenes, i, k, filters[1])):
                for t in range(2):
                    if filters[t].max() >= 0:
                        _avoid(scenes, i, k, filters[t], streams, row)


@njit(cache=True, nogil=True)
def _fit(scenes, i, questions, q, streams, row, level, split):
    """Draw the arguments of question ``q`` and bend scene ``i`` towards its answer; False if it can't be."""
    kind, wanted = questions.type[q], questions.answer[q]
    filters = questions.filters[q]
    filters[:] = -1
    n = scenes.count[i]
    if kind == _EXIST:
        _describe(filters[0], 2, -1, streams, row, level, split)
        if wanted == _YES:
            _set(scenes, i, below(streams, row, n), filters[0])
        else:
            _avoid_all(scenes, i, filters[0], -1, streams, row)
    elif kind == _COUNT:
        if wanted - _NUMBER > n:
            return False
        _describe(filters[0], 1, -1, streams, row, level, split)
        _place_counts(scenes, i, filters, wanted - _NUMBER, 0, streams, row)
    elif kind < _RELATION:
        a = kind - _QUERY
        questions.attribute[q] = a
        _describe(filters[0], 2, a, streams, row, level, split)
        j = below(streams, row, n)
        _set(scenes, i, j, filters[0])
        scenes.attributes[i, j, a] = wanted - _FIRST_ANSWER[a]
        _avoid_all(scenes, i, filters[0], j, streams, row)
    elif kind == _RELATION or kind == _COMPARE:
        by = below(streams, row, 2)
        _describe_two(filters, by, streams, row)
        j = below(streams, row, n)
        k = (j + 1 + below(streams, row, n - 1)) % n
        if kind == _RELATION:
            questions.option[q] = below(streams, row, 4)
            truth = _related(scenes, i, j, k, questions.option[q], level.grid)
            if truth < 0:
                return False
            if (truth == 1) != (wanted == _YES):
                j, k = k, j
        else:
            a = below(streams, row, 3 if level.textures == 1 else 4)
            if a == by:
                return False
            questions.attribute[q] = a
            other = (scenes.attributes[i, j, a] + 1 + below(streams, row, _N_VALUES[a] - 1)) % _N_VALUES[a]
            scenes.attributes[i, k, a] = scenes.attributes[i, j, a] if wanted == _YES else other
        for t in range(2):
            _avoid_all(scenes, i, filters[t], -1, streams, row)
        _set(scenes, i, j, filters[0])
        _set(scenes, i, k, filters[1])
    elif kind == _COUNTS:
        _describe_two(filters, below(streams, row, 2), streams, row)
        questions.option[q] = below(streams, row, 3)
        option = questions.option[q]
        most = min(n, MAX_COUNT)
        # The comparison stays as drawn while counts are: else its word would hint at the answer.
        while True:
            first = below(streams, row, most + 1)
            second = below(streams, row, min(most, n - first) + 1)
            truth = first > second if option == 0 else (first < second if option == 1 else first == second)
            if truth == (wanted == _YES):
                break
        _place_counts(scenes, i, filters, first, second, streams, row)
    elif kind == _SUPERLATIVE:
        a = 0 if wanted < _FIRST_ANSWER[1] else 1
        questions.attribute[q] = a
        option = below(streams, row, 6)
        questions.option[q] = option
        if option >= 4:
            which = below(streams, row, n)
            for k in range(n):
                scenes.attributes[i, k, 2] = (5 - option) if k == which else (option - 4)
        else:
            which = _extreme(scenes, i, option, level.grid)
            if which < 0:
                return False
        scenes.attributes[i, which, a] = wanted - _FIRST_ANSWER[a]
    else:
        for t in range(2):
            _describe(filters[t], 2, -1, streams, row, level, split)
        # Bit t of the pattern says whether description t is in the scene.
        if (wanted == _YES) == (kind == _AND):
            pattern = 3 if kind == _AND else 0
        else:
            pattern = below(streams, row, 3) + (0 if kind == _AND else 1)
        for t in range(2):
            if not (pattern >> t) & 1:
                _avoid_all(scenes, i, filters[t], -1, streams, row)
        first = below(streams, row, n)
        second = (first + 1 + below(streams, row, max(n - 1, 1))) % n
        if pattern & 1:
            _set(scenes, i, first, filters[0])
        if pattern & 2:
            _set(scenes, i, second, filters[1])
    return True


@njit(cache=True, nogil=True)
def _say_object(words, w, description, noun, plural):
    """Write size, colour, texture and noun of a description; the place after it."""
    for a in (2, 1, 3):
        if description[a] >= 0:
            words[w] = _FIRST_WORD[a] + description[a]
            w += 1
    if description[0] >= 0:
        words[w] = (FIRST_PLURAL if plural else FIRST_SHAPE) + description[0]
    elif plural:
        words[w] = _OBJECTS if noun == 0 else _THINGS
    else:
        words[w] = _OBJECT if noun == 0 else _THING
    return w + 1


@njit(cache=True, nogil=True)
def _say_pair(words, w, pair):
    words[w] = pair[0]
    if pair[1] > 0:
        words[w + 1] = pair[1]
        return w + 2
    return w + 1


@njit(cache=True, nogil=True)
def _say(questions, q, streams, row):
    """Put question ``q`` into words, with a phrasing drawn from the stream."""
    words = questions.words[q]
    words[:] = 0
    group = _GROUP[questions.type[q]]
    if questions.type[q] == _COUNTS and questions.option[q] == 2:
        group += 1
    template = _TEMPLATES[group, below(streams, row, _TEMPLATE_COUNTS[group])]
    noun = below(streams, row, 2)
    w = 0
    for code in template:
        if code > 0:
            words[w] = code
            w += 1
        elif code == 0:
            break
        else:
            slot = -1 - code
            if slot < 6:
                if slot < 2:
                    start = w
                    w = _say_object(words, w + 1, questions.filters[q, slot % 2], noun, False)
                    first = words[start + 1]
                    words[start] = _AN if first == _ORANGE or first == _OBJECT else _A
                else:
                    w = _say_object(words, w, questions.filters[q, slot % 2], noun, slot >= 4)
            elif slot == 6:
                w = _say_pair(words, w, _ATTRIBUTE_IDS[questions.attribute[q]])
            elif slot == 7:
                w = _say_pair(words, w, _RELATION_IDS[questions.option[q]])
            elif slot == 8:
                w = _say_pair(words, w, _COMPARISON_IDS[questions.option[q]])
            else:
                w = _say_pair(words, w, _SUPERLATIVE_IDS[questions.option[q]])


@njit(cache=True, nogil=True)
def ask_rows(scenes: Scenes, questions: Questions, rows, streams, level: Level, split: int) -> None:
    """Draw a scene of the split and a question about it for each of ``rows``."""
    for j in range(rows.size):
        i = rows[j]
        kind = below(streams, i, level.question_types)
        wanted = _draw_answer(kind, streams, i, level)
        questions.type[i] = kind
        questions.answer[i] = wanted
        least = max(level.objects_min, wanted - _NUMBER) if kind == _COUNT else level.objects_min
        while True:
            scenes.count[i] = least + below(streams, i, level.objects_max - least + 1)
            world.sample_layout(scenes, i, streams, i, level)
            world.sample_objects(scenes, i, streams, i, level, split)
            # An argument that a type leaves unused must not keep the value of the row's last question.
            questions.attribute[i] = 0
            questions.option[i] = 0
            if (
                _fit(scenes, i, questions, i, streams, i, level, split)
                and answer(scenes, i, questions, i, level.grid) == wanted
                and world.in_split(scenes, i, split)
            ):
                break
        world.finish(scenes, i, streams, i, level)
        _say(questions, i, streams, i)


