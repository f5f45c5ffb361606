"""Who holds what of a tensor, and who sends what to whom: geometry without tensors."""
