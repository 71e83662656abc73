"""``mmenvs tune``: settings of a recipe that score best on the val split, searched with Optuna.

Trials are proposed by a tree-structured Parzen estimator (Bergstra et al. 2011).
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmenvs.checks import integer_in
from mmenvs.embeddings.fusion import FUSIONS
from mmenvs.files import locked, out_folder, replacing
from mmenvs.registry import task_class

try:
    import optuna
except ImportError as error:
    raise ImportError("tuning needs Optuna: pip install 'mmenvs[tune]'") from error

NAME = "trials.sqlite"
BEST = "best.json"
_ERROR = "error"
# What is searched, of what the agent's recipe has; with the recipe's own value among it.
SPACE: dict[str, Callable[[Any], Any]] = {
    "learning_rate": lambda trial: trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True),
    "ent_coef": lambda trial: trial.suggest_float("ent_coef", 1e-4, 0.2, log=True),
    "n_steps": lambda trial: trial.suggest_categorical("n_steps", [1, 2, 4, 8, 16, 32, 64]),
    "batch_size": lambda trial: trial.suggest_categorical("batch_size", [64, 128, 256, 512]),
    "n_epochs": lambda trial: trial.suggest_int("n_epochs", 1, 8),
    "gae_lambda": lambda trial: trial.suggest_float("gae_lambda", 0.8, 1.0),
    "fusion": lambda trial: trial.suggest_categorical("fusion", list(FUSIONS)),
}


@dataclass(frozen=True)
class Search:
    """What is tuned, and how each trial is scored.

    Attributes:
        id, difficulty: the environment; trials train on its train split.
        agent: of Stable-Baselines3, by the name of its recipe.
        steps: of training of a trial.
        episodes: of the val split, which a trial is scored on.
        seed: of the proposals, and of weights, actions and episodes of every trial.
    """

    id: str
    difficulty: int = 0
    agent: str = "ppo"
    steps: int = 50_000
    episodes: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        task_class(self.id)
        if self.agent not in _recipes():
            raise ValueError(f"agent must be one of {', '.join(_recipes())}, got {self.agent!r}")
        integer_in("difficulty", self.difficulty, 0, 3)
        integer_in("steps", self.steps, 1, 10**12)
        integer_in("episodes", self.episodes, 1, 10**6)
        integer_in("seed", self.seed, 0, 2**32 - 1)

    def usual(self) -> dict[str, Any]:
        """The recipe's values of what is searched: the first trial. Its fusion is concat."""
        recipe = _recipes()[self.agent]
        known = {**recipe.arguments, **vars(recipe), "fusion": "concat"}
        return {name: known[name] for name in SPACE if name in known}

    def score(self, settings: dict[str, Any], device: str) -> float:
        """Mean return on the val split, greedy, after training with these settings.

        Raises:
            KeyboardInterrupt: if Ctrl-C ended the training.
        """
        sb3 = importlib.import_module("mmenvs_agents.sb3")
        env_kwargs = {"difficulty": self.difficulty}
        agent = sb3.make_agent(
            self.agent, self.id, seed=self.seed, device=device, env_kwargs=env_kwargs, **settings
        )
        finished = sb3.train(agent, self.steps, progress=False)
        agent.get_env().close()
        if not finished:
            raise KeyboardInterrupt
        evaluate = importlib.import_module("mmenvs_agents.evaluation").evaluate
        result = evaluate(agent, self.id, split="val", episodes=self.episodes, env_kwargs=env_kwargs)
        return float(result.mean_return)


