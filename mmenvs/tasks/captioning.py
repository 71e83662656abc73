"""Captioning, one word a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from mmenvs import rewards
from mmenvs import spaces as modalities
from mmenvs.checks import check_flag, check_image_size
from mmenvs.tasks.base import Rows, Task, check_with_source
from mmenvs.text import END, PAD, START, UNKNOWN
from mmenvs.world import captions, random, render, scene
from mmenvs.world.words import VOCABULARY

if TYPE_CHECKING:
    from mmenvs.datasets import CaptionSource

Scores = dict[str, npt.NDArray[np.float64]]
Reward = str | Mapping[str, float] | Callable[[Scores], npt.NDArray[np.float64]]

REFERENCES = 5  # reference captions of a scene, as many as COCO has for a picture
_CORPUS = 2000  # scenes whose reference captions give the document frequencies
_PARTS = ("scene_f1", "cider", "bleu4", "rouge_l", "hallucination", "repetition", "length")
_SCENE_PARTS = ("scene_f1", "hallucination")  # those that need a scene


class Captioning(Task):
    """
    ## Description

    A picture is put into words, one word a step. Scenes of 1 to 10 objects come from the procedural world
    and are told in its closed vocabulary, for example "a large red striped circle left of a small blue
    solid star and a small white dotted ring". What was said is checked against the scene itself: nothing
    but the facts counts, so there are many right captions. With ``source`` the photographs and reference
    captions of a data set take the world's place.

    ## Observation Space

    | key | space | meaning |
    |---|---|---|
    | `image` | `Box(0, 255, (image_size, image_size, 3), uint8)` | the picture, RGB |
    | `caption` | `Box(0, V-1, (limit + 1,), int64)` | the start token and the words said so far, 0 is padding |

    The limit is 11, 19, 39 and 65 words at difficulty 0 to 3, which is room for every object with all its
    attributes, relations and the end token; a source sets its own.

    ## Action Space

    `Discrete(97)`: the next word, an id of `mmenvs.world.words.VOCABULARY`; 3 is the end token. Padding (0)
    is written as the unknown word. With a source: the ids of its vocabulary.

    ## Rewards

    0 until the caption ends, then its scene F1 in [0, 1]: the harmonic mean of the share of told facts that
    are right and the share of the scene's facts that were told. Facts are the attributes of the objects
    and the relations between them; a phrase tells of an object of its shape, each object counts once
    (`mmenvs.world.captions.score_rows`).
    Relations and, at difficulty 0 with its only texture, textures needn't be told, but have to be right.
    Words that captions don't use, as plurals and numbers, tell of nothing: they earn nothing, and a plural of what
    the scene lacks is no hallucination.

    `shaping=True` pays earlier what is earned earlier: each word also gets the change it makes in the scene F1 of
    the words so far, and the last one gives back their sum, so that the return stays the same
    (potential-based shaping). An object that is right pays as soon as its shape is named, one that is wrong costs.

    `reward=` chooses another reward out of these parts, which are also reported at the end:

    | part | range | meaning |
    |---|---|---|
    | `scene_f1` | 0 to 1 | as above; world only |
    | `cider` | 0 to 10 | CIDEr-D against reference captions; the end token counts as a word |
    | `bleu4` | 0 to 1 | BLEU-4 against the reference captions |
    | `rouge_l` | 0 to 1 | ROUGE-L against the reference captions |
    | `hallucination` | 0 to 1 | share of the objects told that the scene lacks; world only |
    | `repetition` | 0 to 1 | share of 4-grams that repeat an earlier one |
    | `length` | 0 to 1 | words said, without the end token, over the limit |

    The references of a scene are five true captions with all attributes: the canonical one, and four
    with the objects in other orders and some relations. Document frequencies come from 2,000 training
    scenes of the difficulty, or from the source.

    ## Starting State

    A scene of the split, drawn from the stream of (split, seed, episode), and no words.

    ## Episode End

    With the end token, or when the limit is reached.

    ## Information

    | key | type | meaning |
    |---|---|---|
    | `is_success` | bool | the scene F1 was 1; with a source: the caption was one of the references |
    | `reference` | int | objects in the scene, or index of the source's picture; -1 until the end |
    | `scene_f1`, `cider`, `bleu4`, `rouge_l`, `hallucination`, `repetition`, `length` | float | the parts, 0 until the end |

    ## Arguments

    * `split="train"`: `"train"`, `"val"`, `"test"` or `"compositional"`; disjoint by what stands where.
    * `difficulty=0`: 0 to 3; 0 with a source. The scenes of each level are in `mmenvs.world.scene.DIFFICULTIES`.
    * `image_size=64`: even, 32 to 512 pixels.
    * `reward=None`: None is `"scene_f1"`, or `"cider"` with a source. The name of a part, a dict of weights
      such as `{"scene_f1": 1.0, "hallucination": -0.5}`, or a function from the parts of m ended captions,
      `{name: float64 (m,)}`, to m rewards.
    * `source=None`: a reader such as `mmenvs.datasets.CocoCaptions`.
    * `shaping=False`: True pays each word for what it changes, see Rewards. Not with a source.
    * `pool_size=None`: None draws every scene anew; N draws from a finite pool of N scenes of the split, whose
      embeddings can be cached whole. `task.pool_index` says which one it is. Not with a source.
    * `text="ids"`: `"string"` gives the caption as a sentence.

    ## References

    Rennie et al. 2017, "Self-critical sequence training for image captioning"; Vedantam et al. 2015,
    "CIDEr"; Anderson et al. 2016, "SPICE: semantic propositional image caption evaluation", whose F-measure
    over facts the scene F1 takes over; Rohrbach et al. 2018, "Object hallucination in image captioning"; Ng, Harada
    and Russell 1999, "Policy invariance under reward transformations".

    ## Version History

    * v0: first version.
    """

    fixed = frozenset({"image"})
    history = frozenset({"caption"})

    def __init__(
        self,
        num_envs: int,
        *,
        split: str = "train",
        difficulty: int = 0,
        image_size: int = 64,
        reward: Reward | None = None,
        source: CaptionSource | None = None,
        shaping: bool = False,
        pool_size: int | None = None,
    ) -> None:
        super().__init__(num_envs, split=split, difficulty=difficulty, pool_size=pool_size)
        self.image_size = check_image_size(image_size)
        self.source = source
        self.shaping = check_flag("shaping", shaping)
        if shaping and source is not None:
            raise ValueError(
                "shaping must be False with a source, whose pictures have no scene to compare with"
            )
        if source is None:
            self.parts: tuple[str, ...] = _PARTS
            self.vocabulary, self.limit = VOCABULARY, captions.caption_limit(self.level)
            self.scenes = scene.empty(num_envs)
            self.atlas = render.atlas(self.image_size, self.level.grid, self.level.rotation)
        else:
            check_with_source(pool_size, difficulty)
            _check_source(source)
            source.prepare(self.image_size)
            self.parts = tuple(name for name in _PARTS if name not in _SCENE_PARTS)
            self.vocabulary, self.limit = source.vocabulary, source.caption_length
            self.pool = np.asarray(source.select(self.split), np.int64)
            self.item = np.zeros(num_envs, np.int64)
        self.reward = _check_reward(reward, self.parts, "scene_f1" if source is None else "cider")
        self.info_types = {"is_success": bool, "reference": int, **dict.fromkeys(self.parts, float)}
        self.observation_space = spaces.Dict(
            {
                "image": modalities.image(self.image_size),
                "caption": modalities.text(len(self.vocabulary), self.limit + 1),
            }
        )
        self.action_space = spaces.Discrete(len(self.vocabulary))
        self.captions = np.zeros((num_envs, self.limit + 1), np.int64)
        self.captions[:, 0] = START
        self.lengths = np.zeros(num_envs, np.int64)  # words said, the end token included
        self.scores: Scores = {name: np.zeros(num_envs) for name in self.parts}
        self.success = np.zeros(num_envs, np.bool_)
        self.ended = np.zeros(num_envs, np.bool_)
        self.earned = np.zeros(num_envs)  # what shaping has paid in the episode

    def sample(self, rows: Rows) -> None:
        self.ended[rows] = False
        self.success[rows] = False
        self.lengths[rows] = 0
        self.earned[rows] = 0.0
        self.captions[rows, 1:] = PAD
        for values in self.scores.values():
            values[rows] = 0.0
        if self.pool is None:
            scene.sample_rows(self.scenes, rows, self.streams, self.level, self.split_id)
        else:
            random.choose_rows(self.streams, rows, self.pool, self.item)

    def observe(self, rows: Rows, out: dict[str, npt.NDArray[Any]]) -> None:
        if "image" in out:
            if self.source is None:
                render.render_rows(self.scenes, rows, self.atlas, self.level.noise, out["image"])
            else:
                self.source.pictures(self.item[rows], self.image_size, out["image"], rows)
        if "caption" in out:
            out["caption"][rows] = self.captions[rows]

    def step(
        self, rows: Rows, actions: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        # A word of padding would hide the words after it.
        words = np.where(actions == PAD, UNKNOWN, actions)
        self.lengths[rows] += 1
        self.captions[rows, self.lengths[rows]] = words
        ended = (words == END) | (self.lengths[rows] == self.limit)
        self.ended[rows] = ended
        gains = np.zeros(rows.size)
        if ended.any():
            try:
                gains[ended] = self._score(rows[ended])
            except Exception:
                # A reward function of the user's failed: nothing has happened, so that the environment goes on.
                self.captions[rows, self.lengths[rows]] = PAD
                self.lengths[rows] -= 1
                self.ended[rows] = False
                raise
        if self.shaping:
            worth = np.where(ended, 0.0, self._scene_scores(rows)[:, captions.F1])
            gains += worth - self.earned[rows]
            self.earned[rows] = worth
        return gains, ended

    def _scene_scores(self, rows: Rows) -> npt.NDArray[np.float64]:
        """Scores of the words so far against the scenes, the columns of ``captions.score_rows``."""
        scored = np.empty((rows.size, 4))
        captions.score_rows(self.scenes, rows, self.captions[rows, 1:], self.level.textures, scored)
        return scored

    def _score(self, rows: Rows) -> npt.NDArray[np.float64]:
        """Fill in all parts of the finished captions of ``rows``; returns their rewards."""
        said = self.captions[rows, 1:]
        references = self._references(rows)
        cider = rewards.CiderD(self._document_frequencies())
        closed = said[np.arange(rows.size), self.lengths[rows] - 1] == END
        parts: Scores = {
            "cider": cider(said, references),
            "bleu4": rewards.bleu(said, references),
            "rouge_l": rewards.rouge_l(said, references),
            "repetition": rewards.repetition_rate(said),
            "length": (self.lengths[rows] - closed) / self.limit,
        }
        if self.source is None:
            scored = self._scene_scores(rows)
            parts |= {"scene_f1": scored[:, captions.F1], "hallucination": scored[:, captions.HALLUCINATION]}
            self.success[rows] = parts["scene_f1"] == 1.0
        else:
            width = max(said.shape[1], references.shape[2])
            same = _widen(said, width)[:, None] == _widen(references, width)
            self.success[rows] = same.all(-1).any(-1)
        for name in self.parts:
            self.scores[name][rows] = parts[name]
        if not callable(self.reward):
            return sum((weight * parts[name] for name, weight in self.reward.items()), np.zeros(rows.size))
        gains = np.asarray(self.reward({name: parts[name].copy() for name in self.parts}))
        if gains.shape != rows.shape or gains.dtype.kind not in "fiub" or not np.isfinite(gains).all():
            raise ValueError(
                f"reward must return {rows.size} finite numbers for {rows.size} captions, got {gains!r}"
            )
        return gains.astype(np.float64)

    def _references(self, rows: Rows) -> npt.NDArray[np.integer]:
        """Reference captions of ``rows``, with end tokens, ``(len(rows), R, L)``."""
        if self.source is not None:
            return self.source.references[self.item[rows]]
        told = np.empty((rows.size, REFERENCES, self.limit), np.int64)
        captions.paraphrase_rows(self.scenes, rows, self.level.textures, told)
        return told

    def _document_frequencies(self) -> rewards.DocumentFrequencies:
        if self.source is not None:
            return self.source.document_frequencies
        return document_frequencies(self.difficulty)

    def info(self, rows: Rows) -> dict[str, npt.NDArray[Any]]:
        told = self.scenes.count if self.source is None else self.item
        return {
            "is_success": self.success[rows],
            "reference": np.where(self.ended[rows], told[rows], -1),
            **{name: values[rows] for name, values in self.scores.items()},
        }

    def oracle(self, rows: Rows) -> npt.NDArray[np.int64]:
        """The next word of the canonical caption; the end token once something else has been said."""
        said, at = self.captions[rows, 1:], self.lengths[rows]
        best = _widen(self._canonical(rows), self.limit + 1)
        before = np.arange(self.limit) < at[:, None]
        on_track = ((said == best[:, : self.limit]) | ~before).all(1)
        following = best[np.arange(rows.size), at]
        return np.where(on_track & (following != PAD), following, END)

    def _canonical(self, rows: Rows) -> npt.NDArray[np.integer]:
        """The caption that the oracle says, with end token, ``(len(rows), L)``.

        With a source: the reference with the highest CIDEr-D against all references of the picture.
        """
        if self.source is None:
            told = np.empty((rows.size, self.limit), np.int64)
            captions.tell_rows(self.scenes, rows, self.level.textures, told)
            return told
        references = self._references(rows)
        cider = rewards.CiderD(self._document_frequencies())
        scores = [cider(references[:, r], references) for r in range(references.shape[1])]
        return references[np.arange(rows.size), np.argmax(scores, axis=0)]

    def describe(self, row: int) -> dict[str, Any]:
        described: dict[str, Any] = {"caption": self.vocabulary.decode(self.captions[row])}
        if self.ended[row]:
            best = self._canonical(np.array([row]))[0]
            described["reference"] = self.vocabulary.decode(best)
            if self.source is not None:
                described |= self.source.text(int(self.item[row]))
            described |= {name: float(values[row]) for name, values in self.scores.items()}
        return described

    def render(self, row: int) -> npt.NDArray[np.uint8]:
        from mmenvs.media import panel

        image = np.zeros((self.num_envs, self.image_size, self.image_size, 3), np.uint8)
        self.observe(np.array([row]), {"image": image})
        described = self.describe(row)
        if not self.ended[row]:
            return panel([image[row]], [(f"agent: {described['caption']} ...", "black")])
        shown = (
            ("scene_f1", "hallucination", "cider") if self.source is None else ("cider", "bleu4", "rouge_l")
        )
        lines = [
            (f"agent: {described['caption']}", "green" if self.success[row] else "red"),
            (f"for example: {described['reference']}", "grey"),
            (", ".join(f"{name} {described[name]:.2f}" for name in shown), "black"),
        ]
        return panel([image[row]], lines)


@lru_cache(maxsize=len(scene.DIFFICULTIES))
def document_frequencies(difficulty: int) -> rewards.DocumentFrequencies:
    """Document frequencies of the references of 2,000 training scenes of one difficulty."""
    level = scene.DIFFICULTIES[difficulty]
    rows = np.arange(_CORPUS)
    streams = np.zeros(_CORPUS, np.uint64)
    random.start(streams, rows, 0, np.zeros(_CORPUS, np.uint64), rows)
    scenes = scene.empty(_CORPUS)
    scene.sample_rows(scenes, rows, streams, level, 0)
    told = np.empty((_CORPUS, REFERENCES, captions.caption_limit(level)), np.int64)
    captions.paraphrase_rows(scenes, rows, level.textures, told)
    return rewards.DocumentFrequencies.from_references(told)


def _widen(ids: npt.NDArray[np.integer], width: int) -> npt.NDArray[np.integer]:
    """``ids`` with its last axis padded with 0 or cut to ``width``."""
    out = np.zeros((*ids.shape[:-1], width), ids.dtype)
    kept = min(width, ids.shape[-1])
    out[..., :kept] = ids[..., :kept]
    return out


def _check_source(source: Any) -> None:
    needed = (
        "vocabulary",
        "caption_length",
        "references",
        "document_frequencies",
        "prepare",
        "select",
        "pictures",
        "text",
    )
    missing = [name for name in needed if not hasattr(source, name)]
    if missing:
        raise TypeError(
            f"source must be None or a reader such as mmenvs.datasets.CocoCaptions, got {source!r} without {missing}"
        )


def _check_reward(
    reward: Reward | None, parts: tuple[str, ...], default: str
) -> dict[str, float] | Callable[[Scores], npt.NDArray[np.float64]]:
    """The reward as weights of the parts, or as the function it is."""
    if reward is None:
        return {default: 1.0}
    if callable(reward):
        return reward
    weights: Any = {reward: 1.0} if isinstance(reward, str) else reward
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"reward must be the name of a part, a dict of weights or a function, got {type(reward).__name__}"
        )
    unknown = [name for name in weights if name not in parts]
    if unknown or not weights:
        raise ValueError(
            f"reward must be made of {', '.join(map(repr, parts))}, got {reward!r}"
            + (" (the others need the world's scenes)" if set(unknown) & set(_SCENE_PARTS) else "")
        )
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not -1e6 <= weight <= 1e6:
            raise ValueError(f"reward[{name!r}] must be a number from -1e6 to 1e6, got {weight!r}")
    return {name: float(weight) for name, weight in weights.items()}
