"""Make an environment, look at it, step through it, one at a time and in batches.

python examples/quickstart.py
python examples/quickstart.py --episodes 2 --out two.png
"""

import argparse

import gymnasium as gym
import numpy as np

import mmenvs
from mmenvs.media import write_png

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--episodes", type=int, default=8)
parser.add_argument("--out", default="episodes.png")
parser.add_argument("--short", action="store_true", help="two episodes")
arguments = parser.parse_args()

print("environments:", ", ".join(mmenvs.SPECS))

# One episode after the other.
env = gym.make("MMRL/VQA-v0", difficulty=1, split="train", render_mode="rgb_array")
print("observations:", env.observation_space)
print("actions:", env.action_space)
frames = []
for episode in range(2 if arguments.short else arguments.episodes):
    observation, info = env.reset(seed=0 if episode == 0 else None)
    env.action_space.seed(episode)
    action = env.action_space.sample() if episode % 2 else env.unwrapped.oracle_action()
    observation, reward, terminated, truncated, info = env.step(action)
    words = env.unwrapped.describe()
    print(f"{words['question']}  said {words['given']}, right is {words['answer']}: reward {reward:.0f}")
    frames.append(env.render())
write_png(arguments.out, frames)
print(f"pictures of these episodes: {arguments.out}")

# Many side by side: the native vector environment. An episode that ends begins anew in the same step.
envs = gym.make_vec("MMRL/AudioVisualMatching-v0", num_envs=64, split="train")
observations, infos = envs.reset(seed=0)
for key, value in observations.items():
    print(f"{key}: {value.dtype} {value.shape}")
rng = np.random.default_rng(0)
successes = []
for _ in range(10):
    observations, rewards, terminated, truncated, infos = envs.step(rng.integers(4, size=64))
    successes.extend(infos["final_info"]["is_success"][terminated])
print(f"random matching: {np.mean(successes):.2f} of {len(successes)} right")
