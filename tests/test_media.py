"""Panels for people, and the files they are written to."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmenvs import media
from mmenvs.files import replacing

RATE = 16_000


def picture(size: int = 64, value: int = 90) -> np.ndarray:
    return np.full((size, size, 3), value, np.uint8)


def tone(seconds: float, pitch: float = 440.0) -> np.ndarray:
    time = np.arange(int(seconds * RATE)) / RATE
    return (0.3 * np.sin(2 * np.pi * pitch * time)).astype(np.float32)


def ffmpeg(*arguments: str) -> bytes:
    from imageio_ffmpeg import get_ffmpeg_exe

    return subprocess.run(
        [get_ffmpeg_exe(), "-v", "error", *arguments], check=True, capture_output=True
    ).stdout


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 8),
    size=st.sampled_from([32, 64, 96, 224, 512]),
    texts=st.lists(st.text(max_size=120), max_size=6),
    seconds=st.sampled_from([None, 0.5, 1.0, 2.0]),
)
def test_panel_has_even_sides_and_is_deterministic(count, size, texts, seconds):
    lines = [(text, "black") for text in texts]
    audio = None if seconds is None else tone(seconds)
    one = media.panel([picture(size)] * count, lines, audio)
    assert one.dtype == np.uint8 and one.ndim == 3 and one.shape[2] == 3
    assert one.shape[0] % 2 == 0 and one.shape[1] % 2 == 0
    assert max(one.shape) < 2500
    np.testing.assert_array_equal(one, media.panel([picture(size)] * count, lines, audio))


def test_panel_keeps_its_size_whatever_is_asked():
    sizes = {
        media.panel([picture()] * count, [("word " * words, "black")] * lines).shape
        for count in (1,)
        for words in (1, 12)
        for lines in (0, 1, 4)
    }
    assert len(sizes) == 1


def test_panel_enlarges_pixels_sharply():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    panel = media.panel([noise], [])
    factor = 320 // 64
    enlarged = noise.repeat(factor, 0).repeat(factor, 1)
    windows = np.lib.stride_tricks.sliding_window_view(panel[:, :, 0], enlarged.shape[:2])
    assert (windows[10:40, 10:40] == enlarged[:, :, 0]).all((2, 3)).any()


@pytest.mark.parametrize("mark", ["green", "red"])
def test_panel_frames_the_marked_picture(mark):
    colour = np.array(media.COLOURS[mark])
    plain = media.panel([picture()] * 4, [])
    marked = media.panel([picture()] * 4, [], marks={2: mark})
    changed = (plain != marked).any(-1)
    columns = np.flatnonzero(changed.any(0))
    assert (marked[changed] == colour).all(-1).mean() > 0.8
    assert columns.min() > plain.shape[1] * 0.45 and columns.max() < plain.shape[1] * 0.77


def test_panel_shows_the_colour_of_each_line():
    panel = media.panel([picture()], [("right", "green"), ("wrong", "red")])
    for name in ("green", "red"):
        assert (panel == np.array(media.COLOURS[name], np.uint8)).all(-1).any()


def test_spectrogram_shows_the_pitch():
    low, high = (media.panel([picture()] * 2, [], tone(1.0, pitch)) for pitch in (400.0, 3000.0))
    strip = slice(16 + 56 + 8, 16 + 56 + 104)
    rows = [int(panel[strip, 50:600].astype(int).sum((1, 2)).argmax()) for panel in (low, high)]
    assert rows[0] > rows[1] + 30  # low notes stand further down


@pytest.mark.parametrize("audio", [np.zeros(8000, np.float32), np.ones(100, np.float32)])
def test_panel_of_silence_and_of_little_sound(audio):
    assert media.panel([picture()], [], audio).dtype == np.uint8


def test_panel_needs_a_picture():
    with pytest.raises(ValueError, match="pictures must hold one picture"):
        media.panel([], [])


def test_png_is_a_sheet(tmp_path):
    frames = [picture(32, value) for value in range(0, 240, 40)]
    path = media.write(tmp_path / "new" / "folder" / "sheet.png", frames)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (3 * 32, 2 * 32, 3)
    assert {int(value) for value in np.unique(sheet)} >= set(range(0, 240, 40))
    assert list(path.parent.iterdir()) == [path]


def test_gif_holds_frames_of_different_sizes(tmp_path):
    path = media.write(tmp_path / "a.gif", [picture(32, 0), picture(48, 255), picture(41, 100)], fps=2)
    with Image.open(path) as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"], gif.info["loop"]) == (3, (48, 48), 500, 0)


def test_mp4_keeps_the_sound(tmp_path):
    sound = np.concatenate([tone(1.0), np.zeros(RATE, np.float32), tone(1.0, 880.0)])
    frames = [picture(64, value) for value in (0, 120, 240)]
    path = media.write(tmp_path / "a.mp4", frames, fps=1, audio=sound, rate=RATE)
    heard = np.frombuffer(
        ffmpeg("-i", str(path), "-ac", "1", "-ar", str(RATE), "-f", "f32le", "-"), np.float32
    )
    heard = heard[: sound.size]
    rms = [float(np.sqrt((part**2).mean())) for part in np.array_split(heard, 3)]
    assert rms == pytest.approx([0.212, 0.0, 0.212], abs=0.02)
    for part, pitch in ((heard[:RATE], 440), (heard[2 * RATE :], 880)):
        assert abs(np.abs(np.fft.rfft(part)).argmax() * RATE / part.size - pitch) < 5
    seen = np.frombuffer(ffmpeg("-i", str(path), "-pix_fmt", "rgb24", "-f", "rawvideo", "-"), np.uint8)
    assert seen.reshape(3, -1).mean(1) == pytest.approx([0, 120, 240], abs=4)
    assert list(tmp_path.iterdir()) == [path]


def test_mp4_without_sound(tmp_path):
    path = media.write_mp4(tmp_path / "a.mp4", [picture(33)] * 4, fps=4)
    assert len(ffmpeg("-i", str(path), "-pix_fmt", "rgb24", "-f", "rawvideo", "-")) == 4 * 34 * 34 * 3


@pytest.mark.parametrize("name", ["a.jpg", "a", "a.avi"])
def test_unknown_suffix(tmp_path, name):
    with pytest.raises(ValueError, match=r"\.png, \.gif, \.mp4, got"):
        media.write(tmp_path / name, [picture()])


@pytest.mark.parametrize("suffix", media.SUFFIXES)
def test_no_frames(tmp_path, suffix):
    with pytest.raises(ValueError, match="frames must hold one frame"):
        media.write(tmp_path / f"a{suffix}", [])


@pytest.mark.parametrize("fps", [0, -1, float("nan"), 1000])
@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_bad_fps(tmp_path, suffix, fps):
    with pytest.raises(ValueError, match="fps must be above 0"):
        media.write(tmp_path / f"a{suffix}", [picture()], fps=fps)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError("the encoder said no"), "the encoder said no"),
        (OSError(28, "No space left"), "[Errno 28] No space left: '{}'"),
    ],
)
def test_an_error_while_a_file_is_written_says_what_and_where(tmp_path, error, told):
    with pytest.raises(OSError) as caught, replacing(tmp_path / "a.png"):
        raise error
    assert str(caught.value) == told.format(tmp_path / "a.png") and not list(tmp_path.iterdir())
