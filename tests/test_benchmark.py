"""The benchmark: suites and plans, the store, what the runner's runs say, the report, the command line."""

from __future__ import annotations

import csv
import importlib
import io
import json
import multiprocessing
import re
import sqlite3
from dataclasses import replace
from html.parser import HTMLParser

import gymnasium as gym
import numpy as np
import pytest
import torch
from mmenvs_agents import sb3
from rich.console import Console
from typer.testing import CliRunner

from mmenvs.benchmark import board as boards
from mmenvs.benchmark import episodes, job, measure, players, plots, results, runner, stats, store
from mmenvs.benchmark.plan import Plan
from mmenvs.benchmark.pool import Done, Progress, failed
from mmenvs.benchmark.results import Entry
from mmenvs.benchmark.store import Store
from mmenvs.benchmark.suites import SUITES, Suite, SuiteTask, suite_named
from mmenvs.cli import app
from mmenvs.cli_benchmark import LiveTable
from mmenvs.registry import SPECS, task_class

from . import bench_runs

VQA, MATCHING, CAPTIONING = "MMRL/VQA-v0", "MMRL/AudioVisualMatching-v0", "MMRL/Captioning-v0"
ORIGIN = {"code": "abc", "commit": "1", "versions": {"torch": "2"}}
PLAN = Plan(agents=("ppo", "a2c", "blind"), seeds=3, steps=100, episodes=20)
SMALL = Plan(suite="audio", agents=("ppo",), seeds=1, steps=100, episodes=20)


def command(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result.output


def fill(folder, plan=PLAN, skills=None, leave_out=(), **origin):
    """A store with made-up rows of a plan."""
    folder.mkdir(exist_ok=True)
    plan.save(folder)
    with Store(folder, write=True) as opened:
        for run in plan.runs():
            if (run["agent"], run["id"]) not in leave_out:
                rows = bench_runs.rows_of(run, (skills or {}).get(run["agent"]))
                opened.append([{**row, "provenance": {**ORIGIN, **origin}} for row in rows])
    return folder


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("benchmark") / "results", skills={"ppo": 0.8, "a2c": 0.5})


# Suites and plans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_a_suite_names_what_exists(suite):
    assert re.fullmatch(r"[a-z]+-v\d+", suite.name)
    assert {task.id for task in suite.tasks} <= set(SPECS)
    assert len({(task.id, task.difficulty) for task in suite.tasks}) == len(suite.tasks)
    assert list(suite.checkpoints) == sorted(suite.checkpoints) and 0 < max(suite.checkpoints) < 1


def test_suites_are_what_their_tags_say():
    for name, tag in {"audio-v0": "audio", "sequential-v0": "sequential"}.items():
        assert {task.id for task in SUITES[name].tasks} == {
            id for id, spec in SPECS.items() if tag in spec.tags
        }


def test_core_v0_never_changes():
    """A number of core-v0 has one meaning: what is asserted here may not be edited, only a core-v1 be added."""
    suite = SUITES["core-v0"]
    assert [(task.id, task.difficulty, task.steps) for task in suite.tasks] == [
        (VQA, 0, 200_000), (VQA, 1, 200_000), (CAPTIONING, 0, 150_000), (CAPTIONING, 1, 150_000),
        (MATCHING, 0, 60_000), (MATCHING, 1, 60_000),
    ]  # fmt: skip
    assert (suite.seeds, suite.episodes, suite.episode_seed) == (3, 1000, 0)
    assert suite.splits == ("test", "compositional") and suite.checkpoints == (0.1, 0.25, 0.5, 0.75)


def test_generalization_v0_never_changes():
    """As core-v0."""
    suite = SUITES["generalization-v0"]
    assert [(task.id, task.difficulty, task.steps) for task in suite.tasks] == [
        (VQA, 0, 200_000), (VQA, 1, 200_000), (VQA, 2, 200_000),
        (MATCHING, 0, 60_000), (MATCHING, 1, 60_000), (MATCHING, 2, 60_000),
    ]  # fmt: skip
    assert (suite.seeds, suite.episodes, suite.episode_seed) == (3, 1000, 0)
    assert suite.splits == ("test", "compositional", "harder")
    assert suite.checkpoints == (0.1, 0.25, 0.5, 0.75)
    for task in suite.tasks:  # an agent can play the next difficulty
        here, harder = (gym.make(task.id, difficulty=task.difficulty + more) for more in (0, 1))
        assert (here.observation_space, here.action_space) == (harder.observation_space, harder.action_space)


def test_harder_is_the_test_split_at_the_next_difficulty(monkeypatch):
    asked = []
    evaluation = importlib.import_module("mmenvs_agents.evaluation")
    evaluate = evaluation.evaluate
    monkeypatch.setattr(
        evaluation, "evaluate", lambda *args, **how: asked.append(how) or evaluate(*args, **how)
    )
    runs = Plan(suite="generalization", episodes=8).runs()
    (run,) = [r for r in runs if r["agent"] == "oracle" and r["id"] == MATCHING and r["difficulty"] == 2]
    (row,) = job.execute(run, "cpu", lambda *_: None)
    assert [(how["split"], how["env_kwargs"]["difficulty"]) for how in asked] == [
        ("test", 2), ("compositional", 2), ("test", 3)
    ]  # fmt: skip
    assert row["scores"]["harder/greedy"]["returns"] == [1] * 8


