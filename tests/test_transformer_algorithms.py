"""GRPO and its relatives, DPO, behaviour cloning and restraints of the transformer agent."""

import dataclasses
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmenvs_agents.transformer import dpo, grpo, learning, supervised
from mmenvs_agents.transformer.agent import TransformerAgent
from mmenvs_agents.transformer.algorithms import MODULES, RECIPES
from mmenvs_agents.transformer.learning import Anchor, log_probs_of
from mmenvs_agents.transformer.restraints import HackingAlarm, Restraints
from mmenvs_agents.transformer.rollout import collect

from mmenvs.embeddings.joint import JointConfig, JointEmbedding, save_joint
from tests.tiny_transformer import CAPTIONING, SMALL, VQA, make_agent, recall

LEARNERS = tuple(name for name in RECIPES if name not in ("ppo", "supervised"))


def quick(method, **more):
    size = {"num_envs": 8, "minibatches": 2}
    if hasattr(RECIPES[method], "rollout_steps"):
        size["rollout_steps"] = 4
    elif RECIPES[method].group > 1:
        size["group"] = 4
    return dataclasses.replace(RECIPES[method], **size, **more)


def made(method, env=CAPTIONING, **more):
    return make_agent(env, quick(method), method=method, **more)


# --- losses and advantages by hand


def test_advantages_by_hand():
    returns = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5]])

    def found(name, **more):
        recipe = dataclasses.replace(grpo.VARIANTS[name], **more)
        return grpo.advantages_of(returns, recipe, torch.tensor([1.0, 0.25]))

    spread = (0.75**2 + 3 * 0.25**2) ** 0.5 / 3**0.5
    expected = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.0] * 4])
    torch.testing.assert_close(found("grpo", group=4), expected / (spread + 1e-4))
    torch.testing.assert_close(found("dr_grpo", group=4), expected)
    torch.testing.assert_close(
        found("rloo", group=4), torch.tensor([[1.0, -1 / 3, -1 / 3, -1 / 3], [0.0] * 4])
    )
    torch.testing.assert_close(found("scst"), returns - torch.tensor([[1.0], [0.25]]))
    torch.testing.assert_close(found("reinforce"), returns - returns.mean())
    with pytest.raises(ValueError, match="greedy must be given"):
        grpo.advantages_of(returns, grpo.VARIANTS["scst"])


def test_weights_of_steps_by_hand():
    lengths = torch.tensor([2, 4])
    assert grpo.weights_of(lengths, 2, 6, "episode").tolist() == [0.25, 0.125]
    assert grpo.weights_of(lengths, 4, 10, "all").tolist() == pytest.approx([0.1, 0.1])
    assert grpo.weights_of(lengths, 4, 10, "sum").tolist() == [0.25, 0.25]


def test_pairs_and_the_dpo_loss_by_hand():
    found = dpo.pairs(torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.3, 0.3], [1.0, 0.2, 0.0]]))
    assert found.tolist() == [[1, 0], [6, 8]]
    ours, theirs = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    expected = np.log1p(np.exp(-0.1 * ((-1.0 + 1.5) - (-2.0 + 1.0))))
    assert dpo.dpo_loss(ours, theirs, 0.1).item() == pytest.approx(expected, abs=1e-6)
    assert dpo.dpo_loss(ours, ours, 0.1).item() == pytest.approx(np.log(2), abs=1e-6)


