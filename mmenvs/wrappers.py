"""Wrappers that put a frozen embedding in the place of raw observations, so that any MLP agent can work on them."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from mmenvs.embeddings.cache import EmbeddingCache, Section
from mmenvs.embeddings.embedding import Embedding, Output, load_embedding, resolve_device
from mmenvs.embeddings.extractor import Extractor
from mmenvs.embeddings.keys import Keys, hash_rows, pool_keys
from mmenvs.tasks.base import Task
from mmenvs.vector import MultimodalVectorEnv

Array = npt.NDArray[Any]
Encoded = npt.NDArray[np.float32]
AnyEmbedding = str | Extractor | Mapping[str, torch.nn.Module] | Embedding
AnyCache = EmbeddingCache | str | os.PathLike[str] | None


class Encoder:
    """An embedding on a device, with a cache before it: NumPy batches in and out.

    Args:
        embedding, observation_space, output: as for :func:`mmenvs.embeddings.load_embedding`.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        cache: None, a cache, or the folder of one.

    Attributes:
        space: what :meth:`join` gives for one row: ``Box (features_dim,)`` for pooled output, a ``Dict`` of
            ``Box (T, d)`` for tokens, float32.
    """

    def __init__(
        self,
        embedding: AnyEmbedding,
        observation_space: spaces.Space,
        output: Output = "pooled",
        device: str = "auto",
        cache: AnyCache = None,
    ) -> None:
        self.device = resolve_device(device)
        self.embedding = load_embedding(embedding, observation_space, output).to(self.device)
        self.names = tuple(self.embedding.dims)
        self.cache = EmbeddingCache(cache) if isinstance(cache, str | os.PathLike) else cache
        if self.cache is not None and not isinstance(self.cache, EmbeddingCache):
            raise TypeError(f"cache must be None, an EmbeddingCache or a folder, got {cache!r}")
        self.space: spaces.Space = spaces.Box(-np.inf, np.inf, (self.embedding.features_dim,), np.float32)
        if output == "tokens":
            self.space = spaces.Dict(
                {
                    name: spaces.Box(-np.inf, np.inf, dims, np.float32)
                    for name, dims in self.embedding.dims.items()
                }
            )

    def encode(self, name: str, rows: Array, keys: Keys | None = None) -> Encoded:
        """Encodings ``(n, T * d)`` float32 of raw observations ``(n, ...)`` of one name.

        Args:
            name: which observation.
            rows: the observations.
            keys: of the rows in the cache; None hashes them if there is a cache.

        Raises:
            ValueError: if the encoder gives what isn't finite.
        """
        section = self.section(name)
        if section is None:
            return self.forward(name, rows)
        keys = hash_rows(rows) if keys is None else keys
        values, hit = section.lookup(keys)
        if not hit.all():
            missing = ~hit
            values[missing] = fresh = self.forward(name, rows[missing])
            section.store(keys[missing], fresh)
        return values

    def section(self, name: str) -> Section | None:
        """Where the cache keeps the encodings of one name."""
        if self.cache is None:
            return None
        length, d = self.embedding.dims[name]
        return self.cache.section(self.embedding.fingerprints[name], length * d)

    def join(self, encoded: Mapping[str, Encoded]) -> Any:
        """The observations that agents see, of rows encoded name by name."""
        if self.embedding.output == "pooled":
            return np.concatenate([encoded[name] for name in self.names], 1)
        # Copies: agents may write into what they are given.
        return {name: encoded[name].reshape(-1, *self.embedding.dims[name]).copy() for name in self.names}

    def forward(self, name: str, rows: Array) -> Encoded:
        """Encodings ``(n, T * d)`` float32 of raw observations ``(n, ...)`` of one name, whatever is cached."""
        x = torch.as_tensor(rows).to(self.device)
        return self.embedding.encode({name: x})[name].flatten(1).cpu().numpy()


class EmbedObservation(gym.ObservationWrapper[Any, Any, Any], gym.utils.RecordConstructorArgs):
    """A single environment whose observations are embedded.

    The raw environment stays reachable as ``unwrapped``. An observation that is as it was in the step before
    isn't encoded again. A cache is asked by content, with ``pool_size`` too.

    Args:
        env: environment with a flat ``Dict`` of ``Box``.
        embedding: ``"shapes"``, an extractor, a dict of encoders or an :class:`~mmenvs.embeddings.Embedding`.
        output: ``"pooled"`` gives ``Box (features_dim,)``, ``"tokens"`` a ``Dict`` of ``Box (T, d)``, float32.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        cache: None, an :class:`~mmenvs.embeddings.EmbeddingCache` or the folder of one.

    Raises:
        ValueError, TypeError: as :func:`mmenvs.embeddings.load_embedding` does, and for an unknown device.
    """

    def __init__(
        self,
        env: gym.Env[Any, Any],
        embedding: AnyEmbedding,
        output: Output = "pooled",
        device: str = "auto",
        cache: AnyCache = None,
    ) -> None:
        gym.utils.RecordConstructorArgs.__init__(
            self, _disable_deepcopy=True, embedding=embedding, output=output, device=device, cache=cache
        )
        gym.ObservationWrapper.__init__(self, env)
        _not_embedded(env, env.observation_space)
        self.encoder = Encoder(embedding, env.observation_space, output, device, cache)
        self.observation_space = self.encoder.space
        self._last: dict[str, tuple[Array, Encoded]] = {}

    def observation(self, observation: Mapping[str, Array]) -> Any:
        """The embedding of one raw observation."""
        encoded = {}
        for name in self.encoder.names:
            raw = observation[name]
            last = self._last.get(name)
            if last is None or not np.array_equal(last[0], raw):
                last = self._last[name] = (raw.copy(), self.encoder.encode(name, raw[None]))
            encoded[name] = last[1]
        joined = self.encoder.join(encoded)
        return {k: v[0] for k, v in joined.items()} if isinstance(joined, dict) else joined[0]


class VectorEmbedObservation(gym.vector.VectorWrapper[Any, Any, Any, Any, Array]):
    """A vector environment whose observations are embedded, all rows in one call of each encoder a step.

    With the native environments, what is fixed within an episode is encoded once an episode, and the final
    observation of an episode gets the embedding it had before. On a task with ``pool_size`` the cache is asked
    by the pool's index, without a hash. ``infos["final_obs"]`` is embedded as well.

    It is a ``VectorWrapper``: Gymnasium's ``VectorObservationWrapper`` refuses ``SAME_STEP`` autoreset.

    Args:
        env: vector environment with a flat ``Dict`` of ``Box``.
        embedding, output, device, cache: as for :class:`EmbedObservation`.

    Raises:
        ValueError, TypeError: as :class:`EmbedObservation`.
    """

    def __init__(
        self,
        env: gym.vector.VectorEnv[Any, Any, Any],
        embedding: AnyEmbedding,
        output: Output = "pooled",
        device: str = "auto",
        cache: AnyCache = None,
    ) -> None:
        super().__init__(env)
        _not_embedded(env, env.single_observation_space)
        self.encoder = Encoder(embedding, env.single_observation_space, output, device, cache)
        self.single_observation_space = self.encoder.space
        self.observation_space = batch_space(self.encoder.space, env.num_envs)
        # A wrapper in between may change what the task keeps fixed.
        native = isinstance(env, MultimodalVectorEnv) and env.autoreset_mode == AutoresetMode.SAME_STEP
        self._fixed: frozenset[str] = env.task.fixed if native else frozenset()  # type: ignore[attr-defined]
        self._pools: dict[str, str] = {}
        if native and self.encoder.cache is not None and env.task.pool_size is not None:  # type: ignore[attr-defined]
            self._pools = pool_names(env.task)  # type: ignore[attr-defined]
        self._encoded: dict[str, Encoded] = {}

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset and embed; arguments as for the environment."""
        observation, infos = self.env.reset(seed=seed, options=options)
        rows = np.arange(self.num_envs)
        self._encoded = {name: self._encode(name, observation[name], rows) for name in self.encoder.names}
        return self.encoder.join(self._encoded), infos

    def step(self, actions: Any) -> tuple[Any, Array, Array, Array, dict[str, Any]]:
        """Step and embed; arguments as for the environment."""
        observation, rewards, terminated, truncated, infos = self.env.step(actions)
        ended = np.flatnonzero(infos["_final_obs"]) if "final_obs" in infos else np.zeros(0, np.int64)
        final: dict[str, Encoded] = {}
        for name in self.encoder.names:
            before, raw = self._encoded[name], observation[name]
            if name in self._fixed:
                final[name] = before[ended]
                if ended.size == self.num_envs:
                    self._encoded[name] = self._encode(name, raw, ended)
                elif ended.size:
                    # A copy: what an encoder gave may be a view.
                    self._encoded[name] = now = before.copy()
                    now[ended] = self._encode(name, raw[ended], ended)
                continue
            last = [infos["final_obs"][row][name] for row in ended]
            both = self.encoder.encode(name, np.concatenate([raw, np.stack(last)]) if last else raw)
            self._encoded[name], final[name] = both[: self.num_envs], both[self.num_envs :]
        if ended.size:
            infos["final_obs"] = self._rows_of(self.encoder.join(final), ended)
        return self.encoder.join(self._encoded), rewards, terminated, truncated, infos

    def oracle_actions(self) -> npt.NDArray[np.int64]:
        """The best next action of every row, ``(num_envs,)`` int64, of the native environment."""
        return self.unwrapped.oracle_actions()  # type: ignore[attr-defined]

    def describe(self, row: int) -> dict[str, Any]:
        """The episode of ``row`` in words, of the native environment."""
        return self.unwrapped.describe(row)  # type: ignore[attr-defined]

    def _encode(self, name: str, raw: Array, rows: npt.NDArray[np.int64]) -> Encoded:
        keys = None
        if name in self._pools:
            keys = pool_keys(self._pools[name], self.env.task.pool_index[rows])  # type: ignore[attr-defined]
        return self.encoder.encode(name, raw, keys)

    def _rows_of(self, joined: Any, rows: npt.NDArray[np.int64]) -> Array:
        """Rows one by one in an object array with a place for every row, Gymnasium's form."""
        out = np.full(self.num_envs, None, dtype=object)
        for i, row in enumerate(rows):
            out[row] = {k: v[i] for k, v in joined.items()} if isinstance(joined, dict) else joined[i]
        return out


