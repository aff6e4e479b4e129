"""A training step upstream's way: efficientnet_pytorch as it is, a loop over heads, float32, eager, NCHW."""

import torch
from efficientnet_pytorch import EfficientNet
from torch import Tensor, nn


class UpstreamTagger(nn.Module):
    """EfficientNet with attention heads, each head and each of its two convolutions a call of its own."""

    def __init__(self, name: str, num_classes: int, num_heads: int = 4) -> None:
        """Build b0 … b7 by efficientnet_pytorch's name, for one input channel."""
        super().__init__()
        self.effnet = EfficientNet.from_name(name, in_channels=1)
        width = self.effnet._conv_head.out_channels
        self.att = nn.ModuleList([nn.Conv2d(width, num_classes, 1) for _ in range(num_heads)])
        self.cla = nn.ModuleList([nn.Conv2d(width, num_classes, 1) for _ in range(num_heads)])
        self.head_weight = nn.Parameter(torch.full((num_heads,), 1 / num_heads))
        self.pool = nn.AvgPool2d((4, 1))

    def forward(self, fbank: Tensor) -> Tensor:
        """Score (B, T, F): (B, C)."""
        maps = self.pool(self.effnet.extract_features(fbank.unsqueeze(1).transpose(2, 3)))
        pooled = []
        for head, (att, cla) in enumerate(zip(self.att, self.cla, strict=True)):
            weight = torch.sigmoid(att(maps)).mean(2).clamp(1e-7, 1 - 1e-7)
            weight = weight / weight.sum(2, keepdim=True)
            pooled.append((weight * torch.sigmoid(cla(maps)).mean(2)).sum(2) * self.head_weight[head])
        return torch.stack(pooled).sum(0)


def build_upstream_step(name: str, num_classes: int, fbank: Tensor, targets: Tensor) -> nn.Module:
    """Return the model and its Adam in one module whose call is a whole update."""
    model = UpstreamTagger(name, num_classes).to(fbank.device).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, weight_decay=5e-7, betas=(0.95, 0.999))
    loss_of = nn.BCELoss()

    class Step(nn.Module):
        def forward(self) -> None:
            loss = loss_of(model(fbank).clamp(1e-7, 1 - 1e-7), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return Step()
