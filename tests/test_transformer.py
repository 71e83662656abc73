"""The transformer policy: sizes, actions, and that steps with a cache equal the pass over whole episodes."""

import os
import shutil
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from mmenvs_agents.transformer import model, prepared
from mmenvs_agents.transformer.actions import action_head
from mmenvs_agents.transformer.config import SIZES, ModelConfig
from mmenvs_agents.transformer.model import Cache, Episodes, TransformerPolicy

from mmenvs.embeddings.fusion import FUSIONS
from mmenvs.registry import SPECS

TINY = ModelConfig(width=32, layers=2, heads=4, kv_heads=2, hidden=32, token_width=16)
SPACE = spaces.Dict(
    {
        "picture": spaces.Box(0, 255, (32, 32, 3), np.uint8),
        "asked": spaces.Box(0, 9, (5,), np.int64),
        "told": spaces.Box(0, 9, (4,), np.int64),
        "pose": spaces.Box(-2.0, 2.0, (3,), np.float32),
        "said": spaces.Box(0, 6, (8,), np.int64),
    }
)
ACTIONS = {
    "discrete": spaces.Discrete(6, start=-2),
    "multi": spaces.MultiDiscrete([3, 2, 4]),
    "box": spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 5.0], np.float32)),
}
# Every kind of layout: prefix alone, prefix and steps, steps alone.
LAYOUTS = {
    "fixed": ("picture", "asked", "told", "pose"),
    "both": ("picture", "asked"),
    "none": (),
}


def make_policy(layout="both", actions="discrete", seed=0, fusion="concat"):
    torch.manual_seed(seed)
    policy = TransformerPolicy(SPACE, ACTIONS[actions], TINY, LAYOUTS[layout], ("said",), fusion=fusion)
    torch.nn.init.normal_(policy.actor.out.weight, std=0.3)
    torch.nn.init.normal_(policy.critic.weight, std=0.3)
    return policy


def observations(shape, seed=0):
    """Random observations ``(*shape, ...)``; texts end in padding."""
    generator = np.random.default_rng(seed)
    drawn = {}
    for name, space in SPACE.items():
        if space.dtype == np.float32:
            x = generator.normal(size=(*shape, *space.shape)).astype(np.float32)
        else:
            x = generator.integers(1, int(space.high.max()) + 1, (*shape, *space.shape)).astype(space.dtype)
        if space.dtype == np.int64:
            words = generator.integers(1, space.shape[0] + 1, shape)
            x = np.where(np.arange(space.shape[0]) < words[..., None], x, 0)
        drawn[name] = torch.as_tensor(x)
    return drawn


def make_episodes(policy, lengths, seed=0):
    batch, longest = len(lengths), max(lengths)
    seen = observations((batch, longest), seed)
    generator = torch.Generator().manual_seed(seed)
    actions = policy.actor.sample(torch.zeros(batch, longest, policy.actor.outputs), generator)
    return Episodes(
        {name: seen[name][:, 0] for name in policy.fixed},
        {name: seen[name] for name in policy.changing},
        actions,
        torch.tensor(lengths),
    )


def played(policy, episodes, cache=None):
    """What the steps with a cache give for the episodes, all side by side."""
    batch, longest, _ = episodes.actions.shape
    cache = policy.cache(batch) if cache is None else cache
    described, values = [], []
    for t in range(longest):
        observation = {**episodes.fixed, **{name: x[:, t] for name, x in episodes.steps.items()}}
        previous = episodes.actions[:, t - 1]
        d, v = policy.step(cache, observation, previous, torch.full((batch,), t == 0))
        described.append(d)
        values.append(v)
    return torch.stack(described, 1), torch.stack(values, 1)


