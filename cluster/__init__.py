"""Ray clusters for the jobs: options in, a running cluster out. Imports nothing of the project.

`local.py` starts several nodes on one machine, for tests of node failures.
"""
