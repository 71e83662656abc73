"""What a trained agent looks at while it acts, read from the records of its fusion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from mmenvs.embeddings.extractor import Extractor, extractor_in
from mmenvs.embeddings.fusion import FUSIONS
from mmenvs.gaze import Gaze


class Watched:
    """An agent with ``predict``, and in ``gaze`` what it looked at when it was last asked.

    Args:
        agent: a Stable-Baselines3 model. Without an :class:`~mmenvs.embeddings.Extractor` in its policy there is
            nothing to see.

    Attributes:
        gaze: with cross_attention or transformer the attention from the words, the sound and all else that is
            no picture to the cells of the picture, or from the picture itself where there is nothing else: the
            mean over tokens, heads and layers, brought to 1 at its highest. With weighted_sum or gated
            the weights of the modalities. A caption tells which of them asks, in which rounds or layers, and how
            much of its attention the brightest cell has. Empty otherwise, and for tokens that are no grid of cells.
    """

    def __init__(self, agent: Any) -> None:
        self.agent, self.gaze = agent, Gaze()
        self.extractor = extractor_in(agent.policy)

    def predict(self, observation: Mapping[str, Any], **arguments: Any) -> Any:
        """As the agent's own, of one observation without a batch axis."""
        if self.extractor is None:
            return self.agent.predict(observation, **arguments)
        with self.extractor.fusion.recording() as record:
            answer = self.agent.predict(observation, **arguments)
        self.gaze = gaze_of(self.extractor, record, observation)
        return answer


def gaze_of(extractor: Extractor, record: Mapping[str, Any], observation: Mapping[str, Any]) -> Gaze:
    """What the first row of a record says.

    Args:
        extractor: whose fusion made the record.
        record: of ``extractor.fusion.recording()`` after a forward pass.
        observation: the first row as the environment gave it, pictures channels last.
    """
    fusion = extractor.fusion
    kind = next((name for name, each in FUSIONS.items() if type(fusion) is each), type(fusion).__name__)
    if "weights" in record:
        weights = dict(zip(fusion.lengths, record["weights"][0].tolist(), strict=True))
        return Gaze(weights=weights, caption=f"How much each modality weighs ({kind}).")
    if "attention" not in record:
        return Gaze()
    for name, modality in extractor.modalities.items():
        if modality in ("image", "images") and record["masks"][name][0].any():
            return _attention(extractor.fusion, record, name, observation[name].shape, kind)
    return Gaze()


def _attention(
    fusion: Any, record: Mapping[str, Any], picture: str, shape: tuple[int, ...], kind: str
) -> Gaze:
    """Attention to the cells of a picture ``(H, W, 3)`` or of K pictures ``(K, H, W, 3)``."""
    grid = grid_of(fusion.lengths[picture], shape)
    if grid is None:
        return Gaze()
    asking = [name for name in fusion.others(picture) if record["masks"][name][0].any()] or [picture]
    maps = []
    for key, attention in record["attention"].items():
        name = key.rsplit("/", 1)[0]
        columns = fusion.columns(name)
        if name in asking and picture in columns:
            words = attention[0][record["masks"][name][0]]
            maps.append(words[:, columns[picture]].mean(0).cpu())
    if not maps:
        return Gaze()
    mean = torch.stack(maps).mean(0)  # (count * cells,)
    times = len(maps) // len(asking)
    stage = "round" if kind == "cross_attention" else "layer"
    over = f"mean of {times} {stage}s" if times > 1 else f"one {stage}"
    who = " and ".join(f"the {name}" for name in asking)
    caption = (
        f"Where {who} look{'s' * (len(asking) == 1)} in the {picture} ({kind}, {over}): the brightest cell has "
        f"{mean.max():.2f} of the attention."
    )
    heat = mean / mean.max().clamp(min=1e-12)
    return Gaze(heat=heat.view(grid).numpy(), caption=caption)


def grid_of(tokens: int, shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Pictures, rows and columns that ``tokens`` of a picture ``(H, W, 3)`` or of K pictures ``(K, H, W, 3)`` stand
    for; None if they are no grid of cells."""
    count, height, width = shape[-4] if len(shape) == 4 else 1, shape[-3], shape[-2]
    cells = tokens // count
    high = max(1, round(math.sqrt(cells * height / width)))
    return (count, high, cells // high) if count * high * (cells // high) == tokens else None
