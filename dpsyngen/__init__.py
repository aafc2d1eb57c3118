"""Train diffusion models on private images under differential privacy; sample; evaluate."""

import os

__version__ = "0.1.0"

# Before torch loads OpenMP: threads that wait for one another sleep instead of spinning. On an idle machine that costs nothing
# measurable; on a busy one a spinning thread keeps the very core that the thread it waits for needs, and training is twice as slow.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
