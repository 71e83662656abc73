"""Questions against an evaluator that only reads their English and looks at the scene."""

import re
from collections import Counter, defaultdict

import gymnasium as gym
import numpy as np
import pytest

from mmenvs.world import questions, scene
from mmenvs.world.phrasings import _FILLER
from mmenvs.world.words import PLURALS, VOCABULARY

VQA = "MMRL/VQA-v0"
SINGULAR = {
    **dict(zip(PLURALS, scene.SHAPES, strict=True)),
    "objects": "object",
    "things": "object",
    "thing": "object",
}
KINDS = {
    "size": scene.SIZES,
    "colour": scene.COLOURS,
    "texture": scene.TEXTURES,
    "shape": scene.SHAPES,
}
PHRASE = r"((?:(?:{}) )*(?:{}))".format(
    "|".join(scene.SIZES + scene.COLOURS + scene.TEXTURES),
    "|".join((*scene.SHAPES, *PLURALS, "objects?", "things?")),
)
ONE = rf"(?:an? |any )?{PHRASE}"
NUMBER = dict(enumerate("zero one two three four five six seven eight nine ten".split()))


def asked(words):
    """The objects meant by a phrase such as "large red things", as a predicate."""

    def meant(thing):
        for word in words.split():
            word = SINGULAR.get(word, word)
            if word != "object" and word not in (thing[k] for k in KINDS):
                return False
        return True

    return meant


def evaluate(question, things):
    """Answer an English question about a list of objects (attributes, x, y); None if it has no one answer."""

    def find(words):
        return [t for t in things if asked(words)(t)]

    def only(words):
        found = find(words)
        assert len(found) == 1, f"{words!r} means {len(found)} objects"
        return found[0]

    q = question.removesuffix(" ?")
    yes = {True: "yes", False: "no"}
    if m := re.fullmatch(rf"is the number of {PHRASE} the same as the number of {PHRASE}", q):
        return yes[len(find(m[1])) == len(find(m[2]))]
    if m := re.fullmatch(rf"are there as many {PHRASE} as {PHRASE}", q):
        return yes[len(find(m[1])) == len(find(m[2]))]
    if m := re.fullmatch(rf"(?:are there|do you see) (more|fewer) {PHRASE} than {PHRASE}", q):
        a, b = len(find(m[2])), len(find(m[3]))
        return yes[a > b if m[1] == "more" else a < b]
    if m := re.fullmatch(
        rf"(?:how many {PHRASE} (?:are there|do you see)|what is the number of {PHRASE})", q
    ):
        return NUMBER[len(find(m[1] or m[2]))]
    if m := re.fullmatch(
        rf"(?:is|do) the {PHRASE} (?:the same (\w+) as|and) the {PHRASE}(?: have the same (\w+))?", q
    ):
        attribute = m[2] or m[4]
        return yes[only(m[1])[attribute] == only(m[3])[attribute]]
    relation = "(left of|right of|above|below)"
    if m := re.fullmatch(rf"(?:is the|do you see the|is there an?) {PHRASE} {relation} the {PHRASE}", q):
        a, b = only(m[1]), only(m[3])
        d = (b["x"] - a["x"]) if m[2] in ("left of", "right of") else (b["y"] - a["y"])
        assert abs(d) > 0.05, "too close to call"
        return yes[(d > 0) == (m[2] in ("left of", "above"))]
    extreme = "(leftmost|rightmost|topmost|bottommost|largest|smallest)"
    if m := re.fullmatch(rf"what (?:is the )?(\w+) (?:is|of) the {extreme} (?:object|thing)", q):
        if m[2] in ("largest", "smallest"):
            found = [t for t in things if t["size"] == {"largest": "large", "smallest": "small"}[m[2]]]
            assert len(found) == 1
            return found[0][m[1]]
        axis, sign = {
            "leftmost": ("x", 1),
            "rightmost": ("x", -1),
            "topmost": ("y", 1),
            "bottommost": ("y", -1),
        }[m[2]]
        first, second = sorted(things, key=lambda t: sign * t[axis])[:2]
        assert abs(first[axis] - second[axis]) > 0.05, "too close to call"
        return first[m[1]]
    if m := re.fullmatch(rf"what (?:is the )?(\w+) (?:is|of) the {PHRASE}", q):
        return only(m[2])[m[1]]
    if m := re.fullmatch(rf"(?:is there|do you see|are there) {ONE} (and|or) {ONE}", q):
        a, b = bool(find(m[1])), bool(find(m[3]))
        return yes[a and b if m[2] == "and" else a or b]
    if m := re.fullmatch(rf"(?:is there|do you see|are there) {ONE}|is {ONE} in the picture", q):
        return yes[bool(find(m[1] or m[2]))]
    raise AssertionError(f"cannot read {question!r}")


def things_of(scenes, i):
    things = scene.words(scenes, i)
    for k, thing in enumerate(things):
        thing["x"], thing["y"] = float(scenes.x[i, k]), float(scenes.y[i, k])
    return things


