"""Commands about embeddings: ``mmenvs pretrain | embed | compare``. ``mmenvs.cli`` registers them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from mmenvs.checks import one_of
from mmenvs.cli_app import (
    Device,
    Id,
    Source,
    Split,
    agents,
    app,
    command,
    load_agent,
    open_source,
    parse_difficulty,
    parse_list,
    parse_steps,
    path,
    user_errors,
)
from mmenvs.files import check_out
from mmenvs.registry import find_spec, task_class

Number = TypeVar("Number", int, float)


@app.command()
def pretrain(
    out: Annotated[Path, typer.Option(parser=path, help="Folder for weights, state and TensorBoard logs.")],
    modalities: Annotated[
        str | None, typer.Option(help="image and one or both of text, audio; default all.")
    ] = None,
    steps: Annotated[str | None, typer.Option(help="Updates, such as 50000 or 50k (default).")] = None,
    batch: Annotated[
        int | None, typer.Option(min=2, help="Scenes, and questions, of an update; 256.")
    ] = None,
    loss: Annotated[str | None, typer.Option(help="infonce (default) or sigmoid.")] = None,
    difficulties: Annotated[
        str | None, typer.Option(help="Levels of the world that take turns; 0,1,2,3.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of weights and scenes; 0.")] = None,
    device: Device = "auto",
    resume: Annotated[
        bool, typer.Option(help="Go on with the run in --out, with its settings; --steps may be more.")
    ] = False,
) -> None:
    """Train a joint embedding of pictures, words and sounds by contrastive learning on the world's train split."""
    sb3 = agents("sb3")
    with user_errors():
        from mmenvs.embeddings import pretraining

        name = sb3.resolve_device(device)
        given: dict[str, Any] = {"loss": loss, "batch": batch, "seed": seed}
        given["modalities"] = None if modalities is None else tuple(parse_list("modalities", modalities))
        given["steps"] = None if steps is None else parse_steps(steps)
        if difficulties is not None:
            given["difficulties"] = tuple(
                parse_difficulty(level) for level in parse_list("difficulties", difficulties)
            )
        given = {key: value for key, value in given.items() if value is not None}
        if resume:
            settings = replace(pretraining.read_settings(out)[0], **given)
        else:
            settings = pretraining.PretrainSettings(**given, precision=sb3.default_precision(name))

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
            saved = (out / pretraining.STATE).exists()
            again = f"this goes on: {command('pretrain', '--out', out, '--resume')}"
            typer.echo(f"stopped early; {again if saved else 'nothing was learned yet'}")
            raise typer.Exit(130) from None
    typer.echo(f"saved: {out}; wherever 'shapes' stands, 'joint:{out}' may")


