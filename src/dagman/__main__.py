"""The `dagman` command, also as `python -m dagman`; a stop is one line from here on, before the long imports."""

import signal
import sys


def main() -> None:
    """Run the command line, whose modules take a while to import."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if sys.platform != "win32":  # the command may have begun anew, and kept stops back meanwhile
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
        from dagman.cli import main as command

        command()
    except KeyboardInterrupt:
        from dagman.errors import ExitCode

        if sys.stderr is not None:
            print("stopped; run the same command again", file=sys.stderr)
        sys.exit(ExitCode.STOPPED)


if __name__ == "__main__":
    main()
