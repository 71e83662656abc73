"""Stable-Baselines3 agents: making, training with logs and checkpoints, saving, and loading what executes nothing."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import stable_baselines3
import torch
from gymnasium.error import NameNotFound
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from stable_baselines3 import A2C, DQN
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger, make_output_format

from mmenvs.checks import integer_in
from mmenvs.embeddings.embedding import resolve_device
from mmenvs.embeddings.extractor import Extractor
from mmenvs.embeddings.fusion import FUSIONS
from mmenvs.embeddings.joint import check_hashes, joint_hashes
from mmenvs.embeddings.optimizers import Muon
from mmenvs.embeddings.pretrained import Pretrained
from mmenvs.files import replacing
from mmenvs.integrations.sb3 import MultimodalExtractor, make_vec_env
from mmenvs.registry import task_class

from .imitation import SelfImitationPPO
from .recipes import RECIPES, default_encoders

FORMAT = 1


@dataclass(frozen=True)
class Settings:
    """All that it takes to make an agent again.

    Attributes:
        algo, id, fusion, seed, env_kwargs: as for :func:`make_agent`.
        visible: the observations the agent sees; None is all of them.
        encoders, precision: as for :class:`mmenvs.embeddings.Extractor`.
        recipe: the recipe's settings by name.
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


def default_precision(device: str) -> str:
    """Half precision on CPUs that multiply it in hardware: 1.5 times as fast with AVX-512, 3 with AMX."""
    in_hardware = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if device == "cpu" and in_hardware else "float32"


