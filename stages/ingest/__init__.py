"""`ingest`: URL table to webdataset shards of downloaded images."""

from stages.ingest.stage import Inputs, run

__all__ = ["Inputs", "run"]
