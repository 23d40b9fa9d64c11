"""One request of the engine: its inputs, its running state, its next token, its text."""
