"""Embedded and perturbed observations: the wrappers, the embedding behind them, the agents before them."""

import copy
import pickle
import re

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from mmenvs_agents.evaluation import evaluate
from stable_baselines3 import PPO
from torch import nn

from mmenvs.embeddings import EmbeddingCache, Extractor, cost, load_embedding, probe_report
from mmenvs.embeddings import embedding as embedding_module
from mmenvs.integrations.sb3 import MultimodalExtractor, make_vec_env
from mmenvs.perturbations import PERTURBATIONS, VectorPerturbObservation, perturb
from mmenvs.precompute import embed_parts, parts_of
from mmenvs.registry import SPECS, task_class
from mmenvs.text import PAD, START, UNKNOWN
from mmenvs.wrappers import EmbedObservation, Encoder, VectorEmbedObservation, pool_names
from tests.test_env import same

VQA, CAPTIONING, MATCHING = "MMRL/VQA-v0", "MMRL/Captioning-v0", "MMRL/AudioVisualMatching-v0"
every_id = pytest.mark.parametrize("id", sorted(SPECS))
every_output = pytest.mark.parametrize("output", ["pooled", "tokens"])


def extractor_of(id, seed=0, **kwargs):
    torch.manual_seed(seed)
    return Extractor(task_class(id)(1).observation_space, width=16, features_dim=8, **kwargs)


def vector(id, n=3, embedding=None, wrapper=None, output="pooled", cache=None, **kwargs):
    envs = gym.make_vec(id, num_envs=n, **kwargs)
    return VectorEmbedObservation(
        embedding=embedding or extractor_of(id), env=envs, output=output, cache=cache
    )


def flat(observation):
    """An embedded observation, batched or not, as one array."""
    if isinstance(observation, dict):
        return np.concatenate([v.reshape(-1) for v in observation.values()])
    return observation.reshape(-1)


def calls(encoder):
    """The batch sizes that each encoder module is called with from now on."""
    seen = {name: [] for name in encoder.names}
    for name, module in encoder.embedding.encoders.items():
        module.register_forward_pre_hook(lambda _, x, name=name: seen[name].append(len(x[0])))
    return seen


@every_id
@every_output
def test_rows_equal_single_environments(id, output):
    extractor, n = extractor_of(id), 3
    envs = vector(id, n, extractor, output=output)
    singles = [EmbedObservation(gym.make(id), extractor, output=output) for _ in range(n)]
    assert envs.single_observation_space == singles[0].observation_space
    observation, _ = envs.reset(seed=5)
    assert envs.observation_space.contains(observation)

    def row(batch, i):
        return {k: v[i] for k, v in batch.items()} if isinstance(batch, dict) else batch[i]

    for i, env in enumerate(singles):
        np.testing.assert_allclose(flat(row(observation, i)), flat(env.reset(seed=5 + i)[0]), atol=1e-5)
    generator = np.random.default_rng(0)
    for t in range(12):
        actions = (
            envs.unwrapped.oracle_actions()
            if t % 2
            else generator.integers(envs.single_action_space.n, size=n)
        )
        observation, _, ended, _, infos = envs.step(actions)
        assert envs.observation_space.contains(observation)
        for i, env in enumerate(singles):
            last, _, end, _, _ = env.step(int(actions[i]))
            assert end == ended[i]
            if end:
                assert envs.single_observation_space.contains(infos["final_obs"][i])
                np.testing.assert_allclose(flat(infos["final_obs"][i]), flat(last), atol=1e-5)
                last, _ = env.reset()
            elif "final_obs" in infos:
                assert infos["final_obs"][i] is None
            np.testing.assert_allclose(flat(row(observation, i)), flat(last), atol=1e-5)


