"""Uses every start method of multiprocessing, whose children import this file again."""

import multiprocessing
import os


def square(value):
    return value * value


if __name__ == "__main__":
    parent = os.getpid()
    for method in ("spawn", "forkserver", "fork"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            print(method, pool.map(square, [1, 2, 3]), flush=True)
