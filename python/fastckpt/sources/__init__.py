"""Opens a checkpoint of any known format."""
