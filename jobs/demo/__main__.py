"""`python -m jobs.demo` is `qformer demo`."""

import sys

from jobs.cli.main import run_job

if __name__ == "__main__":
    sys.exit(run_job("demo"))
