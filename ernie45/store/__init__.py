"""Models on this machine: where they lie, how they get there, what they are, and how one format becomes another."""
