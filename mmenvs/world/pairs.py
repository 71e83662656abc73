"""The same scenes seen, told and heard: what contrastive learning is fed with and what probes are asked about."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.vector.utils import create_empty_array
from numba import njit, uint64

from mmenvs import spaces as modalities
from mmenvs.checks import check_image_size, check_seconds, integer_in, one_of
from mmenvs.world import captions, random, render, scene, sound
from mmenvs.world.random import below, mix
from mmenvs.world.scene import DIFFICULTIES, SPLITS, Level, Scenes
from mmenvs.world.words import VOCABULARY


class PairedScenes:
    """Batches of fresh scenes in every modality at once.

    Scene k of a seed is drawn from the stream of (split, seed, k), so without twins it doesn't depend on ``num``.

    Args:
        num: scenes of a batch.
        difficulty: 0 to 3, see ``mmenvs.world.scene.DIFFICULTIES``.
        split: ``"train"``, ``"val"``, ``"test"`` or ``"compositional"``.
        image_size: even, 32 to 512 pixels.
        seconds: length of the sound, 0.5 to 2. Each object sounds for ``seconds / objects_max`` of the level.
        frames: 0, or how many frames a film of each scene has.
        twins: the second half of a batch are twins of the first, scene by scene: the same objects but for one
            attribute of one of them, standing elsewhere. They are the hard negatives of contrastive learning,
            without which two attributes tell most scenes apart and the others needn't be looked at.
        seed: non-negative.

    Attributes:
        drawn: scenes drawn so far, which is the number of the next one; set it to go on where a run stopped.
        level: the row of ``DIFFICULTIES``.
        scenes: the scenes of the last batch.
        observation_space: of one scene's ``image``, ``caption``, ``audio`` and, if ``frames``, ``film``.
    """

    def __init__(
        self,
        num: int,
        *,
        difficulty: int,
        split: str,
        image_size: int = 64,
        seconds: float = 1.0,
        frames: int = 0,
        twins: bool = False,
        seed: int = 0,
    ) -> None:
        self.num = integer_in("num", num, 1, 2**24)
        self.difficulty = integer_in("difficulty", difficulty, 0, len(DIFFICULTIES) - 1)
        self.split: str = one_of("split", split, SPLITS)
        self.image_size = check_image_size(image_size)
        self.seconds = check_seconds(seconds)
        self.frames = integer_in("frames", frames, 0, 256)
        self.twins = twins
        self.level = DIFFICULTIES[self.difficulty]
        self.drawn = 0
        self.scenes = scene.empty(self.num)
        self._seeds = np.full(self.num, integer_in("seed", seed, 0, 2**64 - 1), np.uint64)
        self._rows = np.arange(self.num)
        self._streams = np.zeros(self.num, np.uint64)
        self._atlas = render.atlas(self.image_size, self.level.grid, self.level.rotation)
        self._bank = sound.bank(self.seconds, self.level.objects_max)
        self._filmed = scene.empty(self.num * self.frames)
        parts: dict[str, spaces.Space[Any]] = {
            "image": modalities.image(self.image_size),
            "caption": modalities.text(len(VOCABULARY), captions.caption_limit(self.level)),
            "audio": modalities.audio(sound.samples_of(self.seconds)),
        }
        if self.frames:
            parts["film"] = modalities.images(self.frames, self.image_size)
        self.observation_space = spaces.Dict(parts)
        self._out: dict[str, npt.NDArray[Any]] = {
            **create_empty_array(self.observation_space, self.num),  # type: ignore[dict-item]
            "count": self.scenes.count,
            "attributes": self.scenes.attributes,
        }

    def next(self) -> dict[str, npt.NDArray[Any]]:
        """The next ``num`` scenes. Observations are the same arrays each time, written anew by each call.

        Returns:
            * ``image``: uint8 ``(num, H, W, 3)``.
            * ``caption``: int64 ``(num, L)``, the canonical caption, which tells every object with all that
              varies at the level, with the end token and padding behind it, without a start token.
            * ``audio``: float32 ``(num, T)`` in [-1, 1] at 16 kHz.
            * ``film``, if ``frames``: uint8 ``(num, frames, H, W, 3)``; in each frame the objects stand in
              their cells anew, with their own background, brightness and noise.
            * ``count``: int64 ``(num,)``, and ``attributes``: uint8 ``(num, MAX_OBJECTS, 4)``, as in
              :class:`mmenvs.world.scene.Scenes`; places behind ``count`` hold anything.
            * ``content``: uint64 ``(num,)``, equal where the same objects stand in the same cells.
            * ``objects``: uint64 ``(num,)``, equal where the same objects follow each other in reading
              order, which is all that a caption and a sound tell: two scenes with equal ``objects`` are
              told alike, so that neither is a wrong match of the other's caption.
        """
        out = self._out
        random.start(
            self._streams, self._rows, SPLITS.index(self.split), self._seeds, self.drawn + self._rows
        )
        self.drawn += self.num
        scene.sample_rows(self.scenes, self._rows, self._streams, self.level, SPLITS.index(self.split))
        if self.twins:
            _make_twins(self.scenes, self._streams, self.level, SPLITS.index(self.split))
        render.render_rows(self.scenes, self._rows, self._atlas, self.level.noise, out["image"])
        captions.tell_rows(self.scenes, self._rows, self.level.textures, out["caption"])
        sound.sound_rows(
            self.scenes, self._rows, self._bank, self.level.audio_noise, out["audio"], self._rows
        )
        out["content"], out["objects"] = keys_of(self.scenes)
        if self.frames:
            _wobble(self.scenes, self._filmed, self._streams, self.level, self.frames)
            frames = out["film"].reshape(-1, *out["film"].shape[2:])
            render.render_rows(self._filmed, np.arange(len(frames)), self._atlas, self.level.noise, frames)
        return dict(out)


@njit(cache=True, nogil=True)
def keys_of(scenes: Scenes) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Hashes of every scene's ``content`` and ``objects``, uint64 ``(n,)`` each: see :meth:`PairedScenes.next`."""
    content = np.empty(scenes.count.size, np.uint64)
    objects = np.empty(scenes.count.size, np.uint64)
    for i in range(scenes.count.size):
        content[i] = scene.content_key(scenes, i)
        h = uint64(scenes.count[i])
        for k in range(scenes.count[i]):
            packed = uint64(0)
            for a in range(4):
                packed = packed * uint64(16) + uint64(scenes.attributes[i, k, a])
            h = mix(h + packed)
        objects[i] = h
    return content, objects


