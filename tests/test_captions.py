"""Captions of scenes: the grammar, its parser, and the scene F1 against an independent slow scorer."""

from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmenvs.text import END
from mmenvs.world import captions, random, scene
from mmenvs.world.words import VOCABULARY

N = 300
every_level = pytest.mark.parametrize("difficulty", range(4))
every_split = pytest.mark.parametrize("split", range(4))


@lru_cache
def scenes_of(difficulty, split=0, n=N):
    scenes, streams, rows = scene.empty(n), np.zeros(n, np.uint64), np.arange(n)
    random.start(streams, rows, split, rows.astype(np.uint64), rows)
    scene.sample_rows(scenes, rows, streams, scene.DIFFICULTIES[difficulty], split)
    return scenes


def pick(scenes, i):
    return scene.Scenes(*(part[i : i + 1] for part in scenes))


def encode(sentence, length=80):
    return VOCABULARY.encode(sentence, length)


def scores_of(sentence, scenes, i, textures=3):
    row = encode(sentence)
    assert row[-1] == 0
    return captions.score(row[None], pick(scenes, i), textures)[0]


def paraphrases(difficulty, split, count=5):
    level = scene.DIFFICULTIES[difficulty]
    scenes = scenes_of(difficulty, split)
    out = np.empty((N, count, captions.caption_limit(level)), np.int64)
    captions.paraphrase_rows(scenes, np.arange(N), level.textures, out)
    return scenes, level, out


# ---------------------------------------------------------------------------------------------------------
# An independent scorer: words instead of ids, recursion instead of kernels.
# ---------------------------------------------------------------------------------------------------------


def slow_scan(words):
    mentions, relations, told, current = [], {}, 0, {}
    for word in words:
        for name, values in zip(scene.ATTRIBUTES, captions._NAMES, strict=True):
            if word in values:
                current[name] = word
                told += 1
        if word in scene.SHAPES:
            mentions.append(current)
            current = {}
        if word in captions.RELATIONS:
            told += 1
            if mentions:
                relations[len(mentions) - 1] = word
    return mentions, relations, told


def slow_match(mentions, objects, facts):
    @lru_cache(None)
    def best(m, left):
        if m == len(mentions):
            return (0, 0, 0)
        options = [best(m + 1, left)]
        for k in left:
            right = {name for name, value in mentions[m].items() if objects[k][name] == value}
            if "shape" in right:
                rest = best(m + 1, left - {k})
                gain = (len(right), len(right & set(scene.ATTRIBUTES[:facts])), 1)
                options.append(tuple(a + b for a, b in zip(rest, gain, strict=True)))
        return max(options)

    return best(0, frozenset(range(len(objects))))


def slow_score(words, scenes, i, textures):
    objects = scene.words(scenes, i)
    mentions, relations, told = slow_scan(words)
    if not mentions:
        return [0.0] * 4
    facts = 4 if textures > 1 else 3
    right, attributes, paired = slow_match(mentions, objects, facts)
    x, y = scenes.x[i], scenes.y[i]
    true = {
        "left": lambda a, b: x[a] < x[b],
        "right": lambda a, b: x[a] > x[b],
        "above": lambda a, b: y[a] < y[b],
        "below": lambda a, b: y[a] > y[b],
    }

    def fits(m):
        return [k for k, o in enumerate(objects) if all(o[name] == v for name, v in mentions[m].items())]

    for m, relation in relations.items():
        if m + 1 < len(mentions):
            right += any(true[relation](a, b) for a in fits(m) for b in fits(m + 1) if a != b)
    precision, recall = right / told, attributes / (facts * len(objects))
    f1 = 2 * precision * recall / (precision + recall) if attributes else 0.0
    return [f1, precision, recall, (len(mentions) - paired) / len(mentions)]


WORDS = (
    *scene.SHAPES,
    *scene.COLOURS,
    *scene.SIZES,
    *scene.TEXTURES,
    *captions.RELATIONS,
    "a",
    "and",
    "of",
    "circles",
)


@settings(deadline=None, max_examples=300)
@given(
    st.integers(0, 3),
    st.integers(0, N - 1),
    st.lists(st.sampled_from(WORDS), max_size=40),
    st.booleans(),
)
def test_kernel_equals_slow_scorer_on_any_words(difficulty, i, words, alike):
    scenes = scenes_of(difficulty)
    if alike:  # words of the scene itself, so that much of it is right
        own = [v for o in scene.words(scenes, i) for v in o.values()]
        words = [own[len(word) * 7 % len(own)] if k % 2 else word for k, word in enumerate(words)]
    textures = scene.DIFFICULTIES[difficulty].textures
    got = scores_of(" ".join(words), scenes, i, textures)
    np.testing.assert_allclose(got, slow_score(words, scenes, i, textures), atol=1e-12)
    assert ((got >= 0) & (got <= 1)).all()


