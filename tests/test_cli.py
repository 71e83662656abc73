"""The command line: what each command prints and leaves, and one clear line for what a user gets wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mmenvs_agents import sb3
from PIL import Image
from typer.testing import CliRunner

import mmenvs
from mmenvs.cli import app, parse_steps
from mmenvs.files import KINDS, locked, out_folder

VQA = "MMRL/VQA-v0"
CAPTIONING = "MMRL/Captioning-v0"
MATCHING = "MMRL/AudioVisualMatching-v0"


def run(*arguments: object, code: int = 0) -> str:
    """Output of a command, both streams together; its exit code must be ``code``."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result.output


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of an agent that has learned for two rollouts."""
    out = tmp_path_factory.mktemp("runs") / "vqa"
    said = run(
        "train", VQA, "--steps", "512", "--num-envs", 16, "--device", "cpu", "--difficulty", 1, "--out", out
    )
    assert f"saved: {out} after 512 steps" in said
    return out


def test_list_names_every_environment():
    said = run("list")
    for id, spec in mmenvs.SPECS.items():
        assert id in said
        assert spec.tags[0] in said


@pytest.mark.parametrize("id", mmenvs.SPECS)
def test_describe_prints_the_page(id):
    said = run("describe", id)
    for title in ("Observation Space", "Action Space", "Rewards", "Arguments", "Version History"):
        assert title in said
    assert "action: Discrete(" in said


@pytest.mark.parametrize("id", mmenvs.SPECS)
@pytest.mark.parametrize("agent", ["oracle", "random"])
def test_show_pictures(tmp_path, id, agent):
    out = tmp_path / "new" / "sheet.png"
    said = run("show", id, "--episodes", 3, "--agent", agent, "--difficulty", 2, "--out", out)
    assert f"written: {out}" in said
    if agent == "oracle":
        assert "mean return 1.000, 3 solved" in said
    assert np.asarray(Image.open(out)).std() > 10


def test_show_animation(tmp_path):
    out = tmp_path / "a.gif"
    run("show", VQA, "--episodes", 3, "--out", out)
    with Image.open(out) as gif:
        assert gif.n_frames == 6  # each question, then its answer
        assert gif.info["duration"] == 2000


def test_show_film_with_sound(tmp_path):
    import gymnasium as gym
    from imageio_ffmpeg import get_ffmpeg_exe

    out = tmp_path / "a.mp4"
    run("show", MATCHING, "--episodes", 2, "--seed", 7, "--out", out)
    command = [
        get_ffmpeg_exe(),
        "-v",
        "error",
        "-i",
        str(out),
        "-ac",
        "1",
        "-ar",
        "16000",
        "-f",
        "f32le",
        "-",
    ]
    heard = np.frombuffer(subprocess.run(command, check=True, capture_output=True).stdout, np.float32)
    env = gym.make(MATCHING, split="test")
    frames = round((1 + 0.75) * 4) + 8  # an episode of one second of sound
    for episode in range(2):
        audio = env.reset(seed=7 if episode == 0 else None)[0]["audio"]
        start = episode * frames * 4000
        part = heard[start : start + audio.size]
        assert np.sqrt((part**2).mean()) == pytest.approx(np.sqrt((audio**2).mean()), rel=0.1)
        assert np.corrcoef(part, audio)[0, 1] > 0.9


def test_show_a_trained_agent(trained, tmp_path):
    said = run(
        "show", VQA, "--episodes", 2, "--agent", trained, "--device", "cpu", "--out", tmp_path / "a.png"
    )
    assert "2 episodes" in said


def test_show_plays_what_the_agent_was_trained_on(trained, tmp_path):
    pictures = []
    for options in ((), ("--difficulty", 1), ("--difficulty", 0)):
        out = tmp_path / "a.png"
        run("show", VQA, "--episodes", 2, "--agent", trained, "--device", "cpu", "--out", out, *options)
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_a_difficulty_of_other_shapes_is_refused(tmp_path):
    out = tmp_path / "agent"
    sb3.save(sb3.make_agent("ppo", CAPTIONING, num_envs=2, device="cpu", env_kwargs={"difficulty": 1}), out)
    for command in (("evaluate", out), ("show", CAPTIONING, "--agent", out, "--out", tmp_path / "a.png")):
        said = run(*command, "--difficulty", 0, "--device", "cpu", code=2)
        assert "difficulty of the agent's environment is 1: the observations of 0 have other shapes" in said


def test_two_trainings_do_not_share_a_folder(tmp_path):
    with locked(out_folder(tmp_path / "a")):
        said = run(
            "train", VQA, "--steps", 10, "--num-envs", 2, "--device", "cpu", "--out", tmp_path / "a", code=2
        )
    assert "error: another training is writing to " in said
    assert not (tmp_path / "a" / "settings.json").exists()


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        ("agent", ("train", VQA)),
        ("agent", ("pretrain-policy", VQA)),
        ("agent", ("distill", "nowhere")),
        ("fine-tuned model", ("finetune-vlm", VQA, "--model", "nowhere")),
        ("pretraining", ("pretrain", "--steps", 1)),
        ("comparison", ("compare", "--envs", VQA, "--embeddings", "shapes+concat")),
        ("benchmark", ("benchmark", "--suite", "core-v0")),
        ("search", ("tune", VQA)),
    ],
)
def test_results_of_different_kinds_do_not_share_a_folder(kind, command, tmp_path):
    for other, name in KINDS.items():
        out = tmp_path / name
        out.mkdir()
        (out / name).write_text("")
        if other != kind:
            said = run(*command, "--out", out, "--device", "cpu", code=2)
            assert f"{other} ({name}): choose another folder" in said
            assert [file.name for file in out.iterdir()] == [name]


def test_train_leaves_agent_and_logs(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"settings.json", "progress_0.csv"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    header, *rows = (trained / "progress_0.csv").read_text().splitlines()
    assert "rollout/success_rate" in header and len(rows) == 2


def test_evaluate_prints_tables(trained):
    said = run("evaluate", trained, "--episodes", 50, "--split", "val", "--device", "cpu")
    assert "split val, difficulty 1, 50 episodes, seed 0" in said
    for name in ("agent", "random", "most frequent", "oracle", "95 % interval", "query colour"):
        assert name in said


def test_evaluate_prints_json(trained):
    read = json.loads(
        run("evaluate", trained, "--episodes", 40, "--difficulty", 0, "--json", "--device", "cpu")
    )
    assert (read["folder"], read["steps"]) == (str(trained), 512)
    assert (read["agent"]["difficulty"], read["agent"]["episodes"], read["agent"]["split"]) == (0, 40, "test")
    assert read["oracle"]["success"]["value"] == 1.0
    assert (
        read["agent"]["success"]["low"]
        <= read["agent"]["success"]["value"]
        <= read["agent"]["success"]["high"]
    )


def test_resume_goes_on(tmp_path):
    out = tmp_path / "agent"
    common = ("train", VQA, "--num-envs", 16, "--device", "cpu", "--fusion", "concat", "--out", out)
    run(*common, "--steps", "256")
    assert "after 512 steps" in run(*common, "--steps", "512", "--resume")
    assert "steps must be over the 512 already done" in run(*common, "--steps", "300", "--resume", code=2)
    said = run("train", VQA, "--fusion", "transformer", "--out", out, "--resume", code=2)
    assert "fusion of the agent in" in said and "'concat', not 'transformer'" in said
    assert "go on with 'train --resume'" in run(*common, code=2)


@pytest.fixture(scope="module")
def vqa_folder(tmp_path_factory) -> Path:
    """Pictures of one colour and questions about them in the official format of VQA v2."""
    root = tmp_path_factory.mktemp("vqav2")
    (root / "train2014").mkdir()
    questions, annotations = [], []
    for image in range(1, 41):
        colour = ("red", "green", "blue")[image % 3]
        Image.new("RGB", (80, 60), colour).save(root / "train2014" / f"COCO_train2014_{image:012d}.jpg")
        key = {"question_id": image * 10, "image_id": image}
        questions.append({**key, "question": "What colour is it?"})
        answers = [{"answer": colour, "answer_id": i, "answer_confidence": "yes"} for i in range(1, 11)]
        annotations.append(
            {
                **key,
                "question_type": "what colour is",
                "answer_type": "other",
                "multiple_choice_answer": colour,
                "answers": answers,
            }
        )
    common = {"data_type": "mscoco", "data_subtype": "train2014"}
    for name, content in (
        ("v2_OpenEnded_mscoco_train2014_questions.json", {"task_type": "Open-Ended", "questions": questions}),
        ("v2_mscoco_train2014_annotations.json", {"annotations": annotations}),
    ):
        (root / name).write_text(json.dumps({**common, **content}))
    return root


def test_real_data_from_the_command_line(vqa_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(vqa_folder)
    out, source = tmp_path / "agent", "vqav2:."
    common = ("train", VQA, "--num-envs", 16, "--device", "cpu", "--out", out)
    assert "after 256 steps" in run(*common, "--source", source, "--steps", "256")
    monkeypatch.chdir(tmp_path)
    source = f"vqav2:{vqa_folder}"
    assert "after 512 steps" in run(*common, "--resume", "--steps", "512")
    # The agent remembers what it was trained on.
    read = json.loads(run("evaluate", out, "--episodes", 32, "--split", "train", "--device", "cpu", "--json"))
    assert read["oracle"]["success"]["value"] == 1.0
    assert set(read["agent"]["by_type"]) == {"what colour is"}
    assert "4 solved" in run(
        "show", VQA, "--source", source, "--split", "train", "--episodes", 4, "--out", tmp_path / "a.png"
    )
    said = run("train", MATCHING, "--source", source, "--out", tmp_path / "b", code=2)
    assert "is for MMRL/VQA-v0" in said
    said = run("evaluate", out, "--source", "vqav2:nowhere", code=2)
    assert "nowhere" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "steps"),
    [("1", 1), ("1e6", 10**6), ("2.5e3", 2500), ("200k", 200_000), ("1.5M", 1_500_000), ("20_000", 20_000)],
)
def test_steps_are_read(text, steps):
    assert parse_steps(text) == steps


@given(st.integers(1, 10**14))
def test_every_whole_number_of_steps_is_read_exactly(steps):
    assert parse_steps(str(steps)) == steps


@pytest.mark.parametrize("text", ["abc", "", "-5", "0", "1.5", "nan", "inf", "1e99", "k", "1e6k6"])
def test_bad_steps(tmp_path, text):
    said = run("train", VQA, f"--steps={text}", "--out", tmp_path / "a", code=2)
    assert said == (
        f"error: steps must be a whole number from 1 to under 1e15, such as 200000, 2e5 or 200k, got {text!r}\n"
    )
    assert not (tmp_path / "a").exists()


def test_the_version_is_told():
    assert run("--version") == f"mmenvs {mmenvs.__version__}\n"


@pytest.mark.parametrize(
    "command",
    [("train", VQA, "--out"), ("show", VQA, "--out"), ("evaluate",), ("benchmark", "--resume"), ("report",)],
)
def test_an_empty_path_is_not_the_present_folder(command):
    assert "it must be the path of a file or a folder, got ''" in run(*command, "", code=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("describe MMRL/VQ-v0", "did you mean MMRL/VQA-v0"),
        ("show nothing --out {}/a.png", "id 'nothing' is not in the suite"),
        (f"show {VQA} --out {{}}/a.jpg", "the file must end in .png, .gif, .mp4, got"),
        (f"show {VQA} --out {{}}/folder.png", "the file must not be a folder, got"),
        (f"show {VQA} --out {{}}/a.png --split dev", "split must be one of 'train', 'val'"),
        (f"show {VQA} --out {{}}/a.png --difficulty 4", "difficulty must be 0, 1, 2 or 3, got '4'"),
        (f"show {VQA} --out {{}}/a.png --difficulty hard", "difficulty must be 0, 1, 2 or 3, got 'hard'"),
        (f"show {VQA} --out {{}}/a.png --agent {{}}/missing", "no agent in"),
        (f"show {VQA} --out {{}}/a.png --agent=", "no agent in '': agent must be oracle, random or"),
        (f"embed {VQA} --pool-size 2 --embedding= --out {{}}/c", "there is no folder ''"),
        (
            f"finetune-vlm {VQA} --model= --out {{}}/a",
            "model must be the folder or Hugging Face name of a model, got ''",
        ),
        (f"show {VQA} --out {{}}/a.png --agent Oracle", "agent must be oracle, random or the folder of"),
        (
            f"show {VQA} --out {{}}/a.png --agent random --device tpu",
            "device must be 'auto', 'cpu' or 'cuda'",
        ),
        (
            f"show {VQA} --out {{}}/a.png --episodes 1000",
            "episodes must be at most 150 for a .png, .gif and .mp4 take more, got",
        ),
        (f"show {VQA} --out {__file__}/a.png", "out must be a folder, "),
        (f"embed {VQA} --pool-size 2 --set num_envs=3 --out {{}}/c", "a pool has no num_envs"),
        (f"embed {VQA} --pool-size 2 --out {__file__}/c", "can't be made a folder: Not a directory"),
        (f"show {VQA} --out {{}}/a.png --source imagenet:x", "source must be vqav2:FOLDER or coco:FOLDER"),
        (f"show {VQA} --out {{}}/a.png --source vqav2:{{}}/missing", "missing"),
        ("train MMRL/Captions-v0 --out {}/a", "did you mean MMRL/Captioning-v0"),
        (f"train {VQA} --agent= --out {{}}/a", "agent must be one of 'ppo', 'a2c', 'dqn'"),
        (f"train {VQA} --fusion= --out {{}}/a", "fusion must be one of concat, weighted_sum"),
        (f"train {VQA} --split= --out {{}}/a", "split must be one of 'train', 'val'"),
        (f"train {VQA} --precision= --out {{}}/a", "precision must be 'float32' or 'bfloat16', got ''"),
        (f"train {VQA} --fusion glue --out {{}}/a", "fusion must be one of concat, weighted_sum"),
        (f"train {VQA} --agent sarsa --out {{}}/a", "agent must be one of 'ppo', 'a2c', 'dqn'"),
        (f"train {VQA} --device tpu --out {{}}/a", "device must be 'auto', 'cpu' or 'cuda'"),
        (f"train {VQA} --split dev --out {{}}/a", "split must be one of"),
        (f"train {VQA} --resume --out {{}}/a", "no agent in"),
        ("evaluate {}/missing", "no agent in"),
        ("demo --steps zero --out {}/a", "steps must be a whole number from 1"),
        ("demo --device tpu --out {}/a", "device must be 'auto', 'cpu' or 'cuda'"),
    ],
)
def test_user_errors_are_one_line(tmp_path, arguments, message):
    (tmp_path / "folder.png").mkdir()
    said = run(*(part.replace("{}", str(tmp_path)) for part in arguments.split()), code=2)
    assert message in said
    assert said.startswith("error: ") and said.count("\n") == 1 and "Traceback" not in said


def test_cuda_on_a_machine_without_one(trained, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    for command in (("train", VQA, "--out", tmp_path / "a"), ("evaluate", trained)):
        said = run(*command, "--device", "cuda", code=2)
        assert said.startswith("error: device='cuda' was asked for, but torch finds no CUDA device")


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"settings": 3}', '{"format": 99, "settings": {}, "steps": 1}']
)
def test_a_damaged_agent_is_an_error(tmp_path, content):
    (tmp_path / "settings.json").write_text(content)
    said = run("evaluate", tmp_path, code=2)
    assert "cannot load the agent in" in said and said.count("\n") == 1


def test_demo_in_short(tmp_path):
    said = run("demo", "--short", "--steps", "2048", "--device", "cpu", "--out", tmp_path)
    for name in (
        "agent",
        "question only",
        "image only",
        "most frequent",
        "random",
        "oracle",
        "learning_curve.png",
    ):
        assert name in said
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"agent", "learning_curve.png", "episodes.png", "results.json"}
    read = json.loads((tmp_path / "results.json").read_text())
    assert read["oracle"]["success"]["value"] == 1.0 and read["steps"]["agent"] == 2048
    for name in ("learning_curve.png", "episodes.png"):
        assert np.asarray(Image.open(tmp_path / name)).std() > 10
    assert "holds the agent of a demo" in run("demo", "--short", "--out", tmp_path, code=2)
    assert "2 episodes" in run(
        "show",
        VQA,
        "--agent",
        tmp_path / "agent",
        "--episodes",
        2,
        "--device",
        "cpu",
        "--out",
        tmp_path / "a.png",
    )


def test_the_command_line_starts_without_heavy_libraries():
    code = "import sys, mmenvs.cli; print([m for m in ('torch', 'transformers', 'stable_baselines3') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
