"""Encoders, fusions and the extractor: shapes, gradients, padding, errors."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmenvs import spaces as modalities
from mmenvs.embeddings import ENCODERS, FUSIONS, Extractor, Fusion
from mmenvs.embeddings.text import text_mask
from mmenvs.world.words import VOCABULARY

WORDS, LENGTH, BATCH = len(VOCABULARY), 9, 3
TRAINED_TEXT = [name for name in ENCODERS["text"] if name != "shapes"]


def full_space(size: int = 32) -> spaces.Dict:
    return spaces.Dict(
        {
            "audio": modalities.audio(4000),
            "image": modalities.image(size),
            "images": modalities.images(3, size),
            "text": modalities.text(WORDS, LENGTH),
            "tokens": modalities.tokens(4, 6),
            "vector": spaces.Box(-np.inf, np.inf, (5,), np.float32),
        }
    )


def batch(space: spaces.Dict, n: int = BATCH, seed: int = 0) -> dict[str, torch.Tensor]:
    space.seed(seed)
    drawn = [space.sample() for _ in range(n)]
    observation = {name: torch.as_tensor(np.stack([one[name] for one in drawn])) for name in space.spaces}
    for name, part in space.spaces.items():
        if modalities.modality_of(part) == "text":
            observation[name][:, 6:] = 0
            observation[name][:, :6].clamp_(min=1)
    return observation


def single(modality: str, size: int = 32) -> spaces.Dict:
    return spaces.Dict({modality: full_space(size)[modality]})


@pytest.mark.parametrize("fusion", FUSIONS)
def test_features_and_tokens_have_the_stated_shapes(fusion):
    space = full_space()
    extractor = Extractor(space, fusion=fusion, features_dim=40, width=32)
    observation = batch(space)
    features = extractor(observation)
    tokens, mask = extractor.tokens(observation)
    assert features.shape == (BATCH, 40) and features.dtype == torch.float32
    assert tokens.shape == (BATCH, mask.shape[1], 32) and mask.dtype == torch.bool
    assert (~mask).sum() == BATCH * 3  # three padded words a row
    assert torch.isfinite(features).all()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_gradients_reach_every_modality(fusion):
    torch.manual_seed(0)
    space = full_space()
    extractor = Extractor(space, fusion=fusion, width=32)
    extractor(batch(space)).square().sum().backward()
    for name, encoder in extractor.encoders.items():
        norms = [p.grad.norm() for p in encoder.parameters() if p.grad is not None]
        assert norms and sum(norms) > 0, name
    assert all(p.grad is not None for p in extractor.fusion.readout.parameters())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_fusion_ignores_padding(fusion):
    torch.manual_seed(0)
    lengths = {"image": 4, "text": 6}
    module = FUSIONS[fusion](lengths, 32, 16)
    tokens = {name: torch.randn(2, n, 32) for name, n in lengths.items()}
    masks = {"image": torch.ones(2, 4, dtype=torch.bool), "text": torch.arange(6).expand(2, 6) < 3}
    expected = module(tokens, masks)
    other = {**tokens, "text": torch.where(masks["text"][..., None], tokens["text"], torch.randn(2, 6, 32))}
    torch.testing.assert_close(module(other, masks), expected)
    changed = {**tokens, "text": tokens["text"] + 1}
    assert not torch.allclose(module(changed, masks), expected)


@pytest.mark.parametrize("encoder", TRAINED_TEXT)
def test_words_do_not_depend_on_the_padding_behind_them(encoder):
    torch.manual_seed(0)
    module = ENCODERS["text"][encoder](modalities.text(WORDS, LENGTH), 32)
    ids = torch.zeros(1, LENGTH, dtype=torch.int64)
    ids[0, :4] = torch.tensor([5, 6, 7, 8])
    before = module(ids)
    with torch.no_grad():
        for embedding in module.modules():
            if isinstance(embedding, nn.Embedding):
                embedding.weight[0] = 3.0
    torch.testing.assert_close(module(ids)[:, :4], before[:, :4])


@pytest.mark.parametrize("encoder", TRAINED_TEXT)
def test_the_order_of_words_matters(encoder):
    torch.manual_seed(0)
    extractor = Extractor(single("text"), encoders={"text": encoder}, width=32)
    ids = torch.tensor([[5, 6, 7, 8, 0, 0, 0, 0, 0], [8, 7, 6, 5, 0, 0, 0, 0, 0]])
    one, other = extractor({"text": ids})
    assert not torch.allclose(one, other)


def test_an_empty_text_keeps_one_place():
    ids = torch.zeros(2, LENGTH, dtype=torch.int64)
    assert text_mask(ids).sum(1).tolist() == [1, 1]
    for fusion in FUSIONS:
        space = spaces.Dict({"image": modalities.image(32), "text": modalities.text(WORDS, LENGTH)})
        features = Extractor(space, fusion=fusion, width=32)({**batch(space, 2), "text": ids})
        assert torch.isfinite(features).all()


@pytest.mark.parametrize(("modality", "encoder"), [(m, e) for m, names in ENCODERS.items() for e in names])
def test_every_encoder_gives_tokens(modality, encoder):
    space = single(modality)
    extractor = Extractor(space, encoders={modality: encoder}, width=32)
    tokens, masks = extractor.encode(batch(space))
    assert tokens[modality].shape[0] == BATCH and tokens[modality].shape[2] == 32
    assert masks[modality].shape == tokens[modality].shape[:2]


@settings(max_examples=12, deadline=None)
@given(size=st.integers(16, 112).map(lambda half: 2 * half), encoder=st.sampled_from(["cnn", "vit"]))
def test_pictures_of_every_even_size(size, encoder):
    extractor = Extractor(single("image", size), encoders={"image": encoder}, width=32)
    tokens, _ = extractor.encode(batch(single("image", size), 1))
    assert 1 <= tokens["image"].shape[1] <= 121


def test_channels_first_and_last_and_scaled_pictures_agree():
    torch.manual_seed(0)
    last = single("image")
    first = spaces.Dict({"image": spaces.Box(0, 255, (3, 32, 32), np.uint8)})
    one, other = Extractor(last, width=32), Extractor(first, width=32)
    other.load_state_dict(one.state_dict())
    observation = batch(last)
    moved = observation["image"].permute(0, 3, 1, 2)
    torch.testing.assert_close(one(observation), other({"image": moved}))
    torch.testing.assert_close(one(observation), other({"image": moved.float() / 255}))


def test_each_frame_keeps_its_number():
    torch.manual_seed(0)
    space = single("images")
    extractor = Extractor(space, width=32)
    observation = batch(space, 1)
    swapped = {"images": observation["images"].flip(1)}
    assert not torch.allclose(extractor(observation), extractor(swapped))


def test_audio_tokens_follow_time():
    torch.manual_seed(0)
    space = spaces.Dict({"audio": modalities.audio(16_000)})
    extractor = Extractor(space, width=32)
    early = torch.zeros(1, 16_000)
    early[0, :4000] = 0.5 * torch.sin(torch.arange(4000) * 0.3)
    silent = extractor.encode({"audio": torch.zeros(1, 16_000)})[0]["audio"]
    change = (extractor.encode({"audio": early})[0]["audio"] - silent).norm(dim=-1)[0]
    assert 20 <= change.numel() <= 30
    assert change[:5].min() > 0.1 and change[12:].max() < 1e-4


def test_what_is_not_visible_changes_nothing():
    torch.manual_seed(0)
    space = spaces.Dict({"image": modalities.image(32), "text": modalities.text(WORDS, LENGTH)})
    extractor = Extractor(space, width=32, visible=("text",))
    one, other = batch(space), batch(space, seed=1)
    torch.testing.assert_close(extractor({**one, "image": other["image"]}), extractor(one))
    assert not torch.allclose(extractor({**one, "text": other["text"]}), extractor(one))


def test_weights_of_the_weighted_sum_sum_to_one():
    module = FUSIONS["weighted_sum"]({"a": 2, "b": 3}, 32, 16)
    present = torch.ones(5, 2, dtype=torch.bool)
    weights = module.weights({"a": torch.randn(5, 32), "b": torch.randn(5, 32)}, present)
    torch.testing.assert_close(weights, torch.full((5, 2), 0.5))  # before anything is learned
    torch.nn.init.constant_(module.score["a"].bias, 100.0)  # bounded to 1
    torch.nn.init.constant_(module.score["b"].weight, -0.5)
    means = {"a": torch.randn(5, 32), "b": torch.full((5, 32), 1 / 32)}
    higher = 1 / (1 + math.exp(math.tanh(-0.5) - 1))
    expected = torch.tensor([higher, 1 - higher]).expand(5, 2)
    torch.testing.assert_close(module.weights(means, present), expected)
    present[0, 0] = False
    torch.testing.assert_close(module.weights(means, present)[0], torch.tensor([0.0, 1.0]))


def test_half_precision_is_close_to_single():
    torch.manual_seed(0)
    space = spaces.Dict({"image": modalities.image(32), "text": modalities.text(WORDS, LENGTH)})
    single_precision = Extractor(space, width=32)
    half = Extractor(space, width=32, precision="bfloat16")
    half.load_state_dict(single_precision.state_dict())
    observation = batch(space)
    expected, got = single_precision(observation), half(observation)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=0.1, rtol=0.1)


def test_a_fusion_class_and_an_encoder_module_plug_in():
    class Mean(Fusion):
        def __init__(self, lengths, width, features_dim):
            super().__init__(lengths, width, features_dim)
            self.out = nn.Linear(width * len(lengths), features_dim)

        def forward(self, tokens, masks):
            return self.out(torch.cat([tokens[name].mean(1) for name in self.lengths], -1))

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 32)

        def forward(self, x):
            return self.linear(x).unsqueeze(1)

    space = full_space()
    extractor = Extractor(space, {"vector": Flat()}, Mean, 12, width=32)
    assert extractor(batch(space)).shape == (BATCH, 12)


SPACE = spaces.Dict({"image": modalities.image(32), "text": modalities.text(WORDS, LENGTH)})


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"fusion": "sum"}, ValueError, "concat, weighted_sum, cross_attention, transformer, gated"),
        ({"fusion": nn.Linear}, TypeError, "Fusion"),
        ({"encoders": {"image": "resnet"}}, ValueError, "cnn, vit"),
        ({"encoders": {"picture": "cnn"}}, ValueError, "image, text"),
        ({"encoders": {"image": 3}}, TypeError, "torch module"),
        ({"encoders": {"image": nn.Flatten(2)}}, ValueError, "width=64"),
        ({"modalities": {"image": "smell"}}, ValueError, "'smell'"),
        ({"modalities": {"image": "text"}}, ValueError, r"shape \(32, 32, 3\), got 'text', which has 1 axes"),
        ({"modalities": {"text": "images"}}, ValueError, "'images', which has 4 axes"),
        ({"visible": ("sound",)}, ValueError, "sound"),
        ({"visible": ()}, ValueError, "one of image, text must be there"),
        ({"visible": "image"}, TypeError, "sequence of names"),
        ({"precision": "int8"}, ValueError, "bfloat16"),
        ({"width": 30}, ValueError, "multiple of"),
        ({"width": 1}, ValueError, "width must be from 2"),
        ({"width": 2.5}, TypeError, "width must be an integer"),
        ({"encoders": "cnn"}, TypeError, "dict from names of the observation .image, text. .*got 'cnn'"),
        ({"encoders": ["cnn"]}, TypeError, "dict from names"),
    ],
)
def test_errors_name_what_is_allowed(arguments, error, words):
    with pytest.raises(error, match=words):
        Extractor(SPACE, **arguments)


@pytest.mark.parametrize(
    ("space", "error", "words"),
    [
        ({}, ValueError, "must hold one observation at least"),
        ({"a": spaces.Discrete(3)}, TypeError, r"observation_space\['a'\]: an observation must be a Box space, got Disc"),
        ({"a": spaces.Box(0, 1, (2, 2, 2))}, ValueError, r"observation_space\['a'\]: no modality fits"),
    ],
)  # fmt: skip
def test_spaces_that_nothing_encodes(space, error, words):
    for make in (Extractor, Extractor.from_pretrained):
        with pytest.raises(error, match=words):
            make(spaces.Dict(space))


@pytest.mark.parametrize("encoder", ["logmel_cnn", "shapes"])
def test_sound_that_is_none(encoder):
    """Whole numbers of 16 bits, as sound files have them, would be heard as noise."""
    space = spaces.Dict({"sound": spaces.Box(-1.0, 1.0, (8000,), np.float32)})
    extractor = Extractor(space, {"sound": encoder})
    sound = torch.rand(2, 8000) * 2 - 1
    assert extractor({"sound": sound}).shape == (2, 256)
    whole = (sound * 32767).short()
    for bad in (whole, whole.float(), sound * 1.5, torch.full((2, 8000), torch.nan)):
        with pytest.raises(
            ValueError, match=r"observation\['sound'\] must hold sound as floats from -1 to 1"
        ):
            extractor({"sound": bad})
    loud = spaces.Dict({"sound": spaces.Box(-np.inf, np.inf, (8000,), np.float32)})
    assert torch.isfinite(Extractor(loud, modalities={"sound": "audio"})({"sound": 9 * sound})).all()


def test_what_is_no_observation_or_no_size():
    extractor = Extractor(spaces.Dict({"vector": spaces.Box(0.0, 1.0, (3,), np.float32)}))
    with pytest.raises(
        TypeError, match="observation must be a mapping from names to batched tensors, got None"
    ):
        extractor(None)
    for size in (0, -1):
        with pytest.raises(ValueError, match="megabytes must be from 1"):
            extractor.remember(size)
    with pytest.raises(TypeError, match="megabytes must be an integer"):
        extractor.remember("a")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": torch.zeros(3, 48, 48, 3)}, r"'image'. must be \(B, 32, 32, 3\), got \(3, 48, 48, 3\)"),
        ({"image": torch.zeros(3, 3, 32, 32)}, r"'image'. must be \(B, 32, 32, 3\)"),
        ({"image": torch.zeros(32, 32, 3)}, r"'image'. must be \(B, 32, 32, 3\)"),
        ({"image": torch.full((3, 32, 32, 3), 255.0)}, "from 0 to 1, got torch.float32 from 255 to 255"),
        ({"image": torch.full((3, 32, 32, 3), -0.1)}, "from 0 to 1, got torch.float32 from -0.1"),
        ({"image": torch.full((3, 32, 32, 3), 1)}, "pictures as uint8, .* got torch.int64"),
        ({"text": torch.zeros(3, LENGTH + 1).long()}, rf"'text'. must be \(B, {LENGTH}\)"),
        ({"text": torch.zeros(2, LENGTH).long()}, "one batch size, got image 3, text 2"),
        ({"text": torch.full((3, LENGTH), WORDS)}, f"word ids from 0 to {WORDS - 1}, got {WORDS} to {WORDS}"),
        ({"text": torch.full((3, LENGTH), -1)}, "word ids from 0"),
        ({"text": torch.full((3, LENGTH), 1.5)}, "whole numbers, got torch.float32"),
        ({"image": torch.zeros(0, 32, 32, 3)}, r"one row at least, got \(0, 32, 32, 3\)"),
    ],
)
def test_batches_that_do_not_fit_the_space(changes, words):
    extractor = Extractor(SPACE, width=32)
    with pytest.raises(ValueError, match=words):
        extractor({**batch(SPACE), **changes})


def test_an_unknown_keyword_of_pretrained_ones():
    with pytest.raises(TypeError, match=r"takes .*image, text, audio, video, .*width.*; got pic"):
        Extractor.from_pretrained(SPACE, pic="a/b")


def test_other_spaces_are_refused():
    with pytest.raises(TypeError, match="Dict"):
        Extractor(modalities.image(32))


def test_raw_arrays_and_missing_observations_are_named():
    envs = gym.make_vec("MMRL/VQA-v0", num_envs=2)
    extractor = Extractor(envs.single_observation_space)
    observation, _ = envs.reset(seed=0)
    with pytest.raises(TypeError, match="as_tensor"):
        extractor(observation)
    with pytest.raises(ValueError, match="lacks 'question'"):
        extractor({"image": torch.as_tensor(observation["image"])})
    with pytest.raises(ValueError, match="features_dim"):
        Extractor(envs.single_observation_space, features_dim=0)


@pytest.mark.parametrize(
    ("shape", "found"),
    [
        ((48, 64, 3), (3, 48, 64)), ((3, 48, 64), (3, 48, 64)), ((5, 48, 64, 1), (1, 48, 64)),
        ((5, 4, 48, 64), (4, 48, 64)), ((3, 64, 3), (3, 3, 64)), ((4, 4, 4), (4, 4, 4)),
    ],
)  # fmt: skip
def test_channels_stand_where_there_are_few(shape, found):
    assert modalities.picture_shape(shape) == found
    assert modalities.channels_last(shape) == (shape[-1] in (1, 3, 4))


@pytest.mark.parametrize("shape", [(64, 64, 2), (64, 64), (3,), (2, 3, 4, 5, 3)])
def test_what_is_no_picture(shape):
    with pytest.raises(ValueError, match=r"pictures must be \(H, W, C\) or \(C, H, W\)"):
        modalities.picture_shape(shape)
