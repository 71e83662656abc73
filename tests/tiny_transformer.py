"""A transformer agent of a few thousand parameters, and an environment that asks it to remember."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from mmenvs_agents.transformer import ppo
from mmenvs_agents.transformer.agent import TransformerAgent
from mmenvs_agents.transformer.config import ModelConfig

VQA, CAPTIONING, MATCHING = "MMRL/VQA-v0", "MMRL/Captioning-v0", "MMRL/AudioVisualMatching-v0"
TINY = ModelConfig(width=32, layers=2, heads=4, kv_heads=2, hidden=32, token_width=16)
QUICK = ppo.PPORecipe(num_envs=8, rollout_steps=4, epochs=1, minibatches=2)
SMALL = {"image_size": 32}


def make_agent(env=VQA, recipe=QUICK, **more):
    if isinstance(env, str):
        more.setdefault("env_kwargs", SMALL)
    return TransformerAgent(env, TINY, recipe=recipe, device="cpu", precision="float32", **more)


class Recall(gym.Env):
    """A cue of four is shown at the first of three steps; the last action is paid if it names the cue."""

    def __init__(self, actions="discrete", limit=3):
        self.observation_space = spaces.Dict({"cue": spaces.Box(0.0, 2.0, (4,), np.float32)})
        self.action_space = {
            "discrete": spaces.Discrete(4, start=1),
            "multi": spaces.MultiDiscrete([2, 2]),
            "box": spaces.Box(0.0, 3.0, (1,), np.float32),
        }[actions]
        self.kind, self.limit = actions, limit

    def _seen(self):
        shown = np.zeros(4, np.float32)
        if self.time == 0:
            shown[self.cue] = 2.0
        return {"cue": shown}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cue, self.time = int(self.np_random.integers(4)), 0
        return self._seen(), {}

    def step(self, action):
        self.time += 1
        done = self.time == 3
        if self.kind == "box":
            reward = max(0.0, 1.0 - abs(float(action[0]) - self.cue))
        else:
            named = action - 1 if self.kind == "discrete" else 2 * action[0] + action[1]
            reward = float(named == self.cue)
        truncated = not done and self.time == self.limit
        return self._seen(), reward if done else 0.0, done, truncated, {"is_success": done and reward > 0.7}


def recall(n=16, **arguments):
    return gym.vector.SyncVectorEnv([lambda: Recall(**arguments)] * n, autoreset_mode=AutoresetMode.SAME_STEP)
