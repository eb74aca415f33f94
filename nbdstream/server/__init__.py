"""An NBD server for any BlockDevice: listener, connection, export."""
