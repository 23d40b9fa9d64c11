"""The Ray cluster that a job runs on: joined or started, and what is written down of it."""
