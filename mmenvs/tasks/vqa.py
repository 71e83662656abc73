"""Visual question answering."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from mmenvs import spaces as modalities
from mmenvs.checks import check_image_size, integer_in
from mmenvs.tasks.base import Rows, Task, check_with_source
from mmenvs.world import questions, random, render, scene
from mmenvs.world.phrasings import MAX_FILLER, fill_rows, write_rows
from mmenvs.world.words import VOCABULARY

if TYPE_CHECKING:
    from mmenvs.datasets import QuestionSource


class VQA(Task):
    """
    ## Description

    A picture and a question about it; the action is the answer. Scenes of 1 to 10 objects (8 shapes,
    8 colours, 2 sizes, 3 textures) come from the procedural world, questions are programs over the scene
    as in CLEVR: exist, count, query an attribute, spatial relation, compare attributes or counts,
    superlative, and/or chains. Every question has exactly one answer, answers are uniform within each type
    of question, and neither the words nor the picture alone give the answer away. With ``source`` the
    questions and photographs of a data set take the world's place.

    ## Observation Space

    | key | space | meaning |
    |---|---|---|
    | `image` | `Box(0, 255, (image_size, image_size, 3), uint8)` | the picture, RGB |
    | `question` | `Box(0, V-1, (20 + filler,), int64)` | word ids, 0 is padding; a source sets its own length |

    ## Action Space

    `Discrete(34)`: yes, no, zero to ten, the shapes, colours, sizes and textures, in the order of
    `mmenvs.world.questions.ANSWERS`. With a source: its answer vocabulary.

    ## Rewards

    1 for the right answer, 0 for any other. With VQA v2 as the source: its soft accuracy in [0, 1].

    ## Starting State

    A scene and a question of the split, drawn from the stream of (split, seed, episode).

    ## Episode End

    After one step.

    ## Information

    | key | type | meaning |
    |---|---|---|
    | `is_success` | bool | the answer was right (soft accuracy of at least 0.5 with a source) |
    | `question_type` | int | index into `mmenvs.world.questions.TYPES`, or into the source's types |
    | `answer` | int | the right action once the episode has ended, -1 before |

    ## Arguments

    * `split="train"`: `"train"`, `"val"`, `"test"` or `"compositional"`; disjoint by what stands where.
    * `difficulty=0`: 0 to 3; 0 with a source. The scenes of each level are in `mmenvs.world.scene.DIFFICULTIES`. Level 0 asks
      exist, count, query shape and query colour; 1 adds query size, query texture, relation and
      compare attribute; 2 adds compare counts and superlative; 3 adds and, or.
    * `image_size=64`: even, 32 to 512 pixels.
    * `source=None`: a reader such as `mmenvs.datasets.VQAv2`.
    * `pool_size=None`: None draws every scene anew; N draws from a finite pool of N scenes of the split, whose
      embeddings can be cached whole. `task.pool_index` says which one it is. Not with a source.
    * `filler=0`: 0 to 40 words that tell nothing stand before each question, to see what longer texts do to an
      agent. They are drawn after the scene and the question, which stay what they are. Not with a source.
    * `text="ids"`: `"string"` gives the question as a sentence.

    ## References

    Antol et al. 2015, "VQA: Visual Question Answering"; Johnson et al. 2017, "CLEVR"; Goyal et al. 2017,
    "Making the V in VQA Matter".

    ## Version History

    * v0: first version.
    """

    fixed = frozenset({"image", "question"})

    def __init__(
        self,
        num_envs: int,
        *,
        split: str = "train",
        difficulty: int = 0,
        image_size: int = 64,
        source: QuestionSource | None = None,
        pool_size: int | None = None,
        filler: int = 0,
    ) -> None:
        super().__init__(num_envs, split=split, difficulty=difficulty, pool_size=pool_size)
        self.filler = np.zeros((num_envs, integer_in("filler", filler, 0, MAX_FILLER)), np.int64)
        self.image_size = check_image_size(image_size)
        self.source = source
        self.info_types = {"is_success": bool, "question_type": int, "answer": int}
        if source is None:
            self.vocabulary, length = VOCABULARY, filler + questions.LENGTH
            self.answers: tuple[str, ...] = questions.ANSWERS
            self.types: tuple[str, ...] = questions.TYPES
            self.scenes = scene.empty(num_envs)
            self.questions = questions.empty(num_envs)
            self.atlas = render.atlas(self.image_size, self.level.grid, self.level.rotation)
        else:
            check_with_source(pool_size, difficulty)
            if filler:
                raise ValueError(f"filler must be 0 with a source, got {filler}")
            _check_source(source, ("questions", "score", "prepare", "select", "pictures"))
            source.prepare(self.image_size)
            self.vocabulary, length = source.vocabulary, source.question_length
            self.answers, self.types = source.answers, source.types
            self.pool = source.select(self.split)
            self.item = np.zeros(num_envs, np.int64)
        self.observation_space = spaces.Dict(
            {
                "image": modalities.image(self.image_size),
                "question": modalities.text(len(self.vocabulary), length),
            }
        )
        self.action_space = spaces.Discrete(len(self.answers))
        self.chosen = np.full(num_envs, -1, np.int64)
        self.scores = np.zeros(num_envs)
        self.ended = np.zeros(num_envs, np.bool_)

    def sample(self, rows: Rows) -> None:
        self.ended[rows] = False
        self.chosen[rows] = -1
        self.scores[rows] = 0.0
        if self.pool is None:
            questions.ask_rows(self.scenes, self.questions, rows, self.streams, self.level, self.split_id)
            fill_rows(self.filler, rows, self.streams)
        else:
            random.choose_rows(self.streams, rows, self.pool, self.item)

    def observe(self, rows: Rows, out: dict[str, npt.NDArray[Any]]) -> None:
        if "image" in out:
            if self.source is None:
                render.render_rows(self.scenes, rows, self.atlas, self.level.noise, out["image"])
            else:
                self.source.pictures(self.item[rows], self.image_size, out["image"], rows)
        if "question" in out:
            if self.source is None:
                write_rows(self.filler, self.questions.words, rows, out["question"])
            else:
                out["question"][rows] = self.source.questions[self.item[rows]]

    def step(
        self, rows: Rows, actions: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        if self.source is None:
            rewards = (actions == self.questions.answer[rows]).astype(np.float64)
        else:
            rewards = self.source.score(self.item[rows], actions)
        self.ended[rows] = True
        self.chosen[rows] = actions
        self.scores[rows] = rewards
        return rewards, np.ones(rows.size, np.bool_)

    def info(self, rows: Rows) -> dict[str, npt.NDArray[Any]]:
        kinds = self.questions.type[rows] if self.source is None else self.source.type_ids[self.item[rows]]
        return {
            "is_success": self.scores[rows] >= 0.5,
            "question_type": kinds,
            "answer": np.where(self.ended[rows], self.oracle(rows), -1),
        }

    def oracle(self, rows: Rows) -> npt.NDArray[np.int64]:
        if self.source is None:
            return self.questions.answer[rows].copy()
        # A question none of whose answers is in the vocabulary is lost whatever is said.
        return np.maximum(self.source.references[self.item[rows]], 0)

    def describe(self, row: int) -> dict[str, Any]:
        if self.source is None:
            kind = self.types[self.questions.type[row]]
            question = self.vocabulary.decode([*self.filler[row], *self.questions.words[row]])
            answer = self.answers[self.questions.answer[row]]
        else:
            kind = self.types[self.source.type_ids[self.item[row]]]
            text = self.source.text(int(self.item[row]))
            question, answer = text["question"], text["answer"]
        described: dict[str, Any] = {"question": question, "type": kind, "options": self.answers}
        if self.ended[row]:
            described |= {"answer": answer, "given": self.answers[self.chosen[row]]}
        return described

    def render(self, row: int) -> npt.NDArray[np.uint8]:
        from mmenvs.media import panel

        image = np.zeros((self.num_envs, self.image_size, self.image_size, 3), np.uint8)
        self.observe(np.array([row]), {"image": image})
        described = self.describe(row)
        lines = [(described["question"], "black")]
        if self.ended[row]:
            right = self.scores[row] >= 0.5
            lines.append((f"agent: {described['given']}", "green" if right else "red"))
            lines.append((f"answer: {described['answer']}", "grey"))
        return panel([image[row]], lines)


def _check_source(source: Any, needed: tuple[str, ...]) -> None:
    missing = [name for name in needed if not hasattr(source, name)]
    if missing:
        raise TypeError(
            f"source must be None or a reader such as mmenvs.datasets.VQAv2, got {source!r} without {missing}"
        )
