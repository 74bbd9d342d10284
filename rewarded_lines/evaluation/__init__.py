"""From policies to scores: prompts, generation, rewards, and the sweep that brings them together."""
