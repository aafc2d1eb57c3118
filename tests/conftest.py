"""What all tests share: one thread, since two test runs side by side would only fight for cores, and reproducible examples."""

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("tests")
