"""Flow of a whole collection: many videos and folders of frames, by any number of processes, none lost.

Every process takes the largest source that nobody works on, writes its flow under another name, and renames it when it
is complete.
"""

from flow_inference.collection.options import CollectionOptions
from flow_inference.collection.report import CollectionReport
from flow_inference.collection.run import predict_collection

__all__ = ["CollectionOptions", "CollectionReport", "predict_collection"]
