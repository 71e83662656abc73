"""Stable-Baselines3: the native vector environments as its ``VecEnv``, the extractor as its features extractor."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from mmenvs.checks import integer_in
from mmenvs.embeddings import Extractor, Fusion
from mmenvs.embeddings.extractor import Precision
from mmenvs.env import check_options
from mmenvs.spaces import Modality, channels_last, picture_shape
from mmenvs.vector import MultimodalVectorEnv

Observation = Any  # {name: (n, ...)}, or (n, features_dim) of a pooled embedding


class MultimodalVecEnv(VecEnv):
    """A native vector environment with the interface Stable-Baselines3 wants.

    Pictures are handed over channels first, as views that cost nothing, so that Stable-Baselines3 doesn't
    wrap the environment in ``VecTransposeImage``, which copies every observation twice. Rows that ended
    are reset in the same step; their info holds ``terminal_observation``, ``TimeLimit.truncated``,
    ``is_success`` and the other values of the task's info, and ``episode`` with return ``r``, length ``l``
    and seconds ``t`` since the start, as its ``Monitor`` gives them.

    Args:
        env: from ``gym.make_vec``, with ``SAME_STEP`` autoreset, or a wrapper around it such as
            :class:`mmenvs.wrappers.VectorEmbedObservation`.

    Raises:
        TypeError: if ``env`` is no vector environment.
        ValueError: if it resets in another way.
    """

    def __init__(self, env: gym.vector.VectorEnv[Any, Any, Any]) -> None:
        if not isinstance(env, gym.vector.VectorEnv):
            raise TypeError(f"env must be a vector environment, as gym.make_vec gives it, got {env!r}")
        mode = env.metadata["autoreset_mode"]
        if mode != AutoresetMode.SAME_STEP:
            raise ValueError(f"env must have autoreset_mode='SameStep', got {mode.value!r}")
        self.env = env
        self.native: MultimodalVectorEnv = env.unwrapped  # type: ignore[assignment]
        space: Any = env.single_observation_space
        self._pictures: tuple[str, ...] = ()
        if isinstance(space, spaces.Dict):
            self._pictures = tuple(name for name, part in space.items() if _is_picture(part))
            turned = {name: picture_shape(space[name].shape or ()) for name in self._pictures}
            space = spaces.Dict(
                {
                    name: spaces.Box(0, 255, turned[name], np.uint8) if name in turned else part
                    for name, part in space.items()
                }
            )
        self._returns = np.zeros(env.num_envs)
        self._lengths = np.zeros(env.num_envs, np.int64)
        self._start = time.perf_counter()
        self._actions: npt.NDArray[np.int64] | None = None
        super().__init__(env.num_envs, space, env.single_action_space)

    def replace(self, env: gym.vector.VectorEnv[Any, Any, Any]) -> None:
        """Go on with another vector environment, to be reset before its first step. Observations of the old one say nothing now.

        Raises:
            ValueError: if its rows, its spaces or its autoreset differ.
        """
        other = MultimodalVecEnv(env)
        for name in ("num_envs", "observation_space", "action_space"):
            had, has = getattr(self, name), getattr(other, name)
            if had != has:
                raise ValueError(f"{name} of env must be {had}, got {has}")
        self.env.close()
        self.env, self.native = env, other.native

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seeds of the next reset: row i gets ``seed + i``; None draws them."""
        return super().seed(None if seed is None else integer_in("seed", seed, 0, 2**63 - 1))

    def set_options(self, options: list[dict[str, Any]] | dict[str, Any] | None = None) -> None:
        """The environments take no options at a reset; any are a ``ValueError``."""
        for each in options if isinstance(options, list) else [options]:
            check_options(each, ())
        super().set_options(options)

    def reset(self) -> Observation:
        seeds = None if self._seeds[0] is None else [int(seed) for seed in self._seeds if seed is not None]
        observation, _ = self.env.reset(seed=seeds)  # type: ignore[arg-type]
        self._reset_seeds()
        self._reset_options()
        self._returns[:] = 0.0
        self._lengths[:] = 0
        return self._channels_first(observation)

    def step_async(self, actions: npt.NDArray[Any]) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[Observation, npt.NDArray[Any], npt.NDArray[Any], list[dict[str, Any]]]:
        observation, rewards, terminated, truncated, infos = self.env.step(self._actions)
        self._returns += rewards
        self._lengths += 1
        ended = terminated | truncated
        # One dict for each row, as users may write into it.
        rows: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if ended.any():
            self._fill(rows, np.flatnonzero(ended), terminated, infos)
        return self._channels_first(observation), rewards.astype(np.float32), ended, rows

    def _fill(
        self,
        rows: list[dict[str, Any]],
        ended: npt.NDArray[np.int64],
        terminated: npt.NDArray[np.bool_],
        infos: dict[str, Any],
    ) -> None:
        """Write the infos of the rows that ended."""
        seconds = round(time.perf_counter() - self._start, 6)
        final = {
            name: values[ended].tolist() for name, values in infos["final_info"].items() if name[0] != "_"
        }
        columns = zip(
            ended.tolist(),
            np.round(self._returns[ended], 6).tolist(),
            self._lengths[ended].tolist(),
            (~terminated[ended]).tolist(),
            *final.values(),
            strict=True,
        )
        for row, total, length, cut, *values in columns:
            info = rows[row]
            info["terminal_observation"] = self._channels_first(infos["final_obs"][row], 0)
            info["TimeLimit.truncated"] = cut
            info["episode"] = {"r": total, "l": length, "t": seconds}
            info.update(zip(final, values, strict=True))
        self._returns[ended] = 0.0
        self._lengths[ended] = 0

    def _channels_first(self, observation: Any, batch: int = 1) -> Observation:
        if not self._pictures:
            return observation
        axes = (0, 3, 1, 2) if batch else (2, 0, 1)
        return {
            name: value.transpose(axes) if name in self._pictures else value
            for name, value in observation.items()
        }

    def close(self) -> None:
        self.env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The attribute of the vector environment or its task, once for each of ``indices``."""
        return [_find(self, attr_name)] * len(self._rows(indices))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of the vector environment; the rows share it, so ``indices`` must name all.

        Raises:
            ValueError: if ``indices`` leaves out a row.
        """
        if len(set(self._rows(indices))) != self.num_envs:
            raise ValueError(f"set_attr sets all {self.num_envs} rows at once, got indices={indices!r}")
        setattr(self.native, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """``describe``, ``oracle_action``, ``render``, or a method of the vector environment, for each row.

        Raises:
            AttributeError: if neither the environment nor its task has the method.
        """
        rows = self._rows(indices)
        if method_name == "describe":
            return [self.native.describe(row) for row in rows]
        if method_name == "oracle_action":
            return self.native.oracle_actions()[rows].tolist()
        if method_name == "render":
            images = self.get_images()
            return [images[row] for row in rows]
        result = _find(self, method_name)(*args, **kwargs)
        return [result] * len(rows)

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: Any = None) -> list[bool]:
        # It keeps Monitor's statistics itself; evaluate_policy asks for this.
        return [wrapper_class.__name__ == "Monitor"] * len(self._rows(indices))

    def get_images(self) -> Sequence[npt.NDArray[np.uint8] | None]:
        return self.native.render() or [None] * self.num_envs

    def _rows(self, indices: Any) -> list[int]:
        return list(self._get_indices(indices))


