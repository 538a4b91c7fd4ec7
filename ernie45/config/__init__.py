"""Configurations: what a model is. Imports nothing of ours but the errors."""
