"""What a trained agent looks at while it acts, read from the records of its fusion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mmenvs.embeddings.extractor import Extractor, extractor_in
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
            the weights of the modalities. Empty otherwise, and for tokens that are no grid of cells.
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
    if "weights" in record:
        shares = record["weights"][0].tolist()
        return Gaze(weights=dict(zip(extractor.fusion.lengths, shares, strict=True)))
    if "attention" not in record:
        return Gaze()
    for name, modality in extractor.modalities.items():
        if modality in ("image", "images") and record["masks"][name][0].any():
            return Gaze(heat=_heat(extractor, record, name, observation[name].shape))
    return Gaze()


def _heat(
    extractor: Extractor, record: Mapping[str, Any], picture: str, shape: tuple[int, ...]
) -> npt.NDArray[np.float32] | None:
    """Attention to the cells of a picture ``(H, W, 3)`` or of K pictures ``(K, H, W, 3)`` as ``(K, h, w)``."""
    fusion: Any = extractor.fusion
    count, height, width = shape[-4] if len(shape) == 4 else 1, shape[-3], shape[-2]
    cells = fusion.lengths[picture] // count
    high = max(1, round(math.sqrt(cells * height / width)))
    if count * high * (cells // high) != fusion.lengths[picture]:
        return None
    asking = [name for name in fusion.others(picture) if record["masks"][name][0].any()] or [picture]
    total = torch.zeros(fusion.lengths[picture])
    for key, attention in record["attention"].items():
        name = key.rsplit("/", 1)[0]
        columns = fusion.columns(name)
        if name in asking and picture in columns:
            words = attention[0][record["masks"][name][0]]
            total += words[:, columns[picture]].mean(0).cpu()
    heat = total / total.max().clamp(min=1e-12)
    return heat.view(count, high, -1).numpy()
