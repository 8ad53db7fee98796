"""`python -m mswift`: the `mswift` command, for an interpreter whose scripts are not on the PATH."""

from mswift.cli.main import console

if __name__ == "__main__":
    console()
