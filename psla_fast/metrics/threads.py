"""Threads: what is done class by class -> the same on all cores; NumPy and SciPy let go of Python's lock."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
VALUES_A_THREAD = 2**19  # fewer aren't worth starting threads


def map_in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], num_values: int
) -> Iterator[Result]:
    """Yield function(item) of each item in order, from as many threads as torch uses, or none for few values.

    num_values says how much work all items are. The first error in their order is raised.
    """
    workers = min(torch.get_num_threads(), 1 + num_values // VALUES_A_THREAD)
    if workers == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(function, items)
