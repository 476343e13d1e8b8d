"""What a compiled program moves: reads the text of XLA's optimised HLO.

Only what decides memory traffic is read: each instruction's shapes, and in their layouts the
memory they lie in. `S(0)`, left out in print, is the device's main memory (HBM); `S(1)` is
on-chip memory (VMEM on a TPU); `S(5)` is the host's.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable

_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "f8e4m3fn": 8, "f8e5m2": 8,
    "s16": 16, "u16": 16, "f16": 16, "bf16": 16, "s32": 32, "u32": 32, "f32": 32,
    "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
_HOST = 5
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
)
# They name or regroup what is there already.
_FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "async-update",
    "partition-id",
    "replica-id",
    "after-all",
    "while",
    "conditional",
    "call",
)
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array: its size in bytes, without padding, and the number of its memory space."""

    size: int
    space: int


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction as printed.

    Attributes:
      name: without the percent sign.
      opcode: such as `fusion`, `all-reduce`.
      shape: its output as printed, layouts included.
      outputs: the arrays of its output.
      operands: names of its operands.
      attributes: what follows the operands.
    """

    name: str
    opcode: str
    shape: str
    outputs: tuple[Buffer, ...]
    operands: tuple[str, ...]
    attributes: str

    @property
    def op_name(self) -> str:
        """The JAX operation it comes from, empty where none is noted."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def calls(self) -> str:
        """The computation that a fusion or a wrapped operation runs, empty for others."""
        found = re.search(r"calls=%([\w.\-]+)", self.attributes)
        return found[1] if found else ""

    @property
    def cycles(self) -> int:
        """The compiler's own estimate of its time (TPU only), 0 where it gives none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        cycles = int(found[1]) if found else 0
        return cycles if cycles < 2**62 else 0  # the greatest integers stand for "not known"


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: computations by name, and which one it starts with."""

    computations: dict[str, tuple[Instruction, ...]]
    entry: str


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one instruction reads and writes, by memory."""

    instruction: Instruction
    kind: str
    hbm: int
    on_chip: int


def buffers(shape: str) -> tuple[Buffer, ...]:
    """The arrays of a printed shape, such as `(bf16[8,128]{1,0:T(8,128)S(1)}, u32[])`."""
    found = []
    for dtype, sizes, layout in _ARRAY.findall(shape):
        if dtype in _BITS:
            elements = math.prod(int(n.lstrip("<=")) for n in sizes.split(",") if n)
            space = _SPACE.search(layout)
            found.append(Buffer(elements * _BITS[dtype] // 8, int(space[1]) if space else 0))
    return tuple(found)


def plain(shape: str) -> str:
    """A printed shape without its layouts; `*` marks arrays in on-chip memory."""
    return re.sub(r"\{[^{}]*\}", lambda m: "*" if "S(1)" in m[0] else "", shape)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis opened at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    raise ValueError(f"unbalanced parentheses in HLO: {text[:80]}")


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end + 1 :]
    opening = rest.index("(")
    closing = _closing(rest, opening)
    return Instruction(
        name=head[1],
        opcode=rest[:opening],
        shape=shape,
        outputs=buffers(shape),
        operands=tuple(_NAME.findall(rest[opening:closing])),
        attributes=rest[closing + 1 :],
    )


def parse(text: str) -> Module:
    """Reads the text of `compiled.as_text()`. Raises ValueError where it is no HLO."""
    computations: dict[str, tuple[Instruction, ...]] = {}
    entry, name = "", ""
    body: list[Instruction] = []
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line)
        if head:
            name, body = head[2], []
            entry = name if head[1] else entry
        elif line.startswith("}"):
            computations[name] = tuple(body)
        elif (instruction := _instruction(line)) is not None:
            body.append(instruction)
    if not entry:
        raise ValueError("no HLO text: it has no ENTRY computation")
    return Module(computations, entry)


def traffic(module: Module) -> list[Traffic]:
    """Bytes in and out of each instruction of the entry computation and of the loops in it.

    What a fusion keeps to itself costs nothing; a copy counts both its ends, so that what is
    fetched ahead into on-chip memory and used from there is one read of HBM. A loop's body
    counts once, however often it runs.
    """
    found = []
    for name in _running(module):
        body = module.computations[name]
        outputs = {i.name: i.outputs for i in body}
        for i in body:
            # What a pair of start and done moves counts with its start.
            if i.opcode in _FREE or i.opcode.endswith("-done"):
                continue
            if _target(i) == "ConcatBitcast":  # a name for neighbouring buffers
                continue
            moved = _written(i, module) + [b for o in i.operands for b in outputs.get(o, ())]
            if i.opcode == "copy-start":
                moved = list(i.outputs[:2])  # destination, source, and a semaphore
            elif i.opcode == "slice-start":
                there = i.outputs[1 if len(i.outputs) < 3 else -2]
                whole = i.outputs[0]
                moved = [there, Buffer(there.size, whole.space)]
            hbm = sum(b.size for b in moved if b.space == 0)
            on_chip = sum(b.size for b in moved if b.space not in (0, _HOST))
            found.append(Traffic(i, kind(i, module), hbm, on_chip))
    return found


def _running(module: Module) -> list[str]:
    """The entry computation, and those that its loops and branches run."""
    names, queue = [], [module.entry]
    while queue:
        name = queue.pop()
        names.append(name)
        for i in module.computations[name]:
            if i.opcode in ("while", "conditional", "call"):
                called = re.findall(
                    r"(?:body|calls|to_apply|branch_computations|\w+_computation)=\{?([^}=]*)[,}]?",
                    i.attributes,
                )
                queue += [c for c in _NAME.findall(" ".join(called)) if c in module.computations]
    return list(dict.fromkeys(names))


def _target(instruction: Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return found[1] if found else ""


def kind(instruction: Instruction, module: Module) -> str:
    """The opcode; for a fusion what dominates it, and whether it belongs to the gradient."""
    if instruction.opcode == "async-start" and instruction.calls:
        return module.computations[instruction.calls][-1].opcode
    if instruction.opcode != "fusion":
        return instruction.opcode.removesuffix("-start")
    inside = {i.opcode for i in module.computations.get(instruction.calls, ())}
    for opcode in (
        "convolution",
        "dot",
        "select-and-scatter",
        "scatter",
        "gather",
        "reduce-window",
    ):
        if opcode in inside:
            break
    else:
        opcode = "reduce" if "reduce" in inside else "elementwise"
    return f"{opcode} fusion" + (", gradient" if "transpose(" in instruction.op_name else "")


def _written(i: Instruction, module: Module) -> list[Buffer]:
    """An instruction's outputs; of a collective that it begins, what that will write."""
    starts = i.opcode.endswith("-start") and i.opcode != "all-reduce-start"
    if not starts or kind(i, module) not in COLLECTIVES:
        return list(i.outputs)
    count = len(i.operands)  # they come first, then as many results, a context last
    return list(i.outputs[count : 2 * count])


