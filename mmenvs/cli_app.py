"""What the commands of ``cli*.py`` share: the app, arguments, how errors are told, how agents are loaded."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import typer
from rich.console import Console
from rich.table import Table

from mmenvs import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Multimodal reinforcement learning environments: vision, language and sound for Gymnasium.",
)
TRANSFORMER = "transformer"
_UNITS = {"k": 10**3, "m": 10**6, "b": 10**9}


def path(text: str | Path) -> Path:
    """An option that is a path: an empty one, as of a shell's variable that isn't set, would be the present folder."""
    if text == "":
        raise typer.BadParameter("it must be the path of a file or a folder, got ''")
    return Path(text)


Id = Annotated[str, typer.Argument(metavar="ID", help="Environment, such as MMRL/VQA-v0; see 'mmenvs list'.")]
Folder = Annotated[Path, typer.Argument(parser=path, metavar="DIR", help="Folder of a trained agent.")]
Split = Annotated[str, typer.Option(help="train, val, test or compositional.")]
Seed = Annotated[int, typer.Option(min=0, help="Names the episodes.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Source = Annotated[
    str | None, typer.Option(help="Real data in place of the world: vqav2:FOLDER or coco:FOLDER.")
]


_IMPORTED: list[str] = []  # by --import, which commands that go on with an agent need again


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"mmenvs {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print it and exit.")
    ] = False,
    modules: Annotated[
        list[str] | None,
        typer.Option(
            "--import",
            metavar="MODULE",
            help="Import a module before, such as one in this folder that registers tasks of yours. Once for each.",
        ),
    ] = None,
) -> None:
    _IMPORTED[:] = modules or []
    if _IMPORTED and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for module in _IMPORTED:
        if not all(part.isidentifier() for part in module.split(".")):
            raise typer.BadParameter(
                f"--import takes the name of a module, such as my_tasks of my_tasks.py, got {module!r}"
            )
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):  # it is one that the module itself imports
                raise
            raise typer.BadParameter(
                f"--import must name a module that is installed or in this folder, without .py, got {module!r}"
            ) from None


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


def command(*words: object) -> str:
    """A command of this package as a user types it."""
    imports = [word for module in _IMPORTED for word in ("--import", module)]
    return shlex.join(["mmenvs", *imports, *map(str, words)])


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
        raise ValueError(
            f"steps must be a whole number from 1 to under 1e15, such as 200000, 2e5 or 200k, got {text!r}"
        )
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


def open_source(text: str, id: str) -> Any:
    """The reader of real data that ``--source`` names."""
    from mmenvs import datasets

    return datasets.open_source(text, id)


def whole_source(text: str) -> str:
    """``--source`` with the whole path of its folder, so that an agent that was trained on it loads from anywhere."""
    reader, colon, place = text.partition(":")
    return f"{reader}:{os.path.abspath(place)}" if colon and place else text


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
    kind = None
    try:
        document = json.loads((folder / "settings.json").read_text())
        kind, settings = document.get("agent"), document["settings"]
        id, saved = str(settings["id"]), dict(settings["env_kwargs"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # It says what is wrong with the folder.
        (agents("transformer.agent").TransformerAgent if kind == TRANSFORMER else sb3).load(
            folder, device=device
        )
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
