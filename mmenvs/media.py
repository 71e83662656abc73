"""Pictures, animations and films of episodes for people."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from mmenvs.files import replacing
from mmenvs.gaze import BAR, Gaze, current, draw_weights, showing, tinted
from mmenvs.spaces import SAMPLE_RATE

Picture = npt.NDArray[np.uint8]
SUFFIXES = (".png", ".gif", ".mp4")
FPS = 4  # frames a second of what play() films; a picture is held for several

COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (28, 30, 36),
    "grey": (118, 124, 134),
    "green": (22, 138, 66),
    "red": (204, 44, 44),
}
_PAPER = (250, 250, 248)
_EDGE = (208, 210, 214)
_MARGIN, _GAP, _FRAME = 16, 14, 5
_FONT, _LEADING = 19, 27
_ONE, _MANY = 320, 192  # about how many pixels wide a lone picture is shown, and one of several
_TEXT_WIDTH = 400  # of the column beside a lone picture
_WAVE, _SPECTROGRAM = 56, 104  # heights of the two strips that show a sound
# Dark to bright, for the spectrogram: position along the ramp, red, green, blue.
_RAMP = np.array(
    [[0, 10, 8, 30], [0.35, 90, 24, 110], [0.65, 214, 68, 80], [0.85, 250, 160, 60], [1, 252, 246, 190]]
)


def panel(
    pictures: Sequence[Picture],
    lines: Sequence[tuple[str, str]],
    audio: npt.NDArray[np.float32] | None = None,
    marks: dict[int, str] | None = None,
    scale: int | None = None,
) -> Picture:
    """One picture of an episode for people.

    A lone picture has the text at its right; several are numbered from 0 in rows of four, with the text
    below. Room is kept for a few lines, so the panels of one environment have one size. Within
    :func:`mmenvs.gaze.showing` it shows what an agent looks at.

    Args:
        pictures: at least one, uint8 ``(h, w, 3)``, all of one shape.
        lines: (text, name of a colour in ``COLOURS``); long lines are wrapped at blanks.
        audio: float ``(T,)`` in [-1, 1], drawn as waveform and spectrogram.
        marks: colour name of the frame around a picture, by its index.
        scale: how many times a picture is enlarged; None chooses a readable size.

    Returns:
        uint8 ``(H, W, 3)`` with even H and W.
    """
    if not pictures:
        raise ValueError("pictures must hold one picture at least, got none")
    alone = len(pictures) == 1
    cells = [_enlarge(picture, _ONE if alone else _MANY, scale) for picture in pictures]
    gaze = current()
    if gaze.heat is not None:
        cells = tinted(cells, gaze.heat)
    columns = min(4, len(cells))
    width, height = cells[0].size
    step_x, step_y = width + _GAP + 2 * _FRAME, height + 2 * _FRAME + (0 if alone else _LEADING)
    grid_width, grid_height = columns * step_x - _GAP, math.ceil(len(cells) / columns) * step_y
    text_width = _TEXT_WIDTH if alone else max(grid_width, 2 * _TEXT_WIDTH - 100)
    wrapped = [(part, colour) for text, colour in lines for part in _wrap(text, text_width)]
    body = max(grid_width + _GAP + text_width if alone else text_width, grid_width)
    strip = 0 if audio is None else _WAVE + _SPECTROGRAM + 2 * _GAP
    if alone:
        text_x, text_y = _MARGIN + grid_width + _GAP, _MARGIN + strip
        bottom = text_y + max(grid_height, len(wrapped) * _LEADING)
    else:
        text_x, text_y = _MARGIN, _MARGIN + strip + grid_height + _GAP
        bottom = text_y + max(4, len(wrapped)) * _LEADING
    bar = 0 if gaze.weights is None else BAR
    caption = _wrap(gaze.caption, body) if gaze.caption else []
    size = (_even(body + 2 * _MARGIN), _even(bottom + len(caption) * _LEADING + bar + _MARGIN))
    image = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(image)
    if audio is not None:
        _draw_sound(image, np.asarray(audio, np.float32), _MARGIN, _MARGIN, body)
    for index, cell in enumerate(cells):
        x = _MARGIN + index % columns * step_x
        y = _MARGIN + strip + index // columns * step_y
        mark = (marks or {}).get(index)
        edge, border = (_EDGE, 1) if mark is None else (COLOURS[mark], _FRAME)
        inner = _FRAME - border
        draw.rectangle(
            (x + inner, y + inner, x + width + 2 * _FRAME - inner - 1, y + height + 2 * _FRAME - inner - 1),
            fill=edge,
        )
        image.paste(cell, (x + _FRAME, y + _FRAME))
        if not alone:
            label = COLOURS[mark] if mark else COLOURS["grey"]
            draw.text(
                (x + step_x // 2 - _GAP // 2, y + height + 2 * _FRAME + 3), str(index), label, _font(), "ma"
            )
    for number, (text, colour) in enumerate(wrapped):
        draw.text((text_x, text_y + number * _LEADING), text, COLOURS[colour], _font())
    for number, text in enumerate(caption):
        draw.text((_MARGIN, bottom + number * _LEADING + 4), text, COLOURS["grey"], _font())
    if gaze.weights is not None:
        below = bottom + len(caption) * _LEADING + _GAP
        draw_weights(draw, gaze.weights, _MARGIN, below, body, _font())
    return np.asarray(image)


def sheet(frames: Sequence[Picture], columns: int | None = None) -> Picture:
    """Frames side by side in rows, uint8 ``(H, W, 3)``; by default in a nearly square sheet."""
    frames = _same_size(frames)
    height, width = frames[0].shape[:2]
    columns = columns or max(1, min(len(frames), round(math.sqrt(len(frames) * height / width))))
    rows = math.ceil(len(frames) / columns)
    out = np.full((rows * height, columns * width, 3), _PAPER, np.uint8)
    for index, frame in enumerate(frames):
        row, column = divmod(index, columns)
        out[row * height : (row + 1) * height, column * width : (column + 1) * width] = frame
    return out


def write(
    path: str | os.PathLike[str],
    frames: Sequence[Picture],
    fps: float = 1.0,
    audio: npt.NDArray[np.float32] | None = None,
    rate: int = SAMPLE_RATE,
) -> Path:
    """Write frames in the format that the suffix of ``path`` names; see the writer of each format.

    Raises:
        ValueError: if the suffix isn't one of ``SUFFIXES`` or there are no frames.
    """
    suffix = check_path(path).suffix.lower()
    if suffix == ".png":
        return write_png(path, frames)
    if suffix == ".gif":
        return write_gif(path, frames, fps)
    return write_mp4(path, frames, fps, audio, rate)


def check_path(path: str | os.PathLike[str]) -> Path:
    """``path`` if it is no folder and its suffix names a format that can be written, else a ``ValueError`` that says so."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"the file must end in {', '.join(SUFFIXES)}, got {os.fspath(path)!r}")
    if Path(path).is_dir():
        raise ValueError(f"the file must not be a folder, got {os.fspath(path)!r}")
    return Path(path)


