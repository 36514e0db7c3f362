"""The HTML report of a calibration: one file that opens anywhere."""
