"""How fast a model is on this machine, held against what the machine can do and against other programs."""
