"""What frozen encoders gave is remembered, and is what they would give."""

import copy
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch

import mmenvs  # noqa: F401
from mmenvs.embeddings import Extractor
from mmenvs.embeddings.recall import Recall
from tests import tiny_models


class Counted(torch.nn.Module):
    """Doubles its input and counts the rows."""

    rows = 0

    def __call__(self, x):
        self.rows += len(x)
        return x.flatten(1).float() * 2


def test_recall_encodes_each_input_once():
    encode, recall = Counted(), Recall(1)
    x = torch.arange(24, dtype=torch.uint8).reshape(4, 2, 3)
    assert torch.equal(recall(encode, x), x.flatten(1).float() * 2)
    done = encode.rows
    assert torch.equal(recall(encode, x.flip(0)), x.flip(0).flatten(1).float() * 2) and encode.rows == done
    more = torch.cat([x, x + 100])
    assert torch.equal(recall(encode, more), more.flatten(1).float() * 2) and encode.rows == done + 4
    # Another shape has results of another size.
    assert recall(encode, x[:, :1]).shape == (4, 3)
    copied = pickle.loads(pickle.dumps(recall))
    assert torch.equal(copied(encode, x), x.flatten(1).float() * 2) and encode.rows > done + 8


def test_recall_keeps_half_precision_apart():
    layer, recall = torch.nn.Linear(5, 3).requires_grad_(False), Recall(1)
    x = torch.randn(4, 5)
    for half in (False, True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            assert torch.equal(recall(lambda x: layer(x).float(), x), layer(x).float())


def test_recall_lets_the_oldest_go():
    encode, recall = Counted(), Recall(1)
    for i in range(40):
        x = torch.full((1, 20_000), float(i))
        assert torch.equal(recall(encode, x), 2 * x)
    first = encode.rows
    recall(encode, torch.full((1, 20_000), 39.0))
    assert encode.rows == first
    recall(encode, torch.full((1, 20_000), 0.0))
    assert encode.rows == first + 1


@pytest.mark.parametrize("id", ["MMRL/VQA-v0", "MMRL/AudioVisualMatching-v0"])
def test_an_extractor_that_remembers_gives_the_same(id):
    envs = gym.make_vec(id, num_envs=6)
    observation = {name: torch.as_tensor(part) for name, part in envs.reset(seed=0)[0].items()}
    extractor = Extractor(envs.single_observation_space, dict.fromkeys(observation, "shapes"))
    expected = extractor(observation)
    extractor.remember()
    for _ in range(2):
        torch.testing.assert_close(extractor(observation), expected)
    extractor(observation).sum().backward()
    assert all(p.grad is not None for p in extractor.parameters() if p.requires_grad)
    for name in observation:
        # Nothing is encoded again, not even by weights that have changed.
        extractor.encoders[name]._frozen[0] = copy.deepcopy(extractor.encoders[name]._frozen[0])
        for parameter in extractor.encoders[name]._frozen[0].parameters():
            parameter.zero_()
    torch.testing.assert_close(extractor(observation), expected)


def test_a_pretrained_encoder_remembers_when_it_is_frozen(tmp_path):
    folder, space = tiny_models.save(tiny_models.clip, tmp_path), gym.make("MMRL/VQA-v0").observation_space
    extractor = Extractor(space, {"image": f"hf:{folder}"})
    x = torch.as_tensor(np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3)).astype(np.uint8))
    observation = {"image": x, "question": torch.ones(3, 20, dtype=torch.int64)}
    expected = extractor(observation)
    extractor.remember()
    torch.testing.assert_close(extractor(observation), expected)
    extractor.encoders["image"].model = None
    torch.testing.assert_close(extractor(observation), expected)
