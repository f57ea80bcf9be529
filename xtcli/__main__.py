"""`python -m xtcli` is `xt`."""

from xtcli.cli import main

if __name__ == "__main__":
    main()
