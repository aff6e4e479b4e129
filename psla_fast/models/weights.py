"""Weights: state dicts from files and packages, fitted to one-channel input; never a pickle."""

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a model's state dict from one of our checkpoints or a bare state-dict file, weights only."""
    content = read_torch_file(path)
    state = content.get("model", content)
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(value, Tensor) for value in state.values())
    ):
        raise ValueError(f"{path} holds no model weights. Pass a checkpoint (*.pt) or a state dict (*.pth).")
    return clean_state_dict(state)


def read_torch_file(path: Path) -> dict[str, Any]:
    """Read a torch file of tensors and plain values; runs no code, raises ValueError for anything else."""
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "not found"
        raise ValueError(f"{path} {found}. Pass a checkpoint (*.pt) or a state dict (*.pth).")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch.load itself doesn't look at the checksums
                if damaged := archive.testzip():
                    raise ValueError(f"{damaged} differs from its crc32")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader meets garbage with errors of any kind
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a whole torch file of tensors ({reason[:120]}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not named tensors.")
    return content


def clean_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop what DataParallel, DDP and torch.compile prefix, and PSLA's leftover ImageNet classifier."""
    cleaned = {}
    for name, value in state.items():
        short = re.sub(r"^(module\.|_orig_mod\.)+", "", name)
        if not short.startswith("effnet._fc."):
            cleaned[short] = value
    return cleaned


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a file's weights into a model of the same shapes; raises ValueError that says what doesn't fit."""
    fit_weights(model, read_state_dict(path), str(path))


def fit_weights(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a state dict of the same names and shapes; raises ValueError that says what doesn't fit."""
    wanted = model.state_dict()
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or extra:
        example = f"missing {missing[0]}" if missing else f"unknown {extra[0]}"
        raise ValueError(
            f"{source} is another model: {len(missing)} tensors missing, {len(extra)} unknown ({example}). "
            "Set --model.name and --model.num-heads as in that file."
        )
    for name, value in wanted.items():
        if state[name].shape != value.shape:
            got, want = tuple(state[name].shape), tuple(value.shape)
            raise ValueError(
                f"{source}: {name} has shape {got}, this model {want}. Is it for another class list?"
            )
    model.load_state_dict(state)


def sum_rgb_stem(stem_weight: Tensor) -> Tensor:
    """Turn a stem's RGB weights (D, 3, k, k) into one channel's (D, 1, k, k): its response to grey."""
    return stem_weight.sum(dim=1, keepdim=True)
