"""The transformer agent on the command line."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from mmenvs_agents.transformer.agent import TransformerAgent
from PIL import Image
from typer.testing import CliRunner

from mmenvs.cli import app

VQA, CAPTIONING = "MMRL/VQA-v0", "MMRL/Captioning-v0"


def run(*arguments, code=0):
    """Output of a command, both streams together; its exit code must be ``code``."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result.output


def test_train_resume_evaluate_show(tmp_path):
    out = tmp_path / "vqa"
    common = ("train", VQA, "--agent", "transformer", "--num-envs", 4, "--device", "cpu", "--out", out)
    assert "after 64 steps" in run(*common, "--steps", 64, "--difficulty", 1)
    assert "after 128 steps" in run(*common, "--steps", 128, "--resume")
    assert "go on with 'train --resume'" in run(*common, code=2)
    assert "over the 128 already done" in run(*common, "--steps", 100, "--resume", code=2)
    for option, value in (("--size", "small"), ("--difficulty", 2), ("--seed", 7), ("--fusion", "film")):
        assert f"of the agent in '{out}' is" in run(*common, "--resume", option, value, code=2)
    assert len(list(out.glob("progress_*.csv"))) == 2 and list(out.glob("events*"))
    said = run("evaluate", out, "--episodes", 20, "--device", "cpu", "--json")
    document = json.loads(said)
    assert document["steps"] == 128 and document["agent"]["difficulty"] == 1
    sheet = tmp_path / "sheet.png"
    run("show", VQA, "--agent", out, "--episodes", 2, "--device", "cpu", "--out", sheet)
    assert np.asarray(Image.open(sheet)).std() > 10


def test_captions_are_trained_and_evaluated_too(tmp_path):
    out = tmp_path / "captions"
    run(
        "train",
        CAPTIONING,
        "--agent",
        "transformer",
        "--num-envs",
        2,
        "--device",
        "cpu",
        "--out",
        out,
        "--steps",
        10,
    )
    assert "random" in run("evaluate", out, "--episodes", 4, "--device", "cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--agent", "transformer", "--fusion", "glue"), "fusion must be one of 'concat', 'weighted_sum'"),
        (("--agent", "transformer", "--size", "huge"), "size must be one of nano, small, base"),
        (("--agent", "ppo", "--size", "nano"), "size is of --agent transformer"),
        (("--agent", "ppo", "--compile"), "compile is of --agent transformer"),
        (("--agent", "transformer", "--precision", "int4"), "precision must be one of 'float32', 'bfloat16'"),
        (("--agent", "transformer", "--encoder", "nothing"), "encoder must be one of"),
    ],
)
def test_what_a_user_gets_wrong(tmp_path, options, message):
    assert message in run("train", VQA, *options, "--device", "cpu", "--out", tmp_path / "a", code=2)


def test_what_a_policy_begins_with_is_told(tmp_path):
    common = ("--num-envs", 2, "--device", "cpu", "--steps", 10)
    run("pretrain-policy", CAPTIONING, *common, "--out", tmp_path / "xe")
    said = run(
        "train", CAPTIONING, "--agent", "transformer", "--difficulty", 1, "--init", tmp_path / "xe",
        "--out", tmp_path / "rl", *common,
    )  # fmt: skip
    assert (
        f"its policy is at first that of {tmp_path / 'xe'}, trained on {CAPTIONING} at difficulty 0" in said
    )


def test_ctrl_c_saves_and_resume_goes_on(tmp_path):
    out = tmp_path / "vqa"
    command = (
        "train",
        VQA,
        "--agent",
        "transformer",
        "--num-envs",
        "2",
        "--device",
        "cpu",
        "--out",
        str(out),
    )
    code = "from mmenvs.cli import app; app()"
    with subprocess.Popen(
        [sys.executable, "-c", code, *command], stdout=subprocess.PIPE, text=True
    ) as process:
        assert "transformer on" in process.stdout.readline()
        while not (list(out.glob("progress_*.csv")) and next(out.glob("progress_*.csv")).stat().st_size):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert "stopped early; this goes on: mmenvs train MMRL/" in process.stdout.read()
    assert process.returncode == 130
    assert TransformerAgent.load(out, device="cpu").num_timesteps > 0
