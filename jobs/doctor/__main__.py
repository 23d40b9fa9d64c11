"""`python -m jobs.doctor` is `qformer doctor`."""

import sys

from jobs.cli.main import run_job

if __name__ == "__main__":
    sys.exit(run_job("doctor"))
