"""Commands about embeddings: ``mmenvs pretrain | embed | compare``. ``mmenvs.cli`` registers them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmenvs.cli import Device, agents, app, parse_difficulty, parse_list, parse_steps, user_errors


@app.command()
def pretrain(
    out: Annotated[Path, typer.Option(help="Folder for weights, state and TensorBoard logs.")],
    modalities: Annotated[
        str, typer.Option(help="image and one or both of text, audio.")
    ] = "image,text,audio",
    steps: Annotated[str, typer.Option(help="Updates, such as 50000 or 50k.")] = "50k",
    batch: Annotated[int, typer.Option(min=2, help="Scenes, and questions, of an update.")] = 256,
    loss: Annotated[str, typer.Option(help="infonce or sigmoid.")] = "infonce",
    difficulties: Annotated[str, typer.Option(help="Levels of the world that take turns.")] = "0,1,2,3",
    seed: Annotated[int, typer.Option(min=0, help="Of weights and scenes.")] = 0,
    device: Device = "auto",
    resume: Annotated[bool, typer.Option(help="Go on with the run in --out.")] = False,
) -> None:
    """Train a joint embedding of pictures, words and sounds by contrastive learning on the world's train split."""
    sb3 = agents("sb3")
    with user_errors():
        from mmenvs.embeddings import pretraining

        name = sb3.resolve_device(device)
        settings = pretraining.PretrainSettings(
            modalities=tuple(parse_list(modalities)),
            loss=loss,
            steps=parse_steps(steps),
            batch=batch,
            difficulties=tuple(parse_difficulty(level) for level in parse_list(difficulties)),
            seed=seed,
            precision=sb3.default_precision(name),
        )
        if out.exists() and not out.is_dir():
            raise ValueError(f"out must be a folder, {str(out)!r} is a file")

        def report(step: int, means: dict[str, float]) -> None:
            accuracies = ", ".join(
                f"{key.removeprefix('accuracy/')} {value:.3f}"
                for key, value in means.items()
                if key.startswith("accuracy/")
            )
            typer.echo(
                f"{step:,} / {settings.steps:,}: {accuracies}; {means['scenes_per_second']:,.0f} scenes/s"
            )

        try:
            pretraining.pretrain(settings, out, device=name, resume=resume, report=report)
        except KeyboardInterrupt:
            typer.echo("stopped early; --resume goes on")
            raise typer.Exit(130) from None
    typer.echo(f"saved: {out / 'joint.safetensors'}")
