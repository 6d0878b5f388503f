"""Benchmarks: what a step, a stream, a fleet and a stack of runs cost."""
