"""Making agents of Stable-Baselines3 by their recipes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import A2C, DQN
from stable_baselines3.common.base_class import BaseAlgorithm

from mmenvs.checks import check_env_kwargs, integer_in
from mmenvs.embeddings.embedding import resolve_device
from mmenvs.embeddings.extractor import Extractor
from mmenvs.embeddings.fusion import FUSIONS
from mmenvs.embeddings.optimizers import Muon
from mmenvs.embeddings.pretrained import Pretrained
from mmenvs.integrations.sb3 import MultimodalExtractor, MultimodalVecEnv, make_vec_env
from mmenvs.registry import task_class

from ..curriculum import Curriculum, Progress, check_curriculum
from ..imitation import SelfImitationPPO
from ..recipes import RECIPES, default_encoders
from ..saved import anchored

_REPLAY_BYTES = 5 << 30  # a replay buffer of a recipe is no larger, so that two fit a machine of 16 GB
# Arguments of algorithms that make_agent sets by itself.
_SET = {
    "self",
    "policy",
    "env",
    "policy_kwargs",
    "stats_window_size",
    "seed",
    "device",
    "learning_rate",
    "_init_setup_model",
}


@dataclass(frozen=True)
class Settings:
    """All that it takes to make an agent again.

    Attributes:
        algo, id, fusion, seed, env_kwargs: as for :func:`make_agent`.
        visible: the observations the agent sees; None is all of them.
        encoders, precision: as for :class:`mmenvs.embeddings.Extractor`.
        recipe: the recipe's settings by name.
        curriculum: as for :func:`make_agent`.
    """

    algo: str
    id: str
    fusion: str
    seed: int
    env_kwargs: dict[str, Any]
    visible: tuple[str, ...] | None
    encoders: dict[str, str | Pretrained]
    precision: str
    recipe: dict[str, Any]
    curriculum: Curriculum | None = None


def default_precision(device: str) -> str:
    """Half precision on CPUs that multiply it in hardware: 1.5 times as fast with AVX-512, 3 with AMX."""
    in_hardware = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if device == "cpu" and in_hardware else "float32"


def check_encoders(encoders: Mapping[str, str | Pretrained] | None) -> None:
    """Refuse encoders that can't be saved with an agent."""
    if encoders is not None and not isinstance(encoders, Mapping):
        raise TypeError(
            f"encoders must be a dict from names of the observation to encoders, got {encoders!r}"
        )
    for name, encoder in (encoders or {}).items():
        if not isinstance(encoder, str | Pretrained):
            raise TypeError(
                f"encoders[{name!r}] must be a name or Pretrained, which can be saved with the agent, got {encoder!r}"
            )
        if isinstance(encoder, Pretrained) and encoder.vocabulary is not None:
            raise ValueError(
                f"encoders[{name!r}] must have vocabulary=None, the world's: another can't be saved with the agent"
            )


def settings_of(agent: BaseAlgorithm) -> Settings:
    """The settings of an agent from :func:`make_agent`."""
    return agent.settings  # type: ignore[attr-defined]


