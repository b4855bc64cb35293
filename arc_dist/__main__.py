"""`python -m arc_dist train.py`: see launch/main.py."""

from arc_dist.launch.main import start

if __name__ == "__main__":
    start()()
