"""Recipes: the settings with which each algorithm of Stable-Baselines3 learns these environments."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gymnasium import spaces

from mmenvs.checks import check_flag, integer_in, number_in
from mmenvs.embeddings.encoders import encoders_fitting
from mmenvs.registry import task_class
from mmenvs.spaces import modality_of
from mmenvs.world.words import VOCABULARY

# Encodes what doesn't change within an episode, unless an agent is asked to look in another way: on both tasks of
# docs/results/compare it beats encoders trained from pixels.
ENCODER = "shapes"
# Arguments of algorithms, most of which Stable-Baselines3 takes unchecked: whole numbers with the lowest, ...
_WHOLE = {
    "n_steps": 1, "batch_size": 1, "n_epochs": 1, "buffer_size": 1, "learning_starts": 0, "train_freq": 1,
    "gradient_steps": -1, "target_update_interval": 1, "cg_max_steps": 1, "n_critic_updates": 1,
    "line_search_max_iter": 1, "memory_mb": 1,
}  # fmt: skip
# ... numbers from 0 with the highest, switches, ...
_NUMBERS = {
    "gamma": 1, "gae_lambda": 1, "clip_range": 1e6, "clip_range_vf": 1e6, "target_kl": 1e6, "vf_coef": 1e6,
    "max_grad_norm": math.inf, "exploration_fraction": 1, "exploration_initial_eps": 1, "exploration_final_eps": 1,
    "tau": 1, "rms_prop_eps": 1e6, "cg_damping": 1e6, "line_search_shrinking_factor": 1,
    "imitation": 1e6,
}  # fmt: skip
_FLAGS = ("normalize_advantage", "use_rms_prop", "use_sde")
# ... of which these may be None.
_OPTIONAL = ("clip_range_vf", "target_kl")


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

    def __post_init__(self) -> None:
        # Plain numbers in place of NumPy's, which JSON doesn't take.
        checked: dict[str, Any] = {
            "num_envs": integer_in("num_envs", self.num_envs, 1, 2**24),
            "learning_rate": number_in("learning_rate", self.learning_rate, 0, 1e6),
            "features_dim": integer_in("features_dim", self.features_dim, 1, 2**16),
        }
        if not isinstance(self.net_arch, list | tuple):
            raise TypeError(
                f"net_arch must be the sizes of hidden layers, such as (64, 64), got {self.net_arch!r}"
            )
        sizes = [integer_in(f"net_arch[{i}]", size, 1, 2**16) for i, size in enumerate(self.net_arch)]
        checked["net_arch"] = tuple(sizes)
        if hasattr(self, "ent_coef"):
            checked["ent_coef"] = number_in("ent_coef", self.ent_coef, 0, 1e6)
        checked["arguments"] = {name: _checked(name, value) for name, value in self.arguments.items()}
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def _checked(name: str, value: Any) -> Any:
    """An argument of an algorithm as the agent can be saved with it."""
    if name in _WHOLE:
        return integer_in(name, value, _WHOLE[name], 2**20 if name in ("n_steps", "batch_size") else 2**31)
    if name in _FLAGS:
        return check_flag(name, value)
    if name in _NUMBERS and not (name in _OPTIONAL and value is None):
        if name == "clip_range_vf" and value == 0:
            raise ValueError("clip_range_vf must be over 0, or None for no clipping, got 0")
        return number_in(name, value, 0, _NUMBERS[name])
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} must be a number, a text, None, or a dict or list of these, which can be saved with the "
            f"agent, got {value!r}"
        ) from None
    return value


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
    fitting = encoders_fitting(ENCODER, spaces.Dict(fixed))
    return {name: encoder for name, encoder in fitting.items() if _of_the_world(fixed[name])}


def _of_the_world(part: Any) -> bool:
    """Whether a text is in the world's words, the only ones that ``shapes`` knows; tasks of one's own have others."""
    return modality_of(part) != "text" or int(part.high.max()) + 1 == len(VOCABULARY)
