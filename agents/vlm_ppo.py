"""PPO on the tokens of a vision-language model, with a value head (Schulman et al. 2017; Ziegler et al. 2019).

A token is an action: a sampled answer is an episode, whose reward comes with its last token. Advantages, losses and
the descent over minibatches are those of ``transformer/ppo.py``.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributions import Categorical

from mmenvs.embeddings.optimizers import Muon

from .transformer.devices import ALONE
from .transformer.learning import descend, divergence
from .transformer.ppo import PPORecipe, gae, ppo_loss
from .vlm import VLMPolicy, VLMSettings

# A row for each answer, one answer a row, and none of them is kept.
_OWN = ("num_envs", "rollout_steps", "imitation", "memory_mb")


@dataclass(frozen=True)
class TokenPPO(PPORecipe):
    """Settings of PPO on tokens, with other defaults: the model has learned to look and to speak already.

    Attributes:
        learning_rate: of the value head, which is new; the model has that of :class:`~mmenvs_agents.vlm.VLMSettings`.
        kl: weight of the divergence from the frozen model before, of each token.
    """

    rollout_steps: int = 1
    minibatches: int = 4
    learning_rate: float = 1e-3
    max_grad_norm: float = 1.0
    value_coef: float = 0.1
    entropy: float = 0.0
    target_kl: float = 0.1
    imitation: float = 0.0
    kl: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.learning_rate:
            raise ValueError("learning_rate of the value head must be over 0, got 0")

    @classmethod
    def of(cls, settings: VLMSettings) -> TokenPPO:
        """The settings of a fine-tuning: its ``batch``, its ``kl`` and its ``arguments``.

        Raises:
            ValueError, TypeError: if ``arguments`` holds others, or values that aren't allowed.
        """
        allowed = [field.name for field in fields(cls) if field.name not in (*_OWN, "kl")]
        for name in settings.arguments:
            if name not in allowed:
                raise ValueError(f"arguments of ppo must be of {', '.join(allowed)}, got {name!r}")
        return cls(num_envs=settings.batch, kl=settings.kl or 0.0, **settings.arguments)


@dataclass(frozen=True)
class Answers:
    """B answers of a model, and what is known of their T tokens; all of it on the CPU.

    Attributes:
        conversations, pictures: what was answered.
        tokens: int64 ``(B, T)``.
        lengths: int64 ``(B,)``, tokens up to the end of the turn or the longest answer.
        log_probs, values, reference: float32 ``(B, T)``, of the model that answered, and log-probabilities of the
            frozen one; anything at padding.
        rewards: float32 ``(B, T)``, the environment's at the last token.
    """

    conversations: Sequence[Any]
    pictures: Sequence[Image.Image]
    tokens: Tensor
    lengths: Tensor
    log_probs: Tensor
    values: Tensor
    reference: Tensor
    rewards: Tensor

    @property
    def valid(self) -> Tensor:
        """bool ``(B, T)``, False at padding."""
        return torch.arange(self.tokens.shape[1]) < self.lengths[:, None]


class ActorCritic(nn.Module):
    """A vision-language model with a linear value head on its last hidden states.

    Dropout is off, so that an answer is as likely when it is learned from as when it was given.

    Args:
        player: the model, its processor and how it answers.
    """

    def __init__(self, player: VLMPolicy) -> None:
        super().__init__()
        self.player, self.model = player, player.model.eval()
        width = player.model.get_output_embeddings().weight.shape[1]
        self.value = nn.Linear(width, 1, device=player.model.device)
        for parameter in self.value.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self,
        conversations: Sequence[Any],
        pictures: Sequence[Image.Image],
        tokens: Tensor,
        valid: Tensor,
        model: Any = None,
    ) -> tuple[Categorical, Tensor]:
        """One pass over whole sequences, prompts and answers.

        Args:
            conversations, pictures: n of each.
            tokens, valid: ``(n, T)``, the answers, padded on the right.
            model: in place of its own.

        Returns:
            What each token was drawn from ``(n, T)``, as :meth:`VLMPolicy.sample` does it, and its value ``(n, T)``.
        """
        inputs = dict(self.player.inputs(conversations, pictures))
        prompt = inputs["input_ids"].shape
        said = tokens.to(inputs["input_ids"].device)
        for name, value in inputs.items():
            if value.shape == prompt:  # ids, mask and kinds of tokens; the others are pictures
                more = {"input_ids": said, "attention_mask": valid.to(value)}.get(
                    name, torch.zeros_like(said)
                )
                inputs[name] = torch.cat([value, more.to(value)], 1)  # (n, L + T)
        with self.precision():
            output = (model or self.model)(
                **inputs, output_hidden_states=True, use_cache=False, logits_to_keep=said.shape[1] + 1
            )
        before = slice(-said.shape[1] - 1, -1)  # a token is drawn at the place before its own
        logits = output.logits[:, before].float() / self.player.settings.temperature  # (n, T, V)
        never = torch.tensor(self.player.decoding(False).suppress_tokens, device=logits.device)
        logits = logits.index_fill(-1, never, torch.finfo(logits.dtype).min)
        values = self.value(output.hidden_states[-1][:, before].float()).squeeze(-1)
        return Categorical(logits=logits, validate_args=False), values

    def precision(self) -> Any:
        """bfloat16 on a GPU, as TRL computes."""
        kind = self.model.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=kind != "cpu")


class Learner:
    """Trains a model, a batch of answers after the other.

    Args:
        player: the model, with adapters or without; its settings say the rest.
        learning_rate: of the model.

    Attributes:
        log: a row of means by name for every hundredth of the training, with its ``step``.
        steps: updates so far.
    """

    def __init__(self, player: VLMPolicy, learning_rate: float) -> None:
        self.player, self.settings = player, player.settings
        self.recipe = TokenPPO.of(player.settings)
        self.actor = actor = ActorCritic(player)
        self.frozen: Any = None  # with adapters, the model without them is the one before
        if self.recipe.kl and not self.settings.lora:
            self.frozen = copy.deepcopy(player.model).requires_grad_(False)
        rate = self.recipe.learning_rate
        self.optimizer = Muon(actor, [actor.value], rate, pretrained=actor.model, scale=learning_rate / rate)
        self.generator = torch.Generator().manual_seed(self.settings.seed)
        self.first = int(np.random.SeedSequence([self.settings.seed]).generate_state(1)[0])
        self.log: list[dict[str, float]] = []
        self.steps = 0

    def learn(self, tell: Callable[[int, dict[str, float]], None] = lambda step, row: None) -> None:
        """Make all the updates of the settings.

        Args:
            tell: is handed the step and each row of the log.

        Raises:
            NonFiniteGradientError: the weights are as they were before it.
        """
        every, rows = max(1, self.settings.steps // 100), []
        while self.steps < self.settings.steps:
            start = self.first + self.steps * self.settings.batch
            answers, scores = self.collect(range(start, start + self.settings.batch))
            rows.append(scores | self.update(answers))
            self.steps += 1
            if self.steps % every == 0:
                means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[-1]}
                self.log.append({"step": self.steps, **means})
                rows = []
                tell(self.steps, self.log[-1])

    @torch.no_grad()
    def collect(self, seeds: Sequence[int]) -> tuple[Answers, dict[str, float]]:
        """Sampled answers to the episodes of ``seeds``, and the means of their scores by name."""
        episodes, player = self.player.episodes, self.player
        observations = episodes.observe(seeds)
        conversations, pictures = episodes.conversations(observations), episodes.pictures(observations)
        config = player.decoding(False)
        tokens = torch.full((len(seeds), player.max_tokens), int(config.pad_token_id or 0))
        parts = torch.arange(len(seeds)).split(player.batch_size)
        for rows in parts:
            some = slice(int(rows[0]), int(rows[-1]) + 1)
            with self.actor.precision():
                drawn = player.sample(player.inputs(conversations[some], pictures[some]))
            tokens[some, : drawn.shape[1]] = drawn.cpu()
        # Some models pad with the token that ends a turn: what comes after the first of them isn't said.
        ended = torch.isin(tokens, torch.tensor(config.eos_token_id))
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, tokens.shape[1])
        tokens = tokens[:, : int(lengths.max())]
        scored = episodes.score(seeds, player.texts(tokens))
        rewards = torch.zeros(tokens.shape)
        rewards[torch.arange(len(seeds)), lengths - 1] = torch.from_numpy(scored.rewards).float()
        empty = torch.zeros(tokens.shape)
        answers = Answers(conversations, pictures, tokens, lengths, empty, empty, empty, rewards)
        known = torch.cat([self._known(answers, rows) for rows in parts]).unbind(-1)  # (B, T) each
        answers = replace(answers, log_probs=known[0], values=known[1], reference=known[2])
        means = {"reward": scored.rewards, "success": scored.successes, "unparsable": scored.unparsable}
        return answers, {name: float(x.mean()) for name, x in {**means, "length": lengths.numpy()}.items()}

    def update(self, answers: Answers) -> dict[str, float]:
        """Learn from answers of this model; means by name.

        Raises:
            NonFiniteGradientError: names the first parameter it was found in; the weights hold the steps before it.
        """
        recipe, valid, lengths = self.recipe, answers.valid, answers.lengths
        remaining = 1 - self.steps / self.settings.steps
        end = torch.zeros(len(lengths))  # nothing comes after an answer
        advantages = gae(answers.rewards, answers.values, lengths, end, recipe.gamma, recipe.gae_lambda)
        targets = advantages + answers.values
        mean, variance = ALONE.moments(advantages[valid])
        advantages = (advantages - mean) / (variance**0.5 + 1e-8)
        old, before = answers.log_probs, answers.reference
        known = torch.stack([old, advantages, answers.values, targets, before], -1)  # (B, T, 5)

        def loss(rows: Tensor, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            total = int(lengths[batch].sum())
            sums = self._sums(answers, rows, known, recipe.entropy * remaining)
            return sums["loss"] / total, {name: value.detach() / total for name, value in sums.items()}

        groups = torch.arange(len(lengths))[:, None]
        log = descend(self.actor, self.optimizer, groups, loss, recipe, remaining, self.generator, ALONE)
        spread, left = (ALONE.moments(x[valid])[1] for x in (targets, targets - answers.values))
        row = {name.removeprefix("train/"): value for name, value in log.items()}
        return row | {"explained_variance": 1 - left / spread if spread > 0 else 0.0}

    def _sums(self, answers: Answers, rows: Tensor, known: Tensor, entropy_coef: float) -> dict[str, Tensor]:
        """The loss of some answers and its parts, summed over their tokens."""
        recipe = self.recipe
        drawn_from, values, tokens, valid = self._pass(answers, rows)
        width, device = tokens.shape[1], values.device
        old, advantages, old_values, targets, reference = known[rows, :width].to(device)[valid].unbind(-1)
        log_probs = drawn_from.log_prob(tokens)[valid]  # (N,), as are all the others
        entropy = drawn_from.entropy()[valid]
        policy_loss, value_loss = ppo_loss(
            log_probs, old, advantages, values[valid], old_values, targets, recipe
        )
        loss = policy_loss + recipe.value_coef * value_loss - entropy_coef * entropy
        parts = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
        if recipe.kl:
            parts["kl"] = divergence(log_probs, reference)
            loss = loss + recipe.kl * parts["kl"]
        parts["approx_kl"] = divergence(old, log_probs)
        parts["clip_fraction"] = ((log_probs - old).exp() - 1).abs().gt(recipe.clip).float()
        return {name: value.sum() for name, value in {"loss": loss, **parts}.items()}

    def _known(self, answers: Answers, rows: Tensor) -> Tensor:
        """Log-probabilities, values and log-probabilities of the frozen model, ``(n, T, 3)`` on the CPU, 0 at padding."""
        drawn_from, values, tokens, valid = self._pass(answers, rows)
        log_probs = reference = drawn_from.log_prob(tokens)
        if self.recipe.kl:
            whole = self.player.model
            with whole.disable_adapter() if self.frozen is None else contextlib.nullcontext():
                reference = self._pass(answers, rows, self.frozen or whole)[0].log_prob(tokens)
        found = torch.stack([log_probs, values, reference], -1).masked_fill(~valid[..., None], 0.0)
        return nn.functional.pad(found.cpu(), (0, 0, 0, answers.tokens.shape[1] - found.shape[1]))

    def _pass(
        self, answers: Answers, rows: Tensor, model: Any = None
    ) -> tuple[Categorical, Tensor, Tensor, Tensor]:
        """What tokens were drawn from, values, tokens and what is valid, of answers cut to their longest."""
        width = int(answers.lengths[rows].max())
        tokens, valid = answers.tokens[rows, :width], answers.valid[rows, :width]
        conversations, pictures = (
            [items[i] for i in rows.tolist()] for items in (answers.conversations, answers.pictures)
        )
        drawn_from, values = self.actor(conversations, pictures, tokens, valid, model)
        return drawn_from, values, tokens.to(values.device), valid.to(values.device)
