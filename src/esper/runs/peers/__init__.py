"""Other libraries that grow networks, each behind one adapter; imported only where they are compared with."""
