"""A run: its folder, how it starts and ends, its command line."""
