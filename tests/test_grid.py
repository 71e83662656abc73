"""Every encoder with every fusion: what all of them promise."""

import copy
import pickle
from itertools import cycle

import numpy as np
import pytest
import torch
from gymnasium import spaces
from safetensors.torch import load_file, save_file
from stable_baselines3 import PPO

from mmenvs import MultimodalExtractor
from mmenvs import spaces as modalities
from mmenvs.embeddings import ENCODERS, FUSIONS, Extractor
from mmenvs.embeddings.joint import ShapesEncoder
from mmenvs.integrations.sb3 import make_vec_env
from mmenvs.world.words import VOCABULARY

PARTS = {
    "image": modalities.image(32),
    "images": modalities.images(2, 32),
    "text": modalities.text(len(VOCABULARY), 6),
    "audio": modalities.audio(3200),
    "vector": spaces.Box(-np.inf, np.inf, (5,), np.float32),
    "tokens": modalities.tokens(3, 6),
}
EVERY = [(modality, encoder) for modality, names in ENCODERS.items() for encoder in names]
# The environment that has the modality, and its observation.
IDS = {
    "image": ("MMRL/VQA-v0", "image"),
    "text": ("MMRL/Captioning-v0", "caption"),
    "images": ("MMRL/AudioVisualMatching-v0", "images"),
    "audio": ("MMRL/AudioVisualMatching-v0", "audio"),
}


def extractor_of(modality, encoder, fusion, seed=0):
    """The modality beside another, so that there is something to fuse."""
    torch.manual_seed(seed)
    names = (modality, "text" if modality != "text" else "image")
    space = spaces.Dict({name: PARTS[name] for name in names})
    return Extractor(space, {modality: encoder}, fusion, features_dim=12, width=16)


def batch(space, n=3):
    space.seed(0)
    rows = [space.sample() for _ in range(n)]
    observation = {name: torch.as_tensor(np.stack([row[name] for row in rows])) for name in space}
    if "text" in observation:
        observation["text"][:, 4:] = 0
    return observation


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize(("modality", "encoder"), EVERY)
def test_every_encoder_with_every_fusion(modality, encoder, fusion, tmp_path):
    extractor = extractor_of(modality, encoder, fusion)
    observation = batch(extractor.observation_space)
    features = extractor(observation)
    assert features.shape == (3, 12) and features.dtype == torch.float32 and torch.isfinite(features).all()

    features.square().sum().backward()
    for name, module in extractor.encoders.items():
        # A bias before a softmax or a norm may have none; a whole modality may not.
        reached = [p for p in module.parameters() if p.requires_grad and p.grad is not None and p.grad.any()]
        assert reached, name
        if isinstance(module, ShapesEncoder):
            assert all(not p.requires_grad and p.grad is None for p in module.joint.parameters())
            assert not any(name.startswith("_frozen") for name in module.state_dict())

    # Rows don't know of each other.
    for row in range(3):
        alone = extractor({name: x[row : row + 1] for name, x in observation.items()})
        torch.testing.assert_close(alone[0], features[row], atol=1e-5, rtol=1e-5)

    # What is missing changes nothing, whatever it holds.
    changed = {**observation, modality: torch.zeros_like(observation[modality])}
    assert torch.equal(extractor(observation, [modality]), extractor(changed, [modality]))

    save_file(extractor.state_dict(), tmp_path / "weights.safetensors")
    other = extractor_of(modality, encoder, fusion, seed=1)
    assert not torch.allclose(other(observation), features)
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    for twin in (other, copy.deepcopy(extractor), pickle.loads(pickle.dumps(extractor))):
        assert torch.equal(twin(observation), features)


@pytest.mark.parametrize(("modality", "encoder"), [(m, e) for m, e in EVERY if m == "text" and e != "shapes"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_words_of_padding_are_ignored(modality, encoder, fusion):
    extractor = extractor_of(modality, encoder, fusion).eval()
    observation = batch(extractor.observation_space)
    features = extractor(observation)
    for module in extractor.modules():
        if isinstance(module, torch.nn.Embedding):
            with torch.no_grad():
                module.weight[0] = 5.0
    torch.testing.assert_close(extractor(observation), features, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("modality", "encoder"), [(m, e) for m, e in EVERY if m in ("vector", "tokens")])
def test_numbers_that_are_not_finite_are_named(modality, encoder):
    extractor = extractor_of(modality, encoder, "concat")
    observation = batch(extractor.observation_space)
    observation[modality][1, 0] = float("nan")
    with pytest.raises(
        ValueError, match=rf"the {modality} encoder of '{modality}' .* numbers that are not finite"
    ):
        extractor(observation)


@pytest.mark.parametrize(
    ("modality", "encoder", "fusion"),
    [
        (m, e, f)
        for (m, e), f in zip([pair for pair in EVERY if pair[0] in IDS], cycle(FUSIONS), strict=False)
    ],
)
def test_it_is_the_same_in_a_model_of_stable_baselines3_that_was_saved(modality, encoder, fusion, tmp_path):
    id, name = IDS[modality]
    env = make_vec_env(id, 3, seed=0, image_size=32)
    kwargs = {"encoders": {name: encoder}, "fusion": fusion, "features_dim": 12, "width": 16}
    model = PPO(
        "MultiInputPolicy", env, n_steps=2, batch_size=6, seed=0, device="cpu",
        policy_kwargs={"features_extractor_class": MultimodalExtractor, "features_extractor_kwargs": kwargs},
    )  # fmt: skip
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", device="cpu")
    observation = model.policy.obs_to_tensor(env.reset())[0]
    one, other = (m.policy.extract_features(observation) for m in (model, loaded))
    assert one.shape == (3, 12) and torch.equal(one, other)
    # And the same as outside of it, where pictures are as the environment gives them.
    extractor = model.policy.features_extractor.extractor
    twin = Extractor(env.native.single_observation_space, **kwargs)
    twin.load_state_dict(extractor.state_dict())
    raw = {key: torch.as_tensor(value) for key, value in env.env.reset(seed=[0, 1, 2])[0].items()}
    torch.testing.assert_close(twin(raw), one, atol=1e-5, rtol=1e-5)
