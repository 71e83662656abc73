"""The joint embedding, its losses, its pretraining, and the weights that ship."""

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from mmenvs.cli import app
from mmenvs.embeddings import Extractor, joint, load_embedding, pretraining
from mmenvs.embeddings.joint import JointEmbedding, load_joint, named_joint, save_joint
from mmenvs.embeddings.pretraining import (
    Pretraining,
    PretrainSettings,
    infonce,
    pretrain,
    read_settings,
    sigmoid_loss,
)
from mmenvs.world.pairs import PairedScenes
from mmenvs.world.words import VOCABULARY

SMALL = PretrainSettings(steps=6, batch=16, difficulties=(0, 1))


def unit(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_infonce_is_cross_entropy_of_the_right_partner() -> None:
    a, b, scale = unit(5, 8), unit(5, 8, 1), torch.tensor(3.0)
    logits, right = scale * a @ b.T, torch.arange(5)
    expected = 0.5 * (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right))
    torch.testing.assert_close(infonce(a, b, torch.eye(5, dtype=torch.bool), scale), expected)


def test_infonce_takes_alike_scenes_as_matches() -> None:
    a = torch.eye(3)[[0, 0, 1]]
    same = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    scale = torch.tensor(100.0)
    # Two of the three are alike: the best that can be told apart is which pair, log 2 for those rows.
    assert infonce(a, a, same, scale).item() == pytest.approx(2 / 3 * np.log(2), abs=1e-4)
    assert infonce(a, a, torch.eye(3, dtype=torch.bool), scale) >= infonce(a, a, same, scale) - 1e-6


def test_sigmoid_loss_by_hand() -> None:
    a = torch.eye(2)
    loss = sigmoid_loss(a, a, torch.eye(2, dtype=torch.bool), torch.tensor(2.0), torch.tensor(-1.0))
    log_sigmoid = lambda x: -np.log1p(np.exp(-x))  # noqa: E731
    expected = -(2 * log_sigmoid(2.0 - 1.0) + 2 * log_sigmoid(1.0)) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_padding_and_length_change_nothing() -> None:
    model = JointEmbedding().eval()
    ids = torch.as_tensor(VOCABULARY.encode("how many red squares are there ?", 20))[None]
    short, long = ids[:, :7], torch.cat([ids, torch.zeros(1, 30, dtype=torch.long)], 1)
    vectors = [model.encode_text(x)[0] for x in (short, ids, long)]
    torch.testing.assert_close(vectors[0], vectors[1])
    torch.testing.assert_close(vectors[1], vectors[2])


