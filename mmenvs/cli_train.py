"""Commands that train: ``mmenvs train | pretrain-policy | distill``. ``mmenvs.cli`` registers them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import typer

from mmenvs.checks import one_of
from mmenvs.cli_app import (
    TRANSFORMER,
    Device,
    Id,
    Source,
    agents,
    app,
    command,
    is_transformer,
    load_agent,
    open_source,
    parse_difficulty,
    parse_steps,
    path,
    user_errors,
    whole_source,
)
from mmenvs.files import check_out, locked, out_folder
from mmenvs.registry import task_class


@app.command()
def train(
    id: Id,
    agent: Annotated[
        str | None,
        typer.Option(
            help="ppo (default), a2c, dqn; with sb3-contrib trpo, recurrent_ppo, qrdqn; or transformer, our own policy."
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Of the transformer: nano (default, 1 million parameters), small, base."),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hugging Face name of a causal language model as the transformer's trunk."
        ),
    ] = None,
    lora: Annotated[
        int | None, typer.Option(min=0, help="Rank of adapters of the backbone; 0 (default) trains it all.")
    ] = None,
    fusion: Annotated[
        str | None,
        typer.Option(
            help="cross_attention (default), transformer, concat, weighted_sum, gated, low_rank_bilinear, film, shared. "
            "Of the transformer agent, beside its trunk: concat (default) or another of these, or attention, the trunk alone."
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="Of every modality that has it: shapes (default of Stable-Baselines3's), cnn, vit, joint:DIR, hf:NAME, ..."
        ),
    ] = None,
    steps: Annotated[str, typer.Option(help="Steps of the environment, such as 1e6 or 200k.")] = "1e6",
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of weights, actions and episodes; default 0.")
    ] = None,
    device: Device = "auto",
    out: Annotated[
        Path | None, typer.Option(parser=path, help="Folder for agent and logs; default runs/ID_AGENT_SEED.")
    ] = None,
    difficulty: Annotated[str | None, typer.Option(help="0 (default) to 3.")] = None,
    split: Annotated[str | None, typer.Option(help="train (default), val, test or compositional.")] = None,
    num_envs: Annotated[int | None, typer.Option(min=1, help="Environments side by side.")] = None,
    curriculum: Annotated[
        bool,
        typer.Option(help="Begin at difficulty 0 and rise to --difficulty, 1 to 3, as the agent succeeds."),
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(help="Of the transformer's actions; default 1, over it explores more.")
    ] = None,
    compile: Annotated[bool, typer.Option(help="torch.compile the transformer's updates.")] = False,
    precision: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; default is what is fast on the device.")
    ] = None,
    algo: Annotated[
        str | None,
        typer.Option(
            help="Of the transformer: ppo (default), grpo, dr_grpo, dapo, rloo, scst, reinforce, dpo or supervised."
        ),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(parser=path, help="Folder of a transformer agent to begin with, see 'pretrain-policy'."),
    ] = None,
    kl: Annotated[
        float | None, typer.Option(help="Weight of the divergence from the transformer as it was at first.")
    ] = None,
    kl_target: Annotated[
        float | None, typer.Option(help="Nats a step of that divergence, which its weight is adapted to.")
    ] = None,
    penalty: Annotated[
        list[str] | None,
        typer.Option(help="Part of the score and its weight, such as repetition=0.5; may be repeated."),
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(help="Part of the score and its highest mean: hallucination=0.05; may be repeated."),
    ] = None,
    watch: Annotated[
        str | None,
        typer.Option(help="Part of the score, or return, to watch on the val split for reward hacking."),
    ] = None,
    source: Source = None,
    resume: Annotated[bool, typer.Option(help="Go on with the agent in --out, with its settings.")] = False,
) -> None:
    """Train an agent; Ctrl-C saves it, --resume goes on."""
    with user_errors():
        task_class(id)
        total = parse_steps(steps)
        level = None if difficulty is None else parse_difficulty(difficulty)
        out = out or Path("runs", f"{id.split('/')[-1]}_{agent or 'ppo'}_{seed or 0}")
        if resume:
            fixed = {"encoder": encoder, "init": init, "kl": kl, "kl_target": kl_target}
            for name, value in {**fixed, "penalty": penalty, "limit": limit}.items():
                if value is not None:
                    raise ValueError(f"{name} is the saved agent's with --resume, got {str(value)!r}")
            model, kwargs = load_agent(out, device, source, compile)
            asked: dict[str, Any] = {"id": id, "algo": agent, "fusion": fusion, "seed": seed, "size": size}
            asked |= {"precision": precision, "curriculum": curriculum or None}
            asked |= {"temperature": temperature, "method": algo}
            saved = {name: getattr(model.settings, name, None) for name in asked}
            asked |= {"difficulty": level, "split": split, "num_envs": num_envs}
            saved |= {"difficulty": kwargs.get("difficulty", 0), "split": kwargs.get("split", "train")}
            saved["num_envs"] = model.n_envs
            saved["curriculum"] = getattr(model.settings, "curriculum", None) is not None
            trunk = getattr(model.settings, "backbone", None)
            asked |= {"backbone": backbone, "lora": lora}
            saved |= {"backbone": trunk and trunk.source, "lora": trunk and trunk.lora}
            if backbone is not None and os.path.abspath(backbone) == saved["backbone"]:
                asked["backbone"] = saved["backbone"]
            for name, value in asked.items():
                if value not in (None, saved[name]):
                    what = {"algo": "", "method": "algo of "}.get(name, f"{name} of ")
                    raise ValueError(f"{what}the agent in {str(out)!r} is {saved[name]!r}, not {value!r}")
            if total <= model.num_timesteps:
                raise ValueError(f"steps must be over the {model.num_timesteps} already done, got {steps!r}")
        else:
            check_new(out)
            model = make_agent(
                id,
                "ppo" if agent is None else agent,
                source,
                fusion=fusion,
                num_envs=num_envs,
                own={
                    "size": size,
                    "backbone": backbone,
                    "lora": lora,
                    "compile": compile or None,
                    "curriculum": curriculum or None,
                    "temperature": temperature,
                    "algo": algo,
                    "init": init,
                    "kl": kl,
                    "kl_target": kl_target,
                    "penalty": penalty,
                    "limit": limit,
                },
                precision=precision,
                device=device,
                seed=seed or 0,
                env_kwargs={"difficulty": level or 0, "split": "train" if split is None else split},
                encoders=None if encoder is None else encoders_of(encoder, id, source, agent == TRANSFORMER),
            )
        if watch is not None and not is_transformer(model):
            raise ValueError(f"watch is of --agent transformer, got {watch!r} with {model.settings.algo!r}")
        alarm = None if watch is None else alarm_of(model, watch, source)
        begun = None if init is None else agents("transformer.saving").policy_settings(init)["trained_on"]
        out_folder(out, "agent")
        say = spokesman(model)
    say(f"{model.settings.algo} on {id}, {model.device}; logs: tensorboard --logdir {out}")
    if begun is not None:
        say(f"its policy is at first that of {init}, trained on {begun}")
    again: list[object] = [] if device == "auto" else ["--device", device]
    again += [] if watch is None else ["--watch", watch]
    finish(model, total, out, say, command("evaluate", out), alarm, again=[*again, *["--compile"] * compile])


@app.command("pretrain-policy")
def pretrain_policy(
    id: Id,
    out: Annotated[Path, typer.Option(parser=path, help="Folder for the agent and its logs.")],
    steps: Annotated[str, typer.Option(help="Steps of the oracle to learn from, such as 200k.")] = "100k",
    size: Annotated[str, typer.Option(help="Of the transformer: nano, small, base.")] = "nano",
    encoder: Annotated[str | None, typer.Option(help="As for 'train'.")] = None,
    fusion: Annotated[str | None, typer.Option(help="As for 'train --agent transformer'.")] = None,
    difficulty: Annotated[str, typer.Option(help="0 to 3.")] = "0",
    num_envs: Annotated[int | None, typer.Option(min=1, help="Environments side by side.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and episodes.")] = 0,
    device: Device = "auto",
) -> None:
    """Train a transformer to do what the oracle does, for 'train --init' to go on from."""
    with user_errors():
        task_class(id)
        total = parse_steps(steps)
        check_new(out)
        env_kwargs = {"difficulty": parse_difficulty(difficulty)}
        arguments = {"seed": seed, "device": device, "env_kwargs": env_kwargs}
        arguments["encoders"] = None if encoder is None else encoders_of(encoder, id, None, True)
        model = make_transformer(
            id, num_envs, {"size": size, "fusion": fusion, "algo": "supervised"}, arguments
        )
        out_folder(out, "agent")
        say = spokesman(model)
    say(f"{size} learns from the oracle of {id}, {model.device}; logs: tensorboard --logdir {out}")
    finish(
        model,
        total,
        out,
        say,
        command(
            "train", id, "--agent", "transformer", "--algo", "grpo", "--init", out,
            *(("--difficulty", difficulty) if env_kwargs["difficulty"] else ()),
        ),
    )  # fmt: skip


@app.command()
def distill(
    teacher: Annotated[
        Path, typer.Argument(parser=path, metavar="DIR", help="Folder of a trained transformer agent.")
    ],
    out: Annotated[Path, typer.Option(parser=path, help="Folder for the student and its logs.")],
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
        check_new(out)
        model, kwargs = load_agent(teacher, device, source)
        if not is_transformer(model):
            raise ValueError(
                f"the teacher must be a transformer agent, {str(teacher)!r} is {model.settings.algo!r}"
            )
        id, saved = model.settings.id, model.settings.env_kwargs
        student = agents("transformer.distill").Student(
            model,
            size,
            encoders=None if encoder is None else encoders_of(encoder, id, saved.get("source"), True),
            recipe=agents("transformer.ppo").PPORecipe(
                **({} if num_envs is None else {"num_envs": num_envs})
            ),
            seed=seed,
            env_kwargs=kwargs,
        )
        student.settings = replace(student.settings, env_kwargs=saved)
        out_folder(out, "agent")
        say = spokesman(student)
    say(f"{size} learns from {teacher} on {id}, {student.device}; logs: tensorboard --logdir {out}")
    stopped = "what it has learned is kept, and this would go on with PPO"
    finish(student, total, out, say, command("evaluate", out), stopped=stopped)


def make_agent(
    id: str,
    algo: str,
    source: str | None,
    *,
    env_kwargs: Mapping[str, Any],
    fusion: str | None,
    num_envs: int | None,
    own: Mapping[str, Any],
    **arguments: Any,
) -> Any:
    """A new agent; ``own`` are options of the transformer, None where they weren't given. With a source, its settings
    keep the text that names it in place of the open reader."""
    opened = {} if source is None else {"source": open_source(source, id)}
    arguments["env_kwargs"] = {**env_kwargs, **opened}
    one_of("agent", algo, (*agents("recipes").RECIPES, TRANSFORMER))
    if algo == TRANSFORMER:
        model = make_transformer(id, num_envs, {**own, "fusion": fusion}, arguments)
    else:
        own = dict(own)
        if own.pop("curriculum", False):
            arguments["curriculum"] = agents("curriculum").Curriculum(env_kwargs["difficulty"])
        for name, value in own.items():
            if value is not None:
                raise ValueError(f"{name} is of --agent transformer, got {str(value)!r} with {algo!r}")
        if num_envs is not None:
            arguments["num_envs"] = num_envs
        model = agents("sb3").make_agent(
            algo, id, fusion="cross_attention" if fusion is None else fusion, **arguments
        )
    if source is not None:
        model.settings = replace(model.settings, env_kwargs={**env_kwargs, "source": whole_source(source)})
    return model


def make_transformer(
    id: str, num_envs: int | None, own: Mapping[str, Any], arguments: Mapping[str, Any]
) -> Any:
    """A new transformer agent, see :func:`make_agent`."""
    given = {name: value for name, value in own.items() if value is not None}
    if "backbone" in given and "size" in given:
        raise ValueError(f"size is the backbone's own with --backbone, got {given['size']!r}")
    recipes = agents("transformer.algorithms").RECIPES
    method = one_of("algo", given.pop("algo", "ppo"), tuple(recipes))
    recipe = recipes[method] if num_envs is None else replace(recipes[method], num_envs=num_envs)
    restraints: dict[str, Any] = {name: given.pop(name) for name in ("kl", "kl_target") if name in given}
    for option, name in (("penalty", "penalties"), ("limit", "limits")):
        weights = [parse_weight(option, text) for text in given.pop(option, ())]
        restraints[name] = dict(weights)
        if len(restraints[name]) < len(weights):
            raise ValueError(f"{option} must name each part once, got {[part for part, _ in weights]}")
    if given.pop("curriculum", False):
        given["curriculum"] = agents("curriculum").Curriculum(arguments["env_kwargs"]["difficulty"])
    return agents("transformer.agent").TransformerAgent(
        id,
        method=method,
        recipe=recipe,
        restraints=agents("transformer.restraints").Restraints(**restraints),
        **given,
        **arguments,
    )


def parse_weight(option: str, text: str) -> tuple[str, float]:
    """The name and the number of ``"hallucination=0.05"``."""
    name, _, number = text.partition("=")
    try:
        return name.strip(), float(number)
    except ValueError:
        raise ValueError(
            f"{option} must be a part of the score and a number, such as hallucination=0.05, got {text!r}"
        ) from None


def alarm_of(model: Any, part: str, source: str | None) -> Any:
    """An alarm for ``--watch``, on the val split of the agent's environment with its own reward."""
    id, kwargs = model.settings.id, dict(model.settings.env_kwargs)
    allowed = (*model.parts, "return")
    one_of("watch", part, allowed)
    if source is not None or "source" in kwargs:
        kwargs["source"] = open_source(source or kwargs["source"], id)
    envs = gym.make_vec(id, num_envs=min(64, model.n_envs), **{**kwargs, "split": "val"})
    return agents("transformer.restraints").HackingAlarm(envs, part)


