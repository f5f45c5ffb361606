"""What is shown of a run when it has ended."""
