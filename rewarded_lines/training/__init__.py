"""The parts of a recipe: arguments, data, models, rewards, trainers, and the run with its folder."""