@every_level
def test_kernel_equals_slow_scorer_on_damaged_captions(difficulty):
    scenes, level, told = paraphrases(difficulty, 0, count=2)
    generator = np.random.default_rng(difficulty)
    damaged = told[:, 1].copy()
    for i in range(N):
        length = int(np.argmax(damaged[i] == END))
        for at in generator.integers(length, size=3):
            damaged[i, at] = VOCABULARY.id(WORDS[generator.integers(len(WORDS))])
    got = captions.score(damaged, scenes, level.textures)
    for i in range(N):
        words = VOCABULARY.decode(damaged[i]).split()
        np.testing.assert_allclose(got[i], slow_score(words, scenes, i, level.textures), atol=1e-12)


# ---------------------------------------------------------------------------------------------------------
# Telling and parsing
# ---------------------------------------------------------------------------------------------------------


@every_level
@every_split
def test_every_paraphrase_is_perfect_and_parses_back_to_the_scene(difficulty, split):
    scenes, level, told = paraphrases(difficulty, split)
    assert (told == END).sum(-1).min() == 1
    for r in range(told.shape[1]):
        scores = captions.score(told[:, r], scenes, level.textures)
        assert (scores[:, :3] == 1.0).all() and (scores[:, 3] == 0.0).all()
    names = scene.ATTRIBUTES if level.textures > 1 else scene.ATTRIBUTES[:3]
    for i in range(60):
        expected = sorted([o[name] for name in names] for o in scene.words(scenes, i))
        for r in range(told.shape[1]):
            parsed = captions.parse(told[i, r])
            assert sorted([getattr(p, name) for name in names] for p in parsed.phrases) == expected
            assert parsed.relations == () or r > 0
    assert (told[:, 0, None] != told[:, 1:]).any()


def test_canonical_caption_is_in_reading_order():
    scenes = scenes_of(2)
    for i in range(50):
        ids = captions.describe_scene(scenes, i, 3)
        assert END not in ids and 0 not in ids
        parsed = captions.parse(ids)
        assert [p._asdict() for p in parsed.phrases] == scene.words(scenes, i)


@pytest.mark.parametrize("difficulty, limit", [(0, 11), (1, 19), (2, 39), (3, 65)])
def test_limit_has_room_for_every_paraphrase(difficulty, limit):
    level = scene.DIFFICULTIES[difficulty]
    assert captions.caption_limit(level) == limit
    longest = level.objects_max * (5 if level.textures > 1 else 4) + level.objects_max - 1
    assert limit == longest + level.objects_max // 2 + 1


def test_parse_gives_symbols():
    parsed = captions.parse(
        encode("a large red striped circle left of a star and an orange ring below a heart")
    )
    assert parsed.phrases == (
        captions.Phrase("circle", "red", "large", "striped"),
        captions.Phrase("star", None, None, None),
        captions.Phrase("ring", "orange", None, None),
        captions.Phrase("heart", None, None, None),
    )
    assert parsed.relations == ((0, "left", 1), (2, "below", 3))


@pytest.mark.parametrize(
    "sentence, message",
    [
        ("", "word 1 .* expected 'a' or 'an', got the end"),
        ("red circle", "word 1 .* expected 'a' or 'an', got 'red'"),
        ("a red", "word 3 .* expected the size, colour, texture or shape .*, got the end"),
        ("a red large circle", "word 3 .* got 'large'"),
        ("a orange circle", "word 1 .* 'an' before 'orange'"),
        ("an red circle", "word 1 .* 'an' before 'orange'"),
        ("a circle a star", "word 3 .* expected 'and', a relation or the end, got 'a'"),
        ("a circle and", "word 4 .* got the end"),
        ("a circle left a star", "word 4 .* expected 'of', got 'a'"),
        ("a circle above", "word 4 .* expected 'a' or 'an', got the end"),
        ("a circle above a star below a ring", "word 6 .* expected 'and' or the end, got 'below'"),
        ("a circles", "word 2 .* got 'circles'"),
    ],
)
def test_parse_says_where(sentence, message):
    with pytest.raises(ValueError, match=message):
        captions.parse(encode(sentence))


def test_parse_refuses_other_ids():
    with pytest.raises(ValueError, match="word 2 of the caption: 500 is no id"):
        captions.parse([VOCABULARY.id("a"), 500])


@given(st.lists(st.integers(0, len(VOCABULARY) - 1), max_size=20))
def test_parse_reads_or_refuses_any_words(ids):
    try:
        parsed = captions.parse(ids)
    except ValueError:
        return
    assert parsed.phrases


# ---------------------------------------------------------------------------------------------------------
# What the score means
# ---------------------------------------------------------------------------------------------------------


def scene_with(*objects, x=None, y=None):
    """A scene of objects given as "large red solid circle"; x and y default to one row."""
    scenes = scene.empty(1)
    scenes.count[0] = len(objects)
    for k, words in enumerate(objects):
        size, colour, texture, shape = words.split()
        scenes.attributes[0, k] = [
            scene.SHAPES.index(shape),
            scene.COLOURS.index(colour),
            scene.SIZES.index(size),
            scene.TEXTURES.index(texture),
        ]
        scenes.x[0, k] = (k + 1) / 11 if x is None else x[k]
        scenes.y[0, k] = 0.5 if y is None else y[k]
    return scenes


TWO = scene_with("large red solid circle", "small blue striped star")


