"""A fusion strategy of your own: low-rank bilinear pooling (Kim et al. 2017, "Hadamard product for low-rank
bilinear pooling"), trained with Stable-Baselines3.

    python examples/custom_fusion.py
    python examples/custom_fusion.py --short
"""

import argparse

import torch
from mmenvs_agents.evaluation import evaluate
from stable_baselines3 import PPO
from torch import nn

import mmenvs
from mmenvs import MultimodalExtractor
from mmenvs.embeddings import Fusion
from mmenvs.embeddings.fusion import Readout, masked_mean


class LowRankBilinear(Fusion):
    """Every token is multiplied by the means of the other modalities, element by element."""

    def __init__(self, lengths, width, features_dim):
        super().__init__(lengths, width, features_dim)
        self.here = nn.ModuleDict({name: nn.Linear(width, width) for name in lengths})
        self.there = nn.ModuleDict({name: nn.Linear(width, width) for name in lengths})
        self.out = nn.ModuleDict({name: nn.Linear(width, width) for name in lengths})
        self.readout = Readout(lengths, width, features_dim)

    def forward(self, tokens, masks):
        means = {name: masked_mean(tokens[name], masks[name]) for name in tokens}
        joined = {}
        for name in tokens:
            product = torch.tanh(self.here[name](tokens[name]))
            for other in tokens:
                if other != name:
                    product = product * torch.tanh(self.there[other](means[other])).unsqueeze(1)
            joined[name] = tokens[name] + self.out[name](product)
        return self.readout(joined, masks)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300_000)
    parser.add_argument("--short", action="store_true", help="two rollouts, to see that it runs")
    arguments = parser.parse_args()

    envs = mmenvs.integrations.sb3.make_vec_env("MMRL/VQA-v0", 256, seed=0)
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
            "features_extractor_kwargs": {"fusion": LowRankBilinear},
        },
        seed=0,
    )
    model.learn(2 * 8 * 256 if arguments.short else arguments.steps)
    print(f"success on the test split: {evaluate(model, 'MMRL/VQA-v0', episodes=1000).success}")
