"""The one training loop, its optimisers, weight averaging and resume."""
