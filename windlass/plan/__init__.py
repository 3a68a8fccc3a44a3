"""Forecasts what a run will need, and finds what the machine lacks for it."""
