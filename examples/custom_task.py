"""A new task: a picture of one colour and a word; is it the name? Run: python examples/custom_task.py"""

import gymnasium as gym
import numpy as np

import mmenvs
from mmenvs import media, spaces
from mmenvs.tasks.base import Task
from mmenvs.world.random import below

NAMES, PIXELS = ("red", "green", "blue"), np.array([[220, 50, 50], [50, 180, 80], [60, 90, 220]], np.uint8)


class ColourName(Task):
    """The action is 1 if the word names the colour of the picture, else 0."""

    def __init__(self, num_envs, *, split="train", difficulty=0):
        super().__init__(num_envs, split=split, difficulty=difficulty)
        self.observation_space = gym.spaces.Dict({"image": spaces.image(32), "word": spaces.text(4, 1)})
        self.action_space = gym.spaces.Discrete(2)
        self.info_types = {"is_success": bool, "answer": int}
        self.colour, self.word, self.chosen = (np.full(num_envs, -1) for _ in range(3))

    def sample(self, rows):
        for i in rows:  # each row draws from its own stream
            self.colour[i], shift = below(self.streams, i, 3), below(self.streams, i, 4)
            self.word[i] = (self.colour[i] + max(0, shift - 1)) % 3  # half of them are right
        self.chosen[rows] = -1

    def observe(self, rows, out):
        if "image" in out:
            out["image"][rows] = PIXELS[self.colour[rows], None, None]
        if "word" in out:
            out["word"][rows, 0] = self.word[rows] + 1  # 0 is padding

    def step(self, rows, actions):
        self.chosen[rows] = actions
        return (actions == self.oracle(rows)).astype(float), np.ones(rows.size, bool)

    def info(self, rows):
        chosen, answer = self.chosen[rows], self.oracle(rows)
        return {"is_success": chosen == answer, "answer": np.where(chosen >= 0, answer, -1)}

    def oracle(self, rows):
        return (self.colour[rows] == self.word[rows]).astype(np.int64)

    def describe(self, row):
        return {"word": NAMES[self.word[row]]}

    def render(self, row):
        picture = np.tile(PIXELS[self.colour[row]], (32, 32, 1))
        return media.panel([picture], [(f"{self.describe(row)['word']}?", "black")])


mmenvs.register("MMRL/ColourName-v0", ColourName, tags=("image", "text"))
envs = gym.make_vec("MMRL/ColourName-v0", num_envs=1000)
envs.reset(seed=0)
print("always yes is right in", envs.step(np.ones(1000, np.int64))[1].mean())
print("the oracle is right in", envs.step(envs.oracle_actions())[1].mean())
