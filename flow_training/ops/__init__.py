"""What keeps a run alive and apart from others, and has nothing to do with learning."""
