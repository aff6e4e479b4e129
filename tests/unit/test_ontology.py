import json
from pathlib import Path

import pytest

from psla_fast.classes import Classes, find_classes
from psla_fast.ontology import UNEXPANDED_FSD50K, find_relations, read_ontology

GRAPH = [  # a: b and c below; b abstract; d below both b and c; e below d; f alone, below itself
    {"id": "a", "child_ids": ["b", "c"], "restrictions": []},
    {"id": "b", "child_ids": ["d"], "restrictions": ["abstract"]},
    {"id": "c", "child_ids": ["d"], "restrictions": ["blacklist"]},
    {"id": "d", "child_ids": ["e"], "restrictions": []},
    {"id": "e", "child_ids": [], "restrictions": []},
    {"id": "f", "child_ids": ["f", "g"], "restrictions": ["abstract", "blacklist"]},
    {"id": "g", "child_ids": [], "restrictions": []},
]
CLASSES = Classes(tuple("gfedcba"), tuple("GFEDCBA"))


def names(indices: object) -> str:
    return "".join(CLASSES.mids[i] for i in indices)  # type: ignore[attr-defined]


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / "ontology.json"
    path.write_text(json.dumps(GRAPH))
    return path


def test_children_are_direct_and_ancestors_come_by_no_abstract_node(graph: Path):
    relations = find_relations(read_ontology(graph), CLASSES)
    assert [names(r) for r in relations.children] == ["", "gf", "", "e", "d", "d", "cb"]
    assert [names(r) for r in relations.ancestors] == ["f", "", "dca", "ca", "a", "", ""]


def test_what_is_not_in_the_vocabulary_is_passed_through_and_not_added(graph: Path):
    few = Classes(("a", "e", "z"), ("A", "E", "Z"))
    relations = find_relations(read_ontology(graph), few)
    assert [r.tolist() for r in relations.ancestors] == [[], [0], []]
    assert [r.tolist() for r in relations.children] == [[], [], []]


def test_unexpanded_classes_add_nothing_but_may_be_added(graph: Path):
    relations = find_relations(read_ontology(graph), CLASSES, ("d",))
    assert names(relations.children[3]) == names(relations.ancestors[3]) == ""
    assert "d" in names(relations.ancestors[2])


def test_the_packaged_ontology_knows_every_packaged_class():
    ontology = read_ontology()
    for name in ("audioset", "fsd50k"):
        classes = find_classes(name)
        assert set(classes.mids) <= ontology.children.keys()
        relations = find_relations(ontology, classes)
        assert sum(len(r) for r in relations.ancestors) > 100
    assert not set(UNEXPANDED_FSD50K) & set(find_classes("audioset").mids)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "[]",
        "{}",
        "[1]",
        '[{"id": "a"}]',
        '[{"id": "a", "child_ids": 3}]',
        '[{"id": "a", "child_ids": "bc"}]',
    ],
)
def test_a_file_that_is_no_ontology_is_refused(text: str, tmp_path: Path):
    (tmp_path / "o.json").write_text(text)
    with pytest.raises(ValueError, match=r"o.json (is no ontology|holds no sound)"):
        read_ontology(tmp_path / "o.json")
    with pytest.raises(ValueError, match="not found"):
        read_ontology(tmp_path / "absent.json")
