"""What a run writes down: batches, losses and timings in; metrics files, Prometheus and the accounting of rows out.

Logged metrics go through `metrics_log`, Prometheus names stand in `data_metrics` and `train_metrics`, messages to the
driver in `run_status`. A new counter of time goes into `run_times`, one of operations into `flops`, a health check of
the metrics into `health`; which rows count as used or quarantined is decided in `accounting`.
"""
