"""What a run writes down: metrics, accounting, timings."""
