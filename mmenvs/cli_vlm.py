"""The command about vision-language models, ``mmenvs finetune-vlm``. ``mmenvs.cli`` registers it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mmenvs.cli_app import (
    Device,
    Id,
    Source,
    agents,
    app,
    command,
    parse_difficulty,
    parse_steps,
    path,
    print_results,
    user_errors,
    whole_source,
)
from mmenvs.files import replacing
from mmenvs.registry import task_class


@app.command("finetune-vlm")
def finetune_vlm(
    id: Id,
    model: Annotated[str, typer.Option(help="Folder or Hugging Face name of a vision-language model.")],
    out: Annotated[Path, typer.Option(parser=path, help="Folder for the model, its settings and its log.")],
    algo: Annotated[str, typer.Option(help="sft, grpo, rloo, dpo or ppo.")] = "grpo",
    lora: Annotated[int, typer.Option(help="Rank of the adapters; 0 trains all weights.")] = 16,
    steps: Annotated[str, typer.Option(help="Updates, such as 200 or 2k.")] = "200",
    batch: Annotated[int, typer.Option(help="Answers (dpo: pairs, sft: episodes) of an update.")] = 32,
    generations: Annotated[int, typer.Option(help="Answers to the same episode; not for ppo and sft.")] = 8,
    learning_rate: Annotated[float | None, typer.Option(help="Default: what is usual for --algo.")] = None,
    kl: Annotated[float | None, typer.Option(help="Weight of the divergence from the model before.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="With {question} and {options} filled in; default: the task's own.")
    ] = None,
    vllm: Annotated[
        str | None, typer.Option(help="Address of a 'trl vllm-serve', which answers in training.")
    ] = None,
    difficulty: Annotated[str, typer.Option(help="0 to 3.")] = "0",
    episodes: Annotated[
        int, typer.Option(min=0, help="Of the test split, before and after; 0 evaluates nothing.")
    ] = 500,
    source: Source = None,
    seed: Annotated[int, typer.Option(min=0, help="Of adapters, answers and episodes.")] = 0,
    device: Device = "auto",
) -> None:
    """Fine-tune a vision-language model on an environment, and show its success before and after."""
    agent, tuning = agents("vlm"), agents("vlm_finetuning")
    with user_errors():
        task_class(id)
        env_kwargs: dict[str, Any] = {"difficulty": parse_difficulty(difficulty)}
        if source is not None:
            env_kwargs["source"] = whole_source(source)
        serving = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": vllm}
        settings = agent.VLMSettings(
            id=id,
            model=model,
            algo=algo,
            lora=lora,
            steps=parse_steps(steps),
            batch=batch,
            generations=generations,
            learning_rate=learning_rate,
            kl=kl,
            prompt=prompt,
            seed=seed,
            env_kwargs=env_kwargs,
            arguments={} if vllm is None else serving,
        )
        opened = settings.episodes().env_kwargs
        tuning.check(settings)
        tuning.check_out(out)
        results: dict[str, Any] = {}
        unparsable: list[str] = []

        def measure(name: str, player: Any) -> None:
            results[name] = agents("evaluation").evaluate(
                player, id, split="test", episodes=episodes, env_kwargs=opened
            )
            if player is not name:
                unparsable.append(f"{name} {player.unparsable / player.answers:.1%}")

        if episodes:
            measure("zero-shot", agent.zero_shot(settings, device))
        finished = tuning.finetune(settings, out, device, typer.echo)
    typer.echo(f"saved: {out}")
    if episodes:
        with user_errors():
            measure("tuned", agent.load(out, device))
            for name in ("random", "most_frequent", "oracle"):
                measure(name, name)
        document = {name: result.to_dict() for name, result in results.items()}
        with replacing(out / "results.json") as file:
            file.write_text(json.dumps(document, indent=2))
        print_results(results)
        typer.echo(f"answers that couldn't be read: {', '.join(unparsable)}")
    if not finished:
        raise typer.Exit(130)
    typer.echo(f"next: {command('evaluate', out)}")
