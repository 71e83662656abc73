"""One run of a comparison: train, score, cost and probe it."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnvWrapper

import mmenvs
from mmenvs.benchmark.rows import Row
from mmenvs.benchmark.summary import BASELINES, few_episodes
from mmenvs.embeddings import Extractor
from mmenvs.embeddings.cost import cost
from mmenvs.embeddings.embedding import load_embedding
from mmenvs.embeddings.extractor import extractor_in
from mmenvs.embeddings.joint import JointEmbedding, ShapesEncoder, weights_hash
from mmenvs.embeddings.pretrained import PretrainedEncoder
from mmenvs.embeddings.probes import has_scenes, modality_use, probe_report
from mmenvs.perturbations import PERTURBATIONS, VectorPerturbObservation
from mmenvs.registry import find_spec
from mmenvs.spaces import modality_of

CURVE_POINTS = 20
CHECKPOINTS = (0.8, 0.9)  # shares of the training at which the policy is kept, beside the trained one
# What becomes of a modality that is missing, shuffled or swapped is told by the structure measures.
_PERTURBATIONS = ("noise", "brightness", "pitch", "word_dropout")
_SAY_EVERY = 10.0  # seconds between two lines about the same run
Policy = tuple[int, dict[str, torch.Tensor]]  # step and weights
_KINDS = {"image": "pictures", "images": "pictures", "text": "words", "audio": "sound"}
_PACKAGES = (
    "mmenvs", "numpy", "gymnasium", "torch", "torchaudio", "stable_baselines3", "sb3_contrib", "transformers", "numba",
)  # fmt: skip


class Recorder(VecEnvWrapper):
    """Between an agent and its environment: the training episodes at fixed steps.

    Args:
        agent: from ``make_agent``; the recorder takes the place of its environment.
        total: steps of training.
        tell: is told about every ten seconds how far the training is.
        stepped: is given the number of steps after each one.

    Attributes:
        curve: ``[step, mean return, success, episodes]`` of the episodes that ended up to each of
            ``CURVE_POINTS`` equal shares of ``total``, since the one before.
    """

    def __init__(
        self,
        agent: Any,
        total: int,
        tell: Callable[[str], Any],
        stepped: Callable[[int], Any] | None = None,
    ) -> None:
        super().__init__(agent.env)
        self.total, self.tell, self.stepped, self.steps = total, tell, stepped, 0
        self.begin = self.told = time.perf_counter()
        self.marks = [round(total * (i + 1) / CURVE_POINTS) for i in range(CURVE_POINTS)]
        self.curve: list[list[float]] = []
        self._returns: list[float] = []
        self._successes: list[bool] = []
        agent.set_env(self)

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        observation, rewards, ended, infos = self.venv.step_wait()
        self.steps += self.num_envs
        if self.stepped is not None:
            self.stepped(self.steps)
        now = time.perf_counter()
        if now - self.told >= _SAY_EVERY:
            self.told = now
            left = (now - self.begin) * max(self.total / self.steps - 1, 0)
            self.tell(f"{self.steps:,} of {self.total:,} steps, about {left:.0f} s of training left")
        for row in np.flatnonzero(ended):
            self._returns.append(infos[row]["episode"]["r"])
            self._successes.append(infos[row]["is_success"])
        while self.marks and self.steps >= self.marks[0]:
            mark = self.marks.pop(0)
            # Several marks may pass in one step; later ones then have no episodes of their own.
            if self._returns:
                means = float(np.mean(self._returns)), float(np.mean(self._successes))
                self.curve.append([mark, *means, len(self._returns)])
            self._returns, self._successes = [], []
        return observation, rewards, ended, infos


class Checkpoints(BaseCallback):
    """Keeps the policy on the way, each time after the update that passes a share of the training.

    A Stable-Baselines3 agent plays whole rollouts and then learns from them: within a rollout it has seen steps
    that it hasn't learned from, so the next one's beginning is when its number of steps says what it is.

    Args:
        total: steps of training.
        shares: of it.

    Attributes:
        policies: ``(step, state dict)``; one for all shares that an update passes.
    """

    def __init__(self, total: int, shares: Sequence[float]) -> None:
        super().__init__()
        self.marks = sorted(total * share for share in shares)
        self.policies: list[Policy] = []

    def keep(self, agent: Any) -> None:
        """Keep the policy of ``agent``, which has just learned, if it has passed another share."""
        if self.marks and agent.num_timesteps >= self.marks[0]:
            self.marks = [mark for mark in self.marks if mark > agent.num_timesteps]
            self.policies.append(policy_of(agent))

    def _on_rollout_start(self) -> None:
        self.keep(self.model)

    def _on_step(self) -> bool:
        return True


def policy_of(agent: Any) -> Policy:
    """Step and weights of an agent."""
    state = agent.policy.state_dict()
    return agent.num_timesteps, {name: x.detach().cpu().clone() for name, x in state.items()}


def measure(run: Mapping[str, Any], plan: Mapping[str, Any], device: str, tell: Callable[[str], Any]) -> Row:
    """Train one agent and measure it by the four criteria and the probes.

    Args:
        run: one of ``Grid.runs()``.
        plan: how the agent is made with its embedding, see ``mmenvs.benchmark.compare.plan``.
        device: ``"cpu"`` or ``"cuda"``.
        tell: is told how far it is, if it takes long.

    Raises:
        KeyboardInterrupt: if Ctrl-C ended the training.
    """
    sb3 = importlib.import_module("mmenvs_agents.sb3")
    id, env_kwargs, episodes = run["id"], run["env_kwargs"], run["episodes"]
    optional = {key: run[key] for key in ("features_dim", "num_envs") if key in run}
    _warm_up(run, plan, device)
    agent = sb3.make_agent(
        run["agent"], id, seed=run["seed"], device=device, env_kwargs=env_kwargs, **plan, **optional
    )
    recorder = Recorder(agent, run["steps"], tell)
    checkpoints = Checkpoints(run["steps"], CHECKPOINTS)
    begin, cpu = time.perf_counter(), time.process_time()
    if not sb3.train(agent, run["steps"], progress=False, callback=checkpoints):
        raise KeyboardInterrupt
    wall, used = time.perf_counter() - begin, time.process_time() - cpu
    agent.get_env().close()
    few = few_episodes(episodes)
    if wall >= _SAY_EVERY:
        tell(f"trained in {wall:.0f} s, now it is scored and probed")
    return {
        "bounds": _bounds(id),
        "train": {"steps": agent.num_timesteps, "seconds": wall, "cpu_seconds": used},
        "curve": recorder.curve,
        "scores": {split: _score(agent, run, split, episodes) for split in ("test", "compositional")},
        "checkpoints": _checkpoints(agent, checkpoints, run, few),
        "perturbed": _perturbed(agent, run, few),
        "cost": {"seconds": wall, "cpu_seconds": used, **_cost(agent, run)},
        "structure": _structure(agent, run),
    }


def measure_baseline(run: Mapping[str, Any]) -> Row:
    """Score an agent that learns nothing on the episodes of the others.

    Args:
        run: ``id``, ``env_kwargs``, ``episodes`` and ``baseline``, a name in ``BASELINES``.
    """
    scores = {
        split: _score(run["baseline"], run, split, run["episodes"]) for split in ("test", "compositional")
    }
    return {"bounds": _bounds(run["id"]), "scores": scores}


def _bounds(id: str) -> list[float]:
    spec = find_spec(id)
    return [spec.min_score, spec.max_score]


def baseline_runs(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each baseline once on each task of ``runs``."""
    found: list[dict[str, Any]] = []
    for run in runs:
        for name in BASELINES:
            one = {**{key: run[key] for key in ("id", "env_kwargs", "episodes")}, "baseline": name}
            if one not in found:
                found.append(one)
    return found


