"""PPO on tokens of vision-language models: what an update sees is what was drawn, and it learns what is paid."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("trl", reason="fine-tuning needs TRL and PEFT: pip install 'mmenvs[vlm]'")

from mmenvs_agents import vlm, vlm_finetuning
from mmenvs_agents.transformer.learning import NonFiniteGradientError
from mmenvs_agents.vlm import VLMPolicy, VLMSettings
from mmenvs_agents.vlm_finetuning import finetune
from mmenvs_agents.vlm_ppo import Answers, Learner, TokenPPO
from peft import get_peft_model

from mmenvs.integrations.trl import Scored, TextEpisodes
from tests import tiny_models

# PEFT still uses the old name of a property of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.vlms(tmp_path_factory.mktemp("vlms"))


def little(model: str, **changes) -> VLMSettings:
    """Questions are of several lengths, so that prompts are padded."""
    settings = VLMSettings("MMRL/VQA-v0", model, algo="ppo", lora=0, steps=10, batch=8)
    return replace(settings, prompt="{question}", lowest=-1.0, max_tokens=5, **changes)


def learner(settings: VLMSettings, rate: float = 1e-2, value: float = 0.0) -> Learner:
    torch.manual_seed(0)
    model, processor = vlm.read_model(settings.model, half=False)
    if settings.lora:
        model = get_peft_model(model, vlm_finetuning._lora(settings))
    result = Learner(VLMPolicy(model, processor, settings), rate)
    torch.nn.init.normal_(result.actor.value.weight, std=value)
    return result


def close(a: torch.Tensor, b: torch.Tensor, within: float = 1e-4) -> bool:
    return torch.allclose(a, b, rtol=0, atol=within)


@pytest.mark.parametrize("name", tiny_models.VLMS)
def test_log_probabilities_are_those_that_generation_drew_with(folder, name):
    some = learner(little(folder(name), temperature=0.7))
    player, drawn = some.player, []

    def sample(inputs, deterministic=False):
        output = player.model.generate(
            **inputs,
            generation_config=player.decoding(deterministic),
            return_dict_in_generate=True,
            output_scores=True,
        )
        tokens = output.sequences[:, inputs["input_ids"].shape[1] :]
        scores = torch.stack(output.scores, 1).log_softmax(-1)  # (n, T, V)
        drawn.append(scores.gather(-1, tokens[..., None]).squeeze(-1))
        return tokens

    player.sample, player.batch_size = sample, 8
    answers, _ = some.collect(range(8))
    assert answers.tokens.shape == drawn[0].shape == (8, 5)
    assert close(answers.log_probs[answers.valid], drawn[0][answers.valid])
    _, _, tokens, valid = some._pass(answers, torch.arange(8))
    part = some._sums(answers, torch.tensor([2, 6]), known(answers), 0.0)
    assert torch.equal(tokens, answers.tokens)
    assert torch.equal(valid, answers.valid)
    assert abs(float(part["approx_kl"].detach())) < 1e-6
    assert float(part["clip_fraction"]) == 0


def known(answers: Answers) -> torch.Tensor:
    zero = torch.zeros_like(answers.values)
    return torch.stack([answers.log_probs, zero, answers.values, zero, zero], -1)


@pytest.mark.parametrize("name", tiny_models.VLMS)
def test_padding_does_not_leak(folder, name):
    some = learner(little(folder(name)), value=0.3)
    answers, _ = some.collect(range(6))
    lengths = torch.tensor([5, 2, 4, 1, 3, 5])
    answers = replace(answers, tokens=answers.tokens[:, :1].repeat(1, 5), lengths=lengths)
    widths = {some.player.inputs([c], [p])["input_ids"].shape[1] for c, p in zip(
        answers.conversations, answers.pictures, strict=True)}  # fmt: skip
    assert len(widths) > 1

    def numbers(answers, rows):
        with torch.no_grad():
            drawn_from, values, tokens, valid = some._pass(answers, torch.tensor(rows))
        both = torch.stack([drawn_from.log_prob(tokens), values]) * valid
        return torch.nn.functional.pad(both, (0, 5 - both.shape[2])).unbind(1)

    whole = numbers(answers, [0, 1, 2, 3, 4, 5])
    for row, other in zip([4, 1, 0, 5, 3, 2], numbers(answers, [4, 1, 0, 5, 3, 2]), strict=True):
        assert close(other, whole[row])
    for row in range(6):
        assert close(numbers(answers, [row])[0], whole[row])
    noise = torch.where(answers.valid, answers.tokens, answers.tokens.flip(0) + 1)
    for row, other in enumerate(numbers(replace(answers, tokens=noise), [0, 1, 2, 3, 4, 5])):
        assert close(other, whole[row])


def test_the_environment_pays_the_last_token(folder):
    some = learner(little(folder()))
    answers, scores = some.collect(range(40, 56))
    ends = some.player.decoding(False).eos_token_id
    for row, (tokens, length) in enumerate(zip(answers.tokens, answers.lengths, strict=True)):
        said = tokens[:length]
        assert not torch.isin(said[:-1], torch.tensor(ends)).any()
        assert length == answers.tokens.shape[1] or said[-1] in ends
        scored = some.player.episodes.score([40 + row], some.player.texts(said[None]))
        assert answers.rewards[row].nonzero().flatten().tolist() in ([], [length - 1])
        assert answers.rewards[row, length - 1] == scored.rewards[0]
    assert scores["unparsable"] == (answers.rewards == -1).any(1).float().mean() > 0
    assert len(set(answers.lengths.tolist())) > 1


def paid(some: Learner, pay) -> None:
    """The environment pays each text what ``pay`` gives for it."""

    def score(seeds, texts):
        rewards = torch.tensor([float(pay(text)) for text in texts], dtype=torch.float64).numpy()
        return Scored(rewards, rewards > 0, rewards * 0)

    some.player.episodes.score = score


@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_paid_gets_likelier_and_what_costs_gets_rarer(folder, sign):
    some = learner(replace(little(folder(), batch=32, steps=6), max_tokens=1), rate=3e-3)
    answers, _ = some.collect(range(1000, 1016))

    def chances() -> torch.Tensor:
        with torch.no_grad():
            return some._pass(answers, torch.arange(16))[0].probs[:, 0].mean(0)  # (V,)

    before = chances()
    token = int(before.argmax())
    paid(some, lambda text: sign * (text == some.player.processor.tokenizer.decode([token])))
    some.learn()
    after = float(chances()[token])
    assert after > 1.3 * before[token] if sign > 0 else after < before[token] / 1.3


def test_values_learn_what_answers_are_worth(folder):
    settings = little(folder(), arguments={"learning_rate": 0.02, "value_clip": 0.0})
    some = learner(settings, rate=1e-9)
    paid(some, lambda text: 1.0)
    before = some.collect(range(8))[0]
    assert not before.values.any()
    some.learn()
    after = some.collect(range(8))[0]
    assert (after.values - 1)[after.valid].abs().mean() < 0.5
    assert some.log[-1]["value_loss"] < some.log[0]["value_loss"] / 2


@pytest.mark.parametrize("lora", [4, 0])
def test_the_pull_is_to_the_model_before(folder, lora):
    some = learner(little(folder(), lora=lora, kl=0.1))
    answers, _ = some.collect(range(8))
    assert close(answers.log_probs, answers.reference, 1e-6)
    log = some.update(answers)
    assert log["kl"] > 0
    with torch.no_grad():
        log_probs, _, reference = some._known(answers, torch.arange(8)).unbind(-1)
    assert close(reference, answers.reference, 1e-6)
    assert not close(log_probs, answers.log_probs, 1e-3)
    part = some._sums(answers, torch.arange(8), known(answers), 0.0)
    expected = part["policy_loss"] + 0.1 * part["value_loss"] + 0.1 * part["kl"]
    assert close(part["loss"], expected, 1e-3)


def test_an_update_passes_each_sequence_once_an_epoch(folder):
    arguments = {"epochs": 3, "minibatches": 2, "accumulate": 2, "target_kl": 0.0}
    some, seen = learner(little(folder(), arguments=arguments)), []
    answers, _ = some.collect(range(8))
    some.actor.model.register_forward_pre_hook(
        lambda model, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    some.update(answers)
    assert seen == [2] * 12


def test_a_gradient_that_is_not_finite_is_named_and_the_model_before_it_is_kept(
    folder, tmp_path, monkeypatch
):
    def score(self, seeds, texts):
        zero = torch.zeros(len(seeds), dtype=torch.float64).numpy()
        return Scored(zero * float("nan"), zero > 0, zero)

    monkeypatch.setattr(TextEpisodes, "score", score)
    with pytest.raises(NonFiniteGradientError, match=r"the gradient of \S+ is not finite"):
        finetune(little(folder()), tmp_path, "cpu")
    monkeypatch.undo()
    policy = vlm.load(tmp_path, "cpu")
    assert policy.num_timesteps == 0
    before = vlm.read_model(folder(), half=False)[0].state_dict()
    assert all(torch.equal(value, before[key]) for key, value in policy.model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_type": "dapo"}, "arguments of ppo must be of epochs, minibatches, accumulate"),
        ({"num_envs": 4}, "got 'num_envs'"),
        ({"kl": 0.1}, "got 'kl'"),
        ({"clip": -0.1}, "clip must be from 0"),
        ({"epochs": 0}, "epochs must be from 1"),
        ({"learning_rate": 0.0}, "learning_rate of the value head must be over 0"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        finetune(little("anything", arguments=arguments), tmp_path / "out", "cpu")
    assert not (tmp_path / "out").exists()


def test_what_it_cannot_run_on_is_named(folder, tmp_path, monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cuda"):
            finetune(little(folder()), tmp_path, "cuda")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="algo='ppo' learns in one process, it was launched in 2"):
        finetune(little(folder()), tmp_path, "cpu")
    monkeypatch.setenv("WORLD_SIZE", "1")
    modules = __import__("sys").modules
    monkeypatch.setitem(modules, "trl", None)
    vlm_finetuning.check(little(folder()))
    monkeypatch.setitem(modules, "peft", None)
    with pytest.raises(ImportError, match=r"need PEFT: pip install 'mmenvs\[vlm\]'"):
        finetune(little(folder(), lora=4), tmp_path, "cpu")


def test_the_settings_of_a_training_are_those_of_the_command():
    recipe = TokenPPO.of(little("anything", kl=0.2, arguments={"epochs": 4}))
    assert (recipe.num_envs, recipe.kl, recipe.epochs, recipe.entropy) == (8, 0.2, 4, 0.0)
