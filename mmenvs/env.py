"""The single environment: a batch of one over a task."""

from __future__ import annotations

import inspect
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from mmenvs import registry
from mmenvs.checks import one_of
from mmenvs.spaces import modality_of
from mmenvs.tasks import checked
from mmenvs.tasks.base import Task
from mmenvs.text import Vocabulary

_ONE = np.zeros(1, np.int64)


def new_seed(generator: np.random.Generator) -> int:
    """A seed for an episode stream that nobody seeded."""
    return int(generator.integers(2**63))


def seed_word(seed: int) -> np.uint64:
    """A seed of any size as the 64 bits that key the streams: itself, or a hash of one that is larger."""
    seed = int(seed)
    return np.uint64(seed) if seed < 2**64 else np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]


def check_options(options: dict[str, Any] | None, allowed: tuple[str, ...]) -> None:
    """Refuse options of ``reset`` that would be ignored."""
    if options is not None and not isinstance(options, dict):
        raise TypeError(f"options must be None or a dict, got {options!r}")
    unknown = sorted(set(options or ()) - set(allowed))
    if unknown:
        raise ValueError(f"options must have no keys but {list(allowed)}, got {unknown}")


def string_space(space: spaces.Dict, vocabulary: Vocabulary) -> spaces.Dict:
    """``space`` with ``Text`` in place of word ids."""
    charset = "".join(sorted(set(" ".join(vocabulary.words))))
    longest = max(map(len, vocabulary.words)) + 1
    return spaces.Dict(
        {
            key: spaces.Text(longest * part.shape[0], min_length=0, charset=charset)
            if modality_of(part) == "text" and part.shape
            else part
            for key, part in space.items()
        }
    )


def load_and_check(
    task: str | type[Task], num_envs: int, text: str, kwargs: dict[str, Any], others: tuple[str, ...] = ()
) -> Task:
    """Build the task of an environment; ``TypeError`` names an argument that neither it nor the caller (``others``) knows."""
    one_of("text", text, ("ids", "string"))
    cls = registry.load_task(task) if isinstance(task, str) else task
    try:
        made = cls(num_envs, **kwargs)
    except TypeError as error:
        if "unexpected keyword argument" in str(error):
            known = [name for name in inspect.signature(cls).parameters if name != "num_envs"]
            known += others
            raise TypeError(f"{cls.__name__}: {error}; it takes {', '.join(known)}") from None
        raise
    checked.check_task(made, num_envs, text, kwargs)
    return made


class MultimodalEnv(gym.Env[dict[str, Any], int]):
    """One episode of a task at a time. Make it with ``gym.make(id)``; the task's docstring is the page.

    Args:
        task: task class or ``"module:Class"``; the id brings it along.
        text: ``"ids"`` for word ids (int64), ``"string"`` for plain sentences in a ``Text`` space.
        render_mode: ``None`` or ``"rgb_array"``; ``gym.make`` turns ``"human"`` into a window by itself.
        **kwargs: arguments of the task (``split``, ``difficulty``, ``image_size``, ...).
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 1}  # noqa: RUF012
    action_space: spaces.Discrete  # type: ignore[assignment]
    observation_space: spaces.Dict

    def __init__(
        self, task: str | type[Task], *, text: str = "ids", render_mode: str | None = None, **kwargs: Any
    ) -> None:
        one_of("render_mode", render_mode, (None, "rgb_array"))
        self.task = load_and_check(task, 1, text, kwargs, ("text", "render_mode"))
        self.text = text
        self.render_mode = render_mode
        self.action_space = self.task.action_space
        self.observation_space = self.task.observation_space
        if text == "string":
            self.observation_space = string_space(self.task.observation_space, self.task.vocabulary)
        self._seed: int | None = None
        self._episode = 0
        self._running = self._observed = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin the next episode of the stream of ``seed``, or of the last seed if it is None.

        ``options`` has no keys here; any is a ``ValueError``.
        """
        check_options(options, ())
        super().reset(seed=seed)
        if seed is not None:
            self._seed, self._episode = seed, 0
        elif self._seed is None:
            self._seed, self._episode = new_seed(self.np_random), 0
        else:
            self._episode += 1
        self.task.start(_ONE, np.array([seed_word(self._seed)]), np.array([self._episode]))
        self._running = True
        return self._observation(), self._info()

    def step(self, action: int) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Act once.

        Raises:
            gymnasium.error.ResetNeeded: before ``reset`` or after the end of an episode.
            gymnasium.error.InvalidAction: if the action isn't an integer of the action space.
        """
        if not self._running:
            raise gym.error.ResetNeeded("the episode has ended or not begun: call reset() before step()")
        # To Gymnasium a bool is an integer; the vector environment refuses an array of them, too.
        if isinstance(action, bool) or not self.action_space.contains(action):
            raise gym.error.InvalidAction(
                f"action must be an integer from 0 to {self.action_space.n - 1}, got {action!r}"
            )
        rewards, ended = checked.step(self.task, _ONE, np.array([action], np.int64))
        self._running = not ended[0]
        return self._observation(), float(rewards[0]), bool(ended[0]), False, self._info()

    def oracle_action(self) -> int:
        """The best next action of the current episode."""
        self._need_episode()
        return int(checked.oracle(self.task, _ONE)[0])

    def describe(self) -> dict[str, Any]:
        """The current episode in words; the answer once it has ended."""
        self._need_episode()
        return self.task.describe(0)

    def render(self) -> npt.NDArray[np.uint8] | None:
        """A picture of the episode for people, ``(H, W, 3)`` uint8, if ``render_mode="rgb_array"``."""
        if self.render_mode is None:
            gym.logger.warn(
                'render() without a render mode: make the environment with render_mode="rgb_array"'
            )
            return None
        self._need_episode()
        return checked.render(self.task, 0)

    def _need_episode(self) -> None:
        if self._seed is None:
            raise gym.error.ResetNeeded("no episode has begun: call reset() first")

    def _observation(self) -> dict[str, Any]:
        out = {
            key: np.empty((1, *(part.shape or ())), part.dtype)
            for key, part in self.task.observation_space.items()
        }
        if self._observed:
            self.task.observe(_ONE, out)
        else:
            checked.observe(self.task, _ONE, out)
            self._observed = True
        observation: dict[str, Any] = {key: value[0] for key, value in out.items()}
        for key, part in self.observation_space.items():
            if isinstance(part, spaces.Text):
                observation[key] = self.task.vocabulary.decode(observation[key])
        return observation

    def _info(self) -> dict[str, Any]:
        return {
            key: self.task.info_types[key](value[0]) for key, value in checked.info(self.task, _ONE).items()
        }