def _warm_up(run: Mapping[str, Any], plan: Mapping[str, Any], device: str) -> None:
    """A rollout and an update of another, small agent: what is compiled the first time isn't training."""
    sb3 = importlib.import_module("mmenvs_agents.sb3")
    arguments = importlib.import_module("mmenvs_agents.recipes").RECIPES[run["agent"]].arguments
    # A Q-network learns only after so many steps.
    at_once = {"learning_starts": 0} if "learning_starts" in arguments else {}
    agent = sb3.make_agent(
        run["agent"], run["id"], device=device, env_kwargs=run["env_kwargs"], num_envs=8, **plan, **at_once
    )
    finished = sb3.train(agent, 1, progress=False)
    agent.get_env().close()
    if not finished:
        raise KeyboardInterrupt


def _evaluate(agent: Any, run: Mapping[str, Any], split: str, episodes: int, wrap: Any = None) -> Any:
    evaluate = importlib.import_module("mmenvs_agents.evaluation").evaluate
    return evaluate(agent, run["id"], split=split, episodes=episodes, env_kwargs=run["env_kwargs"], wrap=wrap)


def _score(agent: Any, run: Mapping[str, Any], split: str, episodes: int) -> dict[str, Any]:
    return score_of(_evaluate(agent, run, split, episodes))


