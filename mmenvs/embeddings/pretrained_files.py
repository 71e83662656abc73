"""Folders of pretrained models: finding and checking them, and loading weights, from safetensors only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_MAPPING

Kind = Literal["image", "video", "text", "audio"]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")
# What AutoProcessor, AutoImageProcessor and AutoFeatureExtractor read: one of them will do.
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")
DOWNLOADED = (
    "config.json",
    WEIGHTS,
    INDEX,
    "model-*.safetensors",
    *PROCESSORS,
    *TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "1_Pooling/config.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
LARGEST_JSON = 64 * 2**20  # bytes; the tokenizers of large vocabularies have about 20 MB

# The tower that encodes one kind of input, for models of several; others are loaded by AutoModel.
TOWERS: dict[tuple[str, Kind], str] = {
    ("clip", "image"): "CLIPVisionModelWithProjection",
    ("clip", "text"): "CLIPTextModelWithProjection",
    ("siglip", "image"): "SiglipVisionModel",
    ("siglip2", "image"): "Siglip2VisionModel",
    ("clap", "audio"): "ClapAudioModelWithProjection",
}
# What an encoder-decoder reads, by the name of its main input.
MAIN_INPUTS: dict[str, Kind] = {
    "pixel_values": "image",
    "input_features": "audio",
    "input_values": "audio",
    "input_ids": "text",
}
# How weights are read: none of a model's code is run, and nothing is unpickled.
SAFELY: dict[str, Any] = {
    "dtype": torch.float32,
    "use_safetensors": True,
    "local_files_only": True,
    "trust_remote_code": False,
    "output_loading_info": True,
    "ignore_mismatched_sizes": True,  # told with their shapes by load_weights
}
LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    SafetensorError,
)


def find_folder(source: str, local_files_only: bool) -> Path:
    """The folder of a pretrained model: ``source`` itself, or the local copy of a Hugging Face name.

    Raises:
        FileNotFoundError: if there is neither, or no network to fetch it with.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(
            snapshot_download(source, allow_patterns=list(DOWNLOADED), local_files_only=local_files_only)
        )
    except HFValidationError as error:
        raise FileNotFoundError(f"{source!r} is neither a folder nor a name at Hugging Face") from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{source!r} is no folder, and no file of a model of that name ({', '.join(DOWNLOADED[:2])}, ...) "
            "is in the local cache; it can't be fetched "
            + ("with local_files_only=True" if local_files_only else "without a network")
        ) from error
    except HfHubHTTPError as error:
        raise FileNotFoundError(
            f"{source!r} is no folder and can't be fetched from Hugging Face: {error}"
        ) from error


def check_folder(folder: Path, source: str, choices: tuple[str, ...]) -> None:
    """Check that ``folder`` has all the files of a model, none of them a danger.

    Args:
        choices: files of which it must have one, such as ``TOKENIZERS``; it may be none.

    Raises:
        FileNotFoundError: with all files that are missing.
        ValueError: if its only weights are pickles, or it holds an adapter and no model.
    """
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{source!r} holds an adapter (adapter_config.json), not a whole model; merge it into its model "
            "(merge_and_unload of peft) and save that"
        )
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if (folder / WEIGHTS).is_file():
        pass
    elif (folder / INDEX).is_file():
        missing += [name for name in _shards(folder / INDEX, source) if not (folder / name).is_file()]
    else:
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"{source!r} has its weights only as {', '.join(pickles)}, which can run code when it is "
                f"read, so it isn't; save the model as {WEIGHTS} (save_pretrained of transformers does)"
            )
        missing.append(WEIGHTS)
    if choices and not any((folder / name).is_file() for name in choices):
        missing.append(choices[0])
    if missing:
        raise FileNotFoundError(f"{source!r} lacks {', '.join(missing)} (looked in {str(folder)!r})")


def _shards(index: Path, source: str) -> list[str]:
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source!r}: {index.name} is no index of weights: {error}") from error
    for name in shards:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{source!r}: {index.name} names {name!r}, which is no safetensors file beside it"
            )
    return shards


