"""Contrastive pretraining of the joint embedding on the procedural world; ``mmenvs pretrain`` runs it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor, nn

import mmenvs
from mmenvs.checks import integer_in, one_of
from mmenvs.embeddings.extractor import Precision
from mmenvs.embeddings.fusion import Concat
from mmenvs.embeddings.joint import FILE, JointConfig, JointEmbedding, save_joint
from mmenvs.embeddings.optimizers import Muon, load_state_tensors, state_tensors
from mmenvs.files import check_out, out_folder, replacing
from mmenvs.interrupts import asked_to_stop
from mmenvs.world import questions
from mmenvs.world.pairs import PairedScenes
from mmenvs.world.words import VOCABULARY

MODALITIES = ("image", "text", "audio")
LOSSES = ("infonce", "sigmoid")
STATE = "training.safetensors"
_IMAGE_TOKENS = 16


@dataclass(frozen=True)
class PretrainSettings:
    """All that a pretraining run depends on.

    Attributes:
        modalities: which of image, text and audio; the image is what the others are bound to.
        loss: ``"infonce"`` or ``"sigmoid"``.
        steps: number of updates.
        batch: scenes of an update, and questions of an update.
        difficulties: levels of the world; each update takes the next one.
        twins: half of the scenes of an update are twins of the other half, see :class:`PairedScenes`.
        film: films of this many frames take the picture's place in every fourth round of the levels; 0 is never.
        learning_rate: of Adam, at the start; Muon's is 20 times that. Both fall linearly to 2 %.
        seed: of weights and scenes.
        precision: of the encoders, as for :class:`~mmenvs.embeddings.Extractor`; losses are float32.
    """

    modalities: tuple[str, ...] = MODALITIES
    loss: str = "infonce"
    steps: int = 50_000
    batch: int = 256
    difficulties: tuple[int, ...] = (0, 1, 2, 3)
    twins: bool = True
    film: int = 2
    learning_rate: float = 1e-3
    seed: int = 0
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        for name in self.modalities:
            one_of("modalities", name, MODALITIES)
        if "image" not in self.modalities or len(set(self.modalities)) < 2:
            raise ValueError(
                f"modalities must hold image and at least one of text and audio, got {self.modalities}"
            )
        one_of("loss", self.loss, LOSSES)
        one_of("precision", self.precision, ("float32", "bfloat16"))
        integer_in("steps", self.steps, 1, 10**9)
        integer_in("batch", self.batch, 2, 2**16)
        integer_in("film", self.film, 0, 64)
        if not self.difficulties:
            raise ValueError("difficulties must name a level at least, got none")


def infonce(a: Tensor, b: Tensor, same: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE (Radford et al. 2021, CLIP), with every matching pair of the batch as a target.

    Scenes that are told alike match each other's captions, so each row's target is uniform over its matches
    (as in supervised contrastive learning, Khosla et al. 2020).

    Args:
        a, b: ``(B, d)`` of unit length.
        same: ``(B, B)`` bool, True where row i of ``a`` matches row j of ``b``; symmetric.
        scale: the inverse temperature, a scalar.
    """
    logits = scale * a @ b.T  # (B, B)
    target = same.float() / same.sum(1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def sigmoid_loss(a: Tensor, b: Tensor, same: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Pairwise sigmoid loss (Zhai et al. 2023, SigLIP): each pair is judged by itself.

    Args as for :func:`infonce`; ``bias`` is a scalar, far below 0 at first, as most pairs don't match.
    """
    logits = scale * a @ b.T + bias
    signs = same.to(logits.dtype) * 2 - 1  # (B, B)
    return -F.logsigmoid(signs * logits).sum() / len(a)


class _Asker(nn.Module):
    """Picture and question to the joint space, where the answer's word should lie; used in training only.

    Captions ask nothing of a question's words and tell nothing of places. Asked once of the picture's tokens
    and once of its pooled vector, both learn to keep what questions want to know.
    """

    def __init__(self, config: JointConfig) -> None:
        super().__init__()
        width, dim = config.width, config.dim
        self.question = nn.Linear(dim, width)
        self.fuse = Concat({"image": _IMAGE_TOKENS, "question": 1}, width, 2 * dim)
        self.seen = nn.Linear(2 * dim, dim)
        self.pooled = nn.Sequential(
            nn.Linear(2 * dim, 4 * dim),
            nn.ReLU(),
            nn.Linear(4 * dim, 2 * dim),
            nn.ReLU(),
            nn.Linear(2 * dim, dim),
        )

    def forward(self, image: tuple[Tensor, Tensor], question: Tensor) -> tuple[Tensor, Tensor]:
        tokens = {"image": image[1], "question": self.question(question).unsqueeze(1)}
        masks = {name: x.new_ones(x.shape[:2], dtype=torch.bool) for name, x in tokens.items()}
        return self.seen(self.fuse(tokens, masks)), self.pooled(torch.cat([image[0], question], -1))


class Pretraining:
    """A pretraining run: model, data and optimiser, saved and resumed together.

    Args:
        settings: what to run.
        device: ``"cpu"`` or a CUDA device.
    """

    def __init__(self, settings: PretrainSettings, device: str = "cpu") -> None:
        self.settings, self.device, self.done = settings, device, 0
        torch.manual_seed(settings.seed)
        self.model = JointEmbedding().to(device)
        self.asker = _Asker(self.model.config).to(device)
        # CLIP's start for the temperature, SigLIP's for the bias.
        self.scales = nn.ParameterDict(
            {name: nn.Parameter(torch.tensor(2.65)) for name in ("text", "audio", "answer")}
        ).to(device)
        self.biases = nn.ParameterDict(
            {name: nn.Parameter(torch.tensor(-10.0)) for name in ("text", "audio")}
        ).to(device)
        self.trained = nn.ModuleList([self.model, self.asker, self.scales, self.biases])
        self.optimizer = Muon(self.trained, lr=settings.learning_rate)
        self.scenes = [
            PairedScenes(
                settings.batch,
                difficulty=d,
                split="train",
                frames=settings.film,
                twins=settings.twins,
                seed=settings.seed,
            )
            for d in settings.difficulties
        ]
        self.asked: list[Any] = [
            gym.make_vec("MMRL/VQA-v0", num_envs=settings.batch, difficulty=d) for d in settings.difficulties
        ]
        answers = [VOCABULARY.encode(answer, 1) for answer in questions.ANSWERS]
        self.answers = torch.as_tensor(np.stack(answers), device=device)  # (34, 1)

    def step(self) -> dict[str, float]:
        """One update; its losses and, for each pair of modalities, the accuracy within the batch."""
        settings, log = self.settings, {}
        level = self.done % len(settings.difficulties)
        batch = self.scenes[level].next()
        same = torch.as_tensor(batch["objects"][:, None] == batch["objects"][None], device=self.device)
        if settings.film and (self.done // len(settings.difficulties)) % 4 == 3:
            image = self._encode(self.model.encode_film, self._pictures(batch["film"]))[0]
        else:
            image = self._encode(self.model.encode_image, self._pictures(batch["image"]))[0]
        others = {"text": self.model.encode_text, "audio": self.model.encode_audio}
        inputs = {"text": batch["caption"], "audio": batch["audio"]}
        loss = image.new_zeros(())
        a = F.normalize(image, dim=-1)
        for name, encode in others.items():
            if name in settings.modalities:
                b = F.normalize(
                    self._encode(encode, torch.as_tensor(inputs[name], device=self.device))[0], dim=-1
                )
                scale = self.scales[name].exp().clamp(max=100.0)
                if settings.loss == "infonce":
                    part = infonce(a, b, same, scale)
                else:
                    part = sigmoid_loss(a, b, same, scale, self.biases[name])
                loss = loss + part
                hit = same[torch.arange(len(a)), (a @ b.T).argmax(1)]
                log[f"loss/image_{name}"], log[f"accuracy/image_{name}"] = (
                    part.item(),
                    hit.float().mean().item(),
                )
        if "text" in settings.modalities:
            part, accuracy = self._ask(level)
            loss = loss + part
            log["loss/answer"] = part.item()
            log["accuracy/answer_tokens"], log["accuracy/answer_pooled"] = accuracy
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.done}; a lower learning_rate may help"
            )
        remaining = max(1 - self.done / settings.steps, 0.02)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * remaining
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained.parameters(), 1.0)
        self.optimizer.step()
        self.done += 1
        return log

    def _ask(self, level: int) -> tuple[Tensor, list[float]]:
        """Questions about pictures: InfoNCE against the words of all answers, in the joint space."""
        envs = self.asked[level]
        # Episode k of a run is the same one after a resumption.
        observation, _ = envs.reset(seed=self.settings.seed + (self.done + 1) * self.settings.batch)
        right = torch.as_tensor(envs.oracle_actions(), device=self.device)
        image = self._encode(self.model.encode_image, self._pictures(observation["image"]))
        asked = torch.as_tensor(observation["question"], device=self.device)
        question = self._encode(self.model.encode_text, asked)[0]
        words = F.normalize(self._encode(self.model.encode_text, self.answers)[0], dim=-1)  # (34, dim)
        scale = self.scales["answer"].exp().clamp(max=100.0)
        loss, accuracy = image[0].new_zeros(()), []
        for said in self._encode(self.asker, image, question):
            said = said.float()
            logits = scale * F.normalize(said, dim=-1) @ words.T  # (B, 34)
            loss = loss + F.cross_entropy(logits, right)
            accuracy.append((logits.argmax(1) == right).float().mean().item())
        return loss, accuracy

    def _encode(self, encode: Callable[..., tuple[Tensor, Tensor]], *inputs: Any) -> tuple[Tensor, Tensor]:
        with torch.autocast(
            torch.device(self.device).type, torch.bfloat16, enabled=self.settings.precision == "bfloat16"
        ):
            return encode(*inputs)

    def _pictures(self, pixels: np.ndarray) -> Tensor:
        return torch.as_tensor(pixels, device=self.device).movedim(-1, -3).float() / 255.0

    def save(self, folder: Path) -> None:
        """Write ``joint.safetensors`` and all that goes on from here (``training.safetensors``, ``training.json``)."""
        folder.mkdir(parents=True, exist_ok=True)
        save_joint(self.model, folder / FILE, self.card())
        tensors = {f"trained.{k}": v.contiguous() for k, v in self.trained.state_dict().items()}
        tensors |= state_tensors(self.optimizer)
        # The step stands in the same file as the weights, so that a kill between two files can't part them.
        metadata = {"done": str(self.done), "settings": json.dumps(asdict(self.settings))}
        with replacing(folder / STATE) as file:
            file.write_bytes(serialise(tensors, metadata))

    def resume(self, folder: Path) -> None:
        """Go on from :meth:`save`.

        More ``steps`` than it was begun with stretch the schedule from here on.

        Raises:
            FileNotFoundError: if nothing was saved there.
            ValueError: if it was run with other settings, or has these steps behind it.
        """
        settings, done = read_settings(folder)
        mine, saved = asdict(self.settings), asdict(settings)
        for name in mine:
            if mine[name] != saved[name] and name not in ("steps", "precision"):
                raise ValueError(
                    f"{name} of the run in {str(folder)!r} is {saved[name]!r}, not {mine[name]!r}"
                )
        if self.settings.steps <= done:
            raise ValueError(f"steps must be over the {done} already done, got {self.settings.steps}")
        tensors = load_file(folder / STATE, self.device)
        self.trained.load_state_dict(
            {k.removeprefix("trained."): v for k, v in tensors.items() if k.startswith("trained.")}
        )
        load_state_tensors(self.optimizer, tensors)
        self.done = done
        for level, scenes in enumerate(self.scenes):
            rounds = len(range(level, self.done, len(self.scenes)))
            scenes.drawn = rounds * self.settings.batch

    def card(self) -> dict[str, Any]:
        """What the weights are, for the file's metadata."""
        return {
            "trained_on": "MMRL procedural world, train split",
            "never_seen": "val, test and compositional splits",
            "settings": asdict(self.settings),
            "steps": self.done,
            "versions": {"mmenvs": mmenvs.__version__, "torch": torch.__version__},
        }


def read_settings(folder: Path) -> tuple[PretrainSettings, int]:
    """The settings of the run that was saved in ``folder``, and how many steps it had done.

    Raises:
        FileNotFoundError: if nothing was saved there.
        ValueError: if the file is damaged.
    """
    path = folder / STATE
    if not path.is_file():
        raise FileNotFoundError(f"no pretraining to resume in {str(folder)!r}: there is no {STATE}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        saved = json.loads(metadata["settings"])
        lists = {name: tuple(value) for name, value in saved.items() if isinstance(value, list)}
        return PretrainSettings(**{**saved, **lists}), int(metadata["done"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from error


def pretrain(
    settings: PretrainSettings,
    out: Path,
    *,
    device: str = "cpu",
    resume: bool = False,
    save_steps: int = 500,
    report: Callable[[int, dict[str, float]], None] | None = None,
) -> JointEmbedding:
    """Run a pretraining and keep it in ``out``; Ctrl-C ends it after the update in hand, and it is saved.

    Args:
        settings: what to run.
        out: folder for ``joint.safetensors``, the state to resume from and TensorBoard logs.
        device: ``"cpu"`` or a CUDA device.
        resume: go on with the run in ``out``.
        save_steps: updates between two saves.
        report: called with the step and the means of the logged values since the last call.

    Raises:
        ValueError: if ``out`` holds results already, and ``resume`` is False or they are of another kind, or can't be
            written to.
        KeyboardInterrupt: if Ctrl-C ended it.
    """
    from torch.utils.tensorboard import SummaryWriter

    if not resume and (out / STATE).exists():
        raise ValueError(
            f"out={str(out)!r} holds a pretraining: go on with --resume, or choose another folder"
        )
    check_out(out, "pretraining")
    run = Pretraining(settings, device)
    if resume:
        run.resume(out)
    out_folder(out)
    writer = SummaryWriter(str(out))
    logs: list[dict[str, float]] = []
    begin = time.perf_counter()
    first = run.done
    with asked_to_stop() as asked, closing(writer):
        while run.done < settings.steps and not asked():
            logs.append(run.step())
            if run.done % 50 == 0 or run.done == settings.steps:
                means = {k: float(np.mean([log[k] for log in logs])) for k in logs[0]}
                means["scenes_per_second"] = (
                    (run.done - first) * settings.batch / (time.perf_counter() - begin)
                )
                for name, value in means.items():
                    writer.add_scalar(name, value, run.done)
                if report is not None:
                    report(run.done, means)
                logs = []
            if run.done % save_steps == 0:
                run.save(out)
        run.save(out)
        if run.done < settings.steps:
            raise KeyboardInterrupt
    return run.model.eval().requires_grad_(False)
