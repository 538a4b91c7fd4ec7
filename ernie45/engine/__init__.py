"""Generation: sampling and the reference generator."""
