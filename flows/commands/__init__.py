"""The commands of `e4s`, one per file: `add` describes its arguments, the function that it names carries it out.

Importing one loads neither torch nor Prefect; running one may.
"""
