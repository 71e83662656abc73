"""Comparisons: the grid, its rows, what they say, the report, and what goes wrong."""

from __future__ import annotations

import html
import importlib
import json
import math
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmenvs_agents import sb3
from safetensors.torch import load_file, save_file
from scipy.stats import trim_mean
from typer.testing import CliRunner

from mmenvs.benchmark import report, stats
from mmenvs.benchmark import rows as store
from mmenvs.benchmark.compare import Grid, compare, plan
from mmenvs.benchmark.measure import space_of
from mmenvs.benchmark.summary import summarise
from mmenvs.cli import app
from mmenvs.embeddings import recommend
from mmenvs.embeddings.joint import load_shapes
from mmenvs.files import locked
from tests import tiny_models

VQA, MATCHING, CAPTIONING = "MMRL/VQA-v0", "MMRL/AudioVisualMatching-v0", "MMRL/Captioning-v0"
TINY = {"steps": (256,), "num_envs": 8, "episodes": 32}
GRID = Grid(envs=(VQA,), embeddings=("cnn+concat", "vit+weighted_sum"), seeds=2, **TINY)


def synthetic(
    embedding="cnn+concat", seed=0, returns=(0, 1), id=VQA, cost=None, curve=((50, 0.2), (100, 0.4)), **run
):
    """A row as a run leaves it, with numbers of our own."""
    scores = {
        "return": float(np.mean(returns)),
        "success": float(np.mean(np.array(returns) >= 1)),
        "length": 1.0,
        "returns": list(returns),
    }
    return {
        "format": 1,
        "run": {
            "id": id, "env_kwargs": {"difficulty": 0}, "embedding": embedding, "agent": "ppo", "steps": 100,
            "seed": seed, "episodes": len(returns), **run,
        },
        "bounds": [0, 1],
        "train": {"steps": 100, "seconds": 1.0, "cpu_seconds": 1.0},
        "curve": [[step, value, value, 10] for step, value in curve],
        "scores": {"test": scores, "compositional": scores},
        "checkpoints": [[80, 0.2], [90, 0.4], [100, 0.6]],
        "perturbed": {"clean": 0.5, "noise": 0.4, "pitch": 0.2},
        "cost": {"milliseconds": 1.0, "megabytes": 1.0, "seconds": 1.0, "parameters": 1000, **(cost or {})},
        "structure": {},
        "provenance": {"commit": "abc", "versions": {"torch": "2"}},
    }  # fmt: skip


def baseline(name, returns=(0, 1), id=VQA):
    """The row of an agent that learns nothing."""
    row = synthetic(returns=returns, id=id)
    own = {"id": id, "env_kwargs": {"difficulty": 0}, "episodes": len(returns), "baseline": name}
    return {key: row[key] for key in ("format", "bounds", "scores")} | {"run": own}


def trained(rows):
    return [row for row in rows if "baseline" not in row["run"]]


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result.output