def _not_embedded(env: Any, space: spaces.Space) -> None:
    """Say so where observations are a vector because they are embedded; ``load_embedding`` refuses other ones."""
    while not isinstance(space, spaces.Dict) and isinstance(env, gym.Wrapper | gym.vector.VectorWrapper):
        if isinstance(env, EmbedObservation | VectorEmbedObservation):
            raise TypeError(
                "env must have raw observations: one that is embedded already can't be embedded again"
            )
        env = env.env


def room(task: Task) -> dict[str, Array]:
    """Arrays of ``num_envs`` rows for the observations of a task that are fixed in an episode."""
    parts = {key: task.observation_space[key] for key in task.observation_space if key in task.fixed}
    return {key: np.zeros((task.num_envs, *(part.shape or ())), part.dtype) for key, part in parts.items()}


def pool_names(task: Task) -> dict[str, str]:
    """For each observation that is fixed in an episode, the name of the task's pool in a cache.

    It holds what an item depends on beside its index, and a hash of all that is seen of item 0, in case the
    code that draws the items has changed or an argument of the task shows in no space.
    """
    twin = copy.deepcopy(task)
    twin.pool_index[0] = 0
    row = np.zeros(1, np.int64)
    twin.start_pool(row)
    out = room(task)
    twin.observe(row, out)
    seen = "".join(hash_rows(value[:1]).tobytes().hex() for value in out.values())
    kind = f"{type(task).__module__}:{type(task).__qualname__} {task.split} {task.difficulty}"
    # The spaces of all observations: one of them may tell what another depends on too, such as how many pictures.
    return {key: f"{kind} {task.observation_space} {task.action_space} {seen} {key}" for key in out}
