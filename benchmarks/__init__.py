"""What a memory costs: measurements against fair rivals, side by side on one machine; see docs/performance.md."""
