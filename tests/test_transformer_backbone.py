"""Language models of Hugging Face in the trunk's place of the transformer policy."""

import shutil
import sys

import pytest
import torch
import transformers as hf
from mmenvs_agents.transformer.agent import TransformerAgent
from mmenvs_agents.transformer.config import Backbone
from typer.testing import CliRunner

from mmenvs.cli import app
from tests.test_transformer import ACTIONS, LAYOUTS, SPACE, TINY, TransformerPolicy, make_episodes, played
from tests.tiny_models import SMALL as SIZE
from tests.tiny_transformer import CAPTIONING, VQA, make_agent

MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE, vocab_size=50, num_key_value_heads=1)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=256)
    ),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZE, vocab_size=50, num_key_value_heads=2)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**SIZE, vocab_size=50, num_key_value_heads=1, head_dim=24)
    ),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=48,
            word_embed_proj_dim=32, max_position_embeddings=256,
        )
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of the models, which are built when they are asked for."""
    base = tmp_path_factory.mktemp("models")

    def folder(name):
        if not (base / name).exists():
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = MODELS[name]()
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        torch.nn.init.normal_(parameter, std=0.1)
            model.save_pretrained(base / name)
        return str(base / name)

    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_steps_with_a_cache_equal_the_whole_pass(folders, name, layout):
    torch.manual_seed(0)
    policy = TransformerPolicy(
        SPACE, ACTIONS["discrete"], TINY, LAYOUTS[layout], ("said",), backbone=Backbone(folders(name))
    )
    torch.nn.init.normal_(policy.actor.out.weight, std=0.3)
    torch.nn.init.normal_(policy.critic.weight, std=0.3)
    episodes = make_episodes(policy, [5, 1, 3, 5])
    described, values = policy(episodes)
    stepped, stepped_values = played(policy, episodes)
    valid = episodes.valid
    whole, cached = (policy.actor.log_prob(d, episodes.actions)[valid] for d in (described, stepped))
    torch.testing.assert_close(whole, cached, atol=1e-5, rtol=0)
    torch.testing.assert_close(values[valid], stepped_values[valid], atol=1e-5, rtol=0)
    assert values[valid].std() > 0.05
    for row, length in enumerate([5, 1, 3, 5]):  # padding doesn't leak
        alone = policy(episodes.take(torch.tensor([row])))[1]
        torch.testing.assert_close(alone[0], values[row, :length], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "lora"), [("llama", 0), ("gpt2", 4), ("qwen2", 4)])
def test_what_trains_and_going_on_bit_by_bit(folders, tmp_path, name, lora):
    copy = tmp_path / "model"
    shutil.copytree(folders(name), copy)
    straight, first = (make_agent(CAPTIONING, backbone=str(copy), lora=lora) for _ in range(2))
    before = {key: value.clone() for key, value in straight.policy.state_dict().items()}
    straight.learn(200)
    first.learn(200, lambda agent: agent.iteration < 1)
    first.save(tmp_path / "agent")
    shutil.rmtree(copy)  # a checkpoint is whole
    second = TransformerAgent.load(tmp_path / "agent", device="cpu")
    assert second.settings.backbone.lora == lora and second.settings.backbone.source == str(copy)
    second.learn(200)
    after = second.policy.state_dict()
    for key, value in straight.policy.state_dict().items():
        assert torch.equal(value, after[key]), key
    trained = {key for key, value in after.items() if not torch.equal(value, before[key])}
    inside = {key for key in trained if key.startswith("backbone.model.")}
    assert any(key.startswith("extractor") for key in trained) and inside
    assert all("lora_" in key for key in inside) == bool(lora)


def test_it_starts_from_the_model_s_weights_and_learns_slowly(folders):
    agent = make_agent(VQA, backbone=folders("llama"))
    own = hf.AutoModelForCausalLM.from_pretrained(folders("llama")).model.state_dict()
    held = agent.policy.backbone.model.state_dict()
    assert all(torch.equal(held[key], value) for key, value in own.items() if key != "embed_tokens.weight")
    rms = own["embed_tokens.weight"].square().mean().sqrt()
    torch.testing.assert_close(agent.policy.backbone.enter.weight.mean(), rms)
    agent.learn(32)
    moved = (
        agent.policy.backbone.model.state_dict()["layers.0.mlp.up_proj.weight"]
        - own["layers.0.mlp.up_proj.weight"]
    )
    assert 0 < moved.abs().max() < 3 * 2 * 0.02 * 1e-3  # two steps of Adam


def test_on_the_command_line(folders, tmp_path, monkeypatch):
    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})

    out = tmp_path / "vqa"
    common = ("train", VQA, "--agent", "transformer", "--num-envs", 2, "--device", "cpu", "--out", out)
    shutil.copytree(folders("llama"), tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    given = ("--backbone", "model", "--lora", 2)
    assert "after 32 steps" in run(*common, "--steps", 32, *given).output
    assert "after 64 steps" in run(*common, "--steps", 64, "--resume", *given).output
    shutil.rmtree(tmp_path / "model")  # the agent needs it no more
    assert "after 96 steps" in run(*common, "--steps", 96, "--resume", *given).output
    given = ("--backbone", folders("llama"), "--lora", 2)
    assert "lora of the agent" in run(*common, "--steps", 128, "--resume", "--lora", 8).output
    for options, message in (
        ((*given, "--size", "small"), "size is the backbone's own"),
        (("--lora", 2), "lora goes with the name or folder of a backbone"),
        (("--backbone", "no/such/folder"), "neither a folder nor a name"),
    ):
        result = run(*common[:-1], tmp_path / "other", *options)
        assert result.exit_code == 2 and message in result.output
    result = run("train", VQA, "--backbone", folders("llama"), "--out", tmp_path / "other")
    assert result.exit_code == 2 and "backbone is of --agent transformer" in result.output


def test_models_that_do_not_fit(folders, tmp_path, monkeypatch):
    hf.ViTModel(hf.ViTConfig(**SIZE, image_size=32, patch_size=8)).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match=r"must be a causal language model, .* of the type 'vit'"):
        make_agent(backbone=str(tmp_path / "vit"))
    # ALiBi counts positions by itself, and a recurrent model has no keys to keep.
    bloom = hf.BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=2)
    mamba = hf.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=4)
    for kind, config in (("bloom", bloom), ("mamba", mamba)):
        hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / kind)
        with pytest.raises(ValueError, match=rf"\({kind}\) can't stand in a policy"):
            make_agent(backbone=str(tmp_path / kind))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"lacks config\.json, model\.safetensors"):
        make_agent(backbone=str(tmp_path / "empty"))
    config = hf.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=20)
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path / "short")
    with pytest.raises(ValueError, match="reads 20 tokens, an episode has"):
        make_agent(backbone=str(tmp_path / "short")).learn(10)
    with pytest.raises(ValueError, match="lora must be from 0"):
        make_agent(backbone=folders("llama"), lora=-1)
    with pytest.raises(TypeError, match="backbone must be"):
        make_agent(backbone=7)
    with pytest.raises(ValueError, match="lora goes with"):
        make_agent(lora=4)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'mmenvs\[lora\]'"):
        make_agent(backbone=folders("llama"), lora=4)
