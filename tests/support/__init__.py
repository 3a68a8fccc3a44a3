"""Helpers of the tests: ranks in processes of their own, small data sets, whole runs from the command line."""
