"""What a run leaves on disk: checkpoints, metrics, environment, samples; written so that a crash loses nothing."""
