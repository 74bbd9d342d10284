"""`python -m rewarded_lines` is the command `rewarded-lines`."""

from rewarded_lines.cli import main

if __name__ == "__main__":
    main()
