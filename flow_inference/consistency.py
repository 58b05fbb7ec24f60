"""Forward-backward consistency, which the pipeline of a model carries with it: `modeling_raft.consistency_raft`."""

from modeling_raft.consistency_raft import consistency_error, is_occluded

__all__ = ["consistency_error", "is_occluded"]
