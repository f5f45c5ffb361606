"""What a sequence is worth at a batch size: the critical batch, c, Goodput."""
