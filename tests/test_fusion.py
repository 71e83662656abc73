"""Fusions: every strategy with every kind of observation, missing modalities, and what they record."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from stable_baselines3 import PPO
from torch import nn

from mmenvs import MultimodalExtractor
from mmenvs import spaces as modalities
from mmenvs.embeddings import FUSIONS, Extractor
from mmenvs.embeddings.attention import HEADS, Attention
from mmenvs.embeddings.base import Readout
from mmenvs.integrations.sb3 import make_vec_env

PARTS = {
    "image": modalities.image(32),
    "text": modalities.text(30, 7),
    "audio": modalities.audio(4000),
    "images": modalities.images(3, 32),
    "vector": spaces.Box(-np.inf, np.inf, (5,), np.float32),
    "tokens": modalities.tokens(4, 6),
}
KINDS = [("image", "text"), ("audio", "images"), ("vector",), ("image",), ("image", "text", "tokens")]
LENGTHS = {"image": 5, "text": 4, "audio": 3}
RECORDING = {"weighted_sum": "weights", "gated": "weights"}
RECORDING |= {"cross_attention": "attention", "transformer": "attention"}


def space_of(names) -> spaces.Dict:
    return spaces.Dict({name: PARTS[name] for name in names})


def batch(names, n: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    space = space_of(names)
    space.seed(seed)
    drawn = [space.sample() for _ in range(n)]
    observation = {name: torch.as_tensor(np.stack([one[name] for one in drawn])) for name in names}
    if "text" in names:
        for row in range(n):
            observation["text"][row, 3 + row % 4 :] = 0
    return observation


def extractor_of(names, fusion, **others) -> Extractor:
    torch.manual_seed(0)
    return Extractor(space_of(names), fusion=fusion, features_dim=24, width=32, **others)


def fusion_of(name, lengths=LENGTHS, width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return scored(FUSIONS[name](lengths, width, 12))


def scored(module) -> nn.Module:
    """With scores that tell modalities apart, as a trained weighted_sum has them; at first they are equal."""
    for score in getattr(module, "score", {}).values():
        nn.init.normal_(score.weight)
    return module


def drawn(n: int = 6, width: int = 16) -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(3)
    tokens = {name: torch.randn(n, length, width, generator=generator) for name, length in LENGTHS.items()}
    return tokens, {name: torch.ones(n, length, dtype=torch.bool) for name, length in LENGTHS.items()}


@pytest.mark.parametrize("names", KINDS, ids="+".join)
@pytest.mark.parametrize("fusion", FUSIONS)
class TestEveryFusionWithEveryObservation:
    def test_shape_type_and_gradients(self, fusion, names):
        extractor = extractor_of(names, fusion)
        features = extractor(batch(names))
        assert features.shape == (4, 24) and features.dtype == torch.float32
        assert torch.isfinite(features).all()
        features.square().sum().backward()
        for name in names:
            encoder = extractor.encoders[name]
            assert sum(p.grad.abs().sum() for p in encoder.parameters() if p.grad is not None) > 0, name
        unused = [name for name, p in extractor.fusion.named_parameters() if p.grad is None]
        assert not unused

    def test_a_row_is_the_same_alone(self, fusion, names):
        extractor = extractor_of(names, fusion).eval()
        observation = batch(names)
        together = extractor(observation)
        for row in range(4):
            alone = extractor({name: x[row : row + 1] for name, x in observation.items()})
            torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)

    def test_weights_come_back_from_a_file(self, fusion, names, tmp_path):
        one = extractor_of(names, fusion)
        save_file(one.state_dict(), tmp_path / "weights.safetensors")
        other = Extractor(space_of(names), fusion=fusion, features_dim=24, width=32)
        observation = batch(names)
        assert not torch.equal(other(observation), one(observation))
        other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
        assert torch.equal(other(observation), one(observation))

    def test_half_precision_is_close(self, fusion, names):
        observation = batch(names)
        exact, half = (
            extractor_of(names, fusion, precision=precision)(observation)
            for precision in ("float32", "bfloat16")
        )
        assert half.dtype == torch.float32
        assert torch.cosine_similarity(exact, half).min() > 0.99
        torch.testing.assert_close(half, exact, atol=0.15, rtol=0.1)

    def test_whatever_is_missing_changes_nothing(self, fusion, names):
        extractor = extractor_of(names, fusion).eval()
        one, other = batch(names), batch(names, seed=1)
        for count in range(1, len(names)):
            for missing in combinations(names, count):
                features = extractor(one, missing)
                assert torch.isfinite(features).all()
                assert torch.equal(
                    extractor({**one, **{name: other[name] for name in missing}}, missing), features
                )
                assert not torch.allclose(extractor(other, missing), features)
                assert not torch.allclose(extractor(one), features)


@contextmanager
def calls(extractor: Extractor) -> Iterator[list[str]]:
    """Names of the encoders that run in the block."""
    ran: list[str] = []
    hooks = [
        encoder.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, encoder in extractor.encoders.items()
    ]
    yield ran
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_missing_without_and_visible_are_one_thing(fusion):
    names = ("audio", "image", "text")
    extractor = extractor_of(names, fusion)
    blind = extractor_of(names, fusion, visible=("image", "text"))
    observation = batch(names)
    rest = {name: observation[name] for name in ("image", "text")}
    whole, expected = extractor(observation), extractor(observation, missing=("audio",))
    with calls(extractor) as ran:
        assert torch.equal(extractor(rest, missing=["audio"]), expected)
        with extractor.without("audio"):
            assert torch.equal(extractor(rest), expected)
        assert torch.equal(blind(rest), expected)
    assert ran == ["image", "text"] * 2
    tokens, mask = extractor.tokens(rest, missing=("audio",))
    length = extractor.fusion.lengths["audio"]
    assert not mask[:, :length].any() and not tokens[:, :length].any() and mask[:, length:].any()
    with extractor.without("audio"), extractor.without("text"):
        assert torch.equal(extractor(rest), extractor(rest, missing=("text",)))
    assert torch.equal(extractor(observation), whole)


def test_encoders_of_what_is_missing_get_no_gradient():
    extractor = extractor_of(("image", "text"), "cross_attention")
    extractor(batch(("image", "text")), missing=("image",)).sum().backward()
    assert all(p.grad is None for p in extractor.encoders["image"].parameters())
    assert any(p.grad is not None and p.grad.any() for p in extractor.encoders["text"].parameters())


def test_what_cannot_be_missing():
    extractor = extractor_of(("image", "text"), "concat", visible=("image",))
    observation = batch(("image", "text"))
    with pytest.raises(ValueError, match="missing names 'smell'; the observation has image, text"):
        extractor(observation, missing=("smell",))
    with pytest.raises(TypeError, match="missing must be a sequence of names, got 'text'"):
        extractor(observation, missing="text")
    with pytest.raises(ValueError, match="one of image, text must be there"):
        extractor(observation, missing=("image",))
    with pytest.raises(ValueError, match="one of image, text must be there"), extractor.without("image"):
        pass
    with pytest.raises(ValueError, match="'smell'"), extractor.without("smell"):
        pass
    with pytest.raises(ValueError, match="lacks 'image'; it needs image"):
        extractor({"text": observation["text"]})
    with pytest.raises(RuntimeError), extractor.without("text"):
        raise RuntimeError
    assert torch.isfinite(extractor(observation)).all()


@pytest.mark.parametrize("fusion", FUSIONS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_masked_tokens_are_ignored_row_by_row(fusion, data):
    module = fusion_of(fusion)
    tokens, masks = drawn()
    for name, length in LENGTHS.items():
        bits = data.draw(st.lists(st.integers(0, 2**length - 1), min_size=6, max_size=6))
        masks[name] = torch.tensor([[bool(bit >> place & 1) for place in range(length)] for bit in bits])
    junk = data.draw(st.sampled_from([0.0, 3.0, 1e30, float("nan"), float("-inf")]))
    clean = {name: x.masked_fill(~masks[name].unsqueeze(-1), 0.0) for name, x in tokens.items()}
    spoilt = {name: x.masked_fill(~masks[name].unsqueeze(-1), junk) for name, x in tokens.items()}
    for x in spoilt.values():
        x.requires_grad_()
    features = module(spoilt, masks)
    assert torch.isfinite(features).all()
    assert torch.equal(features, module(clean, masks))
    features.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())
    for name, x in spoilt.items():
        assert torch.isfinite(x.grad).all() and not x.grad[~masks[name]].any()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_rows_with_and_without_a_modality_share_a_batch(fusion):
    module = fusion_of(fusion)
    tokens, masks = drawn()
    whole = module(tokens, masks)
    masks["text"][::2] = False
    features = module(tokens, masks)
    torch.testing.assert_close(features[1::2], whole[1::2])
    assert ((features[::2] - whole[::2]).abs().amax(1) > 1e-3).all()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_what_belongs_to_a_missing_modality_has_no_part_in_the_result(fusion):
    module = fusion_of(fusion)
    tokens, masks = drawn()
    masks["text"][:] = False
    module(tokens, masks).square().sum().backward()
    for name, parameter in module.named_parameters():
        if "text" in name.split("."):
            assert not parameter.grad.any(), name
        elif "image" in name.split("."):
            assert parameter.grad.any(), name


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_question_selects_what_of_the_picture_matters(fusion):
    """Which value stands in the cell that the question names, learned from 256 new pictures a step."""
    torch.manual_seed(0)
    width, cells, values = 32, 6, 4
    asked, keys, kinds = (nn.Embedding(n, width) for n in (cells, cells, values))
    module = FUSIONS[fusion]({"image": cells, "text": 3}, width, 64)
    model = nn.ModuleList([asked, keys, kinds, module, nn.Linear(64, values)])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    masks = {"image": torch.ones(256, cells, dtype=torch.bool), "text": torch.zeros(256, 3, dtype=torch.bool)}
    masks["text"][:, 0] = True
    for _ in range(250):
        places = torch.rand(256, cells).argsort(1)
        shown = torch.randint(values, (256, cells))
        question = torch.randint(cells, (256,))
        answer = shown[places == question[:, None]]
        tokens = {"image": keys(places) + kinds(shown), "text": asked(question)[:, None].expand(-1, 3, -1)}
        scores = model[-1](module(tokens, masks))
        optimizer.zero_grad()
        nn.functional.cross_entropy(scores, answer).backward()
        optimizer.step()
        accuracy = float((scores.argmax(1) == answer).float().mean())
        if accuracy > 0.9:
            break
    assert accuracy > 0.9  # chance is 0.25, the question or the picture alone too


# Saved agents depend on these: seed 0, tokens from sines, the last two words padding.
GOLDEN = {
    "concat": (
        1670,
        [[0.15061, 0.0, 0.4857, 0.3426, 0.01248, 0.59851], [0.50336, 0.0, 0.74186, 0.39901, 0.0, 0.0]],
    ),
    "weighted_sum": (
        1688,
        [[0.0, 1.40773, 0.0, 0.49035, 0.0, 0.68504], [0.23194, 0.91078, 0.44917, 0.20983, 0.24664, 0.20311]],
    ),
    "cross_attention": (
        3254,
        [[1.05051, 0.49029, 0.0, 0.19626, 0.0, 0.0], [1.0192, 0.75596, 0.45711, 0.68033, 0.0, 0.0]],
    ),
    "transformer": (
        2070,
        [[0.78445, 0.0, 0.13395, 0.0, 0.0, 0.0], [0.52195, 0.46933, 0.3818, 0.0, 0.20797, 0.0]],
    ),
}


@pytest.mark.parametrize("fusion", GOLDEN)
def test_fusions_of_saved_agents_compute_what_they_did(fusion):
    lengths = {"image": 4, "text": 5}
    torch.manual_seed(0)
    module = scored(FUSIONS[fusion](lengths, 8, 6))
    tokens = {
        name: torch.sin(torch.arange(2 * n * 8.0) * (i + 1)).view(2, n, 8)
        for i, (name, n) in enumerate(lengths.items())
    }
    masks = {name: torch.ones(2, n, dtype=torch.bool) for name, n in lengths.items()}
    masks["text"][:, 3:] = False
    size = sum(p.numel() for p in module.parameters())
    numbers, features = GOLDEN[fusion]
    assert size == numbers
    torch.testing.assert_close(module(tokens, masks), torch.tensor(features), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kept", [1.0, 0.6, 0.0])
def test_recorded_attention_is_what_is_mixed(kept):
    torch.manual_seed(0)
    attention = Attention(16)
    queries, keys = torch.randn(3, 5, 16), torch.randn(3, 7, 16)
    mask = None if kept == 1.0 else torch.rand(3, 7) < kept
    weights = attention.weights(queries, keys, mask)
    assert weights.shape == (3, HEADS, 5, 7) and not weights.requires_grad
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, HEADS, 5))
    values = attention.key_value(keys)[..., 16:].view(3, 7, HEADS, 4).transpose(1, 2)
    mixed = attention.out((weights @ values).transpose(1, 2).reshape(3, 5, 16))
    torch.testing.assert_close(attention(queries, keys, mask), mixed, atol=1e-5, rtol=1e-5)
    if kept == 0.6:
        assert mask.any(1).all() and not weights[~mask[:, None, None].expand_as(weights)].any()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_recording_changes_nothing_and_ends(fusion):
    module = fusion_of(fusion).eval()
    tokens, masks = drawn()
    masks["text"][:2] = False
    expected = module(tokens, masks)
    with module.recording() as record:
        assert torch.equal(module(tokens, masks), expected)
        kept = dict(record)
        assert kept.keys() == {"masks"} | ({RECORDING[fusion]} if fusion in RECORDING else set())
        module({name: x + 1 for name, x in tokens.items()}, masks)
    if fusion in RECORDING:
        assert kept[RECORDING[fusion]] is not record[RECORDING[fusion]]  # of the last call
    again = dict(record)
    module(tokens, masks)
    assert record.keys() == again.keys() and all(record[key] is again[key] for key in again)


@pytest.mark.parametrize("fusion", ["weighted_sum", "gated"])
def test_recorded_weights_are_shares_of_what_is_there(fusion):
    module = fusion_of(fusion).eval()
    tokens, masks = drawn()
    masks["text"][:2] = False
    masks["image"][1] = False
    with module.recording() as record:
        module(tokens, masks)
    weights = record["weights"]
    assert weights.shape == (6, 3) and not weights.requires_grad
    torch.testing.assert_close(weights.sum(1), torch.ones(6))
    assert ((weights > 0) == module.present(masks)).all()
    assert weights[1].tolist() == pytest.approx([0, 0, 1])


def test_the_gate_opens_for_what_it_was_set_to():
    module = fusion_of("gated").eval()
    with torch.no_grad():
        for gate in module.gate.values():
            gate.weight.zero_()
            gate.bias.zero_()
        module.gate["text"].bias.view(3, -1)[2] = 20.0  # the text calls for the sound
    tokens, masks = drawn()
    masks["text"][0] = False
    with module.recording() as record:
        module(tokens, masks)
    assert record["weights"][0].tolist() == pytest.approx([0.5, 0, 0.5])
    assert (record["weights"][1:, 2] > 0.99).all()


@pytest.mark.parametrize("fusion", ["cross_attention", "transformer"])
def test_recorded_attention_of_a_fusion(fusion):
    module = fusion_of(fusion).eval()
    tokens, masks = drawn()
    masks["text"][:, 2:] = False
    masks["audio"][0] = False
    with module.recording() as record:
        module(tokens, masks)
    assert list(record["attention"]) == [f"{name}/{n}" for n in (0, 1) for name in LENGTHS]
    assert {name: mask.tolist() for name, mask in record["masks"].items()} == {
        name: mask.tolist() for name, mask in masks.items()
    }
    for key, attention in record["attention"].items():
        name = key.split("/")[0]
        columns = module.columns(name)
        assert set(columns) == (set(LENGTHS) if fusion == "transformer" else set(LENGTHS) - {name})
        keys = sum(LENGTHS[other] for other in columns)
        assert attention.shape == (6, LENGTHS[name], keys)
        torch.testing.assert_close(attention.sum(-1), torch.ones(6, LENGTHS[name]))
        covered = torch.cat([torch.arange(keys)[part] for part in columns.values()])
        assert covered.tolist() == list(range(keys))
        for other, part in columns.items():
            assert not attention[..., part][~masks[other][:, None].expand(-1, LENGTHS[name], -1)].any()
            assert (attention[2, :, part][:, masks[other][2]] > 0).all()


def test_attention_of_the_fusion_follows_the_keys():
    """A picture cell that the words' projections point at gets their attention."""
    module = fusion_of("cross_attention", {"image": 5, "text": 4}).eval()
    block = module.rounds[0]["text"]
    with torch.no_grad():
        block.attention.query.weight.zero_()
        block.attention.query.bias.fill_(3.0)
        block.attention.key_value.weight[:16] = torch.eye(16)
        block.attention.key_value.bias.zero_()
    tokens = {"image": torch.zeros(1, 5, 16), "text": torch.randn(1, 4, 16)}
    tokens["image"][:, 3] = 4.0
    with module.recording() as record:
        module(tokens, {name: torch.ones(x.shape[:2], dtype=torch.bool) for name, x in tokens.items()})
    attention = record["attention"]["text/0"][0, :, module.columns("text")["image"]]
    assert (attention[:, 3] > 0.99).all()


