"""From inputs to a plan: checkpoints and adapters that fit together, and what each output wants of every tensor."""
