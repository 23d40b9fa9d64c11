"""One request of the engine: its inputs, its state while it runs, the choice of its next token, and its text."""
