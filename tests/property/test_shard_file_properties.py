"""Damaged or foreign files in a split's folder: a clear error of one line, never a crash."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from psla_fast.classes import read_classes
from psla_fast.labels import read_labels
from psla_fast.pack.log import read_log
from psla_fast.pack.plan import read_plan
from psla_fast.shards import ShardError, open_shards
from psla_fast.shards.sums import read_sums
from psla_fast.shards.writer import read_statistics

shared_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def damage(content: bytes, seed: int) -> bytes:
    """Flip, cut, repeat or put in bytes, by a seed."""
    rng = random.Random(seed)
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        position = rng.randrange(len(damaged) + 1)
        kind = rng.randrange(4)
        if kind == 0 and position < len(damaged):
            damaged[position] = rng.randrange(256)
        elif kind == 1:
            damaged[position:position] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 9)))
        elif kind == 2:
            del damaged[position : position + rng.randint(1, 50)]
        else:
            damaged[position:position] = damaged[: rng.randint(1, 200)]
    return bytes(damaged)


@pytest.fixture(scope="module")
def split(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(packed, tmp_path_factory.mktemp("damaged") / "shards")) / "val"


def one_line(error: ValueError, path: Path) -> None:
    assert path.name in str(error)
    assert "\n" not in str(error)


@shared_folder
@given(seed=st.integers(0, 2**32))
def test_a_damaged_index_is_never_opened(split: Path, seed: int):
    path = split / "index.h5"
    content = path.read_bytes()
    damaged = damage(content, seed)
    try:
        path.write_bytes(damaged)
        if damaged != content:
            with pytest.raises(ShardError, match=r"index\.h5 differs from its sum"):
                open_shards(split)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("00000.json", read_statistics),
        ("pack.json", lambda path: read_plan(path.parent)),
        ("SHA256SUMS", lambda path: read_sums(path.parent)),
        ("../classes.csv", read_classes),
    ],
)
@shared_folder
@given(seed=st.integers(0, 2**32), foreign=st.none() | st.binary(max_size=300))
def test_a_damaged_file_is_one_clear_error(
    split: Path, name: str, read: Callable[[Path], object], seed: int, foreign: bytes | None
):
    path = split / name
    content = path.read_bytes()
    try:
        path.write_bytes(damage(content, seed) if foreign is None else foreign)
        try:
            read(path)
        except ValueError as error:
            one_line(error, path)
    finally:
        path.write_bytes(content)


@shared_folder
@given(seed=st.integers(0, 2**32))
def test_damaged_statistics_are_never_taken_for_whole(split: Path, seed: int):
    path = split / "00000.json"
    content = path.read_bytes()
    damaged = damage(content, seed)
    try:
        path.write_bytes(damaged)
        if damaged != content:
            with pytest.raises(ValueError, match=r"00000\.json is damaged"):
                read_statistics(path)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("nested", [b"[" * 100_000, b'{"a":' * 100_000])
def test_deep_nesting_is_an_error_too(tmp_path: Path, nested: bytes):
    for name, read in (("00000.json", read_statistics), ("pack.json", lambda path: read_plan(path.parent))):
        (tmp_path / name).write_bytes(nested)
        with pytest.raises(ValueError, match=rf"{name} is damaged"):
            read(tmp_path / name)


@shared_folder
@given(content=st.binary(max_size=400), ending=st.sampled_from([".csv", ".json"]))
def test_a_label_table_of_any_bytes_is_one_clear_error(
    packed: Path, tmp_path: Path, content: bytes, ending: str
):
    path = tmp_path / f"labels{ending}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="labels") as caught:
        read_labels(path, read_classes(packed / "classes.csv"))
    one_line(caught.value, path)


@shared_folder
@given(content=st.binary(max_size=400))
def test_a_log_of_any_bytes_is_read_as_damaged_lines(tmp_path: Path, content: bytes):
    (tmp_path / "pack.log").write_bytes(content)
    rows, damaged = read_log(tmp_path / "pack.log")
    assert rows == []
    assert bool(damaged) == bool(content)
