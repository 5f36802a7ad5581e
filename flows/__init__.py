"""What runs: Prefect flows and the `e4s` command."""
