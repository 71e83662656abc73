"""The search for settings: what is tried, that it goes on, and what it leaves."""

from __future__ import annotations

import json
import re
import sys

import pytest

pytest.importorskip("optuna", reason="Optuna, of the extra tune, is not installed")

from mmenvs_agents import sb3
from mmenvs_agents.recipes import RECIPES

from mmenvs.benchmark import tune as tuning
from mmenvs.benchmark.tune import BEST, NAME, Search, tune

from .test_benchmark import VQA, command

SEARCH = Search(VQA, steps=256, episodes=32)


@pytest.fixture
def scored(monkeypatch):
    """Scores that depend on the settings alone, in no time; what was tried."""
    tried = []

    def score(self, settings, device):
        tried.append(settings)
        if settings["fusion"] == "shared":
            raise ValueError("no\nweights")
        return settings["learning_rate"] * 10 + settings.get("n_epochs", 0) / 100

    monkeypatch.setattr(Search, "score", score)
    return tried


def test_two_trials(tmp_path):
    arguments = ("tune", VQA, "--steps", 256, "--episodes", 32, "--device", "cpu", "--out", tmp_path)
    said = command(*arguments, "--trials", 2)
    assert re.search(
        r"^1/2  \d\.\d{3}  learning_rate 0.001, ent_coef 0.04, n_steps 16, batch_size 256", said, re.M
    )
    assert "2/2  " in said and "with the recipe as it is" in said
    best = json.loads((tmp_path / BEST).read_text())
    assert (best["id"], best["agent"], best["split"], best["steps"]) == (VQA, "ppo", "val", 256)
    assert set(best["settings"]) == set(tuning.SPACE) and best["score"] >= best["usual_score"]
    # What is printed trains an agent with these settings, which scores the same.
    assert f"sb3.make_agent('ppo', '{VQA}', env_kwargs={{'difficulty': 0}}, learning_rate=" in said
    assert SEARCH.score(best["settings"], "cpu") == best["score"]
    assert "best: trial" in command(*arguments, "--trials", 2)  # nothing left to do


@pytest.mark.parametrize("agent", RECIPES)
def test_the_first_trial_is_the_recipe(agent, scored, tmp_path):
    best = tune(Search(VQA, agent=agent), 1, tmp_path, "cpu", lambda _: None)
    recipe = RECIPES[agent]
    expected = {**recipe.arguments, **vars(recipe), "fusion": "concat"}
    assert scored == [best["settings"]] == [{k: expected[k] for k in tuning.SPACE if k in expected}]
    sb3.make_agent(agent, VQA, device="cpu", **best["settings"]).get_env().close()


def test_a_search_that_was_stopped_ends_as_one_that_was_not(scored, tmp_path, monkeypatch):
    whole = tune(SEARCH, 14, tmp_path / "whole", "cpu", lambda _: None)
    undisturbed = scored.copy()
    scored.clear()
    tune(SEARCH, 5, tmp_path / "parts", "cpu", lambda _: None)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Search, "score", _stopped)
        tune(SEARCH, 14, tmp_path / "parts", "cpu", lambda _: None)
    assert tune(SEARCH, 14, tmp_path / "parts", "cpu", lambda _: None) == whole
    assert scored == undisturbed and len(undisturbed) == 14
    assert all(s["batch_size"] <= s["n_steps"] * RECIPES["ppo"].num_envs for s in undisturbed)


def _stopped(self, settings, device):
    raise KeyboardInterrupt


def test_trials_that_fail_are_said_and_counted(scored, tmp_path, monkeypatch):
    lines: list[str] = []
    tune(SEARCH, 14, tmp_path, "cpu", lines.append)
    failed = [line for line in lines if "ValueError: no weights" in line]
    assert len(lines) == 14 and failed and all("fusion shared" in line for line in failed)
    monkeypatch.setattr(Search, "score", lambda *_: float("nan"))
    with pytest.raises(ValueError, match=r"none of the trials .* the last: ValueError: the score is nan"):
        tune(SEARCH, 1, tmp_path / "other", "cpu", lines.append)


def test_another_search_in_the_folder(scored, tmp_path):
    tune(SEARCH, 1, tmp_path, "cpu", lambda _: None)
    with pytest.raises(ValueError, match="holds a search with steps=256, not 300"):
        tune(Search(VQA, steps=300, episodes=32), 2, tmp_path, "cpu")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / NAME).write_text("nonsense" * 1000)
    with pytest.raises(ValueError, match="is no store of a search"):
        tune(SEARCH, 1, tmp_path / "b", "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([VQA, "--agent", "transformer"], "agent must be one of ppo, a2c"),
        (["MMRL/Nothing-v0"], "MMRL/Nothing-v0"),
        ([VQA, "--steps", "0"], "steps must be"),
        ([VQA, "--difficulty", "4"], "difficulty must be"),
    ],
)
def test_command_errors(arguments, message, tmp_path):
    assert message in command("tune", *arguments, "--out", tmp_path / "out", code=2)
    assert not (tmp_path / "out").exists()


def test_an_out_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("tune", "benchmark", "train"):
        arguments = (name,) if name == "benchmark" else (name, VQA)
        said = command(*arguments, "--out", tmp_path / "file" / "out", code=2)
        assert "can't be made a folder: Not a directory" in said


def test_without_optuna(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "mmenvs.benchmark.tune")
    monkeypatch.delattr("mmenvs.benchmark.tune")
    said = command("tune", VQA, "--out", tmp_path, code=2)
    assert "tuning needs Optuna: pip install 'mmenvs[tune]'" in said
