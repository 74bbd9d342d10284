"""From inputs to a plan: checkpoints and adapters that fit together, what each output takes, and its files."""
