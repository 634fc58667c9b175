"""The benchmark's tasks: one file each, which registers itself. No data set is part of this repository."""
