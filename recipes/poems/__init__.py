"""A small ERNIE MoE that writes classical Chinese poems in a form that is asked for."""
