"""Playing: whole episodes of a policy on a vector environment, a cached step at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from torch import Tensor

from .model import Episodes, TransformerPolicy

Envs = gym.vector.VectorEnv[Any, Any, Any]
LONGEST = 4096  # steps after which an episode is taken to have no end


@dataclass(frozen=True)
class Rollout:
    """B whole episodes and what was known while they were played, on the CPU; ``(B, T)`` with padding.

    Attributes:
        episodes: what the policy saw and did.
        log_probs, values: float32 ``(B, T)``, of the policy that played.
        rewards: float32 ``(B, T)``, 0 at padding.
        bootstrap: float32 ``(B,)``, the value of what comes after an episode: 0 if it terminated, what the
            policy expects at the last observation if it was truncated.
        returns: float64 ``(B,)``, sums of rewards.
        successes: bool ``(B,)`` from ``is_success`` in the infos, or None where there is no such key.
        parts: ``{name: float64 (B,)}``, the scores that the infos report at the end of an episode.
        greedy: the same episodes with the most likely actions, for algorithms that ask for it.
    """

    episodes: Episodes
    log_probs: Tensor
    values: Tensor
    rewards: Tensor
    bootstrap: Tensor
    returns: npt.NDArray[np.float64]
    successes: npt.NDArray[np.bool_] | None
    parts: dict[str, npt.NDArray[np.float64]]
    greedy: Rollout | None = None

    @property
    def steps(self) -> int:
        return int(self.episodes.lengths.sum())


def as_tensors(
    observation: Mapping[str, Any], names: tuple[str, ...], device: torch.device
) -> dict[str, Tensor]:
    """The observations ``names`` on a device."""
    return {name: torch.as_tensor(observation[name]).to(device) for name in names}


def collect(
    policy: TransformerPolicy,
    envs: Envs,
    seed: int | list[int],
    steps: int,
    generator: torch.Generator | None,
    on_step: Callable[[int], None] | None = None,
    *,
    group: int = 1,
    oracle: bool = False,
) -> Rollout:
    """Play whole episodes in every row, until each has ``steps`` steps or more behind it.

    Whole episodes need no state of the environment to go on from: a rollout depends on the weights, ``seed`` and
    ``generator`` alone. A row decides after each episode whether to play another, so short episodes are
    as frequent as they are.

    Args:
        policy: plays.
        envs: resets rows in the same step (``SAME_STEP``).
        seed: row i begins with ``seed + i``, or with ``seed[i]``.
        steps: at least so many in each row.
        generator: on the CPU; draws the actions. None takes the most likely ones, in float32 as
            :meth:`TransformerAgent.predict` does: which of two words leads is a matter of small differences.
        on_step: called after each step with the number of rows it counted in.
        group: how many rows, one after the other, begin with the same seed: the first step is worked out once for
            all of them. ``steps`` must be 1, which is one episode a row.
        oracle: play what the environment's ``oracle_actions()`` say in place of the policy, whose values and
            log-probabilities are 0 then.

    Raises:
        ValueError: if an episode doesn't end, or an action mask allows nothing.
        TypeError: if the environment has no oracle, or its actions can't be demonstrated.
    """
    if generator is None:
        policy = policy.in_float32()
    n, device = envs.num_envs, policy.device
    names = (*policy.fixed, *policy.changing)
    observation, infos = envs.reset(seed=seed)  # type: ignore[arg-type]
    cache = policy.cache(n // group, steps, rollout=True)
    repeated = torch.arange(n // group).repeat_interleave(group)
    guide = _oracle(envs) if oracle else None
    previous = torch.zeros((n, policy.actor.size), dtype=policy.actor.dtype)
    starts, active = np.ones(n, np.bool_), np.ones(n, np.bool_)
    taken, current, age = np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros(n, np.int64)
    record: dict[str, list[Tensor]] = {
        name: [] for name in ("actions", "log_probs", "values", "rewards", "masks")
    }
    changing: dict[str, list[Any]] = {name: [] for name in policy.changing}
    fixed: dict[str, list[Any]] = {name: [] for name in policy.fixed}
    rows: list[int] = []  # of each episode, as are those below
    begins: list[int] = []
    lengths: list[int] = []
    bootstrap: list[float] = []
    successes: list[bool | None] = []
    scores: list[dict[str, float]] = []
    time = 0
    while active.any():
        new = np.flatnonzero(starts & active)
        current[new] = np.arange(len(rows), len(rows) + len(new))
        age[new] = 0
        for name, parts in fixed.items():
            parts.append(observation[name][new])
        rows += new.tolist()
        begins += [time] * len(new)
        lengths += [0] * len(new)
        bootstrap += [0.0] * len(new)
        successes += [None] * len(new)
        scores += [{} for _ in new]

        masks = _masks(infos, policy, n)
        if guide is not None:
            raw = policy.actor.from_env(guide())
            log_probs = values = torch.zeros(n)
        else:
            # At first the rows of a group hold the same.
            shared = group if time == 0 else 1
            some = {name: observation[name][::shared] for name in names}
            described, values = policy.step(
                cache,
                as_tensors(some, names, device),
                previous[::shared].to(device),
                torch.as_tensor(starts[::shared]),
                None if masks is None else masks[::shared].to(device),
            )
            if shared > 1:
                at = repeated.to(device)
                cache, described, values = cache.take(repeated), described[at], values[at]
            raw = policy.actor.sample(described.cpu(), generator)
            log_probs = policy.actor.log_prob(described, raw.to(device))
        for name, kept in changing.items():
            kept.append(observation[name])
        observation, rewards, terminated, truncated, infos = envs.step(policy.actor.to_env(raw))
        with np.errstate(over="ignore"):
            gains = torch.as_tensor(np.asarray(rewards, np.float32))
        if not gains.isfinite().all():
            bad = np.asarray(rewards)[~gains.isfinite().numpy()][0]
            raise ValueError(f"rewards of the environment must be finite float32 numbers, got {bad}")
        now = {"actions": raw, "log_probs": log_probs.cpu(), "values": values.cpu(), "rewards": gains}
        for name, value in now.items():
            record[name].append(value)
        if masks is not None:
            record["masks"].append(masks)

        ended = terminated | truncated
        taken += active
        age += 1
        if age[active].max() > LONGEST:
            raise ValueError(
                f"an episode has no end after {LONGEST} steps; max_episode_steps can give it one"
            )
        cut = np.flatnonzero(active & truncated & ~terminated)
        if cut.size and guide is None:
            final = {name: np.stack([infos["final_obs"][row][name] for row in cut]) for name in names}
            at, going_on = torch.as_tensor(cut), torch.zeros(len(cut), dtype=torch.bool)
            last = as_tensors(final, names, device)
            after = policy.step(cache.take(at), last, raw[at].to(device), going_on)[1]
            for row, value in zip(cut, after.tolist(), strict=True):
                bootstrap[current[row]] = value
        last_info: dict[str, Any] = infos.get("final_info", {})
        told = last_info.get("is_success")
        reported = {k: v for k, v in last_info.items() if getattr(v, "dtype", np.dtype(int)).kind == "f"}
        for row in np.flatnonzero(active & ended):
            lengths[current[row]] = int(age[row])
            successes[current[row]] = None if told is None else bool(told[row])
            scores[current[row]] = {name: float(value[row]) for name, value in reported.items()}
        if on_step is not None:
            on_step(int(active.sum()))
        active &= ~(ended & (taken >= steps))
        previous, starts = raw, ended
        time += 1

    longest, length = max(lengths), torch.tensor(lengths)
    # Where each step of each episode stands in the record; padding is what comes after, of whatever episode.
    moments = torch.tensor(begins)[:, None] + torch.arange(longest)
    index = moments.clamp(max=time - 1), torch.tensor(rows)[:, None]
    whole = {name: torch.stack(parts)[index] for name, parts in record.items() if parts}  # (B, T, ...)
    seen = {name: torch.as_tensor(np.stack(parts))[index] for name, parts in changing.items()}
    first = {name: torch.as_tensor(np.concatenate(parts)) for name, parts in fixed.items()}
    episodes = Episodes(first, seen, whole["actions"], length, whole.get("masks"))
    paid = whole["rewards"] * episodes.valid
    return Rollout(
        episodes,
        whole["log_probs"],
        whole["values"],
        paid,
        torch.tensor(bootstrap),
        paid.double().sum(1).numpy(),
        None if None in successes else np.array(successes),
        {name: np.array([each.get(name, np.nan) for each in scores]) for name in scores[0]},
    )


def _oracle(envs: Envs) -> Callable[[], npt.NDArray[Any]]:
    guide = getattr(envs.unwrapped, "oracle_actions", None)
    if guide is None:
        raise TypeError(
            f"env must have oracle_actions() to be demonstrated, as those of this suite, got {envs.unwrapped}"
        )
    return guide


def _masks(infos: Mapping[str, Any], policy: TransformerPolicy, rows: int) -> Tensor | None:
    """``action_mask`` of the infos, ``(rows, K)`` bool on the CPU, or None where there is none."""
    if "action_mask" not in infos:
        return None
    given = torch.as_tensor(np.asarray(infos["action_mask"]).astype(np.bool_))
    sizes = getattr(policy.actor, "sizes", [])
    shape = (rows, sum(sizes))
    if tuple(given.shape) != shape or not all(part.any(-1).all() for part in given.split(sizes, -1)):
        raise ValueError(
            f"infos['action_mask'] must be {shape} and allow an action of each component, got {tuple(given.shape)}"
        )
    return given


def batched(
    observation: Mapping[str, Any], names: tuple[str, ...], space: spaces.Dict
) -> tuple[dict[str, npt.NDArray[Any]], bool]:
    """Observations with a batch axis, pictures channels last, and whether they came without the axis."""
    if not isinstance(observation, Mapping):
        raise TypeError(f"observation must be a dict of {', '.join(names)}, got {type(observation).__name__}")
    arrays, alone = {}, {}
    for name in names:
        if name not in observation:
            raise ValueError(f"observation lacks {name!r}; it needs {', '.join(names)}")
        part: Any = space[name]
        array, shape = np.asarray(observation[name]), part.shape
        alone[name] = array.ndim == len(shape)
        array = array[None] if alone[name] else array
        if len(shape) == 3 and array.shape[1:] == (shape[2], *shape[:2]) != shape:
            array = array.transpose(0, 2, 3, 1)
        if array.shape[1:] != shape:
            raise ValueError(
                f"observation[{name!r}] must be (B, {', '.join(map(str, shape))}), got {array.shape}"
            )
        arrays[name] = array
    if len({(alone[name], len(array)) for name, array in arrays.items()}) > 1:
        told = ", ".join(f"{name} {'none' if alone[name] else len(array)}" for name, array in arrays.items())
        raise ValueError(f"observations must have one batch size, got {told}")
    return arrays, alone[names[0]]


def check_envs(envs: Any) -> None:
    """Refuse what :func:`collect` can't play."""
    if not isinstance(envs, gym.vector.VectorEnv):
        raise TypeError(
            f"env must be an id or a Gymnasium vector environment, got {type(envs).__name__}; gym.make_vec makes one"
        )
    mode = envs.metadata.get("autoreset_mode")
    if mode != AutoresetMode.SAME_STEP:
        raise ValueError(f"env must have autoreset_mode='SameStep', got {getattr(mode, 'value', mode)!r}")
    if not isinstance(envs.single_observation_space, spaces.Dict):
        raise TypeError(f"env must have Dict observations, got {envs.single_observation_space}")
    if getattr(envs.unwrapped, "text", "ids") != "ids":
        raise ValueError("text must be 'ids' for a transformer policy, got 'string'")
