"""A small vision-language model built from a configuration: supervised on the world, then GRPO through TRL.

    OMP_NUM_THREADS=1 python benchmarks/vlm.py --out runs/small_vlm
    OMP_NUM_THREADS=1 python benchmarks/vlm.py --out runs/small_vlm --sft-steps 40 --rl-steps 5 --episodes 200    # a try

Prints the success on the test split after each of the two, greedy and sampled, and by how much GRPO raises it on the same
episodes; leaves ``results.json``.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from mmenvs_agents.evaluation import evaluate
from mmenvs_agents.vlm import VLMSettings, load
from mmenvs_agents.vlm_finetuning import check, finetune
from tokenizers import Tokenizer, models, pre_tokenizers

from mmenvs.benchmark.stats import bootstrap
from mmenvs.files import replacing
from mmenvs.text import SPECIAL
from mmenvs.world.words import VOCABULARY

# The special tokens of Idefics3, and the template in which its conversations are written.
TOKENS = ["<pad>", "<unk>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>"]
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>"
    "{% endfor %}"
)


def tokenizer() -> hf.PreTrainedTokenizerFast:
    """A token for each word of the world."""
    words = [word for word in VOCABULARY.words if word not in SPECIAL]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(TOKENS + words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end_of_utterance>",
        additional_special_tokens=TOKENS[3:],
        padding_side="left",
    )


def idefics3(width: int, layers: int, size: int = 64, patch: int = 8) -> tuple[Any, Any]:
    """An untrained Idefics3 (Laurencon et al. 2024) and its processor.

    Args:
        width, layers: of the language model; the vision encoder has as wide layers, half as many.
        size, patch: pixels of the picture and of a patch; four patches make a token.
    """
    words = tokenizer()
    shape = {"hidden_size": width, "num_attention_heads": max(2, width // 32), "intermediate_size": 3 * width}
    config = hf.Idefics3Config(
        text_config=hf.LlamaConfig(
            **shape,
            num_hidden_layers=layers,
            vocab_size=len(words),
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        ),
        vision_config={
            **shape,
            "num_hidden_layers": max(1, layers // 2),
            "image_size": size,
            "patch_size": patch,
        },
        scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )
    images = hf.Idefics3ImageProcessorPil(
        size={"longest_edge": size}, max_image_size={"longest_edge": size}, do_image_splitting=False
    )
    tokens = (size // patch) ** 2 // 4
    processor = hf.Idefics3Processor(images, words, image_seq_len=tokens, chat_template=TEMPLATE)
    return hf.Idefics3ForConditionalGeneration(config), processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/small_vlm"))
    parser.add_argument("--difficulty", type=int, default=0)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--sft-steps", type=int, default=500)
    parser.add_argument("--rl-steps", type=int, default=900)
    parser.add_argument("--rl-batch", type=int, default=256)
    parser.add_argument("--sft-rate", type=float, default=4e-4)
    parser.add_argument("--rl-rate", type=float, default=1e-4)
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"--out must not be there yet, got {str(options.out)!r}")
    if options.width < 64 or options.width % 32:
        parser.error(f"--width must be a multiple of 32 from 64 on, got {options.width}")
    for name in ("layers", "sft_steps", "rl_steps", "episodes"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    torch.manual_seed(options.seed)
    settings = VLMSettings(
        "MMRL/VQA-v0",
        str(options.out / "untrained"),
        algo="sft",
        lora=0,
        steps=options.sft_steps,
        batch=64,
        learning_rate=options.sft_rate,
        prompt="{question}",
        seed=options.seed,
        env_kwargs={"difficulty": options.difficulty},
    )
    # Another seed: GRPO isn't to see the episodes again that it was supervised on.
    tuned = replace(
        settings,
        model=str(options.out / "sft"),
        algo="grpo",
        steps=options.rl_steps,
        batch=options.rl_batch,
        learning_rate=options.rl_rate,
        seed=options.seed + 10_000,
    )
    for run in (settings, tuned):
        check(run)
    model, processor = idefics3(options.width, options.layers)
    for part in (model, processor):
        part.save_pretrained(options.out / "untrained")
    size = sum(parameter.numel() for parameter in model.parameters())
    rows: list[dict[str, Any]] = []
    before: dict[bool, Any] = {}
    for name, run in (("sft", settings), ("grpo", tuned)):
        begin = time.process_time()
        finetune(run, options.out / name, options.device, lambda line: print(line, flush=True))
        seconds = time.process_time() - begin
        for deterministic in (True, False):
            torch.manual_seed(options.seed)
            result = evaluate(
                load(options.out / name, options.device),
                run.id,
                episodes=options.episodes,
                env_kwargs=run.env_kwargs,
                deterministic=deterministic,
            )
            row = {"agent": name, "parameters": size, "training_seed": options.seed, "updates": run.steps}
            rows.append({**row, "cpu_seconds": seconds, **result.to_dict(), "gain": None})
            successes = result.successes.astype(float)
            if deterministic in before:  # the same episodes
                rows[-1]["gain"] = asdict(bootstrap([[successes - before[deterministic]]]))
            before[deterministic] = successes
    with replacing(options.out / "results.json") as file:
        file.write_text(json.dumps(rows, indent=2))
    print(f"\n{size / 1e6:.1f} M parameters, {options.episodes:,} episodes of the test split\n")
    print("| after | updates | answers | success | 95 % interval | gain | minutes of one core |")
    print("|---|---:|---|---:|---|---|---:|")
    for row in rows:
        rate, how = row["success"], "greedy" if row["deterministic"] else "sampled"
        gain = "{value:.3f} [{low:.3f}, {high:.3f}]".format(**row["gain"]) if row["gain"] else ""
        minutes = row["cpu_seconds"] / 60
        print(
            f"| {row['agent']} | {row['updates']:,} | {how} | {rate['value']:.3f} "
            f"| {rate['low']:.3f} to {rate['high']:.3f} | {gain} | {minutes:.1f} |"
        )


if __name__ == "__main__":
    main()
