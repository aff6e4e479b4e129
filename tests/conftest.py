"""Fixtures of all tests: the synthetic FSD50K, and the shards packed from it."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from psla_fast.demo import write_synthetic_fsd50k
from psla_fast.pack import PackConfig, WorkConfig, pack_splits
from psla_fast.sources import read_fsd50k
from tests.training_worker import Nursery, open_nursery, write_shards

# The same examples on every machine; HYPOTHESIS_PROFILE=search looks for new ones.
hypothesis.settings.register_profile(
    "repeatable", deadline=None, max_examples=60, derandomize=True, database=None
)
hypothesis.settings.register_profile("search", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """A process that forks trainings, and kills them at a chosen moment."""
    with open_nursery(tmp_path_factory.mktemp("nursery") / "output") as opened:
        yield opened


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """61, 13 and 11 clips, for the nursery's trainings: an epoch has 7 steps."""
    return write_shards(tmp_path_factory.mktemp("nursery") / "shards")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Put back what a training within a test sets for its whole process: signals, the limit of graphs."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked gpu where there is no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def synthetic_fsd50k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 clips in FSD50K's layout: 64 train, 16 val, 16 eval. Read only: other tests share it."""
    root = tmp_path_factory.mktemp("fsd50k") / "synthetic"
    write_synthetic_fsd50k(root, num_clips=96, seed=0)
    return root


@pytest.fixture(scope="session")
def packed(synthetic_fsd50k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of `synthetic_fsd50k` (train, val, eval). Read only: other tests share them."""
    shards = tmp_path_factory.mktemp("shards") / "synthetic"
    classes, splits = read_fsd50k(synthetic_fsd50k)
    pack_splits(classes, splits, shards, PackConfig(), WorkConfig(workers=1))
    return shards
