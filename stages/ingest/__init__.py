"""`ingest`: URL table to webdataset shards of downloaded images."""

from stages.ingest.stage import Inputs, preflight, run

__all__ = ["Inputs", "preflight", "run"]
