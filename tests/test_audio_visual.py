"""Audio-visual matching: fair candidates, one of them heard."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmenvs.tasks.audio_visual import AudioVisualMatching
from mmenvs.world import scene, sound
from mmenvs.world.scene import DIFFICULTIES, SPLITS

every_level = pytest.mark.parametrize("difficulty", range(4))
every_split = pytest.mark.parametrize("split", SPLITS)


def started(n, seed=0, **kwargs):
    task = AudioVisualMatching(n, **kwargs)
    rows = np.arange(n)
    task.start(rows, np.full(n, seed, np.uint64), rows)
    return task, rows


def observed(task, rows):
    out = {
        key: np.zeros((task.num_envs, *space.shape), space.dtype)
        for key, space in task.observation_space.items()
    }
    task.observe(rows, out)
    return out


def heard(task, row, k):
    """What candidate ``k`` of ``row`` sounds like, as symbols."""
    i = row * task.candidates + k
    return tuple(map(tuple, task.scenes.attributes[i, : task.scenes.count[i]].tolist()))


def chance(wins, n, k):
    """Whether ``wins`` of ``n`` is within five standard deviations of one in ``k``."""
    return abs(wins - n / k) < 5 * np.sqrt(n * (1 / k) * (1 - 1 / k))


@settings(max_examples=60, deadline=None)
@given(
    candidates=st.integers(2, 8),
    half=st.integers(16, 60),
    difficulty=st.integers(0, 3),
    split=st.sampled_from(SPLITS),
    seconds=st.floats(0.5, 2.0),
    seed=st.integers(0, 2**64 - 1),
)
def test_any_arguments_give_valid_episodes(candidates, half, difficulty, split, seconds, seed):
    task, rows = started(
        3,
        seed,
        candidates=candidates,
        image_size=2 * half,
        difficulty=difficulty,
        split=split,
        seconds=seconds,
    )
    out = observed(task, rows)
    for row in rows:
        assert task.observation_space.contains({key: value[row] for key, value in out.items()})
        assert len({heard(task, row, k) for k in range(candidates)}) == candidates
    level = DIFFICULTIES[difficulty]
    assert ((task.scenes.count >= level.objects_min) & (task.scenes.count <= level.objects_max)).all()
    assert all(scene.in_split(task.scenes, i, SPLITS.index(split)) for i in range(3 * candidates))
    rewards, ended = task.step(rows, task.oracle(rows))
    assert (rewards == 1.0).all() and ended.all()


@every_level
@every_split
@pytest.mark.parametrize("candidates", [2, 4, 8])
def test_candidates_differ_as_the_level_says(difficulty, split, candidates):
    task, rows = started(200, split=split, difficulty=difficulty, candidates=candidates)
    attributes = task.scenes.attributes.reshape(200, candidates, -1, 4)
    counts = task.scenes.count.reshape(200, candidates)
    if difficulty == 0:
        assert len(np.unique(counts)) > 1
        return
    assert (counts == counts[:, :1]).all()
    varied = set()
    for row in rows:
        objects = attributes[row, :, : counts[row, 0]]
        differs = (objects != objects[0]).any(0)  # (objects, 4)
        if difficulty == 1:
            assert differs.any()
        else:
            assert differs.any(1).sum() == 1
        if difficulty == 3:
            place, attribute = np.argwhere(differs)[0]
            assert differs.sum() == 1 and attribute < 2
            assert len(set(objects[:, place, attribute].tolist())) == candidates
            varied.add(int(attribute))
    # Of eight shapes for a colour one is held out, so eight candidates can only differ in colour.
    if difficulty == 3:
        assert varied == ({1} if candidates == 8 and split != "compositional" else {0, 1})


@every_level
@every_split
def test_pictures_by_themselves_tell_nothing(difficulty, split):
    """The candidate most like the others, or least, is the target as often as any other."""
    n, k = 3000, 4
    task, _ = started(n, split=split, difficulty=difficulty)
    flat = task.scenes.attributes.reshape(n, k, -1).astype(np.int64)
    likeness = (flat[:, :, None] == flat[:, None]).sum((2, 3)) + 1e-6 * np.arange(k)[::-1]
    features = {
        "nearest": likeness.argmax(1),
        "farthest": likeness.argmin(1),
        "count": task.scenes.count.reshape(n, k).argmax(1),
        "brightness": task.scenes.brightness.reshape(n, k).argmax(1),
        "cells": task.scenes.cell.reshape(n, k, -1).sum(2).argmin(1),
        "key": task.scenes.noise_key.reshape(n, k).argmax(1),
    }
    for name, guess in features.items():
        if name != "brightness" or difficulty:  # all equal at level 0
            assert chance((guess == task.target).sum(), n, k), name


@every_level
@pytest.mark.parametrize("candidates", [2, 5, 8])
def test_targets_are_uniform(difficulty, candidates):
    task, _ = started(4000, difficulty=difficulty, candidates=candidates)
    for count in np.bincount(task.target, minlength=candidates):
        assert chance(count, 4000, candidates)


@every_level
def test_candidates_are_exchangeable(difficulty):
    """No place among the candidates has other objects or more of them than the rest."""
    n, k = 4000, 4
    task, _ = started(n, difficulty=difficulty)
    counts = task.scenes.count.reshape(n, k)
    assert np.ptp(counts.mean(0)) < 0.1
    present = np.arange(scene.MAX_OBJECTS) < counts[..., None]
    attributes = task.scenes.attributes.reshape(n, k, scene.MAX_OBJECTS, 4)
    for a in range(4):
        means = [attributes[:, c, :, a][present[:, c]].mean() for c in range(k)]
        assert np.ptp(means) < 0.12


@every_level
def test_sound_is_the_targets(difficulty):
    """The sound equals the one that the target's own scene makes, and no other candidate's."""
    task, rows = started(20, difficulty=difficulty)
    out = observed(task, rows)["audio"]
    n = task.scenes.count.size
    clips = np.zeros((n, out.shape[1]), np.float32)
    sound.sound_rows(task.scenes, np.arange(n), task.bank, 0.0, clips, np.arange(n))
    off = np.abs(clips.reshape(20, task.candidates, -1) - out[:, None]).mean(2)
    assert (off.argmin(1) == task.target).all()


@every_level
def test_subsets_of_rows_are_drawn_and_shown_alike(difficulty):
    task, rows = started(9, difficulty=difficulty)
    whole = observed(task, rows)
    part = np.array([7, 2])
    out = observed(task, part)
    for key in whole:
        assert (out[key][part] == whole[key][part]).all()
        assert not out[key][[0, 1, 3, 4, 5, 6, 8]].any()
    task.start(part, np.full(9, 5, np.uint64), rows)
    again = observed(task, rows)
    kept = np.delete(rows, part)
    assert all((again[key][kept] == whole[key][kept]).all() for key in whole)
    assert all((again[key][part] != whole[key][part]).any() for key in whole)
    alone = AudioVisualMatching(1, difficulty=difficulty)
    alone.start(np.array([0]), np.array([5], np.uint64), np.array([7]))
    single = observed(alone, np.array([0]))
    assert all((single[key][0] == again[key][7]).all() for key in whole)


def test_infos_hide_the_answer_until_the_end():
    task, rows = started(6)
    before = task.info(rows)
    assert set(before) == set(task.info_types)
    assert (before["answer"] == -1).all() and not before["is_success"].any()
    assert "answer" not in task.describe(0)
    actions = task.oracle(rows)
    actions[:3] = (actions[:3] + 1) % task.candidates
    rewards, ended = task.step(rows, actions)
    assert ended.all() and rewards.tolist() == [0, 0, 0, 1, 1, 1]
    after = task.info(rows)
    assert (after["answer"] == task.oracle(rows)).all()
    assert (after["is_success"] == (rewards == 1)).all()
    described = task.describe(1)
    assert described["answer"] == task.target[1] and described["given"] == actions[1]
    assert described["candidates"][0][0].keys() == {"shape", "colour", "size", "texture"}


@every_level
def test_render_shows_episode_before_and_after(difficulty):
    task, rows = started(2, difficulty=difficulty, candidates=5)
    before = task.render(1)
    task.step(rows, np.zeros(2, np.int64))
    after = task.render(1)
    assert before.dtype == np.uint8 and before.shape == after.shape and (before != after).any()


@pytest.mark.parametrize(
    "kwargs, error, words",
    [
        ({"candidates": 1}, ValueError, "candidates must be from 2 to 8, got 1"),
        ({"candidates": 9}, ValueError, "candidates"),
        ({"candidates": 4.0}, TypeError, "candidates"),
        ({"candidates": True}, TypeError, "candidates"),
        ({"seconds": 0.4}, ValueError, "seconds must be from 0.5 to 2, got 0.4"),
        ({"seconds": float("nan")}, ValueError, "seconds"),
        ({"seconds": "1"}, TypeError, "seconds"),
        ({"seconds": True}, TypeError, "seconds"),
        ({"image_size": 31}, ValueError, "image_size"),
        ({"image_size": 65}, ValueError, "image_size must be even"),
        ({"difficulty": 4}, ValueError, "difficulty"),
        ({"split": "training"}, ValueError, "split must be one of 'train', 'val', 'test', 'compositional'"),
    ],
)
def test_wrong_arguments_are_named(kwargs, error, words):
    with pytest.raises(error, match=words):
        AudioVisualMatching(1, **kwargs)
