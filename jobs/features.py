"""`python -m jobs.features` is `qformer features`."""

import sys

from jobs.cli.main import run_job

if __name__ == "__main__":
    sys.exit(run_job("features"))