@pytest.mark.parametrize(("size", "millions"), [("nano", 1), ("small", 10), ("base", 90)])
def test_sizes_have_the_parameters_they_say(size, millions):
    env = gym.make("MMRL/VQA-v0")
    policy = TransformerPolicy(env.observation_space, env.action_space, SIZES[size], ("image", "question"))
    assert set(policy.fusions) == {"fixed"}
    count = sum(parameter.numel() for parameter in policy.parameters())
    assert 0.85 * millions < count / 1e6 < 1.1 * millions
    assert not list(policy.extractor.fusion.parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("actions", "fusion"),
    [
        *((actions, "concat") for actions in ACTIONS),
        *(("discrete", name) for name in ("attention", *FUSIONS)),
    ],
)
def test_steps_with_a_cache_equal_the_whole_pass(layout, actions, fusion):
    policy = make_policy(layout, actions, fusion=fusion)
    episodes = make_episodes(policy, [5, 1, 3, 5])
    described, values = policy(episodes)
    assert described.shape == (4, 5, policy.actor.outputs) and values.shape == (4, 5)
    stepped, stepped_values = played(policy, episodes)
    valid = episodes.valid
    whole, cached = (policy.actor.log_prob(d, episodes.actions)[valid] for d in (described, stepped))
    torch.testing.assert_close(whole, cached, atol=1e-5, rtol=1e-5 if actions == "box" else 0)
    torch.testing.assert_close(values[valid], stepped_values[valid], atol=1e-5, rtol=0)
    assert values[valid].std() > 0.05  # they would agree on a constant, too


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_comes_together_is_fused_beside_the_trunk(layout):
    """The fixed observations once, the changing ones in each step; the heads read it, so that it learns."""
    policy, without = make_policy(layout), make_policy(layout, fusion="attention")
    expected = {"fixed": {"fixed"}, "both": {"fixed", "changing"}, "none": {"changing"}}[layout]
    assert set(policy.fusions) == expected and not without.fusions
    without.load_state_dict({name: policy.state_dict()[name] for name in without.state_dict()})
    episodes = make_episodes(policy, [3, 2])
    values, plain = policy(episodes)[1], without(episodes)[1]
    assert (values - plain)[episodes.valid].abs().min() > 1e-3
    values[episodes.valid].square().sum().backward()
    assert all(weight.grad.abs().max() > 0 for weight in policy.fusions.parameters())


def test_a_prompt_is_read_once_for_its_answers():
    policy = make_policy("fixed")
    episodes = make_episodes(policy, [3, 1, 2, 2, 3, 1])
    prompts = torch.tensor([0, 0, 0, 1, 1, 1])
    fixed = {name: x[prompts] for name, x in episodes.fixed.items()}
    grouped = Episodes(fixed, {}, episodes.actions, episodes.lengths)
    valid = grouped.valid
    for one, other in zip(policy(grouped, 3), policy(grouped), strict=True):
        torch.testing.assert_close(one[valid], other[valid], atol=1e-5, rtol=1e-4)
    assert (policy(grouped)[1][0, 0] - policy(grouped)[1][3, 0]).abs() > 1e-3  # the prompts differ


def test_one_observation_has_nothing_to_be_fused_with():
    space = spaces.Dict({"picture": SPACE["picture"], "said": SPACE["said"]})
    policies = []
    for fusion in ("attention", "concat"):
        torch.manual_seed(0)
        policies.append(
            TransformerPolicy(space, ACTIONS["discrete"], TINY, ("picture",), ("said",), fusion=fusion)
        )
        torch.nn.init.normal_(policies[-1].critic.weight, std=0.3)
    episodes = make_episodes(policies[0], [4, 2])
    without, fused = (policy(episodes)[1] for policy in policies)
    assert torch.equal(without, fused) and policies[0].state_dict().keys() == policies[1].state_dict().keys()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("precision", "packed"), [("float32", True), ("bfloat16", True), ("bfloat16", False)]
)
def test_weights_are_made_ready_once_in_a_rollout_and_anew_when_they_change(
    monkeypatch, layout, precision, packed
):
    if packed and not prepared.can_pack(torch.device("cpu"), getattr(torch, precision)):
        pytest.skip("weights are packed on x86 processors only, in bfloat16 on those that multiply it")
    monkeypatch.setattr(prepared, "can_pack", lambda device, dtype: packed)
    policy = make_policy(layout)
    policy.precision = policy.extractor.precision = precision
    episodes = make_episodes(policy, [5, 1, 3, 5])
    assert policy.cache(4).prepared is None
    cache = policy.cache(4, rollout=True)
    # Packed weights may be added up in another order.
    near = {"rtol": 0.0, "atol": 1e-5 if packed else 0.0}
    for _ in range(2):
        each, once = played(policy, episodes), played(policy, episodes, cache)
        torch.testing.assert_close(once, each, **near)
        blocks = cache.prepared.blocks
        assert played(policy, episodes, cache.take(torch.arange(4)))[1].equal(once[1])
        assert cache.prepared.blocks is blocks  # still the same
        assert isinstance(blocks[0], prepared.PackedBlock) == packed
        with torch.no_grad():
            for weight in policy.blocks.parameters():
                weight.mul_(1.5)
        assert not torch.allclose(played(policy, episodes)[1], each[1], **near)
    assert all(weight.dtype == torch.float32 for weight in policy.parameters())
    monkeypatch.setattr(prepared, "can_pack", lambda device, dtype: False)
    policy.precision = policy.extractor.precision = "float32"
    assert policy.cache(4, rollout=True).prepared is None