def test_the_report_shows_what_is_harder(tmp_path):
    fill(tmp_path, Plan(suite="generalization", agents=("ppo",), steps=100, episodes=20))
    with Store(tmp_path) as opened:
        rows = list(opened.all())
    more = tmp_path / "more"
    more.mkdir()
    with Store(more, write=True) as opened:
        for row in rows:
            if row["final"]:
                row["scores"]["harder/greedy"] = row["scores"]["compositional/greedy"]
                opened.append([row])
    results.write(more, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "interquartile mean, harder" in text and "return, harder" in text
    assert "Harder: the test split at the next difficulty" in text


def test_newest_version_and_changed_budgets(monkeypatch):
    monkeypatch.setitem(SUITES, "core-v10", Suite("core-v10", ()))
    assert suite_named("core").name == "core-v10" and suite_named("core-v0").name == "core-v0"
    changed = suite_named("core-v0").changed(steps=5000, episodes=20)
    assert changed.name == "core-v0 (5,000 steps, 20 episodes)" and {t.steps for t in changed.tasks} == {5000}
    assert suite_named("core-v0").changed() is SUITES["core-v0"]
    with pytest.raises(ValueError, match="suite must be one of core-v0, audio-v0"):
        suite_named("best")


def test_a_plan_is_every_combination():
    plan = Plan(agents=("ppo", "blind", "random"), embeddings=("cnn+concat", "vit+concat"), seeds=2)
    runs = plan.runs()
    by_agent = {
        name: [run for run in runs if run["agent"] == name] for name in {run["agent"] for run in runs}
    }
    assert {name: len(found) for name, found in by_agent.items()} == {
        "random": 6, "most_frequent": 6, "oracle": 6, "ppo": 6 * 2 * 2, "blind:image": 6 * 2 * 2,
        "blind:text": 4 * 2 * 2, "blind:audio": 2 * 2 * 2,
    }  # fmt: skip
    assert all(
        run["steps"] == 0 and run["seed"] == 0 and run["embedding"] == "" for run in by_agent["oracle"]
    )
    assert [run["seed"] for run in runs] == sorted(run["seed"] for run in runs)
    assert len({json.dumps(run) for run in runs}) == len(runs)


def test_a_plan_comes_back(tmp_path):
    PLAN.save(tmp_path)
    assert Plan.load(tmp_path) == PLAN
    with pytest.raises(FileNotFoundError, match="no benchmark in"):
        Plan.load(tmp_path / "nothing")
    for broken in (
        '{"agents": 3, "embeddings": []}',
        '{"surprise": 1, "agents": [], "embeddings": []}',
        '{"format": 1, "agents": "ppo", "embeddings": []}',
        '{"format": 99, "agents": [], "embeddings": []}',
        '{"format": 1, "agents": [], "embeddings": [], "seeds": "x"}',
        '{"format": 1, "embeddings": []}',
        "[]",
        "[1]",
        "{",
    ):
        (tmp_path / "benchmark.json").write_text(broken)
        with pytest.raises(ValueError, match="is no plan of a benchmark"):
            Plan.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"agents": ("best",)},
            ValueError,
            "agents must name some of random, most_frequent, oracle, blind, blind:image",
        ),
        ({"agents": ("blind:smell",)}, ValueError, "blind:<modality> must name one of image, text, audio"),
        ({"agents": ("transformer:best",)}, ValueError, "transformer:<algo> must be one of 'ppo', 'grpo'"),
        ({"agents": ("ppo", "ppo")}, ValueError, "agents holds 'ppo' twice"),
        ({"agents": "ppo"}, TypeError, "agents must be a tuple of names, got 'ppo'"),
        ({"embeddings": "cnn+concat"}, TypeError, "embeddings must be a tuple of names, got 'cnn.concat'"),
        ({"agents": ("blind", "blind")}, ValueError, "agents holds 'blind' twice"),
        ({"agents": ("blind", "blind:text")}, ValueError, "agents holds 'blind:text' twice"),
        ({"embeddings": ()}, ValueError, "embeddings must name at least one"),
        ({"embeddings": ("cnn",)}, ValueError, r"must be '<encoder>\+<fusion>'"),
        ({"embeddings": ("cnn+best",)}, ValueError, "the fusion in 'cnn\\+best' must be one of"),
        ({"seeds": 0}, ValueError, "seeds must be from 1"),
        ({"suite": "audio", "agents": ("blind:text",)}, ValueError, "'blind:text' fits none of audio-v0"),
        ({"embeddings": ("joint:/no/where+concat",)}, FileNotFoundError, "there is no '/no/where'"),
        (
            {"suite": "audio", "embeddings": ("gru+concat", "cnn+concat")},
            ValueError,
            "'gru.concat' and 'cnn.concat' are the same network on every task of audio-v0",
        ),
        ({"episodes": 7}, ValueError, "episodes must be from 8"),
        ({"agents": ("policy:json",)}, ValueError, "policy must be 'module:Class' or 'hf:MODEL'"),
        ({"agents": ("policy:json:nothing",)}, ImportError, "module 'json' has no 'nothing'"),
        ({"agents": ("policy:json:JSONDecoder",)}, TypeError, "json:JSONDecoder has no method predict"),
        ({"agents": ("policy:no_such_module:A",)}, ImportError, "no_such_module"),
    ],
)
def test_plans_that_name_nothing(change, error, message):
    with pytest.raises(error, match=message):
        Plan(**{"agents": ("ppo",), **change}).runs()


