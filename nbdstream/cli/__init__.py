"""The commands. The only place that prints, parses arguments or picks an event loop."""
