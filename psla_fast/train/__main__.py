"""Entry point: `python -m psla_fast.train RECIPE.toml… [--flag value]`, or the same under torchrun."""

import sys

from psla_fast.distributed import end_world, ending_at_once, start_world
from psla_fast.errors import exit_on_user_error
from psla_fast.recipe import parse_recipes
from psla_fast.train.config import TrainConfig
from psla_fast.train.loop import Trainer
from psla_fast.train.signals import Stopped


def main(arguments: list[str] | None = None) -> None:
    """Train as told; exits with 2 and one line for bad input, with 3 where a signal stopped the run."""
    prog = "psla_fast.train"
    with ending_at_once(), exit_on_user_error(prog):
        config = parse_recipes(TrainConfig, sys.argv[1:] if arguments is None else arguments, prog)
        world = start_world(config.device)
        try:
            Trainer(config, world).run()
        except Stopped as stop:
            if world.is_first:
                print(
                    f"\nstopped by {stop}; the same command goes on from {config.run}/checkpoints/last.pt",
                    flush=True,
                )
            end_world()
            sys.exit(3)
        end_world()


if __name__ == "__main__":
    main()