def test_what_blind_agents_see():
    spaces = {id: task_class(id)(1).observation_space.spaces for id in (VQA, MATCHING)}
    assert players.sees("blind:image", spaces[VQA]) == ("question",)
    assert players.sees("blind:text", spaces[VQA]) == ("image",)
    assert players.sees("blind:audio", spaces[VQA]) == ()
    assert players.sees("blind:image", spaces[MATCHING]) == ("audio",)
    assert players.sees("ppo", spaces[VQA]) is None


# The store -----------------------------------------------------------------------------------------------


def rows_of(agent="ppo", seed=0, **change):
    run = {**PLAN.runs()[3], "agent": agent, "seed": seed}
    return [{**row, "provenance": ORIGIN, **change} for row in bench_runs.rows_of(run)]


def test_rows_come_back(tmp_path):
    rows = rows_of()
    with Store(tmp_path, write=True) as opened:
        opened.append(rows)
        assert len(rows) == 5 == opened.count()
        (final,) = opened.finals()
        assert final == json.loads(json.dumps({"format": 1, **rows[-1]}))
        curve = opened.curve(rows[0]["run"])
        assert [step for step, _ in curve] == [10, 25, 50, 75, 100]
        assert (
            opened.codes() == {"abc": 5}
            and opened.codes(agent="ppo") == {"abc": 5}
            and opened.codes(agent="a2c") == {}
        )
        assert opened.database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert opened.database.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


def test_rows_are_never_doubled_nor_rewritten(tmp_path):
    with Store(tmp_path, write=True) as opened:
        opened.append(rows_of())
        with pytest.raises(ValueError, match="holds this run already"):
            opened.append([*rows_of(seed=1), *rows_of()])
        assert opened.count() == 5  # nothing of the other run either
        for statement in ("DELETE FROM rows", "UPDATE rows SET score = 1"):
            with pytest.raises(sqlite3.IntegrityError, match="never rewritten"):
                opened.database.execute(statement)


def test_a_report_of_failures_alone_says_why_they_failed(tmp_path):
    error = {"run": rows_of()[0]["run"], "step": 0, "final": True, "error": "E: x", "provenance": ORIGIN}
    with Store(tmp_path, write=True) as opened:
        opened.append([error])
    with pytest.raises(ValueError, match="holds no finished run of the suite; one that failed: E: x"):
        results.write(tmp_path, tmp_path / "report")


def test_errors_may_repeat_and_end_with_success(tmp_path):
    error = {"run": rows_of()[0]["run"], "step": 0, "final": True, "error": "E: x", "provenance": ORIGIN}
    with Store(tmp_path, write=True) as opened:
        opened.append([error])
        opened.append([{**error, "error": "E: y"}])
        assert [row["error"] for row in opened.failures()] == ["E: y"]
        opened.append(rows_of())
        assert not list(opened.failures()) and len(opened.finished()) == 1 and opened.count() == 7


def _append_many(folder, seed):
    with Store(folder, write=True) as opened:
        for i in range(20):
            opened.append(rows_of(seed=100 * seed + i))


def test_writers_side_by_side(tmp_path):
    context = multiprocessing.get_context("fork")
    with Store(tmp_path, write=True):
        pass
    writers = [context.Process(target=_append_many, args=(tmp_path, seed)) for seed in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    with Store(tmp_path) as opened:
        assert opened.count() == 300 and len(opened.finished()) == 60
        assert opened.database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_no_store(tmp_path):
    with pytest.raises(FileNotFoundError, match="no results in"):
        Store(tmp_path)
    (tmp_path / store.NAME).write_text("nonsense" * 1000)
    for write in (False, True):
        with pytest.raises(ValueError, match="is no store of a benchmark"):
            Store(tmp_path, write=write)


def test_a_trigger_of_others_is_refused(tmp_path):
    with Store(tmp_path, write=True) as opened:
        opened.database.execute(
            "CREATE TRIGGER swallow BEFORE INSERT ON rows BEGIN SELECT RAISE(IGNORE); END"
        )
    with pytest.raises(ValueError, match="is no store of a benchmark: it holds swallow"):
        Store(tmp_path, write=True)


def test_a_database_of_others_stays_as_it_is(tmp_path):
    path = tmp_path / "results.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE customers (name TEXT)")
    database.close()
    before = path.read_bytes()
    with pytest.raises(ValueError, match="is no store of a benchmark: it holds customers"):
        Store(tmp_path, write=True)
    assert path.read_bytes() == before