@every_id
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_every_autoreset_equals_embedding_what_the_environment_gives(id, mode):
    extractor, n = extractor_of(id), 4
    plain = gym.make_vec(id, num_envs=n, autoreset_mode=mode, max_episode_steps=3)
    embedded = vector(id, n, extractor, autoreset_mode=mode, max_episode_steps=3)
    embedding = load_embedding(extractor, plain.single_observation_space)

    def expected(observation):
        return embedding({k: torch.as_tensor(v) for k, v in observation.items()}).numpy()

    got, wanted = embedded.reset(seed=1)[0], plain.reset(seed=1)[0]
    for t in range(9):
        np.testing.assert_allclose(got, expected(wanted), atol=1e-5)
        actions = plain.oracle_actions() if t % 2 else np.full(n, 3)
        got, *_, infos = embedded.step(actions)
        wanted, _, terminated, truncated, plain_infos = plain.step(actions)
        if "final_obs" in plain_infos:
            assert (infos["_final_obs"] == plain_infos["_final_obs"]).all()
            for row in np.flatnonzero(infos["_final_obs"]):
                raw = {k: v[None] for k, v in plain_infos["final_obs"][row].items()}
                np.testing.assert_allclose(infos["final_obs"][row][None], expected(raw), atol=1e-5)
        if mode == AutoresetMode.DISABLED and (terminated | truncated).any():
            mask = {"reset_mask": terminated | truncated}
            got, wanted = embedded.reset(options=dict(mask))[0], plain.reset(options=dict(mask))[0]


