"""How well an agent does: a fixed set of episodes of one environment, scored with intervals."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import VectorEnv

from mmenvs.benchmark.stats import bootstrap
from mmenvs.checks import check_env_kwargs, check_flag, integer_in, one_of
from mmenvs.registry import task_class
from mmenvs.vector import MultimodalVectorEnv
from mmenvs.world.scene import SPLITS

from .baselines import BASELINES, Baseline

_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
_RESAMPLES = 1000


class Predicts(Protocol):
    """Whatever answers a batch of observations; models of Stable-Baselines3 do."""

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]: ...


@dataclass(frozen=True)
class Rate:
    """A share of successes with its 95 % Wilson interval (Wilson 1927).

    Attributes:
        value: successes / n.
        low, high: bounds of the interval.
        n: number of episodes.
    """

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, successes: npt.NDArray[np.bool_]) -> Rate:
        """The rate of a bool array ``(n,)`` with n >= 1."""
        n, p = successes.size, float(successes.mean())
        centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
        # Rounding must not push the bounds past the value itself at 0 and 1.
        return cls(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)), n)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Result:
    """The score of one agent on a fixed set of episodes.

    Attributes:
        id, split, difficulty, seed, num_envs, deterministic: what was run; two results that agree in these
            and in the number of episodes saw the same episodes in the same order.
        success: share of successful episodes with its 95 % Wilson interval.
        mean_return: mean episode return; ``return_low`` and ``return_high`` are its 95 % bootstrap interval.
        mean_length: mean number of steps of an episode.
        by_type: success for each type of question, for tasks that have types.
        seconds: wall time of the run.
        returns, successes: float64 and bool ``(episodes,)``, the single episodes; not in ``to_json``.
    """

    id: str
    split: str
    difficulty: int
    seed: int
    num_envs: int
    deterministic: bool
    episodes: int
    success: Rate
    mean_return: float
    return_low: float
    return_high: float
    mean_length: float
    by_type: dict[str, Rate]
    seconds: float
    returns: npt.NDArray[np.float64] = field(repr=False, compare=False)
    successes: npt.NDArray[np.bool_] = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the single episodes, in plain Python types."""
        empty = replace(self, returns=np.empty(0), successes=np.empty(0, np.bool_))
        return {key: value for key, value in asdict(empty).items() if key not in ("returns", "successes")}

    def to_json(self) -> str:
        """``to_dict`` as JSON."""
        return json.dumps(self.to_dict(), indent=2)