def test_a_view_in_place_of_the_table_is_refused(tmp_path):
    database = sqlite3.connect(tmp_path / store.NAME)
    database.execute(
        "CREATE VIEW rows AS SELECT 1 n, '' run, 0 step, 1 final, 0 score, NULL error, '' code, '' body"
    )
    database.commit()
    database.close()
    with pytest.raises(ValueError, match="it has no table of rows"):
        Store(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 1"),
        ({"run": {"id": 3}}, "run must hold"),
        ({"step": "1"}, "step must be an integer"),
        ({"provenance": []}, "provenance must be"),
        ({"error": 3}, "error must be text"),
        ({"scores": {}}, "scores must hold test/greedy"),
        (
            {"scores": {"test/greedy": {"return": None, "success": 1, "length": 1}}},
            "return, success and length",
        ),
        ({"scores": {"test/greedy": {"return": 1, "success": 1, "length": 1}}}, "must hold the returns"),
        (
            {"scores": {"test/greedy": {"return": 1, "success": 1, "length": 1, "returns": ["x"]}}},
            "must hold numbers",
        ),
        ({"cost": {"seconds": "long"}}, "cost must hold numbers"),
        ({"examples": [{"seed": 0, "actions": ["x"]}]}, "a seed and actions"),
    ],
)
def test_what_is_no_row(change, message, tmp_path):
    row = {"format": 1, **rows_of()[-1], **change}
    with pytest.raises(ValueError, match=message):
        store.check(row)
    with Store(tmp_path, write=True) as opened, pytest.raises(ValueError, match=message):
        opened.append([row])
    with Store(tmp_path, write=True) as opened:
        insert = (
            "INSERT INTO rows (run, step, final, score, error, code, body) VALUES ('', 0, 1, 0, NULL, '', ?)"
        )
        opened.database.execute(insert, [json.dumps(row)])
        with pytest.raises(ValueError, match=f"row 1 of .* is no row of a benchmark.*{message}"):
            list(opened.finals())


# What a run does -----------------------------------------------------------------------------------------


# Rollouts of 2,048 and 256 steps are played to their end, and learned from, before a policy is scored.
STEPS = {"ppo": [2048, 4096, 6144], "transformer:grpo": [256, 512, 1024]}


@pytest.fixture(scope="module", params=list(STEPS))
def trained(request):
    """The rows of a run that is too short to learn, those of the same run again, and what was told."""
    plan = Plan(agents=(request.param,), seeds=1, steps=STEPS[request.param][-1], episodes=16)
    (run,) = [run for run in plan.runs() if run["id"] == VQA and run["difficulty"] == 0 and run["steps"]]
    told: list[tuple[float, float | None]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "_TELL_EVERY", 0.0)
        rows = job.execute({**run, "checkpoints": [0.25, 0.5]}, "cpu", lambda *event: told.append(event))
    return rows, job.execute({**run, "checkpoints": [0.25, 0.5]}, "cpu", lambda *_: None), told


def test_what_is_all_that_an_agent_sees_is_dropped_too():
    """Of a captioning task the transformer agent sees the picture; its words are its history. Blind agents see no more."""
    plan = Plan(agents=("transformer:grpo", "blind"), seeds=1, steps=64, episodes=8)
    runs = [run for run in plan.runs() if run["id"] == "MMRL/Captioning-v0" and run["difficulty"] == 0]
    left = {}
    for run in runs:
        if run["agent"] in ("transformer:grpo", "blind:text", "blind:image"):
            scores = job.execute({**run, "steps": 64, "checkpoints": []}, "cpu", lambda *_: None)[-1][
                "scores"
            ]
            left[run["agent"]] = [name for name in scores if "without" in name]
    assert left == {
        "transformer:grpo": ["test/greedy/without image"], "blind:image": [], "blind:text": [],
    }  # fmt: skip


def test_a_run_repeats_to_the_bit(trained):
    rows, again, _ = trained
    for row, other in zip(rows, again, strict=True):
        assert {**row, "cost": None} == {**other, "cost": None}


def test_what_a_run_leaves(trained):
    seeing, _, told = trained
    assert [row["step"] for row in seeing] == STEPS[seeing[0]["run"]["agent"]]
    assert [row["final"] for row in seeing] == [False, False, True]
    last = seeing[-1]
    assert set(last["scores"]) == {
        "test/greedy", "test/sampled", "compositional/greedy", "compositional/sampled",
        "test/greedy/without image", "test/greedy/without question",
    }  # fmt: skip
    assert (
        len(last["scores"]["test/greedy"]["returns"]) == 16
        and "returns" not in last["scores"]["test/sampled"]
    )
    assert last["cost"]["parameters"] > 100_000 and last["cost"]["seconds"] > 0
    # The actions in the row play the same episodes again.
    for example, score in zip(last["examples"], last["scores"]["test/greedy"]["returns"], strict=False):
        episode = episodes.replay(last["run"]["agent"], "VQA", last["run"], example)
        assert episode is not None and episode.score == score and episode.sound is None
    assert all(0 <= share <= 0.9 for share, _ in told)
    so_far = [score for share, score in told if share < 0.9 and score is not None]
    assert so_far and all(0 <= score <= 1 for score in so_far)
    with_origin = [{**row, "format": 1, "provenance": {}} for row in seeing]
    assert [store.check(row) for row in with_origin] == with_origin


