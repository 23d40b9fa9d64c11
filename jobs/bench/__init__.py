"""Benchmarks against peers: a name in, a table and a JSON result out (`python -m jobs.bench NAME`).

Each benchmark is a module with `run() -> BenchResult`; a new one is a new module. Modules that only help one of them
begin with its name and are listed in `__main__.py`. `results` holds the published results.
"""
