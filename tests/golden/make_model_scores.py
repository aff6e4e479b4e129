"""Make model/effnet_b{0,2}_heads{4,1,0}_classes{527,200}.npz: the official model's scores, 12 files.

The backbone is efficientnet_pytorch 0.7.0 itself, with which PSLA's weights were trained; what follows it is
written from the formulas, one head after the other, and shares no code with psla_fast. Run it as

    pip install --no-deps --target OLD efficientnet_pytorch==0.7.0
    PYTHONPATH=OLD:. python tests/golden/make_model_scores.py
"""

import efficientnet_pytorch
import numpy as np
import torch
from efficientnet_pytorch import EfficientNet
from torch import Tensor
from torch.nn import functional

from tests.golden.test_model_scores import FEATURES, FOLDER, golden_fbank, golden_state


def official_shapes(size: int, num_heads: int, num_classes: int) -> dict[str, torch.Size]:
    """Names and shapes of the official model's tensors."""
    backbone = EfficientNet.from_name(f"efficientnet-b{size}", in_channels=1).state_dict()
    shapes = {
        f"effnet.{name}": value.shape for name, value in backbone.items() if not name.startswith("_fc.")
    }
    heads = [f".{head}" for head in range(num_heads)] if num_heads > 1 else [""]
    for part in ("att", "cla") if num_heads else ("cla",):
        for head in heads:
            shapes[f"attention.{part}{head}.weight"] = torch.Size((num_classes, FEATURES[size], 1, 1))
            shapes[f"attention.{part}{head}.bias"] = torch.Size((num_classes,))
    if num_heads > 1:
        shapes["attention.head_weight"] = torch.Size((num_heads,))
    return shapes


def official_scores(size: int, num_heads: int, state: dict[str, Tensor], fbank: Tensor) -> Tensor:
    """Scores (B, C) of log-mels (B, T, F) by the official model."""
    backbone = EfficientNet.from_name(f"efficientnet-b{size}", in_channels=1)
    backbone.load_state_dict(
        {name[7:]: value for name, value in state.items() if name.startswith("effnet.")}, strict=False
    )
    maps = backbone.eval().extract_features(fbank.unsqueeze(1).transpose(2, 3))  # (B, D, F', T')
    features = functional.avg_pool2d(maps, (4, 1))  # (B, D, 1, T')

    def active(part: str, head: str) -> Tensor:
        name = f"attention.{part}{head}"
        return torch.sigmoid(functional.conv2d(features, state[f"{name}.weight"], state[f"{name}.bias"]))[
            :, :, 0
        ]

    if num_heads == 0:
        return active("cla", "").mean(dim=2)
    total = torch.zeros(())
    for head in range(num_heads):
        suffix = f".{head}" if num_heads > 1 else ""
        att = torch.clamp(active("att", suffix), 1e-7, 1 - 1e-7)
        att = att / att.sum(dim=2, keepdim=True)
        pooled = (att * active("cla", suffix)).sum(dim=2)
        total = total + (pooled * state["attention.head_weight"][head] if num_heads > 1 else pooled)
    return total


def main() -> None:
    """Write the files, after the ones of 10 classes were met."""
    assert efficientnet_pytorch.__version__ == "0.7.0", efficientnet_pytorch.__version__
    fbank = golden_fbank()
    for size, num_classes in ((0, 10), (0, 527), (0, 200), (2, 527), (2, 200)):
        for num_heads in (4, 1, 0):
            state = golden_state(official_shapes(size, num_heads, num_classes), size, num_heads)
            with torch.no_grad():
                scores = official_scores(size, num_heads, state, fbank).numpy()
            if num_classes == 10:
                known = np.load(FOLDER / f"effnet_b{size}_heads{num_heads}.npz")["scores"]
                print(f"b{size}, {num_heads} heads: {np.abs(scores - known).max():.1e} from the known scores")
                continue
            np.savez_compressed(
                FOLDER / f"effnet_b{size}_heads{num_heads}_classes{num_classes}.npz", scores=scores
            )


if __name__ == "__main__":
    main()
