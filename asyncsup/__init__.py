"""asyncsup keeps processes running, and patches what they run on while they run."""

__version__ = "0.1.0"