def write_png(path: str | os.PathLike[str], frames: Sequence[Picture], columns: int | None = None) -> Path:
    """Write all frames as one sheet."""
    with replacing(path) as temporary:
        Image.fromarray(sheet(frames, columns)).save(temporary, format="PNG", optimize=True)
    return Path(path)


def write_gif(path: str | os.PathLike[str], frames: Sequence[Picture], fps: float = 1.0) -> Path:
    """Write the frames as an animation that repeats for ever."""
    _check_fps(fps)
    images = [Image.fromarray(frame) for frame in _same_size(frames)]
    with replacing(path) as temporary:
        images[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=images[1:],
            duration=round(1000 / fps),
            loop=0,
        )
    return Path(path)


def write_mp4(
    path: str | os.PathLike[str],
    frames: Sequence[Picture],
    fps: float = 1.0,
    audio: npt.NDArray[np.float32] | None = None,
    rate: int = SAMPLE_RATE,
) -> Path:
    """Write the frames as an H.264 film.

    Args:
        path: file to write; its folder is made if needed.
        frames: uint8 ``(H, W, 3)``; smaller ones are padded to the largest and to even sides.
        fps: frames a second.
        audio: float ``(T,)`` in [-1, 1] that starts with the first frame; becomes AAC.
        rate: samples of ``audio`` a second.
    """
    _check_fps(fps)
    from moviepy import ImageSequenceClip

    clip = ImageSequenceClip([np.ascontiguousarray(frame) for frame in _same_size(frames)], fps=fps)
    with replacing(path) as temporary, tempfile.TemporaryDirectory() as folder:
        sound: str | bool = False
        if audio is not None:
            # moviepy resamples an array by itself and loses 16 kHz sound on the way; a file is passed on as it is.
            import soundfile

            sound = str(Path(folder) / "sound.wav")
            soundfile.write(sound, np.clip(audio, -1, 1), rate, subtype="PCM_16")
        clip.write_videofile(
            str(temporary), fps=fps, codec="libx264", audio=sound, audio_codec="aac", logger=None,
            ffmpeg_params=["-movflags", "+faststart"], pixel_format="yuv420p", temp_audiofile_path=folder,
        )  # fmt: skip
    clip.close()
    return Path(path)


