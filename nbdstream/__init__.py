"""Run the machine now, move its disk later: serve a disk image, run on it at once, stream it in behind."""
