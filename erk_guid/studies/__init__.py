"""Studies that use the rest: accuracy, calibration, the toy, the demo, the tables."""
