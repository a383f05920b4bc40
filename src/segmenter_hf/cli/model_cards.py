"""Write the model cards of all published models.

python scripts/make_model_cards.py --output_dir model_cards
"""

from dataclasses import dataclass, field

from transformers import HfArgumentParser

from ..hub.model_card import write_published_model_cards
from ..utils.commands import command, parse_arguments


@dataclass
class Arguments:
    output_dir: str = field(default="model_cards", metadata={"help": "Folder of the cards."})


@command()
def main() -> None:
    (args,) = parse_arguments(HfArgumentParser(Arguments))
    cards = write_published_model_cards(args.output_dir)
    print(f"Wrote {len(cards)} cards to {args.output_dir}.")
