"""What the transformer agent's cache, whole-episode passes and half precision save, and how it compares with TRL's trainer.

    OMP_NUM_THREADS=1 python benchmarks/transformer.py cache        # rollouts: cached steps against whole passes
    OMP_NUM_THREADS=1 python benchmarks/transformer.py update       # one pass a sequence against one a token
    OMP_NUM_THREADS=1 python benchmarks/transformer.py precision --agent runs/captioning/supervised_0
    OMP_NUM_THREADS=1 python benchmarks/transformer.py generate     # rollouts: against generate of transformers
    OMP_NUM_THREADS=1 python benchmarks/transformer.py trl          # an iteration of GRPO: against TRL's

Contestants take turns, and ratios of the medians of their processor times are reported, which other work on the machine
disturbs least: on one thread they are what the time would be without it. Only ratios within one run mean anything. The task
is made up: prompts of random words, answered by 24 words. In ``trl`` both sides run a model of transformers, in ``generate``
each its own with the same weights; the policy's prompt sees itself in both directions, that of the model only backwards,
which takes as long.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from mmenvs_agents.transformer import grpo
from mmenvs_agents.transformer.agent import TransformerAgent
from mmenvs_agents.transformer.config import SIZES, Backbone, ModelConfig
from mmenvs_agents.transformer.model import Episodes, TransformerPolicy
from mmenvs_agents.transformer.rollout import collect
from torch import Tensor

from mmenvs.spaces import text

WORDS, START = 512, 1  # words 0 and 1 are padding and the one that begins an answer
PROMPT, ANSWER = 88, 24
PRECISIONS = ("float32", "bfloat16")
# Of the language model: 3 million parameters.
LLAMA = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
LLAMA["num_key_value_heads"] = 2


class Words(gym.vector.VectorEnv):
    """A prompt of random words; each word of the answer that has an even number is paid."""

    def __init__(self, rows: int, prompt: int = PROMPT) -> None:
        self.num_envs, self.metadata = rows, {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space = spaces.Dict({"prompt": text(WORDS, prompt)})
        self.single_action_space = spaces.Discrete(WORDS)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        length = self.single_observation_space["prompt"].shape[0]
        draw = [np.random.default_rng(each).integers(2, WORDS, length) for each in seed]
        self.prompts, self.time = {"prompt": np.stack(draw)}, 0
        return self.prompts, {}

    def step(self, actions: Any) -> tuple[dict[str, Any], Any, Any, Any, dict[str, Any]]:
        self.time += 1
        ended = np.full(self.num_envs, self.time == ANSWER)
        return self.prompts, (actions % 2 == 0) / ANSWER, ended, np.zeros_like(ended), {}


def medians(contestants: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median processor seconds of each; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            begin = time.process_time()
            run()
            seconds[name].append(time.process_time() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def make_policy(
    config: ModelConfig = SIZES["small"], prompt: int = PROMPT, backbone: Backbone | None = None
) -> TransformerPolicy:
    """A policy with random weights, whose words are not all as likely."""
    torch.manual_seed(0)
    seen, done = Words(1, prompt).single_observation_space, spaces.Discrete(WORDS)
    policy = TransformerPolicy(seen, done, config, ("prompt",), encoders={"prompt": "bow"}, backbone=backbone)
    torch.nn.init.normal_(policy.actor.out.weight, std=4 / policy.width**0.5)
    return policy


def make_prompts(rows: int, group: int = 1) -> Tensor:
    """``(rows, PROMPT)`` word ids, ``group`` rows the same one after the other."""
    prompts = torch.randint(2, WORDS, (rows // group, PROMPT), generator=torch.Generator().manual_seed(0))
    return prompts.repeat_interleave(group, 0)


def play_cached(
    policy: TransformerPolicy, prompts: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Answers ``(B, ANSWER, 1)``, drawn or the most likely ones, a cached step at a time."""
    cache = policy.cache(len(prompts), ANSWER, rollout=True)
    words = [torch.zeros((len(prompts), 1), dtype=torch.int64)]
    for step in range(ANSWER):
        starts = torch.full((len(prompts),), step == 0)
        described, _ = policy.step(cache, {"prompt": prompts}, words[-1], starts)
        words.append(policy.actor.sample(described, generator))
    return torch.stack(words[1:], 1)