def test_vectors_of_the_shared_space():
    module = fusion_of("shared").eval()
    tokens, masks = drawn()
    masks["text"][0] = False
    vectors = module.vectors(tokens, masks)
    for name, vector in vectors.items():
        norms = torch.ones(6)
        norms[0] = float(name != "text")
        torch.testing.assert_close(vector.norm(dim=1), norms)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_in_a_model_of_stable_baselines3(fusion, tmp_path):
    env = make_vec_env("MMRL/VQA-v0", 4, seed=0)
    model = PPO(
        "MultiInputPolicy",
        env,
        n_steps=2,
        batch_size=8,
        n_epochs=1,
        seed=0,
        device="cpu",
        policy_kwargs={
            "features_extractor_class": MultimodalExtractor,
            "features_extractor_kwargs": {"fusion": fusion, "features_dim": 16, "width": 16},
        },
    )
    before = {name: p.clone() for name, p in model.policy.named_parameters()}
    model.learn(8)
    assert any(
        not torch.equal(p, before[name])
        for name, p in model.policy.named_parameters()
        if "extractor.fusion" in name
    )
    model.save(tmp_path / "agent")
    loaded = PPO.load(tmp_path / "agent", device="cpu")
    observation = model.policy.obs_to_tensor(env.reset())[0]
    one, other = (m.policy.get_distribution(observation).distribution.logits for m in (model, loaded))
    assert torch.equal(one, other)
    with loaded.policy.features_extractor.extractor.without("image"):
        assert not torch.allclose(loaded.policy.get_distribution(observation).distribution.logits, one)


