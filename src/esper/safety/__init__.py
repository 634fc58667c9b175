"""Guard, exact snapshots and crash-safe checkpoints."""
