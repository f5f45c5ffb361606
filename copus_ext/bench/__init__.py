"""What benchmarks under tools/ share."""
