"""Inside the sandbox: LiveCodeBench's own code tests a program, which runs in a process of its own.

That process gets the program and the inputs of its tests. It has neither the expected outputs nor the
descriptor that the verdict leaves by, so that all it can do for a good verdict is to answer right.

    python driver.py <GIVEN >RESULTS

GIVEN is JSON: `packages` (where NumPy is), `testing` (source of testing_util.py), `program`, `public`
and `hidden` tests, `function`, `seconds` for each test. RESULTS is JSON: the result of each test that
was run, then the number of all tests.
"""

import base64
import io
import json
import os
import pickle
import signal
import socket
import sys
import zlib
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

STDIO = "wrapped_function"
"""What testing_util makes of a program that reads its input."""
PLAIN = {
    "builtins": [
        "bool",
        "complex",
        "dict",
        "float",
        "frozenset",
        "int",
        "list",
        "range",
        "set",
        "str",
    ],
    "collections": ["Counter", "OrderedDict", "defaultdict", "deque"],
}


class PlainUnpickler(pickle.Unpickler):
    """Values of Python's own types, which a program may answer with."""

    def find_class(self, module: str, name: str) -> Any:  # a class
        if name not in PLAIN.get(module, ()):
            raise pickle.UnpicklingError(f"expected plain values, found {module}.{name}")
        return super().find_class(module, name)


class PlainPickler(pickle.Pickler):
    """Writes NumPy's scalars as Python's."""

    def reducer_override(self, value: Any) -> Any:  # any value; how to make it again
        if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
            plain = value.item()
            return type(plain), (plain,)
        return NotImplemented


class Program:
    """The process of the program, as the testing code sees it."""

    def __init__(self) -> None:
        here, there = socket.socketpair()
        self._pid = os.fork()
        if self._pid == 0:
            here.close()
            serve(there)
        there.close()
        self._stream = here.makefile("rwb")
        self._kill = os.kill  # the testing code takes it away

    def ask(self, *request: object) -> Any:  # the answer
        """Have something done there; raises what went wrong."""
        pickle.dump(request, self._stream)
        self._stream.flush()
        is_answer, value = PlainUnpickler(self._stream).load()
        if not is_answer:
            raise RuntimeError(value)
        return value

    def compile(self, code: str, seconds: int, *, function: str | None) -> SimpleNamespace:
        """Stands for `compile_code`: what it returns has the functions that may be called."""
        self.ask("compile", code, seconds)
        names = [name for name in (STDIO, function) if name]
        return SimpleNamespace(**{name: partial(self.call, name) for name in names})

    def call(self, name: str, *arguments: object) -> Any:  # what the function returns
        return self.ask("call", name, arguments)

    def read(self, _: object, text: str) -> None:
        """Stands for `call_method`: the program reads `text`, and what it prints is printed here."""
        sys.stdout.write(self.ask("read", text))

    def end(self) -> None:
        self._kill(self._pid, signal.SIGKILL)


def serve(link: socket.socket) -> NoReturn:
    """The program's process: compile it and call its functions, as the driver asks."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nowhere, descriptor)
    stream = link.makefile("rwb")
    solution: Any = None
    testing: Any = None
    while True:
        kind, *rest = pickle.load(stream)
        answer: Any = None
        try:
            if kind == "load":
                testing = load_testing(*rest)
                testing.reliability_guard()
            elif kind == "compile":
                solution = testing.compile_code(*rest)
            elif kind == "call":
                answer = testing.get_function(solution, rest[0])(*rest[1])
            else:
                with testing.Capturing() as captured:
                    testing.call_method(testing.get_function(solution, STDIO), *rest)
                answer = captured[0]
            reply = pickled((True, answer))
        except BaseException as error:  # noqa: BLE001 - a program may raise anything
            reply = pickled((False, repr(error)))
        stream.write(reply)
        stream.flush()


def pickled(value: object) -> bytes:
    """As the driver can read it."""
    buffer = io.BytesIO()
    PlainPickler(buffer).dump(value)
    return buffer.getvalue()


def load_testing(packages: str, source: str) -> ModuleType:
    """testing_util.py as a module."""
    sys.path.append(packages)
    testing = ModuleType("testing_util")
    exec(compile(source, "testing_util.py", "exec"), testing.__dict__)
    return testing


def tests_of(public: str, hidden: str) -> list[dict[str, str]]:
    """All tests of a problem; the data set pickles the hidden ones, as text."""
    try:
        found = json.loads(hidden)
    except ValueError:
        packed = zlib.decompress(base64.b64decode(hidden))
        found = json.loads(PlainUnpickler(io.BytesIO(packed)).load())
    return [*json.loads(public), *found]


def main() -> None:
    """Test the program and say how it went."""
    program = Program()  # before anything is read that it must not know
    verdict, sys.stdout = sys.stdout, sys.stderr
    given = json.load(sys.stdin)
    loaded = given["packages"], given["testing"]
    program.ask("load", *loaded)
    testing: Any = load_testing(*loaded)
    testing.compile_code = partial(program.compile, function=given["function"])
    testing.call_method = program.read
    tests = tests_of(given["public"], given["hidden"])
    sample = {
        "inputs": [test["input"] for test in tests],
        "outputs": [test["output"] for test in tests],
        "fn_name": given["function"],
    }
    try:
        found, _ = testing.run_test(
            {"input_output": json.dumps(sample)}, test=given["program"], timeout=given["seconds"]
        )
    finally:
        program.end()
    print(json.dumps([*(int(result) for result in found), len(tests)]), file=verdict, flush=True)


if __name__ == "__main__":
    main()
