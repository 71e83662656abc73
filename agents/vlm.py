"""Vision-language models of Hugging Face as agents: loading, playing. ``vlm_finetuning.py`` trains them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gymnasium.vector import VectorEnv, VectorWrapper
from PIL import Image
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from mmenvs.checks import check_env_kwargs, integer_in, one_of
from mmenvs.datasets import open_source
from mmenvs.embeddings.embedding import resolve_device
from mmenvs.embeddings.pretrained_files import PROCESSORS, check_folder, find_folder, loading, read_config
from mmenvs.integrations.trl import CaptionReader, TextEpisodes

FORMAT = 1
SETTINGS = "vlm.json"
ALGOS = ("sft", "grpo", "rloo", "dpo", "ppo")


@dataclass(frozen=True)
class VLMSettings:
    """All that it takes to fine-tune a vision-language model again.

    Attributes:
        id, env_kwargs: environment with one picture; its split is that of the training. A ``source`` may be the
            text that names one, such as ``"vqav2:FOLDER"``, which is kept with the model; a reader isn't.
        model: folder or Hugging Face name of a model that ``AutoModelForImageTextToText`` loads.
        algo: ``"sft"`` (cross-entropy on what the oracle says), ``"grpo"`` (Shao et al. 2024), ``"rloo"``
            (Ahmadian et al. 2024), ``"dpo"`` (Rafailov et al. 2023) or ``"ppo"`` (Schulman et al. 2017; see
            ``vlm_ppo.py``).
        lora: rank of the adapters (Hu et al. 2021) beside every linear layer; 0 trains all weights.
        steps: updates.
        batch: what an update sees on each device, as often as ``gradient_accumulation_steps`` among ``arguments`` says:
            answers for grpo and rloo, a multiple of ``generations``; answers to as many episodes for ppo; episodes for
            sft; pairs for dpo.
        generations: answers to the same episode; dpo takes its pair out of as many. Not for sft and ppo.
        learning_rate: at the start; it falls linearly to 0. None is what is usual for the algorithm.
        kl: weight of the divergence from the model before; None is TRL's for the algorithm, and 0 for ppo.
            sft has none.
        temperature: of the answers in training.
        max_tokens: of an answer; None is room for the longest one of the task.
        prompt, lowest: as for :class:`mmenvs.integrations.trl.TextEpisodes`.
        seed: of adapters, answers and episodes.
        arguments: further arguments of TRL's configuration, by its names, such as ``{"loss_type": "dr_grpo"}``; for
            ppo those of :class:`mmenvs_agents.vlm_ppo.TokenPPO`, such as ``{"epochs": 4}``.
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
        if not isinstance(self.model, str) or not self.model:
            raise ValueError(f"model must be the folder or Hugging Face name of a model, got {self.model!r}")
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
        said: list[str] = []
        for first in range(0, len(conversations), self.batch_size):
            rows = slice(first, first + self.batch_size)
            tokens = self.sample(self.inputs(conversations[rows], pictures[rows]), deterministic)
            said += self.texts(tokens)
        return said

    def inputs(self, conversations: Sequence[Any], pictures: Sequence[Image.Image]) -> Any:
        """What the model reads of n conversations, up to its answers: padded on the left, on its device."""
        return self.processor(
            images=[[picture] for picture in pictures],
            text=self.processor.apply_chat_template(
                list(conversations), tokenize=False, add_generation_prompt=True
            ),
            padding=True,
            padding_side="left",
            add_special_tokens=False,  # the chat template has written them
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)

    @torch.no_grad()
    def sample(self, inputs: Any, deterministic: bool = False) -> torch.Tensor:
        """Answers to ``inputs``, int64 ``(n, T)``, padded on the right."""
        output = self.model.generate(**inputs, generation_config=self.decoding(deterministic))
        return output[:, inputs["input_ids"].shape[1] :]

    def texts(self, tokens: torch.Tensor) -> list[str]:
        """What ``tokens`` ``(n, T)`` say, special ones left out."""
        return self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def decoding(self, deterministic: bool) -> transformers.GenerationConfig:
        """How answers are drawn: the most likely tokens, or any by its probability."""
        how: dict[str, Any] = {"do_sample": False}
        if not deterministic:
            how = {"do_sample": True, "temperature": self.settings.temperature, "top_k": 0, "top_p": 1.0}
        tokenizer = self.processor.tokenizer
        ends = self.model.generation_config.eos_token_id
        return transformers.GenerationConfig(
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
    model, processor = read_model(source, half=device != "cpu")
    return model.to(device), processor


def find_model(source: str) -> Path:
    """The folder of a vision-language model, before anything of it is loaded.

    Raises:
        FileNotFoundError, ValueError: as of :func:`load_model`.
    """
    folder = find_folder(source, local_files_only=os.environ.get("HF_HUB_OFFLINE") == "1")
    check_folder(folder, source, PROCESSORS)
    config = read_config(folder, source)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(
            f"model {source!r} is of the type {config.model_type!r}, which isn't a vision-language model: "
            "AutoModelForImageTextToText has none of it"
        )
    return folder


def read_model(source: str, half: bool) -> tuple[Any, Any]:
    """The model, in bfloat16 if ``half``, on the CPU, and its processor."""
    folder = find_model(source)
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


def load(
    folder: str | os.PathLike[str], device: str = "auto", env_kwargs: Mapping[str, Any] | None = None
) -> VLMPolicy:
    """The agent that :func:`mmenvs_agents.vlm_finetuning.finetune` left in ``folder``.

    Args:
        folder: where it was saved.
        device: as for :func:`load_model`.
        env_kwargs: takes the place of single saved arguments of the environment.

    Raises:
        FileNotFoundError: if the folder or one of its files is missing.
        ValueError: if the files are damaged or of another format.
    """
    check_env_kwargs(env_kwargs)
    settings, steps = _read_settings(Path(folder))
    settings = replace(settings, env_kwargs={**settings.env_kwargs, **(env_kwargs or {})})
    policy = VLMPolicy(*load_model(str(folder), device), settings)
    policy.num_timesteps = steps
    return policy


def _read_settings(folder: Path) -> tuple[VLMSettings, int]:
    """The settings of a fine-tuned model and how many updates it had."""
    if not (folder / SETTINGS).is_file():
        raise FileNotFoundError(f"no fine-tuned model in {str(folder)!r}: there is no {SETTINGS}")
    problem = f"cannot load the fine-tuned model in {str(folder)!r}: "
    try:
        document = json.loads((folder / SETTINGS).read_text())
        found = document["format"]
        if found != FORMAT:
            raise ValueError(f"it has format {found!r}, this version reads format {FORMAT}")
        return VLMSettings(**document["settings"]), integer_in("steps", document["steps"], 0, 10**15)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{problem}{SETTINGS} is damaged: {error}") from error


def player(source: str, id: str, env_kwargs: Mapping[str, Any], device: str = "auto") -> VLMPolicy:
    """A model as an agent for an environment: with its own prompt if it was fine-tuned for it, else as it is."""
    if (Path(source) / SETTINGS).is_file() and _read_settings(Path(source))[0].id == id:
        return load(source, device, env_kwargs)
    return zero_shot(VLMSettings(id=id, model=source, env_kwargs=env_kwargs), device)
