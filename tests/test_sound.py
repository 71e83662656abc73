"""Sounds tell what the scene says: pitch, timbre, loudness and rhythm of every object."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmenvs.spaces import SAMPLE_RATE
from mmenvs.world import random, scene, sound
from mmenvs.world.scene import COLOURS, DIFFICULTIES, SHAPES, TEXTURES

every_level = pytest.mark.parametrize("difficulty", range(4))
lengths = st.floats(0.5, 2.0)


def sampled(n, difficulty, seed=0):
    scenes, streams, rows = scene.empty(n), np.zeros(n, np.uint64), np.arange(n)
    random.start(streams, rows, 0, np.full(n, seed, np.uint64), rows)
    scene.sample_rows(scenes, rows, streams, DIFFICULTIES[difficulty], 0)
    return scenes


def played(scenes, difficulty, seconds, noise=None):
    level, n = DIFFICULTIES[difficulty], scenes.count.size
    out = np.full((n, sound.samples_of(seconds)), np.nan, np.float32)
    bank = sound.bank(seconds, level.objects_max)
    noise = level.audio_noise if noise is None else noise
    sound.sound_rows(scenes, np.arange(n), bank, noise, out, np.arange(n))
    return out


def voice(shape=0, colour=0, size=1, texture=0, slot=16000):
    """One object's sound, as long as a slot."""
    scenes = scene.empty(1)
    scenes.count[0] = 1
    scenes.attributes[0, 0] = (shape, colour, size, texture)
    out = np.zeros((1, slot), np.float32)
    rows = np.zeros(1, np.int64)
    sound.sound_rows(scenes, rows, sound.bank(slot / SAMPLE_RATE, 1), 0.0, out, rows)
    return out[0]


def pitch_of(clip):
    """The strongest frequency in hertz."""
    spectrum = np.abs(np.fft.rfft(clip * np.hanning(clip.size), 1 << 16))
    return spectrum.argmax() * SAMPLE_RATE / (1 << 16)


def strength(clip, frequency):
    """Amplitude of one frequency in a clip, relative to the clip's power."""
    time = np.arange(clip.size) / SAMPLE_RATE
    window = np.hanning(clip.size)
    part = np.abs((clip * window * np.exp(-2j * np.pi * frequency * time)).sum()) * 2 / window.sum()
    return part / np.sqrt((clip**2 * window).sum() / window.sum())


def notes_in(clip):
    """How many stretches of sound there are, by the envelope over 3 ms."""
    envelope = np.convolve(np.abs(clip), np.ones(48) / 48, "same")
    loud = envelope > 0.25 * envelope.max()
    return int((np.diff(loud.astype(int)) == 1).sum() + loud[0])


@every_level
@settings(max_examples=10, deadline=None)
@given(seconds=lengths, seed=st.integers(0, 2**63))
def test_pitches_are_the_colours_in_reading_order(difficulty, seconds, seed):
    scenes = sampled(4, difficulty, seed)
    slot = sound.samples_of(seconds) // DIFFICULTIES[difficulty].objects_max
    for i, clip in enumerate(played(scenes, difficulty, seconds)):
        for k in range(scenes.count[i]):
            heard = pitch_of(clip[k * slot : (k + 1) * slot])
            nearest = int(np.abs(np.log(sound.PITCH / heard)).argmin())
            assert nearest == scenes.attributes[i, k, 1]


@pytest.mark.parametrize("colour", range(8), ids=COLOURS)
@pytest.mark.parametrize("shape", range(8), ids=SHAPES)
def test_timbre_is_the_shape_at_every_pitch(shape, colour):
    clip = voice(shape, colour)
    assert pitch_of(clip) == pytest.approx(sound.PITCH[colour], rel=0.002)
    measured = [strength(clip, n * sound.PITCH[colour]) for n in (1, 2, 3, 4)]
    assert np.allclose(np.array(measured) / measured[0], sound.HARMONICS[shape], atol=0.02)


def test_voices_are_band_limited_and_timbres_distinct():
    assert sound.PITCH.max() * sound.HARMONICS.shape[1] < SAMPLE_RATE / 2
    assert len(np.unique(sound.HARMONICS, axis=0)) == len(SHAPES)
    assert (np.diff(np.log2(sound.PITCH)) > 0.4).all()


