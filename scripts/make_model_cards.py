"""Write the model cards of all published models.

python scripts/make_model_cards.py --output_dir model_cards
"""

import sys
from dataclasses import dataclass, field


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its evaluate.py would hide the library of that name

from transformers import HfArgumentParser

from segmenter_hf.commands import command, parse_arguments
from segmenter_hf.model_card import write_published_model_cards


@dataclass
class Arguments:
    output_dir: str = field(default="model_cards", metadata={"help": "Folder of the cards."})


@command()
def main() -> None:
    (args,) = parse_arguments(HfArgumentParser(Arguments))
    cards = write_published_model_cards(args.output_dir)
    print(f"Wrote {len(cards)} cards to {args.output_dir}.")


if __name__ == "__main__":
    main()
