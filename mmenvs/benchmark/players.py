"""Agents by name: which there are, what they are trained on, and how a run makes one."""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium as gym

from mmenvs.benchmark.summary import BASELINES, encoder_of
from mmenvs.checks import one_of
from mmenvs.embeddings import FUSIONS
from mmenvs.embeddings.encoders import weights_version
from mmenvs.files import content_hash
from mmenvs.registry import task_class
from mmenvs.spaces import modality_of

BLIND = "blind:"
POLICY = "policy:"
VLM = "hf:"
TRANSFORMER = "transformer"
BLIND_LEARNS_BY = "ppo"
MODALITIES = ("image", "text", "audio")
_ALSO = {"images": "image"}  # a set of pictures is seen as one is


def check(name: str) -> str:
    """``name`` if there is such an agent.

    Raises:
        ValueError: if there isn't, with those that there are.
        ImportError: if what it needs isn't installed, or a policy of one's own can't be imported.
        FileNotFoundError: if there is no such vision-language model.
        TypeError: if a policy of one's own has no ``predict``.
    """
    kind, _, rest = name.partition(":")
    if name.startswith(POLICY):
        policy_class(name)
    elif name.startswith(VLM):
        if not rest:
            raise ValueError("policy 'hf:' must name a folder or a model of Hugging Face, as in 'hf:FOLDER'")
        _vlm().find_model(rest)
    elif name.startswith(BLIND):
        if rest not in MODALITIES:
            raise ValueError(f"blind:<modality> must name one of {', '.join(MODALITIES)}, got {name!r}")
    elif kind == TRANSFORMER:
        if name != TRANSFORMER:
            one_of("transformer:<algo>", rest, _methods())
    elif name not in BASELINES and name not in _recipes():
        allowed = (
            *BASELINES,
            "blind",
            *(BLIND + m for m in MODALITIES),
            *_recipes(),
            TRANSFORMER,
            f"{TRANSFORMER}:<algo>",
        )
        raise ValueError(f"agents must name some of {', '.join(allowed)}, got {name!r}")
    elif name in ("trpo", "qrdqn", "recurrent_ppo") and importlib.util.find_spec("sb3_contrib") is None:
        raise ImportError(f"{name!r} needs sb3-contrib: pip install sb3-contrib")
    return name


def policy_name(given: str) -> str:
    """The agent that ``--policy`` names: ``hf:model`` or ``policy:module:Class``."""
    return given if given.startswith(VLM) else POLICY + given


def trains(name: str) -> bool:
    """Whether it learns: of baselines and vision-language models, which don't, one run is enough."""
    return name not in BASELINES and not name.startswith(VLM)


def embeddings(name: str, given: Sequence[str]) -> tuple[str, ...]:
    """The embeddings it is made with: of the transformer the encoders alone, as its fusion is always its default."""
    if name in BASELINES or name.startswith((POLICY, VLM)):
        return ("",)
    if name.partition(":")[0] == TRANSFORMER:
        return tuple(dict.fromkeys(map(encoder_of, given)))
    return tuple(given)


def plays(name: str, space: Mapping[str, Any]) -> bool:
    """Whether there is such an agent for the observations of ``space``: some are blind, some see one picture."""
    if name.startswith(VLM):
        kinds = [modality_of(part) for part in space.values()]
        return kinds.count("image") == 1 and not {"images", "audio"} & set(kinds)
    return sees(name, space) != ()


