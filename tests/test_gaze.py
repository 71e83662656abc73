"""What an agent looks at, on the panels of its episodes."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from mmenvs_agents.sb3 import make_agent, save
from mmenvs_agents.transformer.agent import TransformerAgent
from mmenvs_agents.transformer.block import looking
from mmenvs_agents.transformer.config import ModelConfig
from mmenvs_agents.transformer.episodes import NEVER
from mmenvs_agents.transformer.watch import Watched as TransformerWatched
from mmenvs_agents.transformer.watch import gaze_of as transformer_gaze
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from mmenvs import media
from mmenvs.cli import app
from mmenvs.embeddings import Extractor
from mmenvs.embeddings.watch import Watched, gaze_of
from mmenvs.gaze import BAR, Gaze, current, showing

VQA, MATCHING, CAPTIONING = "MMRL/VQA-v0", "MMRL/AudioVisualMatching-v0", "MMRL/Captioning-v0"


LINE = 27  # height of a line of text


def picture(value: int = 60) -> np.ndarray:
    return np.full((64, 64, 3), value, np.uint8)


def one_cell(count: int, which: tuple[int, int, int], side: int = 4) -> np.ndarray:
    heat = np.zeros((count, side, side), np.float32)
    heat[which] = 1.0
    return heat


def test_a_hot_cell_lights_its_part_of_the_picture():
    plain = media.panel([picture()], [("words", "black")])
    with showing(Gaze(heat=one_cell(1, (0, 0, 3)))):
        shown = media.panel([picture()], [("words", "black")])
    again = media.panel([picture()], [("words", "black")])
    np.testing.assert_array_equal(again, plain)
    gain = (shown.astype(int) - plain).sum(2)
    assert gain.min() == 0
    rows, columns = np.nonzero(gain > 0.9 * gain.max())
    # The picture is 320 pixels wide and stands 21 from the corner.
    assert columns.min() >= 21 + 240 and columns.max() < 21 + 320
    assert rows.min() >= 21 and rows.max() < 21 + 80
    assert not gain[21 + 160 :].any() and not gain[:, : 21 + 160].any()


def test_no_heat_is_the_plain_picture():
    plain = media.panel([picture()] * 4, [])
    with showing(Gaze(heat=np.zeros((4, 2, 2), np.float32))):
        np.testing.assert_array_equal(media.panel([picture()] * 4, []), plain)
    with showing(Gaze(heat=one_cell(4, (2, 1, 1), 2))):
        changed = (media.panel([picture()] * 4, []) != plain).any((0, 2))
    columns = np.flatnonzero(changed)
    width = plain.shape[1]
    assert width * 0.45 < columns.min() and columns.max() < width * 0.77


def test_the_bar_is_parted_by_the_weights():
    plain = media.panel([picture()], [])
    with showing(Gaze(weights={"image": 0.25, "question": 0.75})):
        shown = media.panel([picture()], [])
    assert shown.shape == (plain.shape[0] + BAR, *plain.shape[1:])
    line = shown[plain.shape[0] + 2]
    first, second = line[20], line[-20]
    assert (first != second).any()
    lengths = [(line == colour).all(1).sum() for colour in (first, second)]
    assert lengths[0] / sum(lengths) == pytest.approx(0.25, abs=0.01)


def test_the_caption_stands_below():
    plain = media.panel([picture()], [("words", "black")])
    with showing(Gaze(heat=np.zeros((1, 4, 4), np.float32), caption="what is seen " * 12)):
        shown = media.panel([picture()], [("words", "black")])
    height = len(plain) - 16  # the margin below
    assert len(shown) == len(plain) + 2 * LINE
    np.testing.assert_array_equal(shown[:height], plain[:height])
    for line in range(2):
        assert (shown[height + line * LINE : height + (line + 1) * LINE] < 200).any()


@pytest.mark.parametrize(
    "heat", [np.zeros((2, 4, 4)), np.zeros((4, 4)), np.full((1, 4, 4), 1.5), np.full((1, 4, 4), np.nan)]
)
def test_bad_heat(heat):
    with pytest.raises(ValueError, match="heat must be"), showing(Gaze(heat=heat.astype(np.float32))):
        media.panel([picture()], [])
    assert current() == Gaze()


def extractor_of(id: str, **others) -> Extractor:
    torch.manual_seed(0)
    return Extractor(gym.make(id).observation_space, features_dim=16, width=16, **others)


def masks_of(extractor: Extractor) -> dict[str, torch.Tensor]:
    return {name: torch.ones(1, n, dtype=torch.bool) for name, n in extractor.fusion.lengths.items()}


def test_heat_is_the_attention_from_words_to_cells():
    extractor = extractor_of(VQA)
    observation, _ = gym.make(VQA).reset(seed=0)
    words = extractor.fusion.lengths["question"]
    masks = masks_of(extractor)
    masks["question"][:, 2:] = False
    one, two = torch.zeros(1, words, 16), torch.zeros(1, words, 16)
    one[:, :, 6] = 1.0
    two[:, 0, 6], two[:, 1, 9] = 1.0, 1.0
    one[:, 2:], two[:, 2:] = 0.0, 0.0
    one[:, 2:, 15] = two[:, 2:, 15] = 1.0  # padding looks elsewhere
    back = torch.full((1, 16, words), 1 / words)
    attention = {"image/0": back, "question/0": one, "image/1": back, "question/1": two}
    heat, _, caption = gaze_of(extractor, {"masks": masks, "attention": attention}, observation)
    expected = np.zeros((1, 4, 4), np.float32)
    expected[0, 1, 2], expected[0, 2, 1] = 1.0, 0.5 / 1.5
    np.testing.assert_allclose(heat, expected, atol=1e-6)
    # Both words look there in the first round, one of them in the second.
    assert caption == (
        "Where the question looks in the image (cross_attention, mean of 2 rounds): the brightest cell has 0.75 "
        "of the attention."
    )
    masks["image"][:] = False
    assert gaze_of(extractor, {"masks": masks, "attention": attention}, observation) == Gaze()


def test_heat_of_a_set_of_pictures_in_a_transformer():
    extractor = extractor_of(MATCHING, fusion="transformer")
    observation, _ = gym.make(MATCHING).reset(seed=0)
    lengths = extractor.fusion.lengths
    keys = sum(lengths.values())
    start = extractor.fusion.columns("audio")["images"].start
    rows = {name: torch.zeros(1, length, keys) for name, length in lengths.items()}
    rows["audio"][:, :, start + 4 * 3 + 2] = 1.0  # third cell of the last picture
    rows["images"][:, :, start] = 1.0  # not asked, where there is sound
    attention = {f"{name}/{n}": part for n in (0, 1) for name, part in rows.items()}
    record = {"masks": masks_of(extractor), "attention": attention}
    np.testing.assert_allclose(gaze_of(extractor, record, observation).heat, one_cell(4, (3, 1, 0), 2))
    assert (
        "Where the audio looks in the images (transformer, mean of 2 layers)"
        in gaze_of(extractor, record, observation).caption
    )
    record["masks"]["audio"][:] = False
    np.testing.assert_allclose(gaze_of(extractor, record, observation).heat, one_cell(4, (0, 0, 0), 2))


def test_tokens_that_are_no_grid_give_no_heat():
    class Five(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 16)

        def forward(self, x):
            return self.linear(x.mean((2, 3))).unsqueeze(1).repeat(1, 5, 1)

    extractor = extractor_of(VQA, encoders={"image": Five()})
    observation, _ = gym.make(VQA).reset(seed=0)
    with extractor.fusion.recording() as record:
        extractor({name: torch.as_tensor(x)[None] for name, x in observation.items()})
    assert gaze_of(extractor, record, observation) == Gaze()


@pytest.mark.parametrize("id", [VQA, MATCHING, CAPTIONING])
@pytest.mark.parametrize("fusion", ["cross_attention", "transformer", "gated", "weighted_sum", "concat"])
def test_the_end_of_an_episode_shows_the_gaze(id, fusion):
    agent = make_agent("ppo", id, fusion=fusion, num_envs=2, n_steps=2, batch_size=4, device="cpu")
    env = gym.make(id, render_mode="rgb_array", split="test")
    plain, _, returns, _ = media.play(env, agent, 2, 0, ends_only=True)
    watched = Watched(agent)
    shown, _, again, _ = media.play(env, watched, 2, 0, ends_only=True)
    assert again == returns
    for one, other in zip(plain, shown, strict=True):
        if fusion == "concat":
            np.testing.assert_array_equal(one, other)
        elif fusion in ("gated", "weighted_sum"):
            assert other.shape[0] - one.shape[0] - BAR - LINE in (-1, 0, 1)  # even heights
            assert watched.gaze.caption == f"How much each modality weighs ({fusion})."
            assert sum(watched.gaze.weights.values()) == pytest.approx(1, abs=0.01)
        else:
            assert (other.shape[0] - one.shape[0]) // LINE in (1, 2) and (one != other[: len(one)]).any()
            assert watched.gaze.caption.startswith("Where the ")
            assert watched.gaze.heat.max() == 1.0 and (watched.gaze.heat >= 0).all()
    film, *_ = media.play(env, watched, 1, 0)
    np.testing.assert_array_equal(film[-1], shown[0])
    np.testing.assert_array_equal(film[0], media.play(env, agent, 1, 0)[0][0])


def test_an_agent_without_an_extractor_is_played_as_it_is():
    class Fixed:
        policy = nn.Linear(2, 2)

        def predict(self, observation, **_):
            return np.array(3), None

    env = gym.make(VQA, render_mode="rgb_array")
    watched = Watched(Fixed())
    frames, *_ = media.play(env, watched, 1, 0, ends_only=True)
    np.testing.assert_array_equal(frames[0], media.play(env, Fixed(), 1, 0, ends_only=True)[0][0])
    assert watched.gaze == Gaze()


def test_what_the_transformer_agent_records_is_its_attention():
    torch.manual_seed(0)
    q, k = torch.randn(3, 4, 8), torch.randn(3, 2, 5, 8)
    bias = torch.zeros(3, 5)
    bias[1, 2:] = NEVER
    values = torch.eye(5).expand(3, 2, 5, 5)  # so that what comes out is the attention
    shared = nn.functional.scaled_dot_product_attention(
        q.unsqueeze(2), k, values, bias[:, None, None], enable_gqa=True
    )
    found = looking(q, k, bias)
    torch.testing.assert_close(found, shared.squeeze(2).mean(1))
    assert not found[1, 2:].any()


def transformer_agent(id: str, **others) -> TransformerAgent:
    tiny = ModelConfig(width=16, layers=2, heads=2, kv_heads=1, hidden=16, token_width=16)
    return TransformerAgent(id, tiny, device="cpu", **others)


def test_heat_of_the_transformer_agent_stands_where_the_picture_does():
    observation, _ = gym.make(MATCHING).reset(seed=0)
    policy = transformer_agent(MATCHING).policy
    assert policy.fixed == ("audio", "images")
    masks = masks_of(policy.extractor)
    masks["audio"][:, 3:] = False  # padding that the prefix leaves out
    cells = masks["images"].shape[1]
    one, two = torch.zeros(1, 3 + cells + 1), torch.zeros(1, 3 + cells + 1)
    one[:, 3 + 4 * 3 + 2], two[:, 3 + 4 * 3 + 2], two[:, 3] = 1.0, 0.5, 0.5
    gaze = transformer_gaze(policy, [one, two], masks, observation, {"audio": 0.2, "images": 0.8}, "gated")
    expected = one_cell(4, (3, 1, 0), 2)
    expected[0, 0, 0] = 0.25 / 0.75
    np.testing.assert_allclose(gaze.heat, expected, atol=1e-6)
    assert gaze.weights == {"audio": 0.2, "images": 0.8}
    assert gaze.caption == (
        "Where the policy looks in the images when it decides (mean of 2 layers): the brightest cell has 0.75 of "
        "the attention. How much each modality weighs (gated)."
    )
    assert transformer_gaze(policy, [], masks, observation, None, "concat") == Gaze()


def test_heat_of_a_picture_that_changes_is_that_of_the_last_step():
    observation, _ = gym.make(VQA).reset(seed=0)
    policy = transformer_agent(VQA, fixed=("question",)).policy
    assert policy.changing == ("image",)
    masks = masks_of(policy.extractor)
    masks["question"][:, 2:] = False
    keys = 2 + 2 * (16 + 1)  # two words, and two steps of the picture and an action
    last = torch.zeros(1, keys)
    last[:, 2 + 17 + 6], last[:, 2 + 9], last[:, 0], last[:, -1] = 0.5, 1.0, 1.0, 1.0
    gaze = transformer_gaze(policy, [last], masks, observation, None, "concat")
    np.testing.assert_allclose(gaze.heat, one_cell(1, (0, 1, 2)))


@pytest.mark.parametrize("id", [VQA, MATCHING, CAPTIONING])
@pytest.mark.parametrize("fusion", ["concat", "gated", "attention"])
def test_the_transformer_agent_plays_the_same_when_it_is_watched(id, fusion):
    agent = transformer_agent(id, fusion=fusion)
    env = gym.make(id, render_mode="rgb_array", split="test")
    plain, _, returns, _ = media.play(env, agent, 2, 0, ends_only=True)
    watched = TransformerWatched(agent)
    shown, _, again, _ = media.play(env, watched, 2, 0, ends_only=True)
    assert again == returns
    assert watched.gaze.heat.max() == 1.0 and (watched.gaze.heat >= 0).all()
    assert watched.gaze.caption.startswith("Where the policy looks in the image")
    weighed = fusion == "gated" and id != CAPTIONING  # a caption has nothing beside its picture to fuse
    assert (watched.gaze.weights is not None) == weighed
    for one, other in zip(plain, shown, strict=True):
        assert len(other) >= len(one) + BAR * weighed + LINE and (one != other[: len(one)]).any()
    with agent.policy.recording() as record:
        agent.predict(env.reset(seed=1)[0])
    for layer in record["attention"]:
        torch.testing.assert_close(layer.sum(1), torch.ones(1))
    assert agent.policy._record is None


def test_show_lays_the_gaze_over_a_saved_transformer_agent(tmp_path):
    transformer_agent(VQA, fusion="gated").save(tmp_path / "agent")
    agent, out = TransformerAgent.load(tmp_path / "agent", device="cpu"), tmp_path / "shown.png"
    command = ["show", VQA, "--agent", str(tmp_path / "agent"), "--episodes", "1", "--device", "cpu"]
    result = CliRunner().invoke(app, [*command, "--split", "test", "--out", str(out)])
    assert result.exit_code == 0, result.output
    env = gym.make(VQA, render_mode="rgb_array", split="test")
    frames, *_ = media.play(env, TransformerWatched(agent), 1, 0, ends_only=True)
    shown = np.asarray(Image.open(out).convert("RGB"))
    np.testing.assert_array_equal(shown[: len(frames[0]), : frames[0].shape[1]], frames[0])


@pytest.mark.parametrize("algo", ["ppo", "dqn"])
def test_show_lays_the_gaze_over_a_saved_agent(tmp_path, algo):
    small = {"buffer_size": 64} if algo == "dqn" else {"n_steps": 2, "batch_size": 4}
    for fusion in ("cross_attention", "concat"):
        agent = make_agent(algo, VQA, fusion=fusion, num_envs=2, device="cpu", **small)
        save(agent, tmp_path / fusion)
        out = tmp_path / f"{fusion}.png"
        command = ["show", VQA, "--agent", str(tmp_path / fusion), "--episodes", "1", "--device", "cpu"]
        result = CliRunner().invoke(app, [*command, "--out", str(out)])
        assert result.exit_code == 0, result.output
        assert ("what the agent looks at isn't drawn" in result.output) == (fusion == "concat")
    heated, plain = (
        np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).astype(int)
        for name in ("cross_attention", "concat")
    )
    inside = (slice(21, 341), slice(21, 341))
    assert heated[inside].mean() > plain[inside].mean() + 5
