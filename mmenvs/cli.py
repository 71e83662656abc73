"""The command line: ``mmenvs list | describe | show | evaluate | demo``; more in the other ``cli_*.py``."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
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
from mmenvs.files import out_folder
from mmenvs.registry import SPECS, task_class
from mmenvs.world.scene import SPLITS

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Multimodal reinforcement learning environments: vision, language and sound for Gymnasium.",
)
TRANSFORMER = "transformer"
_UNITS = {"k": 10**3, "m": 10**6, "b": 10**9}

Id = Annotated[str, typer.Argument(metavar="ID", help="Environment, such as MMRL/VQA-v0; see 'mmenvs list'.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a trained agent.")]
Split = Annotated[str, typer.Option(help="train, val, test or compositional.")]
Seed = Annotated[int, typer.Option(min=0, help="Names the episodes.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Source = Annotated[
    str | None, typer.Option(help="Real data in place of the world: vqav2:FOLDER or coco:FOLDER.")
]


@contextmanager
def user_errors() -> Iterator[None]:
    """What a user got wrong ends the command with one line and exit code 2."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError, gym.error.Error) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None


def agents(name: str) -> Any:
    """A module of the agents, which this package doesn't import by itself."""
    return importlib.import_module(f"mmenvs_agents.{name}")


def is_transformer(model: Any) -> bool:
    """Whether an agent is our own, or one of Stable-Baselines3."""
    return model.settings.algo == TRANSFORMER


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


def parse_list(option: str, text: str) -> list[str]:
    """The parts of a comma-separated list; a ``ValueError`` that names the option if there are none."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise ValueError(f"--{option} must name at least one, got {text!r}")
    return parts


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
    out: Annotated[Path, typer.Option(help="File that ends in .png, .gif or .mp4; MP4 has sound.")],
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
        media.check_path(out)
        task_class(id)
        env_kwargs: dict[str, Any] = {"split": split}
        if difficulty is not None:
            env_kwargs["difficulty"] = parse_difficulty(difficulty)
        if source is not None:
            env_kwargs["source"] = open_source(source, id)
        player: Any = agent
        if agent not in ("oracle", "random"):
            player, trained = load_agent(Path(agent), device, source)
            if player.settings.id != id:
                raise ValueError(f"the agent in {agent!r} was trained on {player.settings.id}, not on {id}")
            env_kwargs = {**trained, **env_kwargs}
            check_difficulty(id, trained, env_kwargs)
            whose = "mmenvs_agents.transformer" if is_transformer(player) else "mmenvs.embeddings"
            player = importlib.import_module(f"{whose}.watch").Watched(player)
        env = gym.make(id, render_mode="rgb_array", **env_kwargs)
    ends_only = out.suffix.lower() == ".png"
    frames, sound, returns, successes = media.play(env, player, episodes, seed, ends_only=ends_only)
    env.close()
    with user_errors():
        media.write(out, frames, media.FPS, sound)
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
    if as_json:
        document = {"folder": str(folder), "steps": model.num_timesteps}
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


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for what it leaves.")] = Path("runs/demo"),
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
    results = demonstration.run(out, total, device, seed, typer.echo)
    print_results(results)
    typer.echo(f"left in {out}: learning_curve.png, episodes.png, results.json, agent/ (the trained agent)")
    typer.echo(f"more pictures: mmenvs show {demonstration.ID} --agent {out / 'agent'} --out answers.gif")


def open_source(text: str, id: str) -> Any:
    """The reader of real data that ``--source`` names."""
    from mmenvs import datasets

    return datasets.open_source(text, id)


def load_agent(
    folder: Path, device: str, source: str | None, compile: bool = False
) -> tuple[Any, dict[str, Any]]:
    """The agent that ``train`` left in ``folder``, and the arguments of its environment.

    Args:
        folder: where it was saved.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        source: real data to use in place of those it was trained on.
        compile: of a transformer.
    """
    sb3 = agents("sb3")
    sb3.resolve_device(device)
    try:
        document = json.loads((folder / "settings.json").read_text())
        settings, kind = document["settings"], document.get("agent")
        id, saved = str(settings["id"]), dict(settings["env_kwargs"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        sb3.load(folder, device)  # says what is wrong with the folder
        raise
    text = source or saved.get("source")
    reader = {} if text is None else {"source": open_source(text, id)}
    if kind == TRANSFORMER:
        load = agents("transformer.agent").TransformerAgent.load
        model = load(folder, device=device, env_kwargs=reader, compile=compile)
    else:
        if compile:
            raise ValueError(f"compile is of --agent transformer, got it with {settings['algo']!r}")
        model = sb3.load(folder, device, reader)
    model.settings = replace(model.settings, env_kwargs=saved)
    return model, {**saved, **reader}


def check_difficulty(id: str, trained: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """That an agent which was trained with some arguments of the environment can look at it with others."""
    one, other = (gym.make(id, **kwargs).observation_space for kwargs in (trained, asked))
    if one != other:
        raise ValueError(
            f"difficulty of the agent's environment is {trained.get('difficulty', 0)}: the observations of "
            f"{asked['difficulty']} have other shapes"
        )


def load_vlm(folder: Path, device: str, source: str | None) -> tuple[Any, dict[str, Any]]:
    """The same of the model that ``finetune-vlm`` left in ``folder``."""
    policy = agents("vlm").load(folder, device, {} if source is None else {"source": source})
    return policy, dict(policy.episodes.env_kwargs)


def print_results(results: Mapping[str, Any]) -> None:
    """Tables of evaluations, one row for each agent."""
    console = Console()
    table = Table("agent", "success", "95 % interval", "return", "steps")
    for name, result in results.items():
        rate = result.success
        interval = f"{rate.low:.3f} to {rate.high:.3f}"
        table.add_row(
            name.replace("_", " "),
            f"{rate.value:.3f}",
            interval,
            f"{result.mean_return:.3f}",
            f"{result.mean_length:.1f}",
        )
    console.print(table)
    first = next(iter(results.values()))
    if first.by_type:
        table = Table("question", *(name.replace("_", " ") for name in results), "n")
        for kind, rate in first.by_type.items():
            shares = (f"{result.by_type[kind].value:.3f}" for result in results.values())
            table.add_row(kind.replace("_", " "), *shares, str(rate.n))
        console.print(table)


# They register their commands on ``app``, which they import from here.
from mmenvs import cli_benchmark, cli_embeddings, cli_train, cli_vlm  # noqa: F401
