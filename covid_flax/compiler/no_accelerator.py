"""Importing this leaves accelerators alone: none is looked for nor locked, no cloud is asked.

For commands that compile for other machines. Best imported before JAX, which may look for a TPU
when it is loaded; at the latest before any array is made.
"""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
if "jax" in sys.modules:
    sys.modules["jax"].config.update("jax_platforms", "cpu")
