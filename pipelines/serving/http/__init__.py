"""Endpoints: HTTP requests in, calls of the workers, HTTP answers out."""
