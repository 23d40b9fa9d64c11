"""Ray Serve: deployments and their HTTP interface."""
