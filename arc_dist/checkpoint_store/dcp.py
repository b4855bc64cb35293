"""Our checkpoints as storage for torch.distributed.checkpoint: `dcp.save`, `dcp.async_save`, `dcp.load`.

::

    import torch.distributed.checkpoint as dcp
    from arc_dist.checkpoint_store.dcp import ArcReader, ArcWriter

    dcp.save(state, storage_writer=ArcWriter("s3://bucket/ckpt", run="a", step=1200))
    dcp.load(state, storage_reader=ArcReader("s3://bucket/ckpt", run="a"))
"""

from __future__ import annotations

from arc_dist.checkpoint_store.dcp_planner import ArcLoadPlanner, LoadReport
from arc_dist.checkpoint_store.dcp_reader import ArcReader
from arc_dist.checkpoint_store.dcp_writer import ArcWriter

__all__ = ["ArcLoadPlanner", "ArcReader", "ArcWriter", "LoadReport"]
