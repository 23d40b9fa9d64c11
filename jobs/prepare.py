"""`python -m jobs.prepare` is `qformer prepare`."""

import sys

from jobs.cli.main import run_job

if __name__ == "__main__":
    sys.exit(run_job("prepare"))
