"""A run's records and checkpoint in, findings out: one line each, with what to do."""
