"""What policies are trained for: rewards in the forms that TRL takes, responses and pairs scored by them."""
