"""Watches a run and tells of it: metrics, console, watchdog, stragglers, report."""
