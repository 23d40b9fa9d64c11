"""Training of the small frozen models of the demo (`python -m jobs.demo.backbones`, into `jobs/demo/models`)."""
