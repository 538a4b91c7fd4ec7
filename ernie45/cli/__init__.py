"""The command line. Turns arguments into calls; imported by nobody."""
