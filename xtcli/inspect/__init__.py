"""What a preset, a run or a checkpoint is: its modules, costs, masks, tensors, curves, and how two of them differ."""