@pytest.mark.parametrize("texture", range(3), ids=TEXTURES)
def test_loudness_is_the_size_whatever_the_rest(texture):
    power = np.array(
        [
            [[np.sqrt((voice(s, c, size, texture) ** 2).mean()) for size in (0, 1)] for c in range(8)]
            for s in range(8)
        ]
    )
    assert power[..., 0].max() < 0.5 * power[..., 1].min()
    assert power[..., 1].std() < 0.01 * power[..., 1].mean()


@pytest.mark.parametrize("slot", [800, 1600, 5333, 16000])
@pytest.mark.parametrize("colour", [0, 3, 7])
def test_rhythm_is_the_texture(slot, colour):
    counts = [notes_in(voice(0, colour, 1, texture, slot)) for texture in range(3)]
    if slot >= 1600 or colour:  # at 50 ms a note of the lowest colour is two waves long
        assert counts == list(sound.NOTES)


@every_level
@settings(max_examples=20, deadline=None)
@given(seconds=lengths, seed=st.integers(0, 2**63))
def test_never_clipped_never_silent(difficulty, seconds, seed):
    scenes = sampled(8, difficulty, seed)
    clips = played(scenes, difficulty, seconds)
    assert clips.dtype == np.float32 and np.isfinite(clips).all()
    assert np.abs(clips).max() < 1.0
    slot = sound.samples_of(seconds) // DIFFICULTIES[difficulty].objects_max
    for i, clip in enumerate(clips):
        for k in range(scenes.count[i]):
            assert np.sqrt((clip[k * slot : (k + 1) * slot] ** 2).mean()) > 0.05
        rest = clip[scenes.count[i] * slot :]
        assert np.abs(rest).max(initial=0.0) <= 3.5 * DIFFICULTIES[difficulty].audio_noise


@pytest.mark.parametrize("seconds, slots", [(0.5, 3), (0.5, 10), (1.0, 10), (2.0, 3)])
def test_notes_have_no_clicks(seconds, slots):
    """Notes begin and end in silence, and rise so softly that next to nothing is heard above the harmonics."""
    bank = sound.bank(seconds, slots)
    assert bank.envelope.min() >= 0.0 and bank.envelope.max() <= 1.0
    assert (bank.envelope[:, [0, -1]] < 0.01).all()
    assert np.abs(np.diff(bank.envelope, axis=1)).max() < 0.05
    low = bank.wave[:, 0, None, :] * bank.envelope  # the lowest colour, whose harmonics end at 880 Hz
    power = np.abs(np.fft.rfft(low)) ** 2
    high = int(2500 * low.shape[-1] / SAMPLE_RATE)
    assert (power[..., high:].sum(-1) / power.sum(-1)).max() < 1e-5


@every_level
def test_noise_is_the_scenes_own_and_as_loud_as_the_level_says(difficulty):
    level = DIFFICULTIES[difficulty]
    scenes = sampled(32, difficulty)
    noisy, clean = played(scenes, difficulty, 1.0), played(scenes, difficulty, 1.0, 0.0)
    noise = noisy - clean
    assert noise.std() == pytest.approx(level.audio_noise, rel=0.03, abs=1e-7)
    assert abs(noise.mean()) < 0.02 * max(level.audio_noise, 1e-6)
    assert (played(scenes, difficulty, 1.0) == noisy).all()
    if level.audio_noise:
        assert np.abs(np.corrcoef(noise)[~np.eye(32, dtype=bool)]).max() < 0.2


@every_level
def test_plays_chosen_scenes_into_given_rows_only(difficulty):
    scenes, level = sampled(12, difficulty), DIFFICULTIES[difficulty]
    whole = played(scenes, difficulty, 0.7)
    out = np.full((5, whole.shape[1]), 9.0, np.float32)
    rows, chosen = np.array([4, 1]), np.array([7, 11])
    bank = sound.bank(0.7, level.objects_max)
    sound.sound_rows(scenes, chosen, bank, level.audio_noise, out, rows)
    assert (out[rows] == whole[chosen]).all()
    assert (np.delete(out, rows, 0) == 9.0).all()
