"""Small data sets in their own layouts, for the tests of sources and of packing."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import soundfile

from psla_fast.classes import Classes

CLASSES = Classes(
    ("/m/09x0r", "/m/05zppz", "/m/04rlf", "/t/dd1"),
    ("Speech", "Male speech, man speaking", "Music", "Dog; bark"),
)


def make_tone(seconds: float, sample_rate: int, hertz: float = 440.0) -> npt.NDArray[np.float32]:
    """A tone of amplitude 0.5 (samples,)."""
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    return (0.5 * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


def write_audio(path: Path, seconds: float = 0.5, sample_rate: int = 16000, hertz: float = 440.0) -> Path:
    """A tone in the format that the path's suffix says, in folders made for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, make_tone(seconds, sample_rate, hertz), sample_rate)
    return path


def touch(root: Path, *paths: str) -> Path:
    """Empty files, in folders made for them: enough for what lists files only."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def write_segments(path: Path, rows: Sequence[tuple[str, float, float, str]], comments: int = 3) -> Path:
    """AudioSet's segment list of (YTID, start, end, "mid,mid")."""
    lines = ["# a comment, with commas"] * comments
    lines += [f'{ytid}, {start:.3f}, {end:.3f}, "{mids}"' for ytid, start, end, mids in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_datafile(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    """PSLA's datafile of (wav, labels)."""
    path.write_text(json.dumps({"data": [{"wav": wav, "labels": labels} for wav, labels in rows]}, indent=1))
    return path


def write_table(path: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    """A CSV file with a header, the keys of the first row."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_fsd50k_lists(root: Path, dev: Sequence[Sequence[str]], evaluation: Sequence[Sequence[str]]) -> Path:
    """FSD50K of CLASSES without audio: dev rows (fname, mids, split), eval rows (fname, mids)."""
    truth = root / "FSD50K.ground_truth"
    for folder in ("FSD50K.dev_audio", "FSD50K.eval_audio", truth.name):
        (root / folder).mkdir(parents=True, exist_ok=True)
    with open(truth / "vocabulary.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            (index, name, mid)
            for index, (mid, name) in enumerate(zip(CLASSES.mids, CLASSES.names, strict=True))
        )
    write_table(
        truth / "dev.csv",
        [dict(zip(("fname", "labels", "mids", "split"), (n, "x", m, s), strict=True)) for n, m, s in dev],
    )
    write_table(truth / "eval.csv", [{"fname": n, "labels": "x", "mids": m} for n, m in evaluation])
    return root


def write_esc50(root: Path, folds: int = 5, categories: Sequence[str] = ("dog", "rooster")) -> Path:
    """ESC-50 of one short clip for each fold and category."""
    rows = [
        {"filename": f"{fold}-{target}-A-{target}.wav", "fold": str(fold), "target": str(target)}
        | {"category": category, "esc10": "True", "src_file": "1", "take": "A"}
        for fold in range(1, folds + 1)
        for target, category in enumerate(categories)
    ]
    for row in rows:
        write_audio(root / "audio" / row["filename"], hertz=200.0 * (1 + int(row["target"])))
    (root / "meta").mkdir()
    write_table(root / "meta" / "esc50.csv", rows)
    return root


def write_panns_hdf5(
    path: Path, names: Sequence[str], waveforms: npt.NDArray[np.int16], targets: npt.NDArray[np.bool_]
) -> Path:
    """HDF5 file of PANNs, 32 kHz."""
    with h5py.File(path, "w") as file:
        file.create_dataset("audio_name", data=np.array([name.encode() for name in names], dtype="S20"))
        file.create_dataset("waveform", data=waveforms)
        file.create_dataset("target", data=targets)
        file.attrs.create("sample_rate", data=32000, dtype=np.int32)
    return path


def write_mp3_hdf5(
    path: Path, names: Sequence[str], contents: Sequence[bytes], targets: npt.NDArray[np.bool_]
) -> Path:
    """HDF5 file of PaSST and EfficientAT."""
    with h5py.File(path, "w") as file:
        file.create_dataset("audio_name", data=np.array([name.encode() for name in names], dtype="S20"))
        rows = file.create_dataset("mp3", (len(names),), dtype=h5py.vlen_dtype(np.uint8))
        for row, content in enumerate(contents):
            rows[row] = np.frombuffer(content, dtype=np.uint8)
        file.create_dataset("target", data=np.packbits(targets, axis=-1))
    return path


def read_tree(folder: Path) -> dict[str, bytes]:
    """Every file of a packed set but the logs, which say when and where."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix != ".log")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}
