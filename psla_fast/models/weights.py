"""Weights: state dicts from files and packages, fitted to one-channel input; never a pickle."""

import hashlib
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from psla_fast.models.official import infer_official

HEAD = "attention."  # what the names of a head's tensors begin with


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
    """Load a file's weights into a model of the same names and shapes; raises ValueError otherwise."""
    load_state(model, read_state_dict(path), str(path))


def load_state(
    model: nn.Module, state: dict[str, Tensor], source: str, strict: bool = True, new_head: bool = False
) -> list[str]:
    """Load a state dict into a model; returns the names and shapes of tensors that weren't used.

    strict: names and shapes must be the model's. Else the backbone's must be, and a head that differs in
    anything, or any where new_head, stays as the model has it. Raises ValueError that says what doesn't fit.
    """
    unused: list[str] = []
    if not strict:
        state, unused = _keep_own_head(model, state, new_head)
    try:
        fit_weights(model, state, source)
    except ValueError as error:
        raise ValueError(f"{error} {_describe(state)}".strip()) from error
    return unused


def _describe(state: dict[str, Tensor]) -> str:
    """Say which of PSLA's models a state dict is; empty where it is none."""
    try:
        config, num_classes = infer_official(state, "")
    except ValueError:
        return ""
    return f"It is {config.name} with {config.num_heads} heads for {num_classes} classes."


def compute_sha256(path: Path) -> str:
    """Hash a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _keep_own_head(
    model: nn.Module, state: dict[str, Tensor], always: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """Put the model's own head in a state dict whose head isn't the same; returns what was taken out."""
    head = {name: value for name, value in model.state_dict().items() if name.startswith(HEAD)}
    theirs = {name: value for name, value in state.items() if name.startswith(HEAD)}
    if (
        not always
        and head.keys() == theirs.keys()
        and all(head[name].shape == theirs[name].shape for name in head)
    ):
        return state, []
    unused = [f"{name} {tuple(value.shape)}" for name, value in sorted(theirs.items())]
    return {**{name: value for name, value in state.items() if name not in theirs}, **head}, unused


def fit_weights(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a state dict of the same names and shapes; raises ValueError that says what doesn't fit."""
    wanted = model.state_dict()
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or extra:
        example = f"missing {missing[0]}" if missing else f"unknown {extra[0]}"
        raise ValueError(
            f"{source} is another model: {len(missing)} tensors missing, {len(extra)} unknown ({example}). "
            "Set --model.name and --model.num-heads as in that file, or --strict false to take its backbone "
            "alone."
        )
    for name, value in wanted.items():
        if state[name].shape != value.shape:
            got, want = tuple(state[name].shape), tuple(value.shape)
            raise ValueError(
                f"{source}: {name} has shape {got}, this model {want}. Is it for another class list? "
                "--strict false takes its backbone alone."
            )
    model.load_state_dict(state)


def sum_rgb_stem(stem_weight: Tensor) -> Tensor:
    """Turn a stem's RGB weights (D, 3, k, k) into one channel's (D, 1, k, k): its response to grey."""
    return stem_weight.sum(dim=1, keepdim=True)
