"""What goes wrong while a benchmark runs: killed processes, full disks, policies that misbehave, two runners."""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmenvs.benchmark import job, players, pool, results, runner
from mmenvs.benchmark.plan import Plan
from mmenvs.benchmark.rows import plain
from mmenvs.benchmark.store import Store
from mmenvs.benchmark.suites import SUITES, Suite, SuiteTask, suite_named
from mmenvs.registry import SPECS, Spec

from . import bench_runs
from .bench_runs import KILLS

VQA = "MMRL/VQA-v0"
SETTINGS = {"workers": 1, "device": "cpu", "threads": 1, "timeout": 30.0}
ROOT = Path(__file__).parent.parent


@pytest.fixture
def tiny(monkeypatch):
    """A suite of one task, and runs that take an instant."""
    monkeypatch.setitem(SUITES, "tiny-v0", Suite("tiny-v0", (SuiteTask(VQA, 0, 64),), seeds=2, episodes=8))
    monkeypatch.setattr(job, "execute", bench_runs.execute)
    return Plan(suite="tiny", agents=("ppo",), device="cpu")


def run_of(agent, seed=0):
    return {**bench_runs.PLAN.runs()[-1], "agent": agent, "seed": seed}


def table(folder):
    """Everything that a benchmark says but its provenance and the runs that failed, in an order of its own."""
    with Store(folder) as store:
        rows = [
            {key: row[key] for key in row if key != "provenance"} for row in store.all() if "error" not in row
        ]
    return sorted(json.dumps(row, sort_keys=True) for row in rows)


def written(folder):
    """How many rows there are."""
    if not (folder / "results.sqlite").exists():
        return 0
    try:
        with Store(folder) as store:
            return store.count()
    except (ValueError, OSError):  # it is being made
        return 0


def children(pid):
    """The worker processes of a runner."""
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(each) for each in found if b"spawn_main" in Path(f"/proc/{each}/cmdline").read_bytes()]
    except OSError:
        return []


def test_killed_at_any_moment(tmp_path):
    """Whatever is killed, runner or worker: in the end the table is that of an undisturbed run."""
    draw = random.Random(KILLS)
    begun, killed = False, []
    for number in range(KILLS):
        there = written(tmp_path)
        command = [sys.executable, "-m", "tests.bench_runs", str(tmp_path), *(["--resume"] if begun else [])]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None and not children(process.pid):
            time.sleep(0.01)
        workers = children(process.pid)
        if number % 2 == 0:  # some in the midst of the runs, however long the machine takes to get there
            while process.poll() is None and written(tmp_path) == there:
                time.sleep(0.01)
        time.sleep(draw.uniform(0, 1.5))
        if workers and draw.random() < 0.5:
            with contextlib.suppress(ProcessLookupError):  # all runs may be done by now
                os.kill(workers[0], signal.SIGKILL)
            killed.append("worker")
            time.sleep(draw.uniform(0, 0.5))
        process.kill()
        errors = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGKILL), errors.decode()
        killed.append("runner")
        # Orphans don't go on working, nor hold what the next one needs.
        end = time.monotonic() + 10
        while any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers) and time.monotonic() < end:
            time.sleep(0.02)
        assert not any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers)
        begun = (tmp_path / "benchmark.json").exists()
        if begun and (tmp_path / "results.sqlite").exists():
            table(tmp_path)  # can be read at any time
    with Store(tmp_path, write=True) as store:
        before = len(store.finished())
    assert before > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "execute", bench_runs.execute)
        # The lock of a killed runner is none.
        runner.benchmark(bench_runs.PLAN, tmp_path, resume=begun)
    if KILLS > 3:
        print(
            f"killed {killed.count('runner')} runners and {killed.count('worker')} workers, {before} runs done by then"
        )
    rows = [row for run in bench_runs.PLAN.runs() for row in bench_runs.rows_of(run)]
    undisturbed = sorted(json.dumps(plain({"format": 1, **row}), sort_keys=True) for row in rows)
    assert table(tmp_path) == undisturbed


