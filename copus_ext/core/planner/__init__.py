"""From what a run knows to a decision."""
