"""Recipes: the settings with which each algorithm of Stable-Baselines3 learns these environments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gymnasium import spaces

from mmenvs.embeddings.encoders import encoders_fitting
from mmenvs.registry import task_class

# Encodes what doesn't change within an episode, unless an agent is asked to look in another way: on both tasks of
# docs/results/compare it beats encoders trained from pixels.
ENCODER = "shapes"


@dataclass(frozen=True)
class Recipe:
    """Settings that all algorithms have.

    Attributes:
        num_envs: rows of the native vector environment.
        learning_rate: at the start; it falls linearly to 2 % of that.
        features_dim: size of the extractor's result.
        net_arch: hidden layers between it and the heads.
        arguments: the algorithm's own arguments, by Stable-Baselines3's names.
    """

    num_envs: int = 128
    learning_rate: float = 1e-3
    features_dim: int = 256
    net_arch: tuple[int, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PPORecipe(Recipe):
    """Proximal policy optimisation (Schulman et al. 2017) with self-imitation, see ``imitation.py``.

    Entropy is rewarded with ``ent_coef`` at first, less and less until none at the end: without it a policy
    settles on the most frequent answers before it has learned to look.
    """

    ent_coef: float = 0.04
    arguments: Mapping[str, Any] = field(
        default_factory=lambda: {
            "n_steps": 16,
            "batch_size": 256,
            "n_epochs": 2,
            "gamma": 1.0,
            "gae_lambda": 0.95,
            "clip_range": 0.2,
            "imitation": 1.0,
        }
    )


@dataclass(frozen=True)
class A2CRecipe(Recipe):
    """Advantage actor-critic (Mnih et al. 2016), without its RMSprop, which diverges with attention layers."""

    num_envs: int = 256
    learning_rate: float = 7e-4
    ent_coef: float = 0.04
    arguments: Mapping[str, Any] = field(
        default_factory=lambda: {"n_steps": 1, "gamma": 1.0, "gae_lambda": 0.95, "use_rms_prop": False}
    )


@dataclass(frozen=True)
class RecurrentPPORecipe(PPORecipe):
    """PPO with an LSTM between extractor and heads (Hochreiter and Schmidhuber 1997), from sb3-contrib.

    Without self-imitation: a remembered step would need the state of the LSTM at that time.
    """

    arguments: Mapping[str, Any] = field(
        default_factory=lambda: {
            **{name: value for name, value in PPORecipe().arguments.items() if name != "imitation"},
            "n_steps": 32,
        }
    )


@dataclass(frozen=True)
class DQNRecipe(Recipe):
    """Deep Q-network (Mnih et al. 2015) with a replay buffer of uint8 pictures."""

    num_envs: int = 64
    learning_rate: float = 5e-4
    arguments: Mapping[str, Any] = field(
        default_factory=lambda: {
            "buffer_size": 50_000,
            "learning_starts": 2_000,
            "batch_size": 256,
            "train_freq": 4,
            "gradient_steps": 1,
            "target_update_interval": 1_000,
            "exploration_fraction": 0.4,
            "exploration_final_eps": 0.05,
            "gamma": 0.99,
        }
    )


@dataclass(frozen=True)
class TRPORecipe(Recipe):
    """Trust region policy optimisation (Schulman et al. 2015), from sb3-contrib."""

    arguments: Mapping[str, Any] = field(
        default_factory=lambda: {
            "n_steps": 16,
            "batch_size": 256,
            "gamma": 1.0,
            "target_kl": 0.02,
            "cg_max_steps": 5,
            "n_critic_updates": 2,
        }
    )


RECIPES: dict[str, Recipe] = {
    "ppo": PPORecipe(),
    "a2c": A2CRecipe(),
    "dqn": DQNRecipe(),
    "trpo": TRPORecipe(),
    "recurrent_ppo": RecurrentPPORecipe(),
    "qrdqn": DQNRecipe(),
}


def default_encoders(id: str, space: spaces.Dict, env_kwargs: Mapping[str, Any]) -> dict[str, str]:
    """Encoders of an agent that wasn't asked for others."""
    if env_kwargs.get("source") is not None:
        return {}  # photographs and other words than the world's
    fixed = {name: part for name, part in space.items() if name in task_class(id).fixed}
    return encoders_fitting(ENCODER, spaces.Dict(fixed))