def test_it_wraps_gymnasiums_own_vector_environments():
    extractor, n = extractor_of(CAPTIONING), 3
    kwargs = {"vector_kwargs": {"autoreset_mode": AutoresetMode.SAME_STEP}}
    sync = gym.make_vec(CAPTIONING, num_envs=n, vectorization_mode="sync", **kwargs)
    envs, other = vector(CAPTIONING, n, extractor), VectorEmbedObservation(sync, extractor)
    np.testing.assert_allclose(envs.reset(seed=2)[0], other.reset(seed=2)[0], atol=1e-5)
    for t in range(8):
        actions = np.full(n, 3) if t % 3 else envs.unwrapped.oracle_actions()
        (a, *_, infos), (b, *_, others) = envs.step(actions), other.step(actions)
        np.testing.assert_allclose(a, b, atol=1e-5)
        for x, y in zip(infos.get("final_obs", ()), others.get("final_obs", ()), strict=True):
            assert (x is None and y is None) or np.allclose(x, y, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*(infinity|unwrapped version)")
@every_id
@every_output
def test_gymnasiums_checker(id, output):
    check_env(EmbedObservation(gym.make(id), extractor_of(id), output=output), skip_render_check=True)


def test_one_call_a_step_and_none_for_what_is_known():
    envs = vector(VQA, 16)
    seen = calls(envs.encoder)
    envs.reset(seed=0)
    for _ in range(3):
        envs.step(envs.unwrapped.oracle_actions())
    assert seen == {"image": [16] * 4, "question": [16] * 4}


def test_pictures_of_a_long_episode_are_encoded_once():
    envs = vector(CAPTIONING, 4)
    seen, ends = calls(envs.encoder), []
    envs.reset(seed=0)
    for _ in range(20):
        ends.append(int(envs.step(envs.unwrapped.oracle_actions())[2].sum()))
    assert seen["image"] == [4, *(n for n in ends if n)]
    assert seen["caption"] == [4, *(4 + n for n in ends)]


def test_a_single_environment_encodes_what_has_changed():
    env = EmbedObservation(gym.make(CAPTIONING), extractor_of(CAPTIONING))
    seen = calls(env.encoder)
    env.reset(seed=0)
    for word in (5, 6, 3):
        env.step(word)
    assert seen == {"image": [1], "caption": [1] * 4}


@every_id
@every_output
@pytest.mark.parametrize("pool_size", [None, 6])
def test_a_cache_changes_nothing_but_the_calls(id, output, pool_size, tmp_path):
    extractor, kwargs = extractor_of(id), {} if pool_size is None else {"pool_size": pool_size}
    plain = vector(id, 4, extractor, output=output, **kwargs)
    for round_ in range(2):
        cached = vector(id, 4, extractor, output=output, cache=tmp_path, **kwargs)
        seen = calls(cached.encoder)
        np.testing.assert_allclose(flat(cached.reset(seed=3)[0]), flat(plain.reset(seed=3)[0]), atol=1e-5)
        for _ in range(8):
            actions = plain.unwrapped.oracle_actions()
            (got, *_, infos), (wanted, *_, others) = cached.step(actions), plain.step(actions)
            np.testing.assert_allclose(flat(got), flat(wanted), atol=1e-5)
            for x, y in zip(infos.get("final_obs", ()), others.get("final_obs", ()), strict=True):
                assert (x is None and y is None) or np.allclose(flat(x), flat(y), atol=1e-5)
        fixed = {name: sum(n) for name, n in seen.items() if name in plain.unwrapped.task.fixed}
        if round_ == 1:
            assert not any(fixed.values())
        elif pool_size is not None:
            # Rows may draw the same item in the step that brings it in.
            assert all(n <= pool_size + 4 for n in fixed.values())
        cached.encoder.cache.close()


def test_a_known_pool_is_not_hashed(monkeypatch):
    cache = EmbeddingCache()
    extractor = extractor_of(VQA)
    task = task_class(VQA)(8, pool_size=20)
    encoder = Encoder(extractor, task.observation_space, cache=cache)
    list(embed_parts(task, encoder, parts_of(task, encoder)))
    envs = vector(VQA, 5, extractor, cache=cache, pool_size=20)
    seen = calls(envs.encoder)
    monkeypatch.setattr("mmenvs.wrappers.hash_rows", None)
    envs.reset(seed=0)
    for _ in range(5):
        envs.step(envs.unwrapped.oracle_actions())
    assert seen == {"image": [], "question": []}


def test_pools_of_other_settings_do_not_mix():
    cache, extractor = EmbeddingCache(), extractor_of(VQA)
    for kwargs in ({}, {"difficulty": 1}, {"split": "val"}):
        envs = vector(VQA, 4, extractor, cache=cache, pool_size=3, **kwargs)
        plain = vector(VQA, 4, extractor, pool_size=3, **kwargs)
        np.testing.assert_allclose(envs.reset(seed=0)[0], plain.reset(seed=0)[0], atol=1e-5)
    assert sum(len(section) for section in cache.sections.values()) <= 18


def test_kept_observations_stay_and_copies_go_on():
    envs = vector(CAPTIONING, 3, output="tokens", cache=EmbeddingCache())
    kept = [envs.reset(seed=0)[0]]
    copies = [copy.deepcopy(kept[0])]
    for _ in range(6):
        kept.append(envs.step(envs.unwrapped.oracle_actions())[0])
        copies.append(copy.deepcopy(kept[-1]))
    assert all(same(a, b) for a, b in zip(kept, copies, strict=True))
    twins = [envs, copy.deepcopy(envs), pickle.loads(pickle.dumps(envs))]
    results = [[flat(twin.step(np.full(3, 3))[0]) for _ in range(3)] for twin in twins]
    np.testing.assert_allclose(results[1], results[0], atol=1e-5)
    np.testing.assert_allclose(results[2], results[0], atol=1e-5)


# The embedding itself.


def test_tokens_that_are_handed_out_may_be_written_into():
    envs, twin = (
        VectorEmbedObservation(gym.make_vec("MMRL/Captioning-v0", 3), "shapes", output="tokens")
        for _ in range(2)
    )
    first, second = envs.reset(seed=0)[0], twin.reset(seed=0)[0]
    for _ in range(40):
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])
            first[name][:] = 7.0
        actions = twin.oracle_actions()
        (first, *_, infos), (second, *_, others) = envs.step(actions), twin.step(actions)
        for row in np.flatnonzero(others.get("_final_obs", ())):
            for name in first:
                np.testing.assert_array_equal(infos["final_obs"][row][name], others["final_obs"][row][name])


