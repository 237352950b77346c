"""What a level costs: calibration, evaluation, traces, ablations."""