def make_agent(
    algo: str,
    id: str,
    *,
    fusion: str = "cross_attention",
    device: str = "auto",
    seed: int = 0,
    env_kwargs: Mapping[str, Any] | None = None,
    visible: tuple[str, ...] | None = None,
    encoders: Mapping[str, str | Pretrained] | None = None,
    precision: str | None = None,
    curriculum: Curriculum | None = None,
    **overrides: Any,
) -> BaseAlgorithm:
    """An untrained Stable-Baselines3 agent on the native vector environment.

    Args:
        algo: ``"ppo"``, ``"a2c"``, ``"dqn"``, and with sb3-contrib ``"trpo"``, ``"recurrent_ppo"``, ``"qrdqn"``.
        id: environment of this suite.
        fusion: a name in ``mmenvs.embeddings.FUSIONS``.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        seed: of weights, actions and episodes.
        env_kwargs: arguments of the environment, such as ``{"difficulty": 1}``.
        visible: names of the observations it may see; None is all, fewer makes a blind baseline.
        encoders: as for :class:`mmenvs.embeddings.Extractor`. None is the frozen embedding ``"shapes"`` for what doesn't
            change within an episode of the world; ``{}`` trains encoders from pixels, words and sounds.
        precision: as for :class:`mmenvs.embeddings.Extractor`; None is what is fast here.
        curriculum: begin at difficulty 0 and rise to that in ``env_kwargs``, which is ``curriculum.last``.
        **overrides: fields of the recipe (``num_envs``, ``learning_rate``, ...) or the algorithm's own
            arguments (``n_steps``, ``batch_size``, ...).

    Raises:
        ValueError, TypeError, ImportError, gymnasium.error.Error: for what doesn't exist, with what does.
    """
    if algo not in RECIPES:
        raise ValueError(f"algo must be one of {', '.join(RECIPES)}, got {algo!r}")
    if fusion not in FUSIONS:
        raise ValueError(f"fusion must be one of {', '.join(FUSIONS)}, got {fusion!r}")
    task_class(id)
    check_encoders(encoders)
    check_curriculum(curriculum)
    cls = _algorithm(algo)
    device = resolve_device(device)
    seed = integer_in("seed", seed, 0, 2**32 - 1)
    check_env_kwargs(env_kwargs)
    recipe = RECIPES[algo]
    names = {f.name for f in fields(recipe)} - {"arguments"}
    known = _arguments(cls)
    for name in sorted(overrides.keys() - names - known):
        raise TypeError(
            f"{name!r} must be of the recipe ({', '.join(sorted(names))}) or of {algo} ({', '.join(sorted(known))})"
        )
    own = {name: value for name, value in overrides.items() if name in names}
    arguments = {**recipe.arguments, **{k: v for k, v in overrides.items() if k not in names}}
    recipe = replace(recipe, **own, arguments=arguments)
    arguments = dict(recipe.arguments)
    if "batch_size" not in overrides and {"n_steps", "batch_size"} <= arguments.keys():
        # With few rows a rollout is smaller than the recipe's minibatch.
        arguments["batch_size"] = min(arguments["batch_size"], recipe.num_envs * arguments["n_steps"])
    _check_normalised(algo, recipe.num_envs, arguments)
    faced = dict(env_kwargs or {})
    if curriculum is not None:
        env_kwargs = curriculum.at_last(env_kwargs)
        faced = {**env_kwargs, "difficulty": 0}
    env = make_vec_env(id, recipe.num_envs, **faced)
    space: Any = env.native.single_observation_space
    if curriculum is not None:
        curriculum.check(id, faced, space)
    if "buffer_size" in arguments and "buffer_size" not in overrides:
        # It holds each observation twice, as what was seen and as what came next.
        row = 2 * sum(int(np.prod(part.shape)) * part.dtype.itemsize for part in space.values())
        arguments["buffer_size"] = min(arguments["buffer_size"], _REPLAY_BYTES // row)
    seen = set(space)
    if visible is not None and (not visible or set(visible) - seen or len(set(visible)) < len(visible)):
        raise ValueError(f"visible must name some of {', '.join(sorted(seen))}, got {visible!r}")
    if encoders is None:
        encoders = default_encoders(id, space, env_kwargs or {})
    settings = Settings(
        algo=algo,
        id=id,
        fusion=fusion,
        seed=seed,
        env_kwargs=dict(env_kwargs or {}),
        visible=visible,
        encoders={name: anchored(encoder) for name, encoder in encoders.items()},
        precision=default_precision(device) if precision is None else precision,
        recipe=asdict(replace(recipe, arguments=arguments)),
        curriculum=curriculum,
    )
    policy_kwargs = {
        "features_extractor_class": MultimodalExtractor,
        "features_extractor_kwargs": {
            "encoders": settings.encoders,
            "fusion": fusion,
            "features_dim": recipe.features_dim,
            "precision": settings.precision,
            "visible": visible,
        },
        "net_arch": list(recipe.net_arch),
    }
    if algo in ("ppo", "a2c", "trpo", "recurrent_ppo"):
        policy_kwargs["activation_fn"] = torch.nn.ReLU
    if hasattr(recipe, "ent_coef"):
        arguments["ent_coef"] = recipe.ent_coef
    start = recipe.learning_rate
    agent = cls(
        "MultiInputLstmPolicy" if algo == "recurrent_ppo" else "MultiInputPolicy",
        env,
        learning_rate=lambda remaining: start * max(remaining, 0.02),
        policy_kwargs=policy_kwargs,
        seed=seed,
        device=device,
        stats_window_size=1000,
        **arguments,
    )
    if algo in ("ppo", "a2c", "recurrent_ppo"):
        # With Adam the encoders learn too slowly from a reward alone: matching stays at chance.
        policy: Any = agent.policy
        policy.optimizer = Muon(policy, (policy.action_net, policy.value_net), start)
    for part in agent.policy.modules():
        if isinstance(part, Extractor):
            part.remember()
    # Row i of seed s is row i - 1 of seed s + 1: agents of neighbouring seeds must not learn from the same episodes.
    env.seed(episode_seed(seed, 0))
    agent.settings, agent.progress, agent.made_env = settings, Progress(), env  # type: ignore[attr-defined]
    agent.folders = set()  # type: ignore[attr-defined]  # that it was saved to or loaded from
    return agent


def _check_normalised(algo: str, num_envs: int, arguments: Mapping[str, Any]) -> None:
    """Refuse advantages that are normalised one by one, which makes them NaN."""
    if "n_steps" not in arguments or not arguments.get("normalize_advantage", algo != "a2c"):
        return
    count = num_envs * arguments["n_steps"]
    if algo in ("ppo", "recurrent_ppo"):
        count = min(count, arguments["batch_size"])
    if count < 2:
        told = ", ".join(
            f"{name}={arguments[name]}" for name in ("n_steps", "batch_size") if name in arguments
        )
        raise ValueError(
            f"num_envs x n_steps, and batch_size, must be 2 at least with normalize_advantage=True, got "
            f"num_envs={num_envs}, {told}"
        )


def face(agent: BaseAlgorithm, level: int) -> None:
    """Give an agent with a curriculum episodes of another difficulty, to be reset before they begin."""
    settings, env = settings_of(agent), cast(MultimodalVecEnv, agent.get_env())
    kwargs = {**settings.env_kwargs, "difficulty": level}
    env.replace(gym.make_vec(settings.id, num_envs=env.num_envs, **kwargs))


def episode_seed(seed: int, steps: int) -> int:
    """The seed of the training episodes of an agent that begins, or goes on, after ``steps``."""
    return int(np.random.SeedSequence([seed, steps]).generate_state(1)[0])


def _arguments(cls: type[BaseAlgorithm]) -> set[str]:
    """The arguments of an algorithm that :func:`make_agent` doesn't set by itself."""
    found: set[str] = set()
    for base in cls.__mro__:
        parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
        found |= {p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD or p.kind is p.KEYWORD_ONLY}
        # One that takes any hands them to the next.
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return found - _SET


def _algorithm(algo: str) -> type[BaseAlgorithm]:
    names = {"trpo": "TRPO", "qrdqn": "QRDQN", "recurrent_ppo": "RecurrentPPO"}
    if algo in names:
        try:
            import sb3_contrib
        except ImportError:
            raise ImportError(f"algo={algo!r} needs sb3-contrib: pip install sb3-contrib") from None
        found: type[BaseAlgorithm] = getattr(sb3_contrib, names[algo])
        return found
    return SelfImitationPPO if algo == "ppo" else A2C if algo == "a2c" else DQN
