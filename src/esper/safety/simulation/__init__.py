"""A deterministic stand-in for the world: one seed drives the disk, its faults, the clock and who comes when."""
