"""What a frozen embedding saves: PPO from pixels, on `shapes` with its encoders running, and on a cached `shapes`.

    OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python benchmarks/embedding.py

All three learn MMRL/VQA-v0 with the same numbers of rows, steps and epochs; from pixels with the default
recipe, on embeddings with Stable-Baselines3's own MLP policy. They take turns in short bursts, medians over
the bursts are reported, and only ratios within one run mean anything. Then the encoders of `shapes` and a large one
in bfloat16 beside float32 (``--precision`` alone), by processor time.
"""

from __future__ import annotations

import argparse
import os

for _name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import statistics
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import torch
import torch.nn.functional as F
from mmenvs_agents.imitation import SelfImitationPPO
from mmenvs_agents.recipes import PPORecipe
from mmenvs_agents.sb3 import make_agent

from mmenvs.embeddings import Embedding, EmbeddingCache, Extractor, load_embedding
from mmenvs.embeddings.extractor import Precision
from mmenvs.integrations.sb3 import make_vec_env
from mmenvs.precompute import embed_parts, parts_of
from mmenvs.world.pairs import PairedScenes
from mmenvs.wrappers import VectorEmbedObservation

ID, POOL = "MMRL/VQA-v0", 20_000
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
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
    """Time of the three encoders of `shapes` and of a ViT-B/32 in both precisions, and the cosine of their vectors."""
    scenes = PairedScenes(256, difficulty=1, split="val")
    space = scenes.observation_space
    batch = {name: torch.as_tensor(x) for name, x in scenes.next().items() if name in space.spaces}
    shapes = {p: load_embedding("shapes", space, precision=p) for p in PRECISIONS}
    print(
        "\n| encoder | rows | float32, ms | bfloat16, ms | faster | lowest cosine |\n|---|---:|---:|---:|---:|---:|"
    )
    for name, x in batch.items():
        compare_precisions(f"{name}, `shapes`", shapes, {name: x}, count)
    compare_precisions("image, ViT-B/32", large_encoders(space), {"image": batch["image"][:32]}, count // 4)


def compare_precisions(
    title: str, models: Mapping[str, Embedding], given: dict[str, torch.Tensor], count: int
) -> None:
    """A line of the table; the two take turns."""
    seconds: dict[str, list[float]] = {p: [] for p in models}
    encoded = {}
    for _ in range(count):
        for p, model in models.items():
            begin = time.process_time()
            (encoded[p],) = model.encode(given).values()
            seconds[p].append(time.process_time() - begin)
    cosine = F.cosine_similarity(*(x.flatten(1) for x in encoded.values())).min().item()
    full, half = (statistics.median(values) * 1e3 for values in seconds.values())
    rows = len(next(iter(given.values())))
    print(f"| {title} | {rows} | {full:.1f} | {half:.1f} | {full / half:.2f}x | {cosine:.5f} |")


def large_encoders(space: gym.spaces.Dict) -> dict[str, Embedding]:
    """A ViT-B/32 of transformers with random weights for the pictures, in both precisions."""
    import transformers as hf

    seen, encoders = gym.spaces.Dict({"image": space["image"]}), {}
    with tempfile.TemporaryDirectory() as folder:
        hf.ViTModel(hf.ViTConfig(patch_size=32)).save_pretrained(folder)
        hf.ViTImageProcessorPil(size={"height": 224, "width": 224}).save_pretrained(folder)
        for p in PRECISIONS:
            torch.manual_seed(0)  # of the layer that brings its tokens to the extractor's width
            extractor = Extractor.from_pretrained(seen, image=folder, fusion="concat", precision=p)
            encoders[p] = load_embedding(extractor, seen)
    return encoders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bursts", type=int, default=5)
    parser.add_argument("--rollouts", type=int, default=2, help="rollouts of a burst, 2,048 steps each")
    parser.add_argument("--precision", action="store_true", help="bfloat16 beside float32, nothing else")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.precision:
        precision(20)
        return
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
