"""Poles, step sizes and gates of recurrences, recognised by what a program does with its parameters.

| what the program has | it is |
|---|---|
| exp(−exp(ν)), with exp(iθ) or exp(i exp(θ)) beside it | a linear recurrent unit's decay ν and phase θ |
| exp(Δ(−exp(a) + i b)) or exp(Δ(a + i b)), Δ = exp(δ) | a diagonal state space's poles a and b and log step δ |
| exp(softplus(W x + δ) · (−exp(a))) | a selective state space's poles a, step kernel W and step bias δ |
| sigmoid(z) · c + sigmoid(y) · ..., c the state of a loop | the bias in z: a forget gate; that in y: an input gate |

Kernels between which such a recurrence lies are its inputs and outputs; a vector times activations that is added to its output
is its skip.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from varscale import _compat
from varscale.schemes.recurrence_values import (
    ENTRY,
    Atom,
    Gate,
    Known,
    Map,
    Recurrences,
    Signal,
    Term,
    entries_of,
    few,
    is_softplus,
    joined,
    moved,
    number,
    rearranged,
    step_of,
    terms_of,
)
from varscale.usage.table import Uses

_SAME = {"convert_element_type", "stop_gradient", "copy", "name", "optimization_barrier", "reduce_precision", "pvary"}
_SAME |= {"sharding_constraint", "real", "imag", "conj", "rev"}
_LAYOUT = {"reshape", "squeeze", "expand_dims", "transpose", "broadcast_in_dim", "slice"}
_SUMS = {"reduce_sum", "cumsum"}


def recurrences(uses: Uses) -> Recurrences:
    """Read the recurrences off a model's trace."""
    found = uses.found
    if found is None:
        return Recurrences()
    reader = _Reader([name.path for name in found.names], [tuple(v.aval.shape) for v in found.jaxpr.invars])
    args: list[Known] = []
    for i, var in enumerate(found.jaxpr.invars):
        if i >= len(found.names):
            args.append(Signal())
        elif found.names[i].learned:
            args.append(Term(((1, frozenset({("is", i)})),), entries_of(i, tuple(var.aval.shape))))
        else:
            args.append(None)
    for out in reader.run(found.jaxpr, [None] * len(found.jaxpr.constvars), args):
        if isinstance(out, Signal):
            reader.leaves_recurrence(out.near, None)
    return reader.found


