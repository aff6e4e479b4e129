"""Ontology: AudioSet's graph of sounds -> for each class of a vocabulary its children and ancestors in it."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from psla_fast.classes import Classes, shorten

PACKAGED = Path(__file__).parent / "data" / "audioset_ontology.json"
# Of FSD50K, in whose labels PSLA expands none of these
UNEXPANDED_FSD50K = ("/m/09l8g", "/m/0bm0k", "/t/dd00012", "/m/09hlz4", "/t/dd00071")


@dataclass(frozen=True)
class Ontology:
    """Sounds by mid: the mids of their children, and which are abstract, so that nothing passes them."""

    children: dict[str, tuple[str, ...]]
    abstract: frozenset[str]


@dataclass(frozen=True)
class Relations:
    """For each class the classes that it can add: its direct children (type I), its ancestors (type II)."""

    children: tuple[npt.NDArray[np.int32], ...]
    ancestors: tuple[npt.NDArray[np.int32], ...]


def read_ontology(path: Path = PACKAGED) -> Ontology:
    """Read an ontology in AudioSet's JSON format; raises ValueError that names what is wrong with it."""
    if not path.is_file():
        raise ValueError(f"{path} not found. Pass an ontology.json in AudioSet's format.")
    try:
        nodes = json.loads(path.read_text(encoding="utf-8"))
        if any(not isinstance(node["child_ids"], list) for node in nodes):
            raise ValueError("child_ids isn't a list")
        children = {str(node["id"]): tuple(map(str, node["child_ids"])) for node in nodes}
        abstract = frozenset(str(node["id"]) for node in nodes if node.get("restrictions") == ["abstract"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is no ontology ({type(error).__name__}: {shorten(str(error))}). It needs a list of id, "
            "child_ids and restrictions."
        ) from error
    if not children:
        raise ValueError(f"{path} holds no sound. Pass an ontology.json in AudioSet's format.")
    return Ontology(children, abstract)


def find_relations(ontology: Ontology, classes: Classes, unexpanded: tuple[str, ...] = ()) -> Relations:
    """Find what each class of a vocabulary can add; those in `unexpanded`, and unknown ones, add nothing.

    Ancestors are those reached through nodes that aren't abstract, and aren't so themselves. Source: PSLA,
    section III.C, and its code.
    """
    parents: dict[str, list[str]] = {}
    for mid, below in ontology.children.items():
        for child in below:
            parents.setdefault(child, []).append(mid)
    index = classes.index_by_mid()
    children, ancestors = [], []
    for mid in classes.mids:
        expands = mid not in unexpanded
        below = ontology.children.get(mid, ()) if expands else ()
        above = _climb(mid, parents, ontology.abstract) if expands else set()
        children.append(_indices(set(below), index))
        ancestors.append(_indices(above, index))
    return Relations(tuple(children), tuple(ancestors))


def _climb(mid: str, parents: dict[str, list[str]], abstract: frozenset[str]) -> set[str]:
    reached: set[str] = set()
    waiting = [] if mid in abstract else [mid]
    while waiting:
        for parent in parents.get(waiting.pop(), ()):
            if parent not in reached and parent not in abstract and parent != mid:
                reached.add(parent)
                waiting.append(parent)
    return reached


def _indices(mids: set[str], index: dict[str, int]) -> npt.NDArray[np.int32]:
    return np.array(sorted(index[mid] for mid in mids if mid in index), dtype=np.int32)
