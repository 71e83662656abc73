"""Readers of real data: the official formats, rewards, splits, the environments on top."""

import copy
import json
import pickle

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

import mmenvs  # noqa: F401
from mmenvs.datasets import CocoCaptions, VQAv2, open_source
from mmenvs.datasets.images import decode
from mmenvs.datasets.reader import split_ids
from mmenvs.rewards import CiderD, DocumentFrequencies, normalize_answer, vqa_accuracy
from mmenvs.text import END, UNKNOWN
from tests import photos

VQA_ID, CAPTION_ID = "MMRL/VQA-v0", "MMRL/Captioning-v0"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The 14 photographs of scikit-image with 89 questions and 70 captions."""
    return photos.example().build(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def vqa(root, cache):
    return VQAv2.from_root(root, cache=cache)


@pytest.fixture(scope="module")
def coco(root, cache):
    return CocoCaptions.from_root(root, cache=cache)


@pytest.fixture
def small(tmp_path):
    return photos.small(tmp_path / "data")


def read(folder, **options):
    return VQAv2.from_root(folder, **{"cache": folder / "cache", **options})


# Questions and answers ------------------------------------------------------------------------------------


def test_official_files(vqa, root):
    asked = json.loads((root / photos.QUESTIONS).read_text())["questions"]
    told = json.loads((root / photos.ANNOTATIONS).read_text())["annotations"]
    assert len(vqa) == len(asked) >= 60 and len(vqa.store) == 14
    assert vqa.questions.shape == (len(asked), vqa.question_length) and vqa.questions.dtype == np.int64
    for i, (question, answer) in enumerate(zip(asked, told, strict=True)):
        assert vqa.text(i)["question"] == question["question"]
        assert vqa.text(i)["answer"] == answer["multiple_choice_answer"]
        assert vqa.text(i)["image"].endswith(f"COCO_train2014_{question['image_id']:012d}.jpg")
        assert vqa.types[vqa.type_ids[i]] == answer["question_type"]
        assert len(answer["answers"]) == 10
        if vqa.splits[i] == 0:
            words = question["question"].lower().replace("?", " ?")
            assert vqa.vocabulary.decode(vqa.questions[i]) == words
            assert vqa.answers[vqa.references[i]] == normalize_answer(answer["multiple_choice_answer"])


def test_rewards_are_the_official_accuracy(vqa, root):
    told = json.loads((root / photos.ANNOTATIONS).read_text())["annotations"]
    everything = np.arange(len(vqa))
    for action, answer in enumerate(vqa.answers):
        expected = [vqa_accuracy(answer, [a["answer"] for a in record["answers"]]) for record in told]
        scores = vqa.score(everything, np.full(len(vqa), action))
        assert scores.dtype == np.float64
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "answers, answer, accuracy",
    [
        (["Yes."] * 10, "yes", 1.0),
        (["yes"] * 4 + ["no"] * 6, "yes", 1.0),
        # Nine subsets leave a "no" in place of a "yes" ...: (7 * 1 + 3 * 2/3) / 10.
        (["yes"] * 3 + ["no"] * 7, "yes", 0.9),
        (["yes"] * 2 + ["no"] * 8, "yes", 0.6),
        (["yes"] + ["no"] * 9, "yes", 0.3),
        (["two", "2", "Two!", *["three"] * 7], "2", 0.9),
        (["a dog", "the dog", *["cat"] * 8], "dog", 0.6),
        (["the"] * 8 + ["cat"] * 2, "cat", 0.6),
    ],
)
def test_accuracy_by_hand(tmp_path, answers, answer, accuracy):
    items = [(1, "what is it ?", answers), (2, "what is it ?", [answer] * 10)]
    source = read(photos.write(tmp_path / "data", items))
    action = np.array([source.answers.index(answer)])
    assert source.score(np.array([0]), action)[0] == pytest.approx(accuracy, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.lists(
            st.sampled_from("a dog|Dog|2|two|the|blue|red, blue|no".split("|")), min_size=10, max_size=10
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(2, 5),
)
def test_any_answers(tmp_path_factory, people, count):
    folder = tmp_path_factory.mktemp("any")
    items = [(photos.TRAIN[0], "why ?", ["sure"] * 10)]
    items += [(i, "why ?", answers) for i, answers in zip(photos.TRAIN[1:], people, strict=False)]
    source = read(photos.write(folder / "data", items), answers=count)
    assert 1 <= len(source.answers) <= count and "" not in source.answers
    for i, (_, _, answers) in enumerate(items):
        scores = [source.score(np.array([i]), np.array([a]))[0] for a in range(len(source.answers))]
        assert scores == pytest.approx([vqa_accuracy(a, answers) for a in source.answers], abs=1e-12)
        best = source.references[i]
        assert scores[best] == max(scores) if best >= 0 else max(scores) == 0


def test_answer_vocabulary_is_of_the_training_split(tmp_path):
    items = [(i, "what is it ?", ["red"] * 10) for i in photos.TRAIN[:3]]
    items += [(i, "what is it ?", ["Blue"] * 10) for i in photos.TRAIN[3:6]]
    items += [(photos.TRAIN[6], "what is rare ?", ["green"] * 10)]
    items += [(i, "which unseen words ?", ["white"] * 10) for i in (*photos.VAL, *photos.TEST)] * 3
    folder = photos.write(tmp_path / "data", items)
    assert read(folder).answers == ("blue", "red", "green")
    source = read(folder, answers=2, words=3, question_length=3)
    assert source.answers == ("blue", "red")  # equally frequent: in the order of the alphabet
    assert source.references.tolist() == [1] * 3 + [0] * 3 + [-1] * (len(items) - 6)
    assert source.vocabulary.words[4:] == ("?", "is", "what")
    assert source.questions.shape == (len(items), 3)
    assert (source.questions[-1] == UNKNOWN).all() and source.vocabulary.decode(
        source.questions[0]
    ) == "what is"[:7] + " <unk>"


def test_special_words_in_questions_are_words(tmp_path):
    source = read(photos.write(tmp_path / "data", [(1, "is <pad> an <end> ?", ["no"] * 10)]))
    assert source.vocabulary.decode(source.questions[0]) == "is an ?"


# Splits ---------------------------------------------------------------------------------------------------


def test_splits_are_disjoint_by_photograph(vqa, coco):
    seen = {}
    for split in ("train", "val", "test"):
        chosen = vqa.select(split)
        assert chosen.dtype == np.int64
        seen[split] = {vqa.text(int(i))["image"] for i in chosen}
        # Every reader of the same photographs splits them in the same way.
        assert seen[split] == {coco.text(int(i))["image"] for i in coco.select(split)}
    assert len(set.union(*seen.values())) == sum(map(len, seen.values())) == 14
    assert vqa.select("train").size >= 60


def test_split_shares_are_stable():
    shares = np.bincount(split_ids(np.arange(100_000))) / 100_000
    np.testing.assert_allclose(shares, (0.8, 0.1, 0.1), atol=0.005)
    assert split_ids(np.array([1, 8, 11, 15, 9, 391895])).tolist() == [0, 1, 1, 2, 0, 0]


def test_splits_that_are_not_there(vqa, tmp_path):
    with pytest.raises(ValueError, match="'train', 'val', 'test' with photographs"):
        gym.make(VQA_ID, source=vqa, split="compositional")
    source = read(photos.write(tmp_path / "data", [(1, "why ?", ["no"] * 10)]))
    with pytest.raises(ValueError, match="split='test' is empty"):
        gym.make(VQA_ID, source=source, split="test")
    folder = photos.write(tmp_path / "other", [(8, "why ?", ["no"] * 10)])
    for reader in (VQAv2, CocoCaptions):
        with pytest.raises(ValueError, match="no photograph falls into the training split"):
            reader.from_root(folder, cache=tmp_path)


# Captions -------------------------------------------------------------------------------------------------


def test_captions(coco, root):
    told = json.loads((root / photos.CAPTIONS).read_text())
    assert coco.references.shape[:2] == (14, 5) and coco.caption_length == 20
    for index, image in enumerate(sorted(told["images"], key=lambda image: image["id"])):
        captions = [a["caption"] for a in told["annotations"] if a["image_id"] == image["id"]]
        assert coco.text(index)["image"].endswith(image["file_name"])
        for ids, caption in zip(coco.references[index], captions, strict=True):
            length = int((ids > 0).sum())
            assert ids[length - 1] == END
            words = caption.lower().replace(".", "").replace(",", "").split()
            assert len(words) == length - 1
            assert all(
                id == UNKNOWN or coco.vocabulary.words[id] == word
                for id, word in zip(ids, words, strict=False)
            )
            if coco.splits[index] == 0:
                assert UNKNOWN not in ids
    expected = DocumentFrequencies.from_references(coco.references[coco.splits == 0])
    assert coco.document_frequencies.documents == expected.documents == 11
    np.testing.assert_array_equal(coco.document_frequencies.counts, expected.counts)


def test_captions_in_the_environment(coco):
    envs = gym.make_vec(CAPTION_ID, num_envs=6, source=coco)
    envs.reset(seed=0)
    scored = 0
    for _ in range(25):
        _, rewards, terminated, _, infos = envs.step(envs.oracle_actions())
        for row in np.flatnonzero(terminated):
            scored += 1
            index = infos["final_info"]["reference"][row]
            assert rewards[row] == infos["final_info"]["cider"][row] > 1
            assert infos["final_info"]["is_success"][row]
            told = coco.references[index]
            best = CiderD(coco.document_frequencies)(told, np.repeat(told[None], len(told), 0)).max()
            assert rewards[row] == pytest.approx(best)
    assert scored > 6
    env = gym.make(CAPTION_ID, source=coco, render_mode="rgb_array")
    check_env(env.unwrapped, skip_render_check=True)
    env.reset(seed=0)
    env.step(END)
    assert env.render().dtype == np.uint8 and env.unwrapped.describe()["captions"]


def test_rare_caption_words_and_few_words(tmp_path):
    items = [(1, "A dog, a cat.", ["no"] * 10), (2, "a dog runs", ["no"] * 10), (8, "a bird", ["no"] * 10)]
    folder = photos.write(tmp_path / "data", items)
    source = CocoCaptions.from_root(folder, words=2, cache=tmp_path)
    assert source.vocabulary.words[4:] == ("a", "dog")
    assert source.references[:, 0].tolist() == [[4, 5, 4, 1, 3], [4, 5, 1, 3, 0], [4, 1, 3, 0, 0]]


# The environments -----------------------------------------------------------------------------------------


def test_vqa_environment(vqa):
    env = gym.make(VQA_ID, source=vqa, image_size=48, render_mode="rgb_array")
    check_env(env.unwrapped, skip_render_check=True)
    observation, info = env.reset(seed=3)
    assert observation["image"].shape == (48, 48, 3) and info["answer"] == -1
    action = env.unwrapped.oracle_action()
    _, reward, terminated, _, info = env.step(action)
    assert terminated and reward > 0 and info["answer"] == action
    described = env.unwrapped.describe()
    index = vqa.texts.index(described["question"])
    assert described["given"] == vqa.answers[action] and vqa.references[index] >= 0
    assert env.render().shape[-1] == 3


@pytest.mark.parametrize("id, name", [(VQA_ID, "vqa"), (CAPTION_ID, "coco")])
def test_single_vector_and_async_agree(request, id, name):
    source = request.getfixturevalue(name)
    native = gym.make_vec(id, num_envs=3, source=source)
    mode = native.metadata["autoreset_mode"]
    others = (
        gym.vector.SyncVectorEnv([lambda: gym.make(id, source=source)] * 3, autoreset_mode=mode),
        gym.vector.AsyncVectorEnv([lambda: gym.make(id, source=source)] * 3, autoreset_mode=mode),
    )
    try:
        first, _ = native.reset(seed=5)
        for other in others:
            _same(first, other.reset(seed=5)[0])
        generator = np.random.default_rng(0)
        for _ in range(30):
            actions = generator.integers(native.single_action_space.n, size=3)
            observation, rewards, terminated, _, _ = native.step(actions)
            for other in others:
                their_observation, their_rewards, their_terminated, _, _ = other.step(actions)
                _same(observation, their_observation)
                np.testing.assert_array_equal(rewards, their_rewards)
                np.testing.assert_array_equal(terminated, their_terminated)
    finally:
        for other in others:
            other.close()


def _same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key])


@pytest.mark.parametrize("name", ["vqa", "coco"])
def test_copies(request, name):
    source = request.getfixturevalue(name)
    source.prepare(32)
    assert copy.deepcopy(source) is source
    stored = pickle.dumps(source)
    assert len(stored) < 500_000  # the pictures stay on disk
    other = pickle.loads(stored)
    out = np.zeros((2, 14, 32, 32, 3), np.uint8)
    rows = np.arange(14)
    for reader, place in zip((source, other), out, strict=True):
        reader.pictures(rows, 32, place, rows)
    np.testing.assert_array_equal(out[0], out[1])
    np.testing.assert_array_equal(source.select("train"), other.select("train"))
    assert repr(other) == repr(source)


def test_pictures_of_questions(vqa):
    out = np.zeros((9, 40, 40, 3), np.uint8)
    indices, rows = np.array([80, 0, 33]), np.array([7, 2, 4])
    vqa.pictures(indices, 40, out, rows)
    for index, row in zip(indices, rows, strict=True):
        np.testing.assert_array_equal(out[row], decode(vqa.text(int(index))["image"], 40))
    assert not out[[0, 1, 3, 5, 6, 8]].any()


# Sources by name ------------------------------------------------------------------------------------------


def test_open_source(small, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    source = open_source(f"vqav2:{small}", VQA_ID)
    assert (
        isinstance(source, VQAv2) and len(open_source(f"vqav2:{small}:train2014", f"mmenvs:{VQA_ID}")) == 12
    )
    gym.make(VQA_ID, source=source, image_size=32)
    assert len(list((tmp_path / "home" / "mmenvs").iterdir())) == 1
    assert isinstance(open_source(f"coco:{small}", CAPTION_ID), CocoCaptions)


@pytest.mark.parametrize(
    "text, id, error, match",
    [
        ("vqav2", VQA_ID, ValueError, "source must be vqav2:FOLDER or coco:FOLDER, got 'vqav2'"),
        ("vqav2:", VQA_ID, ValueError, "source must be"),
        ("imagenet:/data", VQA_ID, ValueError, "source must be"),
        ("coco:/data", VQA_ID, ValueError, "'coco' is for MMRL/Captioning-v0, not for MMRL/VQA-v0"),
        ("vqav2:/data", "MMRL/AudioVisualMatching-v0", ValueError, "'vqav2' is for MMRL/VQA-v0"),
        ("vqav2:/nowhere", VQA_ID, FileNotFoundError, "there is no folder '/nowhere' to read real data from"),
        ("vqav2:/tmp", VQA_ID, FileNotFoundError, f"/tmp lacks {photos.QUESTIONS}; {photos.ANNOTATIONS}; train2014"),
        ("vqav2:/tmp:val2014", VQA_ID, FileNotFoundError, "v2_mscoco_val2014_annotations.json; val2014"),
        ("coco:/tmp", CAPTION_ID, FileNotFoundError, "captions_train2014.json or captions_train2014.json; train2014"),
    ],
)  # fmt: skip
def test_open_source_errors(text, id, error, match):
    with pytest.raises(error, match=match):
        open_source(text, id)


@pytest.mark.parametrize(
    "files, error, match",
    [
        ((None, photos.ANNOTATIONS), TypeError, "questions must be the path of a JSON file, got None"),
        ((photos.QUESTIONS, 3), TypeError, "annotations must be the path of a JSON file, got 3"),
        (("none.json", photos.ANNOTATIONS), FileNotFoundError, "questions: No such file .*none.json"),
        ((photos.QUESTIONS, "none.json"), FileNotFoundError, "annotations: No such file .*none.json"),
    ],
)
def test_files_are_named_by_their_argument(small, monkeypatch, files, error, match):
    monkeypatch.chdir(small)
    with pytest.raises(error, match=match):
        VQAv2(*files, small)


def test_unknown_part(small):
    with pytest.raises(ValueError, match="part must be one of 'train2014', 'val2014', got 'test2015'"):
        VQAv2.from_root(small, "test2015")
