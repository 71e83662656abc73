"""Saving agents of Stable-Baselines3, and loading them without executing anything."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import stable_baselines3
import torch
from gymnasium.error import NameNotFound
from stable_baselines3.common.base_class import BaseAlgorithm

from mmenvs.checks import check_env_kwargs, integer_in
from mmenvs.embeddings.joint import check_hashes, joint_hashes
from mmenvs.files import replacing

from ..curriculum import Curriculum, Progress
from ..saved import agents_folder, check_handed, kept_arguments, pack, saved_encoders, unpack, why_unfit
from .agent import episode_seed, face, make_agent, settings_of

FORMAT = 1


def save(agent: BaseAlgorithm, folder: str | os.PathLike[str]) -> None:
    """Write settings (JSON), weights (safetensors) and optimiser state into ``folder``.

    Weights and optimiser stand in files named after the step, and ``settings.json``, replaced last, names
    the step: a save that is cut off leaves the one before in place. A replay buffer isn't kept.

    Raises:
        ValueError, TypeError: if it is no folder, or holds another agent than this one, or other results.
    """
    path = agents_folder(folder, agent.folders)  # type: ignore[attr-defined]
    path.mkdir(parents=True, exist_ok=True)
    steps = agent.num_timesteps
    weights = agent.policy.state_dict()
    distinct = {name: weights[name] for name in set(_first_names(weights).values())}
    with replacing(path / f"weights_{steps}.safetensors") as file:
        file.write_bytes(pack(distinct))
    # In memory first: PyTorch doesn't say that a disk is full.
    state = io.BytesIO()
    torch.save(agent.policy.optimizer.state_dict(), state)
    with replacing(path / f"optimizer_{steps}.pt") as file:
        file.write_bytes(state.getbuffer())
    settings = asdict(replace(settings_of(agent), env_kwargs={}))
    # The command line keeps the name of a reader of real data.
    settings["env_kwargs"], handed = kept_arguments(settings_of(agent).env_kwargs)
    document = {
        "format": FORMAT,
        "steps": steps,
        "settings": settings,
        "handed": handed,
        "folder": os.path.abspath(path),
        "joints": joint_hashes(agent.policy),
        "progress": asdict(agent.progress),  # type: ignore[attr-defined]
        "versions": {"torch": torch.__version__, "stable_baselines3": stable_baselines3.__version__},
    }
    text = json.dumps(document, indent=2)
    with replacing(path / "settings.json") as file:
        file.write_text(text)
    agent.folders.add(path.resolve())  # type: ignore[attr-defined]
    for pattern in ("weights_*.safetensors", "optimizer_*.pt"):
        for old in path.glob(pattern):
            if old.stem.split("_")[1] != str(steps):
                old.unlink()


def _first_names(weights: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """For each name the first that holds the same tensor: policies know their extractor by three names."""
    first: dict[int, str] = {}
    return {name: first.setdefault(value.data_ptr(), name) for name, value in weights.items()}


def load(
    folder: str | os.PathLike[str], device: str = "auto", env_kwargs: Mapping[str, Any] | None = None
) -> BaseAlgorithm:
    """The agent that :func:`save` wrote, ready to predict or to be trained further.

    Args:
        folder: where it was saved.
        device: as for :func:`make_agent`.
        env_kwargs: takes the place of single saved arguments of the environment; a ``source`` of real data and a
            reward that is a function aren't saved and must be given here. The difficulty of a curriculum stays.

    Raises:
        FileNotFoundError: if the folder or one of its files is missing.
        ValueError: if the files are damaged or of another format, if it was trained on another joint embedding, or if
            ``env_kwargs`` lacks an argument that isn't saved.
    """
    path = Path(folder)
    if not (path / "settings.json").is_file():
        raise FileNotFoundError(
            f"no agent in {str(folder)!r}: there is no settings.json; 'mmenvs train' writes one, and 'mmenvs finetune-vlm' a "
            "vlm.json beside vision-language models"
        )
    check_env_kwargs(env_kwargs)
    problem = f"cannot load the agent in {str(folder)!r}: "
    try:
        document = json.loads((path / "settings.json").read_text())
        kind, found = document.get("agent"), document["format"]
    except KeyError as error:
        raise ValueError(f"{problem}settings.json is damaged: it lacks {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{problem}settings.json is damaged: it holds no settings of an agent: {error}"
        ) from error
    if kind == "transformer":
        raise ValueError(f"{problem}it is a transformer agent, which TransformerAgent.load reads")
    if found != FORMAT:
        raise ValueError(f"{problem}settings.json has format {found!r}, this version reads format {FORMAT}")
    try:
        settings = dict(document["settings"])
        steps, seed = integer_in("steps", document["steps"], 0, 10**15), settings["seed"]
        joints = dict(document.get("joints", {}))
        handed = [str(name) for name in document.get("handed", [])]
        progress = Progress(**document.get("progress", {}))
        if settings.get("curriculum") is not None:
            settings["curriculum"] = Curriculum(**settings["curriculum"])
            integer_in("level", progress.level, 0, settings["curriculum"].last)
        recipe = dict(settings.pop("recipe"))
        arguments = recipe.pop("arguments")
        arguments.pop("ent_coef", None)
        recipe["net_arch"] = tuple(recipe["net_arch"])
        settings["visible"] = None if settings["visible"] is None else tuple(settings["visible"])
        settings["env_kwargs"] = {**settings["env_kwargs"], **(env_kwargs or {})}
        settings["encoders"] = saved_encoders(settings["encoders"], document.get("folder"), path)
    except KeyError as error:
        raise ValueError(f"{problem}settings.json is damaged: it lacks {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{problem}settings.json is damaged: it holds no settings of an agent: {error}"
        ) from error
    check_handed(handed, env_kwargs)
    try:
        agent = make_agent(**settings, device=device, **recipe, **arguments)
    except (FileNotFoundError, NameNotFound, ImportError):
        raise
    except Exception as error:
        raise ValueError(f"{problem}its settings can't be used: {error}") from error
    try:
        check_hashes(agent.policy, joints, settings["encoders"])
    except ValueError as error:
        raise ValueError(f"{problem}{error}") from None
    for name in (f"weights_{steps}.safetensors", f"optimizer_{steps}.pt"):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{str(path / name)!r} is missing")
    try:
        weights, _ = unpack(path / f"weights_{steps}.safetensors", str(agent.device))
        state = torch.load(path / f"optimizer_{steps}.pt", map_location=agent.device, weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{problem}the file of its weights or of its optimiser is damaged: {error}"
        ) from error
    try:
        firsts = _first_names(agent.policy.state_dict())
        if weights.keys() - set(firsts.values()):
            raise ValueError("there are weights that it lacks")
        agent.policy.load_state_dict({name: weights[first] for name, first in firsts.items()})
        agent.policy.optimizer.load_state_dict(state)
    except Exception as error:
        raise ValueError(
            f"{problem}the weights in weights_{steps}.safetensors don't fit the agent of settings.json; "
            f"{why_unfit(env_kwargs)}"
        ) from error
    agent.num_timesteps = steps
    agent.folders.add(path.resolve())  # type: ignore[attr-defined]
    agent.progress = progress  # type: ignore[attr-defined]
    if settings.get("curriculum") is not None:
        face(agent, progress.level)
    # A resumed run must not see the episodes of its beginning again.
    agent.get_env().seed(episode_seed(seed, steps))  # type: ignore[union-attr]
    return agent
