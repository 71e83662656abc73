"""Learning in several processes: two on the CPU take the steps that one with all the rows takes."""

import os
import re
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmenvs_agents.transformer.agent import TransformerAgent
from mmenvs_agents.transformer.devices import ALONE, Devices
from typer.testing import CliRunner

from mmenvs.cli import app
from tests.tiny_transformer import SMALL, VQA, make_agent

TOGETHER = """
import contextlib, copy, dataclasses, glob, sys, time
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
from mmenvs_agents.transformer import ppo
from mmenvs_agents.transformer.episodes import Episodes
from mmenvs_agents.transformer.imitation import EpisodeMemory
from mmenvs_agents.transformer.rollout import Rollout, collect
from tests.tiny_transformer import CAPTIONING, QUICK, make_agent

recipe = ppo.PPORecipe(num_envs=8, rollout_steps=6, epochs=2, minibatches=1, accumulate=2, value_clip=0.0, target_kl=0.0)
agent = make_agent(CAPTIONING, recipe)
devices, policy = agent.devices, agent.policy
assert devices.count == 2 and agent.n_envs == 8 and agent.get_env().num_envs == 4
policy.actor.out.bias.data[3] = 3.0  # captions end early, and at different lengths

def play(rank):
    return collect(policy, agent.get_env(), 5 + 4 * rank, 6, torch.Generator().manual_seed(rank))

mine, both = play(devices.rank), [play(0), play(1)]
assert len(both[0].bootstrap) != len(both[1].bootstrap)
longest = max(r.rewards.shape[1] for r in both)

def joined(get):
    parts = [get(r) for r in both]
    if parts[0].dim() > 1 and parts[0].shape[1] != parts[1].shape[1]:
        parts = [F.pad(p, [0, 0] * (p.dim() - 2) + [0, longest - p.shape[1]]) for p in parts]
    return torch.cat(parts)

episodes = Episodes(
    {"image": joined(lambda r: r.episodes.fixed["image"])}, {},
    joined(lambda r: r.episodes.actions), joined(lambda r: r.episodes.lengths),
)
whole = Rollout(
    episodes, joined(lambda r: r.log_probs), joined(lambda r: r.values), joined(lambda r: r.rewards),
    joined(lambda r: r.bootstrap), np.concatenate([r.returns for r in both]), None, {},
)

def updated(rollout, recipe=recipe, **given):
    twin = copy.deepcopy(policy)
    optimizer = torch.optim.SGD(twin.parameters())
    gradients = []
    optimizer.step = lambda: gradients.append([p.grad.clone() for p in twin.parameters() if p.grad is not None])
    log = ppo.update(twin, optimizer, rollout, recipe, 1.0, torch.Generator().manual_seed(0), **given)
    return gradients, log

together, log = updated(mine, devices=devices)
alone, expected = updated(whole)
assert len(together) == len(alone) == 2
for some, all_ in zip(together, alone, strict=True):
    assert max(float(g.abs().max()) for g in all_) > 1e-3
    for one, other in zip(some, all_, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
for name, value in expected.items():
    assert abs(log[name] - value) < 1e-5, name
other = updated(mine)[0]  # what this process has alone is something else
assert max(float((a - b).abs().max()) for a, b in zip(other[0], alone[0], strict=True)) > 1e-4

# The same with episodes to imitate, each process its own.
class Given(EpisodeMemory):
    def __init__(self, rollout):
        self.episodes, self.returns = rollout.episodes, rollout.values + 0.5

    def __len__(self):
        return len(self.returns)

    def store(self, *_):
        pass

    def draw(self, *_):
        return self.episodes, self.returns

once = dataclasses.replace(recipe, accumulate=1)
together, log = updated(mine, once, devices=devices, memory=Given(mine))
(first, second), expected = updated(whole, once, memory=Given(whole))
assert max(float((a - b).abs().max()) for a, b in zip(first, alone[0], strict=True)) > 1e-3  # imitation counts
for some, all_ in zip(together, (first, second), strict=True):
    for one, other in zip(some, all_, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
assert abs(log["train/imitation_loss"] - expected["train/imitation_loss"]) < 1e-5

# Whole iterations, in minibatches that not all processes could fill.
agent = make_agent(CAPTIONING, dataclasses.replace(QUICK, rollout_steps=1, minibatches=8))
agent.policy.critic.bias.data.fill_(-1.0)  # so that much goes better than expected
agent.learn(100, out=sys.argv[1], checkpoint_steps=1)
weights = torch.cat([p.detach().flatten() for p in agent.policy.parameters()])
everywhere = devices.gathered(torch.tensor([weights.double().sum().item(), agent.num_timesteps], dtype=torch.float64))
assert (everywhere[:2] == everywhere[2:]).all() and agent.num_timesteps >= 100
# All remember the same episodes, and each draws others of them.
memory, count = agent.memory, len(agent.memory)
held = devices.gathered(memory.tensors["returns"])
assert count and torch.equal(held[:count], held[count:])
drawn = devices.gathered(memory.draw(50, torch.Generator().manual_seed(0), devices)[1].sum(1))
assert not torch.equal(drawn[:50], drawn[50:])
again = type(agent).load(sys.argv[1], device="cpu")
further = agent.num_timesteps + 20
again.learn(further)
agent.learn(further)
assert all(torch.equal(a, b) for a, b in zip(agent.policy.parameters(), again.policy.parameters(), strict=True))
# Devices by themselves.
assert devices.least(devices.rank) == 0 and devices.any(devices.rank == 1) and not devices.any(False)
assert devices.gathered(torch.arange(devices.rank + 1)).tolist() == [0, 0, 1]
try:
    devices.share(7)
except ValueError as error:
    assert "multiple of the 2 processes, got 7" in str(error)
# None of the group's threads is left to abort the process at its end.
def threads():
    found = []
    for name in glob.glob("/proc/self/task/*/comm"):
        with contextlib.suppress(OSError):
            found.append(Path(name).read_text().strip())
    return found
assert sys.platform != "linux" or "pt_gloo_runloop" in threads()
torch.distributed.destroy_process_group()
for _ in range(50):
    if "pt_gloo_runloop" not in threads():
        break
    time.sleep(0.1)
assert "pt_gloo_runloop" not in threads()
print(f"process {devices.rank} is done", flush=True)
"""


