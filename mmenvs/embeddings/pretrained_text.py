"""Pretrained text models: the environment's word ids become the model's subwords by a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gymnasium import spaces
from torch import Tensor, nn

from mmenvs.embeddings.pretrained import PretrainedEncoder
from mmenvs.embeddings.pretrained_files import loading
from mmenvs.text import END, PAD, SPECIAL, START, UNKNOWN, Vocabulary
from mmenvs.world.words import VOCABULARY

# A word to stand before another one: many tokenizers split a word in a sentence and at its start differently.
ANCHOR = "a"
LONGEST = 4096  # subwords, for models that name no limit
CHECKED = 8  # words of the sentences that the table is checked with

# How sentence encoders name their pooling in 1_Pooling/config.json; the rest they know we don't.
POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
}
LARGEST_POOLING = 65_536  # bytes

Context = tuple[Tensor, Tensor, int]  # mask, place of each subword's word, words of a row


class SubwordTable(nn.Module):
    """Rows of word ids to rows of a tokenizer's ids, with nothing decoded or tokenised on the way.

    The result is that of the tokenizer on ``vocabulary.decode(ids)``, truncated to what the model takes.
    Padding, start and end fall away; unknown words become the tokenizer's own unknown token, if it has one
    for nothing else.

    Args:
        tokenizer: of transformers.
        vocabulary: of the ids.
        longest: most subwords of a sentence.
        source: of the tokenizer, for errors.

    Shapes: ``(B, L)`` ids of any dtype to ``(B, N)`` subword ids, mask and place of each one's word (-1: none).
        N is the longest row's.

    Raises:
        ValueError: if the tokenizer splits a word differently beside others, so that no table can exist.
    """

    first: Tensor
    inner: Tensor

    def __init__(self, tokenizer: Any, vocabulary: Vocabulary, longest: int, source: str) -> None:
        super().__init__()
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        bare, full = _bare(tokenizer, [ANCHOR])[0], tokenizer(ANCHOR)["input_ids"]
        start = next(i for i in range(len(full) + 1) if full[i : i + len(bare)] == bare)
        self.prefix, self.suffix = tuple(full[:start]), tuple(full[start + len(bare) :])
        self.longest = longest
        words = [word if word not in SPECIAL else "" for word in vocabulary.words]
        beside = _bare(tokenizer, [f"{ANCHOR} {word}" for word in words])
        first, inner = _bare(tokenizer, words), [row[len(bare) :] for row in beside]
        for special in (PAD, UNKNOWN, START, END):
            first[special], inner[special] = [], []
        unknown = tokenizer.unk_token_id
        if unknown is not None and unknown not in (*self.prefix, *self.suffix, self.pad):
            first[UNKNOWN] = inner[UNKNOWN] = [unknown]
        size = max(1, *map(len, first), *map(len, inner))
        self.register_buffer("first", _rows(first, size), persistent=False)
        self.register_buffer("inner", _rows(inner, size), persistent=False)
        self._check(tokenizer, vocabulary, source)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ids = ids.long()
        told = self.inner[ids, 0] >= 0  # (B, L)
        opening = told & (told.cumsum(1) == 1)
        pieces = torch.where(opening.unsqueeze(2), self.first[ids], self.inner[ids]).flatten(1)  # (B, L * S)
        place = torch.arange(ids.shape[1], device=ids.device).repeat_interleave(self.first.shape[1])
        there = pieces >= 0
        column = there.cumsum(1) - 1 + len(self.prefix)
        there &= column < self.longest - len(self.suffix)
        end = there.sum(1, keepdim=True) + len(self.prefix)  # (B, 1)
        length = int(end.max()) + len(self.suffix)
        # The last column takes what isn't there and is cut off.
        column = torch.where(there, column, length)
        subwords = pieces.new_full((len(ids), length + 1), self.pad).scatter_(1, column, pieces)
        words = pieces.new_full((len(ids), length + 1), -1).scatter_(1, column, place.expand_as(pieces))
        for i, special in enumerate(self.prefix):
            subwords[:, i] = special
        for i, special in enumerate(self.suffix):
            subwords.scatter_(1, end + i, special)
        mask = torch.arange(length, device=ids.device) < end + len(self.suffix)
        return subwords[:, :length], mask, words[:, :length]

    def _check(self, tokenizer: Any, vocabulary: Vocabulary, source: str) -> None:
        """Every word once beside its neighbours on either side."""
        ids = np.arange(len(SPECIAL), len(vocabulary))
        for order in (ids, ids[::-1]):
            rows = np.zeros((-(-len(order) // CHECKED), CHECKED), np.int64)
            rows.flat[: len(order)] = order
            subwords, mask, _ = self(torch.from_numpy(rows))
            sentences = [vocabulary.decode(row) for row in rows]
            truth = tokenizer(sentences, truncation=True, max_length=self.longest)["input_ids"]
            for sentence, found, there, true in zip(sentences, subwords, mask, truth, strict=True):
                if found[there].tolist() != true:
                    raise ValueError(
                        f"the tokenizer of {source!r} doesn't split {sentence!r} word by word, "
                        "so the environment's word ids can't be turned into its own"
                    )


class SentenceEncoder(PretrainedEncoder):
    """A pretrained text model: BERT, MiniLM, MPNet and other sentence encoders, the text tower of CLIP.

    It pools as ``1_Pooling/config.json`` in its folder says; without that file by its own projection, or by the
    mean of its tokens. As tokens, the subwords of a word are averaged, and places without one hold
    the mean of all.

    Shapes: ``(B, L)`` word ids of any dtype, 0 is padding, to ``(B, 1, width)`` pooled or ``(B, L, width)``.
    """

    def setup(self, folder: Path, space: spaces.Box) -> Tensor:
        source = self.chosen.source
        vocabulary = self.chosen.vocabulary or VOCABULARY
        ids = int(np.max(space.high)) + 1
        if ids != len(vocabulary):
            raise ValueError(
                f"the text has {ids} word ids but the vocabulary {len(vocabulary)} words; give the text's own "
                "as vocabulary="
            )
        self.pooling = _pooling(folder, source)
        with loading(source, "tokenizer"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        self.table = SubwordTable(tokenizer, vocabulary, _longest(tokenizer, self.model), source)
        return torch.zeros(1, *space.shape, dtype=torch.int64)

    def inputs(self, x: Tensor) -> tuple[dict[str, Tensor], Context]:
        subwords, mask, words = self.table(x)
        return {"input_ids": subwords, "attention_mask": mask.long()}, (mask, words, x.shape[1])

    def pooled(self, output: Any, context: Context) -> Tensor:
        hidden, (mask, _, _) = output.last_hidden_state, context
        if self.pooling is None and getattr(output, "text_embeds", None) is not None:
            return output.text_embeds
        if self.pooling == "cls":
            return hidden[:, 0]
        if self.pooling == "max":
            return hidden.masked_fill(~mask.unsqueeze(2), -torch.inf).amax(1)
        return _mean(hidden, mask)

    def tokens(self, output: Any, context: Context) -> Tensor:
        hidden, (mask, words, length) = output.last_hidden_state, context  # (B, N, d), (B, N), (B, N)
        of_word = words.unsqueeze(1) == torch.arange(length, device=words.device).unsqueeze(1)  # (B, L, N)
        count = of_word.sum(2, keepdim=True)
        means = of_word.to(hidden.dtype) @ hidden / count.clamp(min=1)
        return torch.where(count > 0, means, _mean(hidden, mask).unsqueeze(1))


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(2).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def _bare(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _rows(ids: list[list[int]], size: int) -> Tensor:
    """Lists of different lengths as ``(V, size)``, filled up with -1."""
    return torch.tensor([[*row, *[-1] * (size - len(row))] for row in ids])


def _longest(tokenizer: Any, model: Any) -> int:
    """Most subwords, special ones included, that tokenizer and model take."""
    positions = getattr(model.config, "max_position_embeddings", LONGEST)
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from behind the number of their padding.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions -= module.padding_idx + 1
    return min(LONGEST, positions, tokenizer.model_max_length)


def _pooling(folder: Path, source: str) -> str | None:
    """``"cls"``, ``"mean"`` or ``"max"`` of a sentence encoder's folder, None if it says nothing."""
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return None
    if path.stat().st_size > LARGEST_POOLING:
        raise ValueError(f"1_Pooling/config.json of {source!r} has more than {LARGEST_POOLING} bytes")
    with loading(source, "pooling"):
        settings = json.loads(path.read_text())
        modes = [
            name for name, value in settings.items() if name.startswith("pooling_mode_") and value is True
        ]
        chosen = [POOLINGS.get(mode, mode) for mode in modes] or [settings["pooling_mode"]]
        if len(chosen) != 1 or chosen[0] not in POOLINGS.values():
            raise ValueError(
                f"1_Pooling/config.json must name one of {', '.join(POOLINGS.values())}, got {chosen}"
            )
    return chosen[0]
