"""Studies built on the other packages: accuracy, calibration, the toy, the demo, the tables."""
