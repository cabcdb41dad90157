"""The training side: checkpoints of a running job, committed whole, kept by policy, resumed with proof.

Law: commits, manifests and digests are the writer's; this package adds only policy and coordination.
"""