@pytest.mark.parametrize("difficulty", range(4))
def test_20_000_questions_answered_alike(difficulty):
    envs = gym.make_vec(VQA, num_envs=1250, difficulty=difficulty, image_size=32)
    task = envs.unwrapped.task
    checked = 0
    for split in scene.SPLITS:
        envs = gym.make_vec(VQA, num_envs=1250, difficulty=difficulty, image_size=32, split=split)
        envs.reset(seed=5)
        task = envs.unwrapped.task
        for i in range(1250):
            question = VOCABULARY.decode(task.questions.words[i])
            assert "<unk>" not in question
            assert (
                evaluate(question, things_of(task.scenes, i)) == questions.ANSWERS[task.questions.answer[i]]
            ), question
            checked += 1
    assert checked == 5000


def drawn(difficulty, n=20_000, split="train"):
    envs = gym.make_vec(VQA, num_envs=n, difficulty=difficulty, image_size=32, split=split)
    envs.reset(seed=2)
    return envs.unwrapped.task


@pytest.mark.parametrize("difficulty", range(4))
@pytest.mark.parametrize("split", scene.SPLITS)
def test_answers_are_balanced_within_each_type(difficulty, split):
    task = drawn(difficulty, 12_000, split)
    kinds, answers = task.questions.type, task.questions.answer
    level = scene.DIFFICULTIES[difficulty]
    assert set(kinds.tolist()) == set(range(level.question_types))
    for kind in range(level.question_types):
        counts = Counter(answers[kinds == kind].tolist())
        share, total = 1 / len(counts), sum(counts.values())
        tolerance = 4 * np.sqrt(share * (1 - share) / total)
        assert all(abs(c / total - share) < tolerance for c in counts.values()), (
            questions.TYPES[kind],
            counts,
        )


@pytest.mark.parametrize("difficulty", range(4))
def test_words_tell_nothing_of_the_answer(difficulty):
    """The best guess from any one word and the type, learned on half and tried on the other half."""
    task = drawn(difficulty, 40_000)
    kinds, answers, words = task.questions.type, task.questions.answer, task.questions.words
    for kind in range(scene.DIFFICULTIES[difficulty].question_types):
        rows = np.flatnonzero(kinds == kind)
        half = len(rows) // 2
        chance = 1 / len(set(answers[rows].tolist()))
        for word in range(len(VOCABULARY)):
            has = (words[rows] == word).any(1)
            if has[:half].sum() < 200:
                continue
            guess = Counter(answers[rows[:half]][has[:half]].tolist()).most_common(1)[0][0]
            right = (answers[rows[half:]][has[half:]] == guess).mean()
            assert right < chance + 0.05 + 4 * np.sqrt(chance * (1 - chance) / has[half:].sum()), (
                questions.TYPES[kind],
                VOCABULARY.words[word],
            )


def test_every_phrasing_occurs_and_fits():
    seen = defaultdict(set)
    task = drawn(3, 40_000)
    for i in range(40_000):
        text = VOCABULARY.decode(task.questions.words[i])
        seen[int(task.questions.type[i])].add(
            " ".join(w for w in text.split() if w in questions_function_words())
        )
        assert text.endswith("?")
    assert len(seen) == len(questions.TYPES)
    assert all(len(phrasings) >= 2 for phrasings in seen.values())


def questions_function_words():
    return set(VOCABULARY.words[VOCABULARY.id("yes") :])


def test_vocabulary_is_closed_and_small():
    assert len(VOCABULARY) <= 128
    text = "is there a large red circle left of the ring ?"
    assert VOCABULARY.decode(VOCABULARY.encode(text, 20)) == text
    assert VOCABULARY.encode("is there a zebra", 4)[3] == 1
    assert len(VOCABULARY.encode("is there a ring ?", 3)) == 3


@pytest.mark.parametrize("filler", [1, 40])
def test_filler_stands_before_the_same_question(filler):
    plain, long = (
        gym.make_vec(VQA, num_envs=50, difficulty=3, **kwargs) for kwargs in ({}, {"filler": filler})
    )
    for seed in range(3):
        (a, _), (b, _) = plain.reset(seed=seed), long.reset(seed=seed)
        assert b["question"].shape == (50, 20 + filler) and long.observation_space.contains(b)
        assert (b["image"] == a["image"]).all() and (b["question"][:, filler:] == a["question"]).all()
        assert (plain.oracle_actions() == long.oracle_actions()).all()
    words = VOCABULARY.decode(b["question"][7])
    assert long.describe(7)["question"] == words and words.endswith(plain.describe(7)["question"])
    # They are drawn anew for each question and tell nothing of it.
    said = b["question"][:, :filler]
    assert len(np.unique(said, axis=0)) > 5 and set(said.ravel()) <= set(_FILLER)


@pytest.mark.parametrize(
    ("filler", "error"), [(-1, ValueError), (41, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_filler_must_be_a_number_of_words(filler, error):
    with pytest.raises(error, match="filler must be"):
        gym.make(VQA, filler=filler)
