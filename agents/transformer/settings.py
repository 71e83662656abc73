"""What an agent is made of, checked before anything is built."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from mmenvs.checks import check_env_kwargs, integer_in, number_in, one_of
from mmenvs.embeddings.extractor import Precision
from mmenvs.embeddings.fusion import FUSIONS
from mmenvs.embeddings.pretrained import Pretrained

from ..curriculum import Curriculum, check_curriculum
from ..saved import anchored, whole_path
from ..sb3 import check_encoders, default_precision
from . import checkpoint, saving
from .algorithms import RECIPES, SUPERVISED
from .config import ATTENTION, FUSION, SIZES, Backbone, ModelConfig
from .learning import Recipe
from .restraints import Restraints
from .rollout import Envs


@dataclass(frozen=True)
class Settings:
    """All that it takes to make an agent again.

    Attributes:
        id: environment of this suite, or None if the agent was handed a vector environment.
        seed, env_kwargs: as for :class:`~mmenvs_agents.transformer.agent.TransformerAgent`.
        model: size of the transformer.
        fixed, history: as for :class:`~mmenvs_agents.transformer.model.TransformerPolicy`.
        encoders, precision: as for :class:`mmenvs.embeddings.Extractor`.
        recipe, method, restraints: how it learns.
        algo: how the command line names this agent.
        backbone: language model in the trunk's place, with its configuration.
        curriculum: how the difficulty rises to that in ``env_kwargs``.
        temperature: of the policy.
        fusion: beside the transformer; agents saved before there was one have none.
    """

    id: str | None
    seed: int
    env_kwargs: dict[str, Any]
    model: ModelConfig
    fixed: tuple[str, ...]
    history: tuple[str, ...]
    encoders: dict[str, str | Pretrained]
    precision: Precision
    recipe: Recipe
    method: str
    restraints: Restraints
    algo: str = checkpoint.KIND
    backbone: Backbone | None = None
    curriculum: Curriculum | None = None
    temperature: float = 1.0
    fusion: str = ATTENTION

    @property
    def size(self) -> str | ModelConfig:
        """The name of ``model`` in ``SIZES``, or itself."""
        return next((name for name, config in SIZES.items() if config == self.model), self.model)


def chosen(
    env: str | Envs,
    size: str | ModelConfig | None,
    *,
    method: str,
    encoders: Mapping[str, str | Pretrained] | None,
    fusion: str | None,
    device: torch.device,
    seed: int,
    env_kwargs: Mapping[str, Any] | None,
    precision: Precision | None,
    recipe: Recipe | None,
    restraints: Restraints | None,
    init: str | os.PathLike[str] | None,
    backbone: str | Backbone | None,
    lora: int,
    curriculum: Curriculum | None,
    temperature: float | None,
) -> Settings:
    """The settings that arguments of :class:`~mmenvs_agents.transformer.agent.TransformerAgent` ask for, before there
    is an environment: :func:`fitted` adds what depends on it.

    Raises:
        ValueError, TypeError, FileNotFoundError: for what doesn't exist or fit.
    """
    seed = integer_in("seed", seed, 0, 2**32 - 1)
    one_of("method", method, tuple(RECIPES))
    recipe, restraints = recipe or RECIPES[method], restraints or Restraints()
    _check_method(method, recipe, restraints)
    check_env_kwargs(env_kwargs)
    if init is not None:
        begun = saving.policy_settings(init)
        of_policy = {"size": size, "encoders": encoders, "backbone": backbone, "fusion": fusion}
        for name, value in of_policy.items():
            if value is not None:
                raise ValueError(f"{name} is that of the agent in init={str(init)!r}, got {value!r}")
        size, encoders, backbone = begun["model"], begun["encoders"], begun["backbone"]
        fusion = begun["fusion"]
        temperature = begun["temperature"] if temperature is None else temperature
    temperature = number_in("temperature", 1.0 if temperature is None else temperature, 0.01, 100)
    size = size or "nano"
    if size not in SIZES if isinstance(size, str) else not isinstance(size, ModelConfig):
        raise ValueError(f"size must be one of {', '.join(SIZES)} or a ModelConfig, got {size!r}")
    check_encoders(encoders)
    fusion = one_of("fusion", FUSION if fusion is None else fusion, (*FUSIONS, ATTENTION))
    if lora and (backbone is None or isinstance(backbone, Backbone)):
        raise ValueError(f"lora goes with the name or folder of a backbone, got {lora!r} with {backbone!r}")
    if backbone is not None:
        backbone = backbone if isinstance(backbone, Backbone) else Backbone(backbone, lora)
        backbone = replace(backbone, source=whole_path(backbone.source))
    check_curriculum(curriculum)
    if not isinstance(env, str):
        for name, given in (("curriculum", curriculum), ("env_kwargs", env_kwargs)):
            if given:
                raise ValueError(f"{name} goes with an id; env is made already, got {given!r}")
    if curriculum is not None:
        env_kwargs = curriculum.at_last(env_kwargs)
    return Settings(
        id=env if isinstance(env, str) else None,
        seed=seed,
        env_kwargs=dict(env_kwargs or {}),
        model=SIZES[size] if isinstance(size, str) else size,
        fixed=(),
        history=(),
        encoders={name: anchored(encoder) for name, encoder in (encoders or {}).items()},
        precision=default_precision(device.type) if precision is None else precision,  # type: ignore[arg-type]
        recipe=recipe,
        method=method,
        restraints=restraints,
        backbone=backbone,
        curriculum=curriculum,
        temperature=temperature,
        fusion=fusion,
    )


def fitted(
    settings: Settings, task: Any, fixed: tuple[str, ...] | None, history: tuple[str, ...] | None
) -> Settings:
    """The settings with the names of observations that ``task`` has where none are given.

    Args:
        task: of an environment of this suite; None is another's, which is asked for its parts of the score at the
            first rollout.

    Raises:
        ValueError: if a penalty or a limit is of no part of the score.
    """
    restraints, parts = settings.restraints, parts_of(task)
    for part in (*restraints.penalties, *restraints.limits) if task is not None else ():
        if part not in parts:
            known = ", ".join(parts) or "there are none here"
            raise ValueError(f"a penalty and a limit must name a part of the score ({known}), got {part!r}")
    return replace(
        settings,
        fixed=tuple(sorted(getattr(task, "fixed", ()))) if fixed is None else tuple(fixed),
        history=tuple(sorted(getattr(task, "history", ()))) if history is None else tuple(history),
    )


def parts_of(task: Any) -> tuple[str, ...]:
    """Names of the parts of the score that a task reports at the end of an episode."""
    return tuple(name for name, kind in getattr(task, "info_types", {}).items() if kind is float)


def _check_method(method: str, recipe: Recipe, restraints: Restraints) -> None:
    if type(recipe) is not type(RECIPES[method]):
        expected = type(RECIPES[method]).__name__
        raise TypeError(f"recipe must be a {expected} with method={method!r}, got {type(recipe).__name__}")
    if not isinstance(restraints, Restraints):
        raise TypeError(f"restraints must be Restraints(...), got {restraints!r}")
    if method == "dpo" and restraints.kl:
        raise ValueError(f"kl must be 0 with method='dpo', whose beta holds the policy, got {restraints.kl}")
    if method == SUPERVISED and restraints != Restraints():
        raise ValueError("restraints are for reinforcement learning, method='supervised' has no reward")
