"""Write the model cards of all published models, for maintainers.

python scripts/make_model_cards.py --output_dir model_cards
"""

import argparse
import sys


if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # this folder, whose evaluate.py hides the library of that name
    from segmenter_hf.hub.model_card import write_published_model_cards

    parser = argparse.ArgumentParser(description="Write the model cards of all published models.")
    parser.add_argument("--output_dir", default="model_cards", help="Folder of the cards.")
    args = parser.parse_args()
    print(f"Wrote {len(write_published_model_cards(args.output_dir))} cards to {args.output_dir}.")
