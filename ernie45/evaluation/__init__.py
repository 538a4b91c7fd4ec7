"""How good a model is: perplexity of a text, and tasks with answers that can be checked."""