@app.command()
def embed(
    id: Id,
    pool_size: Annotated[
        int | None,
        typer.Option(help="Scenes of the pool, pool_size= of the environment; 50000 without a source."),
    ] = None,
    out: Annotated[Path, typer.Option(parser=path, help="Folder of the cache.")] = Path("cache"),
    embedding: Annotated[
        str, typer.Option(help="shapes, joint:DIR, or the folder of a trained agent.")
    ] = "shapes",
    output: Annotated[str, typer.Option(help="pooled or tokens.")] = "pooled",
    split: Split = "train",
    difficulty: Annotated[str, typer.Option(help="0 to 3.")] = "0",
    image_size: Annotated[
        int | None, typer.Option(help="Pixels a side; default is the environment's.")
    ] = None,
    source: Source = None,
    arguments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Any other argument of the environment: candidates=3."
        ),
    ] = None,
    budget_mb: Annotated[int, typer.Option(min=1, help="Megabytes that the cache may take.")] = 2048,
    engine: Annotated[str, typer.Option(help="local, or ray for several machines.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="Of a running Ray cluster: auto or HOST:PORT; default is this machine.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Embed a pool of scenes, or all of a data set, into a cache for VectorEmbedObservation; the same command goes on after a stop."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from mmenvs import precompute
    from mmenvs.embeddings import EmbeddingCache
    from mmenvs.embeddings.embedding import NAMES
    from mmenvs.embeddings.extractor import extractor_in
    from mmenvs.embeddings.joint import PREFIX
    from mmenvs.env import load_and_check
    from mmenvs.wrappers import Encoder

    with user_errors():
        one_of("engine", engine, ("local", "ray"))
        if address is not None and engine != "ray":
            raise ValueError(f"address is for engine='ray', got {address!r} with engine={engine!r}")
        check_out(out, "cache")
        kwargs: dict[str, Any] = {"split": split, "difficulty": parse_difficulty(difficulty)}
        if image_size is not None:
            kwargs["image_size"] = image_size
        if pool_size is None and source is None:
            pool_size = precompute.POOL_SIZE
            typer.echo(f"a pool of {pool_size:,} scenes, as no --pool-size was given")
        if pool_size is not None:
            kwargs["pool_size"] = pool_size
        cls = task_class(id)
        kwargs |= _settings(arguments or [], kwargs)
        if source is not None:
            kwargs["source"] = open_source(source, id)
        task = load_and_check(cls, 256, "ids", {**find_spec(id).kwargs, **kwargs})
        chosen: Any = embedding
        if embedding not in NAMES and not embedding.startswith(PREFIX):
            if not embedding or not Path(embedding).is_dir():
                raise ValueError(
                    f"embedding must be {', '.join(map(repr, NAMES))}, '{PREFIX}DIR' or the folder of an agent; "
                    f"there is no folder {embedding!r}"
                )
            chosen = extractor_in(load_agent(Path(embedding), device, source)[0].policy)
        cache = EmbeddingCache(out, budget_mb)
        encoder = Encoder(chosen, task.observation_space, output, device, cache)  # type: ignore[arg-type]
        parts = precompute.parts_of(task, encoder)
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        try:
            if engine == "ray":
                from mmenvs.integrations import ray

                steps = precompute.embed_parts(
                    task, encoder, parts, partial(ray.on_ray, address=address), ray.SLICE
                )
            else:
                steps = precompute.embed_parts(task, encoder, parts)
            with Progress(*columns, refresh_per_second=2) as bar:
                line = bar.add_task("", total=sum(map(len, parts)))
                for done in steps:
                    bar.update(line, completed=done)
        except KeyboardInterrupt:
            typer.echo("stopped early; the same command goes on")
            raise typer.Exit(130) from None
        finally:
            cache.close()
    told = ", ".join(part.name if source is None else f"{len(part):,} x {part.name}" for part in parts)
    whose = f"{task.count_items():,} {'scenes' if source is None else 'items'}"
    typer.echo(f"{told} of {whose} in {out}: {precompute.cache_bytes(parts, encoder) / 2**20:.1f} MB")


def _settings(given: list[str], known: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an environment in texts such as ``candidates=3``; values are JSON, or else plain text."""
    settings: dict[str, Any] = {}
    for text in given:
        name, sign, value = text.partition("=")
        if not (name and sign and value):
            raise ValueError(f"--set must be NAME=VALUE such as candidates=3, got {text!r}")
        if name == "num_envs":
            raise ValueError(f"--set {text}: a pool has no num_envs")
        if name in settings or name in known or name == "source":
            raise ValueError(f"--set {text}: {name} is given twice, or has an option of its own")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return settings


@app.command()
def compare(
    envs: Annotated[str, typer.Option(help="Environments, such as MMRL/VQA-v0,MMRL/AudioVisualMatching-v0.")],
    embeddings: Annotated[
        str, typer.Option(help="ENCODER+FUSION, such as cnn+concat,shapes+transformer,hf:NAME+gated.")
    ],
    out: Annotated[
        Path, typer.Option(parser=path, help="Folder for rows and report; what it holds isn't run again.")
    ],
    algorithms: Annotated[str, typer.Option("--agents", help="Algorithms, such as ppo,a2c.")] = "ppo",
    seeds: Annotated[int, typer.Option(min=1, help="How many runs of each.")] = 3,
    steps: Annotated[str, typer.Option(help="Steps of training; several budgets: 50k,200k.")] = "200k",
    difficulty: Annotated[str, typer.Option(help="0 to 3; several: 0,1.")] = "0",
    image_size: Annotated[str, typer.Option(help="Sizes of pictures, such as 64,96.")] = "",
    seconds: Annotated[str, typer.Option(help="Lengths of sounds, such as 0.5,1.")] = "",
    filler: Annotated[
        str, typer.Option(help="Words that tell nothing before a question, such as 0,20.")
    ] = "",
    features_dim: Annotated[str, typer.Option(help="Widths of the fused vector, such as 128,256.")] = "",
    num_envs: Annotated[int | None, typer.Option(min=1, help="Environments side by side.")] = None,
    episodes: Annotated[int, typer.Option(min=4, help="Episodes of an evaluation.")] = 2000,
    budget: Annotated[
        str, typer.Option(help="For the recommendation, such as megabytes=20,milliseconds=2.")
    ] = "",
    device: Device = "auto",
) -> None:
    """Compare embeddings by reward, episode length, stability and efficiency; the same command goes on."""
    from mmenvs.benchmark import compare as comparison
    from mmenvs.benchmark.summary import count

    with user_errors():
        axes = {
            "difficulty": tuple(parse_difficulty(level) for level in parse_list("difficulty", difficulty)),
            "image_size": _numbers("image-size", image_size, int),
            "seconds": _numbers("seconds", seconds, float),
            "filler": _numbers("filler", filler, int),
        }
        grid = comparison.Grid(
            envs=tuple(parse_list("envs", envs)),
            embeddings=tuple(parse_list("embeddings", embeddings)),
            agents=tuple(parse_list("agents", algorithms)),
            seeds=seeds,
            steps=tuple(parse_steps(part) for part in parse_list("steps", steps)),
            env_axes={name: values for name, values in axes.items() if values},
            features_dim=_numbers("features-dim", features_dim, int),
            num_envs=num_envs,
            episodes=episodes,
        )
        pairs = [part.partition("=") for part in parse_list("budget", budget)] if budget else []
        names = [name for name, _, _ in pairs]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"budget names {twice[0]} twice, got {budget!r}")
        limits = {name: _numbers(f"budget {name}", value, float)[0] for name, _, value in pairs if value}
        if len(limits) < len(pairs):
            raise ValueError(f"budget must be such as megabytes=20,milliseconds=2, got {budget!r}")
        try:
            advice = comparison.compare(grid, out, device=device, budget=limits, say=typer.echo)
        except KeyboardInterrupt:
            typer.echo("stopped early; the same command goes on")
            raise typer.Exit(130) from None
        failed = comparison.unfinished(grid, out)
    typer.echo(f"written: {out / 'report.html'}, {out / 'report.md'}")
    typer.echo("no configuration has a score on every task" if advice is None else str(advice))
    if failed:
        typer.echo(
            f"{count(failed, 'run')} failed; the report says why, the same command tries again", err=True
        )
        raise typer.Exit(1)


def _numbers(name: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    """Numbers with commas between them; none of an empty text."""
    try:
        return tuple(kind(part) for part in parse_list(name, text)) if text else ()
    except ValueError:
        raise ValueError(f"{name} must be numbers with commas between them, got {text!r}") from None
