"""The training loop, what it measures and what it writes down."""