def test_half_precision_plays_on_processors_without_arithmetic_for_it():
    code = (
        "from mmenvs_agents.transformer.agent import TransformerAgent; "
        "TransformerAgent('MMRL/VQA-v0', precision='bfloat16', device='cpu', encoders={}).learn(8)"
    )
    narrow = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    subprocess.run([sys.executable, "-c", code], env=narrow, check=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rollout", [False, True])
@pytest.mark.parametrize("at_once", [1, model.AT_ONCE])
def test_rows_of_a_cache_begin_anew_at_different_steps(monkeypatch, layout, rollout, at_once):
    """Two episodes one after the other in each of four rows equal each by itself, also where rows that don't follow each
    other begin, and where they are begun one at a time."""
    monkeypatch.setattr(model, "AT_ONCE", at_once)
    policy = make_policy(layout)
    lengths = [3, 3, 1, 5, 3, 3, 2, 4]
    episodes = make_episodes(policy, lengths)
    _, alone = policy(episodes)
    cache, got = policy.cache(4, rollout=rollout), {}
    plan = [[(e, t) for e in (row, row + 1) for t in range(lengths[e])] for row in range(0, 8, 2)]
    for now in zip(*plan, strict=True):
        e, t = (torch.tensor(column) for column in zip(*now, strict=True))
        observation = {name: x[e] for name, x in episodes.fixed.items()}
        observation |= {name: x[e, t] for name, x in episodes.steps.items()}
        _, values = policy.step(cache, observation, episodes.actions[e, t - 1], t == 0)
        got.update(zip(now, values.tolist(), strict=True))
    for (e, t), value in got.items():
        assert value == pytest.approx(alone[e, t].item(), abs=1e-5)
    assert len(got) == sum(lengths)


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 2**31))
def test_padding_never_leaks(lengths, seed):
    policy = make_policy()
    episodes = make_episodes(policy, lengths, seed)
    _, values = policy(episodes)
    other = make_episodes(policy, [6] * len(lengths), seed + 1)  # longer, and full of other things
    padded = Episodes(dict(episodes.fixed), {}, other.actions.clone(), episodes.lengths)
    valid = torch.arange(6) < episodes.lengths[:, None]
    inside = episodes.valid
    padded.actions[valid] = episodes.actions[inside]
    for name, x in other.steps.items():
        padded.steps[name] = x.clone()
        padded.steps[name][valid] = episodes.steps[name][inside]
    torch.testing.assert_close(policy(padded)[1][valid], values[inside], atol=1e-5, rtol=1e-4)
    order = torch.randperm(len(lengths))
    torch.testing.assert_close(
        policy(padded.take(order))[1][inside[order][:, : int(episodes.lengths.max())]],
        values[order][inside[order]], atol=1e-5, rtol=1e-4,
    )  # fmt: skip
    for row, length in enumerate(lengths):
        alone = policy(episodes.take(torch.tensor([row])))[1]
        torch.testing.assert_close(alone[0], values[row, :length], atol=1e-5, rtol=1e-4)


def test_the_past_matters_and_the_future_does_not():
    policy = make_policy()
    episodes = make_episodes(policy, [5])
    _, before = policy(episodes)
    episodes.actions[0, 2] = (episodes.actions[0, 2] + 1) % 6
    _, after = policy(episodes)
    assert torch.equal(before[:, :3], after[:, :3])
    assert (before[:, 3:] - after[:, 3:]).abs().min() > 1e-4


