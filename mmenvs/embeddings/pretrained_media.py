"""What pretrained models of pictures, films and sounds are given, after their own configuration files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchaudio
import transformers
from gymnasium import spaces
from torch import Tensor, nn
from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

from mmenvs.checks import integer_in, one_of
from mmenvs.embeddings.pretrained import PretrainedEncoder
from mmenvs.embeddings.pretrained_files import loading
from mmenvs.spaces import SAMPLE_RATE, picture_shape

# Pillow's filters by number, and what torch calls them.
NEAREST, BILINEAR, BICUBIC = 0, 2, 3
FILTERS = {NEAREST: "nearest-exact", BILINEAR: "bilinear", BICUBIC: "bicubic"}
LARGEST_SIDE = 4096  # pixels
RATES = (1_000, 192_000)  # Hz


class Preprocess(nn.Module):
    """The model's own image processor in torch: resize, crop, scale and normalise whole batches.

    Sizes, filter, mean and deviation are those of the processor's file, and so are the numbers, but for a
    few that Pillow rounds to the next of its 256 levels.

    Shapes: ``(B, 3, H, W)`` float in [0, 1] to ``(B, 3, H', W')`` float32.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, folder: Path, source: str, space: spaces.Box) -> None:
        super().__init__()
        channels, height, width = picture_shape(space.shape)
        if channels != 3:
            raise ValueError(f"{source!r} needs pictures of 3 channels, got {channels}")
        with loading(source, "image processor"):
            # Only its settings are used, so the one that needs no torchvision will do.
            processor: Any = transformers.AutoImageProcessor.from_pretrained(
                folder, backend="pil", local_files_only=True, trust_remote_code=False
            )
            self._read(processor, height, width)

    def _read(self, processor: Any, height: int, width: int) -> None:
        size = (height, width)
        # SigLIP2's for any aspect ratio hands over patches, at most so many.
        self.patches = getattr(processor, "max_num_patches", 0)
        self.patch_size = processor.patch_size if self.patches else 1
        if self.patches:
            size = get_image_size_for_max_num_patches(height, width, self.patch_size, self.patches)
        elif processor.do_resize:
            size = _resized(processor.size, height, width)
        self.size = tuple(integer_in("size", side, 1, LARGEST_SIDE) for side in size)
        self.grid = tuple(side // self.patch_size for side in self.size)
        resample = BILINEAR if processor.resample is None else int(processor.resample)
        self.filter = FILTERS[one_of("resample", resample, tuple(FILTERS))]
        self.margins = (0, 0, 0, 0)  # left, right, top, bottom; negative ones cut off
        if getattr(processor, "do_center_crop", False):
            crop = [
                integer_in("crop_size", processor.crop_size[side], 1, LARGEST_SIDE)
                for side in ("height", "width")
            ]
            self.margins = (*_margins(self.size[1], crop[1]), *_margins(self.size[0], crop[0]))
        self.scale = processor.rescale_factor if processor.do_rescale else 1.0
        normal = processor.do_normalize
        mean = torch.as_tensor(processor.image_mean if normal else 0.0)
        deviation = torch.as_tensor(processor.image_std if normal else 1.0)
        self.register_buffer("mean", mean.view(-1, 1, 1), persistent=False)
        self.register_buffer("deviation", deviation.view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.float() * 255.0
        height, width = self.size
        # Pillow does the rows first, then the columns, and comes back to 256 levels after each.
        for size in ((x.shape[2], width), (height, width)):
            if x.shape[2:] != size:
                smooth = self.filter != FILTERS[NEAREST]
                x = F.interpolate(x, size, mode=self.filter, antialias=smooth)
                x = x.add_(0.5).floor_().clamp_(0.0, 255.0)
        if any(self.margins):
            x = F.pad(x, self.margins)
        return (x * self.scale - self.mean) / self.deviation

    def model_inputs(self, x: Tensor) -> dict[str, Tensor]:
        """What an image model is given: pixels, or for models of any aspect ratio patches and their number."""
        pixels = self(x)
        if not self.patches:
            return {"pixel_values": pixels}
        side, (rows, columns) = self.patch_size, self.grid
        cells = pixels.unflatten(3, (columns, side)).unflatten(
            2, (rows, side)
        )  # (B, 3, rows, side, columns, side)
        patches = cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (B, P, side * side * 3)
        mask = torch.arange(self.patches, device=x.device) < rows * columns
        shape = torch.tensor([rows, columns], device=x.device)
        return {
            "pixel_values": F.pad(patches, (0, 0, 0, self.patches - rows * columns)),
            "pixel_attention_mask": mask.int().expand(len(x), -1),
            "spatial_shapes": shape.expand(len(x), -1),
        }


class PictureEncoder(PretrainedEncoder):
    """A pretrained image model: CLIP, SigLIP, SigLIP2, DINOv2, ViT and others with their inputs.

    Shapes: ``(B, 3, H, W)`` float in [0, 1] to ``(B, T, width)``.
    """

    def setup(self, folder: Path, space: spaces.Box) -> Tensor:
        self.preprocess = Preprocess(folder, self.chosen.source, space)
        return torch.zeros(1, *picture_shape(space.shape))

    def inputs(self, x: Tensor) -> tuple[dict[str, Tensor], None]:
        return self.preprocess.model_inputs(x), None

    def tokens(self, output: Any, context: None) -> Tensor:
        tokens = super().tokens(output, context)
        # Patches that only fill up aren't looked at.
        return tokens[:, : math.prod(self.preprocess.grid)] if self.preprocess.patches else tokens


class FramesEncoder(PictureEncoder):
    """A pretrained image model for each picture of a set or film, and a vector for its number, which trains.

    Shapes: ``(B, K, 3, H, W)`` float in [0, 1] to ``(B, K * P, width)``, P = 1 for ``output="pooled"``.
    """

    def setup(self, folder: Path, space: spaces.Box) -> Tensor:
        self.frames = space.shape[0]
        self.number = nn.Parameter(torch.randn(self.frames, 1, self.width) * 0.2)
        return super().setup(folder, space).unsqueeze(1).expand(-1, self.frames, -1, -1, -1)

    def features(self, x: Tensor) -> Tensor:
        return super().features(x.flatten(0, 1)).unflatten(0, (-1, self.frames)).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = super().forward(x).unflatten(1, (self.frames, -1))  # (B, K, P, width)
        return (tokens + self.number).flatten(1, 2)


class FilmEncoder(PretrainedEncoder):
    """A pretrained video model, such as VideoMAE. It gets as many frames as it was trained with.

    They are taken at even distances: a shorter film shows frames twice, a longer one leaves some out.

    Shapes: ``(B, K, 3, H, W)`` float in [0, 1] to ``(B, T, width)``.
    """

    def setup(self, folder: Path, space: spaces.Box) -> Tensor:
        self.preprocess = Preprocess(folder, self.chosen.source, space)
        frames = getattr(self.model.config, "num_frames", space.shape[0])
        self.shown = tuple(torch.linspace(0, space.shape[0] - 1, frames).round().long().tolist())
        return torch.zeros(1, space.shape[0], *picture_shape(space.shape))

    def inputs(self, x: Tensor) -> tuple[dict[str, Tensor], None]:
        pixels = self.preprocess(x.flatten(0, 1)).unflatten(0, x.shape[:2])  # (B, K, 3, H', W')
        return {self.model.main_input_name: pixels[:, list(self.shown)]}, None


class SoundEncoder(PretrainedEncoder):
    """A pretrained audio model: CLAP, AST, Whisper's encoder, wav2vec2 and others with their inputs.

    Sound is resampled to the rate of the model's feature extractor, which then makes its spectrograms; most
    do that in NumPy, one sound after the other. Whisper's tokens of the silence behind a sound are left out.

    Shapes: ``(B, T)`` or ``(B, C, T)`` float at 16 kHz, channels are averaged, to ``(B, T', width)``.
    """

    def setup(self, folder: Path, space: spaces.Box) -> Tensor:
        source = self.chosen.source
        with loading(source, "feature extractor"):
            self.extractor: Any = transformers.AutoFeatureExtractor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        # Part of what decides the result, as seen from outside.
        self.extractor_settings = self.extractor.to_json_string()
        self.rate = integer_in(
            f"the sampling rate of the feature extractor of {source!r}", self.extractor.sampling_rate, *RATES
        )
        self.resample = torchaudio.transforms.Resample(SAMPLE_RATE, self.rate)
        self.window = _window(self.extractor)
        longest = self.window and self.window * SAMPLE_RATE // self.rate
        if longest and space.shape[-1] > longest:
            raise ValueError(
                f"{source!r} hears at most {longest / SAMPLE_RATE:g} s, "
                f"these sounds have {space.shape[-1] / SAMPLE_RATE:g} s"
            )
        return torch.zeros(1, *space.shape)

    def inputs(self, x: Tensor) -> tuple[dict[str, Tensor], int]:
        sound = self.resample(x.float().mean(1) if x.dim() == 3 else x.float())  # (B, T at the model's rate)
        # Only Whisper's can work on another device; the others ignore that.
        made = self.extractor(
            list(sound.cpu().numpy()), sampling_rate=self.rate, return_tensors="pt", device=str(x.device)
        )
        name = self.model.main_input_name
        inputs = {name: made[name].to(x.device, torch.float32)}
        if "is_longer" in made:
            # CLAP's extractor calls one short sound of a batch long, by chance.
            inputs["is_longer"] = torch.zeros(len(x), 1, dtype=torch.bool, device=x.device)
        return inputs, sound.shape[1]

    def tokens(self, output: Any, context: int) -> Tensor:
        tokens = super().tokens(output, context)
        if hasattr(self.extractor, "n_samples"):
            tokens = tokens[:, : math.ceil(tokens.shape[1] * context / self.window)]
        return tokens


def _window(extractor: Any) -> int:
    """Samples that a feature extractor makes room for, 0 if any number; it would cut off more, some by chance."""
    for name in ("nb_max_samples", "n_samples"):  # CLAP, Whisper
        if hasattr(extractor, name):
            return int(getattr(extractor, name))
    if hasattr(extractor, "num_mel_bins") and hasattr(extractor, "max_length"):  # AST: frames of 10 ms
        return int(extractor.max_length * extractor.sampling_rate // 100)
    return 0


def _margins(old: int, new: int) -> tuple[int, int]:
    """What centring adds before and behind; of an odd number to cut off, the smaller half goes before."""
    before = -((old - new) // 2)
    return before, new - old - before


def _resized(size: Any, height: int, width: int) -> tuple[int, int]:
    """Height and width after a resize to the ``size`` of an image processor's file."""
    given = {name: value for name, value in dict(size).items() if value is not None}
    if set(given) == {"height", "width"}:
        return given["height"], given["width"]
    if set(given) == {"shortest_edge"}:
        short = integer_in("shortest_edge", given["shortest_edge"], 1, LARGEST_SIDE)
        long = int(short * max(height, width) / min(height, width))
        return (long, short) if width <= height else (short, long)
    raise ValueError(f"size must be of height and width, or of shortest_edge, got {given}")
