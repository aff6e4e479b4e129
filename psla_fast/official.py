"""Official PSLA weights -> a checkpoint: the model read off its shapes, and the input it was trained on."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from psla_fast.augment import InputSpec
from psla_fast.checkpoint import Card
from psla_fast.classes import find_classes
from psla_fast.fbank import PSLA_MEAN, PSLA_STD, FbankConfig
from psla_fast.models import build_model
from psla_fast.models.official import infer_official
from psla_fast.models.weights import compute_sha256, load_state, read_state_dict, read_torch_file

# Number of classes -> the class list and the frames of a clip that PSLA trained them with
RECIPES = {527: ("audioset", 1056), 200: ("fsd50k", 3000)}


@dataclass(frozen=True)
class Imported:
    """Official weights with their card, and lines that say what was read and what not used."""

    card: Card
    state: dict[str, Tensor]
    said: list[str]


def import_official(
    path: Path, class_list: str = "", clip_frames: int | None = None, strict: bool = True
) -> Imported:
    """Read a released .pth file, with or without `module.` prefixes and ImageNet's classifier.

    class_list: audioset, fsd50k or the path of a CSV; empty: AudioSet's for 527 classes, FSD50K's for 200.
    clip_frames None: 1056 or 3000, by the same. Where not strict, a class list of another length gives a new
    head, drawn from torch's generator. Raises ValueError for a file that is something else, and where classes
    or frames aren't known.
    """
    if "model_config" in read_torch_file(path):
        raise ValueError(f"{path} is a psla_fast checkpoint already. Use it as it is.")
    state = read_state_dict(path)
    config, num_classes = infer_official(state, str(path))
    known_list, known_frames = RECIPES.get(num_classes, ("", 0))
    if not (class_list or known_list):
        raise ValueError(f"{path} has {num_classes} classes, no known set's. Pass --classes CSV.")
    if not (clip_frames or known_frames):
        raise ValueError(f"{path} has {num_classes} classes, no known set's. Pass --clip-frames.")
    classes = find_classes(class_list or known_list)
    if strict and len(classes) != num_classes:
        raise ValueError(
            f"{path} has {num_classes} classes, {class_list} {len(classes)}. Pass its own list, or --strict "
            "false for a new head."
        )
    model = build_model(config, len(classes))
    unused = load_state(model, state, str(path), strict)
    said = [f"weights of {path}, sha256 {compute_sha256(path)}"]
    said += [f"its head was not used: {', '.join(unused)}; the head is new"] if unused else []
    spec = InputSpec(clip_frames or known_frames, FbankConfig().num_mels, 0.0, PSLA_MEAN, PSLA_STD)
    return Imported(Card(config, classes, spec, FbankConfig()), model.state_dict(), said)
