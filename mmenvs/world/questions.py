"""Questions as programs over a scene: drawn with their scene, answered and put into words in compiled kernels.

The type, then the answer, then the arguments are drawn; a scene is made to fit them. So answers are
uniform within each type and the words of a question tell nothing of its answer.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mmenvs.world import scene as world
from mmenvs.world.kernels import inlined, kernel
from mmenvs.world.phrasings import LENGTH, say, value_of
from mmenvs.world.random import below
from mmenvs.world.scene import Level, Scenes, held_out, values_of
from mmenvs.world.words import NUMBERS

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
MAX_COUNT = 5  # questions never have a higher count as their answer


class Questions(NamedTuple):
    """A batch of n questions: programs, their answers, and their words."""

    type: npt.NDArray[np.int64]  # (n,) index into TYPES
    filters: npt.NDArray[np.int64]  # (n, 2) two descriptions, see value_of
    attribute: npt.NDArray[np.int64]  # (n,) the attribute asked for or compared
    option: npt.NDArray[np.int64]  # (n,) relation, superlative or comparison
    answer: npt.NDArray[np.int64]  # (n,) index into ANSWERS
    words: npt.NDArray[np.int64]  # (n, LENGTH)


def empty(n: int) -> Questions:
    """Room for ``n`` questions."""
    zeros = np.zeros(n, np.int64)
    return Questions(
        zeros,
        np.zeros((n, 2), np.int64),
        zeros.copy(),
        zeros.copy(),
        zeros.copy(),
        np.zeros((n, LENGTH), np.int64),
    )


@inlined
def _byte(a, value):
    return np.int64(value + 1) << (8 * a)


@inlined
def _matches(scenes, i, k, description):
    # No branch to guess wrongly: this is the innermost test of all.
    same = True
    for a in range(4):
        value = value_of(description, a)
        same &= (value < 0) | (scenes.attributes[i, k, a] == value)
    return same


@inlined
def _any(scenes, i, description):
    found = False
    for k in range(scenes.count[i]):
        found |= _matches(scenes, i, k, description)
    return found


@inlined
def _set(scenes, i, k, description):
    for a in range(4):
        value = value_of(description, a)
        if value >= 0:
            scenes.attributes[i, k, a] = value


@inlined
def _avoid(scenes, i, keep, description, streams, row, level):
    """Change one described attribute of every object but ``keep`` that matches."""
    for k in range(scenes.count[i]):
        if k != keep and _matches(scenes, i, k, description):
            _change(scenes, i, k, description, streams, row, level)


@inlined
def _change(scenes, i, k, description, streams, row, level):
    """Give object ``k`` another value of one of the described attributes, each as likely."""
    a = below(streams, row, 4)
    while value_of(description, a) < 0:
        a = below(streams, row, 4)
    n = values_of(level, a)
    scenes.attributes[i, k, a] = (value_of(description, a) + 1 + below(streams, row, n - 1)) % n


@inlined
def _describe(most, without, streams, row, level, split):
    """Draw a description by one to ``most`` attributes other than ``without``; held-out pairs stay unsaid."""
    while True:
        description = np.int64(0)
        left = 1 + below(streams, row, most)
        while left > 0:
            a = below(streams, row, 4)
            if a == without or value_of(description, a) >= 0 or (a == 3 and level.textures == 1):
                continue
            description |= _byte(a, below(streams, row, values_of(level, a)))
            left -= 1
        shape, colour = value_of(description, 0), value_of(description, 1)
        if split == 3 or shape < 0 or colour < 0 or not held_out(shape, colour):
            return description


@inlined
def _describe_two(attribute, streams, row, level):
    """Two descriptions by different values of one attribute."""
    n = values_of(level, attribute)
    first = below(streams, row, n)
    second = (first + 1 + below(streams, row, n - 1)) % n
    return _byte(attribute, first), _byte(attribute, second)


@inlined
def _related(scenes, i, j, k, relation, grid):
    """1 if object j stands in the relation to k, 0 if in the opposite one, -1 if in neither."""
    if relation < 2:
        d = np.int64(scenes.cell[i, k] % grid) - np.int64(scenes.cell[i, j] % grid)
    else:
        d = np.int64(scenes.cell[i, k] // grid) - np.int64(scenes.cell[i, j] // grid)
    if relation % 2 == 1:
        d = -d
    return 1 if d > 0 else (0 if d < 0 else -1)


@inlined
def _extreme(scenes, i, option, grid):
    """The one object at the extreme, -1 if several share it."""
    best, which = np.int64(-100), -1
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


@inlined
def _draw_answer(kind, streams, row, level):
    if kind == _COUNT:
        return _NUMBER + below(streams, row, min(level.objects_max, MAX_COUNT) + 1)
    if _QUERY <= kind < _RELATION:
        a = kind - _QUERY
        return _FIRST_ANSWER[a] + below(streams, row, values_of(level, a))
    if kind == _SUPERLATIVE:
        value = below(streams, row, level.shapes + values_of(level, 1))
        return _FIRST_ANSWER[0] + value if value < level.shapes else _FIRST_ANSWER[1] + value - level.shapes
    return below(streams, row, 2)


@inlined
def _place_counts(scenes, i, d1, d2, first, second, streams, row, level):
    """Make ``first`` random objects match ``d1``, ``second`` others ``d2`` (0: none), the rest neither."""
    left = scenes.count[i]
    for k in range(scenes.count[i]):
        u = below(streams, row, left)
        left -= 1
        if u < first:
            _set(scenes, i, k, d1)
            first -= 1
        elif u < first + second:
            _set(scenes, i, k, d2)
            second -= 1
        else:
            # Both describe by the same attribute, so one new value of it settles both.
            while _matches(scenes, i, k, d1) or (d2 > 0 and _matches(scenes, i, k, d2)):
                a = below(streams, row, 4)
                if value_of(d1, a) >= 0:
                    scenes.attributes[i, k, a] = below(streams, row, values_of(level, a))


@inlined
def _fit(scenes, i, questions, q, streams, row, level, split):
    """Draw the arguments of question ``q`` and bend scene ``i`` towards its answer; False if it can't be."""
    kind, wanted = questions.type[q], questions.answer[q]
    d1, d2 = np.int64(0), np.int64(0)
    n = scenes.count[i]
    if kind == _EXIST:
        d1 = _describe(2, -1, streams, row, level, split)
        if wanted == _YES:
            _set(scenes, i, below(streams, row, n), d1)
        else:
            _avoid(scenes, i, -1, d1, streams, row, level)
    elif kind == _COUNT:
        if wanted - _NUMBER > n:
            return False
        d1 = _describe(1, -1, streams, row, level, split)
        _place_counts(scenes, i, d1, d2, wanted - _NUMBER, 0, streams, row, level)
    elif kind < _RELATION:
        a = kind - _QUERY
        questions.attribute[q] = a
        d1 = _describe(2, a, streams, row, level, split)
        j = below(streams, row, n)
        _set(scenes, i, j, d1)
        scenes.attributes[i, j, a] = wanted - _FIRST_ANSWER[a]
        _avoid(scenes, i, j, d1, streams, row, level)
    elif kind == _RELATION or kind == _COMPARE:
        by = below(streams, row, 2)
        d1, d2 = _describe_two(by, streams, row, level)
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
            n_values = values_of(level, a)
            other = (scenes.attributes[i, j, a] + 1 + below(streams, row, n_values - 1)) % n_values
            scenes.attributes[i, k, a] = scenes.attributes[i, j, a] if wanted == _YES else other
        _place_counts(scenes, i, d1, d2, 0, 0, streams, row, level)
        _set(scenes, i, j, d1)
        _set(scenes, i, k, d2)
    elif kind == _COUNTS:
        d1, d2 = _describe_two(below(streams, row, 2), streams, row, level)
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
        _place_counts(scenes, i, d1, d2, first, second, streams, row, level)
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
        d1 = _describe(2, -1, streams, row, level, split)
        d2 = _describe(2, -1, streams, row, level, split)
        # Bits 0 and 1 of the pattern say whether d1 and d2 are in the scene.
        if (wanted == _YES) == (kind == _AND):
            pattern = 3 if kind == _AND else 0
        else:
            pattern = below(streams, row, 3) + (0 if kind == _AND else 1)
        if not pattern & 1:
            _avoid(scenes, i, -1, d1, streams, row, level)
        if not pattern & 2:
            _avoid(scenes, i, -1, d2, streams, row, level)
        first = below(streams, row, n)
        second = (first + 1 + below(streams, row, max(n - 1, 1))) % n
        if pattern & 1:
            _set(scenes, i, first, d1)
        if pattern & 2:
            _set(scenes, i, second, d2)
        # Where the descriptions overlap, placing or avoiding the one can undo the other.
        if _any(scenes, i, d1) != (pattern & 1 > 0) or _any(scenes, i, d2) != (pattern & 2 > 0):
            return False
    questions.filters[q, 0], questions.filters[q, 1] = d1, d2
    return True


@kernel
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
            if _fit(scenes, i, questions, i, streams, i, level, split) and world.in_split(scenes, i, split):
                break
        world.finish(scenes, i, streams, i, level)
        say(questions, i, streams, i)
