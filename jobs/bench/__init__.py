"""Side-by-side benchmarks; run with `python -m jobs.bench NAME`."""
