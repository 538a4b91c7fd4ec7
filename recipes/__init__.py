"""Training runs from data to a served model; README.md lists them with what they gave."""