@pytest.mark.parametrize(
    "sentence, precision, recall, hallucination",
    [
        ("a large red solid circle and a small blue striped star", 1, 1, 0),
        ("small blue striped star large red solid circle", 1, 1, 0),  # lenient: no article, any order
        ("blue striped small star yes red large solid circle ?", 1, 1, 0),
        ("a circle", 1, 1 / 8, 0),
        ("a red circle and a blue star", 1, 4 / 8, 0),
        ("a red star", 1 / 2, 1 / 8, 0),  # the red one is a circle
        ("a red ring", 0, 0, 1),
        ("a green heart", 0, 0, 1),
        ("a large solid heart", 0, 0, 1),  # nothing counts of an object that isn't there
        ("a red circle and a red circle", 2 / 4, 2 / 8, 1 / 2),  # told twice
        ("a red blue circle", 1 / 3, 1 / 8, 0),  # of two colours the later one holds
        ("a blue red circle", 2 / 3, 2 / 8, 0),
        ("a red circle and a large", 2 / 3, 2 / 8, 0),  # facts without an object
        ("circles and stars", 0, 0, 0),
        ("a circle left of a star", 1, 2 / 8, 0),
        ("a circle right of a star", 2 / 3, 2 / 8, 0),
        ("a star right of a circle", 1, 2 / 8, 0),
        ("a circle left right of a star", 2 / 4, 2 / 8, 0),
        ("left of a circle", 1 / 2, 1 / 8, 0),
        ("a circle below", 1 / 2, 1 / 8, 0),
        ("a circle left of a heart", 1 / 3, 1 / 8, 1 / 2),
    ],
)
def test_scores(sentence, precision, recall, hallucination):
    got = captions.score(encode(sentence)[None], TWO)[0]
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0
    np.testing.assert_allclose(got, [f1, precision, recall, hallucination], atol=1e-12)


def test_texture_needs_no_telling_where_there_is_one():
    scenes = scene_with("large red solid circle")
    for sentence, f1 in (
        ("large red circle", 1),
        ("large red solid circle", 1),
        ("large red dotted circle", 6 / 7),
    ):
        assert captions.score(encode(sentence)[None], scenes, 1)[0, 0] == pytest.approx(f1, abs=1e-12)


def test_relation_between_objects_that_look_the_same():
    twins = scene_with("large red solid circle", "large red solid circle")
    one = scene_with("large red solid circle")
    sentence = encode("a large red solid circle left of a large red solid circle")[None]
    assert captions.score(sentence, twins)[0, 0] == 1.0
    assert captions.score(sentence, one)[0, 1] == pytest.approx(4 / 9, abs=1e-12)


@every_level
def test_order_of_objects_does_not_matter(difficulty):
    scenes, level, told = paraphrases(difficulty, 0, count=1)
    generator = np.random.default_rng(0)
    for i in range(100):
        phrases = VOCABULARY.decode(told[i, 0]).split(" and ")
        wrong = [p.replace("red", "blue").replace("star", "ring") for p in phrases]
        first = scores_of(" and ".join(wrong), scenes, i, level.textures)
        generator.shuffle(wrong)
        np.testing.assert_array_equal(scores_of(" and ".join(wrong), scenes, i, level.textures), first)


@every_level
def test_leaving_out_repeating_and_adding_cost(difficulty):
    scenes, level, told = paraphrases(difficulty, 1, count=1)
    for i in range(100):
        sentence = VOCABULARY.decode(told[i, 0])
        phrases = sentence.split(" and ")
        assert scores_of(sentence, scenes, i, level.textures)[0] == 1.0
        fewer = scores_of(" and ".join(phrases[1:]), scenes, i, level.textures)
        twice = scores_of(f"{sentence} and {phrases[0]}", scenes, i, level.textures)
        assert fewer[0] < 1 and twice[0] < 1 and twice[3] > 0


@every_level
def test_naming_everything_scores_low(difficulty):
    level = scene.DIFFICULTIES[difficulty]
    scenes = scenes_of(difficulty)
    shapes = " ".join(scene.SHAPES * 10).split()[: captions.caption_limit(level)]
    everything = " ".join(
        f"{size} {colour} {shape}"
        for size in scene.SIZES
        for colour, shape in zip(scene.COLOURS, scene.SHAPES, strict=True)
    )
    for sentence in (" ".join(shapes), everything):
        row = np.repeat(encode(sentence)[None], N, 0)
        scores = captions.score(row, scenes, level.textures).mean(0)
        assert scores[0] < 0.4 and scores[3] > 0.4


def test_the_best_blind_caption_scores_low():
    scenes = scenes_of(0)
    best = 0.0
    for shape in scene.SHAPES:
        for colour in scene.COLOURS:
            for sentence in (f"large {colour} {shape}", f"small {colour} {shape} and {colour} {shape}"):
                row = np.repeat(encode(sentence)[None], N, 0)
                best = max(best, captions.score(row, scenes, 1)[:, 0].mean())
    assert best < 0.3


def test_bad_shape_is_an_error():
    with pytest.raises(ValueError, match=r"captions must have shape \(1, L\)"):
        captions.score(np.zeros((2, 5), np.int64), TWO)
