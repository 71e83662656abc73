"""PPO (Schulman et al. 2017) in one file of plain torch: the native vector environment and the extractor
plug into any training loop.

    python examples/ppo_loop.py
    python examples/ppo_loop.py --short
    python examples/ppo_loop.py --id MMRL/Captioning-v0 --steps 1000000
"""

import argparse
import time

import gymnasium as gym
import numpy as np
import torch
from torch import nn
from torch.distributions import Categorical

from mmenvs import Extractor


class Policy(nn.Module):
    """One trunk for both heads: logits of the actions and the value of the state."""

    def __init__(self, observation_space, actions, fusion):
        super().__init__()
        self.extractor = Extractor(observation_space, fusion=fusion, features_dim=256)
        self.actor = nn.Linear(256, actions)
        self.critic = nn.Linear(256, 1)
        nn.init.orthogonal_(self.actor.weight, 0.01)
        nn.init.zeros_(self.actor.bias)

    def forward(self, observation):
        features = self.extractor(observation)
        return Categorical(logits=self.actor(features)), self.critic(features).squeeze(-1)


def as_tensors(observation, device):
    return {key: torch.as_tensor(value).to(device) for key, value in observation.items()}


def advantages_and_returns(rewards, values, ends, last_value, gamma, lam):
    """Generalised advantage estimation (Schulman et al. 2016); every tensor is (T, n)."""
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(last_value)
    for t in reversed(range(len(rewards))):
        following = last_value if t == len(rewards) - 1 else values[t + 1]
        alive = 1.0 - ends[t]
        delta = rewards[t] + gamma * following * alive - values[t]
        running = delta + gamma * lam * alive * running
        advantages[t] = running
    return advantages, advantages + values


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--id", default="MMRL/VQA-v0")
    parser.add_argument("--steps", type=int, default=500_000)
    parser.add_argument("--num-envs", type=int, default=256)
    parser.add_argument("--rollout", type=int, default=8, help="steps of each environment between updates")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--minibatch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--gamma", type=float, default=0.99)
    parser.add_argument("--lam", type=float, default=0.95)
    parser.add_argument("--clip", type=float, default=0.2)
    parser.add_argument("--entropy", type=float, default=0.01)
    parser.add_argument("--fusion", default="cross_attention")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--short", action="store_true", help="two updates, to see that it runs")
    a = parser.parse_args()

    torch.manual_seed(a.seed)
    envs = gym.make_vec(a.id, num_envs=a.num_envs, split="train", difficulty=0)
    policy = Policy(envs.single_observation_space, int(envs.single_action_space.n), a.fusion).to(a.device)
    optimizer = torch.optim.Adam(policy.parameters(), lr=a.lr, eps=1e-5)
    batch = a.num_envs * a.rollout
    updates = 2 if a.short else max(1, a.steps // batch)
    print(
        f"{a.id}: {sum(p.numel() for p in policy.parameters()):,} parameters, {updates} updates of {batch} steps"
    )

    observation, _ = envs.reset(seed=a.seed)
    begin = time.perf_counter()
    successes = []
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = a.lr * (1 - update / updates)

        # Play. The environments begin their next episode in the step that ends the last one.
        observations, rows = [], {name: [] for name in ("action", "log_prob", "value", "reward", "end")}
        for _ in range(a.rollout):
            observations.append(as_tensors(observation, a.device))
            with torch.no_grad():
                distribution, value = policy(observations[-1])
                action = distribution.sample()
            observation, reward, terminated, truncated, infos = envs.step(action.cpu().numpy())
            ended = terminated | truncated
            if ended.any():
                successes.extend(infos["final_info"]["is_success"][ended])
            for name, part in zip(
                rows, (action, distribution.log_prob(action), value, reward, ended), strict=True
            ):
                rows[name].append(torch.as_tensor(part, device=a.device))
        with torch.no_grad():
            last_value = policy(as_tensors(observation, a.device))[1]
        play = {name: torch.stack(parts) for name, parts in rows.items()}
        advantages, returns = advantages_and_returns(
            play["reward"].float(), play["value"], play["end"].float(), last_value, a.gamma, a.lam
        )

        # Learn, from minibatches of all steps in random order.
        inputs = {key: torch.cat([part[key] for part in observations]) for key in observations[0]}
        actions, old, targets = play["action"].flatten(), play["log_prob"].flatten(), returns.flatten()
        for _ in range(a.epochs):
            for chosen in torch.randperm(batch, device=a.device).split(a.minibatch):
                distribution, value = policy({key: part[chosen] for key, part in inputs.items()})
                advantage = advantages.flatten()[chosen]
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                ratio = (distribution.log_prob(actions[chosen]) - old[chosen]).exp()
                clipped = ratio.clamp(1 - a.clip, 1 + a.clip)
                policy_loss = -torch.min(ratio * advantage, clipped * advantage).mean()
                value_loss = (value - targets[chosen]).square().mean()
                loss = policy_loss + 0.5 * value_loss - a.entropy * distribution.entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
                optimizer.step()

        if update % max(1, updates // 20) == 0 or update == updates - 1:
            done = (update + 1) * batch
            rate = np.mean(successes) if successes else float("nan")
            speed = done / (time.perf_counter() - begin)
            print(f"{done:9,} steps  success {rate:.3f}  {speed:7,.0f} steps/s")
            successes.clear()


if __name__ == "__main__":
    main()
