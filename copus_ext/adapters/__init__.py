"""Where the pure part meets torch and Megatron: layouts, resharding, gradient statistics, timing."""
