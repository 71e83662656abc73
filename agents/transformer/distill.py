"""Distillation: a small policy learns to act as a large one does, in the situations it gets into itself.

Rusu et al. 2016, "Policy distillation"; that the student plays, Czarnecki et al. 2019, "Distilling policy distillation".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from mmenvs.checks import check_env_kwargs
from mmenvs.embeddings.extractor import Precision
from mmenvs.embeddings.pretrained import Pretrained

from . import ppo
from .agent import Envs, TransformerAgent
from .config import ModelConfig
from .devices import ALONE, Devices
from .learning import descend
from .model import TransformerPolicy
from .rollout import Rollout


class Student(TransformerAgent):
    """An agent whose updates bring it closer to its teacher, rewards or not. What it saves is an agent like any other:
    :meth:`TransformerAgent.load` reads it, and learns on with PPO.

    Args:
        teacher: a trained agent. The student learns on its environment, fuses as it does, and takes its encoders where it
            is given none.
        size: as for :class:`TransformerAgent`.
        env: a vector environment, if the teacher was not made from an id.
        encoders, seed, precision, recipe, compile: as for :class:`TransformerAgent`; of the recipe, rollouts, minibatches,
            ``learning_rate``, ``value_coef`` and ``max_grad_norm`` count.

    Raises:
        ValueError: if the teacher acts in another way, or without an environment.
    """

    def __init__(
        self,
        teacher: TransformerAgent,
        size: str | ModelConfig = "nano",
        *,
        env: Envs | None = None,
        encoders: Mapping[str, str | Pretrained] | None = None,
        seed: int = 0,
        recipe: ppo.PPORecipe | None = None,
        env_kwargs: Mapping[str, Any] | None = None,
        precision: Precision | None = None,
        compile: bool = False,
    ) -> None:
        check_env_kwargs(env_kwargs)
        known = teacher.settings
        if known.id is None and env is None:
            raise ValueError("the teacher was made with a vector environment, so env=... needs one")
        super().__init__(
            known.id if env is None else env,  # type: ignore[arg-type]
            size,
            encoders=known.encoders if encoders is None else encoders,
            fusion=known.fusion,
            device=str(teacher.device) if teacher.devices.count == 1 else teacher.device.type,
            seed=seed,
            env_kwargs=None if env is not None else {**known.env_kwargs, **(env_kwargs or {})},
            recipe=recipe,
            fixed=known.fixed,
            history=known.history,
            precision=precision,
            compile=compile,
        )
        if self.action_space != teacher.action_space:
            raise ValueError(
                f"the teacher must have the action space {self.action_space}, it has {teacher.action_space}"
            )
        self.teacher = teacher
        self.memory = None  # it imitates the teacher

    def _update(self, rollout: Rollout, total_steps: int) -> dict[str, float]:
        log = update(
            self.policy,
            self.teacher.policy,
            self.optimizer,
            rollout,
            cast(ppo.PPORecipe, self.settings.recipe),
            1 - self._learned / total_steps,
            self._generator("shuffle", self.iteration),
            self.devices,
        )
        self._counted(rollout)
        return log


def update(
    policy: TransformerPolicy,
    teacher: TransformerPolicy,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    recipe: ppo.PPORecipe,
    remaining: float,
    generator: torch.Generator,
    devices: Devices = ALONE,
) -> dict[str, float]:
    """Learn from the episodes of a rollout what the teacher would have done in them.

    The loss of a step is KL(teacher || student) of the distributions of its action, and ``value_coef`` times the squared
    distance of their values, so that PPO finds a critic to go on with.

    Args:
        policy, optimizer: are changed.
        teacher: stays as it is.
        rollout, recipe, remaining, generator, devices: as for :func:`mmenvs_agents.transformer.ppo.update`.

    Returns:
        Means over the update, by name; ``agreement`` is the share of steps whose most likely actions are the same.

    Raises:
        NonFiniteGradientError: names the first parameter it was found in; the weights hold the steps before it.
    """
    lengths = rollout.episodes.lengths

    def loss(rows: Tensor, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        episodes = rollout.episodes.take(rows).to(policy.device)
        valid = episodes.valid
        with torch.no_grad():
            wanted, worth = (x[valid] for x in teacher(episodes))  # (N, K), (N,)
        described, values = (x[valid] for x in policy(episodes))
        kl = policy.actor.kl(wanted, described)
        value_loss = (values - worth).square()
        same = policy.actor.sample(described.detach(), None) == teacher.actor.sample(wanted, None)
        sums = {"distillation_kl": kl, "value_loss": value_loss, "agreement": same.all(-1)}
        total = int(devices.total(lengths[batch].sum()))
        summed = (kl + recipe.value_coef * value_loss).sum() / total
        return summed, {name: value.detach().sum() / total for name, value in sums.items()}

    groups = torch.arange(len(lengths))[:, None]
    return descend(policy, optimizer, groups, loss, recipe, remaining, generator, devices)
