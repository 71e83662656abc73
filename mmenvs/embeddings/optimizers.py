"""Muon, the optimiser of the recipes: steps of equal size in every direction of a weight matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Of the polynomial whose iteration brings singular values close to 1 (Jordan et al. 2024).
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5


def orthogonalised(matrix: Tensor) -> Tensor:
    """``(m, n)`` with its singular values brought to about 1, by Newton-Schulz iterations."""
    x = matrix / (matrix.norm() + 1e-7)
    wide = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(_ITERATIONS):
        square = wide @ wide.T
        wide = _A * wide + (_B * square + _C * square @ square) @ wide
    return wide.T if x.shape[0] > x.shape[1] else wide


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks").

    Weights of linear layers and convolutions, the latter as matrices with a row for each output, take a
    step along the orthogonalised momentum; everything else (biases, norms, embeddings, ``heads``, and layers
    with one output, which noise would move as far as a gradient) takes Adam's (Kingma and Ba 2015).
    ``torch.optim.Muon`` does the same but refuses convolutions.

    Args:
        module: whose parameters are trained; frozen ones are left out.
        heads: modules within it whose weights take Adam's step, such as those that give logits and values.
        lr: step of Adam; those of Muon are ``ratio`` times as large.
        ratio: see ``lr``.
        momentum: of Muon, with Nesterov's look-ahead.
        betas, eps: of Adam.
        pretrained: a module within it that has learned already: all its weights take Adam's step, ``scale`` times as large.
    """

    def __init__(
        self,
        module: nn.Module,
        heads: Iterable[nn.Module] = (),
        lr: float = 1e-3,
        ratio: float = 20.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        pretrained: nn.Module | None = None,
        scale: float = 1.0,
    ) -> None:
        plain = {id(parameter) for head in heads for parameter in head.parameters()}
        hidden = {
            id(part.weight)
            for part in module.modules()
            if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and len(part.weight) > 1
        }
        slow = set() if pretrained is None else {id(parameter) for parameter in pretrained.parameters()}
        trained = [p for p in module.parameters() if p.requires_grad and id(p) not in slow]
        matrices = [p for p in trained if id(p) in hidden - plain]
        others = [p for p in trained if id(p) not in hidden - plain]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "muon": True},
            {"params": others, "muon": False},
        ]
        if pretrained is not None:
            learned = [p for p in pretrained.parameters() if p.requires_grad]
            groups.append({"params": learned, "muon": False, "scale": scale})
        defaults = {"lr": lr, "ratio": ratio, "momentum": momentum, "betas": betas, "eps": eps}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change the parameters by their gradients; those without a gradient stay."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    (self._muon if group["muon"] else self._adam)(parameter, parameter.grad, group)

    def _muon(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(state["momentum"], group["momentum"]).flatten(1)
        rows, columns = ahead.shape
        size = group["lr"] * group["ratio"] * max(1.0, rows / columns) ** 0.5
        parameter.add_(orthogonalised(ahead).view_as(parameter), alpha=-size)

    def _adam(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter), steps=0)
        first, second = group["betas"]
        lr = group["lr"] * group.get("scale", 1.0)
        state["steps"] += 1
        state["mean"].lerp_(gradient, 1 - first)
        state["square"].lerp_(gradient.square(), 1 - second)
        deviation = (state["square"] / (1 - second ** state["steps"])).sqrt_().add_(group["eps"])
        parameter.addcdiv_(state["mean"], deviation, value=-lr / (1 - first ** state["steps"]))


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimiser as ``{"state.INDEX.NAME": tensor}``, for a safetensors file."""
    return {
        f"state.{index}.{name}": torch.as_tensor(value)
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def load_state_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimiser the state that :func:`state_tensors` took; other tensors are passed over.

    Raises:
        ValueError: if it is of other parameters.
    """
    document = optimizer.state_dict()
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        if key.startswith("state."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = int(value) if name == "steps" else value
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, found in state.items():
        shapes = {tuple(value.shape) for value in found.values() if isinstance(value, Tensor)}
        if number >= len(parameters) or shapes - {tuple(parameters[number].shape)}:
            raise ValueError(f"the optimiser's state {number} is of another parameter: {sorted(shapes)}")
    document["state"] = state
    optimizer.load_state_dict(document)
