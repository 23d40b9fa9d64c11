"""What tells a healthy Q-Former from a broken one, on tensors."""
