"""Fine-tuning of vision-language models on an environment: SFT, GRPO, RLOO and DPO through TRL, and our own PPO."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from mmenvs import files
from mmenvs.embeddings.embedding import resolve_device

from . import vlm_ppo
from .transformer.learning import NonFiniteGradientError
from .vlm import FORMAT, SETTINGS, VLMPolicy, VLMSettings, longest_answer, read_model

# Learning rates that are usual for LoRA, and for all weights.
_RATES = {
    "sft": (2e-4, 2e-5),
    "grpo": (1e-5, 1e-6),
    "rloo": (1e-5, 1e-6),
    "dpo": (5e-6, 5e-7),
    "ppo": (1e-5, 1e-6),
}
# Arguments of TRL's configuration that settings of ours set, and which.
_OURS = {
    "output_dir": "out",
    "max_steps": "steps",
    "per_device_train_batch_size": "batch",
    "learning_rate": "learning_rate",
    "seed": "seed",
    "beta": "kl",
    "num_generations": "generations",
    "temperature": "temperature",
    "max_completion_length": "max_tokens",
}
_SHOWN = ("loss", "reward", "success", "unparsable", "kl", "mean_token_accuracy", "rewards/accuracies")


def finetune(
    settings: VLMSettings,
    out: str | os.PathLike[str],
    device: str = "auto",
    say: Callable[[str], None] = lambda line: None,
) -> bool:
    """Fine-tune a model on the train split, or the one in ``env_kwargs``, and leave it in ``out``.

    ``out`` holds a whole model, adapters merged, that :func:`mmenvs_agents.vlm.load` and transformers read, and ``log.json``: what TRL
    or :mod:`mmenvs_agents.vlm_ppo` has logged. Under ``accelerate launch`` each process calls this, and the first one writes.

    Args:
        settings: what to train.
        out: folder without a fine-tuned model.
        device: as for :func:`mmenvs_agents.vlm.load_model`.
        say: is handed a line of progress at a time.

    Returns:
        False if Ctrl-C ended the training early (the model is saved then too), else True.

    Raises:
        ImportError: without TRL, or without PEFT for adapters.
        FileNotFoundError, ValueError: see :func:`mmenvs_agents.vlm.load_model` and :class:`mmenvs.integrations.trl.TextEpisodes`.
        NonFiniteGradientError: of ppo; ``out`` holds the model from before it.
    """
    check(settings)
    out, device = check_out(out), resolve_device(device)
    episodes = settings.episodes()
    document = _document(settings)
    # Steps of a learning rate for all weights are too small to be added to bfloat16.
    model, processor = read_model(settings.model, half=device != "cpu" and settings.lora > 0)
    if settings.algo == "ppo":
        return _ppo(settings, model.to(device), processor, document, out, say)
    trl, max_tokens = require_trl(), settings.max_tokens or longest_answer(episodes, processor)
    arguments = _arguments(settings, out, device, max_tokens)
    config = getattr(trl, f"{settings.algo.upper()}Config")(**arguments)
    model.to(config.device)  # the GPU of this process
    transformers.set_seed(settings.seed)
    rows = settings.batch * settings.steps * config.world_size * config.gradient_accumulation_steps
    common: dict[str, Any] = {
        "model": model,
        "args": config,
        "processing_class": processor,
        "peft_config": _lora(settings),
        "callbacks": [_progress(say)],
    }
    first = int(np.random.SeedSequence([settings.seed]).generate_state(1)[0])
    if settings.algo in ("grpo", "rloo"):
        whole = config.generation_batch_size  # TRL drops what doesn't fill one
        rows = math.ceil(rows / whole) * whole
        seeds = range(first, first + rows // settings.generations)
        trainer = getattr(trl, f"{settings.algo.upper()}Trainer")(
            reward_funcs=episodes.reward, train_dataset=episodes.dataset(seeds), **common
        )
    elif settings.algo == "sft":
        seeds = range(first, first + rows)
        dataset = episodes.dataset(seeds, completion=episodes.oracle(seeds))
        trainer = trl.SFTTrainer(train_dataset=dataset, **common)
    else:
        policy = VLMPolicy(model, processor, settings)
        trainer = trl.DPOTrainer(train_dataset=pairs(policy, first, rows, say), **common)
    trainer.remove_callback(transformers.PrinterCallback)
    finished = True
    try:
        trainer.train()
    except KeyboardInterrupt:
        finished = False
    if trainer.accelerator.is_main_process:
        trained = trainer.accelerator.unwrap_model(trainer.model)
        if settings.lora:
            trained = trained.merge_and_unload()
        _save(trained, processor, document, trainer.state.log_history, trainer.state.global_step, out)
    trainer.accelerator.wait_for_everyone()
    return finished


def check(settings: VLMSettings) -> None:
    """That a training can begin as far as that shows without a model: libraries, settings of ppo, one process for it.

    Raises:
        ImportError, TypeError, ValueError: if it can't, or ``arguments`` hold what other settings set.
    """
    if settings.arguments.get("use_vllm") and settings.algo not in ("grpo", "rloo"):
        raise ValueError(f"vLLM answers in the training of grpo and rloo, got algo={settings.algo!r}")
    if settings.algo == "ppo":
        vlm_ppo.TokenPPO.of(settings)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(
                f"algo='ppo' learns in one process, it was launched in {os.environ['WORLD_SIZE']}: "
                "take grpo or rloo for several"
            )
    else:
        require_trl()
        for name in settings.arguments:
            if name in _OURS:
                raise ValueError(
                    f"arguments must leave {name!r} to {_OURS[name]}, got {settings.arguments[name]!r}"
                )
    _lora(settings)


def _ppo(
    settings: VLMSettings,
    model: Any,
    processor: Any,
    document: dict[str, Any],
    out: Path,
    say: Callable[[str], None],
) -> bool:
    """The part of :func:`finetune` that is PPO's."""
    transformers.set_seed(settings.seed)
    if settings.lora:
        from peft import get_peft_model

        model = get_peft_model(model, _lora(settings))
    default = _RATES["ppo"][0 if settings.lora else 1]
    learner = vlm_ppo.Learner(VLMPolicy(model, processor, settings), settings.learning_rate or default)
    try:
        learner.learn(lambda step, row: _say(say, step, settings.steps, row))
    except (KeyboardInterrupt, NonFiniteGradientError) as error:
        failure: BaseException | None = error
    else:
        failure = None
    trained = model.merge_and_unload() if settings.lora else model
    _save(trained, processor, document, learner.log, learner.steps, out)
    if isinstance(failure, NonFiniteGradientError):
        raise failure
    return failure is None


