"""VQA v2: questions of people about photographs of COCO, each with the answers of ten people."""

from __future__ import annotations

import functools
import reprlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmenvs.checks import integer_in
from mmenvs.datasets.images import ImageStore
from mmenvs.datasets.reader import PhotoReader, Record, Records, most_frequent, official_files, words_of
from mmenvs.rewards import normalize_answer, soft_accuracy
from mmenvs.text import UNKNOWN, Vocabulary

PEOPLE = 10  # who answered each question


class VQAv2(PhotoReader):
    """Questions and answers in the official files of VQA v2, for ``MMRL/VQA-v0``.

    An action is one of the most frequent answers, its reward the official soft accuracy: min(n / 3, 1)
    where n people agree, averaged over the ten subsets of nine people, answers normalised. Answers and
    words are those of the training split; a question whose answers aren't among them can't be won. The
    type of a question is its official ``question_type``.

    Args:
        questions: ``v2_OpenEnded_mscoco_train2014_questions.json`` or a file of the same form.
        annotations: ``v2_mscoco_train2014_annotations.json``, or one that annotates the same questions.
        images: folder of the photographs, such as ``train2014``, named ``COCO_train2014_000000000009.jpg``
            (with the ``data_subtype`` of the questions) or ``000000000009.jpg``.
        answers: size of the answer vocabulary, the most frequent ``multiple_choice_answer`` s; all of them
            if they are fewer.
        words: most frequent words of the questions that have their own id; others are ``<unk>``.
        question_length: words of a question; longer ones are cut.
        on_error: ``"raise"`` or ``"skip"`` for photographs that are missing or broken, see
            :class:`mmenvs.datasets.ImageStore`; what is wrong in the JSON files always raises.
        cache: folder of the decoded photographs, ``~/.cache/mmenvs`` if None.

    Attributes:
        answers: what each action says.
        vocabulary, question_length, types, questions, type_ids, references: as in
            :class:`mmenvs.datasets.QuestionSource`.
        splits: int64 ``(N,)``, 0 train, 1 val, 2 test.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: naming file and record, if a file isn't of the official form or the two don't match.

    References:
        Goyal et al. 2017, "Making the V in VQA matter"; Antol et al. 2015, "VQA: Visual Question Answering".
    """

    def __init__(
        self,
        questions: str | Path,
        annotations: str | Path,
        images: str | Path,
        *,
        answers: int = 3000,
        words: int = 10_000,
        question_length: int = 24,
        on_error: str = "raise",
        cache: str | Path | None = None,
    ) -> None:
        answers = integer_in("answers", answers, 2, 10**6)
        words = integer_in("words", words, 1, 10**6)
        self.question_length = integer_in("question_length", question_length, 1, 1000)
        asked, subtype = _read_questions(questions)
        told = _read_annotations(annotations, asked, questions)
        image_ids = np.array([image_id for image_id, _ in asked.values()], np.int64)
        ids, photographs = np.unique(image_ids, return_inverse=True)
        store = ImageStore(_photographs(images, ids, subtype), on_error=on_error, cache=cache)
        super().__init__(store, ids, photographs)
        train = np.flatnonzero(self.splits == 0).tolist()
        if not train:
            raise ValueError(
                f"{questions}: no photograph falls into the training split, there are {len(ids)}"
            )

        normal = functools.cache(normalize_answer)
        self.told = tuple(choice for _, choice, _ in told)
        known = (normal(self.told[i]) for i in train)
        # Some answers, such as "the", are nothing once they are normalised.
        self.answers = tuple(most_frequent((answer for answer in known if answer), answers))
        if not self.answers:
            raise ValueError(f"{annotations}: no answer of the training split is left once normalised")
        number = {answer: i for i, answer in enumerate(self.answers)}
        self._given = np.array(
            [[number.get(normal(answer), -1) for answer in given] for *_, given in told], np.int32
        )
        self.references = _best(self._given)
        self._soft = soft_accuracy(np.arange(PEOPLE + 1), PEOPLE)

        self.texts = tuple(text for _, text in asked.values())
        split = [words_of(text) for text in self.texts]
        self.vocabulary = Vocabulary(most_frequent((word for i in train for word in split[i]), words))
        ids_of = {word: i for i, word in enumerate(self.vocabulary.words)}
        self.questions = np.zeros((len(split), self.question_length), np.int64)
        for row, sentence in zip(self.questions, split, strict=True):
            told_ids = [ids_of.get(word, UNKNOWN) for word in sentence[: self.question_length]]
            row[: len(told_ids)] = told_ids
        types, self.type_ids = np.unique([kind for kind, *_ in told], return_inverse=True)
        self.types: tuple[str, ...] = tuple(types.tolist())

    @classmethod
    def from_root(cls, root: str | Path, part: str = "train2014", **options: Any) -> VQAv2:
        """Read the official files in one folder.

        Args:
            root: holds ``v2_OpenEnded_mscoco_{part}_questions.json``, ``v2_mscoco_{part}_annotations.json``
                and the folder of photographs ``{part}``.
            part: ``"train2014"`` or ``"val2014"``.
            **options: further arguments of the class.

        Raises:
            FileNotFoundError: that lists all that is missing.
        """
        files = official_files(
            root,
            part,
            {
                "questions": (f"v2_OpenEnded_mscoco_{part}_questions.json",),
                "annotations": (f"v2_mscoco_{part}_annotations.json",),
                "images": (part,),
            },
        )
        return cls(files["questions"], files["annotations"], files["images"], **options)

    def score(
        self, indices: npt.NDArray[np.int64], actions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """The official soft accuracy of each action for its question, float64 ``(m,)`` in [0, 1]."""
        return self._soft[(self._given[indices] == actions[:, None]).sum(1)]

    def text(self, index: int) -> dict[str, Any]:
        """``question``, the most common ``answer`` and the file ``image`` of a question."""
        return {"question": self.texts[index], "answer": self.told[index], "image": self.path(index)}


def _read_questions(path: str | Path) -> tuple[dict[int, tuple[int, str]], str | None]:
    """Question id -> (image id, question), and the ``data_subtype`` if there is one."""
    file = Records("questions", path)
    subtype = (
        file.get(file.content, "the file", "data_subtype", str) if "data_subtype" in file.content else None
    )
    if subtype is not None and not subtype.isalnum():
        raise file.error("the file", f"'data_subtype' must be letters and digits, got {subtype!r}")
    asked: dict[int, tuple[int, str]] = {}
    for i, record in enumerate(file.rows("questions")):
        at = f"questions[{i}]"
        question_id = file.get(record, at, "question_id", int)
        if question_id in asked:
            raise file.error(at, f"'question_id' {question_id} has occurred before")
        text = file.get(record, at, "question", str)
        asked[question_id] = file.get(record, at, "image_id", int), text
    return asked, subtype


def _read_annotations(
    path: str | Path, asked: dict[int, tuple[int, str]], questions: str | Path
) -> list[tuple[str, str, list[str]]]:
    """(question type, most common answer, answers) of each question, in the order of ``asked``."""
    file = Records("annotations", path)
    told: dict[int, tuple[str, str, list[str]]] = {}
    for i, record in enumerate(file.rows("annotations")):
        at = f"annotations[{i}]"
        question_id = file.get(record, at, "question_id", int)
        if question_id not in asked:
            raise file.error(at, f"'question_id' {question_id} isn't in {questions}")
        if question_id in told:
            raise file.error(at, f"'question_id' {question_id} has occurred before")
        image_id = file.get(record, at, "image_id", int)
        if image_id != asked[question_id][0]:
            raise file.error(
                at, f"'image_id' must be {asked[question_id][0]} as in {questions}, got {image_id}"
            )
        kind = file.get(record, at, "question_type", str)
        choice = file.get(record, at, "multiple_choice_answer", str)
        told[question_id] = kind, choice, _answers(file, record, at)
    missing = [question_id for question_id in asked if question_id not in told]
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} questions of {questions} aren't annotated, the first is {missing[0]}"
        )
    return [told[question_id] for question_id in asked]


