"""A plan run: batches over workers, tensors and GPUs as ends, one run with its report."""
