"""Vision-language models of Hugging Face: fine-tuning on an environment through TRL, and playing in it."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gymnasium.vector import VectorEnv, VectorWrapper
from PIL import Image
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from mmenvs.checks import integer_in, one_of
from mmenvs.datasets import open_source
from mmenvs.embeddings.embedding import resolve_device
from mmenvs.embeddings.pretrained_files import check_folder, find_folder, loading, read_config
from mmenvs.files import replacing
from mmenvs.integrations.trl import CaptionReader, TextEpisodes

FORMAT = 1
SETTINGS = "vlm.json"
ALGOS = ("sft", "grpo", "rloo", "dpo")
# Learning rates that are usual for LoRA, and for all weights.
_RATES = {"sft": (2e-4, 2e-5), "grpo": (1e-5, 1e-6), "rloo": (1e-5, 1e-6), "dpo": (5e-6, 5e-7)}


@dataclass(frozen=True)
class VLMSettings:
    """All that it takes to fine-tune a vision-language model again.

    Attributes:
        id, env_kwargs: environment with one picture; its split is that of the training. A ``source`` may be the
            text that names one, such as ``"vqav2:FOLDER"``, which is kept with the model; a reader isn't.
        model: folder or Hugging Face name of a model that ``AutoModelForImageTextToText`` loads.
        algo: ``"sft"`` (cross-entropy on what the oracle says), ``"grpo"`` (Shao et al. 2024), ``"rloo"``
            (Ahmadian et al. 2024) or ``"dpo"`` (Rafailov et al. 2023).
        lora: rank of the adapters (Hu et al. 2021) beside every linear layer; 0 trains all weights.
        steps: updates.
        batch: what an update sees on each device: answers for grpo and rloo, a multiple of ``generations``;
            episodes for sft; pairs for dpo.
        generations: answers to the same episode; dpo takes its pair out of as many.
        learning_rate: at the start; it falls linearly to 0. None is what is usual for the algorithm.
        kl: weight of the divergence from the model before; None is TRL's for the algorithm. sft has none.
        temperature: of the answers in training.
        max_tokens: of an answer; None is room for the longest one of the task.
        prompt, lowest: as for :class:`mmenvs.integrations.trl.TextEpisodes`.
        seed: of adapters, answers and episodes.
        arguments: further arguments of TRL's configuration, by its names, such as ``{"loss_type": "dr_grpo"}``.
    """

    id: str
    model: str
    algo: str = "grpo"
    lora: int = 16
    steps: int = 200
    batch: int = 32
    generations: int = 8
    learning_rate: float | None = None
    kl: float | None = None
    temperature: float = 1.0
    max_tokens: int | None = None
    prompt: str | None = None
    lowest: float | None = None
    seed: int = 0
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_of("algo", self.algo, ALGOS)
        integer_in("lora", self.lora, 0, 4096)
        integer_in("steps", self.steps, 1, 10**9)
        integer_in("generations", self.generations, 2, 2**16)
        integer_in("batch", self.batch, 1, 2**20)
        integer_in("seed", self.seed, 0, 2**32 - 1)
        if self.max_tokens is not None:
            integer_in("max_tokens", self.max_tokens, 1, 2**16)
        if self.algo in ("grpo", "rloo") and self.batch % self.generations:
            raise ValueError(
                f"batch must be a multiple of generations={self.generations} for {self.algo}, got {self.batch}"
            )
        if self.algo == "sft" and self.kl is not None:
            raise ValueError(f"kl must be None for sft, which has no reference model, got {self.kl}")
        if self.kl is not None and not 0 <= self.kl < math.inf:
            raise ValueError(f"kl must be at least 0, got {self.kl}")
        for name in ("learning_rate", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be over 0, got {value}")

    def episodes(self) -> TextEpisodes:
        """The episodes that the settings name."""
        kwargs = dict(self.env_kwargs)
        if isinstance(kwargs.get("source"), str):
            kwargs["source"] = open_source(kwargs["source"], self.id)
        return TextEpisodes(self.id, kwargs, prompt=self.prompt, lowest=self.lowest)


class Unanswered(VectorWrapper):
    """A native vector environment in which -1 is an answer that couldn't be read: the lowest score, no success.

    Args:
        envs: with autoreset mode ``SAME_STEP``.
        lowest: reward of it.
    """

    def __init__(self, envs: VectorEnv, lowest: float = 0.0) -> None:
        super().__init__(envs)
        self.lowest = lowest

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        actions = np.asarray(actions)
        silent = actions == -1
        observation, rewards, terminated, truncated, infos = self.env.step(np.where(silent, 0, actions))
        if silent.any():
            rewards = np.where(silent, self.lowest, rewards)
            final = dict(infos["final_info"])
            final["is_success"] = final["is_success"] & ~silent
            infos = {**infos, "final_info": final}
        return observation, rewards, terminated, truncated, infos


class VLMPolicy:
    """A vision-language model as an agent with ``predict``.

    Args:
        model: of ``AutoModelForImageTextToText``.
        processor: its own, with a chat template.
        settings: environment, prompt, temperature and longest answer.
        batch_size: observations that go through the model at once.

    Attributes:
        num_timesteps: updates that it was fine-tuned for.
        answers: how many texts it has given, and ``unparsable`` how many of them couldn't be read at all.
    """

    def __init__(self, model: Any, processor: Any, settings: VLMSettings, batch_size: int = 64) -> None:
        self.model, self.processor, self.settings = model.eval(), processor, settings
        self.episodes = settings.episodes()
        self.max_tokens = settings.max_tokens or longest_answer(self.episodes, processor)
        self.batch_size = batch_size
        self.num_timesteps = 0
        self.answers = self.unparsable = 0

    def wrap(self, envs: VectorEnv) -> VectorEnv:
        """What ``mmenvs_agents.evaluation.evaluate`` lets it play in: see :class:`Unanswered`."""
        return Unanswered(envs, self.episodes.lowest)

    def predict(
        self,
        observation: Mapping[str, Any],
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
    ) -> tuple[Any, Any]:
        """Actions for observations, texts as ids or as strings.

        Args:
            observation: of a vector environment, or of a single one.
            state: what the last call gave: the words of captions that are still to be said.
            episode_start: bool ``(n,)``, True where an episode has just begun; None with a state is nowhere.
            deterministic: take the most likely words (greedy) in place of sampled ones.

        Returns:
            int64 ``(n,)``, or one integer, and the state. -1 is an answer that couldn't be read.
        """
        single = np.asarray(observation[self.episodes.picture]).ndim == 3
        if single:
            observation = {key: [value] for key, value in observation.items()}
        n = len(observation[self.episodes.picture])
        plans: list[tuple[int, ...]] = [()] * n if state is None else list(state)
        starts = np.zeros(n, np.bool_) if episode_start is None else np.atleast_1d(episode_start)
        fresh = [i for i in range(n) if starts[i] or not plans[i]]
        if fresh:
            some = {key: [value[i] for i in fresh] for key, value in observation.items()}
            conversations, pictures = self.episodes.conversations(some), self.episodes.pictures(some)
            texts = self.generate(conversations, pictures, deterministic)
            for i, text in zip(fresh, texts, strict=True):
                actions = self.episodes.reader.parse(text).actions
                self.answers += 1
                self.unparsable += not actions
                plans[i] = actions or (self.episodes.reader.nothing,)
        first = np.array([plan[0] for plan in plans], np.int64)
        return (int(first[0]) if single else first), [plan[1:] for plan in plans]

    @torch.no_grad()
    def generate(
        self, conversations: Sequence[Any], pictures: Sequence[Image.Image], deterministic: bool = True
    ) -> list[str]:
        """What the model says to each of n conversations with a picture, special tokens left out."""
        tokenizer = self.processor.tokenizer
        how: dict[str, Any] = {"do_sample": False}
        if not deterministic:
            how = {"do_sample": True, "temperature": self.settings.temperature, "top_k": 0, "top_p": 1.0}
        ends = self.model.generation_config.eos_token_id
        config = transformers.GenerationConfig(
            max_new_tokens=self.max_tokens,
            pad_token_id=tokenizer.pad_token_id
            if tokenizer.pad_token_id is not None
            else tokenizer.eos_token_id,
            eos_token_id=sorted(
                {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
            ),
            suppress_tokens=[self.model.config.image_token_id],
            repetition_penalty=1.0,  # as in training
            disable_compile=True,
            **how,
        )
        said: list[str] = []
        for first in range(0, len(conversations), self.batch_size):
            rows = slice(first, first + self.batch_size)
            inputs = self.processor(
                images=[[picture] for picture in pictures[rows]],
                text=self.processor.apply_chat_template(
                    list(conversations[rows]), tokenize=False, add_generation_prompt=True
                ),
                padding=True,
                padding_side="left",
                add_special_tokens=False,  # the chat template has written them
                return_tensors="pt",
            ).to(self.model.device, self.model.dtype)
            output = self.model.generate(**inputs, generation_config=config)
            said += tokenizer.batch_decode(
                output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
        return said


def longest_answer(episodes: TextEpisodes, processor: Any) -> int:
    """Tokens that the longest answer of a task may take, the end of the turn included."""

    def tokens(text: str) -> int:
        return len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    if isinstance(episodes.reader, CaptionReader):
        words = episodes.options
        return math.ceil(tokens(" ".join(words)) / len(words) * episodes.longest) + 4
    return max(map(tokens, episodes.options)) + 4


def load_model(source: str, device: str = "auto") -> tuple[Any, Any]:
    """A vision-language model and its processor, from safetensors, without any code of theirs.

    Args:
        source: folder or Hugging Face name.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``. Half precision (bfloat16) on a GPU.

    Raises:
        FileNotFoundError: if there is no such model, or the folder lacks files.
        ValueError: if it isn't a vision-language model with a chat template, or its files are damaged.
    """
    device = resolve_device(device)
    model, processor = _read(source, half=device != "cpu")
    return model.to(device), processor


def _read(source: str, half: bool) -> tuple[Any, Any]:
    """The model, in bfloat16 if ``half``, on the CPU, and its processor."""
    folder = find_folder(source, local_files_only=os.environ.get("HF_HUB_OFFLINE") == "1")
    check_folder(folder, source, text=False)
    config = read_config(folder, source)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(
            f"model {source!r} is of the type {config.model_type!r}, which isn't a vision-language model: "
            "AutoModelForImageTextToText has none of it"
        )
    safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with loading(source, "processor"):
        processor = transformers.AutoProcessor.from_pretrained(folder, **safe)
    if not hasattr(processor, "tokenizer") or getattr(processor, "chat_template", None) is None:
        raise ValueError(f"model {source!r} has no chat template, in which prompts could be written")
    with loading(source, "weights"):
        auto: Any = transformers.AutoModelForImageTextToText
        model, info = auto.from_pretrained(
            folder,
            dtype=torch.bfloat16 if half else torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **safe,
        )
    if info["missing_keys"]:
        lacking = sorted(info["missing_keys"])
        raise ValueError(f"the weights of {source!r} lack {len(lacking)} tensors, such as {lacking[0]!r}")
    return model, processor


def zero_shot(settings: VLMSettings, device: str = "auto") -> VLMPolicy:
    """The model of the settings as an agent, before any fine-tuning."""
    model, processor = load_model(settings.model, device)
    return VLMPolicy(model, processor, settings)


def finetune(
    settings: VLMSettings,
    out: str | os.PathLike[str],
    device: str = "auto",
    say: Callable[[str], None] = lambda line: None,
) -> bool:
    """Fine-tune a model on the train split, or the one in ``env_kwargs``, and leave it in ``out``.

    ``out`` holds a whole model, adapters merged, that :func:`load` and transformers read, and ``log.json``: what TRL
    has logged. Under ``accelerate launch`` each process calls this, and the first one writes.

    Args:
        settings: what to train.
        out: folder without a fine-tuned model.
        device: as for :func:`load_model`.
        say: is handed a line of progress at a time.

    Returns:
        False if Ctrl-C ended the training early (the model is saved then too), else True.

    Raises:
        ImportError: without TRL.
        FileNotFoundError, ValueError: see :func:`load_model` and :class:`mmenvs.integrations.trl.TextEpisodes`.
    """
    trl, out, device = require_trl(), check_out(out), resolve_device(device)
    episodes = settings.episodes()
    document = _document(settings)
    # Steps of a learning rate for all weights are too small to be added to bfloat16.
    model, processor = _read(settings.model, half=device != "cpu" and settings.lora > 0)
    max_tokens = settings.max_tokens or longest_answer(episodes, processor)
    arguments = _arguments(settings, out, device, max_tokens)
    config = getattr(trl, f"{settings.algo.upper()}Config")(**arguments)
    model.to(config.device)  # the GPU of this process
    transformers.set_seed(settings.seed)
    rows = settings.batch * settings.steps * config.world_size
    common: dict[str, Any] = {
        "model": model,
        "args": config,
        "processing_class": processor,
        "peft_config": _lora(settings),
        "callbacks": [_progress(say)],
    }
    first = int(np.random.SeedSequence([settings.seed]).generate_state(1)[0])
    if settings.algo in ("grpo", "rloo"):
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
        _save(trained, processor, document, trainer.state, out)
    trainer.accelerator.wait_for_everyone()
    return finished


def check_out(out: str | os.PathLike[str]) -> Path:
    """A folder that a fine-tuned model may be written into, else a ``ValueError``."""
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise ValueError(f"out must be a folder, {str(out)!r} is a file")
    if (path / SETTINGS).exists():
        raise ValueError(f"out={str(out)!r} holds a fine-tuned model already: choose another folder")
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


def load(
    folder: str | os.PathLike[str], device: str = "auto", env_kwargs: Mapping[str, Any] | None = None
) -> VLMPolicy:
    """The agent that :func:`finetune` left in ``folder``.

    Args:
        folder: where it was saved.
        device: as for :func:`load_model`.
        env_kwargs: takes the place of single saved arguments of the environment.

    Raises:
        FileNotFoundError: if the folder or one of its files is missing.
        ValueError: if the files are damaged or of another format.
    """
    path = Path(folder)
    if not (path / SETTINGS).is_file():
        raise FileNotFoundError(f"no fine-tuned model in {str(folder)!r}: there is no {SETTINGS}")
    problem = f"cannot load the fine-tuned model in {str(folder)!r}: "
    try:
        document = json.loads((path / SETTINGS).read_text())
        found = document["format"]
        if found != FORMAT:
            raise ValueError(f"it has format {found!r}, this version reads format {FORMAT}")
        settings = VLMSettings(**document["settings"])
        steps = int(document["steps"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{problem}{SETTINGS} is damaged: {error}") from error
    settings = replace(settings, env_kwargs={**settings.env_kwargs, **(env_kwargs or {})})
    policy = VLMPolicy(*load_model(str(path), device), settings)
    policy.num_timesteps = steps
    return policy


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
    from peft import LoraConfig

    return LoraConfig(
        r=settings.lora, lora_alpha=2 * settings.lora, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def _progress(say: Callable[[str], None]) -> transformers.TrainerCallback:
    shown = ("loss", "reward", "success", "unparsable", "kl", "mean_token_accuracy", "rewards/accuracies")

    class Progress(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            values = [f"{name} {float(logs[name]):.3f}" for name in shown if name in (logs or {})]
            if values and state.is_world_process_zero:
                say(f"{state.global_step:,} / {state.max_steps:,}: {', '.join(values)}")

    return Progress()


def _document(settings: VLMSettings) -> dict[str, Any]:
    """What is written about a training; a ``TypeError`` before it, rather than after, if it can't be."""
    source = settings.env_kwargs.get("source")
    kept = {
        key: value for key, value in settings.env_kwargs.items() if key != "source" or isinstance(source, str)
    }
    document = {
        "format": FORMAT,
        "settings": asdict(replace(settings, env_kwargs=kept, arguments=dict(settings.arguments))),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": require_trl().__version__,
        },
    }
    try:
        json.dumps(document)
    except TypeError as error:
        raise TypeError(f"env_kwargs and arguments must be values that JSON can hold: {error}") from None
    return document


def _save(model: Any, processor: Any, document: dict[str, Any], state: Any, out: Path) -> None:
    """Write the whole model; its settings last, so that a save that was cut off isn't taken for a model."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        for file in sorted(Path(temporary).iterdir()):
            os.replace(file, out / file.name)
    with replacing(out / "log.json") as file:
        file.write_text(json.dumps(state.log_history, indent=1))
    with replacing(out / SETTINGS) as file:
        file.write_text(json.dumps({**document, "steps": state.global_step}, indent=2))


def require_trl() -> Any:
    """TRL, or an ``ImportError`` that says how it is installed."""
    try:
        import trl
    except ImportError as error:
        raise ImportError(
            "fine-tuning vision-language models needs TRL: pip install 'mmenvs[vlm]'"
        ) from error
    return trl