def check_encoders(encoders: Mapping[str, str | Pretrained] | None) -> None:
    """Refuse encoders that can't be saved with an agent."""
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
    cls = _algorithm(algo)
    device = resolve_device(device)
    integer_in("seed", seed, 0, 2**32 - 1)
    recipe = RECIPES[algo]
    names = {f.name for f in fields(recipe)} - {"arguments"}
    own = {name: value for name, value in overrides.items() if name in names}
    arguments = {**recipe.arguments, **{k: v for k, v in overrides.items() if k not in names}}
    recipe = replace(recipe, **own, arguments=arguments)
    if "batch_size" not in overrides and {"n_steps", "batch_size"} <= arguments.keys():
        # With few rows a rollout is smaller than the recipe's minibatch.
        arguments["batch_size"] = min(arguments["batch_size"], recipe.num_envs * arguments["n_steps"])
    env = make_vec_env(id, recipe.num_envs, **(env_kwargs or {}))
    seen = set(env.native.single_observation_space)
    if visible is not None and (not visible or set(visible) - seen):
        raise ValueError(f"visible must name some of {', '.join(sorted(seen))}, got {visible!r}")
    if encoders is None:
        encoders = default_encoders(id, env.native.single_observation_space, env_kwargs or {})
    settings = Settings(
        algo=algo,
        id=id,
        fusion=fusion,
        seed=seed,
        env_kwargs=dict(env_kwargs or {}),
        visible=visible,
        encoders=dict(encoders),
        precision=precision or default_precision(device),
        recipe=asdict(recipe),
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
    env.seed(_episode_seed(seed, 0))
    agent.settings = settings  # type: ignore[attr-defined]
    return agent


def _episode_seed(seed: int, steps: int) -> int:
    """The seed of the training episodes of an agent that begins, or goes on, after ``steps``."""
    return int(np.random.SeedSequence([seed, steps]).generate_state(1)[0])


def train(
    agent: BaseAlgorithm,
    total_steps: int,
    out: str | os.PathLike[str] | None = None,
    *,
    progress: bool = True,
    checkpoint_steps: int = 100_000,
) -> bool:
    """Train until the agent has seen ``total_steps`` steps of the environment, earlier ones counted in.

    Args:
        agent: from :func:`make_agent`, or from :func:`load` to go on with.
        total_steps: end of training and of the schedules.
        out: folder for the agent, ``progress_<first step>.csv`` and TensorBoard logs; None keeps nothing.
        progress: show a bar with success rate and steps a second.
        checkpoint_steps: save about every this many steps.

    Returns:
        False if Ctrl-C ended the training early (the agent is saved then too), else True.
    """
    integer_in("total_steps", total_steps, 1, 10**15)
    integer_in("checkpoint_steps", checkpoint_steps, 1, 10**15)
    if total_steps <= agent.num_timesteps:
        raise ValueError(
            f"total_steps must be over the {agent.num_timesteps} already done, got {total_steps}"
        )
    outputs = []
    if out is not None:
        # Whatever ends the run, its folder holds an agent to go on with.
        save(agent, out)
        # Each run has a file of its own: Stable-Baselines3 empties a CSV that is there.
        outputs = [
            make_output_format(kind, str(out), f"_{agent.num_timesteps}") for kind in ("csv", "tensorboard")
        ]
    agent.set_logger(Logger(None if out is None else str(out), outputs))
    callback = _Callback(total_steps, out, progress, checkpoint_steps)
    finished = True
    try:
        agent.learn(
            total_steps - agent.num_timesteps,
            callback,
            log_interval=10 if settings_of(agent).algo in ("dqn", "qrdqn") else 1,
            reset_num_timesteps=agent.num_timesteps == 0,
        )
    except KeyboardInterrupt:
        finished = False
    finally:
        callback.close()
        agent.logger.close()
        agent.set_logger(Logger(None, []))
    if out is not None:
        save(agent, out)
    return finished


def progress_line() -> Any:
    """A progress bar whose tasks have the fields ``success`` and ``speed``."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.completed:,.0f} / {task.total:,.0f} steps"),
        BarColumn(),
        TextColumn("{task.fields[success]} {task.fields[speed]}"),
        TimeRemainingColumn(),
        refresh_per_second=2,
    )


class _Callback(BaseCallback):
    """Entropy schedule, progress bar and checkpoints."""

    def __init__(self, total: int, out: Any, progress: bool, checkpoint_steps: int) -> None:
        super().__init__()
        self.total, self.out, self.checkpoint_steps = total, out, checkpoint_steps
        self.bar: Any = None
        if progress:
            self.bar = progress_line()

    def _on_training_start(self) -> None:
        self.begin, self.first = time.perf_counter(), self.num_timesteps
        self.saved = self.num_timesteps
        if self.bar is not None:
            self.bar.start()
            self.line = self.bar.add_task("", total=self.total, completed=self.first, success="", speed="")

    def _on_rollout_start(self) -> None:
        recipe = settings_of(self.model).recipe
        if "ent_coef" in recipe:
            remaining = max(0.0, 1 - self.num_timesteps / self.total)
            self.model.ent_coef = recipe["ent_coef"] * remaining  # type: ignore[attr-defined]

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        if self.bar is not None:
            successes = self.model.ep_success_buffer
            speed = (self.num_timesteps - self.first) / max(time.perf_counter() - self.begin, 1e-9)
            self.bar.update(
                self.line,
                completed=self.num_timesteps,
                success=f"success {np.mean(successes):.3f}" if successes else "",
                speed=f"{speed:,.0f} steps/s",
            )
        if self.out is not None and self.num_timesteps - self.saved >= self.checkpoint_steps:
            save(self.model, self.out)
            self.saved = self.num_timesteps

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def save(agent: BaseAlgorithm, folder: str | os.PathLike[str]) -> None:
    """Write settings (JSON), weights (safetensors) and optimiser state into ``folder``.

    Weights and optimiser stand in files named after the step, and ``settings.json``, replaced last, names
    the step: a save that is cut off leaves the one before in place. A replay buffer isn't kept.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    steps = agent.num_timesteps
    weights = agent.policy.state_dict()
    distinct = {name: weights[name].contiguous() for name in set(_first_names(weights).values())}
    with replacing(path / f"weights_{steps}.safetensors") as file:
        file.write_bytes(serialise(distinct))
    state = agent.policy.optimizer.state_dict()
    with replacing(path / f"optimizer_{steps}.pt") as file:
        torch.save(state, file)
    settings = asdict(settings_of(agent))
    # A reader of real data is no setting; load() is handed one, and the command line keeps its name.
    if not isinstance(settings["env_kwargs"].get("source"), str):
        settings["env_kwargs"].pop("source", None)
    document = {
        "format": FORMAT,
        "steps": steps,
        "settings": settings,
        "joints": joint_hashes(agent.policy),
        "versions": {"torch": torch.__version__, "stable_baselines3": stable_baselines3.__version__},
    }
    text = json.dumps(document, indent=2)
    with replacing(path / "settings.json") as file:
        file.write_text(text)
    for pattern in ("weights_*.safetensors", "optimizer_*.pt"):
        for old in path.glob(pattern):
            if old.stem.split("_")[1] != str(steps):
                old.unlink()


def _first_names(weights: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """For each name the first that holds the same tensor: policies know their extractor by three names."""
    first: dict[int, str] = {}
    return {name: first.setdefault(value.data_ptr(), name) for name, value in weights.items()}


def load(
    folder: str | os.PathLike[str], device: str = "auto", env_kwargs: Mapping[str, Any] | None = None
) -> BaseAlgorithm:
    """The agent that :func:`save` wrote, ready to predict or to be trained further.

    Args:
        folder: where it was saved.
        device: as for :func:`make_agent`.
        env_kwargs: takes the place of single saved arguments of the environment; a ``source`` of real data
            isn't saved and must be given here.

    Raises:
        FileNotFoundError: if the folder or one of its files is missing.
        ValueError: if the files are damaged or of another format, or if it was trained on another joint embedding.
    """
    path = Path(folder)
    if not (path / "settings.json").is_file():
        raise FileNotFoundError(
            f"no agent in {str(folder)!r}: there is no settings.json; 'mmenvs train' writes one"
        )
    problem = f"cannot load the agent in {str(folder)!r}: "
    try:
        document = json.loads((path / "settings.json").read_text())
        found = document["format"]
    except KeyError as error:
        raise ValueError(f"{problem}settings.json is damaged: it lacks {error}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{problem}settings.json is damaged: it holds no settings of an agent") from error
    if found != FORMAT:
        raise ValueError(f"{problem}settings.json has format {found!r}, this version reads format {FORMAT}")
    try:
        settings = dict(document["settings"])
        steps = int(document["steps"])
        joints = dict(document.get("joints", {}))
        recipe = dict(settings.pop("recipe"))
        arguments = recipe.pop("arguments")
        arguments.pop("ent_coef", None)
        recipe["net_arch"] = tuple(recipe["net_arch"])
        settings["visible"] = None if settings["visible"] is None else tuple(settings["visible"])
        settings["env_kwargs"] = {**settings["env_kwargs"], **(env_kwargs or {})}
        settings["encoders"] = {
            name: Pretrained(**encoder) if isinstance(encoder, dict) else encoder
            for name, encoder in settings["encoders"].items()
        }
    except KeyError as error:
        raise ValueError(f"{problem}settings.json is damaged: it lacks {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{problem}settings.json is damaged: it holds no settings of an agent") from error
    try:
        agent = make_agent(**settings, device=device, **recipe, **arguments)
    except (FileNotFoundError, NameNotFound, ImportError):
        raise
    except Exception as error:
        raise ValueError(f"{problem}its settings can't be used: {error}") from error
    try:
        check_hashes(agent.policy, joints, settings["encoders"])
    except ValueError as error:
        raise ValueError(f"{problem}{error}") from None
    for name in (f"weights_{steps}.safetensors", f"optimizer_{steps}.pt"):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{str(path / name)!r} is missing")
    try:
        weights = load_file(path / f"weights_{steps}.safetensors", str(agent.device))
        state = torch.load(path / f"optimizer_{steps}.pt", map_location=agent.device, weights_only=True)
    except Exception as error:
        raise ValueError(f"{problem}the file of its weights or of its optimiser is damaged") from error
    try:
        firsts = _first_names(agent.policy.state_dict())
        if weights.keys() - set(firsts.values()):
            raise ValueError("there are weights that it lacks")
        agent.policy.load_state_dict({name: weights[first] for name, first in firsts.items()})
        agent.policy.optimizer.load_state_dict(state)
    except Exception as error:
        raise ValueError(
            f"{problem}the weights in weights_{steps}.safetensors don't fit the agent of settings.json"
        ) from error
    agent.num_timesteps = steps
    # A resumed run must not see the episodes of its beginning again.
    agent.get_env().seed(_episode_seed(settings["seed"], steps))  # type: ignore[union-attr]
    return agent


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
