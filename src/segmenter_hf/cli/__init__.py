"""The command line: a module for each subcommand of `segmenter-hf`, and what they share."""

import os


# Before torch is loaded: threads of GNU OpenMP that wait actively lose whole time slices to another busy process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
