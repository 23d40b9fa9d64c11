"""`python -m jobs.export` is `qformer export`."""

import sys

from jobs.cli.main import run_job

if __name__ == "__main__":
    sys.exit(run_job("export"))