@torch.no_grad()
def play_whole(policy: TransformerPolicy, prompts: Tensor) -> Tensor:
    """The same, with a pass over all so far for each word."""
    words = torch.zeros((len(prompts), ANSWER, 1), dtype=torch.int64)
    for step in range(ANSWER):
        described, _ = policy(first_steps(prompts, words, step + 1))
        words[:, step] = policy.actor.sample(described[:, step], None)
    return words


def first_steps(prompts: Tensor, words: Tensor, count: int) -> Episodes:
    return Episodes({"prompt": prompts}, {}, words[:, :count], torch.full((len(words),), count))


def learn(
    policy: TransformerPolicy, prompts: Tensor, words: Tensor, each: bool, group: int = 1
) -> list[Tensor]:
    """The gradients of the mean log-probability and squared value: one pass for a sequence, or ``each`` step a sample."""
    policy.zero_grad()
    for count in range(1, ANSWER + 1) if each else (ANSWER,):
        episodes = first_steps(prompts, words, count)
        described, values = policy(episodes, group)
        losses = (values - 1).square() - policy.actor.log_prob(described, episodes.actions)
        (losses[:, -1].mean() / ANSWER if each else losses.mean()).backward()
    return [p.grad.clone() for p in policy.parameters() if p.grad is not None]


def apart(one: list[Tensor], other: list[Tensor]) -> float:
    """Largest difference of gradients, of the largest gradient."""
    furthest = max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))
    return furthest / max(float(a.abs().max()) for a in one)


def report(title: str, seconds: dict[str, float], owed: dict[str, str]) -> None:
    """A table in which each is compared with the first."""
    base = next(iter(seconds.values()))
    print(f"| {title} | ms | faster | owed |\n|---|---:|---:|---:|")
    for name, value in seconds.items():
        print(f"| {name} | {value * 1e3:,.0f} | {base / value:.2f}x | {owed.get(name, '')} |")
    print()


def measure_cache(repeats: int) -> None:
    """Rollouts of 16 rows."""
    policy, prompts = make_policy(), make_prompts(16)
    answers: dict[str, Tensor] = {}
    runs = {
        "a whole pass for each word": lambda: answers.update(whole=play_whole(policy, prompts)),
        "cached steps": lambda: answers.update(cached=play_cached(policy, prompts)),
    }
    count = sum(p.numel() for p in policy.parameters()) / 1e6
    report(f"rollout of 16 x {ANSWER} words, {count:.1f} M", medians(runs, repeats), {"cached steps": "8x"})
    print(f"the same answers: {torch.equal(answers['whole'], answers['cached'])}")


def measure_update(repeats: int) -> None:
    """Forward and backward pass over 8 answers to one prompt."""
    policy, prompts = make_policy(), make_prompts(8, group=8)
    words = torch.randint(2, WORDS, (8, ANSWER, 1), generator=torch.Generator().manual_seed(1))
    found: dict[str, list[Tensor]] = {}
    ways = {"one pass a word": (True, 1), "one a sequence": (False, 1), "prompt shared by 8": (False, 8)}
    runs = {
        name: lambda name=name, way=way: found.update({name: learn(policy, prompts, words, *way)})
        for name, way in ways.items()
    }
    report(f"update by 8 x {ANSWER} words", medians(runs, repeats), {"one a sequence": "12x"})
    whole = found.pop("one a sequence")
    furthest = max(apart(whole, other) for other in found.values())
    print(f"gradients differ by {furthest:.0e} of the largest at most")


def in_precision(policy: TransformerPolicy, precision: Any) -> TransformerPolicy:
    policy.precision = policy.extractor.precision = precision
    return policy


