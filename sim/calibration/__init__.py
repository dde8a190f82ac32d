"""A step-time model of the present device: measured on real steps, kept in a file, used as `cost: {kind: measured}`."""