def test_vectors_have_unit_root_mean_square_and_pictures_any_size() -> None:
    model = JointEmbedding().eval()
    for size in (32, 64, 96):
        pooled, tokens = model.encode_image(torch.rand(2, 3, size, size))
        assert pooled.shape == (2, 128) and tokens.shape == (2, 16, 64)
        torch.testing.assert_close(pooled.square().mean(1), torch.ones(2))
    pooled, tokens = model.encode_film(torch.rand(2, 3, 3, 64, 64))
    assert pooled.shape == (2, 128) and tokens.shape == (2, 3, 128)
    for samples in (8_000, 16_000, 32_000):
        assert model.encode_audio(torch.zeros(1, samples))[1].shape == (1, samples // 640 + 1, 64)


def test_what_is_too_long_is_refused() -> None:
    model = JointEmbedding()
    with pytest.raises(ValueError, match="72 words"):
        model.encode_text(torch.ones(1, 73, dtype=torch.long))
    with pytest.raises(ValueError, match="32000 samples"):
        model.encode_audio(torch.zeros(1, 32_001))


def test_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path) -> None:
    whole = Pretraining(SMALL)
    for _ in range(6):
        whole.step()
    first = Pretraining(SMALL)
    for _ in range(3):
        first.step()
    first.save(tmp_path)
    second = Pretraining(SMALL)
    second.resume(tmp_path)
    assert second.done == 3
    for _ in range(3):
        second.step()
    for (name, a), b in zip(
        whole.trained.state_dict().items(), second.trained.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_it_learns_and_only_from_the_train_split() -> None:
    run = Pretraining(PretrainSettings(steps=60, batch=64, difficulties=(0,), modalities=("image", "text")))
    assert [scenes.split for scenes in run.scenes] == ["train"]
    assert [envs.task.split for envs in run.asked] == ["train"]
    logs = [run.step() for _ in range(60)]
    early, late = (np.mean([log["accuracy/image_text"] for log in part]) for part in (logs[:5], logs[-5:]))
    assert early < 0.2 and late > 0.4
    assert "accuracy/image_audio" not in logs[0]


@pytest.mark.parametrize("loss", pretraining.LOSSES)
def test_both_losses_reach_every_encoder(loss: str) -> None:
    run = Pretraining(PretrainSettings(steps=4, batch=8, difficulties=(0,), loss=loss))
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.step()
    changed = {
        name.split(".")[0] for name, value in run.model.state_dict().items() if not value.equal(before[name])
    }
    assert changed == {"image", "text", "audio", "pool"}


def test_weights_that_are_not_finite_or_not_there(tmp_path: Path) -> None:
    model = JointEmbedding()
    next(model.parameters()).data.view(-1)[3] = float("nan")
    save_joint(model, tmp_path / "joint.safetensors", {})
    with pytest.raises(ValueError, match="numbers that are not finite"):
        load_joint(tmp_path / "joint.safetensors")
    for name in ("joint:", f"joint:{tmp_path / 'nothing'}"):
        with pytest.raises(FileNotFoundError, match="names no joint embedding"):
            named_joint(name)


def test_saved_and_loaded_is_the_same_and_frozen(tmp_path: Path) -> None:
    model, path = JointEmbedding().eval(), tmp_path / "joint.safetensors"
    save_joint(model, path, {"by": "test"})
    loaded, card = load_joint(path)
    assert card == {"by": "test"}
    pictures = torch.rand(2, 3, 64, 64)
    assert torch.equal(model.encode_image(pictures)[0], loaded.encode_image(pictures)[0])
    assert not any(p.requires_grad for p in loaded.parameters())


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="mmenvs pretrain"):
        load_joint(tmp_path / "missing.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(ValueError, match="no joint embedding"):
        load_joint(tmp_path / "broken.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modalities": ("text", "audio")}, "modalities"),
        ({"modalities": ("image", "smell")}, "modalities"),
        ({"loss": "triplet"}, "loss"),
        ({"steps": 0}, "steps"),
        ({"batch": 1}, "batch"),
        ({"difficulties": ()}, "difficulties"),
    ],
)
def test_bad_settings(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainSettings(**arguments)


def test_the_command_trains_resumes_and_refuses(tmp_path: Path) -> None:
    def run(*arguments: str):
        return CliRunner().invoke(
            app, ["pretrain", "--out", str(tmp_path / "run"), "--batch", "8", "--device", "cpu", *arguments]
        )

    done = run("--steps", "2", "--difficulties", "0")
    assert done.exit_code == 0 and "'joint:" in done.output
    assert load_joint(tmp_path / "run" / "joint.safetensors")[1]["steps"] == 2
    assert run("--steps", "2", "--difficulties", "0").exit_code == 2  # holds a run already
    assert run("--steps", "2", "--difficulties", "1", "--resume").exit_code == 2  # other settings
    assert run("--steps", "2", "--resume").exit_code == 2  # done already
    assert run("--steps", "3", "--resume").exit_code == 0
    space = gym.make("MMRL/VQA-v0").observation_space
    name = f"joint:{tmp_path / 'run'}"
    assert load_embedding(name, space).features_dim == 256
    assert Extractor(space, {"image": name}).features_dim == 256


def test_interrupted_it_ends_the_update_and_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, before = Pretraining.step, signal.getsignal(signal.SIGINT)

    def interrupted(run: Pretraining) -> dict[str, float]:
        if run.done == 1:
            signal.raise_signal(signal.SIGINT)
        return step(run)

    monkeypatch.setattr(Pretraining, "step", interrupted)
    command = ["pretrain", "--out", str(tmp_path), "--batch", "8", "--steps", "4", "--device", "cpu"]
    stopped = CliRunner().invoke(app, [*command, "--difficulties", "0"])
    assert (
        stopped.exit_code == 130
        and f"this goes on: mmenvs pretrain --out {tmp_path} --resume" in stopped.output
    )
    assert read_settings(tmp_path)[1] == 2
    assert signal.getsignal(signal.SIGINT) is before
    assert CliRunner().invoke(app, [*command, "--resume"]).exit_code == 0
    assert read_settings(tmp_path)[1] == 4


def test_it_runs_in_another_thread(tmp_path: Path) -> None:
    settings = PretrainSettings(steps=1, batch=8, difficulties=(0,))
    with ThreadPoolExecutor() as threads:
        threads.submit(pretrain, settings, tmp_path).result()
    assert read_settings(tmp_path)[1] == 1


@pytest.mark.parametrize("kept", [0, 50, 0.5])
def test_a_cut_off_state_is_named(tmp_path: Path, kept: float) -> None:
    run = Pretraining(SMALL)
    run.save(tmp_path)
    file = tmp_path / "training.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * kept) if kept < 1 else int(kept)])
    with pytest.raises(ValueError, match=r"training.safetensors' is damaged"):
        run.resume(tmp_path)


def test_a_killed_save_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = PretrainSettings(steps=2, batch=8, difficulties=(0,))
    pretrain(settings, tmp_path)
    before = (tmp_path / "training.safetensors").read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    run = Pretraining(settings)
    with pytest.raises(KeyboardInterrupt):
        run.save(tmp_path)
    assert (tmp_path / "training.safetensors").read_bytes() == before


@pytest.fixture(scope="module", params=[0, 1])
def vectors(request: pytest.FixtureRequest) -> dict:
    scenes = PairedScenes(256, difficulty=request.param, split="val", seed=5)
    batch = scenes.next()
    raw = {name: torch.as_tensor(batch[name]) for name in scenes.observation_space.spaces}
    encoded = load_embedding("shapes", scenes.observation_space).encode(raw)
    vectors = {name: F.normalize(x.flatten(1), dim=-1) for name, x in encoded.items()}
    return vectors | {"objects": batch["objects"]}


class TestShapes:
    """The weights that ship."""

    @pytest.mark.parametrize("pair", [("image", "caption"), ("image", "audio"), ("audio", "caption")])
    def test_it_finds_the_partner_on_held_out_scenes(self, vectors: dict, pair: tuple[str, str]) -> None:
        for a, b in (pair, pair[::-1]):
            found = (vectors[a] @ vectors[b].T).argmax(1).numpy()
            assert (vectors["objects"][found] == vectors["objects"]).mean() > 0.9

    def test_it_is_small_and_has_a_card(self) -> None:
        path = joint.FOLDER / "shapes.safetensors"
        assert path.stat().st_size <= 8 * 2**20
        card = load_joint(path)[1]
        assert "train" in card["trained_on"] and "compositional" in card["never_seen"]

    def test_as_an_encoder_it_stays_frozen_and_out_of_the_agents_files(self) -> None:
        envs = gym.make_vec("MMRL/AudioVisualMatching-v0", num_envs=4)
        observation = {name: torch.as_tensor(x) for name, x in envs.reset(seed=0)[0].items()}
        names = dict.fromkeys(observation, "shapes")
        extractor = Extractor(envs.single_observation_space, names, "concat")
        extractor(observation).sum().backward()
        assert all(p.grad is not None for p in extractor.encoders.parameters())
        assert not any(p.requires_grad or p.grad is not None for p in joint.load_shapes().parameters())
        assert sum(p.numel() for p in extractor.encoders.parameters()) < 50_000

    def test_a_text_of_other_words_is_refused(self) -> None:
        space = gym.spaces.Dict({"text": gym.spaces.Box(0, 999, (12,), np.int64)})
        with pytest.raises(ValueError, match="words"):
            Extractor(space, {"text": "shapes"})
