"""Checkpoints: files, name maps, loading, writing, converting."""
