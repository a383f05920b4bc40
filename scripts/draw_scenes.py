"""`segmenter-hf draw-scenes` for people who work in a clone."""

import sys


if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # this folder, whose evaluate.py hides the library of that name

from segmenter_hf.cli.draw_scenes import main


if __name__ == "__main__":
    main()