def test_one_that_dies_hangs_or_raises_costs_its_own_run():
    agents = ("tells", "raises", "exits", "interrupts", "dies", "leaves", "hangs", "ppo")
    events = list(
        pool.run_all([run_of(agent) for agent in agents], bench_runs.execute, **{**SETTINGS, "timeout": 4.0})
    )
    done = {event.run["agent"]: event.rows for event in events if isinstance(event, pool.Done)}
    assert list(done) == list(agents)
    assert done["exits"][-1]["error"] == "SystemExit: no weights"
    assert done["interrupts"][-1]["error"] == "KeyboardInterrupt: enough"
    errors = {agent: rows[-1].get("error") for agent, rows in done.items()}
    assert errors["raises"] == "ArithmeticError: no answer" and "execute" in done["raises"][-1]["traceback"]
    assert (
        errors["dies"].startswith("WorkerDied") and "signal 9; was there too little memory?" in errors["dies"]
    )
    assert errors["leaves"].endswith("exit code 3")
    assert errors["hangs"] == "TimeoutError: the run took longer than 4 s"
    assert errors["ppo"] is errors["tells"] is None and len(done["ppo"]) == 5
    told = [event for event in events if isinstance(event, pool.Progress)]
    assert [(event.run["agent"], event.share, event.score) for event in told] == [("tells", 0.25, 0.5)]
    assert not multiprocessing.active_children()


class Agent:
    """In a cycle of references, as agents and their callbacks are."""

    def __init__(self, run):
        self.itself, self.run = self, run


def _leave_behind(run, device, tell):
    left.append(weakref.ref(Agent(run)))
    if run["fails"]:
        raise ValueError("no rows")
    return []


left: list[weakref.ref] = []


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_leaves_nothing_in_memory(fails):
    gc.disable()
    try:
        answer, _ = pool.attempt(_leave_behind, {"fails": fails}, "cpu", lambda *_: None)
    finally:
        gc.enable()
    assert answer == ("error" if fails else "rows") and left.pop()() is None


def test_workers_have_one_thread(monkeypatch):
    for name in pool.THREADS:
        monkeypatch.delenv(name, raising=False)
    events = list(pool.run_all([run_of("ppo")], _environment, **SETTINGS))
    assert events[0].rows == ["1", "1"]


def _environment(run, device, tell):
    return [os.environ[name] for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")]


def test_workers_know_the_tasks_of_the_user(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "pool_task.py").write_text(
        "import mmenvs\nmmenvs.register('Mine/Pool-v0', 'mmenvs.tasks.vqa:VQA')\nclass Pool: pass\n"
    )
    monkeypatch.setitem(SPECS, "Mine/Pool-v0", Spec("Mine/Pool-v0", "pool_task:Pool", ()))
    (event,) = pool.run_all([run_of("ppo")], _known, **SETTINGS)
    assert "Mine/Pool-v0" in event.rows


def _known(run, device, tell):
    return list(SPECS)


def test_failed_runs_are_rows_and_are_tried_again(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "execute", _fails_at_seed_1)
    said: list[str] = []
    failed = runner.benchmark(tiny, tmp_path, watcher=runner.Lines(said.append))
    assert failed == 1 and said[0] == "5 runs, 0 of them done before"
    assert any("seed 1: ValueError: at seed 1" in line for line in said)
    with Store(tmp_path) as store:
        (row,) = store.failures()
        assert (
            row["run"]["seed"] == 1 and row["error"] == "ValueError: at seed 1" and row["provenance"]["code"]
        )
        assert len(store.finished()) == 4
    monkeypatch.setattr(job, "execute", bench_runs.execute)
    said.clear()
    assert runner.benchmark(tiny, tmp_path, resume=True, watcher=runner.Lines(said.append)) == 0
    assert said[0] == "5 runs, 4 of them done before" and len(said) == 2
    with Store(tmp_path) as store:
        assert not list(store.failures()) and len(store.finished()) == 5
        rows = store.count()
    assert runner.benchmark(tiny, tmp_path, resume=True, watcher=runner.Lines(said.append)) == 0
    with Store(tmp_path) as store:
        assert store.count() == rows


def _fails_at_seed_1(run, device, tell):
    if run["seed"] == 1:
        raise ValueError("at seed 1")
    return bench_runs.execute(run, device, tell)


def _gives_what_is_no_row(run, device, tell):
    rows = bench_runs.rows_of(run)
    if run["seed"] == 1:
        raise FileNotFoundError("no file \udcff.pt")
    if run["agent"] == "ppo":
        rows[-1]["step"] = 10**30
    return rows


def test_a_row_that_the_store_refuses_costs_its_own_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "execute", _gives_what_is_no_row)
    assert runner.benchmark(tiny, tmp_path, watcher=runner.Lines(lambda line: None)) == 2
    with Store(tmp_path) as store:
        errors = [row["error"] for row in store.failures()]
        assert errors[0].startswith("OverflowError") and errors[1] == "FileNotFoundError: no file ?.pt"
        assert len(store.finished()) == 3


