"""`python -m segmenter_hf` is the console command `segmenter-hf`."""

from .cli.main import main


if __name__ == "__main__":
    main()
