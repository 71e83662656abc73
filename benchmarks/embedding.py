"""What a frozen embedding saves: PPO from pixels, on `shapes` with its encoders running, and on a cached `shapes`.

    OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python benchmarks/embedding.py

All three learn MMRL/VQA-v0 with the same numbers of rows, steps and epochs; from pixels with the default
recipe, on embeddings with Stable-Baselines3's own MLP policy. They take turns in short bursts, medians over
the bursts are reported, and only ratios within one run mean anything. Then the encoders of `shapes` in
bfloat16 beside float32.
"""

from __future__ import annotations

import argparse
import os

for _name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import statistics
import time
from typing import Any

import gymnasium as gym
import torch
import torch.nn.functional as F
from mmenvs_agents.imitation import SelfImitationPPO
from mmenvs_agents.recipes import PPORecipe
from mmenvs_agents.sb3 import make_agent

from mmenvs.embeddings import EmbeddingCache, load_embedding
from mmenvs.integrations.sb3 import make_vec_env
from mmenvs.precompute import embed_parts, parts_of
from mmenvs.world.pairs import PairedScenes
from mmenvs.wrappers import VectorEmbedObservation

ID, POOL = "MMRL/VQA-v0", 20_000
# An MLP does 512 rows in hardly more time than 128, a CNN does not.
MLP_BATCH = 512


def on_embedding(cache: EmbeddingCache | None, **env_kwargs: Any) -> SelfImitationPPO:
    """The recipe's PPO with an MLP of Stable-Baselines3 on the pooled vectors of `shapes`."""
    recipe = PPORecipe()
    env = make_vec_env(
        ID,
        recipe.num_envs,
        wrap=lambda envs: VectorEmbedObservation(envs, "shapes", device="cpu", cache=cache),
        **env_kwargs,
    )
    arguments = {**recipe.arguments, "batch_size": MLP_BATCH, "ent_coef": recipe.ent_coef}
    return SelfImitationPPO(
        "MlpPolicy", env, learning_rate=recipe.learning_rate, seed=0, device="cpu", **arguments
    )


def bursts(agents: dict[str, Any], count: int, rollouts: int) -> dict[str, float]:
    """Median steps a second of each agent."""
    rates: dict[str, list[float]] = {name: [] for name in agents}
    for burst in range(count + 1):
        for name, agent in agents.items():
            begin, first = time.perf_counter(), agent.num_timesteps
            agent.learn(rollouts * agent.n_steps * agent.n_envs, reset_num_timesteps=False)
            if burst:  # the first one warms up, and fills the cache
                rates[name].append((agent.num_timesteps - first) / (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in rates.items()}


@torch.no_grad()
def precision(count: int) -> None:
    """Time of the three encoders in both precisions, and the cosine of their vectors."""
    scenes = PairedScenes(256, difficulty=1, split="val")
    batch = {
        name: torch.as_tensor(value)
        for name, value in scenes.next().items()
        if name in scenes.observation_space.spaces
    }
    models = {
        p: load_embedding("shapes", scenes.observation_space, precision=p) for p in ("float32", "bfloat16")
    }
    print(
        "\n| encoder of 256 | float32, ms | bfloat16, ms | faster | lowest cosine |\n|---|---:|---:|---:|---:|"
    )
    for name in batch:
        seconds: dict[str, list[float]] = {p: [] for p in models}
        for _ in range(count):
            for p, model in models.items():
                begin = time.perf_counter()
                model.encode({name: batch[name]})
                seconds[p].append(time.perf_counter() - begin)
        a, b = (model.encode({name: batch[name]})[name].flatten(1) for model in models.values())
        full, half = (statistics.median(values) * 1e3 for values in seconds.values())
        cosine = F.cosine_similarity(a, b).min().item()
        print(f"| {name} | {full:.1f} | {half:.1f} | {full / half:.2f}x | {cosine:.5f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bursts", type=int, default=5)
    parser.add_argument("--rollouts", type=int, default=2, help="rollouts of a burst, 2,048 steps each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    agents = {
        "from pixels (cnn + concat)": make_agent("ppo", ID, fusion="concat", encoders={}, device="cpu"),
        "frozen shapes + MLP, encoders running": on_embedding(None),
        f"frozen shapes + MLP, from the cache, pool of {POOL:,}": on_embedding(
            EmbeddingCache(), pool_size=POOL
        ),
    }
    envs: Any = gym.make_vec(ID, num_envs=500, pool_size=POOL)
    cached = agents[list(agents)[2]].get_env().env
    for _ in embed_parts(envs.task, cached.encoder, parts_of(envs.task, cached.encoder)):
        pass
    rates = bursts(agents, options.bursts, options.rollouts)
    base = next(iter(rates.values()))
    print("| PPO on VQA-v0 | steps / s | of pixels |\n|---|---:|---:|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:,.0f} | {rate / base:.1f}x |")
    precision(20)


if __name__ == "__main__":
    main()
