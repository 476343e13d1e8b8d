"""What an evaluation is made of: figures, intervals, calibration, alarms, probes."""