def test_the_fingerprint_tells_what_decides_the_output():
    space = task_class(VQA)(1).observation_space

    def prints(extractor, **kwargs):
        return load_embedding(extractor, space, **kwargs).fingerprints

    base = prints(extractor_of(VQA))
    assert base == prints(extractor_of(VQA)) == prints(extractor_of(VQA, fusion="concat"))
    assert base == prints(extractor_of(VQA).train().requires_grad_(True))
    for other in (
        prints(extractor_of(VQA, 1)),
        prints(extractor_of(VQA), output="tokens"),
        prints(extractor_of(VQA, precision="bfloat16")),
    ):
        assert not set(base.values()) & set(other.values())
    changed = extractor_of(VQA)
    with torch.no_grad():
        changed.encoders["image"].place[0, 0] += 1e-3
    assert prints(changed)["image"] != base["image"] and prints(changed)["question"] == base["question"]
    strided = nn.Sequential(nn.Conv2d(3, 8, 8, stride=8), nn.Flatten(2))
    other = copy.deepcopy(strided)
    other[0].stride, other[0].dilation = (7, 7), (1, 1)
    encoders = [{"image": module, "question": nn.Embedding(97, 8)} for module in (strided, other)]
    found = [load_embedding(each, space, output="tokens").fingerprint for each in encoders]
    assert found[0] != found[1] and all(re.fullmatch("[0-9a-f]{32}", each) for each in found)


def test_it_owns_its_weights_and_is_frozen():
    extractor = extractor_of(VQA)
    space = task_class(VQA)(1).observation_space
    embedding = load_embedding(extractor, space)
    assert all(p.requires_grad for p in extractor.parameters())
    assert not any(p.requires_grad for p in embedding.parameters()) and not embedding.train().training
    raw, _ = gym.make_vec(VQA, num_envs=4).reset(seed=0)
    observation = {k: torch.as_tensor(v) for k, v in raw.items()}
    before = embedding(observation)
    with torch.no_grad():
        for p in extractor.parameters():
            p.zero_()
    assert torch.equal(embedding(observation), before) and before.shape == (4, embedding.features_dim)


@every_id
def test_pooled_and_tokens_are_of_the_extractors_encoders(id):
    extractor = extractor_of(id)
    space = task_class(id)(1).observation_space
    raw, _ = gym.make_vec(id, num_envs=3).reset(seed=0)
    observation = {k: torch.as_tensor(v) for k, v in raw.items()}
    with torch.no_grad():
        tokens, masks = extractor.encode(observation)[:2]
    pooled, kept = (
        load_embedding(extractor, space, output).encode(observation) for output in ("pooled", "tokens")
    )
    for name, mask in masks.items():
        torch.testing.assert_close(kept[name], tokens[name] * mask.unsqueeze(-1))
        if name == "images":  # one vector a picture
            torch.testing.assert_close(pooled[name], tokens[name].unflatten(1, (4, -1)).mean(2))
            continue
        for row in range(3):
            torch.testing.assert_close(pooled[name][row, 0], tokens[name][row][mask[row]].mean(0))


def test_an_extractor_trained_on_pictures_channels_first():
    adapter = make_vec_env(VQA, 4, seed=0)
    trained = MultimodalExtractor(adapter.observation_space, width=16, features_dim=8).extractor
    raw, _ = gym.make_vec(VQA, num_envs=4).reset(seed=0)
    embedding = load_embedding(trained, gym.make_vec(VQA, num_envs=1).single_observation_space, "tokens")
    got = embedding.encode({"image": torch.as_tensor(raw["image"])})["image"]
    seen = {k: torch.as_tensor(v) for k, v in adapter.reset().items()}
    with torch.no_grad():
        torch.testing.assert_close(got, trained.encode(seen)[0]["image"])


@every_id
@every_output
def test_shapes(id, output):
    envs = vector(id, 4, "shapes", output=output)
    again = vector(id, 4, "shapes", output=output)
    observation, _ = envs.reset(seed=0)
    assert envs.observation_space.contains(observation)
    assert envs.encoder.embedding.fingerprint == again.encoder.embedding.fingerprint
    if output == "pooled":
        assert envs.encoder.embedding.dims == {
            name: (4 if name == "images" else 1, 128) for name in envs.encoder.names
        }


