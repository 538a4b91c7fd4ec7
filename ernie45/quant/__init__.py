"""Quantization: schemes, rounding, calibration, the packed checkpoint folder, and the leaves that compute with it."""
