"""COCO captions: photographs, each told by about five people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mmenvs.checks import integer_in
from mmenvs.datasets.images import ImageStore
from mmenvs.datasets.reader import PhotoReader, Records, most_frequent, official_files, words_of
from mmenvs.rewards import DocumentFrequencies, pack_references
from mmenvs.text import UNKNOWN, Vocabulary

MAX_WORDS = 200  # of one caption; the longest official one has fewer than 60
MAX_REFERENCE_IDS = 1 << 29  # 2 GB; the official training captions take a fifteenth


class CocoCaptions(PhotoReader):
    """Photographs and captions in the official files of COCO, for ``MMRL/Captioning-v0``.

    Captions are compared in lower case without punctuation; words and document frequencies are those of
    the training split. The references of a photograph are all of its captions with their end tokens.

    Args:
        annotations: ``captions_train2014.json`` or a file of the same form.
        images: folder of the photographs, such as ``train2014``, named as the annotations say.
        words: most frequent words that have their own id; others are ``<unk>``, also in the references.
        caption_length: most words of a caption that is written, its end token included. References may be
            longer.
        on_error: ``"raise"`` or ``"skip"`` for photographs that are missing or broken, see
            :class:`mmenvs.datasets.ImageStore`; what is wrong in the JSON file always raises.
        cache: folder of the decoded photographs, ``~/.cache/mmenvs`` if None.

    Attributes:
        vocabulary, caption_length, references, document_frequencies: as in
            :class:`mmenvs.datasets.CaptionSource`.
        splits: int64 ``(N,)``, 0 train, 1 val, 2 test.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: naming file and record, if the file isn't of the official form.

    References:
        Chen et al. 2015, "Microsoft COCO captions: data collection and evaluation server".
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        *,
        words: int = 10_000,
        caption_length: int = 20,
        on_error: str = "raise",
        cache: str | Path | None = None,
    ) -> None:
        # References are compared by n-grams of 16 bits a word.
        words = integer_in("words", words, 1, 65_000)
        self.caption_length = integer_in("caption_length", caption_length, 2, 1000)
        names, told = _read_captions(annotations)
        if not Path(images).is_dir():
            raise FileNotFoundError(f"images must be a folder of photographs, got {str(images)!r}")
        ids = np.array(sorted(names), np.int64)
        store = ImageStore((Path(images, names[i]) for i in ids.tolist()), on_error=on_error, cache=cache)
        super().__init__(store, ids, np.arange(len(ids)))
        captions = [told[i] for i in ids.tolist()]
        train = np.flatnonzero(self.splits == 0)
        if not train.size:
            raise ValueError(
                f"{annotations}: no photograph falls into the training split, there are {len(ids)}"
            )
        self.vocabulary = Vocabulary(
            most_frequent((word for i in train for caption in captions[i] for word in caption), words)
        )
        ids_of = {word: i for i, word in enumerate(self.vocabulary.words)}
        shape = len(ids), max(map(len, captions)), 1 + max(len(c) for group in captions for c in group)
        if np.prod(shape, dtype=np.float64) > MAX_REFERENCE_IDS:
            raise ValueError(
                f"{annotations}: {shape[0]} photographs x {shape[1]} captions x {shape[2]} words are more than "
                f"{MAX_REFERENCE_IDS:,}"
            )
        self.references = pack_references(
            [[[ids_of.get(word, UNKNOWN) for word in caption] for caption in group] for group in captions]
        )
        self.document_frequencies = DocumentFrequencies.from_references(self.references[train])

    @classmethod
    def from_root(cls, root: str | Path, part: str = "train2014", **options: Any) -> CocoCaptions:
        """Read the official files in one folder.

        Args:
            root: holds ``annotations/captions_{part}.json`` (or the file itself) and the folder of
                photographs ``{part}``.
            part: ``"train2014"`` or ``"val2014"``.
            **options: further arguments of the class.

        Raises:
            FileNotFoundError: that lists all that is missing.
        """
        name = f"captions_{part}.json"
        files = official_files(root, part, {"annotations": (f"annotations/{name}", name), "images": (part,)})
        return cls(files["annotations"], files["images"], **options)

    def text(self, index: int) -> dict[str, Any]:
        """The file ``image`` and the ``captions`` of a photograph, as the references have them."""
        captions = [self.vocabulary.decode(ids) for ids in self.references[index] if ids[0]]
        return {"image": self.path(index), "captions": tuple(captions)}


def _read_captions(path: str | Path) -> tuple[dict[int, str], dict[int, list[list[str]]]]:
    """File name and captions, as words, of each image id."""
    file = Records("annotations", path)
    names: dict[int, str] = {}
    for i, record in enumerate(file.rows("images")):
        at = f"images[{i}]"
        image_id, name = file.get(record, at, "id", int), file.get(record, at, "file_name", str)
        if image_id in names:
            raise file.error(at, f"'id' {image_id} has occurred before")
        # A name from a file must not lead out of the folder.
        if name in ("", ".", "..") or any(sign in name for sign in "/\\:\0"):
            raise file.error(at, f"'file_name' must be the name of a file in the folder, got {name!r}")
        names[image_id] = name
    told: dict[int, list[list[str]]] = {image_id: [] for image_id in names}
    for i, record in enumerate(file.rows("annotations")):
        at = f"annotations[{i}]"
        image_id = file.get(record, at, "image_id", int)
        if image_id not in told:
            raise file.error(at, f"'image_id' {image_id} isn't among the images")
        words = [
            word for word in words_of(file.get(record, at, "caption", str)) if word not in ("?", ".", ",")
        ]
        if len(words) > MAX_WORDS:
            raise file.error(at, f"'caption' must have at most {MAX_WORDS} words, got {len(words)}")
        told[image_id].append(words)
    silent = [image_id for image_id, captions in told.items() if not captions]
    if silent:
        raise ValueError(f"{path}: {len(silent)} images have no caption, the first has 'id' {silent[0]}")
    return names, told
