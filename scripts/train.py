"""`segmenter-hf train` for people who work in a clone."""

import sys


sys.path[:] = [folder for folder in sys.path if not folder.endswith("scripts")]  # its evaluate.py hides the library

from segmenter_hf.cli.train import main


if __name__ == "__main__":
    main()
