"""python -m umm is umm."""

from umm.cli import main

if __name__ == "__main__":
    main()