def launch(*arguments):
    """Exit code and output of what two processes on the CPU run."""
    options = ("--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no")
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "--dynamo_backend=no"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), os.getcwd()]),
    }
    for _ in range(3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        given = [f"--main_process_port={port}", *map(str, arguments)]
        done = subprocess.run([*command, *given], capture_output=True, text=True, env=environment)
        said = done.stdout + done.stderr
        # Another process may have taken the port in between.
        if done.returncode == 0 or not re.search("EADDRINUSE|address already in use", said, re.IGNORECASE):
            break
    return done.returncode, said


@pytest.mark.slow
def test_gradients_of_two_processes_are_those_of_one_with_all_the_rows(tmp_path):
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    code, said = launch(script, tmp_path / "agent")
    assert code == 0, said
    assert "process 0 is done" in said and "process 1 is done" in said
    assert len(list((tmp_path / "agent").glob("progress_*.csv"))) == 1


@pytest.mark.slow
def test_on_the_command_line(tmp_path):
    out = tmp_path / "vqa"
    code, said = launch(
        "-m",
        "mmenvs",
        "train",
        VQA,
        "--agent",
        "transformer",
        "--num-envs",
        8,
        "--steps",
        64,
        "--device",
        "cpu",
        "--out",
        out,
    )
    assert code == 0, said
    assert said.count("transformer on") == said.count("saved:") == said.count("next:") == 1
    agent = TransformerAgent.load(out, device="cpu")
    assert agent.n_envs == 8 and agent.num_timesteps == 128
    assert (
        "train"
        in subprocess.run([sys.executable, "-m", "mmenvs", "--help"], capture_output=True, text=True).stdout
    )


def test_what_does_not_fit(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match=r"device='cuda' was asked for|must be 'auto', 'cpu' or 'cuda' with 2"
    ):
        Devices("cuda:1" if torch.cuda.is_available() else "cuda")
    result = CliRunner().invoke(
        app, ["train", VQA, "--steps", "10", "--device", "cpu", "--out", str(tmp_path / "a")]
    )
    assert result.exit_code == 2 and "several processes are for --agent transformer" in result.output
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match="pip install accelerate"):
        make_agent(VQA, env_kwargs=SMALL)


def test_one_by_itself():
    x = torch.tensor([1.0, 2.0, 6.0])
    assert ALONE.main and ALONE.share(7) == 7 and ALONE.total(x) is x
    mean, variance = ALONE.moments(x)
    assert mean == pytest.approx(3.0) and variance == pytest.approx(np.var(x.numpy()))