@pytest.mark.parametrize("algo", ["ppo", "a2c", "dqn", "recurrent_ppo"])
def test_policies_are_kept_after_the_update_that_passes_a_share(algo, monkeypatch):
    if algo == "recurrent_ppo":
        pytest.importorskip("sb3_contrib")
    small = {"learning_starts": 16} if algo == "dqn" else {"n_steps": 8}
    small |= {} if algo == "a2c" else {"batch_size": 32}
    agent = sb3.make_agent(algo, VQA, device="cpu", num_envs=4, **small)
    after: dict[int, dict] = {0: measure.policy_of(agent)[1]}
    learn = agent.train

    def train(*arguments, **options):
        learn(*arguments, **options)
        steps, after[steps] = measure.policy_of(agent)

    monkeypatch.setattr(agent, "train", train)
    checkpoints = measure.Checkpoints(256, (0.1, 0.2, 0.55, 0.56))
    sb3.train(agent, 256, progress=False, callback=checkpoints)
    rollout = 16 if algo == "dqn" else 32
    assert [step for step, _ in checkpoints.policies] == [
        -(-step // rollout) * rollout for step in (25.6, 51.2, 143.36)
    ]  # 0.55 and 0.56 are passed by one update
    before = sorted(after)
    for step, weights in checkpoints.policies:
        assert all(torch.equal(x, after[step][name]) for name, x in weights.items())
        earlier = after[before[before.index(step) - 1]]
        assert any(not torch.equal(x, earlier[name]) for name, x in weights.items())


# The report ----------------------------------------------------------------------------------------------


def test_curves_of_runs_whose_checkpoints_are_not_at_the_same_steps(tmp_path):
    plan = Plan(agents=("transformer",), seeds=2, steps=100, episodes=20)
    plan.save(tmp_path)
    with Store(tmp_path, write=True) as opened:
        for run in plan.runs():
            late = 4 * run["seed"]
            rows = bench_runs.rows_of(run)
            opened.append([{**row, "step": row["step"] + late, "provenance": ORIGIN} for row in rows])
    with Store(tmp_path) as opened:
        board = boards.read(opened)
    (agent,) = board.trained()
    for task in board.tasks:
        steps, values = results._curve(board, agent, task)
        assert steps == [12, 27, 52, 77, 102]
        lasts = [record.curve[-1][1] for record in board.cells[agent, task]]
        assert values[-1].value == pytest.approx(np.mean(lasts))


def test_episodes_are_of_the_best_agent_on_each_task(tmp_path, monkeypatch):
    fill(tmp_path)  # skills are drawn for each run
    with Store(tmp_path) as opened:
        board = boards.read(opened)
    best = {}
    for task in board.tasks:
        means = {
            agent: np.mean([r.returns["test"].mean() for r in board.cells[agent, task]])
            for agent in board.trained()
            if (agent, task) in board.cells
        }
        best[task] = max(means, key=means.get)
    assert len(set(best.values())) > 1
    for records in board.cells.values():
        records[0].examples.append({"seed": 0, "actions": [0]})
    asked = {}
    monkeypatch.setattr(episodes, "replay", lambda agent, task, *_: asked.update({task: agent}))
    assert episodes.examples(board) == [] and asked == best


class Page(HTMLParser):
    """Collects what a page would load, and its headings."""

    def __init__(self):
        super().__init__()
        self.loads, self.heads, self.media, self._in = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self._in = tag
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data"):
                (self.media if value.startswith("data:") else self.loads).append(value)

    def handle_data(self, data):
        if self._in in ("h1", "h2"):
            self.heads.append(data)
        self._in = ""


def test_report(filled, tmp_path):
    (tmp_path / "other.txt").touch()
    said = command("report", filled, "--out", tmp_path)
    assert "written to" in said and "runs.csv" in said and "other.txt" not in said
    text = (tmp_path / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert not [load for load in page.loads if not load.startswith("#")]
    assert "http:" not in text and "https:" not in text
    for head in (
        "Benchmark core-v0 (100 steps, 20 episodes)", "Leaderboard", "Episodes", "By tag", "VQA-v0, difficulty 0",
        "Without a modality: VQA-v0, difficulty 0", "By type of question: VQA-v0, difficulty 0",
        "Probability of improvement", "Differences to ppo", "Differences to ppo, compositional", "Power", "Where the rows come from",
    ):  # fmt: skip
        assert head in page.heads, head
    assert (
        sum(each.startswith("data:image/webp") for each in page.media) == 4 * episodes.EACH + 2 * 2
    )  # two of the made-up captions end
    assert sum(each.startswith("data:audio/wav") for each in page.media) == 2 * episodes.EACH
    assert len(text) < 10 * 2**20
    names = {path.stem for path in (tmp_path / "figures").glob("*.svg")}
    assert names == {"profiles", "efficiency", "tags", "cost", *(f"curve_{i}" for i in range(6))}
    assert all("xmlns=" in path.read_text() for path in (tmp_path / "figures").glob("*.svg"))
    assert "blind to audio" in text and "not ranked" in text
    with open(tmp_path / "leaderboard.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["agent"] for line in lines][:2] == ["oracle", "ppo"]
    best = lines[1]
    name = "0 random, 1 oracle: interquartile mean"
    assert float(best[f"{name}, low"]) < float(best[name]) < float(best[f"{name}, high"])
    with open(tmp_path / "runs.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(PLAN.runs())


def test_a_report_repeats_to_the_byte(tmp_path):
    folder = fill(tmp_path / "results", SMALL)
    pages = []
    for name in ("a", "b"):
        results.write(folder, tmp_path / name)
        pages.append([path.read_bytes() for path in sorted((tmp_path / name).rglob("*")) if path.is_file()])
    assert pages[0] == pages[1]


def test_numbers_of_the_board_by_hand(filled):
    with Store(filled) as opened:
        board = boards.read(opened)
        finals = list(opened.finals())
    means = {}
    for row in finals:
        run = row["run"]
        means.setdefault((run["agent"], run["id"], run["difficulty"]), []).append(
            row["scores"]["test/greedy"]["return"]
        )
    tasks = [(task.id, task.difficulty) for task in SUITES["core-v0"].tasks]
    expected = np.mean([
        (np.mean(means["ppo", *task]) - means["random", *task][0]) / (1 - means["random", *task][0]) for task in tasks
    ])  # fmt: skip
    assert board.aggregates("ppo", "test")["mean"].value == pytest.approx(expected)
    floor = max(
        [
            np.mean(means["blind:image", VQA, 0]),
            np.mean(means["blind:text", VQA, 0]),
            *means["most_frequent", VQA, 0],
        ]
    )
    assert board.floor("VQA-v0, difficulty 0", "test", "blind") == pytest.approx(floor)
    assert board.aggregates("oracle", "test")["mean"].value == 1
    assert board.unranked == ["blind to audio", "blind to text"] and board.ranked[0] == "oracle"
    assert board.aggregates("blind to text", "test") == {}
    assert set(board.tags["audio"]) == {
        "AudioVisualMatching-v0, difficulty 0",
        "AudioVisualMatching-v0, difficulty 1",
    }


def test_a_report_does_not_depend_on_the_order_of_the_rows(filled, tmp_path):
    texts = []
    for folder in (filled, tmp_path / "turned"):
        if folder != filled:
            with Store(filled) as opened:
                rows = list(opened.all())
            runs = {json.dumps(row["run"], sort_keys=True): [] for row in reversed(rows)}
            for row in rows:
                runs[json.dumps(row["run"], sort_keys=True)].append(row)
            folder.mkdir()
            PLAN.save(folder)
            with Store(folder, write=True) as opened:
                for of_run in runs.values():
                    opened.append(of_run)
        out = tmp_path / f"{folder.name} report"
        results.write(folder, out)
        texts.append(
            [(out / name).read_text() for name in ("report.md", "leaderboard.csv", "figures/curve_0.svg")]
        )
    assert texts[0] == texts[1]


def test_what_is_missing_is_said(tmp_path):
    plan = replace(PLAN, seeds=2)
    runs = [run for run in plan.runs() if run["id"] != MATCHING and (run["agent"], run["seed"]) != ("ppo", 1)]
    plan.save(tmp_path)
    with Store(tmp_path, write=True) as opened:
        for i, run in enumerate(runs):
            origin = {**ORIGIN, "device": "cpu" if i else "cuda"}
            opened.append([{**row, "provenance": origin} for row in bench_runs.rows_of(run)])
    results.write(tmp_path, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "with 2 seeds of each agent on each of its tasks here, 4 runs more would be there" in text
    assert (
        "nothing was done on AudioVisualMatching-v0, difficulty 0; AudioVisualMatching-v0, difficulty 1"
        in text
    )
    assert "made on different devices, which change scores: cpu; cuda" in text


def test_without_blind_agents_nothing_is_above_blind(tmp_path):
    folder = fill(tmp_path, replace(PLAN, agents=("ppo", "a2c")))
    with Store(folder) as opened:
        board = boards.read(opened)
    assert board.floor(board.tasks[0], "test", "blind") is None
    assert board.floor(board.tasks[0], "test", "random") is not None


def test_an_agent_that_lacks_a_task_is_not_averaged(tmp_path):
    folder = fill(tmp_path, leave_out=[("a2c", CAPTIONING)])
    with Store(folder) as opened:
        board = boards.read(opened)
    assert "a2c" in board.unranked and "ppo" in board.ranked
    text = "\n".join(results.remarks(board))
    assert (
        "averages over different sets of tasks can't be compared: a2c; blind to audio; blind to text" in text
    )


def test_agents_without_a_checkpoint_are_said_to_have_no_line(tmp_path):
    fill(tmp_path, replace(PLAN, agents=("ppo",), seeds=1))
    with Store(tmp_path, write=True) as opened:
        for run in replace(PLAN, agents=("a2c",), seeds=1).runs():
            if run["agent"] == "a2c":
                last = bench_runs.rows_of(run)[-1]  # its first rollout was the last
                opened.append([{**last, "provenance": ORIGIN}])
    with Store(tmp_path) as opened:
        board = boards.read(opened)
    text = "\n".join(results.remarks(board))
    assert (
        "no line under Sample efficiency" not in text
        and "without a line under Sample efficiency: a2c." in text
    )
    drawn = results.figures(board)
    assert ">a2c</text>" not in drawn["efficiency"] and ">a2c</text>" in drawn["curve_0"]


def test_training_that_is_much_longer_than_asked_for_is_said(tmp_path):
    plan = replace(SMALL, agents=("ppo", "a2c"))
    plan.save(tmp_path)
    with Store(tmp_path, write=True) as opened:
        for run in plan.runs():
            rows = bench_runs.rows_of(run)
            if run["agent"] == "ppo":
                rows[-1]["step"] = 2048
            opened.append([{**row, "provenance": ORIGIN} for row in rows])
    with Store(tmp_path) as opened:
        board = boards.read(opened)
    (said,) = [each for each in results.remarks(board) if "longer" in each]
    assert said.startswith("Trained over a quarter longer than asked for: ppo on ")
    assert said.endswith("difficulty 0 (2,048 steps in place of 100).")


def test_a_report_of_something_else_is_not_written_over(filled, tmp_path):
    for name in ("report.md", "runs.csv"):
        theirs = tmp_path / name
        theirs.write_text("# Sales")
        with pytest.raises(ValueError, match=rf"holds a {name} of something else: choose another folder"):
            results.write(filled, tmp_path)
        assert theirs.read_text() == "# Sales" and list(tmp_path.iterdir()) == [theirs]
        theirs.unlink()
    for _ in range(2):  # one's own report is made anew
        results.write(filled, tmp_path)


def test_versions_that_differ_are_said(tmp_path):
    fill(tmp_path, SMALL)
    (run,) = [run for run in SMALL.runs() if run["agent"] == "ppo" and run["difficulty"] == 0]
    run = bench_runs.rows_of({**run, "seed": 1})
    with Store(tmp_path, write=True) as opened:
        opened.append([{**row, "provenance": {**ORIGIN, "code": "new"}} for row in run])
    results.write(tmp_path, tmp_path / "report")
    for name in ("report.html", "report.md"):
        assert (
            "Careful: these rows come from different versions of the code"
            in (tmp_path / "report" / name).read_text()
        )


def test_other_suites_are_left_out_and_named(tmp_path):
    fill(tmp_path, Plan(agents=(), steps=100, episodes=20))
    fill(tmp_path, SMALL)
    results.write(tmp_path, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert (
        text.startswith("# Benchmark audio-v0") and "left out here: core-v0 (100 steps, 20 episodes)" in text
    )


def test_hostile_rows_stay_text(tmp_path):
    run = {**SMALL.runs()[3], "agent": "=<script>alert(1)</script>|`x`"}
    failed = {**run, "seed": 9}
    with Store(fill(tmp_path, SMALL), write=True) as opened:
        rows = [
            {**row, "provenance": {**ORIGIN, "command": "<img src=x>"}} for row in bench_runs.rows_of(run)
        ]
        rows[-1]["examples"] = [{"seed": 0, "actions": [10**9]}, {"seed": -5, "actions": []}]
        opened.append(rows)
        opened.append([{"run": failed, "step": 0, "final": True, "error": "<b>E</b>", "provenance": ORIGIN}])
    results.write(tmp_path, tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<script>alert" not in page and "<img src=x>" not in page and "<b>E</b>" not in page
    assert "&lt;b&gt;E&lt;/b&gt;" in page and "Runs that failed" in page
    assert "<script>" not in (tmp_path / "report" / "report.md").read_text()
    assert not re.search(r"(^|,)=<", (tmp_path / "report" / "runs.csv").read_text(), re.M)
    assert all("<script>" not in path.read_text() for path in (tmp_path / "report" / "figures").glob("*"))


def test_without_baselines_there_is_no_ranking(tmp_path):
    with Store(tmp_path, write=True) as opened:
        opened.append(rows_of())
    results.write(tmp_path, tmp_path / "report")
    assert (
        "No agent has a score on every task beside random and oracle"
        in (tmp_path / "report" / "report.md").read_text()
    )


def test_replay_of_sound_and_of_what_does_not_fit():
    run = {"id": MATCHING, "difficulty": 0}
    episode = episodes.replay("a", "t", run, {"seed": 3, "actions": [0]})
    env = gym.make(MATCHING, split="test", difficulty=0)
    env.reset(seed=3)
    assert (
        episode.score == env.step(0)[1] and episode.sound[:4] == b"RIFF" and episode.picture[8:12] == b"WEBP"
    )
    for other in ({"id": "MMRL/Gone-v0"}, {"difficulty": 9}):
        assert episodes.replay("a", "t", {**run, **other}, {"seed": 3, "actions": [0]}) is None
    for actions in ([99], [], [0] * 2000):
        assert episodes.replay("a", "t", run, {"seed": 3, "actions": actions}) is None


# The command line ----------------------------------------------------------------------------------------


def test_command(tmp_path, monkeypatch):
    monkeypatch.setitem(SUITES, "tiny-v0", Suite("tiny-v0", (SuiteTask(VQA, 0, 64),), seeds=1))
    monkeypatch.setattr(job, "execute", bench_runs.execute)
    out = tmp_path / "results"
    arguments = ("--suite", "tiny", "--agents", "ppo", "--episodes", 8, "--device", "cpu")
    said = command("benchmark", *arguments, "--policy", "tests.test_benchmark_faults:Yes", "--out", out)
    assert "5 runs, 0 of them done before" in said and "policy:tests.test_benchmark_faults:Yes" in said
    assert "5 runs, 5 of them done before" in command("benchmark", "--resume", out)
    said = command("benchmark", "--resume", out, "--seeds", 2)
    assert "7 runs, 5 of them done before" in said and "the plan is changed: seeds: the suite's -> 2" in said
    command("report", out, "--out", tmp_path / "report")
    assert "tests.test_benchmark_faults:Yes" in (tmp_path / "report" / "report.md").read_text()


def test_live_table():
    table = LiveTable()
    table.live.console = Console(width=120, record=True, file=io.StringIO())
    (run, other) = [run for run in PLAN.runs() if run["agent"] == "ppo"][:2]
    with table:
        table.begin(12, 3, ["seeds: 1 -> 3"])
        table.progress(Progress(run, 0.5, None))
        table.progress(Progress(run, 0.9, 0.25))
        table.done(Done(other, bench_runs.rows_of(other, 1.0), 7.0))
        table.done(failed({**other, "agent": "policy:m:P"}, 7.0, "ValueError", "[batch, 3] [/b]"))
    text = table.live.console.export_text()
    assert "the plan is changed: seeds: 1 -> 3" in text and "5 of 12 runs, about" in text and "0.250" in text
    assert "policy:m:P" in text and "ValueError: [batch, 3] [/b]" in text
    assert re.search(r"difficulty 1: ppo, cnn\+concat, seed 0 .* 1.000  \(7 s\)", text)


@pytest.mark.parametrize(("width", "table"), [(79, False), (80, True)])
def test_a_narrow_terminal_gets_lines(width, table, monkeypatch, tmp_path):
    """The table's columns would be empty there."""
    given = {}
    monkeypatch.setattr("mmenvs.cli_benchmark.Console", lambda: Console(width=width, force_terminal=True))
    monkeypatch.setattr(runner, "benchmark", lambda plan, folder, **options: given.update(options) or 0)
    command("benchmark", "--out", tmp_path)
    assert isinstance(given["watcher"], LiveTable if table else runner.Lines)


def test_lines_tell_how_far_a_run_is(monkeypatch):
    said, now = [], [0.0]
    monkeypatch.setattr(runner.time, "monotonic", lambda: now[0])
    lines = runner.Lines(said.append, every=60.0)
    run = next(run for run in PLAN.runs() if run["agent"] == "ppo")
    lines.begin(1, 0, [])
    for now[0], share, score in ((0.0, 0.0, None), (59.0, 0.1, None), (60.0, 0.2, None), (125.0, 0.5, 0.25)):
        lines.progress(Progress(run, share, score))
    name = runner.run_name(run)
    assert said[1:] == [f"{name}: 20%", f"{name}: 50%, 0.250 so far"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["benchmark"], "either --out"),
        (["benchmark", "--out", "a", "--resume", "b"], "must be given, not both"),
        (
            ["benchmark", "--out", "{}", "--steps", "1e30"],
            "steps must be a whole number from 1 to under 1e15",
        ),
        (["benchmark", "--out", "{}", "--suite", "best"], "suite must be one of"),
        (["benchmark", "--out", "{}", "--agents", ""], "--agents must name at least one"),
        (["benchmark", "--out", "{}", "--agents", "best"], "agents must name some of"),
        (["benchmark", "--out", "{}", "--timeout", "0"], "timeout must be above 0"),
        (["benchmark", "--resume", "{}/nothing"], "no benchmark in"),
        (["report", "{}"], "no results in"),
    ],
)
def test_command_errors(arguments, message, tmp_path):
    assert message in command(*(each.format(tmp_path) for each in arguments), code=2)


@pytest.mark.parametrize(("low", "high"), [(5e-6, 50.0), (3.0, 100.0), (1.0, 3000.0)])
def test_costs_of_any_spread_have_labels_that_can_be_read(low, high):
    entries = [Entry(str(cost), stats.Interval(0.5, 0.4, 0.6), {"seconds": cost}) for cost in (low, high)]
    drawn = plots.pareto("seconds", entries, plots.styles([entry.name for entry in entries]))
    labels = re.findall(r">([^<>\n]*)</text>", drawn.split("training, s")[0])
    assert 3 <= len(labels) <= 9, labels
