"""Square norms of the gradients of independent groups of sequences, read while Megatron trains."""
