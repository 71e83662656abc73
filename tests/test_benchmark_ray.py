"""The benchmark on a cluster of Ray: the same rows as on this machine, and what goes wrong."""

from __future__ import annotations

import gc
import json
import sys
import warnings

import pytest

from mmenvs.benchmark import players, pool, runner
from mmenvs.benchmark.plan import Plan
from mmenvs.benchmark.store import Store
from mmenvs.benchmark.suites import SUITES, Suite, SuiteTask

from . import bench_runs
from .test_benchmark import VQA, command

# Ray leaves files and processes to the garbage collector, which would tell of them in any later test.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
SETTINGS = {"device": "cpu", "threads": 1, "timeout": 60.0}
TIMING = ("seconds", "cpu_seconds", "evaluation_seconds", "decisions_per_second")


@pytest.fixture(scope="module")
def cluster():
    """Ray with a head that runs nothing and a machine of one processor."""
    pytest.importorskip("ray", reason="Ray, of the extra ray, is not installed")
    from ray.cluster_utils import Cluster

    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_worker_niceness", "0")  # else its workers wait for whatever else the machine does
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    made.add_node(num_cpus=1)
    yield made
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        made.shutdown()
        gc.collect()
    patch.undo()


def on_ray(cluster, agents, timeout=60.0, code=None, **change):
    from mmenvs.integrations import ray

    runs = [{**bench_runs.PLAN.runs()[-1], "agent": agent} for agent in agents]
    codes = {(run["agent"], run["embedding"]): code or players.package_version() for run in runs}
    settings = {**SETTINGS, "timeout": timeout, "address": cluster.address, "codes": codes, **change}
    return ray.run_all(runs, bench_runs.execute, **settings)


def bodies(folder):
    """The rows as they are in the store, without times."""
    found = []
    with Store(folder) as store:
        for row in store.all():
            del row["provenance"]["written"], row["provenance"]["day"]
            for name in TIMING:
                row.get("cost", {}).pop(name, None)
            # The lines of a traceback name what called the run: the pool's worker, or Ray's.
            row["traceback"] = row.get("traceback", "").splitlines()[-1:]
            found.append(json.dumps(row, sort_keys=True))
    return sorted(found)


def test_the_same_rows_as_here(cluster, tmp_path, monkeypatch):
    """Byte for byte, with the real training and evaluation, and a policy that fails."""
    tasks = (SuiteTask(VQA, 0, 1024),)  # four rollouts of A2C
    monkeypatch.setitem(SUITES, "tiny-v0", Suite("tiny-v0", tasks, seeds=1, episodes=8, checkpoints=(0.5,)))
    plan = Plan(suite="tiny", agents=("a2c", "policy:tests.test_benchmark_faults:NotFinite"), device="cpu")
    here, there = tmp_path / "here", tmp_path / "there"
    assert runner.benchmark(plan, here) == 1
    assert runner.benchmark(plan, there, engine="ray", address=cluster.address) == 1
    assert len(bodies(here)) == 6
    assert bodies(there) == bodies(here)
    # What is finished starts nothing again; the failed run is tried again.
    said: list[str] = []
    runner.benchmark(
        plan, there, resume=True, engine="ray", address=cluster.address, watcher=runner.Lines(said.append)
    )
    assert said[0] == "5 runs, 4 of them done before" and len(said) == 2


def test_one_that_dies_hangs_or_raises_costs_its_own_run(cluster):
    events = list(on_ray(cluster, ("tells", "raises", "dies", "hangs", "ppo"), timeout=5.0))
    done = {event.run["agent"]: event.rows for event in events if isinstance(event, pool.Done)}
    errors = {agent: rows[-1].get("error") for agent, rows in done.items()}
    assert set(done) == {"tells", "raises", "dies", "hangs", "ppo"}
    assert errors["raises"] == "ArithmeticError: no answer" and "execute" in done["raises"][-1]["traceback"]
    assert errors["dies"].startswith("WorkerDied: process or machine of the run was lost")
    assert errors["hangs"] == "TimeoutError: the run took longer than 5 s"
    assert errors["ppo"] is errors["tells"] is None and len(done["ppo"]) == 5
    told = [event for event in events if isinstance(event, pool.Progress)]
    assert [(event.run["agent"], event.share, event.score) for event in told] == [("tells", 0.25, 0.5)]


def test_a_machine_with_another_version_of_the_code_is_named(cluster):
    (event,) = on_ray(cluster, ("ppo",), code="another")
    assert event.rows[-1]["error"].startswith("ValueError: machine '")
    assert f"{players.package_version()} in place of another" in event.rows[-1]["error"]


def test_no_room(cluster):
    with pytest.raises(ValueError, match=r"takes 2 processors and 0 GPUs, and no machine"):
        list(on_ray(cluster, ("ppo",), threads=2))
    with pytest.raises(ValueError, match=r"takes 1 processors and 0.5 GPUs, and no machine"):
        list(on_ray(cluster, ("ppo",), device="cuda", gpus=0.5))


def test_a_machine_that_leaves(cluster):
    """The run that was on it is a row with an error; the one that waits goes to the machine that comes."""
    (node,) = cluster.worker_nodes
    done = []
    for event in on_ray(cluster, ("tells and hangs", "ppo")):
        if isinstance(event, pool.Progress):
            cluster.remove_node(node, allow_graceful=False)
            cluster.add_node(num_cpus=1)
        else:
            done.append(event.rows[-1].get("error"))
    assert done[0].startswith("WorkerDied: process or machine of the run was lost") and done[1:] == [None]


def test_without_ray(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "mmenvs.integrations.ray", raising=False)
    arguments = ("benchmark", "--engine", "ray", "--out", tmp_path / "out")
    assert "engine='ray' needs Ray: pip install 'mmenvs[ray]'" in command(*arguments, code=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "spark"], "engine must be one of 'local', 'ray'"),
        (["--address", "auto"], "address is for engine='ray', got 'auto' with engine='local'"),
        (["--engine", "ray", "--workers", "2"], "workers is for engine='local', got 2"),
        (["--gpus", "0.5"], "gpus is for engine='ray', got 0.5 with engine='local'"),
        (
            ["--engine", "ray", "--gpus", "1.5"],
            "gpus must be above 0 and at most 1, or a whole number, got 1.5",
        ),
        (["--engine", "ray", "--gpus", "0"], "gpus must be above 0"),
    ],
)
def test_command_errors(arguments, message, tmp_path):
    assert message in command("benchmark", "--out", tmp_path / "out", *arguments, code=2)


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:x"])
def test_an_address_without_a_cluster(address, tmp_path):
    assert not pytest.importorskip("ray", reason="Ray, of the extra ray, is not installed").is_initialized()
    said = command("benchmark", "--out", tmp_path, "--engine", "ray", "--address", address, code=2)
    assert f"address must be 'auto' or HOST:PORT of a running cluster, got {address!r}" in said


def test_the_command_hands_over(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(runner, "benchmark", lambda *_, **options: given.update(options) or 0)
    command("benchmark", "--out", tmp_path, "--engine", "ray", "--address", "auto", "--gpus", 0.25)
    assert (given["engine"], given["address"], given["gpus"]) == ("ray", "auto", 0.25)
