"""What a transformer policy looks at when it decides."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmenvs.embeddings.watch import grid_of
from mmenvs.gaze import Gaze

if TYPE_CHECKING:
    from .agent import TransformerAgent
    from .model import TransformerPolicy


class Watched:
    """An agent's ``predict`` for one environment, and in ``gaze`` what it looked at when it was last asked.

    Attributes:
        gaze: the attention to the cells of the picture from the token on which the heads stand, the mean over heads
            and layers, brought to 1 at its highest; with a fusion by weighted_sum or gated beside the transformer
            also its weights. A backbone's attention is not seen, and tokens that are no grid of cells have no heat.
    """

    def __init__(self, agent: TransformerAgent) -> None:
        self.agent, self.gaze = agent, Gaze()
        self._masks: dict[str, Tensor] = {}
        self._weights: dict[str, float] | None = None

    def predict(self, observation: Mapping[str, Any], **arguments: Any) -> Any:
        """As the agent's own, of one observation without a batch axis."""
        policy = self.agent.policy
        with ExitStack() as stack:
            record = stack.enter_context(policy.recording())
            fused: list[tuple[Any, Any]] = [
                (fusion, stack.enter_context(fusion.recording()))  # type: ignore[operator]
                for fusion in policy.fusions.values()
            ]
            answer = self.agent.predict(observation, **arguments)
            # What is fixed is read, and fused, where an episode begins.
            self._masks |= record["masks"]
            for fusion, seen in fused:
                if "weights" in seen:
                    self._weights = dict(zip(fusion.lengths, seen["weights"][0].tolist(), strict=True))
        self.gaze = gaze_of(
            policy, record["attention"], self._masks, observation, self._weights, self.agent.settings.fusion
        )  # fmt: skip
        return answer


def gaze_of(
    policy: TransformerPolicy,
    attention: list[Tensor],
    masks: Mapping[str, Tensor],
    observation: Mapping[str, Any],
    weights: Mapping[str, float] | None,
    fusion: str,
) -> Gaze:
    """The gaze of one row.

    Args:
        policy: whose attention it is.
        attention: as :meth:`TransformerPolicy.recording` tells, ``(1, K)`` for each layer.
        masks: of all observations the policy reads, ``{name: (1, T) bool}``.
        observation: of the row, as the environment gave it.
        weights, fusion: of the fusion beside the transformer, or None, and its name.
    """
    heat, captions = None, []
    for name, modality in policy.extractor.modalities.items():
        if modality not in ("image", "images") or not attention:
            continue
        cells = masks[name].shape[1]
        grid = grid_of(cells, observation[name].shape)
        if grid is None or not masks[name].all():
            continue
        if name in policy.fixed:
            before = policy.fixed[: policy.fixed.index(name)]
            begin = sum(int(masks[other].sum()) for other in before)
        else:
            # The last token of a step is the action before it.
            after = policy.changing[policy.changing.index(name) :]
            begin = attention[0].shape[1] - 1 - sum(masks[other].shape[1] for other in after)
        mean = torch.stack([layer[0, begin : begin + cells].cpu() for layer in attention]).mean(0)  # (cells,)
        heat = (mean / mean.max().clamp(min=1e-12)).view(grid).numpy()
        captions.append(
            f"Where the policy looks in the {name} when it decides (mean of {len(attention)} layers): the "
            f"brightest cell has {mean.max():.2f} of the attention."
        )
        break
    if weights is not None:
        captions.append(f"How much each modality weighs ({fusion}).")
    return Gaze(heat, weights, " ".join(captions))