class Wrong(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value.expand(len(x), *self.value.shape[1:]) + 0 * x.float().mean()


SPACE = task_class(VQA)(1).observation_space
GOOD = {"image": nn.Flatten(2), "question": nn.Embedding(97, 4)}


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (
            lambda: load_embedding("shape", SPACE),
            ValueError,
            "embedding must be 'shapes' or 'joint:DIR', got 'shape'; pretrained models",
        ),
        (
            lambda: load_embedding(3, SPACE),
            TypeError,
            "embedding must be 'shapes', 'joint:DIR', an Extractor",
        ),
        (lambda: load_embedding(GOOD, SPACE, "mean"), ValueError, "output must be one of 'pooled', 'tokens'"),
        (lambda: load_embedding(GOOD, SPACE["image"]), TypeError, "must be a Dict space of .*, got Box"),
        (
            lambda: load_embedding({"image": nn.Flatten(2)}, SPACE),
            ValueError,
            "embedding encodes image, the obs",
        ),
        (
            lambda: load_embedding({**GOOD, "image": nn.Flatten()}, SPACE),
            ValueError,
            r"must give \(B, T, d\), got",
        ),
        (
            lambda: load_embedding(load_embedding(GOOD, SPACE), SPACE, "tokens"),
            ValueError,
            "must be 'pooled' as in",
        ),
        (
            lambda: load_embedding(
                load_embedding(GOOD, SPACE), task_class(VQA)(1, image_size=32).observation_space
            ),
            ValueError,
            "embedding was made for",
        ),
        (lambda: load_embedding(GOOD, SPACE, precision="int8"), ValueError, "precision must be one of"),
        (lambda: load_embedding(GOOD, SPACE).encode({"sound": torch.zeros(1)}), ValueError, "got 'sound'"),
        (lambda: load_embedding(GOOD, SPACE).encode({"image": np.zeros(1)}), TypeError, "batched tensor"),
        (
            lambda: load_embedding(GOOD, SPACE)({"image": torch.zeros(1, 64, 64, 3)}),
            ValueError,
            "lacks 'question'",
        ),
        (
            lambda: load_embedding("shapes", spaces.Dict({"x": spaces.Box(0, 9, (4,), np.int64)})),
            ValueError,
            "97 words only, 'x' has 10",
        ),
        (
            lambda: load_embedding("shapes", spaces.Dict({"x": spaces.Box(0, 9, (4,), np.float32)})),
            ValueError,
            "'x' is vector",
        ),
        (lambda: EmbedObservation(gym.make(VQA, text="string"), GOOD), ValueError, "text='ids'"),
        (lambda: EmbedObservation(gym.make(VQA), GOOD, device="tpu"), ValueError, "device must be 'auto'"),
        (lambda: EmbedObservation(gym.make(VQA), GOOD, device=3), TypeError, "device must be 'auto'"),
        (lambda: EmbedObservation(gym.make(VQA), GOOD, cache=3), TypeError, "cache must be None"),
        (lambda: EmbedObservation(gym.make(VQA), GOOD, cache=""), ValueError, "must name a folder, got ''"),
        (lambda: EmbedObservation(gym.make("CartPole-v1"), GOOD), TypeError, "must be a Dict space of .*Box"),
        (
            lambda: EmbedObservation(gym.make(VQA), {**GOOD, "image": "shapes"}),
            TypeError,
            "'image'.* must be a torch module, got 'shapes'; .*'shapes' alone embeds all",
        ),
        (
            lambda: load_embedding(extractor_of(VQA), task_class(VQA)(1, image_size=96).observation_space),
            ValueError,
            r"'image' of shape \(64, 64, 3\), these have \(96, 96, 3\)",
        ),
        (
            lambda: load_embedding(
                extractor_of(VQA),
                spaces.Dict(
                    {**SPACE.spaces, "question": spaces.Box(0, 9, SPACE["question"].shape, np.int64)}
                ),
            ),
            ValueError,
            "'question' of 97 words, these have 10",
        ),
        (lambda: probe_report("shapes", VQA), TypeError, "load_embedding.*got 'shapes'"),
        (lambda: cost("shapes", SPACE), TypeError, "load_embedding.*got 'shapes'"),
        (
            lambda: EmbedObservation(EmbedObservation(gym.make(VQA), GOOD), GOOD),
            TypeError,
            "embedded already can't be embedded again",
        ),
        (
            lambda: EmbedObservation(
                gym.make(VQA), {**GOOD, "image": Wrong(torch.tensor([[[1.0, np.nan]]]))}
            ).reset(),
            ValueError,
            "encoder of 'image' gave a number that isn't finite in row 0",
        ),
    ],
)
def test_errors(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_an_extractor_whose_pictures_are_channels_first_embeds_the_environments():
    turned = {**SPACE.spaces, "image": spaces.Box(0, 255, (3, 64, 64), np.uint8)}
    torch.manual_seed(0)
    embedding = load_embedding(Extractor(spaces.Dict(turned), width=16, features_dim=8), SPACE)
    assert embedding.fingerprint == load_embedding(extractor_of(VQA), SPACE).fingerprint


def test_sound_that_is_no_number_is_refused_with_its_row():
    space = spaces.Dict({"audio": task_class(MATCHING)(1).observation_space["audio"]})
    sound = torch.zeros(3, *space["audio"].shape)
    sound[1, 5] = np.nan
    for output in ("pooled", "tokens"):
        with pytest.raises(ValueError, match="encoder of 'audio' gave a number that isn't finite in row 1"):
            load_embedding("shapes", space, output).encode({"audio": sound})


def test_oracle_and_description_come_from_the_native_environment():
    envs, plain = vector(VQA, 3), gym.make_vec(VQA, num_envs=3)
    envs.reset(seed=4)
    plain.reset(seed=4)
    np.testing.assert_array_equal(envs.oracle_actions(), plain.oracle_actions())
    assert envs.describe(1) == plain.describe(1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_on_a_machine_without_one():
    with pytest.raises(ValueError, match="finds no CUDA device"):
        EmbedObservation(gym.make(VQA), GOOD, device="cuda")
    assert embedding_module.resolve_device("auto") == "cpu"


# Agents on embedded observations.


@every_id
@every_output
def test_stable_baselines_and_evaluation(id, output):
    extractor = extractor_of(id)

    def wrap(envs):
        return VectorEmbedObservation(envs, extractor, output)

    env = make_vec_env(id, 4, wrap=wrap)
    pooled = output == "pooled"
    model = PPO(
        "MlpPolicy" if pooled else "MultiInputPolicy", env, n_steps=4, batch_size=16, n_epochs=1, seed=0
    )  # fmt: skip
    model.learn(16)
    result = evaluate(model, id, episodes=20, num_envs=4, wrap=wrap)
    assert 0 <= result.mean_return <= 1 and result.returns.shape == (20,)
    assert evaluate("oracle", id, episodes=20, num_envs=4, wrap=wrap).success.value == 1.0
    assert env.env_method("describe", indices=[1])[0] and len(env.env_method("oracle_action")) == 4
    assert env.get_attr("difficulty") == [0] * 4 and env.get_attr("encoder")[0].embedding.output == output
    env.step(np.array(env.env_method("oracle_action")))


def test_terminal_observations_are_embedded():
    env = make_vec_env(VQA, 3, seed=0, wrap=lambda envs: VectorEmbedObservation(envs, extractor_of(VQA)))
    before = env.reset()
    _, _, ended, infos = env.step(np.zeros(3, np.int64))
    assert ended.all()
    np.testing.assert_array_equal(np.stack([info["terminal_observation"] for info in infos]), before)


# Perturbations.


def batch(id, n=32, **kwargs):
    envs = gym.make_vec(id, num_envs=n, **kwargs)
    return envs.reset(seed=0)[0], envs


FITTING = [(id, name, key) for id, name, key in (
    (VQA, "noise", "image"), (MATCHING, "noise", "images"), (CAPTIONING, "brightness", "image"),
    (MATCHING, "pitch", "audio"), (VQA, "word_dropout", "question"), (VQA, "drop", "image"),
    (VQA, "drop", "question"), (MATCHING, "drop", "audio"), (VQA, "shuffle", "question"),
    (MATCHING, "shuffle", "audio"), (CAPTIONING, "swap", "image"), (VQA, "swap", "question"),
)]  # fmt: skip


@pytest.mark.parametrize(("id", "name", "key"), FITTING)
def test_a_perturbation_changes_one_observation_and_repeats(id, name, key):
    raw, _ = batch(id)
    kept = copy.deepcopy(raw)
    one, again = (perturb(name, raw, key, np.random.default_rng(1)) for _ in range(2))
    assert same(raw, kept) and same(one, again)
    assert not same(one[key], raw[key]) and all(one[k] is raw[k] for k in raw if k != key)
    assert one[key].dtype == raw[key].dtype and one[key].shape == raw[key].shape
    assert gym.make_vec(id, num_envs=32).observation_space.contains(one)
    assert same(perturb(name, raw, key, np.random.default_rng(1), 0.0)[key], raw[key])
    half = perturb(name, raw, key, np.random.default_rng(1), PERTURBATIONS[name].highest / 4)
    assert (
        np.abs(half[key].astype(float) - raw[key]).sum()
        < np.abs(
            perturb(name, raw, key, np.random.default_rng(1), PERTURBATIONS[name].highest)[key].astype(float)
            - raw[key]
        ).sum()
    )


def test_noise_and_brightness_are_as_strong_as_they_say():
    grey = {"image": np.full((64, 32, 32, 3), 128, np.uint8)}
    noisy = perturb("noise", grey, "image", np.random.default_rng(0), 0.05)["image"].astype(float)
    assert noisy.mean() == pytest.approx(128, abs=0.5) and noisy.std() == pytest.approx(0.05 * 255, rel=0.05)
    bright = perturb("brightness", grey, "image", np.random.default_rng(0), 0.5)["image"]
    levels = bright[:, 0, 0, 0].astype(float) / 128
    assert (bright == bright[:, :1, :1, :1]).all()
    assert levels.min() >= 0.49 and levels.max() <= 1.51 and levels.std() > 0.2


def test_pitch_shifts_the_frequency():
    time = np.arange(16_000) / 16_000
    tone = np.sin(2 * np.pi * 440 * time).astype(np.float32)[None].repeat(8, 0)
    factors = 2.0 ** (np.random.default_rng(3).uniform(-12, 12, 8) / 12)
    shifted = perturb("pitch", {"audio": tone}, "audio", np.random.default_rng(3), 12)["audio"]
    for sound, factor in zip(shifted, factors, strict=True):
        end = int(16_000 / max(factor, 1)) - 1
        peak = np.argmax(np.abs(np.fft.rfft(sound[:end]))) * 16_000 / end
        assert peak == pytest.approx(440 * factor, rel=0.01)
        assert not sound[end + 2 :].any()


def test_word_dropout_leaves_padding_and_start():
    raw, _ = batch(CAPTIONING)
    raw["caption"][:, 1:4] = 7
    words = perturb("word_dropout", raw, "caption", np.random.default_rng(0), 1.0)["caption"]
    assert (words[:, 0] == START).all() and (words[:, 1:4] == UNKNOWN).all() and (words[:, 4:] == PAD).all()
    some = perturb("word_dropout", raw, "caption", np.random.default_rng(0), 0.3)["caption"]
    assert 0.1 < (some[:, 1:4] == UNKNOWN).mean() < 0.5


def test_dropped_shuffled_and_swapped_rows():
    raw, _ = batch(VQA, 64)
    assert not perturb("drop", raw, "image", np.random.default_rng(0))["image"].any()
    half = perturb("drop", raw, "image", np.random.default_rng(0), 0.5)["image"]
    assert 15 < sum(not picture.any() for picture in half) < 50

    def rows(array):
        return sorted(row.tobytes() for row in array)

    shuffled = perturb("shuffle", raw, "image", np.random.default_rng(0))["image"]
    assert rows(shuffled) == rows(raw["image"])
    labels = np.arange(64) % 3
    swapped = perturb("swap", raw, "image", np.random.default_rng(0), labels=labels)["image"]
    places = {picture.tobytes(): i for i, picture in enumerate(raw["image"])}
    came_from = np.array([places[picture.tobytes()] for picture in swapped])
    assert rows(swapped) == rows(raw["image"]) and (labels[came_from] != labels).all()
    with pytest.raises(ValueError, match="40 of 64 are alike"):
        perturb("swap", raw, "image", np.random.default_rng(0), labels=np.arange(64) < 40)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (("blur", "image"), ValueError, "name must be one of 'noise'"),
        (("noise", "sound"), ValueError, "modality must be one of 'image', 'question'"),
        (("noise", "question"), ValueError, "'noise' perturbs pictures, but 'question' is int64"),
        (("pitch", "image"), ValueError, "perturbs sound"),
        (("noise", "image", 1.5), ValueError, "strength must be from 0 to 1"),
        (("noise", "image", "much"), TypeError, "strength"),
        (("swap", "image", 1.0, [1, 2]), ValueError, "labels must have shape"),
    ],
)
def test_perturbation_errors(arguments, error, says):
    raw, _ = batch(VQA, 4)
    name, key, *rest = arguments
    with pytest.raises(error, match=says):
        perturb(name, raw, key, np.random.default_rng(0), *rest)


