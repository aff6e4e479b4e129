"""Download: the file of ImageNet weights that belongs to a network, by way of torch hub's cache."""

import urllib.error
from pathlib import Path

import torch

WAYS_OUT = "use --model.pretrained none, or --model.name efficientnet_lite0, whose weights are installed."


def fetch_weights(name: str, url: str) -> Path:
    """Return the file of a network's ImageNet weights; it is fetched into torch hub's cache first.

    The url's file is named by torch hub's convention, NAME-SHA256PREFIX.pth, and checked by it. Raises
    ValueError with the ways out where it can't be had.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = path.stem.rsplit("-", 1)[1]
        torch.hub.download_url_to_file(url, str(path), hash_prefix=digest, progress=False)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise ValueError(
            f"ImageNet weights of {name} can't be fetched from {url} ({error}). Put that file at {path}, or "
            f"{WAYS_OUT}"
        ) from error
    return path