def test_prefix_tokens_see_each_other_in_both_directions():
    """A later observation of the prefix changes what the first token of it passes on."""
    policy = make_policy("fixed")
    episodes = make_episodes(policy, [1])
    seen = []
    policy.blocks[0].register_forward_hook(lambda module, args, out: seen.append(out[:, 0].detach()))
    policy(episodes)
    episodes.fixed["pose"] += 1.0
    policy(episodes)
    assert (seen[0] - seen[1]).abs().max() > 1e-3


def test_a_cache_gives_groups():
    """One prompt, read once, and different answers to it."""
    policy = make_policy("fixed")
    episodes = make_episodes(policy, [3, 3])
    _, whole = policy(episodes)
    first = Episodes(
        {n: x[:1] for n, x in episodes.fixed.items()}, {}, episodes.actions[:1], torch.ones(1).long()
    )
    cache = policy.cache(1)
    policy.step(cache, first.fixed, first.actions[:, 0], torch.ones(1, dtype=torch.bool))
    group = cache.take(torch.zeros(2, dtype=torch.int64))
    assert isinstance(group, Cache) and group.rows == 2 and cache.rows == 1
    same = Episodes({n: x[[0, 0]] for n, x in episodes.fixed.items()}, {}, episodes.actions, episodes.lengths)
    _, expected = policy(same)
    for t in (1, 2):
        _, values = policy.step(group, same.fixed, same.actions[:, t - 1], torch.zeros(2, dtype=torch.bool))
        torch.testing.assert_close(values, expected[:, t], atol=1e-5, rtol=0)
    assert not torch.allclose(expected[1], whole[1], atol=1e-3)


@pytest.mark.parametrize("id", SPECS)
def test_every_task_is_a_prefix_and_a_token_a_step(id):
    envs = gym.make_vec(id, num_envs=2)
    task = envs.task
    policy = TransformerPolicy(
        envs.single_observation_space, envs.single_action_space, TINY, task.fixed, task.history
    )
    assert policy.step_tokens == 1 and policy.prefix_tokens > 0


@pytest.mark.parametrize("name", ["discrete", "multi"])
def test_categorical_heads(name):
    torch.manual_seed(0)
    head = action_head(ACTIONS[name], 8)
    described = torch.randn(1, head.outputs).expand(20_000, -1)
    raw = head.sample(described, torch.Generator().manual_seed(0))
    assert raw.dtype == head.dtype and raw.shape == (20_000, head.size)
    estimate = -head.log_prob(described, raw).mean()
    torch.testing.assert_close(estimate, head.entropy(described)[0], atol=0.03, rtol=0)
    actions = head.to_env(raw)
    assert all(ACTIONS[name].contains(action) for action in actions[:50])
    likely = head.sample(described[:1], None)
    assert head.log_prob(described[:1], likely) >= head.log_prob(described, raw).max()


def test_squashed_gaussians():
    space = ACTIONS["box"]
    head = action_head(space, 8)
    described = torch.tensor([[0.5, -0.3, -0.2, 0.4]]).expand(50_000, -1)
    raw = head.sample(described, torch.Generator().manual_seed(0))
    actions = head.to_env(raw)
    assert all(space.contains(action) for action in actions[:50])
    normal = torch.distributions.Normal(described[:, :2].double(), described[:, 2:].double().exp())
    tanh = torch.distributions.TanhTransform()
    low, high = torch.as_tensor(space.low).double(), torch.as_tensor(space.high).double()
    scale = torch.distributions.AffineTransform((low + high) / 2, (high - low) / 2)
    reference = torch.distributions.TransformedDistribution(normal, [tanh, scale])
    expected = reference.log_prob(scale(tanh(raw.double()))).sum(-1).float()
    inside = (raw.abs() < 3).all(-1)  # beyond, the reference can't invert its tanh
    torch.testing.assert_close(head.log_prob(described, raw)[inside], expected[inside], atol=1e-4, rtol=1e-4)
    estimate = -head.log_prob(described, raw).mean()
    torch.testing.assert_close(head.entropy(described)[0], estimate, atol=0.02, rtol=0)
    far = head.log_prob(described[:1], torch.tensor([[30.0, -30.0]]))
    assert torch.isfinite(far).all()