def tune(
    search: Search, trials: int, out: Path, device: str = "auto", say: Callable[[str], Any] = print
) -> dict[str, Any]:
    """Do the trials that the folder lacks; the first one has the recipe's own settings.

    The proposals of a trial depend on the seed and on the results before it alone: a search that was stopped
    and goes on ends as one that wasn't. A trial that raises counts as one that failed.

    Args:
        search: what is tuned.
        trials: how many there shall be in all.
        out: folder for ``trials.sqlite`` (Optuna's) and ``best.json``.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        say: takes a line about each trial.

    Returns:
        What ``best.json`` holds: the search, ``score``, ``usual_score`` (of the recipe itself, None if that
        failed), ``trial``, and ``settings``, arguments of ``mmenvs_agents.sb3.make_agent``.

    Raises:
        ValueError: if ``out`` holds another search, or is in use, or no trial succeeded.
    """
    from mmenvs.embeddings.embedding import resolve_device

    integer_in("trials", trials, 1, 100_000)
    device = resolve_device(device)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with locked(out_folder(out, "search"), "search"):
        study = _open(search, out / NAME)
        for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):  # stopped in the midst of it
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        for number in range(len(_finished(study)), trials):
            seed = np.random.SeedSequence([search.seed, number]).generate_state(1)[0]
            study.sampler = optuna.samplers.TPESampler(seed=int(seed))
            if number == 0:
                study.enqueue_trial(search.usual(), skip_if_exists=False)
            trial = study.ask()
            settings = _settings(search, trial)
            try:
                score = search.score(settings, device)
                if not math.isfinite(score):
                    raise ValueError(f"the score is {score}")
            except Exception as error:  # such as weights that became NaN
                trial.set_user_attr(_ERROR, f"{type(error).__name__}: {' '.join(str(error).split())}")
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                result = trial.user_attrs[_ERROR]
            else:
                study.tell(trial, score)
                result = f"{score:.3f}"
            say(f"{number + 1}/{trials}  {result}  {_shown(settings)}")
        return _best(search, study, out)


def _open(search: Search, path: Path) -> Any:
    try:
        study = optuna.create_study(
            storage=f"sqlite:///{path}", study_name="mmenvs", direction="maximize", load_if_exists=True
        )
        saved = study.user_attrs.get("search")
    except Exception as error:  # SQLAlchemy's and Optuna's own, of a file that is something else
        raise ValueError(f"{str(path)!r} is no store of a search: {str(error).splitlines()[0]}") from error
    if saved is None:
        study.set_user_attr("search", asdict(search))
    elif saved != asdict(search):
        other = next(name for name, value in asdict(search).items() if saved.get(name) != value)
        raise ValueError(
            f"out={str(path.parent)!r} holds a search with {other}={saved.get(other)!r}, "
            f"not {getattr(search, other)!r}: go on with its settings, or choose another folder"
        )
    return study


def _finished(study: Any) -> list[Any]:
    """Trials that have a score or failed by themselves; not those that were stopped."""
    done = optuna.trial.TrialState.COMPLETE
    return [t for t in study.get_trials(deepcopy=False) if t.state == done or _ERROR in t.user_attrs]


def _settings(search: Search, trial: Any) -> dict[str, Any]:
    settings = {name: SPACE[name](trial) for name in search.usual()}
    if {"n_steps", "batch_size"} <= settings.keys():
        # A minibatch can't be larger than what is collected.
        settings["batch_size"] = min(
            settings["batch_size"], settings["n_steps"] * _recipes()[search.agent].num_envs
        )
    return settings


def _best(search: Search, study: Any, out: Path) -> dict[str, Any]:
    scores = [(i, t) for i, t in enumerate(_finished(study)) if t.value is not None]
    if not scores:
        last = _finished(study)[-1].user_attrs[_ERROR]
        raise ValueError(f"none of the trials in {str(out)!r} succeeded; the last: {last}")
    number, best = max(scores, key=lambda scored: scored[1].value)
    found = {
        **asdict(search),
        "split": "val",
        "score": best.value,
        "usual_score": scores[0][1].value if scores[0][0] == 0 else None,
        "trial": number + 1,
        "settings": _settings(search, optuna.trial.FixedTrial(best.params)),
    }
    with replacing(out / BEST) as file:
        file.write_text(json.dumps(found, indent=2))
    return found


def usage(best: dict[str, Any]) -> str:
    """Python that trains an agent with what was found."""
    arguments = "".join(f", {name}={value!r}" for name, value in best["settings"].items())
    return (
        "from mmenvs_agents import sb3\n"
        f"agent = sb3.make_agent({best['agent']!r}, {best['id']!r}, "
        f"env_kwargs={{'difficulty': {best['difficulty']}}}{arguments})\n"
        "sb3.train(agent, 1_000_000, 'runs/tuned')"
    )


def _shown(settings: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in settings.items()
    )


def _recipes() -> Any:
    return importlib.import_module("mmenvs_agents.recipes").RECIPES
