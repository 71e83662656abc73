"""The command ``mmenvs distill``. ``mmenvs.cli`` registers it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from mmenvs.cli import (
    Device,
    Source,
    agents,
    app,
    encoders_of,
    is_transformer,
    load_agent,
    parse_steps,
    spokesman,
    user_errors,
)


@app.command()
def distill(
    teacher: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a trained transformer agent.")],
    out: Annotated[Path, typer.Option(help="Folder for the student and its logs.")],
    size: Annotated[str, typer.Option(help="Of the student: nano, small, base.")] = "nano",
    steps: Annotated[str, typer.Option(help="Steps of the environment, such as 1e6 or 200k.")] = "1e6",
    encoder: Annotated[
        str | None, typer.Option(help="As for 'train'; default: the teacher's encoders.")
    ] = None,
    num_envs: Annotated[int | None, typer.Option(min=1, help="Environments side by side.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, actions and episodes.")] = 0,
    device: Device = "auto",
    source: Source = None,
) -> None:
    """Distil a trained transformer agent into a smaller one, which plays and learns how its teacher would."""
    with user_errors():
        total = parse_steps(steps)
        if (out / "settings.json").exists() or (out.exists() and not out.is_dir()):
            raise ValueError(f"out must be a folder without an agent, got {str(out)!r}")
        model, kwargs = load_agent(teacher, device, source)
        if not is_transformer(model):
            raise ValueError(
                f"the teacher must be a transformer agent, {str(teacher)!r} is {model.settings.algo!r}"
            )
        id, saved = model.settings.id, model.settings.env_kwargs
        student = agents("transformer.distill").Student(
            model,
            size,
            encoders=None if encoder is None else encoders_of(encoder, id, saved.get("source")),
            recipe=agents("transformer.ppo").PPORecipe(
                **({} if num_envs is None else {"num_envs": num_envs})
            ),
            seed=seed,
            env_kwargs=kwargs,
        )
        student.settings = replace(student.settings, env_kwargs=saved)
        out.mkdir(parents=True, exist_ok=True)
        say = spokesman(student)
    say(f"{size} learns from {teacher} on {id}, {student.device}; logs: tensorboard --logdir {out}")
    finished = agents("transformer.agent").train(student, total, out)
    say(f"saved: {out} after {student.num_timesteps:,} steps")
    if not finished:
        raise typer.Exit(130)
    say(f"next: mmenvs evaluate {out}")
