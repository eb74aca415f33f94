"""A remote NBD export: libnbd handles in a thread of their own."""
