"""Episodes of a benchmark to look at and listen to: played again from the actions in the store."""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from PIL import Image

from mmenvs import media
from mmenvs.benchmark.board import Board
from mmenvs.benchmark.summary import count
from mmenvs.registry import SPECS
from mmenvs.spaces import SAMPLE_RATE

EACH = 4  # episodes of a task
MOST_BYTES = 5 * 2**20  # of all of them, so that a page stays below 10 MB
_FILM_SIDE = 256  # pixels that small films are enlarged to
_MAX_STEPS = 1000


@dataclass(frozen=True)
class Episode:
    """One episode, played to its end.

    Attributes:
        agent, task: names.
        score: its return.
        success: whether the agent was right.
        picture: WebP, the end of the episode.
        sound: WAV, None for tasks without sound, or with a film, which has it.
        film: MP4 of the observation ``"video"``, None for tasks without one.
    """

    agent: str
    task: str
    score: float
    success: bool
    picture: bytes
    sound: bytes | None
    film: bytes | None = None

    @property
    def size(self) -> int:
        """Bytes of all that is shown."""
        return sum(len(part) for part in (self.picture, self.sound, self.film) if part is not None)


def examples(board: Board) -> list[Episode]:
    """For each task some episodes of the best agent that trained on it, right and wrong ones if there are both."""
    found = []
    for task in board.tasks:
        scores = {
            agent: np.mean([record.returns["test"].mean() for record in board.cells[agent, task]])
            for agent in board.trained()
            if (agent, task) in board.cells
        }
        if scores:
            agent = max(scores, key=scores.__getitem__)
            record = board.cells[agent, task][0]
            played = [replay(agent, task, record.run, example) for example in record.examples[:8]]
            found += _mixed([episode for episode in played if episode is not None])
    return found


def _mixed(episodes: Sequence[Episode]) -> list[Episode]:
    """Half of them right and half wrong, as far as there are."""
    right = [episode for episode in episodes if episode.success]
    wrong = [episode for episode in episodes if not episode.success]
    few = min(len(wrong), EACH // 2)
    chosen = right[: EACH - few]
    return chosen + wrong[: EACH - len(chosen)]


def replay(agent: str, task: str, run: dict[str, Any], example: dict[str, Any]) -> Episode | None:
    """Play the actions of a row again; None if they don't fit the environment, which isn't this version's then."""
    if run["id"] not in SPECS or len(example["actions"]) > _MAX_STEPS:
        return None
    try:
        env = gym.make(run["id"], split="test", difficulty=run["difficulty"], render_mode="rgb_array")
        observation, info = env.reset(seed=example["seed"])
        sound, film = observation.get("audio"), observation.get("video")
        total, ended = 0.0, False
        for action in example["actions"]:
            observation, reward, terminated, truncated, info = env.step(action)
            total, ended = total + float(reward), terminated or truncated
            if ended:
                break
        if not ended:
            return None
        picture: Any = env.render()
    except (ValueError, TypeError, gym.error.Error):
        return None
    env.close()
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="WEBP", quality=80)
    return Episode(
        agent,
        task,
        total,
        bool(info["is_success"]),
        picture=file.getvalue(),
        sound=None if sound is None or film is not None else _wav(sound),
        film=None if film is None else _mp4(film, sound),
    )


def section(episodes: Sequence[Episode]) -> str:
    """HTML that shows them, with nothing outside it."""
    if not episodes:
        return ""
    figures: list[str] = []
    room = MOST_BYTES
    for episode in episodes:
        room -= episode.size
        if room < 0:
            break
        verdict = "right" if episode.success else "wrong"
        text = escape(f"{episode.agent} on {episode.task}: {verdict}, return {episode.score:.2f}")
        played = ""
        if episode.sound is not None:
            played = f'<audio controls preload="metadata" src="{_data("audio/wav", episode.sound)}"></audio>'
        if episode.film is not None:
            played = f'<video controls preload="metadata" src="{_data("video/mp4", episode.film)}"></video>'
        figures.append(
            f'<figure class="episode {verdict}"><img alt="{text}" loading="lazy" '
            f'src="{_data("image/webp", episode.picture)}">{played}<figcaption>{text}</figcaption></figure>'
        )
    left = len(episodes) - len(figures)
    more = f" {count(left, 'episode')} would have made the page too large." if left else ""
    return (
        f"<section><h2>Episodes</h2><p>Of the test split, by the best agent on each task, seed 0.{more}</p>"
        f'<div class="figures">{"".join(figures)}</div></section>\n'
    )


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _mp4(film: Any, sound: Any) -> bytes:
    """Frames as long as their sound, or at the usual rate without one."""
    factor = max(1, _FILM_SIDE // film.shape[2])
    frames = list(film.repeat(factor, 1).repeat(factor, 2))
    fps = media.FPS if sound is None else len(frames) * SAMPLE_RATE / sound.shape[-1]
    with tempfile.TemporaryDirectory() as folder:
        return media.write_mp4(Path(folder) / "film.mp4", frames, fps, sound).read_bytes()


def _wav(sound: Any) -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, np.clip(sound, -1, 1), SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return file.getvalue()
