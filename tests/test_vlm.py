"""Vision-language models: what is said to them, how their answers are read and scored, and that they are trained."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from typer.testing import CliRunner

pytest.importorskip("trl", reason="fine-tuning needs TRL: pip install 'mmenvs[vlm]'")

import trl
from mmenvs_agents import vlm
from mmenvs_agents.evaluation import evaluate
from mmenvs_agents.vlm import SETTINGS, Unanswered, VLMPolicy, VLMSettings, load, zero_shot
from mmenvs_agents.vlm_finetuning import finetune, pairs

from mmenvs.cli import app
from mmenvs.integrations.trl import AnswerReader, CaptionReader, TextEpisodes, fold
from mmenvs.registry import SPECS, register
from mmenvs.tasks.vqa import VQA as VQATask
from mmenvs.text import END, SPECIAL, UNKNOWN
from mmenvs.world.questions import ANSWERS
from mmenvs.world.words import VOCABULARY
from tests import photos, tiny_models

VQA, CAPTIONING, MATCHING = "MMRL/VQA-v0", "MMRL/Captioning-v0", "MMRL/AudioVisualMatching-v0"
DOCS = Path(__file__).parent.parent / "docs" / "vlm.md"
WORDS = [word for word in VOCABULARY.words if word not in SPECIAL and word not in "?.,"]
# TRL still uses the old name of an argument of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.vlms(tmp_path_factory.mktemp("vlms"))


def little(model: str, **changes) -> VLMSettings:
    """Settings of a training of some seconds; with one token, an untrained model often hits an answer."""
    settings = VLMSettings(
        VQA, model, lora=4, steps=3, batch=8, generations=4, prompt="{question}", lowest=-1.0
    )
    return replace(settings, max_tokens=1, learning_rate=1e-2, **changes)


# Reading


edges = st.text(" .,;:!?\"'`*_()[]\n\t“”…", max_size=4)


@examples(deadline=None, max_examples=60)
@given(st.sampled_from(range(len(ANSWERS))), edges, edges, st.sampled_from([str.upper, str.title, str]))
def test_an_answer_is_read_whatever_its_case_and_what_stands_around_it(action, before, after, write):
    parsed = AnswerReader(ANSWERS).parse(before + write(ANSWERS[action]) + after)
    assert parsed.actions == (action,)
    assert parsed.unparsable == 0.0


@examples(deadline=None, max_examples=60)
@given(st.text() | st.lists(st.sampled_from([*ANSWERS, "or", "it is"]), max_size=4).map(" ".join))
def test_nothing_but_one_answer_is_read(text):
    parsed = AnswerReader(ANSWERS).parse(text)
    assert parsed.actions == tuple(i for i, answer in enumerate(ANSWERS) if fold(text) == answer)
    assert parsed.unparsable == float(not parsed.actions)


@pytest.mark.parametrize(
    "text", ["", "dark red", "it is red", "red or blue", "red blue", "redd", "re d", "-red", "3"]
)
def test_what_is_almost_an_answer_is_none(text):
    assert AnswerReader(ANSWERS).parse(text).actions == ()


def test_answers_that_fold_alike_are_not_guessed():
    reader = AnswerReader(["Red", "red.", "blue"])
    assert reader.parse("red").actions == ()
    assert reader.parse("Blue!").actions == (2,)


@examples(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from([*WORDS, "zebra", "<end>", "<pad>", "2"]), max_size=12),
    st.sampled_from(["", ".", ", "]),
)
def test_captions_are_read_word_by_word(words, sign):
    parsed = CaptionReader(VOCABULARY).parse((sign + " ").join(words).upper() + sign)
    known = [word in WORDS for word in words]
    if not any(known):
        assert parsed.actions == ()
        assert parsed.unparsable == 1.0
        return
    ids = [VOCABULARY.id(word) if old else UNKNOWN for word, old in zip(words, known, strict=True)]
    assert parsed.actions == (*ids, END)
    assert parsed.unparsable == pytest.approx(1 - np.mean(known))


@examples(deadline=None, max_examples=60)
@given(st.text())
def test_any_text_is_a_caption_the_environment_takes(text):
    parsed = CaptionReader(VOCABULARY).parse(text)
    assert all(0 <= action < len(VOCABULARY) for action in parsed.actions)
    assert list(parsed.actions).count(END) == bool(parsed.actions)


# Episodes and scores


@pytest.mark.parametrize("id", [VQA, CAPTIONING])
def test_a_seed_names_the_episode_of_the_environment(id):
    episodes = TextEpisodes(id, {"difficulty": 2, "split": "val"})
    seeds = [7, 7, 2**40, 0]
    observations = episodes.observe(seeds)
    env = gym.make(id, difficulty=2, split="val")
    for i, seed in enumerate(seeds):
        observation, _ = env.reset(seed=seed)
        for key, value in observation.items():
            np.testing.assert_array_equal(observations[key][i], value)


@pytest.mark.parametrize("id", [VQA, CAPTIONING])
def test_rows_hold_prompt_picture_and_seed(id):
    episodes = TextEpisodes(id)
    rows = episodes.dataset([3, 4, 3], completion=["a", "b", "c"])
    assert [row["seed"] for row in rows] == [3, 4, 3]
    first = rows[0]
    content = first["prompt"][0]["content"]
    assert [part["type"] for part in content] == ["image", "text"]
    assert first["image"].size == (64, 64)
    assert first["completion"] == [{"role": "assistant", "content": "a"}]
    assert rows[2]["prompt"] == first["prompt"]
    assert rows[2]["image"].tobytes() == first["image"].tobytes() != rows[1]["image"].tobytes()
    env = gym.make(id, text="string")
    observation, _ = env.reset(seed=3)
    if id == VQA:
        assert content[1]["text"].startswith(observation["question"])
        assert "striped, dotted." in content[1]["text"]


@pytest.mark.parametrize("id", [VQA, CAPTIONING])
@pytest.mark.parametrize("difficulty", [0, 3])
def test_the_oracle_gets_1_the_wrong_0_and_the_unreadable_the_lowest(id, difficulty):
    episodes = TextEpisodes(id, {"difficulty": difficulty}, lowest=-0.5)
    seeds = list(range(20))
    right = episodes.oracle(seeds)
    np.testing.assert_array_equal(episodes.score(seeds, right).rewards, 1.0)
    assert episodes.score(seeds, right).successes.all()
    wrong = ["left"] * 20 if id == CAPTIONING else ["yes" if text != "yes" else "no" for text in right]
    scored = episodes.score(seeds, wrong)
    np.testing.assert_array_equal(scored.rewards, 0.0)
    np.testing.assert_array_equal(scored.unparsable, 0.0)
    scored = episodes.score(seeds, ["", "!!", "zebra", "<end>", "I am not sure."] * 4)
    np.testing.assert_array_equal(scored.rewards, -0.5)
    np.testing.assert_array_equal(scored.unparsable, 1.0)
    assert not scored.successes.any()
    assert TextEpisodes(id).score([0], [""]).rewards == SPECS[id].min_score


def test_captions_score_as_in_the_environment():
    episodes = TextEpisodes(CAPTIONING, {"difficulty": 1})
    seeds = list(range(12))
    right = episodes.oracle(seeds)
    texts = [text.replace("red", "blue") if i % 2 else text + " and a zebra" for i, text in enumerate(right)]
    texts[3] = " ".join(["a", *right[3].split()] * 4)  # beyond the limit
    scored = episodes.score(seeds, texts)
    env = gym.make(CAPTIONING, difficulty=1)
    for seed, text, reward, success in zip(seeds, texts, scored.rewards, scored.successes, strict=True):
        env.reset(seed=seed)
        ended, total, words = False, 0.0, [*text.split(), "<end>"]
        while not ended:
            word = words.pop(0)
            action = VOCABULARY.id(word) if word in VOCABULARY else UNKNOWN
            _, gain, ended, _, info = env.step(action)
            total += gain
        assert reward == total
        assert success == info["is_success"]


@pytest.mark.parametrize(("id", "source"), [(VQA, "vqav2"), (CAPTIONING, "coco")])
def test_photographs_are_asked_about_and_scored(folder, tmp_path, id, source):
    data = f"{source}:{photos.small(tmp_path / 'data')}"
    settings = little(folder(), id=id, algo="sft", env_kwargs={"source": data})
    episodes, seeds = settings.episodes(), range(8)
    best = episodes.score(seeds, episodes.oracle(seeds)).rewards
    assert (best > episodes.score(seeds, ["n"] * 8).rewards).all()
    assert len(episodes.dataset(seeds)) == 8
    finetune(replace(settings, steps=1), tmp_path / "out", "cpu")
    policy = load(tmp_path / "out", "cpu")
    assert policy.settings.env_kwargs == {"source": data}
    assert policy.episodes.options == episodes.options


def test_the_reward_function_scores_conversations_and_logs_what_it_could_not_read():
    episodes, logged = TextEpisodes(VQA), {}
    right = episodes.oracle([5, 5, 6, 6])
    texts = [right[0], "no idea", right[2].upper() + ".", "who knows"]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    rewards = episodes.reward(completions, seed=[5, 5, 6, 6], log_metric=logged.__setitem__, prompts=None)
    assert rewards == [1.0, 0.0, 1.0, 0.0]
    assert logged == {"success": 0.5, "unparsable": 0.5}
    blocks = [[{"role": "assistant", "content": [{"type": "text", "text": right[0]}]}]]
    assert episodes.reward(blocks, seed=[5]) == episodes.reward([right[0]], seed=[5]) == [1.0]


def test_a_caption_in_turns():
    episodes = TextEpisodes(CAPTIONING)
    tools = episodes.environment()
    with pytest.raises(ValueError, match="ended or not begun"):
        tools.say("a")
    for seed in (4, 9):
        assert tools.reset(seed=seed, prompt="unused") is None
        first, _, rest = episodes.oracle([seed])[0].partition(" ")
        assert tools.say(first) == first
        assert tools.get_reward() == 0.0
        tools.say(rest)
        assert tools.finish() == f"{first} {rest}"
        assert tools.get_reward() == 1.0
        with pytest.raises(ValueError, match="ended or not begun"):
            tools.finish()
    with pytest.raises(ValueError, match=r"VQA-v0' has one step"):
        TextEpisodes(VQA).environment()


class Blind(VQATask):
    """VQA without a picture."""

    def __init__(self, num_envs, **kwargs):
        super().__init__(num_envs, **kwargs)
        del self.observation_space.spaces["image"]


class Wordless(VQATask):
    """VQA whose actions have no names."""

    def __init__(self, num_envs, **kwargs):
        super().__init__(num_envs, **kwargs)
        self.answers = ()


@pytest.mark.parametrize(
    ("id", "task", "message"),
    [
        (MATCHING, None, f"{MATCHING}' has sound, which vision-language models don't take"),
        ("Test/Blind-v0", Blind, "Test/Blind-v0' must have one picture"),
        ("Test/Wordless-v0", Wordless, "Test/Wordless-v0' isn't played in words"),
    ],
)
def test_environments_that_are_not_for_such_models_are_refused(id, task, message):
    if task is not None and id not in SPECS:
        register(id, task)
    try:
        with pytest.raises(ValueError, match=re.escape(message)):
            TextEpisodes(id)
    finally:
        if task is not None:
            del SPECS[id]
            del gym.registry[id]


def test_wrong_arguments_are_named():
    episodes = TextEpisodes(VQA)
    with pytest.raises(ValueError, match="texts must be as many as seeds, got 1 and 2"):
        episodes.score([1, 2], ["yes"])
    with pytest.raises(ValueError, match="seed must be from 0"):
        episodes.observe([-1])
    with pytest.raises(ValueError, match=r"prompt must have no \{\} but"):
        TextEpisodes(VQA, prompt="{query}")
    with pytest.raises(TypeError, match="colour"):
        TextEpisodes(VQA, {"colour": 1})
    with pytest.raises(gym.error.NameNotFound):
        TextEpisodes("MMRL/VQA-v9")


# Playing


@pytest.mark.parametrize("name", ["idefics3", "llava"])
def test_ids_and_strings_single_and_batched_observations_give_the_same_actions(folder, name):
    policy = zero_shot(little(folder(name)), "cpu")
    ids, _ = gym.make_vec(VQA, num_envs=6).reset(seed=0)
    strings, _ = gym.make_vec(VQA, num_envs=6, text="string").reset(seed=0)
    actions, _ = policy.predict(ids, deterministic=True)
    assert actions.shape == (6,)
    assert actions.dtype == np.int64
    np.testing.assert_array_equal(actions, policy.predict(strings, deterministic=True)[0])
    policy.batch_size = 2
    np.testing.assert_array_equal(actions, policy.predict(ids, deterministic=True)[0])
    single, _ = gym.make(VQA).reset(seed=2)
    assert policy.predict(single, deterministic=True)[0] == actions[2]
    assert policy.answers == 19


class Scripted(VLMPolicy):
    """Says what it is told to, then nothing."""

    def generate(self, conversations, pictures, deterministic=True):
        return [self.script.pop(0) if self.script else "" for _ in conversations]


def test_an_unreadable_answer_never_succeeds(folder):
    policy = zero_shot(little(folder()), "cpu")
    policy.__class__, policy.script = Scripted, ["no idea"] * 100
    result = evaluate(policy, VQA, episodes=100)
    assert policy.unparsable == policy.answers >= 100
    assert result.success.value == 0.0
    assert result.mean_return == -1.0
    envs = Unanswered(gym.make_vec(VQA, num_envs=2), lowest=-1.0)
    envs.reset(seed=0)
    right = envs.unwrapped.oracle_actions()
    _, rewards, _, _, infos = envs.step([right[0], -1])
    assert rewards.tolist() == [1.0, -1.0]
    assert infos["final_info"]["is_success"].tolist() == [True, False]


def test_captions_are_said_word_by_word(folder):
    settings = little(folder(), id=CAPTIONING, env_kwargs={"difficulty": 1})
    policy = zero_shot(settings, "cpu")
    seeds = list(range(100, 104))
    texts = [policy.episodes.oracle([seed])[0] for seed in seeds]
    texts[1], texts[2] = "zebra", texts[2] + " and a large red circle"
    test = TextEpisodes(CAPTIONING, {"difficulty": 1, "split": "test"})
    policy.__class__, policy.script = Scripted, list(texts)
    result = evaluate(policy, CAPTIONING, episodes=4, env_kwargs={"difficulty": 1}, seed=100)
    np.testing.assert_allclose(result.returns, np.maximum(test.score(seeds, texts).rewards, 0))
    assert policy.answers - policy.unparsable == 3


# Training


@pytest.mark.parametrize("algo", vlm.ALGOS)
@pytest.mark.parametrize("name", tiny_models.VLMS)
def test_three_steps_of_every_algorithm(folder, tmp_path, name, algo):
    source, lines = folder(name), []
    settings = little(source, algo=algo)
    assert finetune(settings, tmp_path, "cpu", lines.append)
    assert any(line.startswith("3 / 3: loss") for line in lines)
    before = transformers.AutoModelForImageTextToText.from_pretrained(source).state_dict()
    policy = load(tmp_path, "cpu")
    after = policy.model.state_dict()
    assert policy.settings == settings
    assert policy.num_timesteps == 3
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert any("self_attn.q_proj.weight" in key for key in changed)
    # Adapters stand beside linear layers only.
    assert not any(part in key for key in changed for part in ("embed", "norm", "bias", "lm_head"))
    log = json.loads((tmp_path / "log.json").read_text())
    assert [row["step"] for row in log if "loss" in row] == [1, 2, 3]
    if algo in ("grpo", "rloo", "ppo"):
        assert all(0 < row["unparsable"] < 1 for row in log if "loss" in row)
    assert not [path.name for path in tmp_path.iterdir() if path.is_dir() or path.suffix in (".bin", ".pt")]
    assert evaluate(policy, VQA, episodes=8).episodes == 8


@pytest.mark.parametrize("algo", ["rloo", "dpo"])
def test_without_adapters_all_weights_change(folder, tmp_path, algo):
    """With these two a second model is the reference."""
    finetune(little(folder(), algo=algo, lora=0, kl=0.1), tmp_path, "cpu")
    before = transformers.AutoModelForImageTextToText.from_pretrained(folder()).state_dict()
    after = load(tmp_path, "cpu").model.state_dict()
    assert any("embed_tokens" in key and not torch.equal(after[key], before[key]) for key in after)


@pytest.mark.parametrize("algo", ["grpo", "rloo"])
def test_reinforcement_raises_the_reward(folder, tmp_path, algo):
    """Nearly every answer can be read after 15 updates, of which a fresh model gives few."""
    settings = little(folder(), algo=algo, lora=0, kl=0.0, batch=32)
    finetune(replace(settings, steps=15), tmp_path, "cpu")
    log = [row for row in json.loads((tmp_path / "log.json").read_text()) if "loss" in row]
    assert log[0]["unparsable"] > 0.4
    assert log[-1]["unparsable"] < 0.1
    assert log[-1]["reward"] > log[0]["reward"] + 0.4


@pytest.mark.parametrize(
    ("algo", "arguments"),
    [
        ("sft", {"gradient_accumulation_steps": 4}),
        ("grpo", {"gradient_accumulation_steps": 4}),
        ("grpo", {"steps_per_generation": 4}),
        ("rloo", {"gradient_accumulation_steps": 2}),
    ],
)
def test_batches_that_are_added_up_are_of_other_episodes(folder, tmp_path, algo, arguments):
    """All steps are done, and no episode comes twice."""
    finetune(replace(little(folder(), algo=algo, arguments=arguments), steps=2), tmp_path, "cpu")
    log = json.loads((tmp_path / "log.json").read_text())
    assert [row["step"] for row in log if "loss" in row] == [1, 2]
    assert max(row["epoch"] for row in log) <= 1.0
    assert load(tmp_path, "cpu").num_timesteps == 2


def test_the_same_settings_give_the_same_weights(folder, tmp_path):
    for name in ("a", "b"):
        finetune(little(folder()), tmp_path / name, "cpu")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]


def test_ctrl_c_saves_what_there_is(folder, tmp_path):
    def stop(line):
        raise KeyboardInterrupt

    assert not finetune(little(folder(), algo="sft"), tmp_path, "cpu", stop)
    assert load(tmp_path, "cpu").num_timesteps == 1


def test_pairs_are_ranked_by_the_environment(folder):
    policy = zero_shot(little(folder(), algo="dpo", generations=3), "cpu")
    policy.__class__ = Scripted
    right = policy.episodes.oracle([10, 11, 12, 13])
    wrong = ["yes" if text != "yes" else "no" for text in right]
    policy.script = [wrong[0], right[0], "no idea", *[wrong[1]] * 3, *[right[2]] * 3, *["no idea"] * 3]
    rows = pairs(policy, 10, 4)
    assert [row["seed"] for row in rows] == [10, 11, 13]
    assert [row["chosen"][0]["content"] for row in rows] == [right[0], right[1], right[3]]
    assert [row["rejected"][0]["content"] for row in rows] == ["no idea", wrong[1], "no idea"]
    policy.script = [right[0]] * 3
    with pytest.raises(ValueError, match="no pair in 1 episodes"):
        pairs(policy, 10, 1)


@pytest.mark.filterwarnings("ignore:You are using 'environment_factory':UserWarning")
def test_trl_takes_the_tools_of_a_caption(folder, tmp_path):
    """With a template that calls tools; the model is told of them and every answer is scored by the environment."""
    from trl.chat_template_utils import qwen3_vl_chat_template

    model, processor = vlm.load_model(folder("llava"), "cpu")
    processor.chat_template = qwen3_vl_chat_template
    episodes = TextEpisodes(CAPTIONING, lowest=-1.0)
    config = trl.GRPOConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, num_generations=2, max_completion_length=4,
        use_cpu=True, bf16=False, gradient_checkpointing=False, logging_steps=1, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model,
        args=config,
        train_dataset=episodes.dataset(range(4)),
        processing_class=processor,
        environment_factory=episodes.environment,
    )
    assert sorted(tool.__name__ for tool in trainer.tools) == ["finish", "say"]
    trainer.train()
    assert trainer.state.log_history[0]["rewards/CaptionTools/mean"] == -1.0


# What a user gets wrong


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algo": "a2c"}, "algo must be one of 'sft', 'grpo', 'rloo', 'dpo', 'ppo', got 'a2c'"),
        ({"batch": 6}, "batch must be a multiple of generations=4 for grpo, got 6"),
        ({"lora": -1}, "lora must be from 0"),
        ({"steps": 0}, "steps must be from 1"),
        ({"generations": 1}, "generations must be from 2"),
        ({"learning_rate": 0.0}, "learning_rate must be over 0, got 0.0"),
        ({"kl": -0.1}, "kl must be at least 0, got -0.1"),
        ({"algo": "sft", "kl": 0.1}, "kl must be None for sft"),
        ({"arguments": {"max_steps": 5}}, "arguments must leave 'max_steps' to steps, got 5"),
        (
            {"algo": "sft", "arguments": {"output_dir": "x"}},
            "arguments must leave 'output_dir' to out, got 'x'",
        ),
        ({"algo": "sft", "arguments": {"use_vllm": True}}, "of grpo and rloo, got algo='sft'"),
        ({"algo": "ppo", "arguments": {"use_vllm": True}}, "of grpo and rloo, got algo='ppo'"),
        ({"id": MATCHING}, "has sound"),
        ({"model": "no/such-model"}, "'no/such-model' is no folder"),
    ],
)
def test_wrong_settings_are_named(folder, tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        finetune(replace(little(folder()), **changes), tmp_path / "out", "cpu")
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_there_is_not_written_over(folder):
    source = folder()
    with pytest.raises(ValueError, match=r"holds a model \(config\.json\): choose another folder"):
        finetune(little(source), source, "cpu")


def test_settings_that_could_not_be_saved_are_refused_before_the_training(folder, tmp_path):
    with pytest.raises(TypeError, match="env_kwargs and arguments must be values that JSON can hold"):
        finetune(little(folder(), id=CAPTIONING, env_kwargs={"reward": len}), tmp_path, "cpu")


def test_folders_that_hold_no_such_model_are_named(folder, tmp_path):
    clip = tiny_models.save(tiny_models.clip, tmp_path / "clip")
    with pytest.raises(ValueError, match="of the type 'clip', which isn't a vision-language model"):
        vlm.load_model(str(clip), "cpu")
    model, processor = tiny_models.idefics3()
    bare = tmp_path / "bare"
    processor.chat_template = None
    model.save_pretrained(bare)
    processor.save_pretrained(bare)
    with pytest.raises(ValueError, match="has no chat template"):
        vlm.load_model(str(bare), "cpu")
    weights = (bare / "model.safetensors").rename(bare / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin, which can run code"):
        vlm.load_model(str(bare), "cpu")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model\.safetensors"):
        vlm.load_model(str(bare), "cpu")
    (bare / "adapter_config.json").touch()
    with pytest.raises(ValueError, match="holds an adapter"):
        vlm.load_model(str(bare), "cpu")


def test_damaged_settings_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no vlm\.json"):
        load(tmp_path)
    for text in ("{", "[]", '{"format": 9}', '{"format": 1, "steps": 1, "settings": {"algo": "sft"}}'):
        (tmp_path / SETTINGS).write_text(text)
        with pytest.raises(ValueError, match="cannot load the fine-tuned model"):
            load(tmp_path)


def test_a_missing_library_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "trl", None)
    with pytest.raises(ImportError, match=r"needs TRL: pip install 'mmenvs\[vlm\]'"):
        finetune(little(folder()), tmp_path, "cpu")


def test_no_gpu_is_no_silent_cpu(folder):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="cuda"):
        zero_shot(little(folder()), "cuda")


# The recipes of the documentation


def blocks(kind: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", DOCS.read_text(), re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language == kind]


def test_the_configurations_in_the_documentation_are_taken(tmp_path):
    from accelerate.commands.config.config_args import load_config_from_file

    (tmp_path / "accelerate.yaml").write_text(blocks("yaml")[0])
    config = load_config_from_file(str(tmp_path / "accelerate.yaml"))
    assert (config.distributed_type, config.num_processes, config.mixed_precision) == ("MULTI_GPU", 4, "bf16")
    given = re.search(r"arguments=(\{[^}]*\})", DOCS.read_text().split("`--vllm` stands for")[1])
    served = ast.literal_eval(given[1])
    plain = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    assert trl.GRPOConfig(str(tmp_path), **served, **plain).vllm_server_base_url == "http://localhost:8000"
    inside = ast.parse(blocks("python")[0])
    dr_grpo = next(ast.literal_eval(node.value) for node in inside.body if isinstance(node, ast.Assign))
    assert trl.GRPOConfig(str(tmp_path), **dr_grpo, **plain).loss_type == "dr_grpo"
    trl.RLOOConfig(str(tmp_path), **served, **plain)


def test_the_commands_in_the_documentation_have_their_options():
    help = command("finetune-vlm", "--help")
    lines = [line for block in blocks("") for line in block.splitlines() if "finetune-vlm" in line]
    assert len(lines) == 4
    for line in lines:
        for option in re.findall(r"--[a-z-]+", line.split("finetune-vlm")[1]):
            assert option in help


def command(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result.output


def test_the_command_trains_shows_before_and_after_and_evaluate_reads_it(folder, tmp_path):
    out = tmp_path / "tuned"
    given = ("finetune-vlm", VQA, "--model", folder(), "--out", out, "--device", "cpu")
    said = command(*given, "--lora", 4, "--steps", 2, "--batch", 4, "--generations", 2, "--episodes", 10)
    for name in (
        "zero-shot",
        "tuned",
        "most frequent",
        "oracle",
        "couldn't be read: zero-shot",
        f"saved: {out}",
    ):
        assert name in said
    assert set(json.loads((out / "results.json").read_text())) >= {"zero-shot", "tuned", "oracle"}
    document = json.loads(command("evaluate", out, "--episodes", 10, "--device", "cpu", "--json"))
    assert document["steps"] == 2
    assert document["agent"]["id"] == VQA and 0 <= document["unparsable"] <= 1
    assert "answers that couldn't be read: " in command("evaluate", out, "--episodes", 2, "--device", "cpu")
    shown = command("show", VQA, "--agent", out, "--out", tmp_path / "x.png", code=2)
    assert "is a vision-language model, which 'mmenvs evaluate' plays" in shown
    assert "holds a fine-tuned model already" in command(*given, code=2)
    assert "has sound" in command(
        "finetune-vlm", MATCHING, "--model", folder(), "--out", tmp_path / "x", code=2
    )
    assert "algo must be one of" in command(*given, "--algo", "a2c", code=2)
