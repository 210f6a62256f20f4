"""The transformer and the ways to run it: plain, and hand-scheduled."""