@pytest.fixture(scope="module", autouse=True)
def short():
    """Costs are timed for an instant, and linear probes, slow on few rows, aren't fitted: both have their own tests."""
    with pytest.MonkeyPatch.context() as patch:
        # The function of that name hides its module.
        patch.setattr(importlib.import_module("mmenvs.embeddings.cost"), "_SECONDS", 0.01)
        patch.setattr("mmenvs.embeddings.probes.linear_probe", lambda *arguments: 0.5)
        yield


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Folder of a small comparison, and what was said of it."""
    out = tmp_path_factory.mktemp("compare")
    said = run(
        "compare", "--envs", VQA, "--embeddings", ",".join(GRID.embeddings), "--seeds", 2, "--steps", 256,
        "--num-envs", 8, "--episodes", 32, "--device", "cpu", "--budget", "megabytes=20", "--out", out,
    )  # fmt: skip
    return out, said


# The grid ------------------------------------------------------------------------------------------------


def test_grid_is_every_combination():
    grid = Grid(
        envs=(VQA, MATCHING),
        embeddings=("cnn+concat", "cnn+transformer"),
        agents=("ppo", "a2c"),
        seeds=3,
        steps=(1000, 2000),
        env_axes={"difficulty": (0, 1), "seconds": (0.5, 1.0)},
        features_dim=(64,),
    )
    runs = grid.runs()
    # Only the matching task has sounds of a length.
    assert len(runs) == (2 + 4) * 2 * 2 * 3 * 2
    assert len({json.dumps(run) for run in runs}) == len(runs)
    assert {run["seed"] for run in runs} == {0, 1, 2}
    assert [run["seed"] for run in runs] == sorted(run["seed"] for run in runs)
    assert all(("seconds" in run["env_kwargs"]) == (run["id"] == MATCHING) for run in runs)
    assert all(run["features_dim"] == 64 and "num_envs" not in run for run in runs)


@pytest.mark.parametrize(
    ("embedding", "id", "encoders"),
    [
        ("cnn+concat", VQA, {"image": "cnn", "question": "bow"}),
        ("gru+transformer", VQA, {"image": "cnn", "question": "gru"}),
        ("transformer+transformer", CAPTIONING, {"image": "cnn", "caption": "transformer"}),
        ("gru+concat", MATCHING, {"audio": "logmel_cnn", "images": "cnn"}),
    ],
)
def test_plan_makes_an_agent(embedding, id, encoders):
    chosen = plan(embedding, id)
    assert chosen == {"fusion": embedding.split("+")[1], "encoders": encoders}
    agent = sb3.make_agent("ppo", id, device="cpu", num_envs=8, **chosen)
    assert sb3.settings_of(agent).encoders == encoders


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"envs": ("MMRL/VQ-v0",)}, gym.error.NameNotFound, "did you mean MMRL/VQA-v0"),
        ({"envs": ()}, ValueError, "envs must name at least one"),
        ({"envs": VQA}, TypeError, "envs must be a tuple of values, got 'MMRL/VQA-v0'"),
        ({"envs": (1,)}, TypeError, "envs must hold str values, got 1"),
        ({"embeddings": ()}, ValueError, "embeddings must name at least one"),
        ({"embeddings": "cnn+concat"}, TypeError, "embeddings must be a tuple of values"),
        ({"agents": "ppo"}, TypeError, "agents must be a tuple of values"),
        ({"steps": 100}, TypeError, "steps must be a tuple of values, got 100"),
        ({"features_dim": 64}, TypeError, "features_dim must be a tuple of values"),
        ({"env_axes": {"difficulty": 0}}, TypeError, r"env_axes\['difficulty'\] must be a tuple of values"),
        ({"env_axes": {"difficulty": ()}}, ValueError, "must name at least one"),
        ({"env_axes": (0,)}, TypeError, "env_axes must be a mapping"),
        (
            {"embeddings": ("logmel_cnn+concat",)},
            ValueError,
            "the encoder in 'logmel_cnn.concat' fits no observation of MMRL/VQA-v0; theirs are cnn, vit, shapes, bow",
        ),
        (
            {"embeddings": ("hf:no/such+model+concat",)},
            FileNotFoundError,
            "'no/such.model' is n",
        ),
        ({"embeddings": ("cnn",)}, ValueError, r"embedding must be '<encoder>\+<fusion>'"),
        (
            {"embeddings": ("cn+concat",)},
            ValueError,
            "the encoder in 'cn.concat' must be one of 'cnn', 'vit'",
        ),
        ({"embeddings": ("cnn+sum",)}, ValueError, "the fusion in 'cnn.sum' must be one of 'concat'"),
        ({"embeddings": ("cnn+concat",) * 2}, ValueError, "embeddings holds 'cnn.concat' twice"),
        ({"agents": ("ppo", "sac")}, ValueError, "agents must be one of 'ppo', 'a2c'.* got 'sac'"),
        ({"seeds": 0}, ValueError, "seeds must be from 1"),
        ({"seeds": 1.5}, TypeError, "seeds must be an integer"),
        ({"steps": (0,)}, ValueError, "steps must be from 1"),
        ({"episodes": 1}, ValueError, "episodes must be from 4"),
        ({"features_dim": (0,)}, ValueError, "features_dim must be from 1"),
        ({"num_envs": 0}, ValueError, "num_envs must be from 1"),
        ({"env_axes": {"difficulty": (9,)}}, ValueError, "difficulty must be from 0 to 3"),
        ({"env_axes": {"seconds": (1.0,)}}, ValueError, "none of MMRL/VQA-v0 takes seconds"),
    ],
)
def test_grid_errors_come_before_any_run(change, error, message, tmp_path):
    out = tmp_path / "new"
    with pytest.raises(error, match=message):
        compare(Grid(**{"envs": (VQA,), "embeddings": ("cnn+concat",), **change}), out, say=str)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "megabytes"], "budget must be such as megabytes=20"),
        (["--budget", "megabytes=2,megabytes=3"], "budget names megabytes twice"),
        (["--envs", ""], "--envs must name at least one"),
        (["--embeddings", ","], "--embeddings must name at least one"),
        (["--budget", "watts=20"], "budget must name some of megabytes"),
        (["--budget", "megabytes=-1"], "must be a number above 0"),
        (["--features-dim", "wide"], "features-dim must be numbers"),
        (["--steps", "many"], "steps must be a whole number from 1"),
        (["--difficulty", "0,4"], "difficulty must be 0, 1, 2 or 3"),
        (["--device", "tpu"], "device must be 'auto', 'cpu' or 'cuda'"),
        (["--out", __file__], "out must be a folder"),
    ],
)
def test_command_line_errors(arguments, message, tmp_path):
    given = ["--envs", VQA, "--embeddings", "cnn+concat", "--out", tmp_path / "new", *arguments]
    assert message in run("compare", *given, code=2)
    assert not (tmp_path / "new").exists()


# Runs and rows -------------------------------------------------------------------------------------------


def test_comparison_leaves_rows_with_all_criteria(compared):
    out, said = compared
    rows = trained(store.read(out))
    usual = sb3.settings_of(sb3.make_agent("ppo", VQA, num_envs=2, device="cpu")).precision
    assert said.count("cnn+concat, ppo, seed") == 2 and "4/4" in said
    assert len(rows) == 4 and not any("error" in row for row in rows)
    for row in rows:
        assert row["train"]["steps"] == 256
        for split in ("test", "compositional"):
            scores = row["scores"][split]
            assert len(scores["returns"]) == 32 and scores["return"] == pytest.approx(
                np.mean(scores["returns"])
            )
        assert sum(point[3] for point in row["curve"]) == 256  # one-step episodes, none lost
        assert row["curve"][-1][0] == 256
        assert [step for step, _ in row["checkpoints"]] == [256]  # one rollout, one update
        assert row["checkpoints"][-1][1] == row["perturbed"]["clean"]
        assert set(row["perturbed"]) == {
            "clean",
            "image noise",
            "image brightness",
            "question word_dropout",
            "without image",
            "without question",
        }
        assert row["cost"]["parameters"] > 1000 and row["cost"]["milliseconds"] > 0
        assert set(row["structure"]["modalities"]) == {"image", "question"}
        assert set(row["structure"]["use"]["image"]) == {"score", "dropped", "shuffled", "swapped"}
        made = row["provenance"]
        assert made["versions"]["torch"] and made["device"].startswith("cpu")
        assert made["device"].endswith(f", recipes in {usual})")
    assert rows[0]["plan"] == {"fusion": "concat", "encoders": {"image": "cnn", "question": "bow"}}
    assert "within 20 MB: " in said


def test_frozen_weights_count(tmp_path):
    """``shapes`` is no part of the extractor that trains, but whoever uses it has to hold it."""
    grid = Grid(envs=(VQA,), embeddings=("shapes+concat",), seeds=1, **TINY)
    compare(grid, tmp_path, device="cpu", say=str)
    cost = trained(store.read(tmp_path))[0]["cost"]
    frozen = sum(x.numel() for x in load_shapes().parameters())
    assert frozen > 100_000 and cost["parameters"] == cost["trainable_parameters"] + frozen
    assert cost["megabytes"] == pytest.approx(4e-6 * cost["parameters"], rel=0.05)
    assert cost["cache_kilobytes"] > 1


def test_pretrained_models_are_compared(tmp_path):
    """A folder may hold the sign that stands before the fusion."""
    model = tiny_models.save(tiny_models.clip, tmp_path / "tiny+clip")
    embedding = f"hf:{model}+gated"
    grid = Grid(envs=(VQA,), embeddings=(embedding,), seeds=1, **TINY)
    compare(grid, tmp_path / "out", device="cpu", say=str)
    row = trained(store.read(tmp_path / "out"))[0]
    assert "error" not in row, row
    assert row["plan"] == {"fusion": "gated", "encoders": {"image": f"hf:{model}", "question": f"hf:{model}"}}
    # It is frozen: what trains is small beside it, and a cache keeps two projections of 24 numbers.
    assert 0 < row["cost"]["trainable_parameters"] < row["cost"]["parameters"]
    assert row["cost"]["cache_kilobytes"] == pytest.approx(2 * 24 * 4 / 1e3)
    [candidate] = summarise([row]).candidates
    assert candidate.name == f"hf:{model} + gated" and not candidate.defaults
    assert f"hf:{model} + gated" in (tmp_path / "out" / "report.md").read_text()
    # With other weights it would be another model under the same name.
    weights = Path(model) / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: 1.5 * x for name, x in tensors.items()}, weights, {"format": "pt"})
    command = [
        "compare",
        "--envs",
        VQA,
        "--embeddings",
        embedding,
        "--out",
        tmp_path / "out",
        "--device",
        "cpu",
    ]
    assert f"the files of 'hf:{model}' are other ones than those of its rows" in run(*command, code=2)
    # What can't be read is found before the first run.
    weights.write_bytes(weights.read_bytes()[:1000])
    command[-3] = tmp_path / "other"
    assert f"can't load the weights of '{model}'" in run(*command, code=2)
    assert not (tmp_path / "other" / "rows.jsonl").exists()


def test_a_pretrained_model_is_the_encoder_of_what_it_reads(tmp_path):
    vit = f"hf:{tiny_models.save(tiny_models.vit, tmp_path / 'vit')}"
    assert plan(f"{vit}+concat", VQA)["encoders"] == {"image": vit, "question": "bow"}
    assert plan(f"{vit}+concat", MATCHING)["encoders"] == {"audio": "logmel_cnn", "images": vit}
    bert = f"hf:{tiny_models.save(tiny_models.bert, tmp_path / 'bert')}"
    assert plan(f"{bert}+concat", VQA)["encoders"] == {"image": "cnn", "question": bert}
    said = run(
        "compare", "--envs", MATCHING, "--embeddings", f"{bert}+film", "--out", tmp_path / "out", code=2
    )
    assert f"the encoder in '{bert}+film' fits no observation of {MATCHING}" in said


def test_longer_texts_are_tasks_of_their_own():
    axes = {"difficulty": (0,), "filler": (0, 20)}
    runs = Grid(envs=(VQA, MATCHING), embeddings=("gru+concat",), seeds=1, env_axes=axes).runs()
    assert [run["env_kwargs"].get("filler") for run in runs] == [0, 20, None]
    assert space_of(VQA, runs[1]["env_kwargs"])["question"].shape == (40,)
    summary = summarise([synthetic(**{key: run[key] for key in ("id", "env_kwargs")}) for run in runs])
    assert summary.tasks[1] == "VQA-v0, difficulty 0, filler 20" and len(summary.tasks) == 3


def test_last_checkpoint_is_the_agent_itself(compared, tmp_path):
    """The scores belong to the trained weights, although other ones were loaded for the checkpoints."""
    out, _ = compared
    row = trained(store.read(out))[0]
    agent = sb3.make_agent(
        "ppo", VQA, seed=0, device="cpu", num_envs=8, env_kwargs={"difficulty": 0}, **row["plan"]
    )
    sb3.train(agent, 256, progress=False)
    from mmenvs_agents.evaluation import evaluate

    result = evaluate(agent, VQA, episodes=32, env_kwargs={"difficulty": 0})
    assert result.returns.tolist() == row["scores"]["test"]["returns"]


def test_same_command_does_only_what_is_missing(compared, tmp_path):
    out = tmp_path / "copy"
    out.mkdir()
    text = (compared[0] / "rows.jsonl").read_text()
    lines = text.splitlines(keepends=True)
    (out / "rows.jsonl").write_text("".join(lines[:6]) + lines[6][:200])  # killed while writing the fourth
    said: list[str] = []
    compare(GRID, out, device="cpu", say=said.append)
    assert "cut off while it was written (200 bytes)" in said[0] and "4 runs, 3 of them done" in said[1]
    again = (out / "rows.jsonl").read_text().splitlines(keepends=True)
    assert again[:6] == lines[:6] and len(again) == 7
    old, new = json.loads(lines[6]), json.loads(again[6])
    assert new["run"] == old["run"] and new["scores"] == old["scores"] and new["curve"] == old["curve"]
    said.clear()
    before = (out / "rows.jsonl").read_bytes()
    compare(GRID, out, device="cpu", say=said.append)
    assert said[0] == "4 runs, 4 of them done before" and (out / "rows.jsonl").read_bytes() == before


def test_failing_run_becomes_a_row_and_is_tried_again(tmp_path, monkeypatch):
    def measure(run, plan, device, tell, broken=True):
        if broken and plan["fusion"] == "concat":
            raise RuntimeError("out of\nmemory <b>")
        return {key: value for key, value in synthetic().items() if key not in ("run", "provenance")}

    grid = Grid(envs=(VQA,), embeddings=("cnn+concat", "cnn+weighted_sum"), seeds=1, **TINY)
    monkeypatch.setattr("mmenvs.benchmark.compare.measure", measure)
    advice = compare(grid, tmp_path, device="cpu", say=str)
    failed, fine = trained(store.read(tmp_path))
    assert failed["error"] == "RuntimeError: out of memory <b>" and "Traceback" in failed["traceback"]
    assert (
        fine["scores"] and advice.embedding == "cnn+weighted_sum" and advice.incomplete == ("cnn + concat",)
    )
    page = (tmp_path / "report.html").read_text()
    assert "RuntimeError: out of memory &lt;b&gt;" in page and "memory <b>" not in page
    said: list[str] = []
    monkeypatch.setattr("mmenvs.benchmark.compare.measure", partial(measure, broken=False))
    assert compare(grid, tmp_path, device="cpu", say=said.append).incomplete == ()
    assert said[0] == "2 runs, 1 of them done before" and len(trained(store.read(tmp_path))) == 3
    assert "Runs that failed" not in (tmp_path / "report.html").read_text()


def test_ctrl_c_keeps_what_is_done(tmp_path, monkeypatch):
    def measure(run, plan, device, tell):
        if run["seed"] == 1:
            raise KeyboardInterrupt
        return {key: value for key, value in synthetic().items() if key not in ("run", "provenance")}

    monkeypatch.setattr("mmenvs.benchmark.compare.measure", measure)
    given = ["--envs", VQA, "--embeddings", "cnn+concat", "--seeds", 3, "--out", tmp_path]
    said = run("compare", *given, code=130)
    assert "stopped early; the same command goes on" in said
    assert len(trained(store.read(tmp_path))) == 1 and (tmp_path / "report.html").exists()


def test_failed_runs_fail_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(sb3, "make_agent", lambda *a, **k: 1 / 0)
    given = ["--seeds", 2, "--steps", 64, "--episodes", 8, "--device", "cpu", "--out", tmp_path]
    said = run("compare", "--envs", VQA, "--embeddings", "cnn+concat", *given, code=1)
    assert "2 runs failed; the report says why, the same command tries again" in said


def test_all_runs_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(sb3, "make_agent", lambda *a, **k: 1 / 0)
    grid = Grid(envs=(VQA,), embeddings=("cnn+concat",), seeds=1, **TINY)
    assert compare(grid, tmp_path, device="cpu", say=str) is None
    assert "ZeroDivisionError" in (tmp_path / "report.md").read_text()
    with pytest.raises(ValueError, match="no configuration has a score on all"):
        recommend(tmp_path)


def test_two_comparisons_do_not_share_a_folder(tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match="another comparison is writing"):
        compare(GRID, tmp_path, device="cpu", say=str)
    with locked(tmp_path):
        pass


def test_kill_while_rows_are_written_loses_at_most_the_last(tmp_path):
    path = tmp_path / "rows.jsonl"
    code = (
        "import sys, pathlib; from mmenvs.benchmark import rows\n"
        "for i in range(10**9): rows.append(pathlib.Path(sys.argv[1]), "
        "{'run': {'id': 'x', 'env_kwargs': {}, 'embedding': 'e', 'agent': 'a', 'steps': 1, 'seed': i}, 'error': 'x' * 50_000})"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)])
    while not path.exists() or path.stat().st_size < 500_000:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    store.drop_torn(path)
    seeds = [row["run"]["seed"] for row in store.read(path)]
    assert len(seeds) >= 9 and seeds == list(range(len(seeds)))


@given(cut=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_any_cut_leaves_whole_rows(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / "rows.jsonl"
    whole = [synthetic(seed=seed, note="é\n|") for seed in range(3)]
    for row in whole:
        store.append(path, row)
    data = path.read_bytes()
    path.write_bytes(data[: cut % (len(data) + 1)])
    kept = data[: cut % (len(data) + 1)].count(b"\n")
    assert store.read(path) == whole[:kept]
    torn = store.drop_torn(path)
    assert torn == cut % (len(data) + 1) - path.stat().st_size
    store.append(path, whole[0])
    assert store.read(path) == [*whole[:kept], whole[0]]


def test_numpy_and_numbers_that_are_not_finite(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = synthetic()
    row["structure"] = {
        "a": np.float32(0.5),
        "b": np.arange(2),
        "c": math.nan,
        "d": math.inf,
        "e": np.int64(3),
    }
    store.append(path, row)
    assert store.read(path)[0]["structure"] == {"a": 0.5, "b": [0, 1], "c": None, "d": None, "e": 3}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_an_error():
    with pytest.raises(OSError, match=r"No space left|Invalid argument"):
        store.append(Path("/dev/full"), {"run": {}})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "a row is an object with format 1"),
        ('{"format": 2}', "a row is an object with format 1"),
        ('{"format": 1, "run": {}}', "run must hold id"),
        ("{" * 100_000, "line 2"),
        (json.dumps({**synthetic(), "cost": float("nan")}), "NaN is no number"),
        (json.dumps({k: v for k, v in synthetic().items() if k != "curve"}), "neither error nor curve"),
        (json.dumps({**synthetic(), "scores": {}}), "finite returns of the test split"),
        (
            json.dumps(synthetic(returns=(0, 1))).replace('"returns": [0, 1]', '"returns": ["<b>"]'),
            "finite returns",
        ),
        (json.dumps({**synthetic(), "bounds": [1, 1]}), "bounds must be two numbers"),
        (json.dumps({**synthetic(), "curve": [[1, "<b>", 0, 0]]}), "curve must hold points"),
        (json.dumps({**synthetic(), "checkpoints": [[1]]}), "checkpoints must hold pairs"),
        (json.dumps({**synthetic(), "perturbed": {"noise": 1}}), "perturbed must hold numbers, clean"),
        (json.dumps({**synthetic(), "cost": {"milliseconds": "1"}}), "cost must hold numbers"),
        (json.dumps({**synthetic(), "cost": []}), "line 2"),
        (json.dumps({**synthetic(), "plan": {}}), "line 2"),
        (json.dumps({**synthetic(), "plan": {"encoders": {"image": 1}}}), "plan must hold encoders"),
        (json.dumps({**baseline("random"), "scores": {}}), "finite returns of the test split"),
        (json.dumps({**baseline("random"), "run": {"baseline": "random"}}), "run of a baseline must hold id"),
        (json.dumps({"format": 1, "run": baseline("random")["run"]}), "baseline lacks bounds, scores"),
        ("not json", "line 2"),
    ],
)
def test_damaged_rows_are_named(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(synthetic()) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        store.read(tmp_path)
    with pytest.raises(ValueError, match="line 2"):
        recommend(tmp_path)


def test_no_rows(tmp_path):
    with pytest.raises(FileNotFoundError, match="no rows"):
        recommend(tmp_path)
    with pytest.raises(ValueError, match="at least one row"):
        recommend([])
    with pytest.raises(ValueError, match="a row is an object"):
        recommend([{"score": 1}])


# Statistics ----------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=40))
def test_interquartile_mean_is_scipys_trimmed_mean(scores):
    assert stats.interquartile_mean(np.array(scores)) == pytest.approx(trim_mean(scores, 0.25), abs=1e-12)


@given(
    st.lists(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=8), min_size=1, max_size=4), min_size=1, max_size=3),
    st.sampled_from([stats.mean, stats.interquartile_mean]),
)  # fmt: skip
def test_bootstrap_holds_the_value_and_repeats(tasks, statistic):
    one = stats.bootstrap(tasks, statistic, resamples=50)
    assert one == stats.bootstrap(tasks, statistic, resamples=50)
    means = [np.mean(run) for runs in tasks for run in runs]
    assert one.low <= one.value <= one.high and one.value == pytest.approx(float(statistic(np.array(means))))
    assert min(min(run) for runs in tasks for run in runs) <= one.low + 1e-12


def half(interval):
    return (interval.high - interval.low) / 2


def test_bootstrap_interval_is_as_wide_as_the_standard_error():
    generator = np.random.default_rng(0)
    episodes = generator.random(2000) < 0.7
    interval = stats.bootstrap([[episodes]])
    assert half(interval) == pytest.approx(1.96 * episodes.std() / np.sqrt(2000), rel=0.08)
    # Runs that differ: their spread counts, not only that of the episodes.
    runs = [np.full(100, value) for value in generator.normal(0.5, 0.1, 50)]
    means = np.array([run.mean() for run in runs])
    assert half(stats.bootstrap([runs])) == pytest.approx(1.96 * means.std() / np.sqrt(50), rel=0.08)


def test_bootstrap_is_stratified():
    """Two tasks whose runs agree within each: no draw mixes them, so there is nothing uncertain."""
    interval = stats.bootstrap([[[0.0], [0.0]], [[1.0], [1.0]]])
    assert (interval.low, interval.value, interval.high) == (0.5, 0.5, 0.5)


def test_bootstrap_covers_the_truth():
    covered = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        runs = [generator.random(50) < p for p in generator.beta(20, 20, 10)]
        interval = stats.bootstrap([runs], resamples=300, seed=seed)
        covered += interval.low <= 0.5 <= interval.high
    assert covered > 0.88 * 200


@pytest.mark.parametrize(
    ("tasks", "arguments", "message"),
    [
        ([], {}, "at least one task"),
        ([[]], {}, "at least one run"),
        ([[[]]], {}, "finite scores"),
        ([[[math.nan]]], {}, "finite scores"),
        ([[[[1.0]]]], {}, "finite scores"),
        ([[[1.0]]], {"confidence": 1.0}, "confidence must be between"),
        ([[[1.0]]], {"resamples": 0}, "resamples must be from 1"),
    ],
)
def test_bootstrap_errors(tasks, arguments, message):
    with pytest.raises(ValueError, match=message):
        stats.bootstrap(tasks, **arguments)


# Summary and recommendation ------------------------------------------------------------------------------


def test_criteria_by_hand():
    rows = [
        synthetic(seed=seed, returns=returns) for seed, returns in enumerate([(0, 0, 1, 1), (1, 1, 1, 0)])
    ]
    rows += [synthetic("vit+concat", returns=(0, 0, 0, 1), curve=((50, 0.1), (100, 0.7)))]
    summary = summarise(rows)
    cell = summary.cells["VQA-v0, difficulty 0", "cnn + concat"]
    assert cell.reward("test").value == cell.success("test").value == 0.625
    assert cell.area == pytest.approx(0.3)
    assert summary.threshold(cell.task) == pytest.approx(0.56)
    assert cell.steps_to(0.56) is None and cell.steps_to(0.3) == 100
    assert summary.cells[cell.task, "vit + concat"].steps_to(0.56) == 100
    assert cell.seed_spread == pytest.approx(np.std([0.5, 0.75], ddof=1))
    assert cell.checkpoint_spread == pytest.approx(0.2)
    assert cell.drop == pytest.approx(0.2)
    assert summary.cells[cell.task, "vit + concat"].seed_spread is None


def test_names_tell_apart_what_differs():
    rows = [synthetic(steps=100), synthetic(steps=2000), synthetic(agent="a2c")]
    assert summarise(rows).configurations == (
        "cnn + concat, ppo, 100 steps",
        "cnn + concat, ppo, 2,000 steps",
        "cnn + concat, a2c, 100 steps",
    )


def test_newest_row_of_a_run_counts():
    error = {key: value for key, value in synthetic().items() if key in ("format", "run")} | {"error": "E"}
    assert len(summarise([error, synthetic()]).cells) == 1
    assert len(summarise([synthetic(), error]).cells) == 0


def test_mean_gives_every_task_the_same_weight():
    rows = [synthetic(returns=(1,) * 8, seed=seed) for seed in range(3)]
    rows += [synthetic(returns=(0,) * 8, id=MATCHING)]
    assert recommend(rows).score.value == pytest.approx(0.5)


def scored(name, score, megabytes=1.0, milliseconds=1.0, **change):
    """A row whose score is of 2,000 episodes."""
    right = round(score * 2000)
    return synthetic(
        f"{name}+concat", returns=(1,) * right + (0,) * (2000 - right),
        cost={"megabytes": megabytes, "milliseconds": milliseconds}, **change,
    )  # fmt: skip


def test_recommendation_in_words():
    rows = [scored("shapes", 0.93, 12, 1.5), scored("clip", 0.97, 350, 9), scored("cnn", 0.6, 2, 1)]
    best = recommend(rows, {"megabytes": 20, "milliseconds": 2})
    assert str(best) == f"within 20 MB and 2 ms: shapes + concat, {best.score}"
    assert re.fullmatch(r"0\.930 \[0\.9[12]\d, 0\.9[34]\d\]", str(best.score))
    assert best.within and best.embedding == "shapes+concat" and best.tied == ("shapes + concat",)
    assert [c.name.split()[0] for c in best.candidates] == ["clip", "shapes", "cnn"]
    assert recommend(rows).embedding == "clip+concat"
    none = recommend(rows, {"megabytes": 1})
    assert not none.within and none.embedding == "cnn+concat"
    assert str(none) == f"nothing is within 1 MB; the nearest is cnn + concat, {none.score} (2 MB)"


def test_report_and_recommendation_print_the_same_interval(tmp_path):
    rows = [synthetic(returns=(1, *[0] * 27))]
    report.write(rows, tmp_path)
    text = str(recommend(rows).score)
    assert "[0.000, " in text and (tmp_path / "report.md").read_text().count(text) >= 3


def test_none_better_than_a_baseline_is_said():
    low, high = (0,) * 15 + (1,) * 5, (0,) * 2 + (1,) * 18
    rows = [synthetic("a+concat", returns=low), baseline("random", low), baseline("oracle", (1,) * 20)]
    best = recommend(rows)
    assert best.unbeaten == "random" and str(best).endswith("; none is better than random")
    assert recommend([*rows, synthetic("b+concat", returns=high)]).unbeaten is None
    rows = [synthetic("a+concat", returns=high), baseline("random", low), baseline("most_frequent", high)]
    assert str(recommend(rows)).endswith("; none is better than most frequent")
    # Without the random score of every task the means can't be set beside each other.
    assert recommend([*rows[:2], synthetic("a+concat", returns=low, id=MATCHING)]).unbeaten is None


def test_cheap_but_random_is_not_taken_for_a_tie():
    """Its interval overlaps that of the best, but that of random too."""
    rows = [
        synthetic("good+concat", returns=(1,) * 13 + (0,) * 7, cost={"milliseconds": 9.0}),
        synthetic("cheap+concat", returns=(1,) * 9 + (0,) * 11),
    ]
    assert recommend(rows).embedding == "cheap+concat"
    assert recommend([*rows, baseline("random", (1,) * 4 + (0,) * 16)]).embedding == "good+concat"


def test_baselines_are_scored_once_and_shown(compared):
    out, said = compared
    rows = [row for row in store.read(out) if "baseline" in row["run"]]
    assert [row["run"]["baseline"] for row in rows] == ["random", "most_frequent", "oracle"]
    assert all(len(row["scores"]["test"]["returns"]) == 32 for row in rows)
    assert rows[2]["scores"]["test"]["return"] == 1 and "oracle: 1.000" in said
    text = (out / "report.md").read_text()
    for table in ("Ranking", "Reward, episode length and stability"):
        section = text[text.index(f"## {table}") :]
        section = section[: section.index("\n## ")]
        assert "| random |" in section and "| most frequent |" in section
        assert "| oracle |" in section and "1.000 [1.000, 1.000]" in section


def test_cost_of_one_slow_run_does_not_count():
    rows = [synthetic(seed=seed, cost={"seconds": s}) for seed, s in enumerate((46.7, 2.1, 2.3))]
    assert recommend(rows).chosen.cost["seconds"] == 2.3


def test_encoder_that_a_task_lacks_is_marked(tmp_path):
    rows = [synthetic("gru+concat"), synthetic("gru+concat", id=MATCHING)]
    rows[0]["plan"] = {"encoders": {"image": "cnn", "question": "gru"}}
    rows[1]["plan"] = {"encoders": {"audio": "logmel_cnn", "images": "cnn"}}
    label = "gru + concat (default encoders on AudioVisualMatching-v0, difficulty 0)"
    assert label in str(recommend(rows))
    report.write(rows, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert f"| {label} |" in text and "audio: logmel_cnn, images: cnn" in text


def test_first_run_is_not_slower_for_what_is_compiled(monkeypatch):
    """A small agent of the same embedding and environment learns before the one that is timed."""
    from mmenvs.benchmark import measure

    class Stop(Exception):
        pass

    made = []

    def make_agent(algo, id, **arguments):
        made.append((algo, id, arguments))
        if len(made) == 2:
            raise Stop
        return original(algo, id, **arguments)

    def train(*arguments, **options):
        learned.append(learn(*arguments, **options))
        return learned[-1]

    original, learn, learned = sb3.make_agent, sb3.train, []
    monkeypatch.setattr(sb3, "make_agent", make_agent)
    monkeypatch.setattr(sb3, "train", train)
    one = GRID.runs()[0]
    chosen = plan(one["embedding"], VQA)
    with pytest.raises(Stop):
        measure.measure(one, chosen, "cpu", str)
    assert learned == [True] and made[0][2]["encoders"] == made[1][2]["encoders"] == chosen["encoders"]


def test_progress_of_a_long_run_is_told(monkeypatch):
    from mmenvs.benchmark import measure

    monkeypatch.setattr(measure, "_SAY_EVERY", 0.0)
    agent = sb3.make_agent("ppo", VQA, device="cpu", num_envs=8, n_steps=4, batch_size=32)
    said: list[str] = []
    measure.Recorder(agent, 64, said.append)
    sb3.train(agent, 64, progress=False)
    assert len(said) == 8 and re.fullmatch(r"8 of 64 steps, about \d+ s of training left", said[0])
    assert said[-1].startswith("64 of 64 steps, about 0 s")


def test_ties_go_to_the_cheaper_one():
    rows = [scored("a", 0.901, 10, 3), scored("b", 0.899, 15, 1), scored("c", 0.8, 1, 0.1)]
    assert recommend(rows).embedding == "b+concat"  # shorter latency
    assert recommend(rows, {"megabytes": 20}).embedding == "a+concat"
    best = recommend(rows, {"megabytes": 20, "milliseconds": 3})
    assert best.embedding == "b+concat" and best.tied == ("a + concat", "b + concat")
    assert "not to be told apart by score: a + concat" in str(best)


def test_cost_that_was_not_measured_is_never_within():
    rows = [scored("a", 0.9, None), scored("b", 0.5, 3)]
    assert recommend(rows, {"megabytes": 20}).embedding == "b+concat"
    nothing = recommend(rows[:1], {"megabytes": 20})
    assert not nothing.within and "unknown MB" in str(nothing)


def test_cost_is_the_largest_over_the_tasks():
    rows = [
        scored("a", 0.9, 3),
        scored("a", 0.9, 30, id=MATCHING),
        scored("b", 0.5, 3),
        scored("b", 0.5, 3, id=MATCHING),
    ]
    assert recommend(rows, {"megabytes": 20}).embedding == "b+concat"


def test_who_lacks_a_task_is_not_ranked():
    rows = [scored("a", 0.9), scored("b", 0.5), scored("b", 0.5, id=MATCHING)]
    best = recommend(rows)
    assert best.embedding == "b+concat" and best.incomplete == ("a + concat",)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0.1, 50), st.floats(0.1, 5)), min_size=1, max_size=6),
    st.floats(0.1, 60),
    st.floats(0.1, 6),
)
@settings(max_examples=60, deadline=None)
def test_recommendation_keeps_its_promise(options, megabytes, milliseconds):
    rows = [
        synthetic(f"e{i}+concat", returns=(score,) * 4, cost={"megabytes": mb, "milliseconds": ms})
        for i, (score, mb, ms) in enumerate(options)
    ]
    best = recommend(rows, {"megabytes": megabytes, "milliseconds": milliseconds})
    allowed = [o for o in options if o[1] <= megabytes and o[2] <= milliseconds]
    shares = {o: max(o[1] / megabytes, o[2] / milliseconds) for o in options}
    chosen = options[int(best.embedding[1 : best.embedding.index("+")])]
    assert best.within == bool(allowed)
    if allowed:
        # The scores are certain: nothing is tied but what is equal.
        assert chosen in allowed and chosen[0] == pytest.approx(max(o[0] for o in allowed), abs=1e-9)
    else:
        assert shares[chosen] == pytest.approx(min(shares.values()))


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"watts": 3}, "budget must name some of megabytes, milliseconds, seconds, parameters, got 'watts'"),
        ({"megabytes": 0}, "must be a number above 0"),
        ({"megabytes": math.nan}, "must be a number above 0"),
        ({"megabytes": "20"}, "must be a number above 0"),
        ({"megabytes": True}, "must be a number above 0"),
    ],
)
def test_wrong_budget(budget, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        recommend([synthetic()], budget)


def test_budget_that_is_no_mapping():
    with pytest.raises(TypeError, match=r"budget must be a mapping such as .* got 3"):
        recommend([synthetic()], budget=3)
    with pytest.raises(TypeError, match=r"results must be a folder, rows\.jsonl or its rows, got None"):
        recommend(None)


# The report ----------------------------------------------------------------------------------------------


def test_report_loads_nothing_and_repeats(compared):
    out, _ = compared
    page = (out / "report.html").read_text()
    assert (
        "http://" not in page
        and "https://" not in page
        and "//" not in re.sub(r"<style>.*?</style>|<script>.*?</script>", "", page, flags=re.S)
    )
    assert not re.search(r"<(link|img|iframe|script src|object|embed)\b", page)
    assert not re.search(r"url\((?!#)", page) and "@import" not in page
    assert len(page) < 10 * 2**20
    before = page, (out / "report.md").read_text()
    report.write(store.read(out), out, {"megabytes": 20})
    assert ((out / "report.html").read_text(), (out / "report.md").read_text()) == before
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 0
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', page)) <= set(ids)


def shown_table(page, title):
    """Heads, and of each line the exact value and the text of its cells."""
    section = page[page.index(title) :]
    section = section[: section.index("</section>")]
    heads = [html.unescape(text) for text in re.findall(r"<button type=\"button\">(.*?)</button>", section)]
    body = section[section.index("<tbody>") :]
    return heads, [
        re.findall(r"<t[dh][^>]*?(?:data-value=\"([^\"]*)\")?>(.*?)</t[dh]>", line)
        for line in body.split("<tr>")[1:]
    ]


def test_structure_has_names_and_reasons(compared):
    out, _ = compared
    text = (out / "report.md").read_text()
    section = text[text.index("## Structure") :]
    section = section[: section.index("\n## ")]
    for name in (
        "image: effective rank",
        "image: CKA with the scene's symbols",
        "question: colour of the first object, k-NN probe",
        "image: number of objects, most frequent value",
        "image to question: right one among the first 5 of 32",
        "return lost with image of another episode",
    ):
        assert f"| {name} |" in section
    assert "| image: texture of any object | skipped: it is the same in all rows |" in section
    assert "_" not in re.sub(r"weighted_sum", "", section) and "·" not in section
    assert "| embedding | episodes | clean |" in text and "| cnn + concat | 16 |" in text


def test_report_numbers_are_those_of_the_rows(compared):
    out, _ = compared
    summary = summarise(store.read(out))
    page = (out / "report.html").read_text()
    heads, lines = shown_table(page, "Reward, episode length and stability")
    cost_heads, costs = shown_table(page, "Computational efficiency")
    assert len(lines) == 2 + 3 and len(costs) == len(summary.configurations) == 2
    lines = lines[:2]
    for line, cost in zip(lines, costs, strict=True):
        shown = dict(zip(heads, line, strict=True)) | dict(zip(cost_heads, cost, strict=True))
        cell = summary.cells[summary.tasks[0], html.unescape(shown["embedding"][1])]
        rows = cell.rows
        returns = [row["scores"]["test"]["return"] for row in rows]
        assert float(shown["return, test"][0]) == pytest.approx(np.mean(returns), abs=1e-12)
        assert shown["return, test"][1].startswith(f"{np.mean(returns):.3f} <small>[")
        assert float(shown["over seeds"][0]) == pytest.approx(np.std(returns, ddof=1), abs=1e-12)
        for key in ("parameters", "milliseconds"):
            name = {"milliseconds": "ms"}.get(key, key)
            expected = np.mean([row["cost"][key] for row in rows])
            assert float(shown[name][0]) == pytest.approx(expected, rel=1e-12)
        drops = [
            row["perturbed"]["clean"] - v for row in rows for k, v in row["perturbed"].items() if k != "clean"
        ]
        assert float(shown["lost when perturbed"][0]) == pytest.approx(np.mean(drops), abs=1e-12)
    markdown = (out / "report.md").read_text()
    for line in lines:
        assert f"| {html.unescape(line[0][1])} | 2 | {re.sub('<[^>]*>', '', line[2][1])} |" in markdown


def test_report_escapes_every_text(tmp_path):
    bad = "<script>alert(1)</script>|`x`$\\frac$"
    row = synthetic(bad + "+concat", id=f"MMRL/{bad}", agent=bad)
    row["perturbed"][bad] = 0.1
    row["structure"] = {"modalities": {bad: {"uniformity": 1}}}
    row["plan"] = {"encoders": {bad: bad}}
    row["provenance"][bad] = bad
    failed = {"format": 1, "run": {**row["run"], "seed": 1}, "error": bad}
    report.write([row, failed], tmp_path, {"megabytes": 1})
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert page.count("<script>") == 1 and "alert(1)" in page
    assert "<script>" not in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in tables]
    heads = [i for i, line in enumerate(tables) if set(line) <= set("|-:")]
    for start, end in zip(heads, [*heads[1:], len(tables) + 1], strict=True):
        assert len(set(widths[start - 1 : end - 1])) == 1


def test_mixed_code_is_said(tmp_path):
    rows = [synthetic(seed=0), synthetic(seed=1)]
    rows[1]["provenance"] = {"commit": "def", "versions": {"torch": "2"}}
    report.write(rows, tmp_path)
    assert "these rows come from different versions" in (tmp_path / "report.md").read_text()
    report.write(rows[:1], tmp_path)
    assert "different versions" not in (tmp_path / "report.md").read_text()


def test_episode_length_is_shown_where_it_varies(tmp_path):
    report.write([synthetic()], tmp_path)
    assert "steps an episode" not in (tmp_path / "report.md").read_text()
    row = synthetic()
    row["scores"]["test"]["length"] = 3.5
    report.write([row], tmp_path)
    assert "steps an episode" in (tmp_path / "report.md").read_text()
