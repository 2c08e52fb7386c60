"""The command `varscale`: audit, predict and probe a model from a shell."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import io
import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import tyro
from flax import linen as nn
from flax import nnx
from rich import progress

import varscale as vs
from varscale.auditing.findings import Audit, read_baseline, since

CLEAN, FOUND, WRONG_USE = 0, 1, 2
_SLOW = 2.0  # seconds after which the terminal shows that something is going on
_DTYPES = {"f": "float", "bf": "bfloat", "i": "int", "u": "uint", "c": "complex"}
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
_SPEC = re.compile(r"(?P<kind>bf|f|i|u|c|bool)(?P<bits>\d*)\[(?P<shape>[\d,\s]*)\](?::(?P<low>-?\d+)\.\.(?P<high>-?\d+))?")


_File = Annotated[str | None, tyro.conf.arg(metavar="FILE")]
_Codes = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="CODE[:GLOB]")]


class UsageError(Exception):
    """A wrong use of the command; the message is one line."""


@dataclasses.dataclass(frozen=True)
class _Model:
    """What every command about a model takes.

    Attributes:
        target: module:name of a flax module, of a function of no argument that returns one, or of an nnx factory.
        input: an input, such as "f32[8,224,224,3]" or, for whole numbers from 0 to 999, "i32[2,128]:0..999"; once for each.
        keyword: a keyword of the call, such as train=False; once for each.
        method: the method to use in place of __call__.
        json: print JSON.
    """

    target: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODULE:NAME")]
    input: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(aliases=["-i"], metavar="DTYPE[SHAPE]")] = ()
    keyword: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=VALUE")] = ()
    method: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    json: bool = False

    def model(self) -> Any:
        return resolved(self.target)

    def inputs(self, key: Any = None) -> Any:
        if not self.input:
            raise UsageError('--input is missing: give a dtype and a shape, such as --input "f32[8,224,224,3]"')
        return vs.inputs(*(parsed_input(text, key) for text in self.input), **dict(map(parsed_keyword, self.keyword)))


@dataclasses.dataclass(frozen=True)
class AuditCommand(_Model):
    """Say what is wrong with a model's initialization, and the line that mends it.

    Attributes:
        key: seed of a key: draw the parameters and audit their numbers too.
        ignore: a code, or a code with a glob ("VS101:blocks/*/head"), to leave out; once for each.
        baseline: JSON of an older audit, whose findings pass.
        fail_on: exit with status 1 on findings of this level or worse.
        plot: file to draw the picture into.
    """

    key: Annotated[int | None, tyro.conf.arg(metavar="SEED")] = None
    ignore: _Codes = ()
    baseline: _File = None
    fail_on: Literal["error", "warning", "info"] = "error"
    plot: _File = None

    def result(self) -> Audit:
        known = None if self.baseline is None else read_baseline(self.baseline)
        key = None if self.key is None else jax.random.key(self.key)
        found = vs.audit(self.model(), self.inputs(), key=key, ignore=self.ignore, method=self.method)
        return found if known is None else since(found, known)

    def show(self, result: Audit) -> int:
        _show(result, self.json)
        _draw(result, self.plot)
        return FOUND if result.at_least(self.fail_on) else CLEAN


@dataclasses.dataclass(frozen=True)
class PredictCommand(_Model):
    """Predict the moments of every layer from shapes alone.

    Attributes:
        plot: file to draw the picture into.
    """

    plot: _File = None

    def result(self) -> vs.Report:
        return vs.predict(self.model(), self.inputs(), method=self.method)

    def show(self, result: vs.Report) -> int:
        _show(result, self.json)
        _draw(result, self.plot)
        return CLEAN


@dataclasses.dataclass(frozen=True)
class ProbeCommand(_Model):
    """Draw a model and its inputs, and measure every layer.

    Attributes:
        key: seed of the key.
        gradients: measure gradients too, of a random cotangent.
        plot: file to draw the picture into.
    """

    key: Annotated[int, tyro.conf.arg(metavar="SEED")] = 0
    gradients: bool = False
    plot: _File = None

    def result(self) -> vs.Report:
        model, key = self.model(), jax.random.key(self.key)
        for_params, for_inputs = jax.random.split(key)
        x = self.inputs(for_inputs)
        loss = "random" if self.gradients else None
        if isinstance(model, nn.Module):
            params = vs.initialize(model, for_params, x, method=self.method)
            return vs.probe(model, params, x, loss=loss, method=self.method)
        net = model if isinstance(model, nnx.Module) else vs.initialize(model, for_params)
        return vs.probe(net, None, x, loss=loss, method=self.method)

    def show(self, result: vs.Report) -> int:
        _show(result, self.json)
        _draw(result, self.plot)
        return CLEAN


@dataclasses.dataclass(frozen=True)
class UsesCommand(_Model):
    """Say what the program does with each parameter: role, fans of use, residual branches."""

    def result(self) -> vs.Uses:
        return vs.uses(self.model(), self.inputs(), method=self.method)

    def show(self, result: vs.Uses) -> int:
        _show(result, self.json)
        return CLEAN


@dataclasses.dataclass(frozen=True)
class AuditParametersCommand:
    """Audit the numbers of a checkpoint.

    Attributes:
        file: what `vs.transfer.load` reads.
        ignore: a code, or a code with a glob, to leave out; once for each.
        baseline: JSON of an older audit, whose findings pass.
        fail_on: exit with status 1 on findings of this level or worse.
        json: print JSON.
    """

    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    ignore: _Codes = ()
    baseline: _File = None
    fail_on: Literal["error", "warning", "info"] = "error"
    json: bool = False

    def result(self) -> Audit:
        known = None if self.baseline is None else read_baseline(self.baseline)
        found = vs.audit_parameters(self.file, ignore=self.ignore)
        return found if known is None else since(found, known)

    def show(self, result: Audit) -> int:
        _show(result, self.json)
        return FOUND if result.at_least(self.fail_on) else CLEAN


@dataclasses.dataclass(frozen=True)
class GainCommand:
    """Print the gains of activations.

    Attributes:
        activation: names of jax.nn or jax.numpy, or module:function.
    """

    activation: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="NAME")]

    def result(self) -> str:
        if not self.activation:
            raise UsageError("activation is missing: give names such as gelu, tanh or package.module:function")
        criteria = ("second_moment", "variance", "derivative")
        lines = [f"{'':24s}" + "".join(f"{name:>16s}" for name in criteria)]
        for name in self.activation:
            f = _activation(name)
            lines.append(f"{name:24s}" + "".join(f"{vs.gain(f, criterion):16.10f}" for criterion in criteria))
        return "\n".join(lines)

    def show(self, result: str) -> int:
        print(result)
        return CLEAN


Command = (
    Annotated[AuditCommand, tyro.conf.subcommand("audit")]
    | Annotated[PredictCommand, tyro.conf.subcommand("predict")]
    | Annotated[ProbeCommand, tyro.conf.subcommand("probe")]
    | Annotated[UsesCommand, tyro.conf.subcommand("uses")]
    | Annotated[AuditParametersCommand, tyro.conf.subcommand("audit-parameters")]
    | Annotated[GainCommand, tyro.conf.subcommand("gain")]
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; exits with 0 (clean), 1 (findings) or 2 (wrong use, or a model that cannot be read)."""
    command = _parsed(arguments)
    try:
        with _patience(" ".join(sys.argv[1:3] if arguments is None else arguments[:2])):
            result = command.result()
        status = command.show(result)
    except (UsageError, ValueError, TypeError, LookupError, ImportError, AttributeError, RuntimeError, OSError) as error:
        told = str(error).strip().splitlines() or [type(error).__name__]
        print(f"varscale: error: {told[0]}", file=sys.stderr)
        status = WRONG_USE
    sys.exit(status)