def _answers(file: Records, record: Record, at: str) -> list[str]:
    rows = file.get(record, at, "answers", list)
    if len(rows) != PEOPLE:
        raise file.error(at, f"'answers' must hold {PEOPLE} answers, got {len(rows)}")
    answers: list[str] = []
    for i, row in enumerate(rows):
        answer = row.get("answer") if type(row) is dict else None
        if type(answer) is not str:
            raise file.error(
                f"{at}: answers[{i}]", f"must be an object with a string 'answer', got {reprlib.repr(row)}"
            )
        answers.append(answer)
    return answers


def _photographs(images: str | Path, ids: npt.NDArray[np.int64], subtype: str | None) -> list[Path]:
    """The file of each photograph: the name with the subtype, or else the plain one."""
    folder = Path(images)
    if not folder.is_dir():
        raise FileNotFoundError(f"images must be a folder of photographs, got {str(images)!r}")
    plain = [folder / f"{i:012d}.jpg" for i in ids.tolist()]
    if subtype is None:
        return plain
    named = [folder / f"COCO_{subtype}_{path.name}" for path in plain]
    # A photograph that is missing is told by the official name.
    return [
        name if name.exists() or not path.exists() else path for name, path in zip(named, plain, strict=True)
    ]


def _best(given: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """The answer that most people gave, (N,); the more frequent in the data on a tie, -1 if there is none."""
    best = np.full(len(given), -1, np.int64)
    most = np.zeros(len(given), np.int64)
    for column in range(given.shape[1]):
        answer = given[:, column].astype(np.int64)
        agreeing = np.where(answer < 0, 0, (given == given[:, column : column + 1]).sum(1))
        better = (agreeing > most) | ((agreeing == most) & (agreeing > 0) & (answer < best))
        best[better], most[better] = answer[better], agreeing[better]
    return best
