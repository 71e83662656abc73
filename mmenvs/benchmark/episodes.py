"""Episodes of a benchmark to look at and listen to: played again from the actions in the store."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gymnasium as gym
import numpy as np
from PIL import Image

from mmenvs.benchmark.board import Board
from mmenvs.registry import SPECS
from mmenvs.spaces import SAMPLE_RATE

EACH = 4  # episodes of a task
_MAX_STEPS = 1000


@dataclass(frozen=True)
class Episode:
    """One episode, played to its end.

    Attributes:
        agent, task: names.
        score: its return.
        success: whether the agent was right.
        picture: WebP, the end of the episode.
        sound: WAV, None for tasks without sound.
    """

    agent: str
    task: str
    score: float
    success: bool
    picture: bytes
    sound: bytes | None


def examples(board: Board) -> list[Episode]:
    """For each task some episodes of the best agent that trained on it, right and wrong ones if there are both."""
    trained = set(board.trained())
    order = [agent for agent in [*board.ranked, *board.unranked] if agent in trained]
    found = []
    for task in board.tasks:
        agent = next((agent for agent in order if (agent, task) in board.cells), None)
        if agent is not None:
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
        sound, total, ended = observation.get("audio"), 0.0, False
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
        agent, task, total, bool(info["is_success"]), file.getvalue(), None if sound is None else _wav(sound)
    )


def section(episodes: Sequence[Episode]) -> str:
    """HTML that shows them, with nothing outside it."""
    if not episodes:
        return ""
    figures = []
    for episode in episodes:
        verdict = "right" if episode.success else "wrong"
        text = escape(f"{episode.agent} on {episode.task}: {verdict}, return {episode.score:.2f}")
        sound = ""
        if episode.sound is not None:
            sound = f'<audio controls preload="metadata" src="{_data("audio/wav", episode.sound)}"></audio>'
        figures.append(
            f'<figure class="episode {verdict}"><img alt="{text}" loading="lazy" '
            f'src="{_data("image/webp", episode.picture)}">{sound}<figcaption>{text}</figcaption></figure>'
        )
    return (
        "<section><h2>Episodes</h2><p>Of the test split, by the best agent on each task, seed 0.</p>"
        f'<div class="figures">{"".join(figures)}</div></section>\n'
    )


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _wav(sound: Any) -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, np.clip(sound, -1, 1), SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return file.getvalue()
