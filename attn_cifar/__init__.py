__version__ = "0.2.0"

import os

# NVIDIA's cuBLAS needs fixed buffers to give the same bits each time, and reads this once, at its first call in a process.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
