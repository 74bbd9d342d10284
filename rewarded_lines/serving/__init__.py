"""A front served: requests say which preference they want."""
