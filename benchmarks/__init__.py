"""Benchmarks: what the library claims, measured against floors and other paths in the same run."""
