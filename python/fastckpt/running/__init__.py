"""A plan run: batches over workers, tensors and GPUs as sinks, one run with its report."""