def test_divergence_is_the_estimate_of_kl():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 5, generator=generator).log_softmax(-1)
    each = learning.divergence(p, q)
    assert (each >= 0).all()
    assert (p.exp() * each).sum().item() == pytest.approx((p.exp() * (p - q)).sum().item(), abs=1e-6)


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo"])
def test_the_grpo_loss_equals_a_slow_one(name):
    recipe = quick(name, entropy=0.1)
    agent = make_agent(CAPTIONING, recipe, method=name)
    agent.policy.actor.out.bias.data[3] = 2.0
    rollout = grpo.play(agent.policy, agent.get_env(), recipe, 3, torch.Generator().manual_seed(0))
    rollout = dataclasses.replace(
        rollout, log_probs=rollout.log_probs + 0.3 * torch.randn_like(rollout.rewards)
    )
    lengths = rollout.episodes.lengths
    assert len(set(lengths.tolist())) > 1
    advantages = torch.linspace(-1, 1, 8)
    anchor = Anchor(rollout.log_probs - 0.2, 0.5)
    weights = grpo.weights_of(lengths, 8, int(lengths.sum()), recipe.length)
    known = torch.stack([advantages, weights], -1)
    loss, logged = grpo.part_loss(agent.policy, rollout, torch.arange(8), known, recipe, 0.1, anchor)
    described, _ = agent.policy(rollout.episodes)
    expected, per_episode = [], []
    for b in range(8):
        total = 0.0
        for t in range(lengths[b]):
            logits = described[b, t].log_softmax(-1)
            new = logits[rollout.episodes.actions[b, t, 0]]
            ratio = (new - rollout.log_probs[b, t]).exp()
            clipped = min(max(ratio, torch.tensor(1 - recipe.clip)), torch.tensor(1 + recipe.clip_high))
            step = -torch.min(ratio * advantages[b], clipped * advantages[b])
            apart = anchor.log_probs[b, t] - new
            step = step + 0.5 * (apart.exp() - 1 - apart) + 0.1 * (logits.exp() * logits).sum()
            expected.append(step)
            total = total + step
        per_episode.append(total)
    slow = {
        "episode": sum(x / n for x, n in zip(per_episode, lengths, strict=True)) / 8,
        "all": sum(expected) / len(expected),
        "sum": sum(per_episode) / 8,
    }[recipe.length]
    torch.testing.assert_close(loss, slow, atol=1e-5, rtol=1e-5)
    assert logged["approx_kl"] > 0


# --- groups


