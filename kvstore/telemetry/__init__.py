"""What the daemon says of itself: its log and its metrics."""
