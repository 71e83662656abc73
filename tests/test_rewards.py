"""Scores of answers and captions, against values worked out by hand and against pycocoevalcap."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmenvs import rewards
from mmenvs.text import END
from mmenvs.world import captions, scene

WORDS = "a the man dog cat rides runs sits on under red blue bench horse and two".split()
IDS = {word: i + 4 for i, word in enumerate(WORDS)}
sentences = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12)

NO_COCO = "pycocoevalcap, of the extra test, is not installed"


def ids(sentence):
    return [IDS[word] for word in sentence]


def pack(sentence, length=16, end=False):
    row = np.zeros((1, length), np.int64)
    row[0, : len(sentence)] = ids(sentence)
    if end:
        row[0, len(sentence)] = END
    return row


def packed_references(documents, end=False):
    return rewards.pack_references([[ids(s) for s in document] for document in documents], end=end)


# The official evaluator's rules, one case each.
@pytest.mark.parametrize(
    "answer, normal",
    [
        ("Yes", "yes"),
        ("  two dogs \n", "2 dogs"),
        ("none", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("the cat on a mat", "cat on mat"),
        ("dont know", "don't know"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("oclock", "o'clock"),
        ("somebody'd", "somebodyd"),
        ("shes", "shes"),
        ("man's", "man's"),
        ("yes.", "yes"),
        ("3.5", "3.5"),
        ("3.5.", "3.5"),
        ("u.s.a.", "usa"),
        ("1,000", "1000"),
        ("1,000-2", "10002"),  # a number with a comma makes every mark vanish
        ("red,white", "red white"),
        ("red, white", "red white"),
        ("black-and-white", "black and white"),
        ("black - white", "black white"),
        ("on/off", "on off"),
        ("what?!", "what"),
        ("", ""),
        ("A", ""),
    ],
)
def test_normalize_answer(answer, normal):
    assert rewards.normalize_answer(answer) == normal


@pytest.mark.parametrize("agreeing, score", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_of_ten_people(agreeing, score):
    people = ["two"] * agreeing + ["blue"] * (10 - agreeing)
    assert rewards.vqa_accuracy("2", people) == pytest.approx(score, abs=1e-12)


@given(
    st.lists(st.sampled_from(["yes", "no", "2"]), min_size=2, max_size=10), st.sampled_from(["yes", "two"])
)
def test_vqa_accuracy_is_the_average_over_subsets(people, answer):
    given_answer = rewards.normalize_answer(answer)
    subsets = list(itertools.combinations(people, len(people) - 1))
    expected = np.mean([min(subset.count(given_answer) / 3, 1) for subset in subsets])
    assert rewards.vqa_accuracy(answer, people) == pytest.approx(expected, abs=1e-12)


def test_exact_match():
    assert rewards.exact_match("The Two Dogs!", ["cat", "2 dogs"]) == 1.0
    assert rewards.exact_match("dog", ["cat", "2 dogs"]) == 0.0


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(sentences, st.lists(sentences, min_size=1, max_size=4)), min_size=1, max_size=5))
def test_bleu_equals_pycocoevalcap(items):
    scorer_module = pytest.importorskip("pycocoevalcap.bleu.bleu_scorer", reason=NO_COCO)
    scorer = scorer_module.BleuScorer(n=4)
    for said, references in items:
        scorer += (" ".join(said), [" ".join(r) for r in references])
    expected = scorer.compute_score(option="closest")[1][3]
    batch = np.concatenate([pack(said, end=True) for said, _ in items])
    scores = rewards.bleu(batch, packed_references([r for _, r in items], end=True))
    np.testing.assert_allclose(scores, expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=100)
@given(sentences, st.lists(sentences, min_size=1, max_size=4))
def test_rouge_equals_pycocoevalcap(said, references):
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge", reason=NO_COCO).Rouge()
    expected = rouge.calc_score([" ".join(said)], [" ".join(r) for r in references])
    score = rewards.rouge_l(pack(said, end=True), packed_references([references], end=True))
    assert score[0] == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(sentences, st.lists(sentences, min_size=1, max_size=4)), min_size=1, max_size=8),
    st.booleans(),
)
def test_cider_equals_pycocoevalcap(items, end):
    scorer_module = pytest.importorskip("pycocoevalcap.cider.cider_scorer", reason=NO_COCO)
    tail = " <end>" if end else ""
    scorer = scorer_module.CiderScorer(n=4, sigma=6.0)
    for said, references in items:
        scorer += (" ".join(said) + tail, [" ".join(r) + tail for r in references])
    expected = scorer.compute_score()[1]
    references = packed_references([r for _, r in items], end=end)
    cider = rewards.CiderD(rewards.DocumentFrequencies.from_references(references))
    batch = np.concatenate([pack(said, end=end) for said, _ in items])
    np.testing.assert_allclose(cider(batch, references), expected, rtol=0, atol=1e-9)


def test_cider_of_a_batch_equals_single_captions():
    generator = np.random.default_rng(3)
    references = generator.integers(4, 20, (50, 5, 9))
    captions = references[:, 0].copy()
    captions[::2, 4:] = 0
    cider = rewards.CiderD(rewards.DocumentFrequencies.from_references(references))
    batch = cider(captions, references)
    single = [cider(captions[i : i + 1], references[i : i + 1])[0] for i in range(50)]
    np.testing.assert_array_equal(batch, single)
    assert (batch[1::2] > batch[::2]).all()


def test_a_caption_without_its_end_scores_lower_where_the_end_counts():
    documents = [
        [s.split() for s in ("a man rides a horse", "the man rides on a horse")],
        [s.split() for s in ("a dog sits on a bench", "the red dog sits")],
        [s.split() for s in ("two cat sits under the bench", "a cat and a blue bench")],
    ]
    references = packed_references(documents, end=True)
    cider = rewards.CiderD(rewards.DocumentFrequencies.from_references(references))
    whole, cut = "a man rides a horse".split(), "a man rides a".split()
    scores = [
        cider(pack(s, end=end), references[:1])[0] for s, end in ((whole, True), (whole, False), (cut, True))
    ]
    assert scores[0] > scores[1] and scores[0] > scores[2]


def test_document_frequencies_count_documents():
    documents = [[["a", "dog"], ["a", "cat"]], [["a", "a", "man"]], [["two", "dog"]]]
    df = rewards.DocumentFrequencies.from_references(packed_references(documents))
    count = dict(zip(df.keys.tolist(), df.counts.tolist(), strict=True))
    assert df.documents == 3
    assert count[IDS["a"]] == 2 and count[IDS["dog"]] == 2 and count[IDS["two"]] == 1
    assert count[IDS["a"] << 16 | IDS["dog"]] == 1
    assert count[IDS["a"] << 32 | IDS["a"] << 16 | IDS["man"]] == 1


@given(sentences, st.integers(1, 4))
def test_repetition_rate(said, order):
    grams = [tuple(said[i : i + order]) for i in range(len(said) - order + 1)]
    expected = 1 - len(set(grams)) / len(grams) if grams else 0.0
    assert rewards.repetition_rate(pack(said, end=True), order)[0] == pytest.approx(expected, abs=1e-12)


def test_empty_captions_score_zero():
    empty = np.array([[0, 0], [END, 0]])
    references = packed_references([[["a", "dog"]]] * 2, end=True)
    assert (rewards.bleu(empty, references) == 0).all()
    assert (rewards.rouge_l(empty, references) == 0).all()
    assert (rewards.repetition_rate(empty) == 0).all()
    cider = rewards.CiderD(rewards.DocumentFrequencies.from_references(references))
    assert np.isfinite(cider(empty, references)).all()


def test_missing_references_do_not_count():
    captions = pack("a dog sits".split())
    one = packed_references([[["a", "dog"]]])
    padded = np.zeros((1, 4, 9), np.int64)
    padded[0, 0, :2] = one[0, 0]
    cider = rewards.CiderD(rewards.DocumentFrequencies(np.empty(0, np.uint64), np.empty(0, np.int64), 100))
    for score in (rewards.bleu, rewards.rouge_l, cider):
        assert score(captions, one) == score(captions, padded) > 0


def test_scene_scores_are_those_of_the_world():
    scenes, rows = scene.empty(20), np.arange(20)
    streams = rows.astype(np.uint64)
    scene.sample_rows(scenes, rows, streams, scene.DIFFICULTIES[2], 0)
    said = np.empty((20, 60), np.int64)
    captions.tell_rows(scenes, rows, 3, said)
    assert (rewards.scene_f1(said, scenes, 3) == 1).all()
    assert (rewards.hallucination_rate(said, scenes) == 0).all()
    shifted = np.roll(said, 1, axis=0)
    scores = captions.score(shifted, scenes, 3)
    np.testing.assert_array_equal(rewards.scene_f1(shifted, scenes, 3), scores[:, 0])
    np.testing.assert_array_equal(rewards.hallucination_rate(shifted, scenes), scores[:, 3])


@pytest.mark.parametrize(
    "said, references, error, match",
    [
        (np.zeros((1, 3)), np.ones((1, 1, 3), int), TypeError, "captions must hold integer"),
        (
            np.ones(3, int),
            np.ones((1, 1, 3), int),
            ValueError,
            "captions must be a non-empty array of 2 axes",
        ),
        (np.ones((1, 3), int), np.ones((1, 3), int), ValueError, "references must be .* 3 axes"),
        (np.ones((1, 3), int), np.ones((2, 1, 3), int), ValueError, "as many, got 1 and 2"),
        (-np.ones((1, 3), int), np.ones((1, 1, 3), int), ValueError, "word ids from 0 to 65535"),
        (np.full((1, 3), 70000), np.ones((1, 1, 3), int), ValueError, "word ids from 0 to 65535"),
        (np.ones((2, 3), int), np.array([[[1]], [[0]]]), ValueError, "row 1 has none"),
    ],
)
def test_bad_captions(said, references, error, match):
    df = rewards.DocumentFrequencies(np.empty(0, np.uint64), np.empty(0, np.int64), 2)
    for score in (rewards.bleu, rewards.rouge_l, rewards.CiderD(df)):
        with pytest.raises(error, match=match):
            score(said, references)


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: rewards.vqa_accuracy("yes", "yes"), TypeError, "the string 'yes'"),
        (lambda: rewards.vqa_accuracy("yes", ["yes"]), ValueError, "at least 2 answers, got 1"),
        (lambda: rewards.exact_match("yes", []), ValueError, "at least 1 answers, got 0"),
        (lambda: rewards.soft_accuracy(np.array([11])), ValueError, "agreeing must be from 0 to people"),
        (
            lambda: rewards.repetition_rate(np.ones((1, 3), int), 5),
            ValueError,
            "order must be from 1 to 4, got 5",
        ),
        (lambda: rewards.pack_references([]), ValueError, "at least one picture"),
        (lambda: rewards.pack_references([[[1]], []]), ValueError, "every picture at least one caption"),
        (
            lambda: rewards.CiderD(rewards.DocumentFrequencies(np.empty(0), np.empty(0), 1), sigma=0),
            ValueError,
            "sigma must be positive",
        ),
    ],
)
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call()
