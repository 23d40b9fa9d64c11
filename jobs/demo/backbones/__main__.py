"""`python -m jobs.demo.backbones` makes the models anew."""

from jobs.demo.backbones.make import main

if __name__ == "__main__":
    main()
