"""Generation: sampling, the reference generator, and the engine that serves many requests at once."""