@settings(max_examples=10, deadline=None)
@given(group=st.sampled_from([1, 2, 4]), seed=st.integers(0, 2**31))
def test_a_group_reads_its_prompt_once_and_its_answers_do_not_see_each_other(group, seed):
    agent = made("rloo")
    agent.policy.actor.out.bias.data[3] = 1.0
    seeds = [seed + i // 4 for i in range(8)]
    rollout = collect(agent.policy, agent.get_env(), seeds, 1, torch.Generator().manual_seed(seed), group=4)
    alone = collect(agent.policy, agent.get_env(), seeds, 1, torch.Generator().manual_seed(seed))
    assert torch.equal(rollout.episodes.actions, alone.episodes.actions)
    valid = rollout.episodes.valid
    torch.testing.assert_close(rollout.log_probs[valid], alone.log_probs[valid], atol=1e-5, rtol=1e-5)
    described, values = agent.policy(rollout.episodes, group)
    expected, known = agent.policy(rollout.episodes)
    torch.testing.assert_close(described[valid], expected[valid], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(values[valid], known[valid], atol=1e-5, rtol=1e-5)
    found = log_probs_of(agent.policy, rollout.episodes, group)
    torch.testing.assert_close(found[valid], rollout.log_probs[valid], atol=1e-5, rtol=1e-5)
    assert (found[~valid] == 0).all()


def test_the_greedy_baseline_is_what_the_most_likely_actions_get():
    agent = made("scst", VQA)
    rollout = MODULES["scst"].play(
        agent.policy, agent.get_env(), agent.settings.recipe, 7, torch.Generator().manual_seed(0)
    )
    observation, _ = agent.get_env().reset(seed=7)
    actions, _ = agent.predict(observation, deterministic=True)
    rewards = agent.get_env().step(actions)[1]
    np.testing.assert_allclose(rollout.greedy.returns, rewards)


# --- learning


def learned(monkeypatch, method, sign=1.0, steps=9000):
    if method == "dpo":
        true_pairs = dpo.pairs
        monkeypatch.setattr(dpo, "pairs", lambda returns: true_pairs(sign * returns))
        more = {"learning_rate": 1e-2}
    else:
        true = grpo.advantages_of
        monkeypatch.setattr(grpo, "advantages_of", lambda *arguments: sign * true(*arguments))
        more = {"learning_rate": 3e-3}
    recipe = dataclasses.replace(RECIPES[method], num_envs=64, minibatches=4, **more)
    agent = make_agent(recall(64), recipe, method=method)
    agent.learn(steps)
    final = collect(agent.policy, agent.get_env(), 9, 24, torch.Generator().manual_seed(0))
    return final.returns.mean()


@pytest.mark.parametrize("method", LEARNERS)
def test_it_learns_to_remember(monkeypatch, method):
    # Pairs tell less than returns do: with 9,000 steps one seed in four is still on its way.
    assert learned(monkeypatch, method, steps=15_000 if method == "dpo" else 9000) > 0.6


@pytest.mark.parametrize("method", ["rloo", "dpo"])
def test_it_does_not_with_the_sign_flipped(monkeypatch, method):
    assert learned(monkeypatch, method, -1.0, 4000) < 0.25


def test_cloning_comes_to_say_what_the_oracle_says():
    agent = made("supervised", CAPTIONING)
    rollout = supervised.play(agent.policy, agent.get_env(), quick("supervised"), 0, torch.Generator())
    assert (rollout.returns == 1.0).all() and rollout.successes.all()
    before, _ = supervised.part_loss(agent.policy, rollout, torch.arange(len(rollout.returns)))
    agent.learn(3000)
    after, _ = supervised.part_loss(agent.policy, rollout, torch.arange(len(rollout.returns)))
    assert after < 0.7 * before


def test_cloning_needs_an_oracle():
    with pytest.raises(TypeError, match=r"oracle_actions\(\)"):
        make_agent(recall(8), quick("supervised"), method="supervised").learn(10)


# --- warm starts, references and checkpoints


@pytest.mark.parametrize("method", ["grpo", "dpo", "ppo"])
def test_an_agent_begins_with_another_and_goes_on_bit_by_bit(tmp_path, method):
    base = made("supervised")
    base.learn(64, out=tmp_path / "base")
    pull = {} if method == "dpo" else {"kl": 0.02, "kl_target": 0.01}
    restraints = Restraints(**pull, limits={"hallucination": 0.0}, penalties={"length": 0.1})
    agent = TransformerAgent(
        CAPTIONING, init=tmp_path / "base", method=method, recipe=quick(method), device="cpu",
        env_kwargs=SMALL, restraints=restraints, precision="float32",
    )  # fmt: skip
    assert all(
        torch.equal(a, b) for a, b in zip(agent.policy.parameters(), base.policy.parameters(), strict=True)
    )
    agent.learn(200, out=tmp_path / "agent")
    assert agent.coefficients["hallucination"] > 0
    assert method == "dpo" or agent.coefficients["kl"] != 0.02
    again = TransformerAgent.load(tmp_path / "agent", device="cpu")
    assert again.settings == agent.settings and again.coefficients == agent.coefficients
    agent.learn(400)
    again.learn(400)
    for one, other in ((agent.policy, again.policy), (agent.reference, again.reference)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    reference = zip(agent.reference.parameters(), base.policy.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in reference)
    assert agent.coefficients == again.coefficients


def test_the_reference_has_the_temperature_of_the_policy(tmp_path):
    agent = made("grpo", temperature=2.0, restraints=Restraints(kl=0.1))
    agent.save(tmp_path)
    for each in (agent, TransformerAgent.load(tmp_path, device="cpu")):
        rollout = collect(each.policy, each.get_env(), 0, 1, torch.Generator().manual_seed(0))
        valid = rollout.episodes.valid
        known = log_probs_of(each.reference, rollout.episodes)
        torch.testing.assert_close(known[valid], rollout.log_probs[valid], atol=1e-5, rtol=1e-5)
    begun = TransformerAgent(CAPTIONING, init=tmp_path, device="cpu", env_kwargs=SMALL)
    assert begun.settings.temperature == 2.0


def test_the_pull_holds_the_policy_to_its_reference():
    far = {}
    for kl in (0.0, 1.0):
        recipe = dataclasses.replace(RECIPES["rloo"], num_envs=64, learning_rate=3e-3)
        agent = make_agent(recall(64), recipe, method="rloo", restraints=Restraints(kl=kl))
        start = agent.reference or make_agent(recall(64), recipe, method="rloo").policy
        agent.learn(5000)
        rollout = collect(agent.policy, agent.get_env(), 9, 3, torch.Generator().manual_seed(0))
        valid = rollout.episodes.valid
        others = log_probs_of(start, rollout.episodes)[valid]
        far[kl] = float((rollout.log_probs[valid] - others).mean())
    assert far[1.0] < 0.5 * far[0.0]


def test_an_agent_of_another_joint_embedding_is_refused(tmp_path):
    joint = tmp_path / "joint.safetensors"

    def write(seed):
        torch.manual_seed(seed)
        save_joint(JointEmbedding(JointConfig(width=8, dim=8, text_depth=1)), joint, {})

    write(0)
    made("supervised", encoders={"image": f"joint:{joint}"}).save(tmp_path / "agent")
    TransformerAgent.load(tmp_path / "agent", device="cpu")
    write(1)
    for make in (
        lambda: TransformerAgent.load(tmp_path / "agent", device="cpu"),
        lambda: TransformerAgent(CAPTIONING, init=tmp_path / "agent", device="cpu", env_kwargs=SMALL),
    ):
        with pytest.raises(ValueError, match="encoder of 'image' was trained on the joint embedding"):
            make()


# --- restraints


def test_penalties_and_multipliers_are_taken_from_the_last_reward():
    agent = made("grpo")
    rollout = grpo.play(agent.policy, agent.get_env(), quick("grpo"), 0, torch.Generator().manual_seed(0))
    restraints = Restraints(penalties={"length": 0.5}, limits={"hallucination": 0.25})
    paid = restraints.apply(rollout, {"kl": 0.0, "hallucination": 2.0})
    last = rollout.episodes.lengths - 1
    taken = 0.5 * rollout.parts["length"] + 2.0 * rollout.parts["hallucination"]
    expected = rollout.rewards.clone()
    for row, time in enumerate(last):
        expected[row, time] -= taken[row]
    torch.testing.assert_close(paid.rewards, expected)
    assert Restraints().apply(rollout, {}) is rollout
    rate = rollout.parts["hallucination"].mean()
    new = restraints.adapt({"kl": 0.0, "hallucination": 2.0}, rollout, {})
    assert new["hallucination"] == pytest.approx(2.0 + rate - 0.25)
    assert restraints.adapt({"kl": 0.0, "hallucination": 0.0}, rollout, {})["hallucination"] == pytest.approx(
        max(0.0, rate - 0.25)
    )


def test_the_adaptive_coefficient_follows_its_target():
    restraints = Restraints(kl=0.1, kl_target=0.02)
    for kl, factor in ((1.0, 1.02), (0.0, 0.98), (0.021, 1.005)):
        assert restraints.adapt({"kl": 0.1}, None, {"train/reference_kl": kl})["kl"] == pytest.approx(
            0.1 * factor
        )


class Rollouts:
    """What an alarm needs of an agent and its rollouts."""

    def __init__(self, monkeypatch):
        self.scores = []
        self.num_timesteps = 0
        monkeypatch.setattr(HackingAlarm, "_look", lambda alarm, agent: agent.scores[-1])

    def after(self, alarm, paid, score):
        generator = np.random.default_rng(0)
        self.scores.append(score + 0.1 * generator.standard_normal(200))
        self.num_timesteps += 100
        rewards = torch.as_tensor(paid + 0.1 * generator.standard_normal((200, 1)))
        return alarm(self, type("Paid", (), {"rewards": rewards}))


def test_the_alarm_rings_only_when_reward_and_held_out_score_part(monkeypatch):
    for story, rings in (
        ([(0.1, 0.1), (0.5, 0.5), (0.9, 0.9)], False),
        ([(0.1, 0.5), (0.1, 0.3)], False),
        ([(0.1, 0.5), (0.9, 0.49)], False),
        ([(0.1, 0.5), (0.9, 0.3)], True),
    ):
        agent = Rollouts(monkeypatch)
        alarm = HackingAlarm(recall(2), "return", every=1, episodes=200)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            logs = [agent.after(alarm, *point) for point in story]
        assert bool(logs[-1]["held_out/alarm"]) is rings
        assert (alarm.rung is not None) is rings and bool(caught) is rings
    assert "reward hacking" in str(caught[0].message)


def test_the_alarm_looks_at_held_out_episodes(tmp_path):
    agent = made("grpo")
    envs = gym.make_vec(CAPTIONING, num_envs=8, split="val", **SMALL)
    alarm = HackingAlarm(envs, "cider", every=2, episodes=12)
    agent.learn(400, alarm=alarm, out=tmp_path)
    assert len(alarm.history) == agent.iteration // 2 > 0
    assert "held_out/cider" in (tmp_path / "progress_0.csv").read_text()


# --- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": 3}, "num_envs must be a multiple of group=3, got 256"),
        ({"group": 1}, "group must be 2 or more"),
        ({"baseline": "best"}, "baseline must be one of"),
        ({"length": "none"}, "length must be one of"),
        ({"clip": -0.1}, "clip must be from 0"),
        ({"minibatches": 0}, "minibatches must be"),
    ],
)
def test_bad_recipes(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(grpo.GRPORecipe(), **change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kl": -1.0}, "kl must be from 0 to 1e\\+06, got -1"),
        ({"kl_target": 0.1}, "kl must be over 0"),
        ({"limits": {"hallucination": -0.1}}, r"limits\['hallucination'\] must be"),
    ],
)
def test_bad_restraints(arguments, message):
    with pytest.raises(ValueError, match=message):
        Restraints(**arguments)


def test_bad_agents(tmp_path):
    with pytest.raises(TypeError, match=r"restraints must be Restraints\(\.\.\.\)"):
        make_agent(restraints={"kl": 0.1})
    with pytest.raises(TypeError, match="limits must be a dict"):
        Restraints(limits=["hallucination"])
    with pytest.raises(ValueError, match="there are none here"):
        made("grpo", VQA, restraints=Restraints(penalties={"repetition": 1.0}))
    with pytest.raises(ValueError, match="method must be one of 'ppo', 'grpo'"):
        make_agent(method="sarsa")
    with pytest.raises(TypeError, match="recipe must be a GRPORecipe with method='grpo', got DPORecipe"):
        make_agent(recipe=RECIPES["dpo"], method="grpo")
    with pytest.raises(ValueError, match=r"part of the score \(.*hallucination.*\), got 'beauty'"):
        made("grpo", restraints=Restraints(penalties={"beauty": 1.0}))
    with pytest.raises(ValueError, match="kl must be 0 with method='dpo'"):
        made("dpo", restraints=Restraints(kl=0.1))
    with pytest.raises(ValueError, match="supervised"):
        made("supervised", restraints=Restraints(kl=0.1))
    with pytest.raises(FileNotFoundError, match="no agent in"):
        TransformerAgent(CAPTIONING, init=tmp_path, device="cpu")
    with pytest.raises(TypeError, match="init must be the folder of a transformer agent, got 3"):
        TransformerAgent(CAPTIONING, init=3, device="cpu")
    made("supervised").save(tmp_path / "captions")
    with pytest.raises(ValueError, match="size is that of the agent in init"):
        TransformerAgent(CAPTIONING, "nano", init=tmp_path / "captions", device="cpu")
    with pytest.raises(ValueError, match="must be an agent of an environment with these"):
        TransformerAgent(VQA, init=tmp_path / "captions", device="cpu", env_kwargs=SMALL)
    with pytest.raises(ValueError, match="'beauty' must be a part of the score"):
        make_agent(
            recall(8), quick("grpo"), method="grpo", restraints=Restraints(penalties={"beauty": 1.0})
        ).learn(9)