def evaluate(
    agent: Predicts | Callable[..., tuple[Any, Any]] | type[Baseline] | str,
    id: str,
    *,
    split: str = "test",
    episodes: int = 2000,
    num_envs: int = 64,
    env_kwargs: dict[str, Any] | None = None,
    seed: int = 0,
    deterministic: bool = True,
    wrap: Callable[[MultimodalVectorEnv], VectorEnv] | None = None,
) -> Result:
    """Run an agent for a number of episodes on the native vector environment.

    Row i plays the first ``episodes // num_envs`` episodes of seed ``seed + i`` (the first rows one more, to
    make up ``episodes``). That number is set beforehand, so that rows whose episodes end early don't count
    more than others.

    Args:
        agent: anything with ``predict``, that method alone, or a name or class in ``BASELINES``.
        id: environment of this suite.
        split: ``"train"``, ``"val"``, ``"test"`` or ``"compositional"``.
        episodes: number of episodes, at least 1.
        num_envs: rows played side by side.
        env_kwargs: further arguments of the environment, such as ``difficulty``; a split among them, as in those that
            an agent was trained with, gives way to ``split``.
        seed: names the episodes; it also seeds the baselines and the bootstrap.
        deterministic: handed to ``predict``.
        wrap: makes what the agent sees out of the native environment, for example
            ``lambda envs: VectorEmbedObservation(envs, "shapes")`` or a ``VectorPerturbObservation``. An agent's
            own ``wrap`` goes around that.

    Raises:
        ValueError, TypeError, gymnasium.error.Error: for arguments that name nothing that exists.
    """
    task_class(id)
    one_of("split", split, SPLITS)
    integer_in("episodes", episodes, 1, 10**9)
    integer_in("seed", seed, 0, 2**63)
    check_flag("deterministic", deterministic)
    check_env_kwargs(env_kwargs)
    num_envs = min(integer_in("num_envs", num_envs, 1, 2**20), episodes)
    begin = time.perf_counter()
    made = gym.make_vec(id, num_envs=num_envs, **{**(env_kwargs or {}), "split": split})
    envs: MultimodalVectorEnv = made  # type: ignore[assignment]
    try:
        if "is_success" not in envs.task.info_types:
            raise ValueError(
                f"id must be an environment with is_success in its infos, {id} has {', '.join(envs.task.info_types)}"
            )
        predict = _predictor(agent, envs, seed)
        seen: Any = envs
        for around in (wrap, getattr(agent, "wrap", None)):
            seen = seen if around is None else around(seen)
        needed, given = getattr(agent, "observation_space", None), seen.single_observation_space
        if isinstance(needed, gym.spaces.Dict) and isinstance(given, gym.spaces.Dict):
            lacking = [name for name in needed if name not in given.spaces]
            if lacking:
                raise ValueError(f"agent must fit {id}, which has no {', '.join(lacking)} for it to see")
        returns, lengths, successes, types = _play(predict, seen, episodes, seed, deterministic)
    finally:
        envs.close()
    interval = bootstrap([[returns]], resamples=_RESAMPLES, seed=seed)
    names = envs.task.types
    return Result(
        id=id,
        split=split,
        difficulty=envs.task.difficulty,
        seed=seed,
        num_envs=num_envs,
        deterministic=deterministic,
        episodes=episodes,
        success=Rate.of(successes),
        mean_return=float(returns.mean()),
        return_low=interval.low,
        return_high=interval.high,
        mean_length=float(lengths.mean()),
        by_type={names[kind]: Rate.of(successes[types == kind]) for kind in np.unique(types[types >= 0])},
        seconds=time.perf_counter() - begin,
        returns=returns,
        successes=successes,
    )


def _predictor(agent: Any, envs: MultimodalVectorEnv, seed: int) -> Callable[..., Any]:
    if isinstance(agent, str):
        agent = BASELINES[one_of("agent", agent, tuple(BASELINES))]
    if isinstance(agent, type) and issubclass(agent, Baseline):
        agent = agent(envs, seed)
    predict = getattr(agent, "predict", agent)
    if not callable(predict) or isinstance(agent, type):
        raise TypeError(
            f"agent must have a predict method or be one of {', '.join(BASELINES)}, got {agent!r}"
        )
    return predict


def _play(
    predict: Callable[..., Any],
    envs: VectorEnv,
    episodes: int,
    seed: int,
    deterministic: bool,
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Return, length, success and question type (-1 without one) of each episode, row after row."""
    n = envs.num_envs
    quota = np.full(n, episodes // n)
    quota[: episodes % n] += 1
    first = np.cumsum(quota) - quota
    returns, lengths = np.zeros(episodes), np.zeros(episodes, np.int64)
    successes, types = np.zeros(episodes, np.bool_), np.full(episodes, -1, np.int64)
    done, total, steps = np.zeros(n, np.int64), np.zeros(n), np.zeros(n, np.int64)
    observation, _ = envs.reset(seed=seed)
    state, starts = None, np.ones(n, np.bool_)
    while (done < quota).any():
        actions, state = predict(observation, state=state, episode_start=starts, deterministic=deterministic)
        observation, rewards, terminated, truncated, infos = envs.step(actions)
        total += rewards
        steps += 1
        starts = terminated | truncated
        rows = np.flatnonzero(starts & (done < quota))
        if rows.size:
            at, final = first[rows] + done[rows], infos["final_info"]
            returns[at], lengths[at], successes[at] = total[rows], steps[rows], final["is_success"][rows]
            if "question_type" in final:
                types[at] = final["question_type"][rows]
            done[rows] += 1
        total[starts], steps[starts] = 0.0, 0
    return returns, lengths, successes, types
