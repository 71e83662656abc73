"""Matching a sound with the picture of the scene that makes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from mmenvs import spaces as modalities
from mmenvs.checks import check_image_size, check_seconds, integer_in
from mmenvs.tasks.base import Rows, Task
from mmenvs.world import render, scene, sound
from mmenvs.world.kernels import kernel
from mmenvs.world.random import below
from mmenvs.world.scene import Level, Scenes, held_out
from mmenvs.world.words import VOCABULARY


class AudioVisualMatching(Task):
    """
    ## Description

    One sound and `candidates` pictures; the action says which picture is heard. Every object of the
    procedural world has a voice: its timbre tells the shape, its pitch the colour, its loudness the size
    and its rhythm the texture. A scene is heard as its voices one after the other in reading order, by
    rows from the top and each from the left; where exactly the objects stand is not heard.

    The candidates are drawn alike and the target is chosen among them last, so the pictures by themselves
    tell nothing, and neither does the sound.

    ## Observation Space

    | key | space | meaning |
    |---|---|---|
    | `audio` | `Box(-1, 1, (16000 * seconds,), float32)` | mono sound at 16 kHz |
    | `images` | `Box(0, 255, (candidates, image_size, image_size, 3), uint8)` | the pictures, RGB |

    ## Action Space

    `Discrete(4)`, or as many as `candidates` says: the index of the picture that is heard.

    ## Rewards

    1 for the right picture, 0 for any other.

    ## Starting State

    Candidates that all sound different and all belong to the split, drawn from the stream of
    (split, seed, episode). Each has its own layout, jitter, background and noise.

    ## Episode End

    After one step.

    ## Information

    | key | type | meaning |
    |---|---|---|
    | `is_success` | bool | the right picture was chosen |
    | `answer` | int | index of the right picture once the episode has ended, -1 before |

    ## Arguments

    * `split="train"`: `"train"`, `"val"`, `"test"` or `"compositional"`; disjoint by what stands where.
      In the compositional split every candidate has an object with a held-out (shape, colour).
    * `difficulty=0`: 0 to 3. The scenes of each level are in `mmenvs.world.scene.DIFFICULTIES`. The
      candidates are at level 0 unrelated scenes; at level 1 scenes of as many objects each; at level 2 alike
      but for one object; at level 3 alike but for the shape or the colour of one object.
    * `image_size=64`: even, 32 to 512 pixels.
    * `candidates=4`: 2 to 8.
    * `seconds=1.0`: length of the sound, 0.5 to 2.
    * `pool_size=None`: None draws every scene anew; N draws from a finite pool of N scenes of the split, whose
      embeddings can be cached whole. `task.pool_index` says which one it is.

    ## References

    Arandjelović and Zisserman 2017, "Look, Listen and Learn"; Johnson et al. 2017, "CLEVR".

    ## Version History

    * v0: first version.
    """

    fixed = frozenset({"audio", "images"})

    def __init__(
        self,
        num_envs: int,
        *,
        split: str = "train",
        difficulty: int = 0,
        image_size: int = 64,
        candidates: int = 4,
        seconds: float = 1.0,
        pool_size: int | None = None,
    ) -> None:
        super().__init__(num_envs, split=split, difficulty=difficulty, pool_size=pool_size)
        self.image_size = check_image_size(image_size)
        self.candidates = integer_in("candidates", candidates, 2, 8)
        self.seconds = check_seconds(seconds)
        self.vocabulary = VOCABULARY
        self.info_types = {"is_success": bool, "answer": int}
        self.observation_space = spaces.Dict(
            {
                "audio": modalities.audio(sound.samples_of(self.seconds)),
                "images": modalities.images(self.candidates, self.image_size),
            }
        )
        self.action_space = spaces.Discrete(self.candidates)
        self.atlas = render.atlas(self.image_size, self.level.grid, self.level.rotation)
        self.bank = sound.bank(self.seconds, self.level.objects_max)
        # Candidate k of row i is scene i * candidates + k.
        self.scenes = scene.empty(num_envs * self.candidates)
        self.target = np.zeros(num_envs, np.int64)
        self.chosen = np.full(num_envs, -1, np.int64)
        self.ended = np.zeros(num_envs, np.bool_)

    def sample(self, rows: Rows) -> None:
        self.ended[rows] = False
        self.chosen[rows] = -1
        sample_rows(
            self.scenes,
            self.target,
            rows,
            self.streams,
            self.level,
            self.split_id,
            self.difficulty,
            self.candidates,
        )

    def observe(self, rows: Rows, out: dict[str, npt.NDArray[Any]]) -> None:
        if "audio" in out:
            heard = rows * self.candidates + self.target[rows]
            sound.sound_rows(self.scenes, heard, self.bank, self.level.audio_noise, out["audio"], rows)
        if "images" in out:
            seen = (rows[:, None] * self.candidates + np.arange(self.candidates)).ravel()
            pictures = out["images"].reshape(-1, self.image_size, self.image_size, 3)
            render.render_rows(self.scenes, seen, self.atlas, self.level.noise, pictures)

    def step(
        self, rows: Rows, actions: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        self.ended[rows] = True
        self.chosen[rows] = actions
        return (actions == self.target[rows]).astype(np.float64), np.ones(rows.size, np.bool_)

    def info(self, rows: Rows) -> dict[str, npt.NDArray[Any]]:
        return {
            "is_success": self.chosen[rows] == self.target[rows],
            "answer": np.where(self.ended[rows], self.target[rows], -1),
        }

    def oracle(self, rows: Rows) -> npt.NDArray[np.int64]:
        return self.target[rows]

    def describe(self, row: int) -> dict[str, Any]:
        first = row * self.candidates
        candidates = [scene.words(self.scenes, first + k) for k in range(self.candidates)]
        described: dict[str, Any] = {"question": "which picture is heard?", "candidates": candidates}
        if self.ended[row]:
            described |= {"answer": int(self.target[row]), "given": int(self.chosen[row])}
        return described

    def render(self, row: int) -> npt.NDArray[np.uint8]:
        from mmenvs.media import panel

        out = {
            key: np.zeros((self.num_envs, *space.shape), space.dtype)
            for key, space in self.observation_space.items()
            if space.shape is not None
        }
        self.observe(np.array([row]), out)
        lines = [("Which picture is heard?", "black")]
        marks: dict[int, str] = {}
        if self.ended[row]:
            target, chosen = int(self.target[row]), int(self.chosen[row])
            marks = {chosen: "red", target: "green"}
            lines.append((f"agent: {chosen}", "green" if chosen == target else "red"))
            lines.append((f"answer: {target}", "grey"))
        return panel(list(out["images"][row]), lines, audio=out["audio"][row], marks=marks)


@kernel
def sample_rows(
    scenes: Scenes, target, rows, streams, level: Level, split: int, difficulty: int, candidates: int
) -> None:
    """Draw the candidates of ``rows`` and, last, which of them is heard.

    Candidate k of row i is scene ``i * candidates + k``. All candidates of a row are drawn by one rule, so
    that none stands out.
    """
    for j in range(rows.size):
        i = rows[j]
        first = i * candidates
        if difficulty == 0:
            for k in range(candidates):
                while True:
                    scene.sample(scenes, first + k, streams, i, level, split)
                    if _sounds_new(scenes, first, k):
                        break
        else:
            count = level.objects_min + below(streams, i, level.objects_max - level.objects_min + 1)
            for k in range(candidates):
                scenes.count[first + k] = count
            if difficulty == 1:
                _all_objects_differ(scenes, first, candidates, streams, i, level, split)
            else:
                one_attribute = difficulty == 3
                _one_object_differs(scenes, first, candidates, streams, i, level, split, one_attribute)
            for k in range(candidates):
                scene.finish(scenes, first + k, streams, i, level)
        target[i] = below(streams, i, candidates)


@kernel
def _all_objects_differ(scenes, first, candidates, streams, row, level, split):
    for k in range(candidates):
        while True:
            scene.sample_layout(scenes, first + k, streams, row, level)
            scene.sample_objects(scenes, first + k, streams, row, level, split)
            if scene.in_split(scenes, first + k, split) and _sounds_new(scenes, first, k):
                break


@kernel
def _one_object_differs(scenes, first, candidates, streams, row, level, split, one_attribute):
    """Draw objects that all candidates share, and a different one in the same place of the reading order."""
    count = scenes.count[first]
    place = below(streams, row, count)
    # In the compositional split one of the shared objects is a held-out pair for sure.
    sure = (place + 1 + below(streams, row, count - 1)) % count
    for o in range(count):
        novel = split == 3 and (o == sure or below(streams, row, 2) == 0)
        scene.sample_object(scenes, first, o, streams, row, level, novel)
    attribute = 0
    if one_attribute:
        # A shape or colour of which the split has enough values beside the object's other attributes.
        while True:
            attribute = below(streams, row, 2)
            if _allowed(scenes, first, place, attribute, split) >= candidates:
                break
            scene.sample_object(scenes, first, place, streams, row, level, False)

    for k in range(1, candidates):
        for o in range(count):
            for a in range(4):
                scenes.attributes[first + k, o, a] = scenes.attributes[first, o, a]
    for k in range(candidates):
        while True:
            if one_attribute:
                scenes.attributes[first + k, place, attribute] = below(streams, row, 8)
                fits = split == 3 or not held_out(
                    scenes.attributes[first + k, place, 0], scenes.attributes[first + k, place, 1]
                )
            else:
                novel = split == 3 and below(streams, row, 2) == 0
                scene.sample_object(scenes, first + k, place, streams, row, level, novel)
                fits = True
            if fits and _sounds_new(scenes, first, k):
                break
        # Layouts are many (560 at least), so some belong to any split.
        while True:
            scene.sample_layout(scenes, first + k, streams, row, level)
            if scene.in_split(scenes, first + k, split):
                break


@kernel
def _allowed(scenes, i, k, attribute, split):
    """How many values of its shape (0) or colour (1) object ``k`` of scene ``i`` may take in the split."""
    if split == 3:
        return 8
    allowed = 0
    for value in range(8):
        shape = value if attribute == 0 else scenes.attributes[i, k, 0]
        colour = value if attribute == 1 else scenes.attributes[i, k, 1]
        allowed += not held_out(shape, colour)
    return allowed


@kernel
def _sounds_new(scenes, first, k):
    """Whether candidate ``k`` differs from the earlier ones in what is heard: its objects in reading order."""
    for other in range(first, first + k):
        if scenes.count[other] == scenes.count[first + k]:
            same = True
            for o in range(scenes.count[other]):
                for a in range(4):
                    same &= scenes.attributes[other, o, a] == scenes.attributes[first + k, o, a]
            if same:
                return False
    return True
