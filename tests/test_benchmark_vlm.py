"""Vision-language models in the benchmark: ``--policy hf:MODEL``."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from mmenvs_agents import vlm

from mmenvs.benchmark import job, players
from mmenvs.benchmark.plan import Plan
from mmenvs.benchmark.store import Store, check
from mmenvs.benchmark.suites import SUITES, Suite, SuiteTask
from tests import bench_runs, tiny_models

from .test_benchmark import CAPTIONING, VQA, command


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_models.save(tiny_models.VLMS["idefics3"], tmp_path_factory.mktemp("vlm") / "tiny"))


def runs_of(model, **change):
    return [run for run in Plan(agents=(f"hf:{model}",), **change).runs() if run["agent"].startswith("hf:")]


def test_it_runs_once_where_there_is_one_picture_and_no_sound(model):
    runs = runs_of(model, seeds=3, embeddings=("cnn+concat", "vit+concat"))
    assert [(run["id"], run["difficulty"]) for run in runs] == [
        (VQA, 0), (VQA, 1), (CAPTIONING, 0), (CAPTIONING, 1)
    ]  # fmt: skip
    assert {(run["steps"], run["seed"], run["embedding"]) for run in runs} == {(0, 0, "")}


def test_a_run(model):
    (row,) = job.execute(runs_of(model, episodes=8)[0], "cpu", lambda *_: None)
    check({"format": 1, **row, "provenance": {}})
    assert row["step"] == 0 and row["final"] and row["cost"]["parameters"] > 10_000
    assert set(row["scores"]) == {
        "test/greedy", "test/sampled", "compositional/greedy", "compositional/sampled",
        "test/greedy/without image", "test/greedy/without question",
    }  # fmt: skip
    # What an untrained model says is no answer: the lowest score, no error.
    assert set(row["scores"]["test/greedy"]["returns"]) <= {0, 1}
    assert any(example["actions"] == [-1] for example in row["examples"])


def test_a_model_that_was_fine_tuned_keeps_its_prompt_where_it_learned(model, tmp_path):
    folder = tiny_models.save(tiny_models.VLMS["idefics3"], tmp_path / "tuned")
    settings = vlm.VLMSettings(VQA, "base", prompt="Well: {question}", env_kwargs={"difficulty": 0})
    document = {"format": vlm.FORMAT, "settings": asdict(settings), "steps": 5}
    (folder / vlm.SETTINGS).write_text(json.dumps(document))
    made = {id: players.make({"agent": f"hf:{folder}", "id": id, "difficulty": 2, "seed": 0}, "cpu") for id in (VQA, CAPTIONING)}  # fmt: skip
    assert made[VQA].settings.prompt == "Well: {question}" and made[VQA].num_timesteps == 5
    assert made[CAPTIONING].settings.prompt is None
    assert all(player.episodes.env_kwargs["difficulty"] == 2 for player in made.values())


def test_command_and_other_files_of_the_same_name(model, tmp_path, monkeypatch):
    monkeypatch.setitem(SUITES, "tiny-v0", Suite("tiny-v0", (SuiteTask(VQA, 0, 64),), seeds=1, episodes=8))
    monkeypatch.setattr(job, "execute", bench_runs.execute)
    out = tmp_path / "out"
    said = command("benchmark", "--suite", "tiny", "--policy", f"hf:{model}", "--device", "cpu", "--out", out)
    assert "4 runs, 0 of them done before" in said and f"difficulty 0: hf:{model}:" in said
    with Store(out) as store:
        codes = store.codes(agent=f"hf:{model}")
    assert list(codes) == [f"{players.package_version()}+{players.policy_code(f'hf:{model}')}"]
    monkeypatch.setattr(players, "policy_code", lambda name: "other" if name.startswith("hf:") else "")
    assert "another version of its files" in command("benchmark", "--resume", out, code=2)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("hf:{}/nothing", "neither a folder nor a name at Hugging Face"),
        ("hf:", "must name a folder or a model"),
        ("hf:{}", "config.json"),
    ],
)
def test_models_that_are_not_there(policy, message, tmp_path):
    arguments = ("benchmark", "--policy", policy.format(tmp_path), "--out", tmp_path / "out")
    assert message in command(*arguments, code=2)