def make_vec_env(
    id: str,
    n_envs: int = 1,
    seed: int | None = None,
    *,
    wrap: Callable[[MultimodalVectorEnv], gym.vector.VectorEnv] | None = None,
    **env_kwargs: Any,
) -> MultimodalVecEnv:
    """``n_envs`` rows of an environment of this suite, native and batched, for Stable-Baselines3.

    Args:
        id: such as ``"MMRL/VQA-v0"``.
        n_envs: number of rows.
        seed: row i starts with ``seed + i``; None leaves that to the algorithm's own ``seed``.
        wrap: wraps the native environment, for example ``lambda envs: VectorEmbedObservation(envs, "shapes")``.
        **env_kwargs: arguments of the environment, such as ``split`` and ``difficulty``.

    Raises:
        ValueError: if ``id`` has no native vector environment of this suite.
    """
    env = gym.make_vec(id, num_envs=n_envs, **env_kwargs)
    if not isinstance(env, MultimodalVectorEnv):
        raise ValueError(
            f"id must be an environment of this suite, got {id!r}; "
            "stable_baselines3.common.env_util.make_vec_env takes all others"
        )
    if env.text != "ids":
        raise ValueError(f"text must be 'ids' for Stable-Baselines3, got {env.text!r}")
    adapter = MultimodalVecEnv(env if wrap is None else wrap(env))
    if seed is not None:
        adapter.seed(seed)
    return adapter


class MultimodalExtractor(BaseFeaturesExtractor):
    """:class:`mmenvs.embeddings.Extractor` as a features extractor of ``MultiInputPolicy``.

    Pass it as ``policy_kwargs=dict(features_extractor_class=MultimodalExtractor,
    features_extractor_kwargs=dict(fusion=...))``. It works on :func:`make_vec_env` and on any environment
    with the same spaces; ``normalize_images`` stays True, its default in Stable-Baselines3.

    Args:
        observation_space: given by Stable-Baselines3.
        **others: as for :class:`mmenvs.embeddings.Extractor`.
    """

    def __init__(
        self,
        observation_space: spaces.Dict,
        encoders: Mapping[str, str | nn.Module] | None = None,
        fusion: str | type[Fusion] = "cross_attention",
        features_dim: int = 256,
        modalities: Mapping[str, Modality] | None = None,
        width: int = 64,
        precision: Precision = "float32",
        visible: Sequence[str] | None = None,
    ) -> None:
        super().__init__(observation_space, integer_in("features_dim", features_dim, 1, 2**20))
        self.extractor = Extractor(
            observation_space, encoders, fusion, features_dim, modalities, width, precision, visible
        )
        # Stable-Baselines3 brings single pictures to [0, 1] and leaves sets of pictures as they are.
        self._unscaled = tuple(
            name for name, modality in self.extractor.modalities.items() if modality == "images"
        )

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        """Features ``(B, features_dim)`` of observations preprocessed by Stable-Baselines3."""
        scaled = {name: observations[name] / 255.0 for name in self._unscaled}
        return self.extractor({**observations, **scaled})


def _is_picture(space: spaces.Space) -> bool:
    """Whether it is a picture that Stable-Baselines3 would turn."""
    shape = space.shape or ()
    return (
        isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(shape) == 3 and channels_last(shape)
    )


def _find(adapter: MultimodalVecEnv, name: str) -> Any:
    """An attribute of the vector environment, its wrapper first, or else of its task."""
    for owner in (adapter.env, adapter.native):
        if hasattr(owner, name):
            return getattr(owner, name)
    return getattr(adapter.native.task, name)
