"""What the recipes share: arguments, the run and its folder, models, and any reward in the forms that TRL takes."""
