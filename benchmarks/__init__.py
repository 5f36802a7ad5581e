"""Runnable ratios: every performance claim of the docs is a RESULT line of one of these."""