def spokesman(model: Any) -> Callable[[str], None]:
    """What prints a line, in the first of the processes that train together."""
    if is_transformer(model):
        return typer.echo if model.devices.main else lambda line: None
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"several processes are for --agent transformer, got {model.settings.algo!r}")
    return typer.echo


def encoders_of(encoder: str, id: str, source: str | None, own: bool) -> dict[str, str]:
    """``encoder`` for the observations whose modality has one of this name; the others take their default. A
    transformer (``own``) reads its own actions in the place of observations that repeat them."""
    from mmenvs.embeddings.encoders import encoders_named

    env: Any = gym.make(id, **({} if source is None else {"source": open_source(source, id)}))
    space = env.observation_space
    if own:
        history = task_class(id).history
        space = gym.spaces.Dict({name: part for name, part in space.items() if name not in history})
    env.close()
    return encoders_named(encoder, space)


def check_new(out: Path) -> None:
    """That there are no results in ``out``, of whatever kind."""
    check_out(out, "agent")
    if (out / "settings.json").exists():
        raise ValueError(
            f"out={str(out)!r} holds an agent: choose another folder, or go on with 'train --resume'"
        )


def finish(
    model: Any,
    total: int,
    out: Path,
    say: Callable[[str], None],
    following: str,
    alarm: Any = None,
    stopped: str = "this goes on",
    again: Sequence[object] = (),
) -> None:
    """Train an agent, and say what is in its folder then; ``again`` are options that aren't saved with it."""
    # Of processes that learn together the first one writes.
    alone = not is_transformer(model) or model.devices.main
    with user_errors(), locked(out, "training") if alone else nullcontext():
        if is_transformer(model):
            finished = agents("transformer.agent").train(model, total, out, alarm=alarm)
        else:
            finished = agents("sb3").train(model, total, out)
    say(f"saved: {out} after {model.num_timesteps:,} steps")
    if not finished and model.num_timesteps < total:
        goes_on = ("train", model.settings.id, "--out", out, "--steps", total, "--resume")
        say(f"stopped early; {stopped}: {command(*goes_on, *again)}")
        raise typer.Exit(130)
    say(f"next: {following}")
