"""Makes the demo's small frozen models, which lie in `jobs/demo/models`."""