@njit(cache=True, nogil=True)
def _make_twins(scenes: Scenes, streams, level: Level, split: int) -> None:
    """Make scene ``half + i`` a twin of scene i."""
    half = scenes.count.size // 2
    for i in range(half, 2 * half):
        scenes.count[i] = scenes.count[i - half]
        while True:
            scenes.attributes[i] = scenes.attributes[i - half]
            k = below(streams, i, scenes.count[i])
            a = below(streams, i, 4)
            values = scene.values_of(level, a)
            if values == 1:
                continue
            step = 1 + below(streams, i, values - 1)
            scenes.attributes[i, k, a] = (scenes.attributes[i, k, a] + step) % values
            # Layouts are many, so some belong to any split; a change of content alone might find none.
            scene.sample_layout(scenes, i, streams, i, level)
            if scene.in_split(scenes, i, split):
                break
        scene.finish(scenes, i, streams, i, level)


@njit(cache=True, nogil=True)
def _wobble(scenes: Scenes, film: Scenes, streams, level: Level, frames: int) -> None:
    """Frame f of scene i is scene ``i * frames + f`` of ``film``: its content, the rest drawn anew."""
    for i in range(scenes.count.size):
        for f in range(i * frames, (i + 1) * frames):
            film.count[f] = scenes.count[i]
            film.attributes[f] = scenes.attributes[i]
            film.cell[f] = scenes.cell[i]
            scene.finish(film, f, streams, i, level)
