"""What every command shares: flags with defaults in their help, and mistakes answered in one line."""
import argparse
import difflib
import errno
import logging
import os
import select
import signal
import sys
import warnings
from collections.abc import Callable

from shards import UserError


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help with defaults, where there are any."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, end with status 2 and name the nearest valid flag."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def error(self, message: str):
        raise UserError(f"{message} (--help lists what is valid)")

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.0)
            raise UserError(f"unknown argument {flag}; did you mean {near[0]}? (--help lists all)")
        return parsed


LIBRARIES = ("datasets", "diffusers", "huggingface_hub", "lpips", "matplotlib", "torch", "torchvision", "transformers")


def hush_libraries() -> None:
    """Leave out what libraries say about functions that they themselves will drop, which a user can do nothing about.

    Only where it arises in their own modules: what is said of a line of ours is for us to mend, and stays.
    """
    for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=rf"({'|'.join(LIBRARIES)})(\.|$)")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # of where its cache lies, without a home


def nobody_reads() -> bool:
    """Whether what reads our stdout or stderr has left."""
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def run_main(main: Callable[[list[str]], None], every_rank: bool = False) -> None:
    """Run `main(argv)`; a UserError becomes one line, on a node's first rank or on every rank, and exit status 2, not a traceback."""
    hush_libraries()
    try:
        main(sys.argv[1:])
        sys.stdout.flush()  # here, and not when Python ends, whose complaint nobody could answer
    except BrokenPipeError:
        if not nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(128 + signal.SIGPIPE)  # as other commands end in front of `| head`
    except UserError as error:
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        if every_rank or alone or os.environ.get("LOCAL_RANK", "0") == "0":
            print("error:", *str(error).splitlines(), file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(f"error: {str(error.filename)[:80]}...: this name is too long for a file", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
