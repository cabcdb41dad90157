"""What was made is checked: outputs against their record and an engine, tensors against a checkpoint."""