def test_perturbed_environment_below_an_embedding():
    extractor = extractor_of(VQA)

    def made():
        noisy = VectorPerturbObservation(gym.make_vec(VQA, num_envs=6), "noise", "image", 0.3, seed=4)
        return noisy, VectorEmbedObservation(noisy, extractor)

    (_, one), (_, other) = made(), made()
    np.testing.assert_array_equal(one.reset(seed=0)[0], other.reset(seed=0)[0])
    first = one.step(np.zeros(6, int))[0]
    np.testing.assert_array_equal(first, other.step(np.zeros(6, int))[0])
    clean = vector(VQA, 6, extractor)
    clean.reset(seed=0)
    assert np.abs(clean.step(np.zeros(6, int))[0] - first).max() > 1e-3
    one.reset(seed=0)
    np.testing.assert_array_equal(one.step(np.zeros(6, int))[0], first)  # from the start with a seed


@pytest.mark.parametrize("id", [VQA, MATCHING])
def test_swapped_rows_contradict(id):
    key = {VQA: "image", MATCHING: "audio"}[id]
    # At difficulty 1 noise makes every picture and sound its own.
    plain = gym.make_vec(id, num_envs=64, difficulty=1)
    envs = VectorPerturbObservation(gym.make_vec(id, num_envs=64, difficulty=1), "swap", key)
    raw, seen = plain.reset(seed=0)[0], envs.reset(seed=0)[0]
    answers = plain.oracle_actions()
    places = {row.tobytes(): i for i, row in enumerate(raw[key])}
    came_from = np.array([places[row.tobytes()] for row in seen[key]])
    assert (answers[came_from] != answers).all()


