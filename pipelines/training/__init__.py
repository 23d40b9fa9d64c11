"""Training of a bridge with Ray Train: batches of rows in; checkpoints, metrics and the accounting of rows out.

Rooms, lowest first; each imports only from those before it:

- `records`: what a run writes down. Change here a metric, the log, the accounting of rows, the time and FLOP counters.
- `step`: one optimiser step and the loop over steps. Change here the losses' weighting, optimiser, precision or guard.
- `run`: one run on one rank. Change here what is built from the settings, what a checkpoint holds, how a run resumes.
- `group`: all ranks together. Change here how batches reach the ranks, how Ray Train starts them, the hang watchdog.

`jobs.train` reads the settings and starts a run; it holds what one rank does in `jobs.train.worker`.
"""
