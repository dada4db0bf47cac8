"""`python -m jobs` is `sdxl-jobs`."""

from jobs.cli import main

if __name__ == "__main__":
    main()
