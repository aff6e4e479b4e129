"""The shard format: tar shards of fbanks and labels, an index beside them, and their reader."""

from psla_fast.shards.reader import Index, ShardError, Shards, open_shards
from psla_fast.shards.spec import FORMAT_VERSION, Storage

__all__ = ["FORMAT_VERSION", "Index", "ShardError", "Shards", "Storage", "open_shards"]
