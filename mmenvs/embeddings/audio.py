"""Audio encoder: sound in, tokens along time out."""

from __future__ import annotations

import torch
import torchaudio
from gymnasium import spaces
from torch import Tensor, nn

from mmenvs.spaces import SAMPLE_RATE

MELS = 40
HOP = 160  # samples, 10 ms at 16 kHz
WINDOW = 400


class LogMelEncoder(nn.Module):
    """Log-mel spectrogram, then a CNN that keeps time and folds frequency into its channels.

    The spectrogram (25 ms windows every 10 ms, 40 mel bands) is what costs, so it is made once per
    observation, without gradients. Two convolutions over time, each with stride 2, leave a token every
    40 ms: 25 for a second (the layout of Hershey et al. 2017, "CNN architectures for large-scale audio
    classification", cut down). Its time is added to each token.

    Args:
        space: ``Box(-1, 1, (T,) or (C, T), float32)`` at 16 kHz; channels are averaged.
        width: size of a token.

    Shapes: ``(B, T)`` or ``(B, C, T)`` float to ``(B, T // 640 + 1, width)``.
    """

    def __init__(self, space: spaces.Box, width: int) -> None:
        super().__init__()
        self.spectrogram = torchaudio.transforms.MelSpectrogram(
            SAMPLE_RATE, n_fft=512, win_length=WINDOW, hop_length=HOP, n_mels=MELS
        )
        self.body = nn.Sequential(
            nn.Conv1d(MELS, 2 * width, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv1d(2 * width, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv1d(width, width, 3, padding=1),
        )
        self.norm = nn.LayerNorm(width)
        tokens = self._tokens(torch.zeros(1, *space.shape)).shape[1]
        self.place = nn.Parameter(torch.randn(tokens, width) * 0.2)

    def _tokens(self, sound: Tensor) -> Tensor:
        if sound.dim() == 3:
            sound = sound.mean(1)
        with torch.no_grad(), torch.autocast(sound.device.type, enabled=False):
            # Silence is 0 and full loudness about 2, whatever the loudness of the batch.
            mel = (self.spectrogram(sound.float()) + 1e-5).log().add(11.5).div(8)
        return self.body(mel).transpose(1, 2)

    def forward(self, sound: Tensor) -> Tensor:
        return self.norm(self._tokens(sound)) + self.place