def _parsed(arguments: Sequence[str] | None) -> Any:
    """The command that is asked for; wrong arguments are told in one line, as all errors are."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(Command, prog="varscale", args=arguments, description=__doc__)  # pyright: ignore[reportArgumentType]
    except SystemExit as ended:
        if ended.code == WRONG_USE:
            plain = _ESCAPE.sub("", told.getvalue())  # a terminal gets colours, and frames of "─" or "-"
            lines = [line.strip("│| ") for line in plain.splitlines()[1:] if re.search(r"\w", line)]
            text, _, rest = " ".join(lines).partition("For full helptext, run")
            text = text.replace("Unrecognized options: Available", "A command is missing. Available")
            print(f"varscale: error: {text.strip().rstrip('.')}; see {rest.strip(': ')}", file=sys.stderr)
        raise


def resolved(target: str) -> Any:
    """The model that module:name says: what it is, or what it returns where it takes no argument.

    Raises:
        UsageError: there is none, or it needs arguments that nobody gives.
    """
    found = imported(target)
    if isinstance(found, nn.Module | nnx.Module):
        return found
    if not callable(found):
        raise UsageError(f"target {target!r} must be a flax module or a function, not {found!r}")
    needed = [
        p.name
        for p in inspect.signature(found).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if inspect.isclass(found) and (more := [name for name in needed if name != "rngs"]):
        told = f"target {target!r}: {found.__name__} needs {', '.join(more)}"
        raise UsageError(f"{told}: give a function of no argument that returns one")
    if inspect.isclass(found) and issubclass(found, nnx.Module):
        return lambda rngs: found(rngs=rngs)  # pyright: ignore[reportCallIssue]
    if needed:
        return found
    with _told_as(target):
        return found()


def imported(target: str) -> Any:
    """What module:name says.

    Raises:
        UsageError: there is no such module, it does not import, or it has no such name.
    """
    module_name, _, name = target.partition(":")
    if not name:
        raise UsageError(f"target must be module:name, such as package.models:Net, not {target!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module_name = module_name.removesuffix(".py").replace("/", ".")
    with _told_as(target):
        found: Any = importlib.import_module(module_name)
    for part in name.split("."):
        if not hasattr(found, part):
            near = [other for other in dir(found) if not other.startswith("_")][:8]
            raise UsageError(f"target {target!r}: {module_name} has no {part!r}; it has {', '.join(near)}")
        found = getattr(found, part)
    return found


@contextlib.contextmanager
def _told_as(target: str) -> Iterator[None]:
    """Whatever a stranger's module raises is a wrong target, in one line."""
    try:
        yield
    except Exception as error:
        raise UsageError(f"target {target!r}: {type(error).__name__}: {error}") from error