def collectives(module: Module) -> dict[str, tuple[int, int]]:
    """`{kind: (how many, bytes of their outputs)}` in a run of the program."""
    found: dict[str, tuple[int, int]] = {}
    for name in _running(module):
        for i in module.computations[name]:
            opcode = kind(i, module)
            if opcode in COLLECTIVES and not i.opcode.endswith(("-done", "-update")):
                count, size = found.get(opcode, (0, 0))
                found[opcode] = (count + 1, size + sum(b.size for b in _written(i, module)))
    return found


def host_transfers(module: Module) -> list[str]:
    """Names of instructions that exchange data with the host."""
    return [
        i.name
        for name in _running(module)
        for i in module.computations[name]
        if i.opcode in ("infeed", "outfeed")
        or (i.opcode in ("send", "recv") and "is_host_transfer=true" in i.attributes)
        or (i.opcode == "custom-call" and "callback" in _target(i))
        or any(b.space == _HOST for b in i.outputs)
    ]


def by_kind(moved: Iterable[Traffic]) -> dict[str, tuple[int, int, int]]:
    """`{kind: (how many, bytes in HBM, bytes on chip)}`, most bytes first."""
    sums: dict[str, tuple[int, int, int]] = {}
    for t in moved:
        count, hbm, on_chip = sums.get(t.kind, (0, 0, 0))
        sums[t.kind] = (count + 1, hbm + t.hbm, on_chip + t.on_chip)
    return dict(sorted(sums.items(), key=lambda item: -item[1][1] - item[1][2]))
