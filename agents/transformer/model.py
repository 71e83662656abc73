"""The policy: a decoder-only multimodal transformer over an episode.

One episode is one sequence of tokens::

    [ fixed observations ] [ step 0 ] [ step 1 ] ... [ step T - 1 ]
            P tokens          S          S                S

The prefix holds the tokens of the observations that don't change within the episode; they look at each other in
both directions. Each step holds the tokens of what is new in it and, last, the token of the action before it (a
learned one at the start). This last token is where the step is read: the action head and the value head stand
on it. Observations that only repeat the actions so far have no tokens. So a question about a picture is a
prefix and one token, and a caption is the picture and one token a word.

Where several observations come together, a fusion also makes one vector of their tokens, as it does for the other
agents, and the heads read it added to the trunk's: a shallow path past the deep one, which learns from fewer
episodes (Cheng et al. 2016, "Wide and deep learning"). The fixed ones are fused once an episode, the changing ones
in each step.

Three calls, and all that an algorithm needs::

    described, values = policy(episodes)                                  # whole episodes in one pass, for updates
    cache = policy.cache(rows)
    described, values = policy.step(cache, observation, previous, starts)  # one step of every row, for rollouts

``described`` goes to ``policy.actor``: ``sample``, ``log_prob``, ``entropy``, ``to_env``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn

from mmenvs.checks import one_of
from mmenvs.embeddings.base import Fusion, Tokens
from mmenvs.embeddings.extractor import Extractor, Precision
from mmenvs.embeddings.fusion import FUSIONS
from mmenvs.embeddings.pretrained import Pretrained

from .actions import action_head
from .block import Block
from .config import ATTENTION, FUSION, Backbone, ModelConfig
from .episodes import NEVER, Cache, Episodes, Memory, as_slice
from .prepared import prepare

AT_ONCE = 2**17  # numbers in the tokens of a step that go through the layers together on a CPU


class NoFusion(Fusion):
    """The policy fuses what comes together by itself, so its extractor has nothing to."""

    def forward(self, tokens: Tokens, masks: Tokens) -> Tensor:
        raise TypeError("a transformer policy takes the tokens of its extractor, not its features")


class TransformerPolicy(nn.Module):
    """Actor and critic on one decoder-only transformer over an episode; the module's page tells how.

    Args:
        observation_space: flat ``Dict`` of ``Box``, of one environment, pictures channels last.
        action_space: ``Discrete``, ``MultiDiscrete`` or a ``Box`` with finite bounds, of one environment.
        config: size of the transformer.
        fixed: names of the observations that don't change within an episode.
        history: names of those that hold the actions so far and nothing else.
        encoders: as for :class:`mmenvs.embeddings.Extractor`.
        precision: ``"bfloat16"`` multiplies in half precision. Weights, attention on CPUs, distributions and
            values stay float32.
        backbone: a language model in the trunk's place; of ``config`` only ``token_width`` counts then.
        fusion: a name in ``FUSIONS``: how observations that come together are fused beside the trunk; or
            ``"attention"``, which leaves all to the trunk.

    Attributes:
        actor: the :class:`~mmenvs_agents.transformer.actions.ActionHead`.
        critic: the value head, a linear layer.
        fusions: ``"fixed"`` and ``"changing"``, where there are two such observations or more.
        width: of the trunk's tokens and hidden states.
        backbone: the :class:`~mmenvs_agents.transformer.backbone.BackboneTrunk`, or None with ``blocks`` and ``norm``.
        prefix_tokens, step_tokens: P and S of the module's page, with padding.

    Raises:
        ValueError, TypeError, FileNotFoundError, ImportError: spaces, names, encoders or a backbone that don't fit.
    """

    turns: Tensor
    _record: dict[str, Any] | None = None

    def __init__(
        self,
        observation_space: spaces.Dict,
        action_space: spaces.Space,
        config: ModelConfig,
        fixed: Iterable[str] = (),
        history: Iterable[str] = (),
        encoders: Mapping[str, str | Pretrained | nn.Module] | None = None,
        precision: Precision = "float32",
        backbone: Backbone | None = None,
        fusion: str = FUSION,
    ) -> None:
        super().__init__()
        if not isinstance(observation_space, spaces.Dict):
            raise TypeError(
                f"observation_space must be a Dict space, got {type(observation_space).__name__}; "
                "gymnasium.wrappers.TransformObservation makes one"
            )
        one_of("precision", precision, ("float32", "bfloat16"))
        one_of("fusion", fusion, (*FUSIONS, ATTENTION))
        self.config, self.precision = config, precision
        self.observation_space, self.action_space = observation_space, action_space
        for argument, names in (("fixed", fixed := tuple(fixed)), ("history", history := tuple(history))):
            for name in names:
                one_of(argument, name, tuple(observation_space))
        seen = {name: part for name, part in observation_space.items() if name not in history}
        if not seen:
            raise ValueError(f"history must leave an observation to look at, got {history!r}")
        self.fixed = tuple(name for name in seen if name in fixed)
        self.changing = tuple(name for name in seen if name not in fixed)
        self.extractor = Extractor(
            spaces.Dict(seen), encoders, NoFusion, width=config.token_width, precision=precision
        )
        lengths = self.extractor.fusion.lengths
        self.prefix_tokens = sum(lengths[name] for name in self.fixed)
        self.step_tokens = sum(lengths[name] for name in self.changing) + 1
        self.backbone, self.width = None, config.width
        if backbone is not None:
            from .backbone import BackboneTrunk  # transformers takes seconds to import

            self.backbone = BackboneTrunk(backbone)
            self.width = self.backbone.width
        # The bias of its layer tells an observation from the others.
        self.project = nn.ModuleDict({name: nn.Linear(config.token_width, self.width) for name in seen})
        self.actor = action_head(action_space, self.width)
        self.start = nn.Parameter(torch.randn(self.width))
        if backbone is None:
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
            self.norm = nn.RMSNorm(config.width)
        self.critic = nn.Linear(self.width, 1)
        nn.init.zeros_(self.critic.weight)
        nn.init.zeros_(self.critic.bias)
        size = config.width // config.heads
        # Last, so that the other weights are drawn as without them.
        self.fusions = nn.ModuleDict()
        for kind, names in (("fixed", self.fixed), ("changing", self.changing)):
            if fusion != ATTENTION and len(names) > 1:
                parts = {name: lengths[name] for name in names}
                self.fusions[kind] = FUSIONS[fusion](parts, config.token_width, self.width)
        turns = float(config.rope_base) ** (-torch.arange(0, size, 2) / size)
        self.register_buffer("turns", turns, persistent=False)
        # Unbound, so that a copy of the policy runs its own weights.
        self._whole: Callable[..., Tensor] = TransformerPolicy._trunk

    @property
    def device(self) -> torch.device:
        return self.start.device

    def in_float32(self) -> TransformerPolicy:
        """A policy on the same weights that multiplies in float32; this one isn't changed, whoever else uses it."""
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other.extractor = copy.copy(self.extractor)
        other.precision = other.extractor.precision = "float32"
        return other

    @contextmanager
    def recording(self) -> Iterator[dict[str, Any]]:
        """A dict with what a :meth:`step` of one row looks at:

        - ``"masks"``: ``{name: (1, T) bool}`` of the observations that were read; the fixed ones where an episode begins;
        - ``"attention"``: for each layer ``(1, K)``, where the token that the step is read from looks, the mean over
          the heads. The fixed observations come first, without their padding, and this step comes last. A backbone
          records none.
        """
        before, self._record = self._record, {"masks": {}, "attention": []}
        try:
            yield self._record
        finally:
            self._record = before

    def forward(self, episodes: Episodes, group: int = 1) -> tuple[Tensor, Tensor]:
        """Whole episodes in one pass, with gradients.

        Args:
            episodes: on the device of the policy.
            group: how many episodes, one after the other, have the same fixed observations: answers to one
                prompt. The prompt is read once for all of them, and the answers don't see each other.

        Returns:
            Distributions of the actions ``(B, T, K)`` and values ``(B, T)``, both float32; what lies past the
            lengths means nothing.
        """
        batch, time = episodes.valid.shape
        fixed = {name: x[::group] for name, x in episodes.fixed.items()}
        prefix, prefix_valid, fused = self._prefix(fixed, batch // group)  # (B / G, P, width)
        first = torch.zeros_like(episodes.valid)
        first[:, 0] = True
        previous = episodes.actions.roll(1, 1)
        # Padding may hold anything, also what is no action.
        previous = torch.where(episodes.valid.unsqueeze(-1) & ~first.unsqueeze(-1), previous, 0)
        steps, steps_valid, steps_fused = self._steps(episodes.steps, previous, first, episodes.valid)
        order = steps_valid.cumsum(1).unflatten(0, (-1, group))  # (B / G, G, T S)
        order = prefix_valid.sum(1)[:, None, None] + order
        positions = torch.cat([prefix_valid.cumsum(1), order.flatten(1)], 1).sub(1).clamp(min=0)
        x = torch.cat([prefix, steps.reshape(-1, group * steps.shape[1], steps.shape[2])], 1)
        valid = torch.cat([prefix_valid, steps_valid.reshape(-1, group * steps.shape[1])], 1)
        start = prefix.shape[1]
        place = torch.arange(x.shape[1], device=x.device)
        seen = place <= place[:, None].clamp(min=start - 1)  # (P + G T S, P + G T S)
        answer = (place - start).div(steps.shape[1], rounding_mode="floor")
        seen &= (place < start) | (answer == answer[:, None])
        read = slice(start + self.step_tokens - 1, None, self.step_tokens)
        hidden = self._whole(self, x, positions, valid[:, None] & seen, read).reshape(batch, time, -1)
        hidden = hidden + steps_fused + fused.repeat_interleave(group, 0).unsqueeze(1)
        return self.actor(hidden, episodes.masks), self._value(hidden)

    def compile_trunk(self) -> None:
        """``torch.compile`` the trunk for whole episodes, that is for updates; steps, which are many and small, stay eager."""
        self._whole = torch.compile(TransformerPolicy._trunk, dynamic=True)

    def cache(self, rows: int, steps: int = 1, rollout: bool = False) -> Cache:
        """An empty cache for ``rows`` episodes, with room for ``steps`` steps; it grows by itself beyond them.

        ``rollout`` casts the blocks' weights to half precision, where ``precision`` asks for it, and lays them out for the
        processor, once for all steps.
        """
        config = self.config
        slots = self.prefix_tokens + steps * self.step_tokens
        kept = (config.layers, config.kv_heads, config.width // config.heads)
        layers, heads, size = kept if self.backbone is None else self.backbone.kept
        shape = (layers, rows, heads, slots, size)
        half = self.device.type == "cuda" and self.precision == "bfloat16"
        keys = torch.zeros(shape, dtype=torch.bfloat16 if half else torch.float32, device=self.device)
        valid = torch.zeros((rows, slots), dtype=torch.bool, device=self.device)
        position = torch.zeros(rows, dtype=torch.int64, device=self.device)
        length = torch.zeros(rows, dtype=torch.int64)
        fused = torch.zeros((rows, self.width), device=self.device)
        values = torch.zeros_like(keys)
        ours = rollout and self.backbone is None
        prepared = prepare(self.blocks, self.device, self.precision) if ours else None
        return Cache(keys, values, valid, position, length, fused, prepared)

    @torch.no_grad()
    def step(
        self,
        cache: Cache,
        observation: Mapping[str, Tensor],
        previous: Tensor,
        starts: Tensor,
        masks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The next step of every row, without gradients. It equals the step in :meth:`forward`.

        Args:
            cache: of the steps before; it is changed.
            observation: ``{name: (B, ...)}`` as the environment gives it, on the device of the policy.
            previous: ``(B, A)`` raw actions of the step before; anything at the start of an episode.
            starts: ``(B,)`` bool on the CPU, True in rows where an episode begins; what they held is forgotten.
            masks: ``(B, K)`` bool action masks.

        Returns:
            Distributions ``(B, K)`` and values ``(B,)``, both float32.
        """
        hidden = torch.empty((cache.rows, self.width), device=self.device)
        for begins in (True, False):
            some = (starts == begins).nonzero().squeeze(1)
            if len(some):
                rows = as_slice(some)
                at = rows if isinstance(rows, slice) else rows.to(self.device)
                names = (*self.fixed, *self.changing) if begins else self.changing
                part = {name: observation[name][at] for name in names}
                hidden[at] = self._advance(cache, part, previous[at], rows, at, begins)
        return self.actor(hidden, masks), self._value(hidden)

    def _advance(
        self,
        cache: Cache,
        observation: Tokens,
        previous: Tensor,
        rows: Tensor | slice,
        at: Tensor | slice,
        begins: bool,
    ) -> Tensor:
        """The hidden states ``(b, width)`` of the next step in ``rows`` of the cache; ``at`` is the same on the device."""
        count, device = len(previous), self.device
        first = torch.full((count, 1), begins, device=device)
        changing = {name: observation[name].unsqueeze(1) for name in self.changing}
        previous = torch.zeros_like(previous) if begins else previous
        x, valid, fused = self._steps(changing, previous.unsqueeze(1), first, torch.ones_like(first))
        here = torch.arange(self.step_tokens, device=device)
        if begins:
            cache.length[rows], cache.position[at], cache.valid[at] = 0, 0, False
            prefix, prefix_valid, cache.fused[at] = self._prefix(observation, count)
            x, valid = torch.cat([prefix, x], 1), torch.cat([prefix_valid, valid], 1)
            slots = torch.cat([torch.arange(prefix.shape[1], device=device), self.prefix_tokens + here])[None]
            together, used = prefix.shape[1] == self.prefix_tokens, x.shape[1]
        else:
            length = cache.length[rows]
            together = bool((length == length[0]).all())
            length = length[:1] if together else length
            slots = (self.prefix_tokens + length * self.step_tokens).to(device)[:, None] + here  # (1 or b, Q)
            used = self.prefix_tokens + (int(length.max()) + 1) * self.step_tokens
            cache.reserve(used)
        if together:
            # Rows that are as far as each other, as most are, keep what is new in one place, which is faster.
            memory = Memory(cache, at, slice(used - x.shape[1], used), None if begins else used)
        else:
            every = torch.arange(cache.rows, device=device)
            memory = Memory(cache, every[at], slots.expand(count, -1), None if begins else used)
        memory.keep(valid)
        keys, keys_valid = slots, valid
        if not begins:
            keys, keys_valid = torch.arange(used, device=device)[None], cache.valid[at, :used]
        # A prefix sees all of itself, a step what is before it and itself.
        seen = keys[:, None] <= slots[:, :, None].clamp(min=self.prefix_tokens - 1)  # (1 or b, Q, K)
        positions = cache.position[at][:, None] + (valid.cumsum(1) - 1).clamp(min=0)
        read = slice(x.shape[1] - 1, None)
        allowed = keys_valid[:, None] & seen
        # What an operation gives to the next one stays in the caches of a CPU if it isn't too much.
        each = max(1, AT_ONCE // (x.shape[1] * self.width)) if device.type == "cpu" else count
        parts = [slice(i, min(i + each, count)) for i in range(0, count, each)]
        hidden = torch.cat([self._trunk(x[p], positions[p], allowed[p], read, memory.part(p)) for p in parts])
        cache.position[at] += valid.sum(1)
        cache.length[rows] += 1
        return (hidden + fused).squeeze(1) + cache.fused[at]

    def _trunk(
        self, x: Tensor, positions: Tensor, allowed: Tensor, read: slice, memory: Memory | None = None
    ) -> Tensor:
        """Tokens ``(B, Q, width)`` at ``positions`` ``(B, Q)`` to hidden states ``(B, R, width)`` float32 of those
        to ``read``. ``allowed`` ``(B, Q, K)`` bool tells which keys each token may see."""
        bias = torch.zeros(allowed.shape, device=x.device).masked_fill_(~allowed, NEVER).unsqueeze(1)
        angles = self._angles(positions)
        prepared = None if memory is None or self._record is not None else memory.cache.prepared
        # Packed blocks do their own casts.
        casts = self.precision == "bfloat16" and (prepared is None or not prepared.packed)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=casts):
            if self.backbone is not None:
                return self.backbone(x, positions, bias, read, memory).float()
            blocks: Iterable[Any] = self.blocks if prepared is None else prepared.now()
            more = {}
            if self._record is not None:
                more["record"] = self._record["attention"] = []
            for layer, block in enumerate(blocks):
                last = layer == len(self.blocks) - 1
                asked = read if last else slice(None)
                x = block(x, angles, bias[:, :, asked], asked, layer, memory, **more)
            return self.norm(x.float())

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, those of the first half negated, ``(B, Q, 1, width / heads)`` of ``(B, Q)``."""
        turned = positions[..., None, None] * self.turns  # (B, Q, 1, width / heads / 2)
        cos, sin = turned.cos(), turned.sin()
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)

    def _prefix(self, observation: Mapping[str, Tensor], rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens ``(B, P, width)`` of the fixed observations, their mask ``(B, P)``, and what they are fused to,
        ``(B, width)``. Columns that are padding in every row are left out, which changes nothing but the time it
        takes."""
        if not self.fixed:
            empty = torch.zeros((rows, 0, self.width), device=self.device)
            return empty, empty.new_zeros((rows, 0), dtype=torch.bool), empty.new_zeros((rows, self.width))
        tokens, valid, fused = self._tokens(observation, "fixed")
        kept = valid.any(0)
        return tokens[:, kept], valid[:, kept], fused

    def _steps(
        self, observation: Mapping[str, Tensor], previous: Tensor, first: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens ``(B, T S, width)`` of steps, their mask ``(B, T S)``, and what is fused, ``(B, T, width)``.

        Args:
            observation: ``{name: (B, T, ...)}`` of the changing observations.
            previous: ``(B, T, A)`` raw actions before the steps.
            first: ``(B, T)`` bool, True where an episode begins.
            valid: ``(B, T)`` bool, False at padding.
        """
        tokens = torch.where(first.unsqueeze(-1), self.start, self.actor.embed(previous)).unsqueeze(2)
        mask = valid.unsqueeze(2)  # (B, T, 1)
        fused = tokens.new_zeros((*first.shape, self.width))
        if self.changing:
            flat = {name: observation[name].flatten(0, 1) for name in self.changing}
            seen, seen_valid, seen_fused = self._tokens(flat, "changing")
            tokens = torch.cat([seen.unflatten(0, first.shape), tokens], 2)
            mask = torch.cat([seen_valid.unflatten(0, first.shape) & mask, mask], 2)
            fused = seen_fused.unflatten(0, first.shape)
        return tokens.flatten(1, 2), mask.flatten(1, 2), fused

    def _tokens(self, observation: Mapping[str, Tensor], kind: str) -> tuple[Tensor, Tensor, Tensor]:
        """The projected tokens of the ``"fixed"`` or ``"changing"`` observations, one after the other, their mask,
        and what they are fused to, ``(B, width)`` float32: zeros without a fusion."""
        names, others = (self.fixed, self.changing) if kind == "fixed" else (self.changing, self.fixed)
        tokens, masks = self.extractor.encode(observation, missing=others)
        if self._record is not None:
            self._record["masks"] |= {name: masks[name] for name in names}
        projected = [cast(nn.Linear, self.project[name])(tokens[name]) for name in names]
        x = torch.cat(projected, 1)
        fused = x.new_zeros((len(x), self.width))
        if kind in self.fusions:
            parts = [{name: part[name] for name in names} for part in (tokens, masks)]
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                fused = self.fusions[kind](*parts).float()
        return x, torch.cat([masks[name] for name in names], 1), fused

    def _value(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.float(), self.critic.weight, self.critic.bias).squeeze(-1)
