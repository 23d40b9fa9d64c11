"""What builds of torch do wrong by themselves, each in a module of its own."""
