"""What clients and deployments agree on: requests, answers, errors, settings."""
