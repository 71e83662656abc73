"""A new task: a picture of one colour and a word; is this its name? Run: python examples/custom_task.py"""

import gymnasium as gym
import numpy as np

import mmenvs
from mmenvs import spaces
from mmenvs.media import panel, write_png
from mmenvs.tasks.base import Task
from mmenvs.text import Vocabulary
from mmenvs.world.random import below

COLOURS = {"red": (220, 50, 50), "green": (50, 180, 80), "blue": (60, 90, 220)}


class ColourName(Task):
    """The action is 1 if the word names the colour of the picture, else 0."""

    fixed = frozenset({"image", "word"})

    def __init__(self, num_envs, *, split="train", difficulty=0):
        super().__init__(num_envs, split=split, difficulty=difficulty)
        self.vocabulary = Vocabulary(COLOURS)
        word = spaces.text(len(self.vocabulary), 1)
        self.observation_space = gym.spaces.Dict({"image": spaces.image(32), "word": word})
        self.action_space = gym.spaces.Discrete(2)
        self.info_types = {"is_success": bool, "answer": int}
        self.colour, self.word, self.chosen = (np.full(num_envs, -1) for _ in range(3))

    def sample(self, rows):
        for i in rows:  # a compiled kernel would loop here; each row draws from its own stream
            self.colour[i] = self.word[i] = below(self.streams, i, 3)
            if below(self.streams, i, 2):
                self.word[i] = (self.colour[i] + 1 + below(self.streams, i, 2)) % 3
        self.chosen[rows] = -1

    def observe(self, rows, out):
        if "image" in out:
            out["image"][rows] = np.array(list(COLOURS.values()), np.uint8)[self.colour[rows], None, None]
        if "word" in out:
            out["word"][rows, 0] = self.word[rows] + self.vocabulary.id("red")

    def step(self, rows, actions):
        self.chosen[rows] = actions
        return (actions == self.oracle(rows)).astype(float), np.ones(rows.size, bool)

    def info(self, rows):
        answer = np.where(self.chosen[rows] >= 0, self.oracle(rows), -1)
        return {"is_success": self.chosen[rows] == self.oracle(rows), "answer": answer}

    def oracle(self, rows):
        return (self.colour[rows] == self.word[rows]).astype(np.int64)

    def describe(self, row):
        return {"word": list(COLOURS)[self.word[row]]}

    def render(self, row):
        image = np.zeros((self.num_envs, 32, 32, 3), np.uint8)
        self.observe(np.array([row]), {"image": image})
        return panel([image[row]], [(f"{self.describe(row)['word']}?", "black")])


mmenvs.register("MMRL/ColourName-v0", ColourName, tags=("image", "text"))

if __name__ == "__main__":
    env = gym.make("MMRL/ColourName-v0", render_mode="rgb_array")
    env.reset(seed=0)
    print("oracle's reward:", env.step(env.unwrapped.oracle_action())[1])
    envs = gym.make_vec("MMRL/ColourName-v0", num_envs=1000, render_mode="rgb_array")
    envs.reset(seed=0)
    print("always yes:", envs.step(np.ones(1000, np.int64))[1].mean())
    print("pictures:", write_png("colour_name.png", envs.render()[:8]))
