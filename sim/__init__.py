"""The simulator: scenarios, workloads, clock, costs, faults, the run record and the command line."""
