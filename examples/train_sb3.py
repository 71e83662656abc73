"""Train PPO of Stable-Baselines3 on a multimodal environment.

python examples/train_sb3.py
python examples/train_sb3.py --short
"""

import argparse

from mmenvs_agents.evaluation import evaluate
from stable_baselines3 import PPO

import mmenvs
from mmenvs import MultimodalExtractor

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--id", default="MMRL/VQA-v0")
parser.add_argument("--steps", type=int, default=300_000)
parser.add_argument("--num-envs", type=int, default=256)
parser.add_argument("--fusion", default="cross_attention")
parser.add_argument("--short", action="store_true", help="two rollouts, to see that it runs")
arguments = parser.parse_args()

envs = mmenvs.integrations.sb3.make_vec_env(arguments.id, arguments.num_envs, seed=0, split="train")
model = PPO(
    "MultiInputPolicy",
    envs,
    learning_rate=1e-3,
    n_steps=8,
    batch_size=512,
    n_epochs=2,
    ent_coef=0.01,
    policy_kwargs={
        "features_extractor_class": MultimodalExtractor,
        "features_extractor_kwargs": {"fusion": arguments.fusion},
    },
    seed=0,
)
model.learn(2 * 8 * arguments.num_envs if arguments.short else arguments.steps)

for name, agent in (("PPO", model), ("random", "random"), ("oracle", "oracle")):
    print(f"{name}: success {evaluate(agent, arguments.id, split='test', episodes=1000).success}")
