"""Self-imitation of the transformer agent: what is remembered, the loss, and that it goes on exactly."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmenvs_agents.transformer import ppo
from mmenvs_agents.transformer.agent import TransformerAgent
from mmenvs_agents.transformer.episodes import Episodes
from mmenvs_agents.transformer.imitation import EpisodeMemory, imitation_loss
from mmenvs_agents.transformer.restraints import Restraints
from mmenvs_agents.transformer.rollout import Rollout, collect

from mmenvs.embeddings.joint import load_shapes
from tests.tiny_transformer import CAPTIONING, QUICK, VQA, make_agent, recall


def rollout_of(numbers, lengths, good):
    """Episodes of one number each, which is their picture, their cue and their actions; ``good`` ones are paid at the end."""
    rows, longest = len(numbers), max(lengths)
    number = torch.tensor(numbers)
    length = torch.tensor(lengths)
    each = number[:, None].expand(rows, longest)
    seen = {"image": number[:, None].expand(rows, 100).to(torch.uint8)}
    episodes = Episodes(seen, {"cue": each[..., None].float()}, each[..., None], length)
    rewards = torch.zeros(rows, longest)
    rewards[torch.arange(rows), length - 1] = torch.tensor(good).float()
    return Rollout(
        episodes, torch.zeros(rows, longest), torch.full((rows, longest), 0.5), rewards, torch.zeros(rows),
        rewards.sum(1).double().numpy(), None, {},
    )  # fmt: skip


def returns_of(rollout):
    lengths = rollout.episodes.lengths
    return ppo.gae(rollout.rewards, torch.zeros_like(rollout.values), lengths, rollout.bootstrap, 1.0, 1.0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=9), max_size=8))
def test_memory_keeps_the_newest_of_those_that_went_well(batches):
    memory, kept, number = EpisodeMemory(1), [], 0
    memory.megabytes = 2_000 / 2**20
    for batch in batches:
        numbers = list(range(number, number + len(batch)))
        lengths, good = zip(*batch, strict=True)
        rollout = rollout_of(numbers, lengths, good)
        memory.store(rollout, returns_of(rollout))
        kept += [(n, length) for n, length, fine in zip(numbers, lengths, good, strict=True) if fine]
        number += len(batch)
        assert len(memory) <= len(kept)
        if len(memory):
            assert memory.tensors["lengths"].tolist() == [length for _, length in kept[-len(memory) :]]
        held = sum(x.nbytes for x in memory.tensors.values())
        assert held <= 2_000 and (len(memory) == len(kept) or held > 1_500)
    if len(memory):
        episodes, returns = memory.draw(50, torch.Generator().manual_seed(0))
        numbers = episodes.fixed["image"][:, 0].long()
        assert set(numbers.tolist()) <= {n % 256 for n, _ in kept[-len(memory) :]}
        valid = episodes.valid
        for part in (episodes.steps["cue"][..., 0], episodes.actions[..., 0]):
            assert (part[valid].long() % 256 == numbers[:, None].expand(valid.shape)[valid]).all()
        assert returns.shape == valid.shape and (returns[valid] == 1).all()


def test_an_episode_larger_than_the_memory_is_kept_and_nothing_is_nothing():
    memory = EpisodeMemory(1)
    memory.megabytes = 1e-6
    rollout = rollout_of([1, 2], [1, 1], [False, False])
    memory.store(rollout, returns_of(rollout))
    assert len(memory) == 0
    rollout = rollout_of([3, 4, 5], [1, 2, 1], [True, True, False])
    memory.store(rollout, returns_of(rollout))
    assert memory.tensors["actions"][:, 0, 0].tolist() == [4]


@pytest.mark.parametrize("steps", [1, 3])
def test_the_loss_is_as_in_the_paper(steps):
    agent = make_agent(recall(8)) if steps == 3 else make_agent()
    torch.nn.init.normal_(agent.policy.critic.weight, std=0.3)
    rollout = collect(agent.policy, agent.get_env(), 0, 6, torch.Generator().manual_seed(0))
    episodes = rollout.episodes
    returns = torch.rand(rollout.rewards.shape, generator=torch.Generator().manual_seed(1))
    loss = imitation_loss(agent.policy, episodes, returns)
    gap = (returns - rollout.values).clamp(min=0)[episodes.valid]
    expected = -gap * rollout.log_probs[episodes.valid] + 0.01 * 0.5 * gap**2
    torch.testing.assert_close(loss.detach(), expected, atol=1e-5, rtol=1e-4)
    assert (loss > 0).any()
    # What was expected too little is a reason to act so again, not one to expect less by acting otherwise.
    loss.sum().backward()
    slope = agent.policy.critic.weight.grad.clone()
    values = agent.policy(episodes)[1]
    agent.optimizer.zero_grad()
    (0.01 * 0.5 * (returns - values)[episodes.valid].clamp(min=0).square()).sum().backward()
    torch.testing.assert_close(agent.policy.critic.weight.grad, slope, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_update_adds_it_to_the_loss_of_ppo(accumulate, monkeypatch):
    settings = {
        "num_envs": 6,
        "rollout_steps": 3,
        "epochs": 1,
        "minibatches": 1,
        "max_grad_norm": 1e6,
        "gamma": 0.5,
    }
    recipe = ppo.PPORecipe(**settings, accumulate=accumulate, imitation=0.5)
    agent = make_agent(recall(6), recipe)
    rollout = collect(agent.policy, agent.get_env(), 0, 3, torch.Generator().manual_seed(0))
    rollout.rewards[:, -1] = 1.0
    taken = []
    agent.optimizer.step = lambda: taken.append(agent.policy.actor.out.weight.grad.clone())
    monkeypatch.setattr(
        ppo,
        "imitation_loss",
        lambda policy, _, returns: policy.actor.out.weight.sum().expand(returns.numel()),
    )
    for memory in (None, agent.memory):
        generator = torch.Generator().manual_seed(0)
        rollout.values.fill_(-1.0)  # all went better
        log = ppo.update(agent.policy, agent.optimizer, rollout, recipe, 1.0, generator, memory=memory)
    # A mean over steps, however many parts the minibatch has.
    torch.testing.assert_close(taken[1] - taken[0], torch.full_like(taken[0], 0.5))
    assert log["train/remembered"] == 6
    assert agent.memory.tensors["returns"].tolist() == [[0.25, 0.5, 1.0]] * 6


@pytest.mark.parametrize("env", ["vqa", "shapes", "recall", CAPTIONING])
def test_it_goes_on_bit_by_bit_with_what_it_remembers(env, tmp_path):
    def made():
        if env == "shapes":
            return make_agent(encoders={"image": "shapes", "question": "shapes"}, env_kwargs={})
        return make_agent(recall(8) if env == "recall" else {"vqa": VQA}.get(env, env))

    straight, first = made(), made()
    straight.learn(400)
    first.learn(400, lambda agent: agent.num_timesteps < 200)
    first.save(tmp_path)
    again = TransformerAgent.load(tmp_path, recall(8) if env == "recall" else None, device="cpu")
    assert 0 < len(again.memory) == len(first.memory)
    again.learn(400)
    for name, x in straight.memory.tensors.items():
        assert torch.equal(x, again.memory.tensors[name]), name
    for one, other in zip(straight.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(one, other)


def test_another_environment_begins_anew():
    memory = EpisodeMemory(1)
    rollout = rollout_of([1, 2], [1, 2], [True, True])
    memory.store(rollout, returns_of(rollout))
    other = rollout_of([3, 4], [2, 2], [False, False])
    masked = replace(other, episodes=replace(other.episodes, masks=torch.ones(2, 2, 5, dtype=torch.bool)))
    memory.store(other, returns_of(other))
    assert len(memory) == 2
    memory.store(masked, returns_of(masked))
    assert len(memory) == 0


def test_one_long_episode_among_short_ones_goes_again():
    memory = EpisodeMemory(1)
    memory.megabytes = 3_000 / 2**20
    for lengths in ([1] * 20, [50] + [1] * 20, [1] * 30):
        rollout = rollout_of(list(range(len(lengths))), lengths, [True] * len(lengths))
        memory.store(rollout, returns_of(rollout))
    assert memory.tensors["returns"].shape[1] == 1 and len(memory) > 15


def test_damaged_memories_are_refused_and_old_agents_stay_plain(tmp_path):
    agent = make_agent()
    agent.learn(400)
    del agent.memory.tensors["returns"]
    agent.save(tmp_path / "damaged")
    with pytest.raises(ValueError, match="memory holds no episodes"):
        TransformerAgent.load(tmp_path / "damaged", device="cpu")
    plain = make_agent(recipe=ppo.PPORecipe(**{**vars(QUICK), "imitation": 0.0}))
    plain.save(tmp_path / "old")
    file = tmp_path / "old" / "settings.json"
    document = json.loads(file.read_text())
    del document["settings"]["recipe"]["imitation"], document["settings"]["recipe"]["memory_mb"]
    file.write_text(json.dumps(document))
    assert TransformerAgent.load(tmp_path / "old", device="cpu").memory is None


def test_with_limits_nothing_is_remembered():
    limits = Restraints(limits={"hallucination": 0.1})
    assert make_agent(CAPTIONING, restraints=limits).memory is None


def test_the_first_agent_on_shapes_has_the_weights_of_the_second():
    load_shapes.cache_clear()
    first, second = (make_agent(encoders={"image": "shapes"}, env_kwargs={}) for _ in range(2))
    for one, other in zip(first.policy.parameters(), second.policy.parameters(), strict=True):
        assert torch.equal(one, other)


def test_without_imitation_nothing_is_remembered(tmp_path):
    agent = make_agent(recipe=ppo.PPORecipe(**{**vars(QUICK), "imitation": 0.0}))
    agent.learn(64, out=tmp_path)
    assert agent.memory is None and make_agent(method="grpo", recipe=None, env_kwargs={}).memory is None
    assert TransformerAgent.load(tmp_path, device="cpu").memory is None


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"imitation": -1.0}, ValueError, "imitation must be from 0"),
        ({"imitation": "much"}, TypeError, "imitation must be a number from 0 to 1e\\+06, got 'much'"),
        ({"memory_mb": 0}, ValueError, "memory_mb must be from 1"),
    ],
)
def test_bad_settings(arguments, error, says):
    with pytest.raises(error, match=says):
        ppo.PPORecipe(**arguments)
