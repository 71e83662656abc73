"""Saving agents, loading them, and beginning with another's policy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gymnasium.error import NameNotFound
from torch import Tensor

from mmenvs.checks import check_env_kwargs, integer_in, one_of
from mmenvs.embeddings.embedding import resolve_device
from mmenvs.embeddings.joint import check_hashes, joint_hashes
from mmenvs.embeddings.optimizers import load_state_tensors, state_tensors

from ..curriculum import Curriculum, Progress
from ..saved import agents_folder, check_handed, kept_arguments, saved_encoders, why_unfit
from . import checkpoint
from .algorithms import RECIPES
from .config import ATTENTION, Backbone, ModelConfig
from .devices import check_compile
from .model import TransformerPolicy
from .restraints import Restraints
from .rollout import Envs

if TYPE_CHECKING:
    from .agent import TransformerAgent


def save(agent: TransformerAgent, folder: str | os.PathLike[str]) -> None:
    """See :meth:`TransformerAgent.save`."""
    path = agents_folder(folder, agent.folders)
    settings = asdict(replace(agent.settings, env_kwargs={}))
    # The command line keeps the name of a reader of real data.
    settings["env_kwargs"], others = kept_arguments(agent.settings.env_kwargs)
    settings["handed"] = sorted({*others, *agent.handed} - settings["env_kwargs"].keys())
    settings["folder"] = os.path.abspath(folder)
    settings["joints"] = joint_hashes(agent.policy)
    tensors = {f"policy.{name}": value for name, value in agent.policy.state_dict().items()}
    if agent.reference is not None:
        tensors |= {f"reference.{name}": value for name, value in agent.reference.state_dict().items()}
    if agent.memory is not None:
        tensors |= {f"memory.{name}": value for name, value in agent.memory.tensors.items()}
    counters = {"steps": agent._learned, "iteration": agent.iteration, **asdict(agent.progress)}
    tensors |= state_tensors(agent.optimizer)
    checkpoint.write(folder, settings, counters, agent.coefficients, tensors)
    agent.folders.add(path.resolve())


def load(
    cls: type[TransformerAgent],
    folder: str | os.PathLike[str],
    env: Envs | None,
    device: str,
    env_kwargs: Mapping[str, Any] | None,
    compile: bool,
) -> TransformerAgent:
    """See :meth:`TransformerAgent.load`."""
    check_env_kwargs(env_kwargs)
    settings, counters, coefficients = checkpoint.read(folder)
    problem = f"cannot load the agent in {str(folder)!r}: "
    try:
        id, kwargs = settings["id"], {**settings["env_kwargs"], **(env_kwargs or {})}
        handed = [str(name) for name in settings.get("handed", [])]
        size = ModelConfig(**settings["model"])
        method = one_of("method", settings["method"], tuple(RECIPES))
        known = settings["recipe"]
        if method == "ppo" and "imitation" not in known:
            known = {**known, "imitation": 0.0}  # of before there was any
        recipe = type(RECIPES[method])(**known)
        restraints = Restraints(**settings["restraints"])
        if coefficients.keys() != restraints.begin().keys():
            raise ValueError(f"coefficients don't fit its restraints: {coefficients}")
        arguments = {name: settings[name] for name in ("seed", "precision", "fixed", "history")}
        encoders = saved_encoders(settings["encoders"], settings.get("folder"), folder)
        backbone = backbone_of(settings)
        found = settings.get("curriculum")
        curriculum = None if found is None or env is not None else Curriculum(**found)
        arguments["temperature"] = settings.get("temperature", 1.0)
        arguments["fusion"] = settings.get("fusion", ATTENTION)
        progress = Progress(*(counters[name] for name in checkpoint.PROGRESS))
        if curriculum is not None:
            integer_in("level", progress.level, 0, curriculum.last)
    except KeyError as error:
        raise ValueError(f"{problem}{checkpoint.SETTINGS} is damaged: it lacks {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{problem}{checkpoint.SETTINGS} is damaged: {error}") from error
    if id is None and env is None:
        raise ValueError(f"{problem}it was made with a vector environment: load(..., env=...) needs one")
    if env is None:
        check_handed(handed, env_kwargs)
    check_compile(compile, torch.device(resolve_device(device)))
    try:
        agent = cls(
            id if env is None else env, size, method=method, encoders=encoders, device=device, recipe=recipe,
            restraints=restraints, backbone=backbone, compile=compile, curriculum=curriculum,
            env_kwargs=kwargs if env is None else None, **arguments,
        )  # fmt: skip
    except (FileNotFoundError, NameNotFound, ImportError):
        raise
    except Exception as error:
        raise ValueError(f"{problem}its settings can't be used: {error}") from error
    unknown = settings.keys() - vars(agent.settings).keys() - {"handed", "folder", "joints"}
    if unknown:
        raise ValueError(
            f"{problem}{checkpoint.SETTINGS} is damaged or of a later version: unknown settings {', '.join(sorted(unknown))}"
        )
    agent.settings = replace(agent.settings, id=id, env_kwargs=kwargs)
    agent.handed = tuple(handed)
    agent.folders.add(Path(folder).resolve())
    tensors = checkpoint.read_tensors(folder, counters, str(agent.device))
    try:
        check_hashes(agent.policy, settings.get("joints", {}), encoders)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{problem}{error}") from None
    try:
        agent.policy.load_state_dict(_part(tensors, "policy."))
        if agent.reference is not None:
            agent.reference.load_state_dict(_part(tensors, "reference."))
        load_state_tensors(agent.optimizer, tensors)
        if agent.memory is not None:
            agent.memory.restore(_part(tensors, "memory."))
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{problem}its weights don't fit its settings; {why_unfit(env_kwargs)}: {error}"
        ) from error
    agent.num_timesteps = agent._learned = counters["steps"]
    agent.coefficients = coefficients
    agent.iteration, agent.progress = counters["iteration"], progress
    if curriculum is not None:
        agent._face(progress.level)
    return agent


def policy_settings(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What the class takes of the agent in ``folder`` to make its policy again, and what it was trained on, if that has an id."""
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"init must be the folder of a transformer agent, got {folder!r}")
    settings, _, _ = checkpoint.read(folder)
    try:
        return {
            "model": ModelConfig(**settings["model"]),
            "encoders": saved_encoders(settings["encoders"], settings.get("folder"), folder),
            "backbone": backbone_of(settings),
            "temperature": settings.get("temperature", 1.0),
            "fusion": settings.get("fusion", ATTENTION),
            "trained_on": settings["id"]
            and f"{settings['id']} at difficulty {settings['env_kwargs'].get('difficulty', 0)}",
        }
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"cannot begin with the agent in {str(folder)!r}: {checkpoint.SETTINGS} is damaged: {error}"
        ) from error


def backbone_of(settings: Mapping[str, Any]) -> Backbone | None:
    found = settings.get("backbone")
    return None if found is None else Backbone(**found)


def begin_with(policy: TransformerPolicy, folder: str | os.PathLike[str]) -> None:
    """Load the weights of the policy in ``folder``."""
    settings, counters, _ = checkpoint.read(folder)
    try:
        check_hashes(policy, settings.get("joints", {}), settings["encoders"])
    except (ValueError, AttributeError) as error:
        raise ValueError(f"init={str(folder)!r} can't be begun with: {error}") from None
    tensors = checkpoint.read_tensors(folder, counters, str(policy.device))
    try:
        policy.load_state_dict(_part(tensors, "policy."))
    except RuntimeError:
        raise ValueError(
            f"init={str(folder)!r} must be an agent of an environment with these observations and actions, it is one of "
            f"{settings['id']}"
        ) from None


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
