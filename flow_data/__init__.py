"""Optical-flow samples: files, features and data sources. Knows nothing of models or of a training run."""
