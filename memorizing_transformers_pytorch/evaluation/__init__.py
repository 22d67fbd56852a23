"""What the memory of a trained model is worth: losses by memory size, controls, intervals, and how they are told."""