def test_more_seeds_are_added(tiny, tmp_path):
    runner.benchmark(tiny, tmp_path)
    more = Plan(**{**tiny.__dict__, "seeds": 3})
    said: list[str] = []
    runner.benchmark(more, tmp_path, resume=True, watcher=runner.Lines(said.append))
    assert said[:2] == ["the plan is changed: seeds: the suite's -> 3", "6 runs, 5 of them done before"]
    assert Plan.load(tmp_path).seeds == 3


def test_another_version_of_the_code_is_not_mixed_in(tiny, tmp_path, monkeypatch):
    runner.benchmark(tiny, tmp_path)
    monkeypatch.setattr(players, "package_version", lambda: "another")
    more = Plan(**{**tiny.__dict__, "seeds": 3})
    with pytest.raises(ValueError, match=r"another version of the code .*--mix"):
        runner.benchmark(more, tmp_path, resume=True)
    runner.benchmark(more, tmp_path, resume=True, mix=True)
    with Store(tmp_path) as store:
        assert len(store.codes()) == 2


def test_weights_from_elsewhere_are_code(tiny, tmp_path):
    """Trained further, they are another embedding under the same name."""
    weights = tmp_path / "joint" / "joint.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"one")
    plan = replace(tiny, embeddings=("cnn+concat", f"joint:{weights.parent}+concat"))
    out = tmp_path / "out"
    runner.benchmark(plan, out)
    with Store(out) as store:
        assert [len(store.codes(embedding=each)) for each in plan.embeddings] == [1, 1]
        assert len(store.codes()) == 2
    more = replace(plan, seeds=3)
    runner.benchmark(more, out, resume=True)
    weights.write_bytes(b"another")
    with pytest.raises(ValueError, match=r"rows of ppo, joint:.* come from another version of its files"):
        runner.benchmark(replace(more, seeds=4), out, resume=True)


def test_a_folder_with_results_needs_resume(tiny, tmp_path):
    runner.benchmark(tiny, tmp_path)
    with pytest.raises(ValueError, match="holds a benchmark: go on with --resume"):
        runner.benchmark(tiny, tmp_path)


def test_a_lost_plan_loses_no_rows(tiny, tmp_path):
    runner.benchmark(tiny, tmp_path)
    (tmp_path / "benchmark.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no benchmark\.json; with --out in place of --resume its rows are kept"
    ):
        Plan.load(tmp_path)
    said = []
    runner.benchmark(tiny, tmp_path, watcher=runner.Lines(said.append))
    done = said[0].split()
    assert done[0] == done[2] and "done before" in said[0]
    assert Plan.load(tmp_path) == tiny.pinned()


def test_a_file_of_the_same_name_is_not_written_over(tiny, tmp_path):
    theirs = tmp_path / "benchmark.json"
    theirs.write_text('{"suite": "of another program"}')
    with pytest.raises(ValueError, match=r"benchmark\.json' is no plan of a benchmark"):
        runner.benchmark(tiny, tmp_path)
    assert theirs.read_text() == '{"suite": "of another program"}' and list(tmp_path.iterdir()) == [theirs]


def test_a_plan_keeps_the_version_of_its_suite(tiny, tmp_path, monkeypatch):
    runner.benchmark(tiny, tmp_path)
    monkeypatch.setitem(SUITES, "tiny-v1", Suite("tiny-v1", (SuiteTask(VQA, 1, 64),), seeds=2, episodes=8))
    plan, said = Plan.load(tmp_path), []
    assert plan.the_suite().name == "tiny-v0" and suite_named("tiny").name == "tiny-v1"
    runner.benchmark(
        Plan(**{**plan.__dict__, "steps": 32}), tmp_path, resume=True, watcher=runner.Lines(said.append)
    )
    assert said[:2] == ["the plan is changed: steps: the suite's -> 32", "5 runs, 0 of them done before"]


