"""Benchmarks: from sizes and lengths to seconds of ours and of the usual way, in turns, and whether both give the same.

One function per row of `recipes/benchmark.py`; each returns a `Measured`: figures for results.json, and tables.
"""
