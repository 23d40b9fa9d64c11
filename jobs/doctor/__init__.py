"""A run folder in, findings about its model, log and rows out (`qformer doctor`).

`run_records.py` reads the run, `model.py` loads and probes models, `job.py` collects the findings of
`pipelines.evaluation.doctor`, `report.py` prints them.
"""
