"""An adapter of the default model that learns to follow task descriptions."""
