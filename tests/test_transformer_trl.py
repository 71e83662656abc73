"""GRPO's loss and gradient are those of TRL's trainer, on the same model and batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from mmenvs_agents.transformer import grpo
from mmenvs_agents.transformer.episodes import NEVER, Episodes
from mmenvs_agents.transformer.learning import Anchor
from mmenvs_agents.transformer.rollout import Rollout

pytest.importorskip("trl", reason="TRL's trainer is what GRPO is compared with: pip install trl")
from benchmarks import transformer as bench
from tests.tiny_models import SMALL

# TRL still uses the old name of an argument of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
PROMPTS, GROUP, LENGTH = 2, 4, 7
LENGTHS = torch.tensor([24, 3, 1, 12, 24, 24, 8, 17])


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """TRL's trainer of a Llama, and a policy with the same weights."""
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(bench, "LLAMA", {**SMALL, "num_key_value_heads": 1})
        model = bench.make_llama()
    policy = bench.policy_of(model, LENGTH)
    folder = str(tmp_path_factory.mktemp("trl"))
    trainer = bench.make_trainer(model, folder, prompts(), GROUP, PROMPTS * GROUP)
    trainer.current_gradient_accumulation_steps = 1
    # By default TRL weighs the divergence from the reference by the ratio of probabilities; ours is that of the GRPO paper.
    trainer.args.use_bias_correction_kl = False
    trainer.model.train()
    trainer.model.get_decoder().register_forward_pre_hook(both_directions, with_kwargs=True)
    return trainer, policy


def both_directions(module, args, kwargs):
    """Let the prompt see itself in both directions, as a policy's does; its padding is on the left."""
    read = kwargs["attention_mask"].bool()
    place = torch.arange(read.shape[1])
    seen = place <= place[:, None].clamp(min=LENGTH - 1)
    bias = torch.zeros(len(read), 1, *seen.shape).masked_fill_(~(seen & read[:, None])[:, None], NEVER)
    return args, {**kwargs, "attention_mask": bias}


def prompts():
    """Word ids with padding at the end, as environments give them."""
    drawn = torch.randint(2, bench.WORDS, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(0))
    drawn[1, 4:] = 0
    return drawn


def batch(policy):
    """Answers of all lengths, by a policy that was another then."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(2, bench.WORDS, (len(LENGTHS), bench.ANSWER, 1), generator=generator)
    episodes = Episodes({"prompt": prompts().repeat_interleave(GROUP, 0)}, {}, words, LENGTHS)
    with torch.no_grad():
        now = policy.actor.log_prob(policy(episodes)[0], words)
    old, reference = (now + 0.3 * torch.randn(now.shape, generator=generator) for _ in range(2))
    rewards = torch.zeros_like(now)
    rewards[:, 0] = torch.randn(len(now), generator=generator)
    nothing = torch.zeros(len(now))
    returns = rewards.double().sum(1).numpy()
    return Rollout(episodes, old, nothing, rewards, nothing, returns, None, {}), reference


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo"])
def test_loss_and_gradient_are_those_of_trl(sides, name, beta):
    trainer, policy = sides
    recipe = replace(grpo.VARIANTS[name], group=GROUP)
    rollout, reference = batch(policy)
    episodes, count = rollout.episodes, int(LENGTHS.sum())
    advantages = grpo.advantages_of(rollout.rewards.sum(1).view(-1, GROUP), recipe).flatten()
    weights = grpo.weights_of(LENGTHS, len(LENGTHS), count, recipe.length)
    policy.zero_grad()
    anchor = Anchor(reference, beta) if beta else None
    known = torch.stack([advantages, weights], -1)
    rows = torch.arange(len(LENGTHS))
    ours, logged = grpo.part_loss(policy, rollout, rows, known, recipe, anchor=anchor)
    ours.backward()
    assert 0.1 < logged["clip_fraction"] / count < 0.9

    padded = episodes.fixed["prompt"]
    length = (padded != 0).sum(1)
    left = torch.stack([row.roll(LENGTH - int(n)) for row, n in zip(padded, length, strict=True)])
    read = bench.after(left)
    trainer.model.zero_grad()
    trainer.loss_type, trainer.beta = name, beta
    trainer.epsilon_low, trainer.epsilon_high = recipe.clip, recipe.clip_high
    theirs = trainer._compute_loss(
        trainer.model,
        {
            "prompt_ids": read,
            "prompt_mask": (read != 0).long(),
            "completion_ids": episodes.actions.squeeze(-1),
            "completion_mask": episodes.valid.long(),
            "advantages": advantages,
            "old_per_token_logps": rollout.log_probs,
            "ref_per_token_logps": reference,
            "num_items_in_batch": torch.tensor(count),
        },
    )
    theirs.backward()
    ours, theirs = ours.detach(), theirs.detach()
    # TRL's Dr. GRPO divides the sum of an answer by the length that answers may have, ours by nothing.
    scale = bench.ANSWER if name == "dr_grpo" else 1
    assert abs(float(ours)) > 1e-3
    np.testing.assert_allclose(float(ours), scale * float(theirs), atol=1e-4)
    found = dict(policy.backbone.model.named_parameters())
    expected = {n: p for n, p in trainer.model.get_decoder().named_parameters() if "embed_tokens" not in n}
    assert len(expected) == 2 * 9 + 1
    pairs = [(found[n], p) for n, p in expected.items()]
    pairs.append((policy.actor.out.weight, trainer.model.lm_head.weight))
    largest = max(float(p.grad.abs().max()) for _, p in pairs)
    for mine, other in pairs:
        assert float((mine.grad - scale * other.grad).abs().max()) < 1e-4 * scale * largest
        assert other.grad.abs().max() > 0
