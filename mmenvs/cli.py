"""The command line: ``mmenvs list | describe | show | evaluate | demo``; more in the other ``cli_*.py``."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import numpy as np
import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Column, Table

from mmenvs import media
from mmenvs.benchmark.summary import count
from mmenvs.checks import one_of
from mmenvs.cli_app import (
    Device,
    Folder,
    Id,
    Seed,
    Source,
    Split,
    agents,
    app,
    check_difficulty,
    command,
    is_transformer,
    load_agent,
    load_vlm,
    open_source,
    parse_difficulty,
    parse_steps,
    path,
    print_results,
    user_errors,
)
from mmenvs.files import out_folder
from mmenvs.registry import SPECS, task_class
from mmenvs.world.scene import SPLITS

_SHEET = 150  # episodes of a PNG: Pillow warns of pictures of over 89 million pixels


@app.command("list")
def list_() -> None:
    """Table of the environments."""
    table = Table(Column("id", no_wrap=True), "what", "tags", Column("score", no_wrap=True))
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
    out: Annotated[
        Path, typer.Option(parser=path, help="File that ends in .png, .gif or .mp4; MP4 has sound.")
    ],
    episodes: Annotated[int, typer.Option(min=1, max=1000, help="How many episodes.")] = 8,
    agent: Annotated[str, typer.Option(help="oracle, random or the folder of a trained agent.")] = "oracle",
    split: Split = "test",
    difficulty: Annotated[str | None, typer.Option(help="0 to 3; default is the agent's, or 0.")] = None,
    source: Source = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Episodes as a sheet of pictures, an animation or a film; at their ends, what a trained agent looked at."""
    with user_errors():
        if media.check_path(out).suffix.lower() == ".png" and episodes > _SHEET:
            raise ValueError(
                f"episodes must be at most {_SHEET} for a .png, .gif and .mp4 take more, got {episodes}"
            )
        task_class(id)
        env_kwargs: dict[str, Any] = {"split": split}
        if difficulty is not None:
            env_kwargs["difficulty"] = parse_difficulty(difficulty)
        if source is not None:
            env_kwargs["source"] = open_source(source, id)
        player: Any = agent
        if agent in ("oracle", "random"):
            if device != "auto":
                from mmenvs.embeddings.embedding import resolve_device

                resolve_device(device)
        else:
            if not agent or not Path(agent).is_dir():
                raise FileNotFoundError(
                    f"no agent in {agent!r}: agent must be oracle, random or the folder of a trained one"
                )
            if (Path(agent) / "vlm.json").is_file():
                raise ValueError(
                    f"agent={agent!r} is a vision-language model, which 'mmenvs evaluate' plays, not 'show'"
                )
            player, trained = load_agent(Path(agent), device, source)
            if player.settings.id != id:
                raise ValueError(f"the agent in {agent!r} was trained on {player.settings.id}, not on {id}")
            env_kwargs = {**trained, **env_kwargs}
            check_difficulty(id, trained, env_kwargs)
            whose = "mmenvs_agents.transformer" if is_transformer(player) else "mmenvs.embeddings"
            player = importlib.import_module(f"{whose}.watch").Watched(player)
        env = gym.make(id, render_mode="rgb_array", **env_kwargs)
        out_folder(out.parent)
    ends_only = out.suffix.lower() == ".png"
    with user_errors():
        frames, sound, returns, successes = media.play(env, player, episodes, seed, ends_only=ends_only)
        env.close()
        media.write(out, frames, media.FPS, sound)
    gaze = getattr(player, "gaze", None)
    if gaze is not None and gaze.heat is None and gaze.weights is None:
        typer.echo(
            "what the agent looks at isn't drawn: fusion by cross_attention, transformer, weighted_sum and gated, and a "
            "transformer agent with a trunk of its own, tell it"
        )
    typer.echo(f"{count(episodes, 'episode')}: mean return {np.mean(returns):.3f}, {sum(successes)} solved")
    typer.echo(f"written: {out}")


@app.command()
def evaluate(
    folder: Folder,
    split: Split = "test",
    episodes: Annotated[int, typer.Option(min=1, help="How many episodes.")] = 2000,
    difficulty: Annotated[str | None, typer.Option(help="0 to 3; default is the one trained on.")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    source: Source = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")] = False,
) -> None:
    """Success of a trained agent with a 95 % interval, beside random, most frequent answer and oracle."""
    with user_errors():
        one_of("split", split, SPLITS)
        load = load_vlm if (folder / "vlm.json").is_file() else load_agent
        model, trained = load(folder, device, source)
        kwargs = dict(trained)
        if difficulty is not None:
            kwargs["difficulty"] = parse_difficulty(difficulty)
            check_difficulty(model.settings.id, trained, kwargs)
    evaluation = agents("evaluation")
    with user_errors():
        results = {
            name: evaluation.evaluate(
                player, model.settings.id, split=split, episodes=episodes, env_kwargs=kwargs, seed=seed
            )
            for name, player in {
                "agent": model,
                "random": "random",
                "most_frequent": "most_frequent",
                "oracle": "oracle",
            }.items()
        }
    rising = getattr(model.settings, "curriculum", None) is not None
    unread = model.unparsable / model.answers if hasattr(model, "unparsable") else None
    if as_json:
        document = {"folder": str(folder), "steps": model.num_timesteps}
        if unread is not None:
            document["unparsable"] = unread
        if rising:
            document["curriculum_difficulty"] = model.progress.level
        typer.echo(
            json.dumps(document | {name: result.to_dict() for name, result in results.items()}, indent=2)
        )
        return
    first = results["agent"]
    typer.echo(
        f"{first.id}, split {split}, difficulty {first.difficulty}, {count(episodes, 'episode')}, seed {seed}"
    )
    if rising:
        typer.echo(f"its curriculum had risen to difficulty {model.progress.level}")
    print_results(results)
    if unread is not None:
        typer.echo(f"answers that couldn't be read: {unread:.1%}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(parser=path, help="Folder for what it leaves.")] = Path("runs/demo"),
    steps: Annotated[str | None, typer.Option(help="Steps of training, such as 50k.")] = None,
    short: Annotated[bool, typer.Option(help="4,096 steps of training only, to see that it runs.")] = False,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of weights, actions and episodes.")] = 0,
) -> None:
    """An agent learns to answer questions about pictures, beside agents that are blind to one of the two."""
    from mmenvs import demo as demonstration

    with user_errors():
        budget = demonstration.SHORT_STEPS if short else demonstration.STEPS
        total = budget if steps is None else parse_steps(steps)
        agents("sb3").resolve_device(device)
        out_folder(out)
        if (out / "agent" / "settings.json").exists():
            raise ValueError(f"out={str(out)!r} holds the agent of a demo: choose another folder with --out")
    results = demonstration.run(out, total, device, seed, typer.echo)
    print_results(results)
    typer.echo(f"left in {out}: learning_curve.png, episodes.png, results.json, agent/ (the trained agent)")
    pictures = command("show", demonstration.ID, "--agent", out / "agent", "--out", "answers.gif")
    typer.echo(f"more pictures: {pictures}")


# They register their commands on ``app``, which the help lists after those above.
from mmenvs import cli_benchmark, cli_embeddings, cli_train, cli_vlm  # noqa: F401
