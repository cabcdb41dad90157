"""The local parts of transformers' own tensor-parallel model."""

from __future__ import annotations

import pytest
import torch.distributed as dist

fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
parallel = pytest.importorskip("transformers.distributed.tensor_parallel")


def local_parts(model, tp, rank):
    """Parameter or buffer name -> what that rank holds.

    The model is cut in place, in a fake process group: cutting needs no messages."""
    if not hasattr(model, "_expand_parallel_plan"):
        pytest.skip("this transformers is too old to cut by _expand_parallel_plan")
    dist.init_process_group("fake", store=fake.FakeStore(), rank=rank, world_size=tp)
    try:
        mesh = dist.init_device_mesh("cpu", (tp,), mesh_dim_names=("tp",))
        names = {*dict(model.named_modules()), *dict(model.named_parameters())}  # not a tied lm_head's
        plan = {n: s for n, s in model._expand_parallel_plan(model.tp_plan).items() if n in names}
        parallel.apply_tensor_parallelism(model, mesh, plan)
        kept = model.state_dict(keep_vars=True)
        held = [(n, p) for n, p in model.named_parameters()]
        held += [(n, b) for n, b in model.named_buffers() if n in kept]
        return {n: (p.to_local() if hasattr(p, "to_local") else p) for n, p in held}
    finally:
        dist.destroy_process_group()
