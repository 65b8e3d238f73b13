"""The entry point: the command line, by the script `nodeservice` or by `python -m nodeservice`."""

import signal


def main() -> None:
    """Run the command line.

    Until its command begins, Ctrl-C ends the process by the signal itself: half of an import has nothing to clean up, and
    its traceback tells nobody anything.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where the caller ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from nodeservice.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
