"""What is seen of a run: metrics, console, watchdog, stragglers, report."""
