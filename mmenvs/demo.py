"""What ``mmenvs demo`` does: train, compare with blind agents, and leave pictures of it."""

from __future__ import annotations

import csv
import importlib
import json
import multiprocessing
import shlex
import signal
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium as gym

from mmenvs import media
from mmenvs.files import replacing

ID = "MMRL/VQA-v0"
DIFFICULTY = 0
STEPS = 200_000
SHORT_STEPS = 4_096
BLIND_SHARE = 0.08  # of the steps of the agent that sees everything; blind ones level off early
EPISODES, SHORT_EPISODES = 2000, 200
ALGORITHM, FUSION = "ppo", "concat"
ENV_KWARGS = {"difficulty": DIFFICULTY}


def run(out: Path, steps: int, device: str, seed: int, say: Callable[[str], Any]) -> dict[str, Any]:
    """Train on the train split, score on the test split.

    Args:
        out: folder that ``agent/``, ``learning_curve.png``, ``episodes.png`` and ``results.json`` go to.
        steps: steps of training of the agent; each blind one takes ``BLIND_SHARE`` of them.
        device, seed: as for training.
        say: is told what happens.

    Returns:
        The evaluations by the names of the agents.
    """
    sb3 = importlib.import_module("mmenvs_agents.sb3")
    evaluate = importlib.import_module("mmenvs_agents.evaluation").evaluate
    begin = time.perf_counter()
    episodes = EPISODES if steps > SHORT_STEPS else SHORT_EPISODES
    blind_steps = max(1, round(steps * BLIND_SHARE))
    folder = out / "agent"
    threads = torch_threads(1)
    # The blind agents learn on the other core meanwhile. Networks this small gain nothing from two threads.
    context, others = multiprocessing.get_context("spawn"), set(multiprocessing.active_children())
    with ProcessPoolExecutor(1, context, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as other_core:
        blind = {
            f"{key}_only": other_core.submit(train_blind, key, blind_steps, device, seed, episodes)
            for key in ("question", "image")
        }
        try:
            say(f"{ALGORITHM} with {FUSION} learns {ID}, difficulty {DIFFICULTY}, {steps:,} steps")
            say(
                f"beside it two blind ones, without the picture and without the question, {blind_steps:,} steps each"
            )
            # From pixels and words: nothing that was trained before.
            agent = sb3.make_agent(
                ALGORITHM, ID, fusion=FUSION, encoders={}, device=device, seed=seed, env_kwargs=ENV_KWARGS
            )
            if not sb3.train(agent, steps, folder):
                again = shlex.join(
                    ["mmenvs", "train", ID, "--out", str(folder), "--steps", str(steps), "--resume"]
                )
                say(f"stopped early; this goes on with the agent alone: {again}")
                raise KeyboardInterrupt
            say(f"all answer the same {episodes:,} questions of the test split")
            players = {"agent": agent, **{name: name for name in ("most_frequent", "random", "oracle")}}
            results = {
                name: evaluate(player, ID, split="test", episodes=episodes, env_kwargs=ENV_KWARGS, seed=seed)
                for name, player in players.items()
            }
            results |= {name: future.result() for name, future in blind.items()}
        except BaseException:
            # Leaving the block would wait for the blind agents.
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            raise
    torch_threads(threads)
    draw_curve(out / "learning_curve.png", folder / "progress_0.csv", results, steps)
    env = gym.make(ID, render_mode="rgb_array", split="test", difficulty=DIFFICULTY)
    media.write_png(out / "episodes.png", media.play(env, agent, 12, seed, ends_only=True)[0], columns=2)
    env.close()
    document = {
        "id": ID,
        "steps": {"agent": steps, "blind": blind_steps},
        "minutes": round((time.perf_counter() - begin) / 60, 2),
        **{name: result.to_dict() for name, result in results.items()},
    }
    with replacing(out / "results.json") as file:
        file.write_text(json.dumps(document, indent=2))
    say(f"{document['minutes']} minutes in all")
    return results


def train_blind(key: str, steps: int, device: str, seed: int, episodes: int) -> Any:
    """Train an agent that sees ``key`` alone, and its score. Runs in a process of its own."""
    torch_threads(1)
    sb3 = importlib.import_module("mmenvs_agents.sb3")
    evaluate = importlib.import_module("mmenvs_agents.evaluation").evaluate
    agent = sb3.make_agent(
        ALGORITHM,
        ID,
        fusion=FUSION,
        encoders={},
        device=device,
        seed=seed,
        env_kwargs=ENV_KWARGS,
        visible=(key,),
    )
    sb3.train(agent, steps, progress=False)
    return evaluate(agent, ID, split="test", episodes=episodes, env_kwargs=ENV_KWARGS, seed=seed)


def torch_threads(count: int) -> int:
    """Set torch's threads; how many there were."""
    torch = importlib.import_module("torch")
    before: int = torch.get_num_threads()
    torch.set_num_threads(count)
    return before


def draw_curve(path: Path, log: Path, results: dict[str, Any], steps: int) -> None:
    """Success while training from the CSV log, with the scores on the test split beside it."""
    from matplotlib.figure import Figure

    with open(log, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("rollout/success_rate")]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [float(row["time/total_timesteps"]) for row in rows],
        [float(row["rollout/success_rate"]) for row in rows],
        color="#3660a8",
        label="agent, train split, last 1,000 episodes",
    )
    rate = results["agent"].success
    axes.errorbar(
        [steps],
        [rate.value],
        [[rate.value - rate.low], [rate.high - rate.value]],
        fmt="o",
        color="#168a42",
        capsize=4,
        label=f"agent, test split: {rate.value:.3f}",
    )
    styles = {
        "oracle": "-",
        "image_only": "--",
        "question_only": "-.",
        "most_frequent": ":",
        "random": (0, (1, 4)),
    }
    for name, style in styles.items():
        value = results[name].success.value
        label = f"{name.replace('_', ' ')}: {value:.3f}"
        axes.axhline(value, color="#767c86", linestyle=style, linewidth=1.2, label=label)
    axes.set(
        xlabel="steps of training",
        ylabel="success",
        ylim=(-0.02, 1.02),
        title=f"{ID}, difficulty {DIFFICULTY}",
    )
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    with replacing(path) as file:
        figure.savefig(file, dpi=120)