def parsed_input(text: str, key: Any = None) -> Any:
    """An input of this dtype and shape; drawn where there is a key, and for whole numbers in a range.

    Raises:
        UsageError: the text is no such description.

    >>> parsed_input("bf16[2, 3]")
    ShapeDtypeStruct(shape=(2, 3), dtype=bfloat16)
    """
    found = _SPEC.fullmatch(text.strip())
    if found is None:
        raise UsageError(f'--input must be like "f32[8,224,224,3]", "bf16[2,16]" or "i32[2,128]:0..999", not {text!r}')
    kind = found["kind"]
    name = "bool" if kind == "bool" else _DTYPES[kind] + (found["bits"] or "32")
    try:
        dtype = jnp.dtype(name)
    except TypeError as error:
        raise UsageError(f"--input {text!r}: there is no dtype {name}") from error
    shape = tuple(int(n) for n in found["shape"].split(",") if n.strip())
    if found["high"] is not None:
        low, high = int(found["low"]), int(found["high"])
        if low > high:
            raise UsageError(f"--input {text!r}: the range must not end below its start")
        return np.random.default_rng(0).integers(low, high + 1, shape).astype(dtype)
    if key is None:
        return jax.ShapeDtypeStruct(shape, dtype)
    return jax.random.normal(key, shape, dtype) if jnp.issubdtype(dtype, jnp.inexact) else jnp.zeros(shape, dtype)


def parsed_keyword(text: str) -> tuple[str, Any]:
    """A keyword and its value: True, False, None, a number or a string.

    Raises:
        UsageError: there is no "=".
    """
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(f"--keyword must be name=value, such as train=False, not {text!r}")
    for read in ({"True": True, "False": False, "None": None}.__getitem__, int, float):
        with contextlib.suppress(KeyError, ValueError):
            return name, read(value)
    return name, value


def _activation(name: str) -> Any:
    if ":" in name:
        return imported(name)
    for home in (jax.nn, jnp):
        if callable(found := getattr(home, name, None)):
            return found
    raise UsageError(f"activation {name!r} is neither in jax.nn nor in jax.numpy; give module:function for one of your own")


def _show(result: Any, as_json: bool) -> None:
    """The result on the terminal: coloured there, plain in a pipe."""
    if as_json:
        print(result.to_json())
    elif sys.stdout.isatty() and hasattr(result, "__rich__"):
        rich.console.Console(highlight=False, soft_wrap=True).print(result, markup=False)
    else:
        print(result.table())


def _draw(result: Any, file: str | None) -> None:
    if file is not None:
        result.plot().savefig(file, bbox_inches="tight")


@contextlib.contextmanager
def _patience(what: str) -> Iterator[None]:
    """Show on a terminal that something goes on, and for how long, once it has taken two seconds."""
    console = rich.console.Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.TimeElapsedColumn())
    bar = progress.Progress(*columns, console=console, transient=True)
    bar.add_task(what, total=None)
    timer = threading.Timer(_SLOW, bar.start)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        bar.stop()
