"""What a person submits: one thin module per job, its settings and the `qformer` command."""
