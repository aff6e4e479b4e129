"""The command `weights`: a label set -> PSLA's sample weights, a number a line in the set's order."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from psla_fast.classes import find_classes
from psla_fast.files import replacing
from psla_fast.labels import read_labels
from psla_fast.recipe import parse_flags
from psla_fast.sampling import compute_class_counts, compute_sample_weights
from psla_fast.shards import open_shards


@dataclass(frozen=True)
class WeightsCommand:
    """Write PSLA's sample weights: the sum over a clip's labels of 1000/(count + 0.01)."""

    data: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATA")]
    """A PSLA datafile (JSON), a label table (CSV key,mids), or a packed split."""
    out: Path | None = None
    """File to write, a number a line in DATA's order; DATA_weight.csv beside it where none is given."""
    classes: str = ""
    """Class list of a datafile or table (or audioset, fsd50k); a packed split knows its own."""


def weights(arguments: list[str]) -> None:
    """Compute the sample weights of a label set and write them."""
    command = parse_flags(WeightsCommand, arguments, "psla-fast weights")
    command = replace(command, data=Path(os.path.abspath(command.data)))
    if command.data.is_dir():
        with open_shards(command.data) as shards:
            indptr, indices, num_classes = shards.index.indptr, shards.index.indices, len(shards.classes)
    else:
        if not command.classes:
            raise ValueError("--classes is missing. Give the class list, or audioset or fsd50k.")
        classes = find_classes(command.classes)
        table = read_labels(command.data, classes)
        indptr, indices, num_classes = table.indptr, table.indices, len(classes)
    if len(indptr) == 1:
        raise ValueError(f"{command.data} lists no clip. Give a label set.")
    computed = compute_sample_weights(indptr, indices, num_classes)
    stem = command.data.name if command.data.is_dir() else command.data.stem
    out = command.out or command.data.with_name(f"{stem}_weight.csv")
    with replacing(out) as temporary:
        np.savetxt(temporary, computed, delimiter=",")
    counts = compute_class_counts(indices, num_classes)
    print(
        f"{len(computed):,} weights from {computed.min():.4g} to {computed.max():.4g}, "
        f"{(counts > 0).sum()} of {num_classes} classes occur; in {out}"
    )
