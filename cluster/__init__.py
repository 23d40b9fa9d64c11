"""How a Ray cluster comes to be. Imports nothing of the project."""