def measure_precision(repeats: int, agent: Path | None) -> None:
    """bfloat16 beside float32, and whether a trained agent's captions stay the same."""
    flags = set(Path("/proc/cpuinfo").read_text().split()) & {"avx512_bf16", "amx_bf16"}
    print(f"bfloat16 arithmetic of this CPU: {', '.join(sorted(flags)) or 'none'}\n")
    policy, prompts = make_policy(), make_prompts(16)
    words, generator = play_cached(policy, prompts), torch.Generator().manual_seed(0)
    for title, run in {
        f"rollout of 16 x {ANSWER} words": lambda p: play_cached(p, prompts, generator),
        f"update by 16 x {ANSWER} words": lambda p: learn(p, prompts, words, False),
    }.items():
        runs = {p: lambda p=p, run=run: run(in_precision(policy, p)) for p in PRECISIONS}
        report(title, medians(runs, repeats), {"bfloat16": "1.3x"})
    if agent is None:
        print("captions are compared with --agent DIR, an agent trained on MMRL/Captioning-v0")
        return
    trained = TransformerAgent.load(agent, device="cpu")
    envs = gym.make_vec(trained.settings.id, num_envs=256, split="test", **trained.settings.env_kwargs)
    both = [collect(in_precision(trained.policy, p), envs, 0, 1, None) for p in PRECISIONS]
    captions = [
        [row[:n].flatten().tolist() for row, n in zip(r.episodes.actions, r.episodes.lengths, strict=True)]
        for r in both
    ]
    same = sum(a == b for a, b in zip(*captions, strict=True))
    print(f"greedy captions of the test split that are the same in both: {same} of {len(captions[0])}")
    print("their mean scene F1:", " and ".join(f"{r.parts['scene_f1'].mean():.4f}" for r in both))
    with torch.no_grad():
        exact, rough = (in_precision(trained.policy, p)(both[0].episodes)[0] for p in PRECISIONS)  # (B, T, K)
    two = exact.topk(2, -1).indices
    leads, rough_leads = (-logits.gather(-1, two).diff(dim=-1).squeeze(-1) for logits in (exact, rough))
    valid = both[0].episodes.valid
    moved = float((leads - rough_leads)[valid].abs().max())
    doubtful = float(((leads < moved) & valid).any(1).float().mean())
    changed = int(((exact.argmax(-1) != rough.argmax(-1)) & valid).any(1).sum())
    print(
        f"The most likely words are found in float32. Half precision itself would change {changed} captions:"
    )
    print(f"it moves the lead of the likeliest word over the next one by up to {moved:.2f} nats,")
    print(f"and in {doubtful:.0%} of the captions a word leads by less")


def make_llama() -> Any:
    """A language model with random weights, whose word vectors have one length."""
    import transformers as hf

    torch.manual_seed(0)
    config = hf.LlamaConfig(**LLAMA, vocab_size=WORDS, pad_token_id=0, bos_token_id=START, eos_token_id=None)
    model = hf.LlamaForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=config.hidden_size**-0.5)
    words = model.get_input_embeddings().weight.data
    words.copy_(torch.nn.functional.rms_norm(torch.randn_like(words), words.shape[1:]))
    return model