def test_what_is_forbidden_is_never_drawn(monkeypatch):
    head = action_head(spaces.Discrete(4), 8)
    described = torch.tensor([[-1e9, 0.0, -1e9, -1e9], [0.0, -1e9, -1e9, 0.0]])
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.zeros(shape))  # once in 16 million draws
    assert head.sample(described, torch.Generator()).flatten().tolist() == [1, 0]


def test_action_masks():
    head = action_head(ACTIONS["multi"], 8)
    mask = torch.tensor([True, False, True, False, True, True, True, False, False]).expand(500, -1)
    described = head(torch.randn(500, 8), mask)
    raw = head.sample(described, torch.Generator().manual_seed(0))
    assert set(raw[:, 0].tolist()) == {0, 2} and set(raw[:, 1].tolist()) == {1}
    assert set(raw[:, 2].tolist()) == {0, 1}
    assert torch.isfinite(head.entropy(described)).all()
    assert (head.entropy(described) <= np.log(4) + 1e-5).all()
    with pytest.raises(ValueError, match="action mask"):
        head(torch.randn(2, 8), mask)
    with pytest.raises(ValueError, match="Box"):
        action_head(ACTIONS["box"], 8)(torch.randn(500, 8), mask)


def test_what_does_not_fit_is_refused():
    for wrong, message in (
        ({"width": 30}, "width must be a multiple"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads=3"),
        ({"layers": 0}, "layers must be from 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ModelConfig(**wrong)
    with pytest.raises(TypeError, match="Dict"):
        TransformerPolicy(SPACE["pose"], ACTIONS["box"], TINY)
    with pytest.raises(TypeError, match="Discrete, MultiDiscrete or Box"):
        TransformerPolicy(SPACE, spaces.MultiBinary(3), TINY)
    with pytest.raises(ValueError, match="finite bounds"):
        TransformerPolicy(SPACE, spaces.Box(-np.inf, np.inf, (2,)), TINY)
    with pytest.raises(ValueError, match="fixed must be one of"):
        TransformerPolicy(SPACE, ACTIONS["box"], TINY, ("sound",))
    with pytest.raises(ValueError, match="history must leave"):
        TransformerPolicy(SPACE, ACTIONS["box"], TINY, (), tuple(SPACE))
    with pytest.raises(ValueError, match="fusion must be one of 'concat', 'weighted_sum'"):
        TransformerPolicy(SPACE, ACTIONS["box"], TINY, fusion="glue")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # from within the compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_compiled_trunk_equals_the_eager_one():
    torch.manual_seed(0)
    policy = TransformerPolicy(
        SPACE, ACTIONS["discrete"], replace(TINY, layers=1), LAYOUTS["both"], ("said",)
    )
    torch.nn.init.normal_(policy.critic.weight, std=0.3)
    batches = [make_episodes(policy, lengths, seed) for seed, lengths in enumerate(([5, 1, 3, 5], [2, 4, 3]))]

    def results():
        values = [policy(episodes)[1] for episodes in batches]
        policy.zero_grad()
        sum(v.square().sum() for v in values).backward()
        return [*values, policy.blocks[0].query.weight.grad.clone()]

    eager = results()
    policy.compile_trunk()
    twin = deepcopy(policy)
    for one, other in zip(results(), eager, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    torch.nn.init.normal_(twin.critic.weight)
    twin.norm.weight.data *= 2  # a copy runs its own weights
    assert (twin(batches[0])[1] - eager[0]).abs().max() > 1e-2
    before = twin(batches[0])[1]
    torch.nn.init.zeros_(policy.norm.weight)
    assert (policy(batches[0])[1] - eager[0]).abs().max() > 1e-2
    assert torch.equal(twin(batches[0])[1], before)


def test_half_precision_keeps_distributions_whole():
    torch.manual_seed(0)
    policy = TransformerPolicy(
        SPACE, ACTIONS["discrete"], TINY, LAYOUTS["both"], ("said",), precision="bfloat16"
    )
    described, values = policy(make_episodes(policy, [2, 3]))
    assert described.dtype == values.dtype == torch.float32