def test_evaluation_under_perturbation():
    class Brightness:
        """Answers by how bright the picture is: no answer is right by chance of the noise."""

        def predict(self, observation, state=None, episode_start=None, deterministic=False):
            self.seen = observation["image"].mean()
            return np.zeros(len(observation["image"]), np.int64), None

    agent = Brightness()
    clean = evaluate(agent, VQA, episodes=32, num_envs=32)
    before = agent.seen
    dropped = evaluate(
        agent,
        VQA,
        episodes=32,
        num_envs=32,
        wrap=lambda envs: VectorPerturbObservation(envs, "drop", "image"),
    )
    assert before > 0 and agent.seen == 0
    assert clean.returns.tolist() == dropped.returns.tolist()  # the same episodes


def test_pools_of_different_tasks_have_different_names():
    names = [
        frozenset(pool_names(gym.make_vec(MATCHING, num_envs=2, pool_size=4, **kwargs).task).values())
        for kwargs in ({}, {"candidates": 3}, {"seconds": 0.5}, {"difficulty": 1}, {"split": "val"})
    ]
    assert len(frozenset().union(*names)) == sum(map(len, names))


def test_an_environment_that_reuses_its_buffer_is_embedded_anew():
    class Counter(gym.Env):
        observation_space = gym.spaces.Dict({"x": gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)})
        action_space = gym.spaces.Discrete(2)
        buffer = np.zeros(4, np.float32)

        def reset(self, *, seed=None, options=None):
            return {"x": self.buffer}, {}

        def step(self, action):
            self.buffer += 1
            return {"x": self.buffer}, 0.0, False, False, {}

    class Pass(torch.nn.Module):
        def forward(self, x):
            return x.unsqueeze(1)

    env = EmbedObservation(Counter(), {"x": Pass()})
    assert (env.reset()[0] == 0).all()
    assert (env.step(0)[0] == 1).all()
