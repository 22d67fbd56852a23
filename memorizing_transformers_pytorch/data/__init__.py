"""Documents to segments."""
