"""Example episodes of the report that can be heard and seen: sound, and film with its sound."""

from __future__ import annotations

import base64
import re

import gymnasium as gym
import numpy as np
import pytest

from mmenvs import spaces
from mmenvs.benchmark import episodes
from mmenvs.registry import SPECS, register
from mmenvs.spaces import SAMPLE_RATE
from mmenvs.tasks.vqa import VQA

from .test_media import ffmpeg

FILM = "Test/Film-v0"
FRAMES, SIDE, SECONDS = 8, 32, 2


class Film(VQA):
    """VQA beside a film that becomes brighter, and a tone."""

    def __init__(self, num_envs, **kwargs):
        super().__init__(num_envs, **kwargs)
        self.observation_space.spaces["video"] = spaces.images(FRAMES, SIDE)
        self.observation_space.spaces["audio"] = spaces.audio(SECONDS * SAMPLE_RATE)

    def observe(self, rows, out):
        super().observe(rows, out)
        if "video" in out:
            out["video"][rows] = np.linspace(0, 255, FRAMES).astype(np.uint8)[:, None, None, None]
        if "audio" in out:
            out["audio"][rows] = np.sin(np.arange(SECONDS * SAMPLE_RATE) * 0.2) / 2


@pytest.fixture
def film():
    register(FILM, Film)
    yield episodes.replay("a", "t", {"id": FILM, "difficulty": 0}, {"seed": 0, "actions": [0]})
    del SPECS[FILM]
    del gym.registry[FILM]


def test_a_film_is_shown_with_its_sound(film, tmp_path):
    assert film.sound is None
    page = episodes.section([film])
    (data,) = re.findall(r'<video controls preload="metadata" src="data:video/mp4;base64,([^"]+)">', page)
    path = tmp_path / "film.mp4"
    path.write_bytes(base64.b64decode(data))
    seen = ffmpeg("-i", str(path), "-pix_fmt", "rgb24", "-f", "rawvideo", "-")
    brightness = np.frombuffer(seen, np.uint8).reshape(FRAMES, 256, 256, 3).mean((1, 2, 3))
    np.testing.assert_allclose(brightness, np.linspace(0, 255, FRAMES), atol=6)
    heard = np.frombuffer(
        ffmpeg("-i", str(path), "-ac", "1", "-ar", str(SAMPLE_RATE), "-f", "f32le", "-"), np.float32
    )
    assert heard.std() == pytest.approx(0.5 / 2**0.5, abs=0.03)
    assert len(heard) == pytest.approx(SECONDS * SAMPLE_RATE, rel=0.1)
    assert len(data) < 200_000


def test_a_page_stays_small(film, monkeypatch):
    assert film.size == len(film.picture) + len(film.film)
    monkeypatch.setattr(episodes, "MOST_BYTES", 2 * film.size + 10)
    page = episodes.section([film] * 3)
    assert page.count("<figure") == 2 and "1 episode would have made the page too large." in page
    assert "too large" not in episodes.section([film] * 2)
