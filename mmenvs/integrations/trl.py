"""Vision-language models play here through TRL: rows of episodes, rewards of texts, tools for tasks of many steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from mmenvs.checks import integer_in
from mmenvs.env import load_and_check, seed_word
from mmenvs.registry import find_spec
from mmenvs.spaces import modality_of
from mmenvs.tasks.base import Task
from mmenvs.text import END, SPECIAL, UNKNOWN, Vocabulary, tokenize

# What may stand around an answer; signs that change a number, such as - and %, stay.
_AROUND = " .,;:!?\"'`*_()[]{}“”‘’…"
_SIGNS = ("?", ".", ",")  # words of the tokenizer that captions don't say
_LISTED = 100  # more options than these aren't written into a prompt
_ANSWER = "{question}\nAnswer with exactly one of: {options}."
_ANSWER_FREELY = "{question}\nAnswer with one word or a short phrase."
_CAPTION = (
    "Name every object in the picture with its size, colour, texture and shape, such as: a large red striped circle "
    "left of a small blue solid star. Use these words only: {options}."
)
_CAPTION_FREELY = "Describe the picture in one sentence."


@dataclass(frozen=True)
class Parsed:
    """What a text means to a task.

    Attributes:
        actions: its actions in their order, none if the text can't be read.
        unparsable: share of it that can't be read: 0 or 1 for an answer, a share of the words for a caption.
    """

    actions: tuple[int, ...]
    unparsable: float


class AnswerReader:
    """Reads one of a list of answers, and nothing else.

    The text must be exactly one of the answers once case, blanks and punctuation around it are folded away: "Red",
    " red. " and '"RED"' are "red", while "dark red", "it is red" and "red or blue" are nothing. Answers that are equal
    once folded can't be told apart, so neither is read.
    """

    nothing = -1  # no action: see mmenvs_agents.vlm.Unanswered

    def __init__(self, answers: Sequence[str]) -> None:
        self.answers = tuple(answers)
        folded = [fold(answer) for answer in answers]
        self.index = {text: i for i, text in enumerate(folded) if folded.count(text) == 1}

    def parse(self, text: str) -> Parsed:
        """The action of an answer."""
        found = self.index.get(fold(text))
        return Parsed((), 1.0) if found is None else Parsed((found,), 0.0)

    def text(self, actions: Sequence[int]) -> str:
        """The answer that an action is."""
        return self.answers[actions[0]]


class CaptionReader:
    """Reads a whole caption as its words and the end token.

    Case is folded and punctuation falls away. Words outside the vocabulary become the unknown word, which the
    environment scores as such. A text without any known word is nothing. What goes beyond the environment's limit
    isn't heard.
    """

    nothing = END

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def parse(self, text: str) -> Parsed:
        """The actions of a caption."""
        words = [word for word in tokenize(text) if word not in _SIGNS]
        # A model that writes "<end>" has written a word, not ended its caption.
        ids = [
            self.vocabulary.id(word) if word in self.vocabulary and word not in SPECIAL else UNKNOWN
            for word in words
        ]
        unknown = ids.count(UNKNOWN)
        if unknown == len(ids):
            return Parsed((), 1.0)
        return Parsed((*ids, END), unknown / len(ids))

    def text(self, actions: Sequence[int]) -> str:
        """The caption that actions say."""
        return self.vocabulary.decode(actions)


@dataclass(frozen=True)
class Scored:
    """Scores of n texts.

    Attributes:
        rewards: float64 ``(n,)``, the returns of their episodes; the lowest for what couldn't be read.
        successes: bool ``(n,)``.
        unparsable: float64 ``(n,)``, see :class:`Parsed`.
    """

    rewards: npt.NDArray[np.float64]
    successes: npt.NDArray[np.bool_]
    unparsable: npt.NDArray[np.float64]


class TextEpisodes:
    """Episodes of one environment as conversations about a picture, and the scores of what is said to them.

    An episode is named by its seed: it is the one of ``gym.make(id, **env_kwargs)`` after ``reset(seed=seed)``. So
    rows of a data set that hold a seed give every member of a group the same episode.

    Args:
        id: environment with one picture, whose answers are one of a list or a caption.
        env_kwargs: arguments of the environment, such as ``{"difficulty": 1}``.
        prompt: what is said to the model beside the picture; ``{question}`` and ``{options}`` (the answers, or the
            words of captions) are filled in. None is a prompt of the task's.
        lowest: reward of a text that can't be read; None is the environment's lowest score.

    Raises:
        ValueError: if the environment has sound, or no picture, or isn't played in words.
    """

    def __init__(
        self,
        id: str,
        env_kwargs: Mapping[str, Any] | None = None,
        *,
        prompt: str | None = None,
        lowest: float | None = None,
    ) -> None:
        self.id, self.spec = id, find_spec(id)
        self.env_kwargs = {**self.spec.kwargs, **(env_kwargs or {})}
        task = self._task(1)
        kinds = {key: modality_of(space) for key, space in task.observation_space.items()}
        if "audio" in kinds.values():
            raise ValueError(
                f"id={id!r} has sound, which vision-language models don't take; "
                "train an agent of 'mmenvs train' on it"
            )
        pictures = [key for key, kind in kinds.items() if kind == "image"]
        if len(pictures) != 1:
            raise ValueError(
                f"id={id!r} must have one picture for a vision-language model, it has {len(pictures)}"
            )
        self.picture = pictures[0]
        self.reader, self.texts = _reader(id, task, [key for key, kind in kinds.items() if kind == "text"])
        self.vocabulary = task.vocabulary
        self.longest: int = getattr(task, "limit", 1)
        self.prompt = _check_prompt(self.default_prompt if prompt is None else prompt)
        self.lowest = self.spec.min_score if lowest is None else float(lowest)

    @property
    def options(self) -> tuple[str, ...]:
        """The answers, or the words of captions."""
        if isinstance(self.reader, AnswerReader):
            return self.reader.answers
        return tuple(word for word in self.vocabulary.words if word not in (*SPECIAL, *_SIGNS))

    @property
    def default_prompt(self) -> str:
        """The prompt of the task; it lists the options if they are few."""
        few = len(self.options) <= _LISTED
        if isinstance(self.reader, AnswerReader):
            return _ANSWER if few else _ANSWER_FREELY
        return _CAPTION if few else _CAPTION_FREELY

    def observe(self, seeds: Sequence[int]) -> dict[str, npt.NDArray[Any]]:
        """The first observations of the episodes of ``seeds``, each ``(n, *shape)``."""
        task, rows = self._start(seeds)
        out = {
            key: np.zeros((rows.size, *(space.shape or ())), space.dtype)
            for key, space in task.observation_space.items()
        }
        task.observe(rows, out)
        return out

    def conversations(self, observations: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
        """What is said to the model for each of n observations, with a place for the picture.

        Args:
            observations: a batch as environments give it, texts as ids ``(n, L)`` or as n strings.
        """
        said = []
        for i in range(len(observations[self.picture])):
            texts = [observations[key][i] for key in self.texts]
            question = " ".join(
                text if isinstance(text, str) else self.vocabulary.decode(text) for text in texts
            )
            words = self.prompt.format(question=question, options=", ".join(self.options))
            said.append([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words}]}])
        return said

    def pictures(self, observations: Mapping[str, Any]) -> list[Image.Image]:
        """The pictures of n observations, RGB."""
        return [Image.fromarray(picture) for picture in np.asarray(observations[self.picture])]

    def dataset(self, seeds: Sequence[int], **texts: Sequence[str]) -> Any:
        """Rows with ``prompt`` (a conversation), ``image`` and ``seed``, made when they are read.

        Args:
            seeds: the episodes.
            **texts: further columns of what a model may say to each episode, such as ``completion=`` for SFT, or
                ``chosen=`` and ``rejected=`` for DPO; they are read as an assistant's turn.

        Returns:
            A ``datasets.Dataset``.
        """
        from datasets import Dataset

        def rows(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            observations = self.observe(batch["seed"])
            turns = {key: [[{"role": "assistant", "content": text}] for text in batch[key]] for key in texts}
            prompts, images = self.conversations(observations), self.pictures(observations)
            return {"prompt": prompts, "image": images, "seed": batch["seed"], **turns}

        columns = {key: list(column) for key, column in texts.items()}
        return Dataset.from_dict({"seed": [int(seed) for seed in seeds], **columns}).with_transform(rows)

    def score(self, seeds: Sequence[int], texts: Sequence[str]) -> Scored:
        """Play the episodes of ``seeds``, each with what was said to it, all of them in one batch."""
        if len(seeds) != len(texts):
            raise ValueError(f"texts must be as many as seeds, got {len(texts)} and {len(seeds)}")
        task, rows = self._start(seeds)
        parsed = [self.reader.parse(text) for text in texts]
        lengths = np.array([len(one.actions) for one in parsed], np.int64)
        rewards = np.where(lengths > 0, 0.0, self.lowest)
        playing, step = rows[lengths > 0], 0
        while playing.size:
            actions = np.array([parsed[i].actions[step] for i in playing], np.int64)
            gains, ended = task.step(playing, actions)
            rewards[playing] += gains
            step += 1
            playing = playing[~ended & (lengths[playing] > step)]
        successes = task.info(rows)["is_success"] & (lengths > 0)
        return Scored(rewards, successes, np.array([one.unparsable for one in parsed]))

    def reward(
        self, completions: Sequence[Any], seed: Sequence[int], log_metric: Any = None, **columns: Any
    ) -> list[float]:
        """A reward function of TRL: ``GRPOTrainer(model, episodes.reward, ...)``.

        The share of success and of what couldn't be read goes to the trainer's log as ``success`` and ``unparsable``.

        Args:
            completions: n texts or conversations.
            seed: the column of the data set, n seeds.
        """
        scored = self.score(seed, [_text_of(completion) for completion in completions])
        if log_metric is not None:
            log_metric("success", float(scored.successes.mean()))
            log_metric("unparsable", float(scored.unparsable.mean()))
        return scored.rewards.tolist()

    def oracle(self, seeds: Sequence[int]) -> list[str]:
        """The text that the oracle says to each episode."""
        task, playing = self._start(seeds)
        said: list[list[int]] = [[] for _ in seeds]
        while playing.size:
            actions = task.oracle(playing)
            for i, action in zip(playing.tolist(), actions.tolist(), strict=True):
                said[i].append(action)
            playing = playing[~task.step(playing, actions)[1]]
        return [self.reader.text(actions) for actions in said]

    def environment(self) -> CaptionTools:
        """A rollout of several turns: ``GRPOTrainer(model, environment_factory=episodes.environment, ...)``.

        Raises:
            ValueError: if the environment has one step.
        """
        if not isinstance(self.reader, CaptionReader):
            raise ValueError(f"id={self.id!r} has one step, without turns: use the reward function")
        return CaptionTools(self)

    def _task(self, rows: int) -> Task:
        return load_and_check(self.spec.task, rows, "ids", self.env_kwargs)

    def _start(self, seeds: Sequence[int]) -> tuple[Task, npt.NDArray[np.int64]]:
        words = [seed_word(integer_in("seed", seed, 0, 2**64 - 1)) for seed in seeds]
        task, rows = self._task(len(words)), np.arange(len(words))
        task.start(rows, np.array(words, np.uint64), np.zeros(rows.size, np.int64))
        return task, rows


class CaptionTools:
    """One caption that is said in several turns: TRL shows the public methods to the model as its tools."""

    def __init__(self, episodes: TextEpisodes) -> None:
        self._episodes = episodes
        self._seed: int | None = None
        self._words: list[str] = []
        self._finished = False

    def reset(self, *, seed: int, **row: Any) -> None:
        """Begin the episode of a row; its prompt and picture are the row's own."""
        self._seed, self._words, self._finished = seed, [], False

    def say(self, words: str) -> str:
        """Say the next words of the caption.

        Args:
            words: One or more words, with blanks between them.

        Returns:
            The caption so far.
        """
        self._check_open()
        self._words.append(words)
        return " ".join(self._words)

    def finish(self) -> str:
        """End the caption once every object has been named.

        Returns:
            The whole caption.
        """
        self._check_open()
        self._finished = True
        return " ".join(self._words)

    def get_reward(self) -> float:
        """The score of the finished caption; the lowest one if it wasn't finished."""
        if self._seed is None or not self._finished:
            return self._episodes.lowest
        return float(self._episodes.score([self._seed], [" ".join(self._words)]).rewards[0])

    def _check_open(self) -> None:
        if self._seed is None or self._finished:
            raise ValueError("the caption has ended or not begun: nothing can be said to it")


def fold(text: str) -> str:
    """``text`` in lower case, with single blanks, without punctuation around it."""
    return " ".join(text.casefold().split()).strip(_AROUND)


def _reader(id: str, task: Task, texts: list[str]) -> tuple[AnswerReader | CaptionReader, list[str]]:
    """How the texts of a task are read, and the observations that belong into its prompt."""
    answers = getattr(task, "answers", None)
    if answers is not None and len(answers) == task.action_space.n:
        return AnswerReader(answers), texts
    if "caption" in texts and hasattr(task, "limit"):
        return CaptionReader(task.vocabulary), [key for key in texts if key != "caption"]
    raise ValueError(
        f"id={id!r} isn't played in words: its task must have answers=, a name for each action, or an observation "
        "caption and limit=, its most words"
    )


def _check_prompt(prompt: str) -> str:
    try:
        prompt.format(question="", options="")
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"prompt must have no {{}} but {{question}} and {{options}}, got {prompt!r}"
        ) from error
    return prompt


def _text_of(completion: Any) -> str:
    """The text of a completion: a string, or the last turn of a conversation."""
    if not isinstance(completion, str):
        content = completion[-1]["content"]
        return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    return completion