def read_config(folder: Path, source: str) -> transformers.PreTrainedConfig:
    """The configuration of the model in ``folder``.

    Raises:
        ValueError: if it can't be read, or a JSON file of the folder is huge.
    """
    large = sorted(path.name for path in folder.glob("*.json") if path.stat().st_size > LARGEST_JSON)
    if large:
        raise ValueError(
            f"{source!r} has JSON files of more than {LARGEST_JSON >> 20} MiB: {', '.join(large)}"
        )
    with loading(source, "configuration"):
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def kinds_of(config: transformers.PreTrainedConfig, source: str) -> tuple[Kind, ...]:
    """What the model of a configuration can encode, as far as we know how."""
    towers: tuple[Kind, ...] = tuple(kind for model_type, kind in TOWERS if model_type == config.model_type)
    if towers:
        return towers
    if type(config) not in MODEL_MAPPING:
        raise ValueError(f"{source!r} is of the type {config.model_type!r}, for which AutoModel has no model")
    found: Any = MODEL_MAPPING[type(config)]
    model: type[transformers.PreTrainedModel] = found[0] if isinstance(found, tuple) else found
    if config.is_encoder_decoder:
        return (MAIN_INPUTS[model.main_input_name],)
    kinds = model.input_modalities
    return cast(tuple[Kind, ...], (kinds,) if isinstance(kinds, str) else tuple(kinds))


def load_weights(loader: Any, folder: Path, source: str, **chosen: Any) -> tuple[Any, set[str]]:
    """A model with its weights in float32, and the names of those that its files lack.

    Args:
        loader: class with ``from_pretrained``.
        chosen: further arguments of it.

    Raises:
        ValueError: if the weights can't be read, or have other shapes than the configuration says.
    """
    with loading(source, "weights"):
        model, info = loader.from_pretrained(folder, **chosen, **SAFELY)
    if info["mismatched_keys"]:
        name, found, needed = min(info["mismatched_keys"])
        raise ValueError(
            f"the weights of {source!r} don't fit its config.json: {name!r} has shape {tuple(found)}, by the "
            f"configuration it would be {tuple(needed)}"
        )
    return model, set(info["missing_keys"])


def load_model(
    folder: Path, source: str, config: transformers.PreTrainedConfig, kind: Kind
) -> tuple[nn.Module, bool]:
    """The encoder of ``kind`` in float32 and evaluation mode, and whether its pooling layer is trained.

    Raises:
        ValueError: if the weights don't belong to the configuration.
    """
    tower = TOWERS.get((config.model_type, kind))
    loader: Any = getattr(transformers, tower) if tower else transformers.AutoModel
    chosen: dict[str, Any] = {}
    if tower and loader.config_class is not type(config) and hasattr(config, "projection_dim"):
        # The whole model projects to the size that stands at the top, whatever its towers say.
        with loading(source, "configuration"):
            part = loader.config_class.from_pretrained(folder, local_files_only=True)
        part.projection_dim = config.projection_dim
        chosen["config"] = part
    model, missing = load_weights(loader, folder, source, **chosen)
    # Classifiers are saved without the pooling layer of the bare model; we do without it then.
    poolers = {name for name in missing if "pooler." in name}
    if config.is_encoder_decoder:
        model = model.get_encoder()
        lacking = {name for name in missing if name.removeprefix("encoder.") in model.state_dict()}
    else:
        lacking = missing - poolers
    if lacking:
        raise ValueError(
            f"the weights of {source!r} lack {len(lacking)} tensors of a {type(model).__name__}, such as "
            f"{min(lacking)!r}"
        )
    return model.eval(), not poolers


@contextmanager
def loading(source: str, what: str) -> Iterator[None]:
    """Load quietly; whatever goes wrong is a ``ValueError`` that names the model."""
    log = transformers.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    except LOADING_ERRORS as error:
        raise ValueError(f"can't load the {what} of {source!r}: {type(error).__name__}: {error}") from error
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
