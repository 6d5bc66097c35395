"""Start-up of a run of several processes: a TPU pod, a GPU cluster, or two processes on one machine."""

from __future__ import annotations

import os

import jax


def start_processes() -> None:
    """Joins the processes of one run, before any device is touched.

    The environment decides: ``SAFEMOE_COORDINATOR`` (host:port), ``SAFEMOE_PROCESSES`` and
    ``SAFEMOE_PROCESS_ID`` name the processes by hand; ``SAFEMOE_MULTIHOST=auto`` lets jax read the cluster
    it is in (Cloud TPU, SLURM, Kubernetes). With neither set the run has one process.
    """
    coordinator = os.environ.get("SAFEMOE_COORDINATOR")
    if coordinator:
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=int(os.environ["SAFEMOE_PROCESSES"]),
            process_id=int(os.environ["SAFEMOE_PROCESS_ID"]),
        )
    elif os.environ.get("SAFEMOE_MULTIHOST") == "auto":
        jax.distributed.initialize()