@pytest.mark.parametrize(
    ("lengths", "width", "features_dim", "error", "words"),
    [
        ({}, 16, 8, ValueError, "lengths must give"),
        ([3, 4], 16, 8, ValueError, "lengths must give"),
        ({"image": 0}, 16, 8, ValueError, r"lengths\['image'\] must be from 1"),
        ({"image": 2.0}, 16, 8, TypeError, r"lengths\['image'\] must be an integer"),
        ({"image": 2}, 0, 8, ValueError, "width"),
        ({"image": 2}, 16, 0, ValueError, "features_dim"),
    ],
)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_bad_sizes(fusion, lengths, width, features_dim, error, words):
    with pytest.raises(error, match=words):
        FUSIONS[fusion](lengths, width, features_dim)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_bad_tokens(fusion):
    module = fusion_of(fusion)
    tokens, masks = drawn()
    with pytest.raises(ValueError, match="tokens must hold image, text, audio, got image"):
        module({"image": tokens["image"]}, masks)
    with pytest.raises(ValueError, match="masks must hold image, text, audio, got text"):
        module(tokens, {"text": masks["text"]})
    with pytest.raises(ValueError, match=r"tokens\['text'\] must be \(B, 4, 16\), got \(6, 3, 16\)"):
        module({**tokens, "text": tokens["text"][:, :3]}, masks)
    with pytest.raises(ValueError, match=r"masks\['text'\] must be \(6, 4\) bool"):
        module(tokens, {**masks, "text": masks["text"].float()})


