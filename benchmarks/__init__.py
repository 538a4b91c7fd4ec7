"""Programs that measure this package beside its peers; README.md says how to run and read them."""
