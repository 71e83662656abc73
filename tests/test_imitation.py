"""Self-imitation: what is remembered, the loss, and that it learns faster than PPO alone."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from mmenvs_agents.imitation import Memory, returns_to_go
from mmenvs_agents.sb3 import load, make_agent, save, train

ID = "MMRL/VQA-v0"
SMALL = {"num_envs": 16, "n_steps": 4, "batch_size": 32, "memory_mb": 1}


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 4), st.sampled_from([1.0, 0.9]), st.integers(0, 10**6), st.floats(0, 1)
)
def test_returns_to_go_are_sums_to_the_end_of_the_episode(steps, rows, gamma, seed, often):
    generator = np.random.default_rng(seed)
    rewards = generator.normal(size=(steps, rows)).astype(np.float32)
    ends = generator.random((steps, rows)) < often
    returns, known = returns_to_go(rewards, ends, gamma)
    for row in range(rows):
        for t in range(steps):
            last = next((k for k in range(t, steps) if ends[k, row]), None)
            assert known[t, row] == (last is not None)
            if last is not None:
                expected = sum(gamma ** (k - t) * rewards[k, row] for k in range(t, last + 1))
                assert returns[t, row] == pytest.approx(expected, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=12))
def test_memory_keeps_the_newest(batches):
    space = spaces.Dict({"a": spaces.Box(0, 255, (2, 3), np.uint8), "b": spaces.Box(-1, 1, (5,), np.float32)})
    memory = Memory(space, spaces.Discrete(9), 1)
    memory.size = 20
    memory.parts = {name: part[:20] for name, part in memory.parts.items()}
    stored = 0
    for n in batches:
        numbers = np.arange(stored, stored + n)
        parts = {"a": np.broadcast_to(numbers[:, None, None] % 256, (n, 2, 3)), "b": np.zeros((n, 5))}
        memory.store(parts, numbers % 9, numbers.astype(np.float32))
        stored += n
    assert len(memory) == min(stored, 20)
    assert sorted(memory.returns[: len(memory)]) == list(range(max(0, stored - 20), stored))
    if stored:
        seen, actions, returns = memory.draw(50, np.random.default_rng(0), torch.device("cpu"))
        assert seen["a"].shape == (50, 2, 3) and seen["a"].dtype == torch.uint8
        assert torch.equal(actions, returns.long() % 9) and torch.equal(
            seen["a"][:, 0, 0].long(), returns.long() % 256
        )


def test_memory_has_room_for_one_at_least():
    assert Memory(spaces.Box(-1, 1, (2**19,), np.float32), spaces.Discrete(2), 1).size == 1


def test_it_remembers_what_was_better_than_expected_and_does_it_again():
    agent = make_agent("ppo", ID, **SMALL)
    train(agent, 640, progress=False)
    n = len(agent.memory)
    # Nearly all of it are right answers; wrong ones only where less than nothing was expected.
    assert 10 < n < 400 and agent.memory.returns[:n].max() == 1.0
    assert agent.memory.parts["image"].dtype == np.uint8 and agent.memory.parts["image"][:n].std() > 5
    before = log_probability(agent)
    for group in agent.policy.optimizer.param_groups:
        group["lr"] = 1e-3  # the schedule is at its end
    for _ in range(20):
        agent.policy.optimizer.zero_grad()
        agent._imitate(agent.policy.optimizer)
        agent.policy.optimizer.step()
    assert log_probability(agent) > before + 0.5


def log_probability(agent):
    """Of the right answers in memory."""
    right = np.flatnonzero(agent.memory.returns[: len(agent.memory)] == 1.0)
    seen = {name: torch.as_tensor(part[right]) for name, part in agent.memory.parts.items()}
    with torch.no_grad():
        return (
            agent.policy.evaluate_actions(seen, torch.as_tensor(agent.memory.actions[right]))[1].mean().item()
        )


def test_the_loss_is_as_in_the_paper():
    agent = make_agent("ppo", ID, imitation=0.5, **SMALL)
    train(agent, 64, progress=False)
    policy = agent.policy
    state = agent.draws.bit_generator.state
    seen, actions, returns = agent.memory.draw(32, agent.draws, agent.device)
    agent.draws.bit_generator.state = state
    values, logs, _ = policy.evaluate_actions(seen, actions)
    gap = np.maximum(returns.numpy() - values.detach().numpy()[:, 0], 0)
    expected = -(gap * logs.detach().numpy()).mean() + 0.01 * 0.5 * (gap**2).mean()
    policy.optimizer.zero_grad()
    agent.losses = []
    agent._imitate(policy.optimizer)
    assert agent.losses == [pytest.approx(expected, rel=1e-4)]


def test_without_imitation_it_is_plain_ppo():
    agents = [make_agent("ppo", ID, imitation=weight, **SMALL) for weight in (0, 1.0)]
    for agent in agents:
        train(agent, 256, progress=False)
    assert len(agents[0].memory) == 0 and len(agents[1].memory) > 0


def test_settings_survive_saving(tmp_path):
    agent = make_agent("ppo", ID, imitation=0.25, **SMALL)
    save(agent, tmp_path)
    again = load(tmp_path)
    assert again.imitation == 0.25 and again.memory_mb == 1


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"imitation": -1}, ValueError, "imitation must be from 0 to 1e\\+06, got -1"),
        ({"imitation": float("nan")}, ValueError, "got nan"),
        ({"imitation": "much"}, TypeError, "got 'much'"),
        ({"memory_mb": 0}, ValueError, "memory_mb must be from 1"),
    ],
)
def test_bad_settings(arguments, error, says):
    with pytest.raises(error, match=says):
        make_agent("ppo", ID, **arguments)
