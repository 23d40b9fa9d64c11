"""Jobs behind the `qformer` command: settings in; prepared data, runs, reports and services out.

Rooms, lowest first (imports go down this list only):

- `settings`: pydantic models of all settings, loading and overrides. A new setting starts here.
- `cluster`: the Ray session of a job, and user errors inside Ray's exceptions.
- `folders`: output folders, run folders and checkpoints.
- `data`, `train`, `evaluate`, `convert`, `serve`, `doctor`: the jobs, each with a `main(settings)`.
- `demo`: a synthetic corpus with small frozen models, which runs all jobs in minutes.
- `bench`: benchmarks, run with `python -m jobs.bench NAME`.
- `cli`: the `qformer` command. A new job is one entry in its catalogue.
- Launchers (`prepare.py`, `features.py`, `caption.py`, `export.py`, `import_checkpoint.py` and each `__main__.py`) make
  `python -m jobs.NAME` work; they import `cli` alone.

`configs` holds recipes and example settings. `serve_config.py` keeps an import path alive that Serve configs name.
"""
