"""`python -m pipeline`."""

import sys

if __name__ == "__main__":
    try:
        from pipeline.cli import main

        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        # Before the command line could say it itself: while it was being imported, or as it handed its status back.
        sys.stderr.write("temper: interrupted; the same command carries on where this one stopped\n")
        sys.exit(130)
