"""A network of your own, trained by `--model.name examples.my_net:MyNet --model.pretrained none`."""

import torch
from torch import Tensor, nn


class MyNet(nn.Module):
    """Log-mels (B, T, F) -> scores (B, C); of num_classes, num_mels and config it gets what it names."""

    def __init__(self, num_classes: int, num_mels: int) -> None:
        """Build two convolutions over time."""
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(num_mels, 64, 5), nn.ReLU(), nn.Conv1d(64, num_classes, 1))

    def forward(self, fbank: Tensor) -> Tensor:
        """Average the classes' activity over time."""
        return torch.sigmoid(self.layers(fbank.mT)).mean(dim=2)
