"""Shows how it was started, and ends in the way that its first argument names."""

import atexit
import os
import signal
import sys
import threading
import time

import __main__


def inner():
    raise ValueError("told to")


mode = sys.argv[1]
print(sys.argv, sys.path[0], __file__, __name__, __spec__, __package__, sorted(globals()))
print("main is this module:", __main__.__dict__ is globals(), sys.modules["__main__"].inner is inner)
print("signals:", signal.getsignal(signal.SIGINT) is signal.default_int_handler, signal.getsignal(signal.SIGTERM))
print("blocked:", signal.pthread_sigmask(signal.SIG_BLOCK, []), "wakeup:", signal.set_wakeup_fd(-1))
print("hook:", sys.excepthook is sys.__excepthook__, "threads:", threading.active_count())
atexit.register(lambda: print("atexit of", __main__.__name__))
thread = threading.Thread(target=lambda: (time.sleep(0.1), print("a thread that is waited for")))
thread.start()

if mode == "exception":
    try:
        inner()
    except ValueError as error:
        raise KeyError("and then") from error
if mode == "code":
    sys.exit(3)
if mode == "message":
    sys.exit("a last word")
if mode == "none":
    sys.exit(None)
if mode == "interrupt":
    raise KeyboardInterrupt
if mode == "signal":
    os.kill(os.getpid(), signal.SIGALRM)
if mode == "hard":
    sys.stdout.flush()
    os._exit(4)
if mode == "hook":
    sys.excepthook = lambda kind, value, trace: print("own hook", kind.__name__, value, file=sys.stderr)
    inner()
if mode == "input":
    print("read:", input())
