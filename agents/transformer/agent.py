"""The agent: a transformer policy that learns, predicts, is saved and goes on as if nothing had happened."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3.common.logger import Logger, make_output_format
from torch import Tensor

from mmenvs.checks import integer_in
from mmenvs.embeddings.extractor import Precision
from mmenvs.embeddings.optimizers import Muon
from mmenvs.embeddings.pretrained import Pretrained
from mmenvs.interrupts import asked_to_stop
from mmenvs.registry import task_class

from ..curriculum import Curriculum, Progress
from ..saved import agents_folder
from . import saving
from .algorithms import MODULES
from .callbacks import Callback, Hooks
from .config import Backbone, ModelConfig
from .devices import Devices, check_compile
from .imitation import EpisodeMemory
from .learning import Anchor, Recipe, check_group, log_probs_of
from .model import Cache, TransformerPolicy
from .ppo import PPORecipe
from .restraints import KL, HackingAlarm, Restraints
from .rollout import Envs, Rollout, as_tensors, batched, check_envs
from .settings import chosen, fitted, parts_of


@dataclass
class Playing:
    """What :meth:`TransformerAgent.predict` remembers of the running episodes: hand it back, once."""

    cache: Cache
    previous: Tensor  # (B, A) raw actions


class TransformerAgent:
    """A decoder-only multimodal transformer that learns an environment.

    Args:
        env: id of this suite, or a Gymnasium vector environment with ``SAME_STEP`` autoreset and flat ``Dict``
            observations.
        size: ``"nano"`` (1 million parameters), ``"small"`` (10), ``"base"`` (90), or a
            :class:`~mmenvs_agents.transformer.config.ModelConfig`; None is that of ``init``, or nano.
        method: ``"ppo"``, one of ``"grpo"``, ``"dr_grpo"``, ``"dapo"``, ``"rloo"``, ``"scst"``, ``"reinforce"``, or
            ``"dpo"``, or ``"supervised"``, which clones the oracle.
        encoders: as for :class:`mmenvs.embeddings.Extractor`, by name or :class:`~mmenvs.embeddings.Pretrained`;
            None is those of ``init``, or the defaults.
        fusion: how observations that come together are fused beside the transformer, ``"concat"`` or another name in
            :data:`mmenvs.embeddings.FUSIONS`; or ``"attention"``, the transformer's own alone. A single observation
            has nothing to be fused with. None is that of ``init``, or ``"concat"``.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``. Under ``accelerate launch`` each process makes the same agent, has
            its own device and plays its share of the rows; a vector environment is the share of its process.
        seed: of weights, actions and episodes.
        env_kwargs: arguments of the environment, such as ``{"difficulty": 1}``; with an id only.
        precision: of rollouts and updates, ``"float32"`` or ``"bfloat16"``; None is what is fast here. The most likely
            actions are found in float32 always.
        recipe: settings of the method; None is its defaults.
        restraints: what holds down the unwanted; None is nothing.
        init: folder of an agent whose policy this one begins with, and is pulled back to if ``restraints`` say so.
        fixed, history: names of observations that don't change within an episode, and that hold the actions so
            far; None takes what the task says, or none.
        backbone: a causal language model of Hugging Face in the trunk's place, by name, folder or
            :class:`~mmenvs_agents.transformer.config.Backbone`; of ``size`` only ``token_width`` counts then.
        lora: rank of the adapters that train in the backbone's place; 0 trains all its weights.
        curriculum: begin at difficulty 0 and rise to that in ``env_kwargs``, which is ``curriculum.last``; with an id only.
        temperature: of the policy, in play and in learning: over 1 it tries more, under 1 less (Boltzmann exploration).
        compile: ``torch.compile`` the trunk in updates, on CUDA, or on a CPU with a C++ compiler. It takes a minute, and a
            checkpoint doesn't remember it.

    Attributes:
        policy, optimizer, settings, device: as made.
        reference: the policy as it was at the start, if something needs it, or None.
        coefficients: of the pull to it, and the multipliers of limits.
        memory: of episodes that PPO imitates, or None; with limits it doesn't.
        devices: the processes that learn together.
        handed: names of the environment's arguments that a checkpoint can't hold, beside those in ``settings``.
        progress: in the curriculum.
        parts: of the score, that the environments of this suite report at the end of an episode.
        num_timesteps: steps of the environment learned from.
        iteration: rollouts learned from.

    Raises:
        ValueError, TypeError, gymnasium.error.Error: for what doesn't exist or fit, with what does.
    """

    def __init__(
        self,
        env: str | Envs,
        size: str | ModelConfig | None = None,
        *,
        method: str = "ppo",
        encoders: Mapping[str, str | Pretrained] | None = None,
        fusion: str | None = None,
        device: str = "auto",
        seed: int = 0,
        env_kwargs: Mapping[str, Any] | None = None,
        precision: Precision | None = None,
        recipe: Recipe | None = None,
        restraints: Restraints | None = None,
        init: str | os.PathLike[str] | None = None,
        fixed: tuple[str, ...] | None = None,
        history: tuple[str, ...] | None = None,
        backbone: str | Backbone | None = None,
        lora: int = 0,
        curriculum: Curriculum | None = None,
        temperature: float | None = None,
        compile: bool = False,
    ) -> None:
        self.folders: set[Path] = set()  # that it was saved to or loaded from
        self.devices = Devices(device)
        self.device = self.devices.device
        settings = chosen(
            env, size, method=method, encoders=encoders, fusion=fusion, device=self.device, seed=seed,
            env_kwargs=env_kwargs, precision=precision, recipe=recipe, restraints=restraints, init=init,
            backbone=backbone, lora=lora, curriculum=curriculum, temperature=temperature,
        )  # fmt: skip
        check_compile(compile, self.device)
        rows = self.devices.share(settings.recipe.num_envs)
        check_group(getattr(settings.recipe, "group", 1), rows, several=False)
        envs: Envs
        if isinstance(env, str):
            task_class(env)
            envs = gym.make_vec(env, num_envs=rows, **settings.env_kwargs)
        else:
            envs = env
        check_envs(envs)
        task = getattr(envs.unwrapped, "task", None)
        self.parts = parts_of(task)
        self.settings = settings = fitted(settings, task, fixed, history)
        recipe, restraints, curriculum = settings.recipe, settings.restraints, settings.curriculum
        seen: Any = envs.single_observation_space
        self.observation_space, self.action_space = seen, envs.single_action_space
        # Weights are drawn from the seed, and the caller's generator stays as it is.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.policy = TransformerPolicy(
                seen, self.action_space, settings.model, settings.fixed, settings.history,
                settings.encoders, settings.precision, settings.backbone, settings.fusion,
            ).to(self.device)  # fmt: skip
        self.policy.actor.temperature = settings.temperature
        if init is not None:
            saving.begin_with(self.policy, init)
        self.reference = None
        if restraints.kl or method == "dpo":
            self.reference = copy.deepcopy(self.policy).requires_grad_(False)
        self.coefficients = restraints.begin()
        self.memory = None
        # With limits the worth of an episode changes with their multipliers.
        if isinstance(recipe, PPORecipe) and recipe.imitation and not restraints.limits:
            self.memory = EpisodeMemory(recipe.memory_mb)
        trunk, heads = self.policy.backbone, (self.policy.actor, self.policy.critic)
        if trunk is None:
            self.optimizer = Muon(self.policy, heads, recipe.learning_rate)
        else:
            self.settings = replace(settings, backbone=trunk.chosen)
            self.optimizer = Muon(
                self.policy, heads, recipe.learning_rate, pretrained=trunk.model, scale=trunk.scale
            )
        if compile:
            self.policy.compile_trunk()
        self.num_timesteps = self.iteration = 0
        self.logger = Logger(None, [])
        # Steps behind the weights; num_timesteps also counts those of a rollout that is being played.
        self._learned = 0
        self.progress = Progress()
        self.handed: tuple[str, ...] = ()
        self._envs = envs
        if curriculum is not None:
            curriculum.check(str(env), self.settings.env_kwargs, (*self.policy.fixed, *self.policy.changing))
            self._face(0)
        self._predicting = self._generator("predict", 0)

    @property
    def n_envs(self) -> int:
        """Rows of all processes together."""
        return self._envs.num_envs * self.devices.count

    def get_env(self) -> Envs:
        """The vector environment it learns on."""
        return self._envs

    def set_env(self, env: Envs) -> None:
        """Learn on another vector environment with the same spaces. A checkpoint names the one it was made with,
        so :meth:`load` must be handed the other.

        Raises:
            ValueError: if its spaces or its autoreset differ, or if a curriculum makes the environments.
        """
        check_envs(env)
        if self.settings.curriculum is not None:
            raise ValueError(f"env can't be set with a curriculum, which makes its own, got {env!r}")
        seen: Any = env.single_observation_space
        for name in (*self.policy.fixed, *self.policy.changing):
            if name not in seen.spaces or seen[name] != self.observation_space[name]:
                raise ValueError(
                    f"env must have the observation space {self.observation_space}, got {env.single_observation_space}"
                )
        if env.single_action_space != self.action_space:
            raise ValueError(
                f"env must have the action space {self.action_space}, got {env.single_action_space}"
            )
        self._envs = env

    def get_vec_normalize_env(self) -> None:
        """None, for callbacks of Stable-Baselines3: nothing is normalised."""

    def learn(
        self,
        total_steps: int,
        callback: Callback | None = None,
        progress_bar: bool = False,
        *,
        out: str | os.PathLike[str] | None = None,
        checkpoint_steps: int = 20_000,
        alarm: HackingAlarm | None = None,
    ) -> TransformerAgent:
        """Learn until ``total_steps`` steps of the environment, earlier ones counted in.

        Every draw is keyed by the seed and the number of the rollout, so an agent that was saved, or killed and
        loaded again, goes on to the same weights, bit by bit on one kind of CPU.

        Args:
            total_steps: end of learning and of the schedules; whole rollouts are played.
            callback: called with the agent after each update, False ends the learning; or a callback of
                Stable-Baselines3, of which ``on_step`` is called after each step of the vector environment.
            progress_bar: show steps, success and speed.
            out: folder for checkpoints, ``progress_<first step>.csv`` and TensorBoard logs; None keeps nothing.
            checkpoint_steps: save about every this many steps, and at the end.
            alarm: watches a held-out score.

        Raises:
            ValueError: if ``total_steps`` are behind it already.
            NonFiniteGradientError: if a gradient is NaN or infinite. Nothing is saved then; the last checkpoint stands.
        """
        integer_in("total_steps", total_steps, 1, 10**15)
        integer_in("checkpoint_steps", checkpoint_steps, 1, 10**15)
        if not self.devices.main:
            out = None
        if out is not None:
            agents_folder(out, self.folders)
        if total_steps <= self.num_timesteps:
            raise ValueError(
                f"total_steps must be over the {self.num_timesteps} already done, got {total_steps}"
            )
        hooks = Hooks(self, callback, total_steps, progress_bar)
        if out is not None:
            formats = [
                make_output_format(kind, str(out), f"_{self._learned}") for kind in ("csv", "tensorboard")
            ]
            self.logger = Logger(str(out), formats)
        saved, whole = self._learned, True
        try:
            hooks.begin()
            while self._learned < total_steps and not hooks.stop:
                rollout = self._collect(hooks)
                whole = False
                paid = self.settings.restraints.apply(rollout, self.coefficients)
                log = self._update(paid, total_steps)
                log |= self._judged(rollout, hooks)
                whole = True
                if alarm is not None:
                    log |= alarm(self, paid)
                hooks.updated(rollout, log)
                if out is not None and self._learned - saved >= checkpoint_steps:
                    self.save(out)
                    saved = self._learned
        finally:
            # Within an update the weights are fit for nothing; the last checkpoint stands.
            if out is not None and whole and self._learned > saved:
                self.save(out)
            self.num_timesteps = self._learned
            hooks.end()
            self.logger.close()
            self.logger = Logger(None, [])
        self.devices.wait()  # for the checkpoint
        return self

    def _collect(self, hooks: Hooks) -> Rollout:
        rank = self.devices.rank
        hooks.playing()
        # Anew for each rollout, since what is encoded beside what else may differ in the last bit.
        self.policy.extractor.remember()
        rollout: Rollout = MODULES[self.settings.method].play(
            self.policy,
            self._envs,
            self.settings.recipe,
            # Row i of seed s is row i - 1 of seed s + 1: rollouts must not share episodes.
            _word(self.settings.seed, "episodes", self.iteration) + rank * self._envs.num_envs,
            self._generator(f"actions {rank}" if rank else "actions", self.iteration),
            hooks.stepped,
        )
        return rollout

    def _update(self, rollout: Rollout, total_steps: int) -> dict[str, float]:
        recipe, restraints = self.settings.recipe, self.settings.restraints
        anchor = None
        if self.reference is not None:
            known = log_probs_of(self.reference, rollout.episodes, getattr(recipe, "group", 1))
            anchor = Anchor(known, self.coefficients[KL])
        log: dict[str, float] = MODULES[self.settings.method].update(
            self.policy,
            self.optimizer,
            rollout,
            recipe,
            1 - self._learned / total_steps,
            self._generator("shuffle", self.iteration),
            anchor,
            self.devices,
            **({} if self.memory is None else {"memory": self.memory}),
        )
        self.coefficients = restraints.adapt(self.coefficients, rollout, log, self.devices)
        self._counted(rollout)
        return log | restraints.logged(self.coefficients)

    def _counted(self, rollout: Rollout) -> None:
        """Note that the rollout has been learned from."""
        self.iteration += 1
        self._learned += int(self.devices.total(torch.tensor(rollout.steps)))
        self.num_timesteps = self._learned

    def _judged(self, rollout: Rollout, hooks: Hooks) -> dict[str, float]:
        """What is logged of the curriculum, once the rollout's episodes have been counted in."""
        curriculum = self.settings.curriculum
        if curriculum is None:
            return {}
        if rollout.successes is None:
            raise ValueError(f"a curriculum needs is_success in the infos, {self.settings.id} has none")
        level = self.progress.level
        counted = torch.tensor([len(rollout.successes), int(rollout.successes.sum())])
        rate = self.progress.count(curriculum, *self.devices.total(counted).tolist())
        if rate is not None:
            self._face(self.progress.level)
            hooks.promoted(
                f"difficulty {self.progress.level} after {self._learned:,} steps, at success {rate:.3f}"
            )
        return {"curriculum/difficulty": level}

    def _face(self, level: int) -> None:
        """Learn on episodes of another difficulty from now on."""
        kwargs = {**self.settings.env_kwargs, "difficulty": level}
        rows = self._envs.num_envs
        self._envs.close()
        self._envs = gym.make_vec(str(self.settings.id), num_envs=rows, **kwargs)

    def _generator(self, purpose: str, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(_word(self.settings.seed, purpose, number))

    def predict(
        self,
        observation: Mapping[str, Any],
        state: Playing | None = None,
        episode_start: Any = None,
        deterministic: bool = False,
        action_masks: Any = None,
    ) -> tuple[npt.NDArray[Any], Playing]:
        """Actions for a batch of observations, or for one without a batch axis, and the state to hand back.

        It computes in float32, so that what an agent answers doesn't depend on the precision it learns in, and on the
        machine by rounding alone.

        Args:
            observation: as the environment gives it; pictures may be channels first, as for Stable-Baselines3.
            state: what the last call returned, which this call uses up; None begins episodes in all rows, so an
                environment whose episodes have several steps needs it.
            episode_start: ``(B,)`` bool, True in rows where an episode begins.
            deterministic: take the most likely actions.
            action_masks: ``(B, K)`` bool, False at actions that are not allowed.

        Raises:
            ValueError: an observation that lacks a name, or doesn't fit the space or the state.
        """
        policy = self.policy.in_float32()
        names = (*policy.fixed, *policy.changing)
        arrays, single = batched(observation, names, self.observation_space)
        n = len(arrays[names[0]])
        new = state is None
        if state is None:
            nothing = torch.zeros((n, policy.actor.size), dtype=policy.actor.dtype)
            state = Playing(policy.cache(n), nothing)
        elif not isinstance(state, Playing) or state.cache.rows != n:
            raise ValueError(f"state must be what predict returned for {n} rows, got {type(state).__name__}")
        begins = np.zeros(n, np.bool_) if episode_start is None else np.array(episode_start, np.bool_)
        if begins.size != n:
            raise ValueError(f"episode_start must hold {n} bools, got shape {begins.shape}")
        starts = torch.as_tensor(begins.reshape(n) | new)
        masks = None
        if action_masks is not None:
            masks = torch.as_tensor(np.asarray(action_masks, np.bool_).reshape(n, -1), device=self.device)
        seen, previous = as_tensors(arrays, names, self.device), state.previous.to(self.device)
        described, _ = policy.step(state.cache, seen, previous, starts, masks)
        state.previous = policy.actor.sample(described.cpu(), None if deterministic else self._predicting)
        actions = policy.actor.to_env(state.previous)
        return (actions[0] if single else actions), state

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the agent into ``folder``, whole or not at all: ``settings.json`` and ``state_STEPS.safetensors``
        with weights, optimiser and what PPO remembers.

        Raises:
            ValueError, TypeError: if it is no folder, or holds another agent than this one, or other results.
        """
        saving.save(self, folder)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        env: Envs | None = None,
        device: str = "auto",
        env_kwargs: Mapping[str, Any] | None = None,
        compile: bool = False,
    ) -> TransformerAgent:
        """The agent that :meth:`save` wrote, ready to predict or to learn on.

        Args:
            folder: where it was saved.
            env: vector environment, for an agent that was not made from an id; a curriculum ends with it.
            device, compile: as for the class.
            env_kwargs: takes the place of single saved arguments of the environment; the difficulty of a curriculum stays.

        Raises:
            FileNotFoundError: if the folder or one of its files is missing.
            ValueError: if the files are damaged, of another format or another kind of agent; if an argument of the
                environment that isn't saved, as a reward that is a function, isn't in ``env_kwargs``.
        """
        return saving.load(cls, folder, env, device, env_kwargs, compile)


def train(
    agent: TransformerAgent,
    total_steps: int,
    out: str | os.PathLike[str],
    progress: bool = True,
    alarm: HackingAlarm | None = None,
) -> bool:
    """Learn until ``total_steps``; Ctrl-C ends it after the update in hand, with a checkpoint.

    Returns:
        False if Ctrl-C ended it early, else True.
    """
    with asked_to_stop() as asked:
        agent.learn(total_steps, lambda agent: not asked(), progress, out=out, alarm=alarm)
    return agent.num_timesteps >= total_steps


def _word(seed: int, purpose: str, number: int) -> int:
    """A seed of 63 bits for one purpose of one rollout."""
    entropy = [seed, number, *purpose.encode()]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