def sees(name: str, space: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The observations that a blind agent sees of ``space``; None for all others, which see everything.

    Returns:
        Empty if it would see all or nothing, so that there is no such blind agent here.
    """
    if not name.startswith(BLIND):
        return None
    kinds = modalities(space)
    seen = tuple(key for key, kind in kinds.items() if kind != name.removeprefix(BLIND))
    return seen if len(seen) < len(kinds) else ()


def modalities(space: Mapping[str, Any]) -> dict[str, str]:
    """``image``, ``text`` or ``audio`` (or another modality) of each observation."""
    found = {key: modality_of(part) for key, part in space.items()}
    return {key: _ALSO.get(kind, kind) for key, kind in found.items()}


def make(run: Mapping[str, Any], device: str) -> Any:
    """The untrained agent of a run: something with ``predict``, or the name of a baseline."""
    name, id = run["agent"], run["id"]
    env_kwargs = {"difficulty": run["difficulty"]}
    if name in BASELINES:
        return name
    if name.startswith(POLICY):
        return _own(name, id, env_kwargs, run["seed"])
    if name.startswith(VLM):
        return _vlm().player(name.removeprefix(VLM), id, env_kwargs, device)
    from mmenvs.benchmark.compare import plan
    from mmenvs.benchmark.measure import space_of

    common = {"seed": run["seed"], "device": device, "env_kwargs": env_kwargs}
    kind, _, method = name.partition(":")
    if kind == TRANSFORMER:
        chosen = plan(f"{run['embedding']}+concat", id, env_kwargs)["encoders"]
        # What an episode has said so far it knows as its own actions, and encodes no second time.
        history = getattr(task_class(id), "history", ())
        encoders = {key: encoder for key, encoder in chosen.items() if key not in history}
        agent = importlib.import_module("mmenvs_agents.transformer.agent").TransformerAgent
        return agent(id, method=method or "ppo", encoders=encoders, **common)
    chosen = plan(run["embedding"], id, env_kwargs)
    sb3 = importlib.import_module("mmenvs_agents.sb3")
    visible = sees(name, space_of(id, env_kwargs))
    return sb3.make_agent(BLIND_LEARNS_BY if visible else name, id, visible=visible, **common, **chosen)


def policy_class(name: str) -> Any:
    """The class or function that ``policy:module:Class`` names.

    Raises:
        ValueError, ImportError, TypeError: if there is none, or nothing that predicts.
    """
    module, _, attribute = name.removeprefix(POLICY).partition(":")
    if not module or not attribute:
        raise ValueError(f"policy must be 'module:Class' or 'hf:MODEL', got {name.removeprefix(POLICY)!r}")
    # The folder one works in is where one's own modules are.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        raise ImportError(
            f"policy: module {module!r} can't be imported: {type(error).__name__}: {error}"
        ) from error
    if found is None:
        raise ImportError(f"policy: module {module!r} has no {attribute!r}")
    if not callable(getattr(found, "predict", None)):
        raise TypeError(f"policy: {module}:{attribute} has no method predict")
    return found


@cache
def policy_code(name: str) -> str:
    """A hash of the module of ``policy:module:Class``, or of the files of ``hf:model``; empty for other agents."""
    if name.startswith(VLM):
        folder = _vlm().find_model(name.removeprefix(VLM))
        return content_hash(path for path in folder.iterdir() if path.is_file())
    if not name.startswith(POLICY):
        return ""
    spec = importlib.util.find_spec(name.removeprefix(POLICY).partition(":")[0])
    origin = spec.origin if spec is not None else None
    return hashlib.sha256(Path(origin).read_bytes()).hexdigest()[:12] if origin else ""


@cache
def package_version() -> str:
    """A hash of what the scores depend on: the Python files and the weights of mmenvs and mmenvs_agents."""
    found = hashlib.sha256()
    for package in ("mmenvs", "mmenvs_agents"):
        folder = Path(str(importlib.import_module(package).__file__)).parent
        for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.safetensors")]):
            found.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def code_version(agent: str, embedding: str = "") -> str:
    """The version of the code that an agent's scores come from; with that of a module or weights from elsewhere.

    Args:
        agent, embedding: of a run.
    """
    encoder, _, fusion = embedding.rpartition("+")
    own = policy_code(agent) or weights_version(encoder if fusion in FUSIONS else embedding)
    return f"{package_version()}+{own}" if own else package_version()


def _own(name: str, id: str, env_kwargs: Mapping[str, Any], seed: int) -> Any:
    """A policy of one's own, with those of ``id, env_kwargs, observation_space, action_space, seed`` it takes."""
    cls = policy_class(name)
    if not isinstance(cls, type):
        return copy.deepcopy(cls)  # so that no run begins with what another has learned
    env = gym.make(id, **env_kwargs)
    given = {
        "id": id,
        "env_kwargs": dict(env_kwargs),
        "observation_space": env.observation_space,
        "action_space": env.action_space,
        "seed": seed,
    }
    env.close()
    taken = inspect.signature(cls).parameters
    return cls(**{key: value for key, value in given.items() if key in taken})


def _recipes() -> tuple[str, ...]:
    return tuple(importlib.import_module("mmenvs_agents.recipes").RECIPES)


def _methods() -> tuple[str, ...]:
    return tuple(importlib.import_module("mmenvs_agents.transformer.algorithms").RECIPES)


def _vlm() -> Any:
    return importlib.import_module("mmenvs_agents.vlm")