class _Reader:
    """Follows terms and signals through a program, and notes what it finds."""

    def __init__(self, paths: Sequence[str], shapes: Sequence[tuple[int, ...]]):
        self.found = Recurrences()
        self._paths: dict[int, str] = dict(enumerate(paths))
        self._shapes = shapes
        self._maps: list[Map] = []
        self._weighted: set[int] = set()  # parameters of poles whose exponentials were multiplied with weights
        self._rules: dict[str, Callable[..., Known]] = {
            "exp": self._exp, "neg": self._neg, "mul": self._mul, "div": self._div, "add": self._add, "add_any": self._add,
            "sub": self._sub, "complex": self._complex, "cos": self._turn, "sin": self._turn, "logistic": self._logistic,
            "log1p": self._log1p, "dot_general": self._dot, "conv_general_dilated": self._dot,
            "max": self._clipped, "min": self._clipped,
        }  # fmt: skip

    # -- the walk -------------------------------------------------------------------------------------------------------

    def run(self, jaxpr: Any, consts: Sequence[Known], args: Sequence[Known]) -> list[Known]:
        """The outputs of a jaxpr."""
        env: dict[Any, Known] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

        def read(var: Any) -> Known:
            return number(var.val) if _compat.is_literal(var) else env[var]

        for eqn in jaxpr.eqns:
            env.update(zip(eqn.outvars, self._equation(eqn, [read(v) for v in eqn.invars]), strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _equation(self, eqn: Any, ins: list[Known]) -> list[Known]:
        name = eqn.primitive.name
        if not any(isinstance(x, Term | Signal) for x in ins):
            keeps = name in (*_SAME, "broadcast_in_dim", "reshape") and isinstance(ins[0], complex)
            return [ins[0] if keeps else None] * len(eqn.outvars)
        if name == "scan":
            return self._scan(eqn, ins)
        if name in self._rules:
            return [self._rules[name](eqn, *ins)]
        if name in _SAME:
            return [ins[0]]
        if name in _LAYOUT:
            return [moved(ins[0], lambda a: rearranged(eqn, a))]
        if name == "split":
            ends = np.cumsum(eqn.params["sizes"])[:-1]
            return [moved(ins[0], lambda a, k=k: np.split(a, ends, eqn.params["axis"])[k]) for k in range(len(eqn.outvars))]
        if name == "concatenate":
            return [joined(ins, eqn)]
        return self._called(eqn, ins)

    def _called(self, eqn: Any, ins: list[Known]) -> list[Known]:
        """The outputs of a call, or of what the reader does not know."""
        signals = [x for x in ins if isinstance(x, Signal)]
        if eqn.params.get("name") in ("softplus", "logaddexp") and len(signals) == 1 and len(eqn.outvars) == 1:
            return [Signal(signals[0].near, step=step_of(signals[0]))]
        if eqn.primitive.name == "custom_jvp_call" and len(signals) == 1 and is_softplus(eqn):
            return [Signal(signals[0].near, step=step_of(signals[0]))]
        if eqn.primitive.name == "cond":
            return self.run(_compat.sub_jaxpr(eqn.params["branches"][0])[0], [], ins[1:])
        for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
            if key in eqn.params:
                jaxpr, consts = _compat.sub_jaxpr(eqn.params[key])
                if len(jaxpr.invars) == len(ins):
                    return self.run(jaxpr, [number(c) for c in consts], ins)
        return [self._unknown(eqn.primitive.name, ins)] * len(eqn.outvars)

    def _unknown(self, name: str, ins: Sequence[Known]) -> Known:
        signals, terms = [x for x in ins if isinstance(x, Signal)], [x for x in ins if isinstance(x, Term)]
        near = frozenset().union(*(x.near for x in signals), *(x.atoms for x in terms))
        if signals:
            decays = {x.decay for x in signals} if name in _SUMS else {None}
            return Signal(near, decay=decays.pop() if len(decays) == 1 else None)
        return Term(((1, frozenset({("of", frozenset().union(*(x.parameters for x in terms)))})),))

    def _scan(self, eqn: Any, ins: list[Known]) -> list[Known]:
        constants, carry, streams = _compat.scan_operands(eqn.params, ins)
        jaxpr, consts = _compat.sub_jaxpr(eqn.params["jaxpr"])
        states = [
            x if isinstance(x, Term) else Signal(x.near if isinstance(x, Signal) else frozenset(), state=True) for x in carry
        ]
        steps = [moved(x, lambda a: a[0]) for x in streams]
        outs = self.run(jaxpr, [number(c) for c in consts], [*constants, *states, *steps])
        return [Signal(x.near) if isinstance(x, Signal) else x for x in outs]

    # -- terms and signals ----------------------------------------------------------------------------------------------

    def _neg(self, eqn: Any, x: Known) -> Known:
        return self._mul(eqn, x, complex(-1))

    def _mul(self, eqn: Any, x: Known, y: Known) -> Known:
        if not isinstance(x, Signal) and (isinstance(y, Signal) or not isinstance(x, Term)):
            x, y = y, x
        if isinstance(x, Signal) and isinstance(y, Signal):
            return self._product(x, y)
        if isinstance(x, Signal) and isinstance(y, Term):
            return self._times(x, y)
        if isinstance(x, Signal):
            return dataclasses.replace(x, gate=(), state=False, made_by=None, shifts=(), offset=0.0)
        if not isinstance(x, Term):
            return x * y if isinstance(x, complex) and isinstance(y, complex) else None
        if isinstance(y, Term):
            return self._multiplied(x, y)
        factor = y if isinstance(y, complex) else 1
        return Term(tuple((c * factor, atoms) for c, atoms in x.monomials))

    def _div(self, eqn: Any, x: Known, y: Known) -> Known:
        if isinstance(y, Term) and isinstance(x, Term):
            return self._multiplied(x, Term(((1, frozenset({("of", y.parameters)})),)))
        if isinstance(y, complex) and y:
            return self._mul(eqn, x, 1 / y)
        return self._mul(eqn, x, None) if y is None else self._unknown("div", [x, y])

    def _multiplied(self, x: Term, y: Term) -> Term:
        """The product of two terms; what multiplies a pole's exponential is its weight."""
        made: dict[frozenset[Atom], complex] = {}
        for c, one in x.monomials:
            for d, other in y.monomials:
                made[one | other] = made.get(one | other, 0) + c * d
        for atoms in made:
            turns = [atom for atom in atoms if atom[0] == "turn"]
            if any(atom[0] == "decay" for atom in atoms):
                self.found.phase.update({self._paths[min(atom[1])]: atom[2] for atom in turns})
        for one, other in ((x, y), (y, x)):
            if any(atom[0] == "pole" for atom in one.atoms) and not any(atom[0] == "pole" for atom in other.atoms):
                parts = {atom[1]: c for c, atoms in other.monomials for atom in atoms if atom[0] == "is"}
                pair = len({abs(c.imag) > abs(c.real) for c in map(complex, parts.values())}) > 1
                self._weighted |= one.parameters if parts.keys() - one.parameters else set()
                for i in parts.keys() - one.parameters:
                    self.found.weights[self._paths[i]] = pair or self._shapes[i][-1:] == (2,)
        return few(Term(tuple((c, atoms) for atoms, c in made.items())))

    def _times(self, x: Signal, y: Term) -> Signal:
        """A signal times a term; what multiplies the states of a state space is their weight."""
        shapes = {self._shapes[i] for i in self._poles(x.near) if self._paths[i] in self.found.real}
        if all(len(atoms) == 1 and min(atoms)[0] == "is" for _, atoms in y.monomials):
            of_states = {i for i in y.parameters if shapes & {self._shapes[i], self._shapes[i][:-1]}}
            self.found.weights.update((self._paths[i], len(of_states) > 1 or self._shapes[i] not in shapes) for i in of_states)
            self._weighted |= self._poles(x.near) if of_states else set()
        rate = y.alone("exp")
        decay = (rate, x.step) if rate is not None and x.step is not None else None
        return Signal(x.near | y.atoms, decay=decay, scaled=y.alone("is"))

    def _product(self, x: Signal, y: Signal) -> Signal:
        near = x.near | y.near
        for one, other in ((x, y), (y, x)):
            if one.gate and other.state:
                return Signal(near, holds=one.gate, offset=one.offset)
        if x.gate or y.gate:
            return Signal(near, admits=x.gate or y.gate, offset=x.offset if x.gate else y.offset)
        return Signal(near)

    def _add(self, eqn: Any, x: Known, y: Known) -> Known:
        if isinstance(x, Signal) and isinstance(y, Signal):
            return self._sum(x, y)
        if isinstance(y, Signal) or not isinstance(x, Signal | Term):
            x, y = y, x
        if isinstance(x, Term) and isinstance(y, Term):
            return few(Term((*x.monomials, *y.monomials)))
        if isinstance(x, Signal) and isinstance(y, Term):
            shape = eqn.outvars[0].aval.shape
            shifts = x.shifts
            if y.entries is not None and sum(n > 1 for n in y.entries.shape) <= 1:
                shifts = (*shifts, np.broadcast_to(y.entries, shape))
            return Signal(x.near | y.atoms, x.made_by, shifts, x.offset)
        added = y.real if isinstance(y, complex) else 0.0
        return dataclasses.replace(x, gate=(), state=False, offset=x.offset + added) if isinstance(x, Signal) else x

    def _sub(self, eqn: Any, x: Known, y: Known) -> Known:
        if isinstance(x, Signal) and isinstance(y, Signal) and x.decay is not None and x.decay == y.decay:
            return Signal(x.near | y.near, decay=x.decay)
        return self._add(eqn, x, self._neg(eqn, y) if y is not None else None)

    def _sum(self, x: Signal, y: Signal) -> Signal:
        for one, other in ((x, y), (y, x)):
            if one.holds:
                holds, admits = (
                    [g for x in xs if (g := self._gate(x, of))] for xs, of in ((one.holds, one), (other.admits, other))
                )
                self.found.gates += [(gate, admits[-1] if admits else None) for gate in holds[-1:]]
            if other.scaled is not None and self._poles(one.near) and not self._poles(other.near):
                self.found.skip.add(self._paths[other.scaled])
        made_by = x.made_by if x.made_by is not None else y.made_by
        return Signal(x.near | y.near, made_by, (*x.shifts, *y.shifts), x.offset + y.offset)

    def _gate(self, entries: np.ndarray, signal: Signal) -> Gate | None:
        """The run of a bias that these are the entries of; None where they are none of one."""
        own = np.unique(entries)
        if not own.size or own[-1] - own[0] != own.size - 1:
            return None
        leaf = int(own[0]) // ENTRY
        start, stop = int(own[0]) % ENTRY, int(own[-1]) % ENTRY + 1
        return Gate(self._paths[leaf], start, stop, self._shapes[leaf][-1], signal.offset)

    def _complex(self, eqn: Any, x: Known, y: Known) -> Known:
        return self._add(eqn, x, self._mul(eqn, y, 1j)) if isinstance(y, Term | Signal) else x

    def _exp(self, eqn: Any, x: Known) -> Known:
        if isinstance(x, Signal):
            if x.decay is not None:
                self._selective(*x.decay)
                return Signal(x.near | {("pole", frozenset({x.decay[0]}))})
            return Signal(x.near, exped=step_of(x))
        assert isinstance(x, Term)
        own = x.alone("is")
        if own is not None and x.monomials[0][0] == 1:
            return Term(((1, frozenset({("exp", own)})),))
        return Term(((1, self._exponential(x)),))

    def _exponential(self, x: Term) -> frozenset[Atom]:
        """What the exponential of a term is, in atoms."""
        falls = [atoms for c, atoms in x.monomials if abs(complex(c).imag) <= abs(c) / 2 and complex(c).real < 0]
        turns = [atoms for c, atoms in x.monomials if abs(complex(c).imag) > abs(c) / 2]
        exps = [{atom[1] for atom in atoms if atom[0] == "exp"} for atoms in falls]
        made: set[Atom] = set()
        if len(exps) == 1 and len(exps[0]) == 1 and len(falls[0]) == 1:
            self.found.decay.add(self._paths[min(exps[0])])
            made.add(("decay", frozenset(exps[0])))
        if len(exps) == 1 and len(exps[0]) == 2 and len(falls[0]) == 2:
            return frozenset({self._space(exps[0], turns)})
        plain = [atoms for c, atoms in x.monomials if abs(complex(c).imag) <= abs(c) / 2 and len(atoms) == 2]
        steps = {atom for atoms in turns if len(atoms) == 2 for atom in atoms if atom[0] == "exp"}
        if len(plain) == len(steps) == len(x.monomials) - 1 == 1 and steps < plain[0]:
            (own,) = plain[0] - steps
            if own[0] == "is":
                self.found.real[self._paths[own[1]]] = False
                pole = self._space({min(steps)[1]}, turns)
                return frozenset({("pole", pole[1] | {own[1]})})
        for atoms in turns:
            if len(atoms) == 1 and (atom := min(atoms, key=str))[0] in ("is", "exp"):
                made.add(("turn", frozenset({atom[1]}), atom[0] == "exp"))
                if len(falls) == 1:
                    self.found.phase[self._paths[atom[1]]] = atom[0] == "exp"
        return frozenset(made) or frozenset({("of", x.parameters)})

    def _space(self, exps: set[int], turns: Sequence[frozenset[Atom]]) -> Atom:
        """A state space's exponential: of its two exponentials the step is the one in the imaginary part, or the smaller."""
        beside = {atom[1] for atoms in turns for atom in atoms if atom[0] == "exp"} & exps
        step = min(beside or exps, key=lambda i: (math.prod(self._shapes[i]), i))
        imaginary = {atom[1] for atoms in turns for atom in atoms if atom[0] == "is"}
        self.found.steps.add(self._paths[step])
        self.found.real.update({self._paths[i]: True for i in exps - {step}})
        self.found.imaginary.update((self._paths[i], self._shapes[step]) for i in imaginary)
        return ("pole", frozenset(exps | imaginary))

    def _turn(self, eqn: Any, x: Known) -> Known:
        if isinstance(x, Term):
            for what in ("is", "exp"):
                if (own := x.alone(what)) is not None:
                    return Term(((1, frozenset({("turn", frozenset({own}), what == "exp")})),))
        return self._unknown("cos", [x])

    def _logistic(self, eqn: Any, x: Known) -> Known:
        return Signal(x.near, gate=x.shifts, offset=x.offset) if isinstance(x, Signal) else self._unknown("logistic", [x])

    def _clipped(self, eqn: Any, x: Known, y: Known) -> Known:
        term, bound = (x, y) if isinstance(x, Term) else (y, x)
        clips = isinstance(term, Term) and isinstance(bound, complex)
        return term if clips else self._unknown("max", [x, y])

    def _log1p(self, eqn: Any, x: Known) -> Known:
        if isinstance(x, Signal) and x.exped is not None:
            return Signal(x.near, step=x.exped)
        return self._unknown("log1p", [x])

    # -- linear maps ----------------------------------------------------------------------------------------------------

    def _dot(self, eqn: Any, x: Known, y: Known) -> Known:
        if isinstance(x, Term) and isinstance(y, Term):
            return self._multiplied(x, y)
        if isinstance(y, Signal) and not isinstance(x, Signal):
            x, y = y, x
        if not (isinstance(x, Signal) and isinstance(y, Term)):
            return self._unknown("dot_general", [x, y])
        terms = terms_of(eqn)
        if terms == 1:  # an outer product
            return self._times(x, y)
        kernel = frozenset(atom[1] for atom in y.atoms if atom[0] == "is")
        scales = frozenset(atom[1] for atom in y.atoms if atom[0] == "exp")
        self.leaves_recurrence(x.near, kernel)
        self._maps.append(Map(kernel, scales, terms, x.near))
        return Signal(frozenset({("map", len(self._maps) - 1)}), len(self._maps) - 1)

    def _poles(self, near: frozenset[Atom]) -> set[int]:
        """The parameters of poles that something was made with."""
        owners = {i for atom in near if atom[0] != "map" for i in (atom[1] if isinstance(atom[1], frozenset) else atom[1:2])}
        return {i for i in owners if self._paths[i] in {*self.found.decay, *self.found.real, *self.found.poles}}

    def leaves_recurrence(self, near: frozenset[Atom], kernel: frozenset[int] | None) -> None:
        """Note the kernels on both sides of a recurrence, where the signal that is read comes from one."""
        decays = {i for atom in near if atom[0] == "decay" for i in atom[1]}
        maps = [self._maps[atom[1]] for atom in near if atom[0] == "map"]
        for nu in decays:
            own = self._shapes[nu]
            scales = {i for m in maps for i in m.scales} | {atom[1] for atom in near if atom[0] == "exp"}
            for i in scales:
                if self._shapes[i] == own and self._paths[i] not in (*self.found.decay, *self.found.phase):
                    self.found.normalizer[self._paths[i]] = self._paths[nu]
            self.found.inputs.update({self._paths[i]: m.terms for m in maps for i in m.kernel})
            self.found.outputs.update({self._paths[i]: own[-1] for i in kernel or ()})
        spaces = {i for i in self._poles(near) if self._paths[i] in self.found.real}
        if kernel and spaces - self._weighted:
            for i in kernel:
                self.found.weights[self._paths[i]] = len(kernel) > 1 or self._shapes[i][-1:] == (2,)

    def _selective(self, rate: int, step: tuple[int | None, int | None]) -> None:
        made_by, bias = step
        self.found.poles.add(self._paths[rate])
        if bias is not None:
            self.found.step_bias.add(self._paths[bias])
        if made_by is not None:
            self.found.step_kernel.update(self._paths[i] for i in self._maps[made_by].kernel)
