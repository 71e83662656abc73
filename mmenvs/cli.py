"""The command line: ``mmenvs list | describe | show | train | evaluate | demo``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from mmenvs import media
from mmenvs.registry import SPECS, task_class
from mmenvs.spaces import SAMPLE_RATE

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Multimodal reinforcement learning environments: vision, language and sound for Gymnasium.",
)
_UNITS = {"k": 10**3, "m": 10**6, "b": 10**9}
_FPS = 4  # frames a second of animations; each picture of an episode is held for several

Id = Annotated[str, typer.Argument(metavar="ID", help="Environment, such as MMRL/VQA-v0; see 'mmenvs list'.")]
Split = Annotated[str, typer.Option(help="train, val, test or compositional.")]
Difficulty = Annotated[str, typer.Option(help="0 to 3.")]
Seed = Annotated[int, typer.Option(min=0, help="Names the episodes.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


@contextmanager
def user_errors() -> Iterator[None]:
    """What a user got wrong ends the command with one line and exit code 2."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, gym.error.Error) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None


def agents(name: str) -> Any:
    """A module of the agents, which this package doesn't import by itself."""
    return importlib.import_module(f"mmenvs_agents.{name}")


def parse_steps(text: str) -> int:
    """A positive whole number such as ``"200000"``, ``"200_000"``, ``"2e5"`` or ``"200k"``.

    Raises:
        ValueError: for anything else.
    """
    unit = _UNITS.get(text[-1:].lower(), 1)
    try:
        steps = float(text[:-1] if unit > 1 else text) * unit
    except ValueError:
        steps = float("nan")
    if not (1 <= steps < 1e15 and steps == int(steps)):
        raise ValueError(f"steps must be a positive whole number such as 200000, 2e5 or 200k, got {text!r}")
    return int(steps)


def parse_difficulty(text: str) -> int:
    """``"0"`` to ``"3"`` as an int, else a ``ValueError``."""
    if text not in ("0", "1", "2", "3"):
        raise ValueError(f"difficulty must be 0, 1, 2 or 3, got {text!r}")
    return int(text)


@app.command("list")
def list_() -> None:
    """Table of the environments."""
    table = Table("id", "what", "tags", "score")
    for spec in SPECS.values():
        page = inspect.getdoc(task_class(spec.id)) or ""
        text = page.split("## Description")[-1].split("\n## ")[0]
        sentence = " ".join(text.split()).split(". ")[0].rstrip(".") + "."
        table.add_row(spec.id, sentence, ", ".join(spec.tags), f"{spec.min_score:g} to {spec.max_score:g}")
    Console().print(table)


@app.command()
def describe(id: Id) -> None:
    """The page of an environment: observations, actions, rewards, arguments."""
    with user_errors():
        page = inspect.getdoc(task_class(id)) or ""
        env = gym.make(id)
    console = Console()
    console.print(Markdown(f"# {id}\n\n{page}"))
    console.print(Markdown("## Spaces with the default arguments"))
    for key, space in env.observation_space.items():  # type: ignore[attr-defined]
        console.print(f"  {key}: {space}", markup=False, highlight=False)
    console.print(f"  action: {env.action_space}", markup=False, highlight=False)
    env.close()


@app.command()
def show(
    id: Id,
    out: Annotated[Path, typer.Option(help="File that ends in .png, .gif or .mp4; MP4 has sound.")],
    episodes: Annotated[int, typer.Option(min=1, max=1000, help="How many episodes.")] = 8,
    agent: Annotated[str, typer.Option(help="oracle, random or the folder of a trained agent.")] = "oracle",
    split: Split = "test",
    difficulty: Difficulty = "0",
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Episodes as a sheet of pictures, an animation or a film."""
    with user_errors():
        media.check_path(out)
        task_class(id)
        kwargs = {"split": split, "difficulty": parse_difficulty(difficulty)}
        env = gym.make(id, render_mode="rgb_array", **kwargs)
        player = agent if agent in ("oracle", "random") else _load(agent, device, id)
    frames, sound, rewards, successes = play(
        env, player, episodes, seed, ends_only=out.suffix.lower() == ".png"
    )
    env.close()
    with user_errors():
        media.write(out, frames, _FPS, sound)
    typer.echo(f"{episodes} episodes: mean return {np.mean(rewards):.3f}, {sum(successes)} solved")
    typer.echo(f"written: {out}")


def play(
    env: gym.Env, agent: Any, episodes: int, seed: int, *, ends_only: bool = False
) -> tuple[list[media.Picture], npt.NDArray[np.float32] | None, list[float], list[bool]]:
    """Play episodes in front of a camera.

    Args:
        env: a single environment with ``render_mode="rgb_array"``.
        agent: ``"oracle"``, ``"random"`` or something with ``predict``.
        episodes: number of episodes.
        seed: seed of the first reset; also of the actions of ``"random"``.
        ends_only: one frame an episode, its end, in place of frames at ``_FPS``.

    Returns:
        Frames, the sound that belongs to them (None without sound), and return and success of each episode.
    """
    inner: Any = env.unwrapped
    generator = np.random.default_rng(seed)
    frames: list[media.Picture] = []
    sounds: list[npt.NDArray[np.float32]] = []
    returns, successes = [], []

    def hold(seconds: float) -> None:
        count = 1 if ends_only else max(1, round(seconds * _FPS))
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
        hold(2.0)
        returns.append(total)
        successes.append(bool(info["is_success"]))
        if audio is not None and not ends_only:
            track = np.zeros((len(frames) - before) * SAMPLE_RATE // _FPS, np.float32)
            track[: audio.size] = audio
            sounds.append(track)
    return frames, np.concatenate(sounds) if sounds else None, returns, successes