def play(
    env: gym.Env, agent: Any, episodes: int, seed: int, *, ends_only: bool = False
) -> tuple[list[Picture], npt.NDArray[np.float32] | None, list[float], list[bool]]:
    """Play episodes in front of a camera.

    Args:
        env: a single environment with ``render_mode="rgb_array"``.
        agent: ``"oracle"``, ``"random"`` or something with ``predict``; if it has a ``gaze`` too, the end of an
            episode shows what it looked at last.
        episodes: number of episodes.
        seed: seed of the first reset; also of the actions of ``"random"``.
        ends_only: one frame an episode, its end, in place of frames at ``FPS``.

    Returns:
        Frames, the sound that belongs to them (None without sound), and return and success of each episode.
    """
    inner: Any = env.unwrapped
    generator = np.random.default_rng(seed)
    frames: list[Picture] = []
    sounds: list[npt.NDArray[np.float32]] = []
    returns, successes = [], []

    def hold(seconds: float) -> None:
        count = 1 if ends_only else max(1, round(seconds * FPS))
        frames.extend([np.asarray(env.render())] * count)

    for episode in range(episodes):
        observation, info = env.reset(seed=seed if episode == 0 else None)
        before = len(frames)
        audio = observation.get("audio")
        total, ended, state, start = 0.0, False, None, True
        if not ends_only:
            hold(2.0 if audio is None else audio.size / SAMPLE_RATE + 0.75)
        while not ended:
            if agent == "oracle":
                action = inner.oracle_action()
            elif agent == "random":
                action = int(generator.integers(int(env.action_space.n)))  # type: ignore[attr-defined]
            else:
                chosen, state = agent.predict(
                    observation, state=state, episode_start=np.array([start]), deterministic=True
                )
                action = int(chosen)
            observation, reward, terminated, truncated, info = env.step(action)
            total, start, ended = total + float(reward), False, terminated or truncated
            if not ended and not ends_only:
                hold(0.25)
        with showing(getattr(agent, "gaze", Gaze())):
            hold(2.0)
        returns.append(total)
        successes.append(bool(info["is_success"]))
        if audio is not None and not ends_only:
            track = np.zeros((len(frames) - before) * SAMPLE_RATE // FPS, np.float32)
            track[: audio.size] = audio
            sounds.append(track)
    return frames, np.concatenate(sounds) if sounds else None, returns, successes


def _check_fps(fps: float) -> None:
    if not 0 < fps <= 100:
        raise ValueError(f"fps must be above 0 and at most 100, got {fps!r}")


def _even(value: int) -> int:
    return value + value % 2


def _same_size(frames: Sequence[Picture]) -> list[Picture]:
    """Frames padded with paper at the right and the bottom to the largest, with even sides."""
    if not len(frames):
        raise ValueError("frames must hold one frame at least, got none")
    height = _even(max(frame.shape[0] for frame in frames))
    width = _even(max(frame.shape[1] for frame in frames))
    out = []
    for frame in frames:
        if frame.shape != (height, width, 3):
            padded = np.full((height, width, 3), _PAPER, np.uint8)
            padded[: frame.shape[0], : frame.shape[1]] = frame
            frame = padded
        out.append(frame)
    return out


@lru_cache(maxsize=1)
def _font() -> Any:
    return ImageFont.load_default(_FONT)


def _wrap(text: str, width: int) -> list[str]:
    """``text`` in lines of at most ``width`` pixels, broken at blanks."""
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and _font().getlength(longer) > width:
            lines.append(line)
            longer = word
        line = longer
    return [*lines, line]


def _enlarge(picture: Picture, target: int, scale: int | None) -> Image.Image:
    """Whole multiples of small pictures keep their pixels sharp; only larger ones than fit are reduced."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    if scale is None and image.width > 2 * target:
        return image.resize((target, round(image.height * target / image.width)), Image.Resampling.LANCZOS)
    factor = scale or max(1, round(target / image.width))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _draw_sound(image: Image.Image, audio: npt.NDArray[np.float32], x: int, y: int, width: int) -> None:
    """Waveform above spectrogram, ``width`` pixels wide, both from the first sample to the last."""
    edges = np.linspace(0, audio.size, width + 1).astype(np.int64)
    starts = np.minimum(edges[:-1], audio.size - 1)
    high, low = np.maximum.reduceat(audio, starts), np.minimum.reduceat(audio, starts)
    # Quiet sounds are enlarged, so that their rhythm can be seen.
    peak = max(float(np.abs(audio).max()), 1e-3)
    middle = _WAVE / 2
    wave = np.full((_WAVE, width, 3), 255, np.uint8)
    level = middle - 0.5 - np.arange(_WAVE)[:, None]
    wave[(level <= high / peak * middle + 0.5) & (level >= low / peak * middle - 0.5)] = (54, 96, 168)
    image.paste(Image.fromarray(wave), (x, y))
    window = 512
    padded = np.pad(audio, (window // 2, window))
    centres = np.linspace(0, audio.size - 1, width).astype(np.int64)
    frames = padded[centres[:, None] + np.arange(window)] * np.hanning(window)
    power = np.abs(np.fft.rfft(frames)).T[1:177] ** 2  # up to 5.5 kHz, where the voices are
    decibel = 10 * np.log10(power + 1e-10)
    bright = np.clip((decibel - decibel.max() + 60) / 60, 0, 1)[::-1]
    colour = np.stack([np.interp(bright, _RAMP[:, 0], _RAMP[:, 1 + c]) for c in range(3)], -1).astype(
        np.uint8
    )
    strip = Image.fromarray(colour).resize((width, _SPECTROGRAM), Image.Resampling.BILINEAR)
    image.paste(strip, (x, y + _WAVE + _GAP // 2))
