"""The `dagman` command, also as `python -m dagman`; a stop is one line from the first moment on."""

import signal
import sys

from dagman.errors import ExitCode


def main() -> None:
    """Run the command line, whose modules take a while to import."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        from dagman.cli import main as command

        command()
    except KeyboardInterrupt:
        print("stopped; run the same command again", file=sys.stderr)
        sys.exit(ExitCode.STOPPED)


if __name__ == "__main__":
    main()
