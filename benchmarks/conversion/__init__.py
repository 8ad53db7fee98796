"""The sections of benchmarks/convert.py."""