def score_of(result: Any) -> dict[str, Any]:
    """What a row holds of an evaluation (``mmenvs_agents.evaluation.Result``)."""
    return {
        "return": result.mean_return,
        "success": result.success.value,
        "length": result.mean_length,
        "by_type": {name: rate.value for name, rate in result.by_type.items()},
        "returns": np.round(result.returns, 6),
    }


def _checkpoints(
    agent: Any, checkpoints: Checkpoints, run: Mapping[str, Any], episodes: int
) -> list[list[float]]:
    """Step and test return of the policies that were kept, and of the trained one, on the same episodes."""
    scores = []
    for step, state in [*checkpoints.policies, policy_of(agent)]:
        agent.policy.load_state_dict(state)
        scores.append([step, _evaluate(agent, run, "test", episodes).mean_return])
    return scores


def _perturbed(agent: Any, run: Mapping[str, Any], episodes: int) -> dict[str, float]:
    """Test return under each perturbation that fits an observation, and without each, on the same episodes."""
    scores = {"clean": _evaluate(agent, run, "test", episodes).mean_return}
    for key, part in space_of(run["id"], run["env_kwargs"]).items():
        kind = _KINDS.get(modality_of(part))
        for name in _PERTURBATIONS:
            if kind in PERTURBATIONS[name].kinds:
                wrap = partial(VectorPerturbObservation, name=name, modality=key)
                scores[f"{key} {name}"] = _evaluate(agent, run, "test", episodes, wrap).mean_return
        blind = partial(without, agent, (key,))
        scores[f"without {key}"] = _evaluate(blind, run, "test", episodes).mean_return
    return scores


def without(agent: Any, missing: Sequence[str], observation: Mapping[str, Any], **arguments: Any) -> Any:
    """What the agent predicts with the observations of these names missing to its extractor."""
    with _extractor(agent).without(*missing):
        return agent.predict(observation, **arguments)


