"""Synthetic data for the benchmarks: shards of random log-mels, and 10 s wavs of noise."""

from pathlib import Path

import numpy as np
import soundfile

from psla_fast.classes import Classes, format_classes
from psla_fast.fbank import PSLA_MEAN, PSLA_STD, FbankConfig
from psla_fast.shards import Shards, Storage, open_shards
from psla_fast.shards.index import write_index
from psla_fast.shards.spec import DtypeName
from psla_fast.shards.sums import write_sums
from psla_fast.shards.writer import Origin, ShardWriter

NUM_CLASSES, NUM_SHARDS = 527, 8
CLIP_FRAMES_10_S = FbankConfig().num_frames(10 * FbankConfig().sample_rate)  # 998


def make_shards(folder: Path, num_clips: int, dtype: DtypeName = "float16") -> Shards:
    """Open FOLDER/train, a split of num_clips 10 s clips; write it first where it isn't there."""
    split = folder / "train"
    if (split / "index.h5").is_file():
        shards = open_shards(split)
        if len(shards) != num_clips:
            raise ValueError(f"{split} holds {len(shards)} clips, not {num_clips}. Choose another --data.")
        return shards
    split.mkdir(parents=True)
    classes = make_classes(folder)
    rng, storage, statistics = np.random.default_rng(0), Storage.of(dtype), []
    for number, keys in enumerate(np.array_split(np.arange(num_clips), NUM_SHARDS)):
        with ShardWriter(split, number, storage, "synthetic") as writer:
            for key in (f"clip{i}" for i in keys):
                fbank = rng.standard_normal((CLIP_FRAMES_10_S, 128), dtype=np.float32) * PSLA_STD + PSLA_MEAN
                labels = np.sort(rng.choice(NUM_CLASSES, size=rng.integers(1, 5), replace=False))
                writer.add(Origin(key, key, key), fbank, labels.tolist())
            statistics.append(writer.close())
    index = write_index(split, statistics, FbankConfig(), storage, classes)
    write_sums(split, index.num_shards, index.sums)
    return open_shards(split)


def make_classes(folder: Path) -> Classes:
    """Write FOLDER/classes.csv."""
    numbers = range(NUM_CLASSES)
    classes = Classes(tuple(f"/m/{i}" for i in numbers), tuple(f"class {i}" for i in numbers))
    (folder / "classes.csv").write_text(format_classes(classes))
    return classes


def make_wavs(folder: Path, num_wavs: int, sample_rate: int) -> list[Path]:
    """Give the paths of num_wavs 10 s mono PCM-16 wavs of noise; write those that aren't there."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}_{sample_rate}.wav" for number in range(num_wavs)]
    for number, path in enumerate(paths):
        if not path.is_file():
            noise = np.random.default_rng(number).standard_normal(10 * sample_rate, dtype=np.float32)
            soundfile.write(path, 0.1 * noise, sample_rate, subtype="PCM_16")
    return paths