def policy_of(model: Any, prompt: int = PROMPT - 1) -> TransformerPolicy:
    """A policy that does what the model does, but for the mask of the prompt; the model's has one word more, ``START``."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        width = model.config.hidden_size
        policy = make_policy(ModelConfig(token_width=width), prompt, Backbone(folder))
    policy.actor.tokens.weight.data.copy_(model.get_input_embeddings().weight)
    policy.actor.out.weight.data.copy_(model.lm_head.weight)
    return speak_plainly(policy)


def speak_plainly(policy: TransformerPolicy) -> TransformerPolicy:
    """Prompts and answers in the same word vectors of one length, and no bias or places, as language models have them."""
    words, reader, project = (
        policy.actor.tokens.weight.data,
        policy.extractor.encoders["prompt"],
        policy.project["prompt"],
    )
    words.copy_(torch.nn.functional.rms_norm(words, words.shape[1:]))
    reader.words.weight.data.copy_(words)
    policy.start.data.copy_(words[START])
    torch.nn.init.eye_(project.weight)
    for zero in (reader.place, project.bias, policy.actor.out.bias):
        torch.nn.init.zeros_(zero)
    return policy


def after(prompts: Tensor) -> Tensor:
    """Prompts as the model reads them, with ``START`` at the end."""
    return torch.nn.functional.pad(prompts, (0, 1), value=START)


def make_qwen() -> tuple[TransformerPolicy, Any]:
    """A policy with random weights and a Qwen3 of transformers with the same; its prompt has one word more, ``START``."""
    import transformers as hf

    own = ModelConfig(width=256, layers=4, heads=4, kv_heads=2, hidden=688, token_width=256)
    policy = speak_plainly(make_policy(own, PROMPT - 1))
    config = hf.Qwen3Config(
        hidden_size=own.width, intermediate_size=own.hidden, num_hidden_layers=own.layers,
        num_attention_heads=own.heads, num_key_value_heads=own.kv_heads, head_dim=own.width // own.heads,
        rope_parameters={"rope_type": "default", "rope_theta": float(own.rope_base)}, vocab_size=WORDS,
        rms_norm_eps=torch.finfo(torch.float32).eps, pad_token_id=0, bos_token_id=START, eos_token_id=None,
    )  # fmt: skip
    model = hf.Qwen3ForCausalLM(config)
    weights = {
        "model.embed_tokens": policy.actor.tokens,
        "model.norm": policy.norm,
        "lm_head": policy.actor.out,
    }
    tensors = {f"{name}.weight": module.weight for name, module in weights.items()}
    for i, block in enumerate(policy.blocks):
        key, value = block.key_value.weight.chunk(2)
        gate, up = block.up.weight.chunk(2)
        parts = {
            "input_layernorm": block.attention_norm.weight, "post_attention_layernorm": block.feed_norm.weight,
            "self_attn.q_proj": block.query.weight, "self_attn.k_proj": key, "self_attn.v_proj": value,
            "self_attn.o_proj": block.out.weight, "self_attn.q_norm": torch.ones(block.size),
            "self_attn.k_norm": torch.ones(block.size), "mlp.gate_proj": gate, "mlp.up_proj": up,
            "mlp.down_proj": block.down.weight,
        }  # fmt: skip
        tensors |= {f"model.layers.{i}.{name}.weight": value for name, value in parts.items()}
    model.load_state_dict(tensors)
    return policy, model.eval()


def measure_generate(repeats: int) -> None:
    """Sampled answers, both in float32 and in half precision; ours with log-probabilities, values and the environment."""
    policy, model = make_qwen()
    # Wholly, but for the angles of positions, as models are loaded; ours multiplies in it and adds in float32.
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.model.rotary_emb = model.model.rotary_emb
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": ANSWER, "pad_token_id": 0}
    for precision, theirs in zip(PRECISIONS, (model, half), strict=True):
        in_precision(policy, precision)
        for answers, rows in itertools.product((1, 8), (16, 64)):  # to each prompt, and in all
            envs, generator = Words(rows, PROMPT - 1), torch.Generator().manual_seed(0)
            seeds = [row // answers for row in range(rows)]
            prompts = after(torch.as_tensor(envs.reset(seed=seeds)[0]["prompt"][::answers]))
            print(
                f"log-probabilities after the prompt differ by {unlike(policy, theirs, prompts):.0e} at most"
            )
            runs = {
                "generate": lambda p=prompts, m=theirs, a=answers: m.generate(
                    p, attention_mask=torch.ones_like(p), num_return_sequences=a, **settings
                ),
                "collect": lambda e=envs, s=seeds, g=generator, a=answers: collect(
                    policy, e, s, 1, g, group=a
                ),
            }
            title = f"rollout of {rows} x {ANSWER} words, {answers} to a prompt, {precision}"
            report(title, medians(runs, repeats), {"collect": "1.2x"})


@torch.no_grad()
def unlike(policy: TransformerPolicy, model: Any, prompts: Tensor) -> float:
    """How far the log-probabilities of the first words are apart, where the model's prompt sees itself both ways, too."""
    seen = torch.zeros(1, 1, PROMPT, PROMPT, dtype=model.dtype)
    seen[..., :-1, -1] = torch.finfo(model.dtype).min  # what comes after the prompt
    theirs = model(prompts, attention_mask=seen.expand(len(prompts), -1, -1, -1)).logits[:, -1]
    words = torch.zeros((len(prompts), 1, 1), dtype=torch.int64)
    ours, _ = policy(first_steps(prompts[:, :-1], words, 1))
    return float((ours[:, 0].log_softmax(-1) - theirs.float().log_softmax(-1)).abs().max())


