"""Models, data and clocks that several benchmarks share; no commands."""
