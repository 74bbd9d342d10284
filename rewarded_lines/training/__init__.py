"""What makes a script a recipe: arguments, models, trainers, rewards as trainers take them, the run and its folder."""