def make_trainer(
    model: Any, folder: str, prompts: Tensor, answers: int = 8, batch: int = 64, **more: Any
) -> Any:
    """TRL's GRPO of the model on prompts ``(n, L)`` of word ids, one of its steps for all of them."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    inner = Tokenizer(models.WordLevel({str(i): i for i in range(WORDS + 1)}, unk_token="0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="0", eos_token=str(WORDS), padding_side="left"
    )

    def paid(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(i % 2 == 0 for i in ids) / ANSWER for ids in completion_ids]

    # Gradient checkpointing, which TRL has on, would save memory and take time.
    settings = GRPOConfig(
        folder, per_device_train_batch_size=batch, gradient_accumulation_steps=len(prompts) * answers // batch,
        num_generations=answers, max_completion_length=ANSWER, temperature=1.0, top_k=0, beta=0.0, use_cpu=True,
        bf16=False, gradient_checkpointing=False, report_to="none", disable_tqdm=True, logging_strategy="no",
        save_strategy="no", **more,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": [" ".join(map(str, row)) for row in prompts.tolist()]})
    return GRPOTrainer(model, paid, settings, train_dataset=data, processing_class=tokenizer)


def measure_trl(repeats: int) -> None:
    """Iterations of 64 prompts x 8 answers: rollout, rewards, and one step of AdamW in 8 parts."""
    from transformers import TrainerCallback

    model = make_llama()
    policy = policy_of(model)
    envs, recipe = Words(64 * 8, PROMPT - 1), grpo.VARIANTS["dapo"]
    recipe = replace(recipe, num_envs=64 * 8, minibatches=1, accumulate=8)
    optimizer, generator = torch.optim.AdamW(policy.parameters()), torch.Generator().manual_seed(0)
    begin, parts = 0.0, {"TRL": [], "ours": [], "of it the rollout": []}

    def iterate() -> None:
        begin = time.process_time()
        rollout = grpo.play(policy, envs, recipe, 0, generator)
        parts["of it the rollout"].append(time.process_time() - begin)
        grpo.update(policy, optimizer, rollout, recipe, 1.0, generator)
        parts["ours"].append(time.process_time() - begin)

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            nonlocal begin
            begin = time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            parts["TRL"].append(time.process_time() - begin)
            iterate()

    prompts = envs.reset(seed=np.repeat(range(64), 8))[0]["prompt"][::8]
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, folder, after(torch.as_tensor(prompts)), max_steps=repeats)
        trainer.add_callback(Turns())
        trainer.train()
    seconds = {name: statistics.median(values) for name, values in parts.items()}
    report(f"GRPO, 64 x 8 x {ANSWER} words after {PROMPT}", seconds, {"ours": "1.5x"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["cache", "update", "precision", "generate", "trl"])
    parser.add_argument("--repeats", type=int, help="turns of each contestant")
    parser.add_argument("--agent", type=Path, help="folder of a trained captioning agent, for 'precision'")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    print(f"{torch.get_num_threads()} thread(s), torch {torch.__version__}")
    measures: dict[str, tuple[Callable[[int], None], int]] = {
        "cache": (measure_cache, 3),
        "update": (measure_update, 3),
        "precision": (lambda repeats: measure_precision(repeats, options.agent), 5),
        "generate": (measure_generate, 7),
        "trl": (measure_trl, 2),
    }
    measure, usual = measures[options.what]
    measure(options.repeats or usual)


if __name__ == "__main__":
    main()
