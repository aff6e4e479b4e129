"""The shard format: tar shards of fbanks and labels, their index, and their reader, local or remote."""

from psla_fast.shards.mirror import Mirror, exists_split, fill_from_file
from psla_fast.shards.reader import Index, Shards, open_shards
from psla_fast.shards.spec import FORMAT_VERSION, TAR_BLOCK, ShardError, Storage
from psla_fast.shards.transports import is_remote, join

__all__ = [
    "FORMAT_VERSION",
    "TAR_BLOCK",
    "Index",
    "Mirror",
    "ShardError",
    "Shards",
    "Storage",
    "exists_split",
    "fill_from_file",
    "is_remote",
    "join",
    "open_shards",
]
