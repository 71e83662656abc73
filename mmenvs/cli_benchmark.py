"""Commands of the benchmark: ``mmenvs benchmark | report | tune``. ``mmenvs.cli`` registers them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from mmenvs.cli_app import (
    Device,
    Id,
    app,
    command,
    parse_difficulty,
    parse_list,
    parse_steps,
    path,
    user_errors,
)

_LAST = 8  # finished runs that the live table shows
_TABLE = 80  # columns of a terminal that it fits into


@app.command()
def benchmark(
    suite: Annotated[
        str | None,
        typer.Option(
            help="core (default), audio, sequential, generalization, full; or with a version, core-v0."
        ),
    ] = None,
    algorithms: Annotated[
        str | None,
        typer.Option(
            "--agents",
            help="Such as ppo,a2c,dqn,recurrent_ppo,transformer,blind; random, most_frequent and oracle always run.",
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="module:Class of your own, anything with predict(), or hf:MODEL, a vision-language model; may be "
            "repeated."
        ),
    ] = None,
    embeddings: Annotated[
        str | None, typer.Option(help="ENCODER+FUSION, such as cnn+concat (default),shapes+cross_attention.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="How many runs of each; default is the suite's.")
    ] = None,
    out: Annotated[Path | None, typer.Option(parser=path, help="Folder for the results.")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            parser=path, help="Go on in this folder with its settings; options that are given change them."
        ),
    ] = None,
    steps: Annotated[
        str | None, typer.Option(help="Steps of training in place of the suite's budgets.")
    ] = None,
    episodes: Annotated[
        int | None, typer.Option(min=8, help="Episodes of an evaluation in place of the suite's.")
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray for several machines.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster, auto or HOST:PORT; default: this machine alone.")
    ] = None,
    gpus: Annotated[float, typer.Option(help="With ray and cuda: GPUs of a run, such as 0.25.")] = 1.0,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes side by side (default 1); Ray fills its machines.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of torch and numba in each process.")] = 1,
    timeout: Annotated[float, typer.Option(help="Seconds that a run may take.")] = 7200.0,
    mix: Annotated[bool, typer.Option("--mix", help="Add to rows of another version of the code.")] = False,
    device: Annotated[str | None, typer.Option(help="auto (default), cpu or cuda.")] = None,
) -> None:
    """Run a suite: agents x embeddings x tasks x seeds. --resume does what is missing, and what failed again."""
    from mmenvs.benchmark import players, runner
    from mmenvs.benchmark.plan import NAME, Plan
    from mmenvs.benchmark.summary import count

    with user_errors():
        if (out is None) == (resume is None):
            both = "" if out is None else ", not both"
            raise ValueError(f"either --out, for a new benchmark, or --resume, to go on, must be given{both}")
        folder = resume or out
        assert folder is not None
        plan = Plan() if resume is None else Plan.load(resume)
        agents = None if algorithms is None else tuple(parse_list("agents", algorithms))
        if policy:
            agents = tuple(dict.fromkeys((*(agents or plan.agents), *map(players.policy_name, policy))))
        given: dict[str, Any] = {
            "suite": suite,
            "agents": agents,
            "embeddings": None if embeddings is None else tuple(parse_list("embeddings", embeddings)),
            "seeds": seeds,
            "steps": None if steps is None else parse_steps(steps),
            "episodes": episodes,
            "device": device,
        }
        plan = replace(plan, **{key: value for key, value in given.items() if value is not None})
        if engine == "ray" and workers is not None:
            raise ValueError(f"workers is for engine='local', got {workers}: Ray fills the machines it has")
        options: dict[str, Any] = {
            "resume": resume is not None, "workers": workers or 1, "threads": threads, "timeout": timeout, "mix": mix,
            "engine": engine, "address": address, "gpus": gpus,
        }  # fmt: skip
        try:
            if Console().is_terminal and Console().width >= _TABLE:
                with LiveTable() as table:
                    failed = runner.benchmark(plan, folder, watcher=table, **options)
            else:
                failed = runner.benchmark(plan, folder, watcher=runner.Lines(typer.echo), **options)
        except KeyboardInterrupt:
            begun = (folder / NAME).exists()
            following = command("benchmark", "--resume", folder)
            typer.echo(f"stopped early; go on with: {following}" if begun else "stopped")
            raise typer.Exit(130) from None
    typer.echo(f"next: {command('report', folder, '--out', 'report/')}")
    if failed:
        again = "it" if failed == 1 else "them"
        typer.echo(
            f"{count(failed, 'run')} failed; the report says why, --resume tries {again} again", err=True
        )
        raise typer.Exit(1)


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(parser=path, metavar="DIR", help="Folder that 'mmenvs benchmark' wrote.")
    ],
    out: Annotated[Path, typer.Option(parser=path, help="Folder for the report.")] = Path("report"),
) -> None:
    """Leaderboard, curves, comparisons and episodes of a benchmark: one HTML page, Markdown, CSV and SVG."""
    from mmenvs.benchmark import results

    with user_errors():
        written = results.write(folder, out)
    typer.echo(f"written to {out}: {', '.join(written)}")


@app.command()
def tune(
    id: Id,
    out: Annotated[
        Path, typer.Option(parser=path, help="Folder for the trials and best.json; a search there goes on.")
    ],
    agent: Annotated[
        str, typer.Option(help="ppo, a2c, dqn; with sb3-contrib trpo, recurrent_ppo, qrdqn.")
    ] = "ppo",
    trials: Annotated[int, typer.Option(min=1, help="How many in all; the first is the recipe itself.")] = 20,
    steps: Annotated[str, typer.Option(help="Of training of a trial, such as 50k.")] = "50k",
    episodes: Annotated[int, typer.Option(min=1, help="Of the val split, by which a trial is scored.")] = 500,
    difficulty: Annotated[str, typer.Option(help="0 to 3.")] = "0",
    seed: Annotated[int, typer.Option(min=0, help="Of the search, weights, actions and episodes.")] = 0,
    device: Device = "auto",
) -> None:
    """Search the settings of a recipe with Optuna, on the val split only; the same command goes on after a stop."""
    with user_errors():
        from mmenvs.benchmark import tune as tuning

        search = tuning.Search(
            id, parse_difficulty(difficulty), agent, parse_steps(steps), episodes=episodes, seed=seed
        )
        try:
            best = tuning.tune(search, trials, out, device, typer.echo)
        except KeyboardInterrupt:
            typer.echo("stopped early; the same command goes on")
            raise typer.Exit(130) from None
    usual = best["usual_score"]
    beside = "" if usual is None else f", {usual:.3f} with the recipe as it is"
    typer.echo(f"best: trial {best['trial']}, mean return {best['score']:.3f} on the val split{beside}")
    typer.echo(f"written: {out / tuning.BEST}; to train with it:\n\n{tuning.usage(best)}")


class LiveTable:
    """One table of what runs now and what was done last; a watcher of the runner."""

    def __init__(self) -> None:
        self.live = Live(refresh_per_second=2)
        self.running: dict[str, Any] = {}
        self.finished: list[tuple[str, str]] = []
        self.started: dict[str, float] = {}

    def __enter__(self) -> LiveTable:
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def begin(self, runs: int, done: int, changes: Sequence[str]) -> None:
        """As ``Watcher.begin``."""
        for change in changes:
            self.live.console.print(Text(f"the plan is changed: {change}"))
        self.total, self.number, self.at = runs, done, time.monotonic()
        self.before = done
        self._draw()

    def progress(self, event: Any) -> None:
        """As ``Watcher.progress``."""
        from mmenvs.benchmark.runner import run_name

        key = run_name(event.run)
        self.started.setdefault(key, time.monotonic())
        self.running[key] = event
        self._draw()

    def done(self, event: Any) -> None:
        """As ``Watcher.done``."""
        from mmenvs.benchmark.runner import outcome, run_name

        self.running.pop(run_name(event.run), None)
        self.number += 1
        self.finished = [*self.finished[1 - _LAST :], (run_name(event.run), outcome(event))]
        self._draw()

    def _draw(self) -> None:
        from mmenvs.benchmark.runner import run_name

        done = self.number - self.before + sum(event.share for event in self.running.values())
        left = (
            (time.monotonic() - self.at) * (self.total - self.before - done) / done if done > 0.05 else None
        )
        title = f"{self.number} of {self.total} runs, about {_duration(left)} left"
        table = Table("run", Column("", width=24), "left", "score", title=title)
        # Names and messages are text, whatever brackets and colons are in them.
        for name, result in self.finished:
            table.add_row(Text(name), "", "", Text(result))
        for key, event in self.running.items():
            table.add_row(
                Text(run_name(event.run)),
                ProgressBar(total=1.0, completed=event.share, width=24),
                _duration(self._left(key, event)),
                "" if event.score is None else f"{event.score:.3f}",
            )
        self.live.update(table)

    def _left(self, key: str, event: Any) -> float | None:
        spent = time.monotonic() - self.started[key]
        return spent * (1 / event.share - 1) if event.share > 0.01 else None


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    return (
        f"{seconds / 3600:.1f} h"
        if seconds >= 3600
        else f"{seconds / 60:.0f} min"
        if seconds >= 120
        else f"{seconds:.0f} s"
    )
