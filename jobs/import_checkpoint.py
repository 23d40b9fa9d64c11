"""`python -m jobs.import_checkpoint` is `qformer import`."""

import sys

from jobs.cli.main import run_job

if __name__ == "__main__":
    sys.exit(run_job("import"))
