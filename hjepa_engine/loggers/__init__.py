"""Where metrics and media are written to."""
