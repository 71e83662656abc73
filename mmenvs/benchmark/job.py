"""One run of a benchmark: make the agent, train it, score its checkpoints and what it has become."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from mmenvs.benchmark import players
from mmenvs.benchmark.measure import Checkpoints, Policy, Recorder, policy_of, score_of, space_of, without
from mmenvs.benchmark.pool import Tell
from mmenvs.benchmark.rows import Row, plain
from mmenvs.benchmark.store import MAIN
from mmenvs.benchmark.suites import HARDER
from mmenvs.benchmark.summary import BASELINES, few_episodes
from mmenvs.embeddings.extractor import extractor_in
from mmenvs.perturbations import VectorPerturbObservation

EXAMPLES = 8
TRAINING_SHARE = 0.9  # of the progress that is shown
_TELL_EVERY = 0.5  # seconds


class Checked:
    """``predict`` of an agent from elsewhere: its actions are checked, its time is taken.

    Args:
        predict: of the agent.
        name: for messages.
        tell: is called at most every half second.
        wrap: of the agent, see ``mmenvs_agents.evaluation.evaluate``.

    Attributes:
        decisions, seconds: actions chosen and the time it took.
        examples: the actions of the first episode of each of the first ``EXAMPLES`` rows since ``watch``.
    """

    def __init__(
        self, predict: Callable[..., Any], name: str, tell: Callable[[], Any], wrap: Any = None
    ) -> None:
        self._predict, self.name, self.tell, self.wrap = predict, name, tell, wrap
        self.decisions, self.seconds, self._told = 0, 0.0, time.perf_counter()
        self.examples: list[list[int]] = []
        self._watched: list[bool] = []

    def watch(self) -> None:
        """Keep the actions of the first episodes from here on."""
        self.examples, self._watched = [[] for _ in range(EXAMPLES)], [True] * EXAMPLES

    def stop(self) -> None:
        """Keep no more actions."""
        self._watched = []

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        """As the agent's.

        Raises:
            TypeError: if the agent doesn't answer with actions and state.
            ValueError: if the actions are NaN, or not one integer a row.
        """
        begin = time.perf_counter()
        answer = self._predict(
            observation, state=state, episode_start=episode_start, deterministic=deterministic
        )
        now = time.perf_counter()
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise TypeError(
                f"predict of {self.name} must return (actions, state), got {type(answer).__name__}"
            )
        actions = np.asarray(answer[0])
        rows = len(episode_start)
        if actions.dtype.kind == "f" and not np.isfinite(actions).all():
            raise ValueError(f"predict of {self.name} returned numbers that are not finite")
        if actions.shape != (rows,) or actions.dtype.kind not in "iu":
            raise ValueError(
                f"predict of {self.name} must return {rows} integers, "
                f"got shape {actions.shape} and dtype {actions.dtype}"
            )
        self.decisions, self.seconds = self.decisions + rows, self.seconds + now - begin
        if self._watched:
            self._keep(actions, episode_start)
        if now - self._told > _TELL_EVERY:
            self._told = now
            self.tell()
        return actions, answer[1]

    def _keep(self, actions: Any, starts: Any) -> None:
        for i in range(min(len(actions), EXAMPLES)):
            if self.examples[i] and starts[i]:
                self._watched[i] = False
            if self._watched[i]:
                self.examples[i].append(int(actions[i]))


def execute(run: Mapping[str, Any], device: str, tell: Tell) -> list[Row]:
    """All rows of a run, checkpoints first, without provenance.

    The scores depend on ``run`` alone: on a CPU with one thread they are the same to the bit each time.

    Args:
        run: one of ``Plan.runs()``.
        device: ``"cpu"`` or ``"cuda"``.
        tell: is told how far it is.
    """
    from stable_baselines3.common.utils import set_random_seed

    set_random_seed(run["seed"])
    agent = players.make(run, device)
    begin, cpu = time.perf_counter(), time.process_time()
    policies = _train(agent, run, tell)
    wall, used = time.perf_counter() - begin, time.process_time() - cpu
    score: float | None = None
    rows: list[Row] = []
    begin = time.perf_counter()

    def tell_score() -> None:
        tell(TRAINING_SHARE, score)

    checked: Any = agent
    if run["agent"] not in BASELINES:
        checked = Checked(agent.predict, run["agent"], tell_score, getattr(agent, "wrap", None))
    for step, state in policies[:-1]:
        agent.policy.load_state_dict(state)
        found = _score(checked, run, "test", few_episodes(run["episodes"]))
        score = found["return"]
        rows.append(
            {"run": dict(run), "step": step, "final": False, "scores": {MAIN: _without_returns(found)}}
        )
    if policies:
        agent.policy.load_state_dict(policies[-1][1])
    last = _last(agent, checked, run)
    last["cost"] |= {
        "seconds": wall if run["steps"] else 0.0,
        "cpu_seconds": used if run["steps"] else 0.0,
        "evaluation_seconds": time.perf_counter() - begin,
    }
    steps = getattr(agent, "num_timesteps", run["steps"]) if run["steps"] else 0
    return plain([*rows, {"run": dict(run), "step": int(steps), "final": True, **last}])


def _train(agent: Any, run: Mapping[str, Any], tell: Tell) -> list[Policy]:
    """Train what learns; step and weights of its checkpoints, the trained ones last, where weights can be kept."""
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.logger import KVWriter, Logger

    total, told = run["steps"], time.perf_counter()
    checkpoints = Checkpoints(total, run["checkpoints"])

    def stepped(steps: int, score: float | None) -> None:
        nonlocal told
        if time.perf_counter() - told > _TELL_EVERY:
            told = time.perf_counter()
            tell(TRAINING_SHARE * min(steps / total, 1), score)

    if isinstance(agent, BaseAlgorithm):
        recorder = Recorder(
            agent,
            total,
            str,
            lambda steps: stepped(steps, recorder.curve[-1][1] if recorder.curve else None),
        )
        if not importlib.import_module("mmenvs_agents.sb3").train(
            agent, total, progress=False, callback=checkpoints
        ):
            raise KeyboardInterrupt
        env: Any = agent.get_env()
        env.close()
    elif run["agent"].partition(":")[0] == players.TRANSFORMER:
        logged: dict[str, Any] = {}

        class Latest(KVWriter):
            def write(self, key_values: dict[str, Any], key_excluded: Any, step: int = 0) -> None:
                logged.update(key_values)

            def close(self) -> None:
                pass

        def updated(agent: Any) -> bool:
            stepped(agent.num_timesteps, logged.get("rollout/ep_rew_mean"))
            checkpoints.keep(agent)
            return True

        agent.logger = Logger(None, [Latest()])
        agent.learn(total, updated)
    else:
        if callable(getattr(agent, "learn", None)):
            agent.learn(total)
        return []
    # The last update may have passed a share too.
    before = [policy for policy in checkpoints.policies if policy[0] < agent.num_timesteps]
    return [*before, policy_of(agent)]


def _last(agent: Any, checked: Any, run: Mapping[str, Any]) -> Row:
    """Scores of the trained agent on each split, sampled, and without each modality; what it costs."""
    few = few_episodes(run["episodes"])
    scores: dict[str, Any] = {}
    examples: list[dict[str, Any]] = []
    baseline = run["agent"] in BASELINES
    for split in run["splits"]:
        watching = split == "test" and not baseline
        if watching:
            checked.watch()
        scores[f"{split}/greedy"] = _score(checked, run, split, run["episodes"])
        if watching:
            checked.stop()
            examples = [
                {"seed": run["episode_seed"] + i, "actions": actions}
                for i, actions in enumerate(checked.examples)
                if actions
            ]
        if not baseline:
            found = _score(checked, run, split, run["episodes"], deterministic=False)
            scores[f"{split}/sampled"] = _without_returns(found)
    if not baseline:
        scores |= _dropped(agent, checked, run, few)
    policy = _module(agent)
    parameters = None if policy is None else sum(x.numel() for x in policy.parameters())
    speed = checked.decisions / checked.seconds if not baseline and checked.seconds else None
    return {
        "scores": scores,
        "examples": examples,
        "cost": {"parameters": parameters, "decisions_per_second": speed},
    }


def _module(agent: Any) -> Any:
    """The network of an agent; None of one from elsewhere that has none, or calls something else so."""
    from torch import nn

    policy = getattr(agent, "policy", getattr(agent, "model", None))
    return policy if isinstance(policy, nn.Module) else None


def _dropped(agent: Any, checked: Any, run: Mapping[str, Any], episodes: int) -> dict[str, Any]:
    """Test scores with each observation missing: masked where an extractor sees others too, else zeros."""
    policy = _module(agent)
    extractor = None if policy is None else extractor_in(policy)
    space = space_of(run["id"], {"difficulty": run["difficulty"]})
    seen = tuple(space) if extractor is None else extractor.visible
    found = {}
    for key in space:
        alone = len(seen) == 1
        if key not in seen or (alone and run["agent"].startswith(players.BLIND)):
            continue
        player, wrap = checked, partial(VectorPerturbObservation, name="drop", modality=key)  # type: Any, Any
        if extractor is not None and not alone:
            player, wrap = Checked(partial(without, agent, (key,)), run["agent"], checked.tell), None
        score = _without_returns(_score(player, run, "test", episodes, wrap=wrap))
        found[f"test/greedy/without {key}"] = score
    return found


def _score(
    player: Any,
    run: Mapping[str, Any],
    split: str,
    episodes: int,
    *,
    deterministic: bool = True,
    wrap: Any = None,
) -> dict[str, Any]:
    from stable_baselines3.common.utils import set_random_seed

    # Sampled actions come from global generators.
    set_random_seed(run["seed"])
    evaluate = importlib.import_module("mmenvs_agents.evaluation").evaluate
    harder = split == HARDER
    result = evaluate(
        player,
        run["id"],
        split="test" if harder else split,
        episodes=episodes,
        env_kwargs={"difficulty": run["difficulty"] + harder},
        seed=run["episode_seed"],
        deterministic=deterministic,
        wrap=wrap,
    )
    return score_of(result)


def _without_returns(score: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in score.items() if key != "returns"}
