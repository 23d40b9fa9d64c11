"""The `qformer` command: names of jobs and options in, one job run, an exit code out."""
