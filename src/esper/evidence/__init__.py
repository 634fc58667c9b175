"""Does a branch help? Splits, paired tests, controls and false-discovery control."""
