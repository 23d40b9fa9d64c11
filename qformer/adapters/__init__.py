"""Small trained updates of frozen models."""
