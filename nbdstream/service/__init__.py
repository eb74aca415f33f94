"""systemd: readiness, activation, watchdog."""
