"""A causal language model of Hugging Face in the trunk's place: the policy's tokens in, hidden states out.

It reads the tokens of the observations and of the actions as it reads those of words: through ``inputs_embeds``, after
a normalisation that brings them to the size of its word embeddings, which are dropped. The mask is the policy's own (four
dimensions, added to the scores), so a prefix sees itself in both directions, padding is never seen, and positions
don't count it; windows of sliding attention are not kept to. What a rollout has read stands in the policy's
:class:`~mmenvs_agents.transformer.episodes.Cache`. Whether a model really does all this is tried out when it is loaded.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from mmenvs.embeddings.pretrained import add_lora
from mmenvs.embeddings.pretrained_files import (
    LOADING_ERRORS,
    check_folder,
    find_folder,
    load_weights,
    loading,
    read_config,
)

from .config import Backbone
from .episodes import NEVER, Cache, Memory

_FULL, _LORA = 0.02, 0.2  # learning rates of the weights and of the adapters, in those of the recipe


def load(chosen: Backbone) -> tuple[Any, Mapping[str, Any]]:
    """The decoder in float32 and its configuration; without ``chosen.config``, with the weights in ``chosen.source``.

    Raises:
        FileNotFoundError: if the model, or a file of it, is missing.
        ValueError: if it is no causal language model, or can't be loaded.
    """
    source = chosen.source
    if chosen.config is None:
        folder = find_folder(source, local_files_only=False)
        check_folder(folder, source, ())
        config = read_config(folder, source)
    else:
        with loading(source, "configuration"):
            config = transformers.AutoConfig.for_model(**chosen.config)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"backbone must be a causal language model, {source!r} is of the type {config.model_type!r}"
        )
    missing: set[str] = set()
    loader: Any = transformers.AutoModelForCausalLM
    if chosen.config is None:
        model, missing = load_weights(loader, folder, source)
    else:
        with loading(source, "weights"):
            model = loader.from_config(config, dtype=torch.float32)
    if missing:
        raise ValueError(f"the weights of {source!r} lack {len(missing)} tensors, such as {min(missing)!r}")
    written = json.loads(config.to_json_string(use_diff=False))
    return model.get_decoder(), {name: value for name, value in written.items() if name != "_name_or_path"}


class _Keys(transformers.Cache):
    """The cache as the model knows it; the keys and values are with the policy."""

    def __init__(self, memory: Memory) -> None:
        super().__init__(layers=[])
        self.memory = memory

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        dtype = self.memory.cache.keys.dtype
        # Both (b, kv_heads, Q, d), and K for Q as they come back.
        return self.memory(layer_idx, key_states.to(dtype), value_states.to(dtype))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # asked for by models that would otherwise count positions


class _Shapes(_Keys):
    """Keeps nothing, and knows what it would have to keep."""

    def __init__(self) -> None:
        transformers.Cache.__init__(self, layers=[])
        self.seen: list[tuple[Any, Any]] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        self.seen.append((key_states.shape, value_states.shape))
        return key_states, value_states


class BackboneTrunk(nn.Module):
    """The decoder of a causal language model between the policy's tokens and its heads.

    It runs in evaluation mode also when it trains: dropout would make the policy of an update another one than that of
    the rollout.

    Attributes:
        chosen: as given, with the configuration.
        width: of tokens and hidden states.
        kept: layers, heads and size of the keys and values of a token.
        scale: its learning rate in that of the rest: it has learned already.

    Raises:
        FileNotFoundError, ValueError: see :func:`load`; or if the model doesn't do with masks, positions and
            cached keys what a policy needs.
        ImportError: if peft is needed and missing.
    """

    def __init__(self, chosen: Backbone) -> None:
        super().__init__()
        model, config = load(chosen)
        self.chosen = replace(chosen, config=config)
        self.model: Any = model
        words = self.model.get_input_embeddings()
        self.width = words.embedding_dim
        self.enter = nn.RMSNorm(self.width)
        nn.init.constant_(self.enter.weight, float(words.weight.detach().square().mean().sqrt()))
        # Nothing asks for words, but some models look at where they would come from.
        self.model.set_input_embeddings(nn.Embedding(1, self.width))
        self.model.requires_grad_(not chosen.lora)
        self.model.get_input_embeddings().requires_grad_(False)
        if chosen.lora:
            add_lora(self.model, chosen.lora)
        self.scale = _LORA if chosen.lora else _FULL
        text = self.model.config.get_text_config()
        self.longest: int | None = getattr(text, "max_position_embeddings", None)
        # transformers 5.24 renamed it.
        named = "cache" in inspect.signature(self.model.forward).parameters
        self._cache_argument = "cache" if named else "past_key_values"
        self.train(self.training)
        try:
            self.kept = self._tried()
        except LOADING_ERRORS as error:
            raise ValueError(
                f"backbone {chosen.source!r} ({config['model_type']}) can't stand in a policy: {error}"
            ) from error

    def forward(
        self, x: Tensor, positions: Tensor, bias: Tensor, read: slice, memory: Memory | None = None
    ) -> Tensor:
        """Tokens ``(B, Q, width)`` at ``positions`` ``(B, Q)`` to hidden states ``(B, R, width)`` of those to ``read``.

        Args:
            x, positions: the tokens and where they stand.
            bias: added to the scores, ``(B, 1, Q, K)``.
            read: which tokens are asked for.
            memory: where keys and values are kept.

        Raises:
            ValueError: if the tokens are more than the model has positions for.
        """
        if self.longest is not None and bias.shape[3] > self.longest and int(positions.max()) >= self.longest:
            raise ValueError(
                f"backbone {self.chosen.source!r} reads {self.longest} tokens, an episode has {int(positions.max()) + 1}"
            )
        keys = None if memory is None else _Keys(memory)
        return self._run(x, positions, bias, keys)[:, read]

    def _run(self, x: Tensor, positions: Tensor, bias: Tensor, keys: _Keys | None) -> Tensor:
        output = self.model(
            inputs_embeds=self.enter(x),
            attention_mask=bias,
            position_ids=positions,
            use_cache=keys is not None,
            **{self._cache_argument: keys},
        )
        return output.last_hidden_state

    @torch.no_grad()
    def _tried(self) -> tuple[int, int, int]:
        """``kept``, once an episode of three tokens before and two after has gone as it should; a ``ValueError`` else."""
        x = torch.randn(1, 5, self.width, generator=torch.Generator().manual_seed(0))
        positions = torch.tensor([[0, 0, 1, 2, 3]])
        place = torch.arange(5)
        seen = place <= place[:, None].clamp(min=2)
        padded = seen & (place != 1)  # the second token is padding
        bias = torch.zeros(1, 1, 5, 5).masked_fill_(~padded, NEVER)
        shapes = _Shapes()
        try:
            whole = self._run(x, positions, bias, shapes)
        except IndexError:
            raise ValueError("its layers keep something else than keys and values") from None
        if whole.shape != x.shape:
            raise ValueError(f"its hidden states are {tuple(whole.shape)}, not {tuple(x.shape)}")
        if len({shape for pair in shapes.seen for shape in pair}) != 1:
            raise ValueError("its layers must all keep keys and values, and of one shape")
        (_, heads, _, size), _ = shapes.seen[0]

        def differs(one: Tensor, other: Tensor) -> bool:
            return float((one - other).abs().max()) > 1e-3 * float(whole.std())

        kept = [0, 2, 3, 4]
        alone = self._run(x[:, kept], positions[:, kept], bias[:, :, kept][..., kept], None)
        if differs(alone, whole[:, kept]):
            raise ValueError("padding changes what it reads")
        other = x.clone()
        other[:, 2] += 1
        if not differs(self._run(other, positions, bias, None)[:, 0], whole[:, 0]):
            raise ValueError("its prefix can't be seen in both directions")
        store = torch.zeros(len(shapes.seen), 1, heads, 5, size)
        cache = Cache(
            store, store.clone(), torch.ones(1, 5, dtype=torch.bool), positions, positions, torch.zeros(1, 0)
        )
        row = torch.zeros(1, dtype=torch.int64)
        start = Memory(cache, row, place[None, :4], 4)
        self._run(x[:, :4], positions[:, :4], bias[:, :, :4, :4], _Keys(start))
        end = Memory(cache, row, place[None, 4:], 5)
        if differs(self._run(x[:, 4:], positions[:, 4:], bias[:, :, 4:], _Keys(end)), whole[:, 4:]):
            raise ValueError("a token after those it has kept is not what it is after all of them")
        return len(shapes.seen), heads, size

    def train(self, mode: bool = True) -> BackboneTrunk:
        super().train(mode)
        self.model.eval()
        return self
