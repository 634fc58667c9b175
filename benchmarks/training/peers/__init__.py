"""Other ways to grow, as arms of the same protocol: one file each, which registers itself."""
