"""Audio encoder: sound in, tokens along time out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchaudio
from gymnasium import spaces
from torch import Tensor, nn

from mmenvs.spaces import SAMPLE_RATE

MELS = 40
WINDOW = 512  # samples, 32 ms at 16 kHz
HOP = 320  # 20 ms
# Sounds transformed at a time: their spectra then stay in the cache, three times as fast as all at once.
CHUNK = 8


class LogMel(nn.Module):
    """Log-mel spectrogram, ``(B, T)`` float to ``(B, MELS, T // HOP + 1)`` float32, without gradients.

    Silence is 0 and full loudness about 2, whatever the loudness of the batch. Mel filters are
    torchaudio's; its ``MelSpectrogram`` gives the same numbers at a third of the speed.
    """

    window: Tensor
    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)
        filters = torchaudio.functional.melscale_fbanks(
            WINDOW // 2 + 1, 0.0, SAMPLE_RATE / 2, MELS, SAMPLE_RATE
        )
        # Each row twice: the real and the imaginary part of a frequency add their squares.
        self.register_buffer("filters", filters.repeat_interleave(2, 0), persistent=False)

    @torch.no_grad()
    def forward(self, sound: Tensor) -> Tensor:
        with torch.autocast(sound.device.type, enabled=False):
            mels = []
            for part in sound.float().split(CHUNK if sound.device.type == "cpu" else len(sound)):
                padded = F.pad(part, (WINDOW // 2, WINDOW // 2))
                spectrum = torch.fft.rfft(padded.unfold(-1, WINDOW, HOP) * self.window)
                parts = torch.view_as_real(spectrum).flatten(-2)  # (b, F, WINDOW + 2)
                mels.append(parts.square_() @ self.filters)
            return torch.cat(mels).add_(1e-5).log_().add_(11.5).div_(8).transpose(1, 2)


class LogMelEncoder(nn.Module):
    """Log-mel spectrogram, then a CNN that keeps time and folds frequency into its channels.

    The spectrogram (32 ms windows every 20 ms, 40 mel bands) is what costs, so it is made without
    gradients. Convolutions over time, one of stride 2, leave a token every 40 ms: 26 for a second (the
    layout of Hershey et al. 2017, "CNN architectures for large-scale audio classification", cut down). Its
    time is added to each token.

    Args:
        space: ``Box(-1, 1, (T,) or (C, T), float32)`` at 16 kHz; channels are averaged.
        width: size of a token.

    Shapes: ``(B, T)`` or ``(B, C, T)`` float to ``(B, T // 640 + 1, width)``; sounds may be shorter than the space's.
    """

    def __init__(self, space: spaces.Box, width: int) -> None:
        super().__init__()
        self.spectrogram = LogMel()
        self.body = nn.Sequential(
            nn.Conv1d(MELS, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv1d(2 * width, width, 3, padding=1),
        )
        self.norm = nn.LayerNorm(width)
        tokens = self._tokens(torch.zeros(1, *space.shape)).shape[1]
        self.place = nn.Parameter(torch.randn(tokens, width) * 0.2)

    def _tokens(self, sound: Tensor) -> Tensor:
        if sound.dim() == 3:
            sound = sound.mean(1)
        return self.body(self.spectrogram(sound)).transpose(1, 2)

    def forward(self, sound: Tensor) -> Tensor:
        tokens = self._tokens(sound)
        return self.norm(tokens) + self.place[: tokens.shape[1]]
