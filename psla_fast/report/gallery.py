"""Gallery: scored clips -> a few examples with their pictures and each run's highest scores."""

import base64
from collections.abc import Sequence
from typing import Any

from psla_fast.report.clips import Picture, draw_clips
from psla_fast.report.examples import choose_examples, compute_margins, describe_scores
from psla_fast.report.runs import Run
from psla_fast.report.scored import Scored


def build_gallery(
    all_scored: Sequence[Scored | None], source: tuple[Run, str] | None, role: str, most: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Choose clips by the first run that was scored, draw them, and give each run's scores of them.

    source: a run and where its shards are. Where those can't be read no clip has a picture, and why is said.
    """
    scored = next((scored for scored in all_scored if scored), None)
    if scored is None or not most:
        return [], []
    chosen = choose_examples(scored.scores[scored.main], scored.targets, most)
    keys = [scored.keys[clip] for clip in chosen]
    pictures: dict[str, Picture] = {}
    notes = []
    if source:
        try:
            labels = [scored.targets[clip].nonzero()[0].tolist() for clip in chosen]
            pictures = draw_clips(*source, role, dict(zip(keys, labels, strict=True)))
        except ValueError as error:
            notes.append(f"no pictures of clips: {error}")
    rows = [{key: row for row, key in enumerate(other.keys)} if other else {} for other in all_scored]
    gallery = []
    for clip, key in zip(chosen, keys, strict=True):
        example: dict[str, Any] = {"key": key, "labels": scored.targets[clip].nonzero()[0].tolist()}
        if picture := pictures.get(key):
            example["picture"] = "data:image/png;base64," + base64.b64encode(picture.png).decode()
            example["seconds"] = round(picture.seconds, 2)
            example["heard"] = round(picture.heard_seconds, 2)
        example["runs"] = [_view(other, row.get(key)) for other, row in zip(all_scored, rows, strict=True)]
        gallery.append(example)
    return gallery, notes


def _view(scored: Scored | None, row: int | None) -> dict[str, Any] | None:
    """Give a run's scores of a clip, and whether it is right; None where it wasn't scored on it."""
    if scored is None or row is None:
        return None
    scores, targets = scored.scores[scored.main][row], scored.targets[row]
    margin = float(compute_margins(scores[None], targets[None])[0])
    return {"right": margin > 0, "scores": describe_scores(scores, targets)}
