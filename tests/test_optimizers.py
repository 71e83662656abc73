"""Muon: orthogonal steps for weight matrices, Adam's for everything else."""

import copy

import pytest
import torch
from mmenvs_agents.sb3 import make_agent
from torch import nn

from mmenvs.embeddings.optimizers import Muon, load_state_tensors, orthogonalised, state_tensors


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.LayerNorm(288), nn.Linear(288, 16), nn.Linear(16, 4)
    )


def loss(net: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return net(torch.rand(32, 3, 8, 8, generator=generator)).square().mean()


@pytest.mark.parametrize("shape", [(16, 16), (8, 200), (200, 8), (1, 5)])
def test_singular_values_come_close_to_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(matrix))
    assert values.min() > 0.5 and values.max() < 1.4


def test_what_is_no_hidden_matrix_steps_as_in_adam() -> None:
    ours, theirs = network(), network()
    optimizer = Muon(ours, heads=[ours[5]], lr=1e-2)
    others = [theirs[0].bias, *theirs[3].parameters(), theirs[4].bias, *theirs[5].parameters()]
    reference = torch.optim.Adam(others, 1e-2)
    for net, steps in ((ours, optimizer), (theirs, reference)):
        loss(net).backward()
        steps.step()
    assert not torch.equal(ours[0].weight, theirs[0].weight)
    torch.testing.assert_close(ours[0].bias, theirs[0].bias)
    torch.testing.assert_close(ours[3].weight, theirs[3].weight)
    torch.testing.assert_close(ours[5].weight, theirs[5].weight)


def test_matrices_step_as_in_torchs_muon() -> None:
    ours, theirs = nn.Linear(40, 24), nn.Linear(40, 24)
    theirs.load_state_dict(ours.state_dict())
    reference = torch.optim.Muon([theirs.weight], lr=0.02, weight_decay=0.0)
    optimizer = Muon(ours, lr=1e-3, ratio=20.0)
    x = torch.randn(16, 40, generator=torch.Generator().manual_seed(2))
    for _ in range(3):
        for net, steps in ((ours, optimizer), (theirs, reference)):
            net.zero_grad()
            net(x).square().mean().backward()
            net.bias.grad = None
            steps.step()
    # Theirs iterates in bfloat16.
    torch.testing.assert_close(ours.weight, theirs.weight, atol=2e-3, rtol=0.05)


def test_the_loss_falls_and_a_saved_state_goes_on_the_same() -> None:
    net = network()
    optimizer = Muon(net, lr=1e-3)
    before = loss(net).item()
    for _ in range(10):
        optimizer.zero_grad()
        loss(net).backward()
        optimizer.step()
    assert loss(net).item() < 0.5 * before
    twin = copy.deepcopy(net)
    other = Muon(twin, lr=1e-3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for module, steps in ((net, optimizer), (twin, other)):
        steps.zero_grad()
        loss(module).backward()
        steps.step()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_of_other_parameters_is_refused() -> None:
    net = network()
    optimizer = Muon(net)
    loss(net).backward()
    optimizer.step()
    tensors = state_tensors(optimizer)
    load_state_tensors(Muon(network()), tensors)
    with pytest.raises(ValueError, match="state 0 is of another parameter"):
        load_state_tensors(Muon(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))), tensors)


def test_frozen_parameters_are_left_out() -> None:
    net = network().requires_grad_(False)
    net[5].requires_grad_(True)
    optimizer = Muon(net, heads=[net[5]])
    assert [group["muon"] for group in optimizer.param_groups] == [False]


def test_layers_with_one_output_take_steps_of_adam() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    matrices, others = Muon(net).param_groups
    assert [p.shape for p in matrices["params"]] == [(2, 3)]
    assert [p.shape for p in others["params"]] == [(2,), (1, 2), (1,)]


@pytest.mark.parametrize("algo", ["ppo", "a2c"])
def test_recipes_use_it_for_all_but_the_heads(algo: str) -> None:
    agent = make_agent(algo, "MMRL/VQA-v0", num_envs=8, device="cpu")
    matrices, others = agent.policy.optimizer.param_groups
    assert matrices["muon"] and not others["muon"]
    heads = {id(agent.policy.action_net.weight), id(agent.policy.value_net.weight)}
    assert heads <= {id(p) for p in others["params"]}
    assert len(matrices["params"]) + len(others["params"]) == len(list(agent.policy.parameters()))