@pytest.mark.parametrize("content", ["", "{}", None])
def test_a_damaged_plan_is_no_dead_end(tiny, tmp_path, content):
    runner.benchmark(tiny, tmp_path)
    path = tmp_path / "benchmark.json"
    if content is None:
        path.unlink()
        path.mkdir()
    else:
        path.write_text(content)
    for resume in (False, True):
        with pytest.raises(ValueError, match="move it away and say --out, and the rows beside it are kept"):
            runner.benchmark(tiny, tmp_path, resume=resume)
    path.rename(tmp_path / "away")
    said: list[str] = []
    runner.benchmark(tiny, tmp_path, watcher=runner.Lines(said.append))
    assert said == ["5 runs, 5 of them done before"]


def test_a_plan_of_an_unknown_suite_is_changed(tiny, tmp_path):
    replace(tiny, suite="tiny-v9").save(tmp_path)
    said: list[str] = []
    runner.benchmark(tiny, tmp_path, resume=True, watcher=runner.Lines(said.append))
    assert said[:2] == ["the plan is changed: suite: tiny-v9 -> tiny-v0", "5 runs, 0 of them done before"]


@pytest.mark.parametrize("where", [0.3, 0.5, 0.7, 0.9])
def test_a_store_damaged_in_the_middle(tmp_path, where):
    """Neither report nor runner take it for whole, and nothing is added to it or changed."""
    folder, plan = stored(tmp_path)
    path = folder / "results.sqlite"
    whole = path.read_bytes()
    start = int(len(whole) * where) // 4096 * 4096
    damaged = whole[:start] + b"\xa5" * 8192 + whole[start + 8192 :]
    path.write_bytes(damaged)
    said: list[str] = []
    with pytest.raises(ValueError, match=r"results\.sqlite' (is damaged|is no store)"):
        runner.benchmark(
            replace(plan, seeds=9), folder, resume=True, mix=True, watcher=runner.Lines(said.append)
        )
    assert not said and path.read_bytes() == damaged and Plan.load(folder) == plan
    with pytest.raises(ValueError, match=r"results\.sqlite' (is damaged|is no store)"):
        results.write(folder, tmp_path / "report")


def stored(folder):
    """A folder with a store of some hundred rows, and the plan of them."""
    plan = bench_runs.PLAN
    folder = folder / "results"
    folder.mkdir()
    plan.save(folder)
    with Store(folder, write=True) as store:
        for run in plan.runs():
            store.append([{**row, "provenance": {}} for row in bench_runs.rows_of(run)])
    return folder, plan


def test_rows_that_are_half_read_when_the_store_is_closed(tmp_path, capfd):
    """As by an error between them: closing them later says nothing."""
    folder, _ = stored(tmp_path)
    with Store(folder) as store:
        rows = store.all()
        next(rows)
    del rows
    gc.collect()
    assert "Exception ignored" not in capfd.readouterr().err


def test_a_store_whose_index_lacks_a_row(tmp_path):
    """A finished run would count as missing, be trained again and be refused, each time anew."""
    folder, plan = stored(tmp_path)
    with contextlib.closing(sqlite3.connect(folder / "results.sqlite")) as database:
        (usual,) = database.execute("SELECT sql FROM sqlite_schema WHERE name = 'finals'").fetchone()
        database.execute("DROP INDEX finals")
        database.execute(f"{usual} AND score > 2")
        database.execute("PRAGMA writable_schema=ON")
        database.execute("UPDATE sqlite_schema SET sql = ? WHERE name = 'finals'", [usual])
        database.commit()
    with pytest.raises(ValueError, match=r"is damaged: row 1 missing from index finals"):
        runner.benchmark(plan, folder, resume=True, mix=True)


def test_text_that_cannot_be_read(tmp_path):
    """In a row that no run's score is taken from."""
    folder, plan = stored(tmp_path)
    path = folder / "results.sqlite"
    (failed,) = pool.failed(plan.runs()[-1], 1.0, "ValueError", "no answer", "the trace of it").rows
    with Store(folder, write=True) as store:
        store.append([{**failed, "run": {**failed["run"], "seed": 99}, "provenance": {}}])
    path.write_bytes(path.read_bytes().replace(b"the trace of it", b"the \xff\xfeace of it"))
    with pytest.raises(ValueError, match=r"results\.sqlite' is damaged"):
        runner.benchmark(plan, folder, resume=True, mix=True)


