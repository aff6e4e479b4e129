"""Pretrained: the weights at --model.pretrained PATH -> the run's model, checked against their card."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from psla_fast.checkpoint import Card, load_checkpoint
from psla_fast.models.weights import compute_sha256, load_state, read_state_dict, read_torch_file


def load_pretrained(
    model: nn.Module, path: Path, card: Card, strict: bool, say: Callable[[str], None]
) -> None:
    """Load a checkpoint in any of our formats, or a state dict, into a run's model; `say` gets what to know.

    A checkpoint's classes, pooling and padding must be the run's where strict; else a head of other classes
    or another pooling is left out. Raises ValueError that says what doesn't fit.
    """
    differences: list[str] = []
    new_head = False
    if path.is_dir() or path.suffix == ".safetensors" or "model_config" in read_torch_file(path):
        checkpoint = load_checkpoint(path)
        state, theirs = checkpoint.state, checkpoint.card
        if theirs.classes.mids != card.classes.mids:
            differences.append(f"its classes are others ({len(theirs.classes)})")
        for name in ("num_heads", "pooling"):
            was, now = getattr(theirs.model, name), getattr(card.model, name)
            differences += [f"its {name} is {was}, not {now}"] if was != now else []
        new_head = bool(differences)
        if theirs.model.same_padding != card.model.same_padding:
            differences.append(f"its same_padding is {theirs.model.same_padding}")
        if strict and differences:
            raise ValueError(
                f"{path}: {', '.join(differences)}. Set what it has, or --strict false for a new head."
            )
        heard = (theirs.input.mean, theirs.input.std), (card.input.mean, card.input.std)
        if heard[0] != heard[1]:
            differences.append(f"its input was normalised by {heard[0]}, this run's is by {heard[1]}")
        if theirs.fbank != card.fbank:
            differences.append(f"it heard {theirs.fbank}")
    else:
        state = read_state_dict(path)
    unused = load_state(model, state, str(path), strict, new_head)
    weights = path / "model.safetensors" if path.is_dir() else path
    say(f"weights of {path}, sha256 {compute_sha256(weights)}")
    for difference in differences:
        say(f"note: {difference}")
    if unused:
        say(f"its head was not used: {', '.join(unused)}; the head is new")