def test_readout_ignores_masked_tokens():
    torch.manual_seed(0)
    readout = Readout(LENGTHS, 16, 8)
    tokens, masks = drawn()
    masks["text"][:, 1:] = False
    masks["audio"][0] = False
    spoilt = {name: torch.where(masks[name][..., None], x, 1e6) for name, x in tokens.items()}
    torch.testing.assert_close(readout(spoilt, masks), readout(tokens, masks))


@pytest.mark.parametrize(
    ("space", "modality"),
    [
        (modalities.tokens(4, 64), "tokens"),
        (modalities.tokens(1, 16), "tokens"),
        (modalities.tokens(2, 16_000), "tokens"),
        (spaces.Box(0, 1, (8, 8), np.float32), "tokens"),
        (spaces.Box(-1, 1, (2, 4000), np.float32), "audio"),
        (modalities.audio(4000), "audio"),
        (spaces.Box(-1, 1, (4000,), np.float32), "audio"),
        (spaces.Box(-np.inf, np.inf, (4000,), np.float32), "vector"),
    ],
)
def test_tokens_are_told_from_sound_and_vectors(space, modality):
    assert modalities.modality_of(space) == modality


def test_integers_below_zero_are_no_words():
    assert modalities.modality_of(spaces.Box(0, 9, (4,), np.int64)) == "text"
    with pytest.raises(ValueError, match=r"fits Box\(-1, 9, \(4,\), int64\): .* from 0 on for text"):
        modalities.modality_of(spaces.Box(-1, 9, (4,), np.int64))


def test_short_matrices_like_sound_must_be_named():
    space = spaces.Box(-1, 1, (4, 64), np.float32)
    with pytest.raises(ValueError, match="tokens"):
        modalities.modality_of(space)
    extractor = Extractor(spaces.Dict({"x": space}), modalities={"x": "tokens"}, width=16)
    tokens, masks = extractor.encode({"x": torch.rand(2, 4, 64)})
    assert tokens["x"].shape == (2, 4, 16) and masks["x"].all()


def test_tokens_keep_their_order():
    extractor = extractor_of(("tokens",), "concat")
    observation = batch(("tokens",))
    assert not torch.allclose(extractor({"tokens": observation["tokens"].flip(1)}), extractor(observation))
