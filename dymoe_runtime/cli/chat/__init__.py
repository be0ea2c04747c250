"""The conversation on a terminal: its loop, its commands, what it shows, and how it reads lines."""
