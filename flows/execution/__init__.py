"""Running jobs: the scheduler, its executors, and what a job does in a process. Imports no planner."""
