"""The merge itself: rules on tensors, the schedule over depth, and the stream that applies them."""
