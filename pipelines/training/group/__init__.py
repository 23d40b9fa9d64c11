"""The workers of a run together: their batches, their launch, their watchdog."""