def test_two_runners_in_one_folder(tiny, tmp_path):
    with runner.locked(tmp_path), pytest.raises(ValueError, match="another benchmark is writing to"):
        runner.benchmark(tiny, tmp_path)


def test_full_disk(tiny, tmp_path, monkeypatch):
    """The runner stops with a clear message; what was written is whole, and it goes on once there is room."""
    append = Store.append

    def full(store, rows):
        if len(store.finished()) == 3:
            pages = store.database.execute("PRAGMA page_count").fetchone()[0]
            store.database.execute(f"PRAGMA max_page_count={pages}")
            rows = [{**row, "padding": "x" * 100_000} for row in rows]
        append(store, rows)

    monkeypatch.setattr(Store, "append", full)
    with pytest.raises(OSError, match=r"database or disk is full; make room, then --resume goes on"):
        runner.benchmark(tiny, tmp_path)
    assert not multiprocessing.active_children()
    monkeypatch.setattr(Store, "append", append)
    with Store(tmp_path) as store:
        assert len(store.finished()) == 3
    assert runner.benchmark(tiny, tmp_path, resume=True) == 0
    with Store(tmp_path) as store:
        assert len(store.finished()) == 5


# Policies of others --------------------------------------------------------------------------------------


class Yes:
    """Says yes to everything."""

    def __init__(self, action_space):
        assert action_space.n == 34

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        return np.zeros(len(observation["image"]), np.int64), None


class Learns(Yes):
    policy = "what it calls so is no network"

    def learn(self, total_timesteps):
        self.learned = total_timesteps


class NotFinite(Yes):
    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        return np.full(len(observation["image"]), np.nan), None


class WrongShape(Yes):
    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        return np.zeros((len(observation["image"]), 2), np.int64), None


class NoState(Yes):
    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        return np.zeros(len(observation["image"]), np.int64)


class OutOfRange(Yes):
    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        return np.full(len(observation["image"]), 99), None


def own(name):
    return {
        **run_of(f"policy:tests.test_benchmark_faults:{name}"),
        "id": VQA,
        "difficulty": 0,
        "embedding": "",
    }


class Counts:
    learned = 0

    def learn(self, total_timesteps):
        self.learned += 1

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        return np.full(len(observation["image"]), self.learned), None


counts = Counts()


def test_an_object_as_a_policy_begins_each_run_anew():
    for _ in range(2):
        (row,) = job.execute(own("counts"), "cpu", lambda *_: None)
        assert [example["actions"] for example in row["examples"]] == [[1]] * 8


def test_a_module_that_cannot_be_imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("broken_policy.py").write_text("class A")
    Path("ended_policy.py").write_text("import sys; sys.exit(0)")
    for policy in ("broken_policy:A", ".broken_policy:A", "ended_policy:A"):
        with pytest.raises(
            ImportError, match=r"_policy' can't be imported: (SyntaxError|TypeError|SystemExit)"
        ):
            Plan(agents=(f"policy:{policy}",)).runs()


@pytest.mark.parametrize("name", ["Yes", "Learns"])
def test_a_policy_of_ones_own(name):
    (row,) = job.execute(own(name), "cpu", lambda *_: None)
    assert row["final"] and set(row["scores"]) == {
        "test/greedy", "test/sampled", "compositional/greedy", "compositional/sampled",
        "test/greedy/without image", "test/greedy/without question",
    }  # fmt: skip
    assert row["scores"]["test/greedy"] == {
        **row["scores"]["test/sampled"],
        "returns": row["scores"]["test/greedy"]["returns"],
    }
    assert [example["actions"] for example in row["examples"]] == [[0]] * 8
    assert row["cost"]["decisions_per_second"] > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NotFinite", "predict of policy:.*NotFinite returned numbers that are not finite"),
        ("WrongShape", r"must return 8 integers, got shape \(8, 2\)"),
        ("NoState", r"must return \(actions, state\), got ndarray"),
        ("OutOfRange", "actions must be from 0 to 33, got 99"),
    ],
)
def test_a_policy_that_answers_wrongly(name, message):
    with pytest.raises(Exception, match=message):
        job.execute(own(name), "cpu", lambda *_: None)