def _cost(agent: Any, run: Mapping[str, Any]) -> dict[str, Any]:
    """What the extractor costs, and what a cache keeps of each observation, with frozen encoders."""
    extractor = _extractor(agent)
    found = cost(extractor, agent.observation_space, device=str(agent.device), batch_sizes=(1, 256))
    # The weights of joint embeddings are no part of the extractor, which leaves them out when it is saved.
    joints: dict[str, JointEmbedding] = {}
    cached = 0
    for name, encoder in extractor.encoders.items():
        space = cast(spaces.Box, extractor.observation_space[name])
        low = torch.as_tensor(space.low, device=agent.device).unsqueeze(0)
        if isinstance(encoder, ShapesEncoder):
            joints[weights_hash(encoder.joint)] = encoder.joint
            cached += encoder.frozen(extractor.prepare(name, low))[1].numel() * 4
        elif isinstance(encoder, PretrainedEncoder) and encoder.chosen.train == "frozen":
            with torch.no_grad():
                cached += encoder.features(extractor.prepare(name, low)).numel() * 4
    frozen = [x for joint in joints.values() for x in joint.parameters()]
    frozen_bytes = sum(x.nbytes for x in frozen)
    return {
        "parameters": found["parameters"] + sum(x.numel() for x in frozen),
        "trainable_parameters": found["trainable_parameters"],
        "megabytes": (found["weight_bytes"] + frozen_bytes) / 1e6,
        "megaflops": found["flops"] / 1e6,
        "milliseconds": found["latency_ms"],
        "throughput": found["best_throughput"],
        "peak_megabytes": (found["peak_memory_bytes"] + frozen_bytes) / 1e6,
        "cache_kilobytes": cached / 1e3 or None,
    }


def _structure(agent: Any, run: Mapping[str, Any]) -> dict[str, Any]:
    """Probes of the encoders as they are after training, on the val split, and what the agent uses of each."""
    envs: Any = gym.make_vec(run["id"], num_envs=1, **run["env_kwargs"])
    envs.close()
    probes: dict[str, Any] = {"probes": {"skipped": "its episodes show no scenes of the procedural world"}}
    if has_scenes(envs.task):
        embedding = load_embedding(_extractor(agent), envs.single_observation_space).to(agent.device)
        kwargs = dict(run["env_kwargs"])
        difficulty, n = kwargs.pop("difficulty", 0), min(max(run["episodes"], 16), 2048)
        report = probe_report(
            embedding, run["id"], difficulty=difficulty, n=n, pool=min(n, 256), env_kwargs=kwargs
        )
        probes = {"modalities": report["modalities"], "pairs": report["pairs"]}

    def predict(observation: Mapping[str, Any], missing: tuple[str, ...] = ()) -> Any:
        return without(agent, missing, observation, deterministic=True)

    used = modality_use(
        predict,
        run["id"],
        env_kwargs={**run["env_kwargs"], "split": "val"},
        episodes=max(run["episodes"] // 4, 128),
    )
    same = {"skipped": "right actions are the same in all episodes of a type"}
    told = {
        name: {key: same if key == "swapped" and loss is None else loss for key, loss in losses.items()}
        for name, losses in used.items()
    }
    return {**probes, "use": told}


def _extractor(agent: Any) -> Extractor:
    return cast(Extractor, extractor_in(agent.policy))


def space_of(id: str, env_kwargs: Mapping[str, Any]) -> Any:
    """The observations of a single environment, as they are before Stable-Baselines3 turns the pictures."""
    envs: Any = gym.make_vec(id, num_envs=1, **env_kwargs)
    envs.close()
    return envs.single_observation_space


def provenance(device: str) -> dict[str, Any]:
    """Where rows come from: versions, commit, machine, command, day."""
    return {
        **machine(device),
        "commit": _commit(),
        "threads": torch.get_num_threads(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "day": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def machine(device: str) -> dict[str, Any]:
    """Versions and device of this machine, and the precision that recipes take on it if none is asked for."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    precision = importlib.import_module("mmenvs_agents.sb3").default_precision(torch.device(device).type)
    return {
        "versions": {"python": platform.python_version(), **versions},
        "device": f"{device} ({name}, {os.cpu_count()} cores, recipes in {precision})",
    }


def _commit() -> str:
    """The commit of a checkout, with "-dirty" if files differ from it; empty for an installed package."""
    package = Path(mmenvs.__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    try:
        return git("describe", "--always", "--dirty") if git("ls-files", "__init__.py") else ""
    except OSError:  # no git on this machine
        return ""