def check_out(out: str | os.PathLike[str]) -> Path:
    """A folder that a fine-tuned model may be written into, else a ``ValueError``."""
    path = files.check_out(out, "fine-tuned model")
    if (path / SETTINGS).exists():
        raise ValueError(f"out={str(out)!r} holds a fine-tuned model already: choose another folder")
    if (path / "config.json").exists():
        raise ValueError(f"out={str(out)!r} holds a model (config.json): choose another folder")
    return path


def pairs(policy: VLMPolicy, first: int, count: int, say: Callable[[str], None] = lambda line: None) -> Any:
    """Pairs of a better and a worse answer to the same episode, for DPO, ranked by the environment.

    The model answers each episode ``settings.generations`` times; the answers with the highest and the lowest score
    are the pair. Where all score the same, the oracle's answer is the better one, unless they are all as good as it.

    Args:
        policy: the model that answers.
        first: seed of the first episode; the next ones count on.
        count: episodes.

    Returns:
        A data set with ``prompt``, ``image``, ``seed``, ``chosen`` and ``rejected``, one row an episode that has a pair.

    Raises:
        ValueError: if none has: the model is as good as the oracle.
    """
    episodes, n = policy.episodes, policy.settings.generations
    seeds, chosen, rejected, own = [], [], [], 0
    size = max(1, policy.batch_size // n)
    for start in range(first, first + count, size):
        some = range(start, min(start + size, first + count))
        many = [seed for seed in some for _ in range(n)]
        observations = episodes.observe(many)
        texts = policy.generate(
            episodes.conversations(observations), episodes.pictures(observations), deterministic=False
        )
        scores = episodes.score(many, texts).rewards.reshape(-1, n)
        best = episodes.oracle(some)
        perfect = episodes.score(some, best).rewards
        for i, seed in enumerate(some):
            high, low = int(scores[i].argmax()), int(scores[i].argmin())
            tie = scores[i, high] == scores[i, low]
            if tie and scores[i, high] >= perfect[i]:
                continue
            seeds.append(seed)
            chosen.append(best[i] if tie else texts[i * n + high])
            rejected.append(texts[i * n + low])
            own += not tie
    if not seeds:
        raise ValueError(f"dpo finds no pair in {count} episodes: every answer is as good as the oracle's")
    say(f"{len(seeds):,} pairs from {count:,} episodes, {own:,} of them between two answers of the model")
    return episodes.dataset(seeds, chosen=chosen, rejected=rejected)


def _arguments(settings: VLMSettings, out: Path, device: str, max_tokens: int) -> dict[str, Any]:
    """Arguments of TRL's configuration."""
    on_gpu = device != "cpu"
    rates = _RATES[settings.algo]
    arguments: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch,
        "learning_rate": settings.learning_rate or rates[0 if settings.lora else 1],
        "seed": settings.seed,
        "use_cpu": not on_gpu,
        "bf16": on_gpu,
        "gradient_checkpointing": on_gpu,
        "logging_steps": max(1, settings.steps // 100),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if settings.algo != "sft" and settings.kl is not None:
        arguments["beta"] = settings.kl
    if settings.algo in ("grpo", "rloo"):
        arguments |= {
            "num_generations": settings.generations,
            "max_completion_length": max_tokens,
            "temperature": settings.temperature,
        }
    else:
        # A cut would tear placeholders of a picture apart.
        arguments |= {"max_length": None, "remove_unused_columns": False}
    return {**arguments, **settings.arguments}


def _lora(settings: VLMSettings) -> Any:
    if not settings.lora:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("adapters (lora over 0) need PEFT: pip install 'mmenvs[vlm]'") from error
    return LoraConfig(
        r=settings.lora, lora_alpha=2 * settings.lora, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def _progress(say: Callable[[str], None]) -> transformers.TrainerCallback:
    class Progress(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                _say(say, state.global_step, state.max_steps, logs or {})

    return Progress()


def _say(say: Callable[[str], None], step: int, steps: int, logs: Mapping[str, Any]) -> None:
    values = [f"{name} {float(logs[name]):.3f}" for name in _SHOWN if name in logs]
    if values:
        say(f"{step:,} / {steps:,}: {', '.join(values)}")


def _document(settings: VLMSettings) -> dict[str, Any]:
    """What is written about a training; a ``TypeError`` before it, rather than after, if it can't be."""
    source = settings.env_kwargs.get("source")
    kept = {
        key: value for key, value in settings.env_kwargs.items() if key != "source" or isinstance(source, str)
    }
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    if settings.algo != "ppo":
        versions["trl"] = require_trl().__version__
    document = {
        "format": FORMAT,
        "settings": asdict(replace(settings, env_kwargs=kept, arguments=dict(settings.arguments))),
        "versions": versions,
    }
    try:
        json.dumps(document)
    except TypeError as error:
        raise TypeError(f"env_kwargs and arguments must be values that JSON can hold: {error}") from None
    return document


def _save(
    model: Any, processor: Any, document: dict[str, Any], log: list[dict[str, Any]], steps: int, out: Path
) -> None:
    """Write the whole model; its settings last, so that a save that was cut off isn't taken for a model."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        for file in sorted(Path(temporary).iterdir()):
            os.replace(file, out / file.name)
    with files.replacing(out / "log.json") as file:
        file.write_text(json.dumps(log, indent=1))
    with files.replacing(out / SETTINGS) as file:
        file.write_text(json.dumps({**document, "steps": steps}, indent=2))


def require_trl() -> Any:
    """TRL, or an ``ImportError`` that says how it is installed."""
    try:
        import trl
    except ImportError as error:
        raise ImportError(
            "fine-tuning vision-language models needs TRL: pip install 'mmenvs[vlm]'"
        ) from error
    return trl
