"""PPO of the transformer agent by its parts, its rollouts, and that it learns."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st
from mmenvs_agents.transformer import ppo
from mmenvs_agents.transformer.agent import TransformerAgent
from mmenvs_agents.transformer.episodes import Episodes
from mmenvs_agents.transformer.rollout import collect

from tests.tiny_transformer import CAPTIONING, QUICK, SMALL, Recall, make_agent, recall

# --- the parts of PPO


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
    gamma=st.floats(0.0, 1.0),
    decay=st.floats(0.0, 1.0),
)
def test_gae_equals_its_definition(lengths, seed, gamma, decay):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, len(lengths), max(lengths), generator=generator)
    bootstrap = torch.where(torch.rand(len(lengths), generator=generator) < 0.5, 0.0, 3.0)
    got = ppo.gae(rewards, values, torch.tensor(lengths), bootstrap, gamma, decay)
    for row, length in enumerate(lengths):
        after = [*values[row, 1:length].tolist(), bootstrap[row].item()]
        delta = [rewards[row, t].item() + gamma * after[t] - values[row, t].item() for t in range(length)]
        for t in range(length):
            expected = sum((gamma * decay) ** (k - t) * delta[k] for k in range(t, length))
            assert got[row, t].item() == pytest.approx(expected, abs=1e-4)
        assert (got[row, length:] == 0).all()


def test_ppo_loss_by_hand():
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1])
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0, 3.0])
    values, old, targets = torch.tensor([1.0, 0.1, 0.5, -1.0, 0.0]), torch.zeros(5), torch.ones(5)
    policy_loss, value_loss = ppo.ppo_loss(
        ratio.log(), torch.zeros(5), advantages, values, old, targets, ppo.PPORecipe()
    )
    # Clipped where it would gain by going on; never where it has to come back.
    torch.testing.assert_close(policy_loss, torch.tensor([-2.4, 3.0, -1.0, 1.6, -3.3]))
    torch.testing.assert_close(value_loss, torch.tensor([0.64, 0.81, 0.64, 4.0, 1.0]))
    free = ppo.ppo_loss(ratio, ratio, advantages, values, old, targets, ppo.PPORecipe(value_clip=0.0))[1]
    torch.testing.assert_close(free, (values - targets).square())


def test_accumulated_gradients_are_those_of_the_whole_batch():
    agent = make_agent(recall())
    rollout = collect(agent.policy, agent.get_env(), 0, 6, torch.Generator().manual_seed(0))
    known = torch.stack([rollout.log_probs, rollout.rewards, *[rollout.values] * 3], -1)
    gradients = []
    for parts in (1, 4):
        agent.optimizer.zero_grad()
        for part in torch.arange(len(rollout.bootstrap)).tensor_split(parts):
            ppo.part_loss(agent.policy, rollout, part, known, QUICK, 0.01)[0].backward()
        gradients.append(agent.policy.blocks[0].query.weight.grad.clone())
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
    assert gradients[0].abs().max() > 1e-6


def test_the_update_ends_where_the_policy_has_moved_far_and_its_schedules_fall():
    recipe = ppo.PPORecipe(num_envs=8, rollout_steps=8, epochs=10, target_kl=1e-5, entropy=0.5)
    agent = make_agent(recall(8), recipe)
    rollout = collect(agent.policy, agent.get_env(), 0, 8, torch.Generator().manual_seed(0))
    log = ppo.update(agent.policy, agent.optimizer, rollout, recipe, 0.25, torch.Generator().manual_seed(0))
    assert log["train/updates"] < 20
    assert log["train/entropy_coef"] == 0.125
    assert log["train/learning_rate"] == recipe.learning_rate / 4
    log = ppo.update(agent.policy, agent.optimizer, rollout, recipe, 0.0, torch.Generator().manual_seed(0))
    assert log["train/learning_rate"] == recipe.learning_rate / 50


# --- rollouts


@pytest.mark.parametrize("actions", ["discrete", "multi", "box"])
@pytest.mark.parametrize("limit", [3, 2])
def test_rollouts_hold_what_the_policy_saw_and_did(actions, limit):
    agent = make_agent(recall(4, actions=actions, limit=limit))
    torch.nn.init.normal_(agent.policy.critic.weight)
    rollout = collect(agent.policy, agent.get_env(), 5, 4, torch.Generator().manual_seed(0))
    episodes, valid = rollout.episodes, rollout.episodes.valid
    assert (episodes.lengths == limit).all() and len(episodes.lengths) == 4 * 2 and rollout.steps == 8 * limit
    described, values = agent.policy(episodes)
    log_probs = agent.policy.actor.log_prob(described, episodes.actions)
    torch.testing.assert_close(log_probs[valid], rollout.log_probs[valid], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(values[valid], rollout.values[valid], atol=1e-5, rtol=1e-5)
    cues = episodes.steps["cue"]
    assert (cues[:, 0].sum(-1) == 2).all() and (cues[:, 1:] == 0).all()
    if limit == 3:
        assert (rollout.bootstrap == 0).all() and rollout.successes is not None
        np.testing.assert_array_equal(rollout.returns, rollout.rewards.sum(1).numpy())
    else:
        # What comes after a truncation is worth what the whole pass says of one step more.
        more = Episodes(
            {}, {"cue": torch.nn.functional.pad(cues, (0, 0, 0, 1))},
            torch.nn.functional.pad(episodes.actions, (0, 0, 0, 1)), episodes.lengths + 1,
        )  # fmt: skip
        torch.testing.assert_close(agent.policy(more)[1][:, 2], rollout.bootstrap, atol=1e-5, rtol=1e-5)


def test_rollouts_of_captions_are_whole_episodes_of_different_lengths():
    agent = make_agent(CAPTIONING)
    policy = agent.policy
    # Random words end a caption once in a hundred; here they often do.
    policy.actor.out.bias.data[3] = 3.0
    rollout = collect(policy, agent.get_env(), 5, 8, torch.Generator().manual_seed(0))
    lengths, valid = rollout.episodes.lengths, rollout.episodes.valid
    assert len(set(lengths.tolist())) > 2
    ended = rollout.episodes.actions[torch.arange(len(lengths)), lengths - 1, 0]
    assert ((ended == 3) | (lengths == 11)).all()
    described, _ = policy(rollout.episodes)
    log_probs = policy.actor.log_prob(described, rollout.episodes.actions)
    torch.testing.assert_close(log_probs[valid], rollout.log_probs[valid], atol=1e-5, rtol=1e-5)
    # The pictures are those of the episodes: the first of each row is that of a fresh reset.
    observation, _ = gym.make_vec(CAPTIONING, num_envs=8, **SMALL).reset(seed=5)
    np.testing.assert_array_equal(rollout.episodes.fixed["image"][:8].numpy(), observation["image"])


def test_action_masks_of_the_infos_are_kept_to():
    class Masked(Recall):
        def reset(self, **arguments):
            observation, info = super().reset(**arguments)
            return observation, {**info, "action_mask": np.array([1, 0, 1, 0], np.int8)}

        def step(self, action):
            *rest, info = super().step(action)
            return *rest, {**info, "action_mask": np.array([1, 0, 1, 0], np.int8)}

    envs = gym.vector.SyncVectorEnv([Masked] * 4, autoreset_mode=AutoresetMode.SAME_STEP)
    agent = make_agent(envs)
    rollout = collect(agent.policy, envs, 0, 12, torch.Generator().manual_seed(0))
    assert set(rollout.episodes.actions[rollout.episodes.valid].flatten().tolist()) == {0, 2}
    described, _ = agent.policy(rollout.episodes)
    log_probs = agent.policy.actor.log_prob(described, rollout.episodes.actions)
    torch.testing.assert_close(log_probs, rollout.log_probs, atol=1e-5, rtol=1e-5)
    observation, _ = envs.reset(seed=0)
    actions, _ = agent.predict(observation, action_masks=np.tile([False, False, False, True], (4, 1)))
    assert (actions == 4).all()


@pytest.mark.parametrize("actions", ["discrete", "multi", "box"])
def test_temperature_is_that_of_rollouts_and_of_updates(actions, tmp_path):
    hot, plain = (make_agent(recall(4, actions=actions), temperature=t) for t in (2.0, 1.0))
    for agent in (hot, plain):
        torch.manual_seed(0)
        torch.nn.init.normal_(agent.policy.actor.out.weight, std=0.3)
    rollout = collect(hot.policy, hot.get_env(), 5, 4, torch.Generator().manual_seed(0))
    episodes, head, valid = rollout.episodes, hot.policy.actor, rollout.episodes.valid
    (described, _), (cold, _) = hot.policy(episodes), plain.policy(episodes)
    log_probs = head.log_prob(described, episodes.actions)
    torch.testing.assert_close(log_probs[valid], rollout.log_probs[valid], atol=1e-5, rtol=1e-5)
    # Probabilities to the power of a half, but for a factor.
    drawn = head.sample(cold.expand(50, *cold.shape), torch.Generator().manual_seed(1))
    power, base = (head.log_prob(d.expand(50, *d.shape), drawn) for d in (described, cold))
    if actions == "box":
        slope = head._log_slope(drawn).sum(-1)
        power, base = power + slope, base + slope
    left = power - base / 2
    torch.testing.assert_close(left, left[:1].expand_as(left), atol=1e-3, rtol=1e-3)
    assert (base.std(0) > 1e-3).any() and (head.entropy(described) != head.entropy(cold)).all()
    hot.save(tmp_path)
    again = TransformerAgent.load(tmp_path, recall(4, actions=actions), device="cpu")
    assert again.policy.actor.temperature == 2.0
    with pytest.raises(ValueError, match=r"temperature must be from 0\.01"):
        make_agent(temperature=0.0)


# --- learning


RECALL = ppo.PPORecipe(num_envs=32, rollout_steps=12, minibatches=4, entropy=0.01, learning_rate=2e-3)


def learned(monkeypatch, sign, actions="discrete", steps=8000):
    true = ppo.gae
    monkeypatch.setattr(ppo, "gae", lambda *arguments: sign * true(*arguments))
    agent = make_agent(recall(32, actions=actions), RECALL)
    agent.learn(steps)
    final = collect(agent.policy, agent.get_env(), 9, 24, torch.Generator().manual_seed(0))
    return final.returns.mean()


@pytest.mark.parametrize("actions", ["discrete", "multi", "box"])
def test_it_learns_to_remember(monkeypatch, actions):
    assert learned(monkeypatch, 1.0, actions) > 0.8


def test_it_does_not_with_the_sign_of_the_advantages_flipped(monkeypatch):
    assert learned(monkeypatch, -1.0, steps=6000) < 0.3
